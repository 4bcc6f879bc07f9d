#include "fuzz/fuzz_case.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace sla2::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

void set_sizes(Problem& p, Random& random) {
  p.batch = random.one_of({1, 1, 1, 2});
  p.num_kv_heads = random.one_of({1, 1, 1, 2});
  p.num_heads = p.num_kv_heads * random.one_of({1, 1, 1, 2, 3});
  // Mostly small, so that the reference does many; some a few blocks long; some degenerate.
  const auto tokens = [&] {
    const std::int64_t kind = random.between(0, 9);
    return kind == 0  ? random.one_of({1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 257})
           : kind < 8 ? random.between(1, 100)
                      : random.between(100, 420);
  };
  p.q_tokens = tokens();
  p.k_tokens = tokens();
  p.head_dim = random.chance(0.5) ? random.one_of({16, 32, 64}) : 16 * random.between(1, 16);
  p.value_dim = random.chance(0.6) ? p.head_dim : 16 * random.between(1, 16);
  p.dtype = random.one_of({DType::kF32, DType::kF32, DType::kBF16, DType::kF16});
}

void set_options(Problem& p, Random& random) {
  Config& c = p.config;
  c.block_q = random.one_of({32, 32, 64, 128, 256});
  c.block_k = random.one_of({32, 32, 64, 128, 256});
  c.keep = random.chance(0.3) ? random.one_of({1e-9, 0.03, 0.5, 1.0})
                              : std::uniform_real_distribution<double>(0.01, 1)(random.generator);
  if (random.chance(0.3)) c.scale = random.one_of({0.01, 0.2, 0.7});
  c.feature_map =
      random.one_of({FeatureMap::kSoftmax, FeatureMap::kSoftmax, FeatureMap::kElu,
                     FeatureMap::kRelu});
  c.precision = random.one_of({Precision::kInt8, Precision::kInt8, Precision::kBf16,
                               Precision::kFp32, Precision::kFp8});
  c.routing = random.one_of({RoutingMode::kHard, RoutingMode::kHard, RoutingMode::kSoft});
  c.tau = random.one_of({0.1, 0.1, 0.03, 1.0});
  c.score_norm = random.one_of({ScoreNorm::kNone, ScoreNorm::kSoftmax});
  c.linear_keys = random.one_of({LinearKeys::kSmoothed, LinearKeys::kRaw});
  c.linear_scope =
      random.one_of({LinearScope::kComplement, LinearScope::kComplement, LinearScope::kAll});
  c.backward = random.one_of({BackwardMode::kPaper, BackwardMode::kMatched});
  c.method = random.one_of({Method::kSla2, Method::kSla2, Method::kSla2, Method::kSla});
  if (c.method == Method::kSla2) {
    p.num_routers = random.chance(0.3) ? p.num_heads : 1;
    p.alpha_blocks = random.chance(0.5) ? num_q_blocks(p) : 1;
  }
  if (random.chance(0.3)) {
    const std::int64_t begin = random.between(0, p.k_tokens);
    p.protected_keys = {begin, random.between(begin, p.k_tokens)};
  }
}

/// Replaces a few values.
template <typename Value>
void sprinkle(std::vector<double>& values, double share, Random& random, Value value) {
  const auto count = static_cast<std::int64_t>(share * static_cast<double>(values.size()));
  for (std::int64_t i = 0; i < count; ++i) {
    values[static_cast<std::size_t>(random.between(0, std::ssize(values) - 1))] = value();
  }
}

void fill_values(Tensor& tensor, std::int64_t width, const FuzzCase& c, Random& random) {
  std::vector<double> values = tensor.values();
  const bool is_half = c.problem.dtype == DType::kF16;
  switch (c.values) {
    case Values::kNormal:
    case Values::kNonFinite: {
      const double size = random.one_of({0.1, 1.0, 1.0, 2.0});
      for (double& x : values) x *= size;
      sprinkle(values, 0.05, random, [&] {
        const double denormal = is_half ? 0x1p-24 : 0x1p-140;
        return random.one_of({0.0, -0.0, denormal, -denormal});
      });
      break;
    }
    case Values::kFp16Limits:
      for (double& x : values) x = std::clamp(x, -1.0, 1.0) * 65504;
      sprinkle(values, 0.1, random, [&] { return random.one_of({65504.0, -65504.0, 0.0}); });
      break;
    case Values::kTiny: {
      const double size = is_half ? random.one_of({0x1p-14, 0x1p-22})
                                  : random.one_of({1e-20, 1e-30, 1e-38, 1e-44});
      for (double& x : values) x *= size;
      break;
    }
    case Values::kConstant:
      for (std::size_t i = width; i < values.size(); ++i) values[i] = values[i % width];
      break;
    case Values::kHuge: {
      const double size = is_half ? 65504 : random.one_of({1e19, 1e30, 3e38});
      for (double& x : values) x = std::clamp(x, -1.0, 1.0) * size;
      break;
    }
  }
  tensor.set(values);
}

}  // namespace

std::string FuzzCase::text() const {
  const Problem& p = problem;
  const Config& o = p.config;
  std::ostringstream out;
  out << (p.implementation != nullptr ? p.implementation : "?") << " B" << p.batch << " H"
      << p.num_heads << "/" << p.num_kv_heads << " N" << p.q_tokens << "x" << p.k_tokens << " d"
      << p.head_dim << "/" << p.value_dim << " type" << static_cast<int>(p.dtype) << " blocks "
      << o.block_q << "x" << o.block_k << " keep " << o.keep << " precision"
      << static_cast<int>(o.precision) << " routing" << static_cast<int>(o.routing) << " phi"
      << static_cast<int>(o.feature_map) << " norm" << static_cast<int>(o.score_norm) << " keys"
      << static_cast<int>(o.linear_keys) << " scope" << static_cast<int>(o.linear_scope)
      << " backward" << static_cast<int>(o.backward) << " method" << static_cast<int>(o.method)
      << " tau " << o.tau << " scale " << softmax_scale(p) << " protected ["
      << p.protected_keys.begin << ", " << p.protected_keys.end << ") lengths"
      << (key_lengths.empty() ? " all" : "");
  for (const std::int64_t length : key_lengths) out << " " << length;
  out << " layout" << static_cast<int>(layout) << " values" << static_cast<int>(values)
      << (given_routing ? " given" : " own") << " threads" << threads;
  return out.str();
}

FuzzCase random_case(Random& random) {
  FuzzCase c;
  set_sizes(c.problem, random);
  set_options(c.problem, random);
  if (random.chance(0.3)) {
    for (std::int64_t b = 0; b < c.problem.batch; ++b) {
      c.key_lengths.push_back(random.between(1, c.problem.k_tokens));
    }
  }
  c.layout = random.one_of({Layout::kDense, Layout::kTransposed, Layout::kPadded});
  c.values = random.one_of({Values::kNormal, Values::kNormal, Values::kNormal, Values::kFp16Limits,
                            Values::kTiny, Values::kConstant, Values::kHuge, Values::kNonFinite,
                            Values::kNonFinite});
  c.given_routing = random.chance(0.3);
  c.threads = random.between(1, 3);
  validate(c.problem);
  return c;
}

Call make_fuzz_call(const FuzzCase& c, Random& random) {
  Call call(c.problem, random.generator(), c.layout, c.key_lengths);
  fill_values(call.q, c.problem.head_dim, c, random);
  fill_values(call.k, c.problem.head_dim, c, random);
  fill_values(call.v, c.problem.value_dim, c, random);
  if (random.chance(0.2)) call.proj_q.clear();
  if (random.chance(0.2)) call.proj_k.clear();
  if (random.chance(0.2)) call.alpha_logit.clear();
  for (float& x : call.alpha_logit) {
    if (random.chance(0.1)) x = random.one_of({-30.0F, 30.0F, -100.0F, 100.0F});
  }
  return call;
}

Spoilt spoil(Call& call, Random& random) {
  const Problem& p = call.problem;
  Spoilt at;
  at.where = random.one_of({Spoilt::Where::kQ, Spoilt::Where::kK, Spoilt::Where::kV});
  const bool is_q = at.where == Spoilt::Where::kQ;
  Tensor& tensor = is_q ? call.q : at.where == Spoilt::Where::kK ? call.k : call.v;
  const std::int64_t heads = is_q ? p.num_heads : p.num_kv_heads;
  const std::int64_t tokens = is_q ? p.q_tokens : p.k_tokens;
  const std::int64_t width = at.where == Spoilt::Where::kV ? p.value_dim : p.head_dim;
  at.batch = random.between(0, p.batch - 1);
  at.head = random.between(0, heads - 1);
  at.token = random.between(0, tokens - 1);
  std::vector<double> values = tensor.values();
  for (int i = 0; i < 3; ++i) {
    const std::int64_t column = random.between(0, width - 1);
    values[static_cast<std::size_t>(((at.batch * heads + at.head) * tokens + at.token) * width +
                                    column)] =
        random.one_of({std::numeric_limits<double>::quiet_NaN(), kInf, -kInf});
  }
  tensor.set(values);
  return at;
}

void fill_routing(Call& call, Random& random) {
  const Problem& p = call.problem;
  const std::int64_t rows = p.num_heads * num_q_blocks(p);
  const std::int64_t width = max_routed_blocks(p);
  const std::int64_t columns = num_k_blocks(p, p.k_tokens);
  const bool soft = p.config.routing == RoutingMode::kSoft;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const std::int64_t length = call.key_lengths.empty() ? p.k_tokens : call.key_lengths[b];
    const std::int64_t blocks = num_k_blocks(p, length);
    for (std::int64_t r = b * rows; r < (b + 1) * rows; ++r) {
      if (soft) {
        const std::int64_t one = random.between(0, blocks - 1);  // a row needs some weight
        for (std::int64_t j = 0; j < columns; ++j) {
          const double x = random.chance(0.2) ? random.one_of({-kInf, kInf})
                                              : std::normal_distribution<>(0, 4)(random.generator);
          call.logits[r * columns + j] = static_cast<float>(j >= blocks ? -kInf : j == one ? 1 : x);
        }
        continue;
      }
      std::vector<std::int32_t> all(static_cast<std::size_t>(blocks));
      for (std::int64_t j = 0; j < blocks; ++j) all[j] = static_cast<std::int32_t>(j);
      std::shuffle(all.begin(), all.end(), random.generator);
      all.resize(static_cast<std::size_t>(random.between(1, std::min(width, blocks))));
      std::sort(all.begin(), all.end());
      for (std::int64_t j = 0; j < width; ++j) {
        call.blocks[r * width + j] = j < std::ssize(all) ? all[j] : -1;
      }
    }
  }
}

}  // namespace sla2::test

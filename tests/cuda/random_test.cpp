// Random problems, forward and backward in one go, each from its own seed. SLA2_RANDOM_PROBLEMS
// sets their number, SLA2_RANDOM_FIRST the first seed: a failure names the seed to repeat.
#include "core/random.h"

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/device_call.h"
#include "cuda/judge.h"

namespace sla2::test {
namespace {

Case random_case(std::uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  Case c;
  Problem& p = c.problem;
  p.batch = random.one_of({1, 1, 2});
  p.num_kv_heads = random.one_of({1, 1, 2});
  p.num_heads = p.num_kv_heads * random.one_of({1, 1, 2, 3});
  p.q_tokens = random.between(1, 260);
  p.k_tokens = random.between(1, 400);
  p.head_dim = random.one_of({16, 32, 64, 64, 80, 128, 128, 192});
  p.value_dim = random.chance(0.7) ? p.head_dim : random.one_of({16, 64, 96, 128});
  p.dtype = random.one_of({DType::kF32, DType::kBF16, DType::kBF16, DType::kF16});
  p.config.block_q = random.one_of({32, 32, 64, 128});
  p.config.block_k = random.one_of({32, 32, 64, 128});
  p.config.keep = random.one_of({0.03, 0.1, 0.3, 0.7, 1.0});
  p.config.precision = random.one_of(
      {Precision::kInt8, Precision::kInt8, Precision::kFp8, Precision::kBf16, Precision::kFp32});
  p.config.routing = random.one_of({RoutingMode::kHard, RoutingMode::kHard, RoutingMode::kSoft});
  p.config.feature_map = random.one_of(
      {FeatureMap::kSoftmax, FeatureMap::kSoftmax, FeatureMap::kElu, FeatureMap::kRelu});
  p.config.score_norm = random.one_of({ScoreNorm::kNone, ScoreNorm::kSoftmax});
  p.config.linear_keys = random.one_of({LinearKeys::kSmoothed, LinearKeys::kRaw});
  p.config.linear_scope =
      random.one_of({LinearScope::kComplement, LinearScope::kComplement, LinearScope::kAll});
  p.config.backward = random.one_of({BackwardMode::kPaper, BackwardMode::kMatched});
  p.config.method = random.one_of({Method::kSla2, Method::kSla2, Method::kSla2, Method::kSla});
  if (p.config.method == Method::kSla2) {
    p.num_routers = random.chance(0.3) ? p.num_heads : 1;
    p.alpha_blocks = random.chance(0.5) ? num_q_blocks(p) : 1;
  }
  if (random.chance(0.3)) p.config.scale = 0.2;
  if (random.chance(0.3)) {
    const std::int64_t begin = random.between(0, p.k_tokens - 1);
    p.protected_keys = {begin, random.between(begin, std::min(p.k_tokens, begin + 40))};
  }
  if (random.chance(0.3)) {
    for (std::int64_t b = 0; b < p.batch; ++b) {
      c.key_lengths.push_back(random.between(1, p.k_tokens));
    }
  }
  c.layout = random.one_of({Layout::kDense, Layout::kTransposed, Layout::kPadded});
  p.device = Device::kCuda;
  return c;
}

TEST(CudaRandom, ForwardAndBackward) {
  SLA2_SKIP_WITHOUT_MACHINE();
  const std::uint64_t first = environment("SLA2_RANDOM_FIRST", 1);
  const std::uint64_t count = environment("SLA2_RANDOM_PROBLEMS", 40);
  std::uint64_t ran = 0;
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    SCOPED_TRACE("SLA2_RANDOM_PROBLEMS=1 SLA2_RANDOM_FIRST=" + std::to_string(seed));
    const Case c = random_case(seed);
    validate(c.problem);
    // An older GPU has no fp8.
    if (!backend().implementation.refusal(c.problem, Pass::kForward).empty()) continue;
    ++ran;
    Call call(c.problem, seed, c.layout, c.key_lengths);
    permute_threads(seed % 3);
    DeviceCall on_device(call);
    on_device.forward();
    judge_forward(call);
    on_device.backward();
    permute_threads(0);
    judge_backward(call);
    if (testing::Test::HasFatalFailure()) return;
  }
  EXPECT_GE(ran, count / 2);
  std::printf("%llu random problems\n", static_cast<unsigned long long>(ran));
}

}  // namespace
}  // namespace sla2::test

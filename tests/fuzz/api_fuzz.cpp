// The public API on random problems, each from its own seed, on every implementation of this
// machine. SLA2_FUZZ_SECONDS (20) says how long, SLA2_FUZZ_SEED the first seed;
// SLA2_FUZZ_PROBLEMS=1 with the seed that a failure names repeats it.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "cpu/parity.h"
#include "fuzz/fuzz_case.h"
#include "fuzz/mutations.h"

namespace sla2::test {
namespace {

/// At once: a sanitizer ends the process without a word about the seed.
void announce(std::uint64_t seed, const FuzzCase& c) {
  std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), c.text().c_str());
  std::fflush(stdout);
}

/// Exactly the bytes that were asked for, at any address, full of what is NaN as a number;
/// sentinels on either side.
class Workspace {
 public:
  Workspace(std::size_t size, std::size_t misalignment)
      : memory_(kGuard + misalignment + size + kGuard, std::byte{0xA5}),
        span_(std::span(memory_).subspan(kGuard + misalignment, size)) {
    std::fill(span_.begin(), span_.end(), std::byte{0xFF});
  }
  [[nodiscard]] std::span<std::byte> span() const { return span_; }
  [[nodiscard]] bool guards_intact() const {
    const auto intact = [](std::byte x) { return x == std::byte{0xA5}; };
    const std::byte* first = span_.data();
    return std::all_of(memory_.data(), first, intact) &&
           std::all_of(first + span_.size(), memory_.data() + memory_.size(), intact);
  }

 private:
  static constexpr std::size_t kGuard = 256;
  std::vector<std::byte> memory_;
  std::span<std::byte> span_;
};

std::vector<std::vector<std::byte>> bytes_of_results(Call& call) {
  std::vector<std::vector<std::byte>> all;
  const auto add = [&](std::span<std::byte> bytes) {
    all.emplace_back(bytes.begin(), bytes.end());
  };
  for (Tensor* x : {&call.out, &call.out_sparse, &call.out_linear, &call.d_q, &call.d_k, &call.d_v})
    add(x->storage());
  for (Array<float>* x : {&call.lse, &call.k_mean, &call.logits, &call.d_alpha_logit,
                          &call.d_proj_q, &call.d_proj_k, &call.d_proj_out})
    add(x->storage());
  add(call.blocks.storage());
  return all;
}

class Fuzzer {
 public:
  explicit Fuzzer(std::uint64_t seed)
      : random_{std::mt19937_64(seed)}, case_(random_case(random_)) {
    std::vector<const char*> usable;
    for (const Implementation* one : implementations()) {
      if (one->device != Device::kCpu) continue;
      if (one->refusal(case_.problem, Pass::kForward).empty() &&
          one->refusal(case_.problem, Pass::kBackward).empty()) {
        usable.push_back(one->name);
      }
    }
    if (usable.size() > 1 && random_.chance(0.9)) usable.pop_back();  // the reference is last
    case_.problem.implementation =
        usable[static_cast<std::size_t>(random_.between(0, std::ssize(usable) - 1))];
    pool_ = make_thread_pool(case_.threads);
  }
  [[nodiscard]] const FuzzCase& fuzz_case() const { return case_; }

  void run() {
    Call call = make_fuzz_call(case_, random_);
    Call clean = call;
    Spoilt spoilt;
    if (case_.values == Values::kNonFinite) spoilt = spoil(call, random_);
    if (case_.given_routing) {
      fill_routing(call, random_);
      clean.blocks = call.blocks;
      clean.logits = call.logits;
    }
    if (case_.problem.implementation != std::string("reference") || random_.chance(0.2)) {
      route_alone(call);
      run_both(call);
      if (testing::Test::HasFailure()) return;
      judge(call, clean, spoilt);
      if (testing::Test::HasFailure()) return;
      with_fewer_outputs(call);
      if (testing::Test::HasFailure()) return;
    }
    refuse(call);
  }

 private:
  Arguments arguments(Call& call, Pass pass, std::span<std::byte> workspace) {
    Arguments a;
    a.problem = call.problem;
    a.pass = pass;
    a.inputs = call.inputs();
    a.outputs = call.outputs();
    a.saved = call.saved();
    a.d_out = call.d_out.const_view();
    a.gradients = call.gradients();
    a.workspace = workspace;
    if (case_.given_routing && pass != Pass::kRoute) {
      a.inputs.routing = call.const_routing();
      a.outputs.routing = {};
      a.gradients.d_proj_q = a.gradients.d_proj_k = nullptr;
    }
    return a;
  }
  Workspace workspace(Pass pass) {
    return {workspace_bytes(case_.problem, pass, pool_->num_threads()),
            static_cast<std::size_t>(random_.between(0, 64))};
  }
  void run_pass(Call& call, Pass pass) {
    const Workspace memory = workspace(pass);
    arguments(call, pass, memory.span()).run(*pool_);
    EXPECT_TRUE(memory.guards_intact()) << "workspace";
    EXPECT_TRUE(call.guards_intact()) << "outputs";
  }
  void run_both(Call& call) {
    run_pass(call, Pass::kForward);
    expect_valid_blocks(call);
    run_pass(call, Pass::kBackward);
  }

  /// route() chooses what forward() would.
  void route_alone(Call& call) {
    if (case_.given_routing) return;
    run_pass(call, Pass::kRoute);
    expect_valid_blocks(call);
  }

  void expect_valid_blocks(const Call& call) {
    if (case_.given_routing && call.problem.config.routing == RoutingMode::kSoft) return;
    const Problem& p = call.problem;
    const std::int64_t width = max_routed_blocks(p);
    const std::int64_t rows = p.num_heads * num_q_blocks(p);
    for (std::int64_t r = 0; r < p.batch * rows; ++r) {
      const std::int64_t length =
          call.key_lengths.empty() ? p.k_tokens : call.key_lengths[r / rows];
      const std::int64_t columns = num_k_blocks(p, length);
      std::int64_t previous = -1;
      bool ended = false;
      for (std::int64_t c = 0; c < width; ++c) {
        const std::int64_t block = call.blocks.data()[r * width + c];
        ended = ended || block == -1;
        ASSERT_TRUE(ended ? block == -1 && c > 0 : block > previous && block < columns)
            << "block " << block << " at row " << r << ", place " << c;
        previous = block;
      }
    }
  }

  void judge(Call& call, Call& clean, const Spoilt& spoilt) {
    switch (case_.values) {
      case Values::kNormal:
        // The reference alone would be judged by itself.
        expect_forward(call);
        // It finds the routing's scores anew, which a given one does not have.
        if (!(case_.given_routing && call.problem.config.routing == RoutingMode::kSoft)) {
          expect_backward(call);
        }
        break;
      case Values::kFp16Limits:
      case Values::kTiny:
      case Values::kConstant:
        expect_finite(call);
        break;
      case Values::kHuge:
        break;
      case Values::kNonFinite:
        expect_contained(call, clean, spoilt);
        break;
    }
  }

  void expect_finite(Call& call) {
    const std::vector<double> v = call.v.values();
    double largest = 0;
    for (const double x : v) largest = std::max(largest, std::abs(x));
    // A weighted mean; int8 and bf16 round v and the result by at most 2^-7 of the largest.
    const double bound = largest * (1 + 0x1p-6) + 1e-30;
    for (const auto& [name, tensor] : std::map<std::string, Tensor*>{
             {"out_sparse", &call.out_sparse}, {"out_linear", &call.out_linear}}) {
      for (const double x : tensor->values()) {
        ASSERT_TRUE(std::abs(x) <= bound) << name << " has " << x << ", v at most " << largest;
      }
    }
    if (call.problem.config.method == Method::kSla2) {
      for (const double x : call.out.values()) ASSERT_TRUE(std::abs(x) <= bound) << "out " << x;
    }
    if (call.problem.dtype == DType::kF16) return;  // its gradients may be out of range
    for (Tensor* x : {&call.d_q, &call.d_k, &call.d_v}) {
      for (const double value : x->values()) ASSERT_TRUE(std::isfinite(value)) << "gradient";
    }
  }

  /// What does not read the spoilt row has the bits that it has without.
  void expect_contained(Call& call, Call& clean, const Spoilt& spoilt) {
    const Problem& p = call.problem;
    run_pass(clean, Pass::kForward);
    const std::vector<double> out = call.out.values();
    const std::vector<double> wanted = clean.out.values();
    const std::int64_t group = p.num_heads / p.num_kv_heads;
    for (std::int64_t at = 0; at < std::ssize(out); ++at) {
      const std::int64_t row = at / p.value_dim;
      const std::int64_t n = row % p.q_tokens;
      const std::int64_t h = row / p.q_tokens % p.num_heads;
      const std::int64_t b = row / p.q_tokens / p.num_heads;
      bool reads = b == spoilt.batch;
      if (spoilt.where != Spoilt::Where::kQ) {
        reads = reads && h / group == spoilt.head;
      } else if (case_.given_routing) {
        reads = reads && h == spoilt.head && n == spoilt.token;
      } else {  // its query block may be routed otherwise
        reads =
            reads && h == spoilt.head && n / p.config.block_q == spoilt.token / p.config.block_q;
      }
      if (reads) continue;
      ASSERT_EQ(out[at], wanted[at]) << "b " << b << " h " << h << " row " << n;
    }
  }

  /// Optional results that are not asked for change no bit of the others.
  void with_fewer_outputs(Call& call) {
    if (case_.values == Values::kNonFinite || case_.values == Values::kHuge) return;  // NaN bits
    Call other = call;
    const Workspace memory = workspace(Pass::kForward);
    Arguments a = arguments(other, Pass::kForward, memory.span());
    if (random_.chance(0.5)) a.outputs.out_sparse = {};
    if (random_.chance(0.5)) a.outputs.out_linear = {};
    if (random_.chance(0.5)) a.outputs.lse = nullptr;
    if (random_.chance(0.5)) a.outputs.k_mean = nullptr;
    if (random_.chance(0.5)) a.outputs.routing = {};
    a.run(*pool_);
    EXPECT_TRUE(memory.guards_intact());
    EXPECT_EQ(other.out.values(), call.out.values()) << "out, when less is asked for";
    Workspace back = workspace(Pass::kBackward);
    Arguments g = arguments(other, Pass::kBackward, back.span());
    if (random_.chance(0.5)) g.gradients.d_q = {};
    if (random_.chance(0.5)) g.gradients.d_k = {};
    if (random_.chance(0.5)) g.gradients.d_v = {};
    if (random_.chance(0.5)) g.gradients.d_alpha_logit = nullptr;
    if (random_.chance(0.5)) g.gradients.d_proj_q = nullptr;
    if (random_.chance(0.5)) g.gradients.d_proj_k = nullptr;
    g.run(*pool_);
    EXPECT_TRUE(back.guards_intact());
    EXPECT_EQ(bytes_of_results(other), bytes_of_results(call)) << "when less is asked for";
  }

  /// One broken rule: sla2::Error, and nothing written.
  void refuse(Call& call) {
    const Pass pass = random_.one_of({Pass::kRoute, Pass::kForward, Pass::kBackward});
    const Workspace memory = workspace(pass);
    const auto before = bytes_of_results(call);
    for (int i = 0; i < 6; ++i) {
      Arguments a = arguments(call, pass, memory.span());
      const auto all = mutations();
      const auto& mutation = all[static_cast<std::size_t>(random_.between(0, std::ssize(all) - 1))];
      if (!mutation.apply(a, random_)) continue;
      try {
        a.run(*pool_);
        ADD_FAILURE() << "not refused: " << mutation.name << ", pass " << static_cast<int>(pass);
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument)
            << mutation.name << ": " << error.what();
        EXPECT_EQ(std::strchr(error.what(), '\n'), nullptr) << error.what();
      }
      EXPECT_TRUE(bytes_of_results(call) == before) << "written to: " << mutation.name;
    }
  }

  Random random_;
  FuzzCase case_;
  std::unique_ptr<Executor> pool_;
};

TEST(Fuzz, PublicApi) {
  using Clock = std::chrono::steady_clock;
  const std::uint64_t first = environment("SLA2_FUZZ_SEED", 1);
  const std::uint64_t most = environment("SLA2_FUZZ_PROBLEMS", ~std::uint64_t{0} - first);
  const auto limit = std::chrono::seconds(environment("SLA2_FUZZ_SECONDS", 20));
  const auto start = Clock::now();
  std::map<std::string, int> runs;
  std::uint64_t seed = first;
  for (; seed < first + most; ++seed) {
    if (Clock::now() - start > limit) break;
    Fuzzer fuzzer(seed);
    announce(seed, fuzzer.fuzz_case());
    SCOPED_TRACE("SLA2_FUZZ_PROBLEMS=1 SLA2_FUZZ_SEED=" + std::to_string(seed));
    fuzzer.run();
    ++runs[fuzzer.fuzz_case().problem.implementation];
    if (HasFailure()) return;
  }
  std::printf("seeds %llu to %llu:", static_cast<unsigned long long>(first),
              static_cast<unsigned long long>(seed - 1));
  for (const auto& [name, count] : runs) std::printf(" %s %d", name.c_str(), count);
  std::printf("\n");
  EXPECT_GE(seed - first, std::min<std::uint64_t>(most, 10)) << "too few in the time";
}

}  // namespace
}  // namespace sla2::test

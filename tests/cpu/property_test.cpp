// What must hold of the CPU backend itself: threads, routing, extreme inputs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"
#include "cpu/parity.h"
#include "cpu/plan.h"
#include "reference/reference.h"

namespace sla2::test {
namespace {

class Cpu : public testing::TestWithParam<const char*> {
 protected:
  [[nodiscard]] Problem problem(RoutingMode mode) const {
    Problem p = small_problem(150, 300, 32, 48);
    p.num_heads = 2;
    p.num_kv_heads = 1;
    p.config.routing = mode;
    p.config.precision = Precision::kInt8;
    p.implementation = GetParam();
    return p;
  }
};

std::vector<std::vector<double>> everything(Call& call) {
  return {call.out.values(),      call.out_sparse.values(),    call.out_linear.values(),
          call.lse.values(),      call.k_mean.values(),        call.blocks.values(),
          call.logits.values(),   call.d_q.values(),           call.d_k.values(),
          call.d_v.values(),      call.d_alpha_logit.values(), call.d_proj_q.values(),
          call.d_proj_k.values(), call.d_proj_out.values()};
}

/// dK and dV of a key block take their pairs in turn: 69 query blocks route the same few (128
/// keys), or, soft, all of 1,100 keys, more than one chunk of the softmax.
TEST_P(Cpu, SameBitsWhereManyQueryBlocksAddToEachKeyBlock) {
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    Problem p = small_problem(2200, mode == RoutingMode::kSoft ? 1100 : 128, 16, 16);
    p.implementation = GetParam();
    p.config.routing = mode;
    SLA2_SKIP_IF_REFUSED(p, Pass::kBackward);
    std::vector<std::vector<double>> first;
    for (const std::int64_t threads : {1, 2, 9, 64}) {
      Call call(p, 3);
      const auto executor = make_thread_pool(threads);
      call.run_forward(*executor);
      call.run_backward(*executor);
      if (first.empty()) {
        first = everything(call);
      } else {
        EXPECT_EQ(everything(call), first) << threads << " threads";
      }
    }
  }
}

TEST_P(Cpu, SameBitsOnAnyNumberOfThreads) {
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    const Problem p = problem(mode);
    SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
    std::vector<std::vector<double>> first;
    for (const std::int64_t threads : {1, 2, 5, 9, 64}) {
      Call call(p, 3);
      const auto executor = make_thread_pool(threads);
      call.run_forward(*executor);
      call.run_backward(*executor);
      if (threads == 1) {
        first = everything(call);
      } else {
        EXPECT_EQ(everything(call), first) << threads << " threads";
      }
    }
  }
}

/// One task after the other, the last one first: a query block must not wait for one whose worker
/// has not begun.
class Backwards final : public Executor {
 public:
  [[nodiscard]] std::int64_t num_threads() const override { return 3; }
  void parallel_for(std::int64_t n,
                    const std::function<void(std::int64_t, std::int64_t)>& task) override {
    for (std::int64_t i = n - 1; i >= 0; --i) task(i, i % 3);
  }
};

TEST_P(Cpu, SameBitsWhateverTheOrderOfTheTasks) {
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    const Problem p = problem(mode);
    SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
    SerialExecutor serial;
    Backwards backwards;
    Call one(p, 3), other(p, 3);
    one.run_forward(serial);
    one.run_backward(serial);
    other.run_forward(backwards);
    other.run_backward(backwards);
    EXPECT_EQ(everything(other), everything(one));
  }
}

/// Five key blocks, of which four exist.
TEST_P(Cpu, ABackwardOverFewerKeysStaysInItsWorkspace) {
  Problem p = small_problem(1024, 1100, 16, 16);
  p.implementation = GetParam();
  p.config.block_q = p.config.block_k = 256;
  p.config.routing = RoutingMode::kSoft;
  SLA2_SKIP_IF_REFUSED(p, Pass::kBackward);
  for (const std::int64_t threads : {1, 9}) {
    Call call(p, 5, Layout::kDense, {1024});
    const auto executor = make_thread_pool(threads);
    call.run_forward(*executor);
    call.run_backward(*executor);
    EXPECT_TRUE(call.guards_intact()) << threads << " threads";
  }
}

TEST_P(Cpu, RoutesAsTheReferenceExceptNearTies) {
  Problem p = problem(RoutingMode::kHard);
  SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
  Call call(p, 5);
  SerialExecutor serial;
  call.run_forward(serial);
  const auto exact = reference::route(p, call.operands<double>());
  const std::int64_t L = max_routed_blocks(p);
  const std::int64_t T = num_k_blocks(p, p.k_tokens);
  for (std::int64_t row = 0; row < p.num_heads * num_q_blocks(p); ++row) {
    const double* scores = exact.scores.data() + row * T;
    double worst_kept = std::numeric_limits<double>::infinity();
    for (std::int64_t c = 0; c < L; ++c) {
      worst_kept = std::min(worst_kept, scores[exact.blocks[row * L + c]]);
    }
    for (std::int64_t c = 0; c < L; ++c) {
      const std::int32_t block = call.blocks[row * L + c];
      // fp32 chains of d terms on scores of order 1.
      EXPECT_GE(scores[block], worst_kept - 1e-5) << "row " << row;
    }
  }
}

/// Half of the first head's values up to 6e4: what a total minus the routed part would lose.
std::vector<double> enlarge_values(Call& call) {
  const std::int64_t dv = call.problem.value_dim;
  std::vector<double> v = call.v.values();
  for (std::int64_t at = 0; at < 150 * dv; ++at) v[at] *= 6e4;
  call.v.set(v);
  return v;
}

/// Half the keys far out, 6e4 against 1: o_l of a row stays within the values of its own
/// complement, be it most blocks or one. bf16 products round v, h_j and H_i, each by at most 2^-9
/// of a weighted mean of |v|; fp32 sums of 300 terms by 300 * 2^-24.
TEST_P(Cpu, LinearOutputStaysInTheRangeOfV) {
  for (const Precision precision : {Precision::kFp32, Precision::kBf16, Precision::kInt8}) {
    for (const double keep : {0.1, 0.5, 0.9}) {
      Problem p = problem(RoutingMode::kHard);
      SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
      p.config.precision = precision;
      p.config.keep = keep;
      Call call(p, 11);
      const std::vector<double> v = enlarge_values(call);
      SerialExecutor serial;
      call.run_forward(serial);
      const std::vector<double> out = call.out_linear.values();
      const std::int64_t L = max_routed_blocks(p);
      const double share = precision == Precision::kFp32 ? 300 * 0x1p-24 : 3.1 * 0x1p-9;
      for (std::int64_t row = 0; row < p.num_heads * p.q_tokens; ++row) {
        const std::int64_t block = row / p.q_tokens * num_q_blocks(p) + row % p.q_tokens / 32;
        std::vector<bool> routed(num_k_blocks(p, p.k_tokens));
        for (std::int64_t c = 0; c < L; ++c) routed[call.blocks[block * L + c]] = true;
        for (std::int64_t c = 0; c < p.value_dim; ++c) {
          double low = std::numeric_limits<double>::infinity(), high = -low;
          for (std::int64_t n = 0; n < p.k_tokens; ++n) {
            if (routed[n / p.config.block_k]) continue;
            low = std::min(low, v[n * p.value_dim + c]);
            high = std::max(high, v[n * p.value_dim + c]);
          }
          const double margin = share * std::max(std::abs(low), std::abs(high));
          ASSERT_GE(out[row * p.value_dim + c], low - margin) << keep << " row " << row;
          ASSERT_LE(out[row * p.value_dim + c], high + margin) << keep << " row " << row;
        }
      }
    }
  }
}

TEST_P(Cpu, SoftLinearOutputStaysInTheRangeOfV) {
  Problem p = problem(RoutingMode::kSoft);
  SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
  Call call(p, 11);
  const std::vector<double> v = enlarge_values(call);
  SerialExecutor serial;
  call.run_forward(serial);
  const std::vector<double> out = call.out_linear.values();
  for (std::int64_t c = 0; c < p.value_dim; ++c) {
    double low = v[c];
    double high = v[c];
    for (std::int64_t n = 0; n < p.k_tokens; ++n) {
      low = std::min(low, v[n * p.value_dim + c]);
      high = std::max(high, v[n * p.value_dim + c]);
    }
    const double margin = 1e-5 * (high - low);
    for (std::size_t at = c; at < out.size(); at += p.value_dim) {
      ASSERT_GE(out[at], low - margin);
      ASSERT_LE(out[at], high + margin);
    }
  }
}

TEST_P(Cpu, ExtremeMagnitudesStayFinite) {
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    for (const double size : {6e4, 1e-30}) {
      Problem p = problem(mode);
      SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
      Call call(p, 13);
      for (Tensor* x : {&call.q, &call.k, &call.v}) {
        std::vector<double> values = x->values();
        for (double& value : values) value = std::clamp(value, -1.0, 1.0) * size;
        x->set(values);
      }
      SerialExecutor serial;
      call.run_forward(serial);
      for (const auto& x :
           {call.out.values(), call.out_sparse.values(), call.out_linear.values()}) {
        for (const double value : x) ASSERT_TRUE(std::isfinite(value)) << size;
      }
      call.run_backward(serial);
      for (const auto& x : {call.d_q.values(), call.d_k.values(), call.d_v.values()}) {
        for (const double value : x) ASSERT_TRUE(std::isfinite(value)) << size;
      }
    }
  }
}

/// v of +-65504, fp16's largest, which bf16 rounds to 65536 and fp32 sums may exceed: a mean of it
/// is finite.
TEST_P(Cpu, MeansOfTheLargestFp16StayFinite) {
  for (const Precision precision : {Precision::kFp32, Precision::kBf16, Precision::kInt8}) {
    Problem p = problem(RoutingMode::kHard);
    p.dtype = DType::kF16;
    p.config.precision = precision;
    SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
    Call call(p, 11);
    std::vector<double> v = call.v.values();
    for (std::int64_t at = 0; at < std::ssize(v); ++at) v[at] = at % 2 == 0 ? 65504 : -65504;
    call.v.set(v);
    SerialExecutor serial;
    call.run_forward(serial);
    for (Tensor* x : {&call.out, &call.out_sparse, &call.out_linear}) {
      for (const double value : x->values()) {
        ASSERT_TRUE(std::isfinite(value)) << static_cast<int>(precision);
      }
    }
  }
}

TEST_P(Cpu, NaNAndInfLeaveIndicesValid) {
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    for (const double bad :
         {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      for (const int where : {0, 1, 2}) {
        const Problem p = problem(mode);
        SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
        Call call(p, 17);
        Tensor& x = where == 0 ? call.q : where == 1 ? call.k : call.v;
        std::vector<double> values = x.values();
        values[5] = bad;
        x.set(values);
        SerialExecutor serial;
        call.run_forward(serial);
        call.run_backward(serial);
        for (std::int64_t i = 0; i < call.blocks.size(); ++i) {
          ASSERT_GE(call.blocks[i], -1);
          ASSERT_LT(call.blocks[i], num_k_blocks(p, p.k_tokens));
        }
        EXPECT_TRUE(call.guards_intact());
        if (where != 0) continue;
        const std::vector<double> out = call.out.values();
        EXPECT_FALSE(std::isfinite(out[0]));  // its own row shows it
        const std::int64_t next_block = p.config.block_q * p.value_dim;
        for (std::size_t at = next_block; at < out.size(); ++at)
          ASSERT_TRUE(std::isfinite(out[at]));
      }
    }
  }
}

TEST_P(Cpu, NaNIsNeverDropped) {
  SLA2_SKIP_IF_REFUSED(problem(RoutingMode::kHard), Pass::kForward);
  for (const Precision precision : {Precision::kInt8, Precision::kBf16, Precision::kFp32}) {
    Problem p = problem(RoutingMode::kHard);
    p.config.precision = precision;
    expect_nan_shows(p, [](Call& call) {
      SerialExecutor serial;
      call.run_forward(serial);
    });
  }
}

TEST_P(Cpu, GivenRoutingIsUsed) {
  const Problem p = problem(RoutingMode::kHard);
  SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
  Call call(p, 19);
  const std::int64_t L = max_routed_blocks(p);
  for (std::int64_t i = 0; i < call.blocks.size(); ++i) {
    call.blocks[i] = i % L < 2 ? static_cast<std::int32_t>(i % L * 3) : -1;
  }
  SerialExecutor serial;
  call.run_forward(serial, true);
  reference::RoutingResult<double> given;
  for (const double x : call.blocks.values()) given.blocks.push_back(static_cast<std::int32_t>(x));
  Problem exact = p;
  exact.config.precision = Precision::kFp32;
  const auto expected = reference::forward(exact, call.operands<double>(), &given);
  // int8 on random normal inputs: about 2e-2.
  EXPECT_LT(relative_error(call.out.values(), expected.out), 5e-2);
}

TEST_P(Cpu, StaysInsideItsWorkspace) {
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    for (const Pass pass : {Pass::kRoute, Pass::kForward, Pass::kBackward}) {
      const Problem p = problem(mode);
      SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
      Call call(p, 29);
      const auto executor = make_thread_pool(3);
      if (pass == Pass::kBackward) call.run_forward(*executor);
      const std::size_t size = workspace_bytes(p, pass, 3);
      std::vector<std::byte> memory(size + 256, std::byte{0xA5});
      const Context context{*executor, std::span(memory).first(size)};
      if (pass == Pass::kRoute) {
        Inputs inputs = call.inputs();
        route(p, inputs, call.routing(), context);
      } else if (pass == Pass::kForward) {
        forward(p, call.inputs(), call.outputs(), context);
      } else {
        backward(p, call.inputs(), call.saved(), call.d_out.const_view(), call.gradients(),
                 context);
      }
      EXPECT_TRUE(std::all_of(memory.end() - 256, memory.end(),
                              [](std::byte x) { return x == std::byte{0xA5}; }));
      EXPECT_TRUE(call.guards_intact());
    }
  }
}

TEST_P(Cpu, RefusesFp8WithAReason) {
  Problem p = problem(RoutingMode::kHard);
  SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
  p.config.precision = Precision::kFp8;
  EXPECT_NE(find_implementation(GetParam())->refusal(p, Pass::kForward).find("fp8"),
            std::string::npos);
}

/// Byte of row `row` and column `column` in a packed right operand [rows, n] of integers.
std::int64_t packed_byte(std::int64_t row, std::int64_t column, std::int64_t n, std::int64_t rows) {
  const std::int64_t panel = column / 64 * 64;
  const std::int64_t width = std::min<std::int64_t>(64, n - panel);
  return (panel * (rows / 4) + row / 4 * width + column - panel) * 4 + row % 4;
}

TEST_P(Cpu, IntegersEqualTheReferenceBitForBit) {
  Problem p = problem(RoutingMode::kHard);
  SLA2_SKIP_IF_REFUSED(p, Pass::kForward);
  p.num_heads = 1;
  p.k_tokens = 301;
  p.head_dim = 80;
  test::Call call(p, 23);
  const auto expected = reference::quantize(p, call.operands<double>());
  const cpu::Kernels& kernels = kernels_of(GetParam());
  SerialExecutor serial;
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> lines(workspace_bytes(p, Pass::kForward, 1) / sizeof(Line) + 1);
  const std::span<std::byte> workspace = std::as_writable_bytes(std::span(lines));
  const Inputs inputs = call.inputs();
  cpu::Call run = cpu::make_call(p, inputs, {serial, workspace}, Pass::kForward, kernels);
  cpu::select_keys(run, 0, 0);
  cpu::smooth(run);
  cpu::run_workers(run, kernels.pack_keys, cpu::num_packed_pairs(run.job));

  const cpu::Job& job = run.job;
  const auto* keys = static_cast<const std::uint8_t*>(job.keys);
  const auto* values = static_cast<const std::int8_t*>(job.values);
  for (std::int64_t n = 0; n < p.k_tokens; ++n) {
    const std::int64_t block = n / job.block_k * job.block_k;
    for (std::int64_t c = 0; c < job.d; ++c) {
      const std::int64_t at = block * job.d + packed_byte(c, n - block, job.block_k, job.d);
      const auto integer = static_cast<std::int8_t>(keys[at] - kernels.key_offset);
      ASSERT_EQ(integer, expected.k[n * job.d + c]) << n;
    }
    for (std::int64_t c = 0; c < job.dv; ++c) {
      const std::int64_t at = block * job.dv + packed_byte(n - block, c, job.dv, job.block_k);
      ASSERT_EQ(values[at], expected.v[n * job.dv + c]) << n;
    }
  }
  EXPECT_EQ(std::vector<float>(job.k_scale, job.k_scale + job.k_blocks), expected.k_scale);
  EXPECT_EQ(std::vector<float>(job.v_scale, job.v_scale + job.dv), expected.v_scale);
  const auto queries = call.operands<float>().q;
  std::vector<std::int8_t> row(job.d);
  for (std::int64_t n = 0; n < p.q_tokens; ++n) {
    EXPECT_EQ(kernels.quantized_row(queries.data() + n * job.d, job.d, row.data()),
              expected.q_scale[n]);
    ASSERT_TRUE(std::equal(row.begin(), row.end(), expected.q.begin() + n * job.d)) << n;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Cpu, testing::ValuesIn(kCpuImplementations),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace sla2::test

// What must hold of the kernels beyond their error: the same bits, routing, integers bit for bit,
// extreme inputs, given routings, the edges of the workspace.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/device_call.h"
#include "cuda/judge.h"

namespace sla2::test {
namespace {

constexpr RoutingMode kModes[] = {RoutingMode::kHard, RoutingMode::kSoft};

Problem problem_of(RoutingMode mode, DType dtype = DType::kF32) {
  Problem p = small_problem(150, 300, 32, 48);
  p.num_heads = 2;
  p.num_kv_heads = 1;
  p.dtype = dtype;
  p.device = Device::kCuda;
  p.config.routing = mode;
  p.config.precision = Precision::kInt8;
  return p;
}

std::vector<std::vector<double>> everything(Call& call) {
  return {call.out.values(),      call.out_sparse.values(),    call.out_linear.values(),
          call.lse.values(),      call.k_mean.values(),        call.blocks.values(),
          call.logits.values(),   call.d_q.values(),           call.d_k.values(),
          call.d_v.values(),      call.d_alpha_logit.values(), call.d_proj_q.values(),
          call.d_proj_k.values(), call.d_proj_out.values()};
}

void run_both(Call& call) {
  DeviceCall on_device(call);
  on_device.forward();
  on_device.backward();
}

TEST(CudaProperty, SameBitsEveryTime) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const RoutingMode mode : kModes) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const Method method : {Method::kSla2, Method::kSla}) {
        Problem p = problem_of(mode, dtype);
        p.config.method = method;
        std::vector<std::vector<double>> first;
        for (std::uint64_t run = 0; run < (backend().is_emulated ? 3U : 20U); ++run) {
          Call call(p, 3);
          permute_threads(run);
          run_both(call);
          permute_threads(0);
          if (run == 0) {
            first = everything(call);
          } else {
            EXPECT_EQ(everything(call), first) << "run " << run;
          }
        }
      }
    }
  }
}

TEST(CudaProperty, RoutesAsTheReferenceExceptNearTies) {
  SLA2_SKIP_WITHOUT_MACHINE();
  Problem p = problem_of(RoutingMode::kHard);
  p.k_tokens = 1500;
  p.num_routers = 2;
  p.protected_keys = {100, 140};
  Call call(p, 5);
  DeviceCall(call).route();
  const auto exact = reference::route(p, call.operands<double>());
  const std::int64_t L = max_routed_blocks(p);
  const std::int64_t T = num_k_blocks(p, p.k_tokens);
  const BlockRange fixed = protected_blocks(p, p.k_tokens);
  for (std::int64_t row = 0; row < p.num_heads * num_q_blocks(p); ++row) {
    const double* scores = exact.scores.data() + row * T;
    double worst_kept = std::numeric_limits<double>::infinity();
    for (std::int64_t c = 0; c < L; ++c) {
      const std::int32_t block = exact.blocks[row * L + c];
      if (!fixed.contains(block)) worst_kept = std::min(worst_kept, scores[block]);
    }
    for (std::int64_t c = 0; c < L; ++c) {
      const std::int32_t block = call.blocks[row * L + c];
      ASSERT_GE(block, c == 0 ? 0 : call.blocks[row * L + c - 1] + 1);
      if (fixed.contains(block)) continue;
      // fp32 chains of d terms on scores of order 1.
      EXPECT_GE(scores[block], worst_kept - 1e-5) << "row " << row;
    }
  }
}

TEST(CudaProperty, EqualScoresGoToTheLowerBlock) {
  SLA2_SKIP_WITHOUT_MACHINE();
  Problem p = problem_of(RoutingMode::kHard);
  Call call(p, 5);
  call.k.set(std::vector<double>(call.k.size(), 0.5));  // all keys equal: all scores 0
  DeviceCall on_device(call);
  on_device.forward();
  const std::int64_t L = max_routed_blocks(p);
  for (std::int64_t i = 0; i < call.blocks.size(); ++i) EXPECT_EQ(call.blocks[i], i % L);
  on_device.backward();
  judge_forward(call);
  judge_backward(call);
}

TEST(CudaProperty, SoftWeightsSumToTheirTarget) {
  SLA2_SKIP_WITHOUT_MACHINE();
  Problem p = problem_of(RoutingMode::kSoft);
  p.protected_keys = {0, 33};
  Call call(p, 5);
  DeviceCall(call).route();
  const auto exact = reference::route(p, call.operands<double>());
  const std::int64_t T = num_k_blocks(p, p.k_tokens);
  for (std::int64_t row = 0; row < p.num_heads * num_q_blocks(p); ++row) {
    double sum = 0;
    for (std::int64_t j = 0; j < T; ++j) {
      const double x = static_cast<double>(call.logits[row * T + j]);
      if (j < 2) {
        EXPECT_EQ(x, std::numeric_limits<double>::infinity());
        continue;
      }
      sum += 1 / (1 + std::exp(-x));
      // Scores of order 1 over tau = 0.1, each the end of fp32 chains of d terms.
      EXPECT_NEAR(x, exact.logits[row * T + j], 1e-4);
    }
    EXPECT_NEAR(sum, 0.4 * static_cast<double>(T), 1e-4);
  }
}

TEST(CudaProperty, LinearOutputStaysInTheRangeOfV) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const RoutingMode mode : kModes) {
    for (const DType dtype : kTypes) {
      const Problem p = problem_of(mode, dtype);
      Call call(p, 11);
      std::vector<double> v = call.v.values();
      for (std::int64_t n = 0; n < 150; ++n) {  // half the keys far out: 1e4 against 1
        for (std::int64_t c = 0; c < p.value_dim; ++c) v[n * p.value_dim + c] *= 1e4;
      }
      call.v.set(v);
      v = call.v.values();
      DeviceCall(call).forward();
      const std::vector<double> out = call.out_linear.values();
      for (std::int64_t c = 0; c < p.value_dim; ++c) {
        double low = v[c];
        double high = v[c];
        for (std::int64_t n = 0; n < p.k_tokens; ++n) {
          low = std::min(low, v[n * p.value_dim + c]);
          high = std::max(high, v[n * p.value_dim + c]);
        }
        // Four roundings lie between v and o_l: phi, h_j, H_i and o_l, each twice (numerator and
        // denominator).
        const double margin = (1e-5 + (dtype == DType::kF32 ? 0 : 8 * storage_error(dtype))) *
                              std::max(std::abs(low), std::abs(high));
        for (std::size_t at = c; at < out.size(); at += p.value_dim) {
          ASSERT_GE(out[at], low - margin);
          ASSERT_LE(out[at], high + margin);
        }
      }
    }
  }
}

TEST(CudaProperty, ExtremeMagnitudesStayFinite) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const RoutingMode mode : kModes) {
    for (const DType dtype : kTypes) {
      for (const FeatureMap map : {FeatureMap::kSoftmax, FeatureMap::kElu, FeatureMap::kRelu}) {
        for (const double size : {6e4, 1e-30}) {
          Problem p = problem_of(mode, dtype);
          p.config.feature_map = map;
          Call call(p, 13);
          for (Tensor* x : {&call.q, &call.k, &call.v}) {
            std::vector<double> values = x->values();
            for (double& value : values) value = std::clamp(value, -1.0, 1.0) * size;
            x->set(values);
          }
          // Gradients of 16 bits would overflow where the exact ones do.
          std::vector<double> d_out = call.d_out.values();
          for (double& value : d_out) value *= 1e-8;
          call.d_out.set(d_out);
          SCOPED_TRACE(std::string(name_of(dtype)) + " size " + std::to_string(size) + " map " +
                       std::to_string(static_cast<int>(map)));
          run_both(call);
          for (const auto& x :
               {call.out.values(), call.out_sparse.values(), call.out_linear.values()}) {
            for (const double value : x) ASSERT_TRUE(std::isfinite(value));
          }
          for (const auto& x : {call.d_q.values(), call.d_k.values(), call.d_v.values()}) {
            for (const double value : x) ASSERT_TRUE(std::isfinite(value));
          }
        }
      }
    }
  }
}

/// Means of v = +-65504 are finite in fp16, whatever the roundings of weights and sums.
TEST(CudaProperty, MeansOfTheLargestFp16StayFinite) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const Precision precision :
       {Precision::kFp32, Precision::kBf16, Precision::kInt8, Precision::kFp8}) {
    for (const Method method : {Method::kSla2, Method::kSla}) {
      for (const bool rounds_up : {false, true}) {
        Problem p = small_problem(64, 256, 16, 16);
        p.dtype = DType::kF16;
        p.device = Device::kCuda;
        p.config.precision = precision;
        p.config.method = method;
        if (rounds_up) p.config.keep = 1;
        if (!backend().implementation.refusal(p, Pass::kForward).empty()) continue;
        Call call(p, 11);
        const std::vector<double> k = call.k.values();
        use_the_largest_fp16(call);
        if (!rounds_up) call.k.set(k);
        call.proj_out.clear();
        DeviceCall(call).forward();
        for (Tensor* x : {&call.out, &call.out_sparse, &call.out_linear}) {
          for (const double value : x->values()) {
            ASSERT_TRUE(std::isfinite(value)) << static_cast<int>(precision) << rounds_up;
          }
        }
        if (!rounds_up) continue;
        for (const double value : call.out.values()) {
          EXPECT_GE(std::abs(value), 0.99 * 65504) << static_cast<int>(precision);
        }
      }
    }
  }
}

TEST(CudaProperty, NaNAndInfLeaveIndicesValid) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const RoutingMode mode : kModes) {
    for (const double bad :
         {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      for (const int where : {0, 1, 2}) {
        const Problem p = problem_of(mode);
        Call call(p, 17);
        Tensor& x = where == 0 ? call.q : where == 1 ? call.k : call.v;
        std::vector<double> values = x.values();
        values[5] = bad;
        x.set(values);
        run_both(call);
        for (std::int64_t i = 0; i < call.blocks.size(); ++i) {
          ASSERT_GE(call.blocks[i], -1);
          ASSERT_LT(call.blocks[i], num_k_blocks(p, p.k_tokens));
        }
        EXPECT_TRUE(call.guards_intact());
        if (where != 0) continue;
        const std::vector<double> out = call.out.values();
        EXPECT_FALSE(std::isfinite(out[0]));  // its own row shows it
        const std::int64_t next_block = p.config.block_q * p.value_dim;
        for (std::size_t at = next_block; at < out.size(); ++at) {
          ASSERT_TRUE(std::isfinite(out[at]));
        }
      }
    }
  }
}

TEST(CudaProperty, NaNIsNeverDropped) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const Precision precision :
       {Precision::kInt8, Precision::kFp8, Precision::kBf16, Precision::kFp32}) {
    Problem p = problem_of(RoutingMode::kHard);
    p.config.precision = precision;
    expect_nan_shows(p, [](Call& call) { DeviceCall(call).forward(); });
  }
}

TEST(CudaProperty, GivenRoutingIsUsed) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const RoutingMode mode : kModes) {
    for (const DType dtype : kTypes) {
      Problem p = problem_of(mode, dtype);
      p.config.precision = Precision::kBf16;
      Call call(p, 19);
      const std::int64_t L = max_routed_blocks(p);
      for (std::int64_t i = 0; i < call.blocks.size(); ++i) {
        call.blocks[i] = i % L < 2 ? static_cast<std::int32_t>(i % L * 3) : -1;
      }
      for (std::int64_t i = 0; i < call.logits.size(); ++i) {
        call.logits[i] = i % 7 == 0 ? -std::numeric_limits<float>::infinity()
                                    : static_cast<float>(i % 11) - 5.0F;
      }
      DeviceCall on_device(call);
      on_device.forward(true);
      judge_forward(call);
      on_device.backward(true);
      judge_backward(call, true);  // no gradient reaches the router
    }
  }
}

/// Tables and lengths in device memory cannot be checked by the host: what does not exist is left
/// out. The emulator's blocks are of exactly the size asked for, so that sanitizers see a step out.
TEST(CudaProperty, ABadTableOrLengthReachesNothingOutside) {
  SLA2_SKIP_WITHOUT_MACHINE();
  constexpr std::int32_t kFar = 1000000;
  const std::vector<std::vector<std::int32_t>> tables = {{-7, 2, -1}, {kFar, 0, kFar}, {3, 3, 3},
                                                         {5, 2, 0},   {-1, -1, -1},    {0, 10, 9}};
  for (const Precision precision : {Precision::kInt8, Precision::kBf16}) {
    for (const auto& table : tables) {
      Problem p = problem_of(RoutingMode::kHard, DType::kBF16);
      p.config.precision = precision;
      p.batch = 2;
      p.q_tokens = 70;
      p.k_tokens = 130;
      Call call(p, 19, Layout::kDense, {-5, kFar});
      for (std::int64_t i = 0; i < call.blocks.size(); ++i) {
        call.blocks[i] = table[static_cast<std::size_t>(i) % table.size()];
      }
      DeviceCall on_device(call);
      on_device.forward(true);
      on_device.backward(true);
      EXPECT_TRUE(call.guards_intact());
    }
  }
}

TEST(CudaProperty, OutputsThatAreNotWantedMayBeMissing) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const RoutingMode mode : kModes) {
    Problem p = problem_of(mode, DType::kBF16);
    Call whole(p, 31);
    run_both(whole);
    Call call(p, 31);
    Mirror mirror(backend().memory);
    DeviceCall on_device(call);
    SerialExecutor serial;
    const auto run = [&](Pass pass, auto body) {
      const Scratch scratch(backend().memory, backend().implementation.workspace_bytes(p, pass, 1));
      body(Context{serial, scratch.span(), nullptr});
      mirror.download();
      scratch.expect_intact();
    };
    Outputs outputs;
    outputs.out = mirror.map(call.out);
    run(Pass::kForward, [&](const Context& context) {
      backend().implementation.forward(p, on_device.inputs(), outputs, context);
    });
    EXPECT_EQ(call.out.values(), whole.out.values());

    const Saved saved{as_const(mirror.map(whole.out_sparse)),
                      as_const(mirror.map(whole.out_linear)),
                      mirror.map(whole.lse),
                      mirror.map(whole.k_mean),
                      {mirror.map(whole.blocks), mirror.map(whole.logits)}};
    const ConstView d_out = as_const(mirror.map(whole.d_out));
    Gradients gradients;
    gradients.d_v = mirror.map(call.d_v);
    run(Pass::kBackward, [&](const Context& context) {
      backend().implementation.backward(p, on_device.inputs(), saved, d_out, gradients, context);
    });
    EXPECT_EQ(call.d_v.values(), whole.d_v.values());
    EXPECT_TRUE(call.guards_intact());
  }
}

TEST(CudaProperty, MissingParametersAreIdentityAndZeros) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const RoutingMode mode : kModes) {
    for (const Method method : {Method::kSla2, Method::kSla}) {
      Problem p = problem_of(mode);
      p.config.method = method;
      Call whole(p, 37);
      Call call(p, 37);
      call.proj_q = call.proj_k = call.alpha_logit = call.proj_out = {};
      for (std::vector<float>* x : {&whole.proj_q, &whole.proj_k}) {
        for (std::size_t i = 0; i < x->size(); ++i) {
          (*x)[i] = i % static_cast<std::size_t>(p.head_dim + 1) == 0 ? 1.0F : 0.0F;
        }
      }
      for (std::vector<float>* x : {&whole.alpha_logit, &whole.proj_out}) {
        std::fill(x->begin(), x->end(), 0.0F);
      }
      run_both(whole);
      run_both(call);
      EXPECT_EQ(everything(call), everything(whole));
    }
  }
}

TEST(CudaProperty, AQueryBlockWithoutKeysHasALinearBranchAlone) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const RoutingMode mode : kModes) {
    for (const BackwardMode backward : {BackwardMode::kPaper, BackwardMode::kMatched}) {
      Problem p = problem_of(mode);
      p.config.backward = backward;
      Call call(p, 41);
      const std::int64_t rows = p.num_heads * num_q_blocks(p);  // of blocks; row 1 routes nothing
      const std::int64_t L = call.blocks.size() / rows;
      for (std::int64_t i = 0; i < call.blocks.size(); ++i) {
        call.blocks[i] = i / L == 1 ? -1 : static_cast<std::int32_t>(i % L);
      }
      const std::int64_t T = call.logits.size() / rows;
      for (std::int64_t i = 0; i < call.logits.size(); ++i) {
        call.logits[i] =
            i / T == 1 ? -std::numeric_limits<float>::infinity() : static_cast<float>(i % 5) - 2;
      }
      DeviceCall on_device(call);
      on_device.forward(true);
      on_device.backward(true);
      const std::vector<double> sparse = call.out_sparse.values();
      const std::int64_t block = p.config.block_q * p.value_dim;
      for (std::int64_t at = block; at < 2 * block; ++at) ASSERT_EQ(sparse[at], 0);
      EXPECT_EQ(call.lse[p.config.block_q], -std::numeric_limits<float>::infinity());
      for (const auto& x : {call.out.values(), call.out_linear.values(), call.d_q.values(),
                            call.d_k.values(), call.d_v.values(), call.d_alpha_logit.values()}) {
        for (const double value : x) ASSERT_TRUE(std::isfinite(value));
      }
    }
  }
}

/// One call a stage, in the order of the launches, none without a listener.
TEST(CudaProperty, NamesItsStagesAsTheyRun) {
  SLA2_SKIP_WITHOUT_MACHINE();
  using Names = std::vector<std::string>;
  Names names;
  const std::function<void(const char*)> listener = [&](const char* stage) {
    names.emplace_back(stage);
  };
  Call call(problem_of(RoutingMode::kHard), 3);
  DeviceCall on_device(call);
  on_device.after_stage = &listener;
  launches_since();
  on_device.forward();
  EXPECT_EQ(names, (Names{"reduce", "mean", "project", "route", "keys", "states", "attend"}));
  if (backend().is_emulated) {
    EXPECT_EQ(launches_since(), std::ssize(names));
  }
  names.clear();
  on_device.backward();
  EXPECT_EQ(names,
            (Names{"prepare", "key_states", "query_states", "linear_queries", "query_gradients",
                   "key_gradients", "linear_keys", "sparse_queries", "reduce", "sparse_keys"}));
  if (backend().is_emulated) {
    EXPECT_EQ(launches_since(), std::ssize(names));
  }
  judge_backward(call);
}

TEST(CudaProperty, RefusesMoreHeadsThanALaunchTakes) {
  SLA2_SKIP_WITHOUT_MACHINE();
  Problem p = problem_of(RoutingMode::kHard);
  p.batch = 65535;
  p.num_heads = p.num_kv_heads = 1;
  EXPECT_EQ(backend().implementation.refusal(p, Pass::kBackward), "");
  p.batch = 65536;
  EXPECT_EQ(backend().implementation.refusal(p, Pass::kForward), "");
  EXPECT_EQ(backend().implementation.refusal(p, Pass::kBackward),
            "batch * num_heads must be at most 65535 in a backward, got 65536");
}

TEST(CudaProperty, NamesTheGpuThatCannotDoFp8) {
  SLA2_SKIP_WITHOUT_MACHINE();
  Problem p = problem_of(RoutingMode::kHard);
  p.config.precision = Precision::kFp8;
  const std::string refusal = backend().implementation.refusal(p, Pass::kForward);
  if (refusal.empty()) {
    Call call(p, 1);
    DeviceCall(call).forward();
    judge_forward(call);
  } else {
    EXPECT_NE(refusal.find("fp8 needs compute capability 8.9"), std::string::npos);
  }
}

}  // namespace
}  // namespace sla2::test

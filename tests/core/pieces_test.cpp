// Known values of the small pieces: roundings, quantisers, top-k, SoftTop-k, derived sizes.
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "core/float16.h"
#include "core/problems.h"
#include "reference/stages.h"

namespace sla2::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(Float16, EveryValueSurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    if (std::isnan(from_fp16(half))) {
      EXPECT_TRUE(std::isnan(from_fp16(to_fp16(from_fp16(half)))));
    } else {
      EXPECT_EQ(to_fp16(from_fp16(half)), half);
    }
    if (std::isnan(from_bf16(half))) {
      EXPECT_TRUE(std::isnan(from_bf16(to_bf16(from_bf16(half)))));
    } else {
      EXPECT_EQ(to_bf16(from_bf16(half)), half);
    }
  }
}

TEST(Float16, RoundsToEven) {
  EXPECT_EQ(from_fp16(to_fp16(1 + 0x1p-11F)), 1.0F);
  EXPECT_EQ(from_fp16(to_fp16(1 + 0x3p-11F)), 1 + 0x1p-9F);
  EXPECT_EQ(from_fp16(to_fp16(65519.0F)), 65504.0F);
  EXPECT_TRUE(std::isinf(from_fp16(to_fp16(65520.0F))));
  EXPECT_EQ(from_fp16(to_fp16(0x1p-25F)), 0.0F);
  EXPECT_EQ(from_fp16(to_fp16(0x3p-25F)), 0x1p-23F);
  EXPECT_EQ(from_bf16(to_bf16(1 + 0x1p-8F)), 1.0F);
  EXPECT_EQ(from_bf16(to_bf16(1 + 0x3p-8F)), 1 + 0x1p-6F);
}

TEST(Roundings, KnownValues) {
  EXPECT_EQ(reference::round_significand(1.0 + 0x1p-8, 8), 1.0);
  EXPECT_EQ(reference::round_significand(-(1.0 + 0x3p-8), 8), -(1.0 + 0x1p-6));
  EXPECT_EQ(reference::round_significand(131008.0, 11), 131008.0);  // no overflow
  EXPECT_EQ(reference::round_e4m3(448), 448);
  EXPECT_EQ(reference::round_e4m3(1e9), 448);
  EXPECT_EQ(reference::round_e4m3(-17), -16);  // a tie, to even
  EXPECT_EQ(reference::round_e4m3(19), 20);
  EXPECT_EQ(reference::round_e4m3(0x1p-9), 0x1p-9);
  EXPECT_EQ(reference::round_e4m3(0x1p-10), 0);
  EXPECT_EQ(reference::round_e4m3(0x3p-10), 0x1p-8);
  EXPECT_TRUE(std::isnan(reference::round_e4m3(std::nan(""))));
}

TEST(Quantize, Int8FollowsTheSpecification) {
  Problem problem = small_problem(2, 40, 16, 16);
  Call call(problem);
  auto operands = call.operands<double>();
  std::fill(operands.q.begin(), operands.q.end(), 0);
  operands.q[0] = 127;  // factor 1
  operands.q[1] = 2.5;  // to even
  operands.q[2] = -3.5;
  const auto quantized = reference::quantize(problem, operands);
  EXPECT_EQ(quantized.q[0], 127);
  EXPECT_EQ(quantized.q[1], 2);
  EXPECT_EQ(quantized.q[2], -4);
  EXPECT_EQ(quantized.q_scale[0], 1.0F);
  EXPECT_EQ(quantized.q_scale[1], 0.0F);  // a zero row
  ASSERT_EQ(quantized.k_scale.size(), 2U);
  for (std::int64_t c = 0; c < 16; ++c) {
    double amax = 0;
    for (std::int64_t n = 0; n < 40; ++n) amax = std::max(amax, std::abs(operands.v[n * 16 + c]));
    EXPECT_EQ(quantized.v_scale[c], static_cast<float>(amax) / 127.0F);
    for (std::int64_t n = 0; n < 40; ++n) {
      EXPECT_NEAR(quantized.v[n * 16 + c] * quantized.v_scale[c], operands.v[n * 16 + c],
                  0.51 * quantized.v_scale[c]);
    }
  }
  operands.q[20] = std::nan("");
  const auto broken = reference::quantize(problem, operands);
  EXPECT_TRUE(std::isnan(broken.q_scale[1]));
  EXPECT_EQ(broken.q[16], 0);
  EXPECT_EQ(broken.q_scale[0], 1.0F);
}

TEST(TopK, TiesGoToTheLowerBlockAndNaNComesLast) {
  using Blocks = std::vector<std::int32_t>;
  const std::vector<double> scores = {1, 3, 3, std::nan(""), 3, -kInfinity};
  const auto choose = [&](std::int64_t kept, BlockRange fixed, std::int64_t width) {
    return reference::choose_blocks(scores.data(), 6, kept, fixed, width);
  };
  EXPECT_EQ(choose(2, {}, 2), (Blocks{1, 2}));
  EXPECT_EQ(choose(4, {}, 4), (Blocks{0, 1, 2, 4}));
  EXPECT_EQ(choose(5, {}, 6), (Blocks{0, 1, 2, 4, 5, -1}));
  EXPECT_EQ(choose(1, {2, 4}, 4), (Blocks{1, 2, 3, -1}));
  EXPECT_EQ(choose(6, {0, 6}, 6), (Blocks{0, 1, 2, 3, 4, 5}));
}

TEST(SoftTopK, WeightsSumToTheTarget) {
  for (const double target : {1.0, 1.3, 4.0, 5.999}) {
    for (const double tau : {0.01, 0.1, 3.0}) {
      const std::vector<double> p = {-2, 0.1, 0.11, 5, 1e3, 0};
      double sum = 0;
      for (const double x : reference::soft_top_k(p, target, tau, {})) {
        sum += 1 / (1 + std::exp(-x));
      }
      // lambda is as large as p/tau = 1e5: its last digit is 1e-11.
      EXPECT_NEAR(sum, target, 1e-10);
    }
  }
  for (const double x : reference::soft_top_k(std::vector<double>{1, 2}, 2, 0.1, {})) {
    EXPECT_EQ(x, kInfinity);
  }
}

TEST(SoftTopK, TheGradientOfARowSumsToZero) {
  const std::vector<double> logits = {0.3, -2, kInfinity, 1.5, -kInfinity};
  const std::vector<double> u = {1, -2, 3, 0.5, 0};
  const std::vector<double> l = {0.2, 7, 1, -3, 2};
  const auto d_p = reference::soft_top_k_backward(logits.data(), u.data(), l.data(), 5, 0.1);
  EXPECT_NEAR(std::accumulate(d_p.begin(), d_p.end(), 0.0), 0, 1e-12);
  EXPECT_EQ(d_p[2], 0);
  EXPECT_EQ(d_p[4], 0);
  EXPECT_GT(std::abs(d_p[0]), 1e-3);
}

TEST(Sizes, FollowFromTheProblem) {
  Problem problem = small_problem(33, 3201, 64, 64);
  EXPECT_EQ(num_q_blocks(problem), 2);
  EXPECT_EQ(num_k_blocks(problem, 3201), 101);
  problem.config.keep = 0.07;
  EXPECT_EQ(num_kept_blocks(problem, 100), 7);  // 0.07 * 100 is not 7 in binary
  EXPECT_EQ(num_kept_blocks(problem, 5), 1);
  problem.config.keep = 1;
  EXPECT_EQ(num_kept_blocks(problem, 101), 101);
  problem.config.keep = 0.07;
  problem.protected_keys = {31, 65};
  EXPECT_EQ(protected_blocks(problem, 3201).begin, 0);
  EXPECT_EQ(protected_blocks(problem, 3201).end, 3);
  EXPECT_EQ(protected_blocks(problem, 40).end, 2);
  EXPECT_EQ(protected_blocks(problem, 31).size(), 0);
  EXPECT_EQ(max_routed_blocks(problem), 10);
  EXPECT_DOUBLE_EQ(softmax_scale(problem), 0.125);
}

}  // namespace
}  // namespace sla2::test

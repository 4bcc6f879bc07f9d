// What must hold of the operator whatever the numbers are, on the reference in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"
#include "reference/stages.h"

namespace sla2::test {
namespace {

using reference::forward;
using reference::ForwardResult;
using reference::Operands;
using Vector = std::vector<double>;

constexpr double kRounding = 1e-12;  // sums of a few hundred terms in double

Problem two_heads(double keep = 0.4) {
  Problem problem = small_problem(70, 150, 16, 32);
  problem.num_heads = problem.num_kv_heads = 2;
  problem.config.keep = keep;
  return problem;
}

double largest_difference(const Vector& a, const Vector& b) {
  double largest = a.size() == b.size() ? 0 : std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double difference = std::abs(a[i] - b[i]);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}

bool all_finite(const Vector& x) {
  return std::all_of(x.begin(), x.end(), [](double value) { return std::isfinite(value); });
}

/// softmax(scale q k^T) v over the raw keys, written without any stage of the reference.
Vector full_attention(const Problem& p, const Operands<double>& x) {
  Vector out(p.batch * p.num_heads * p.q_tokens * p.value_dim);
  const std::int64_t group = p.num_heads / p.num_kv_heads;
  for (std::int64_t row = 0; row < p.batch * p.num_heads * p.q_tokens; ++row) {
    const std::int64_t head = row / p.q_tokens;
    const std::int64_t kv = head / p.num_heads * p.num_kv_heads + head % p.num_heads / group;
    Vector weight(p.k_tokens);
    double sum = 0;
    for (std::int64_t n = 0; n < p.k_tokens; ++n) {
      double score = 0;
      for (std::int64_t c = 0; c < p.head_dim; ++c) {
        score += x.q[row * p.head_dim + c] * x.k[(kv * p.k_tokens + n) * p.head_dim + c];
      }
      sum += weight[n] = std::exp(score / std::sqrt(static_cast<double>(p.head_dim)));
    }
    for (std::int64_t n = 0; n < p.k_tokens; ++n) {
      for (std::int64_t c = 0; c < p.value_dim; ++c) {
        out[row * p.value_dim + c] +=
            weight[n] / sum * x.v[(kv * p.k_tokens + n) * p.value_dim + c];
      }
    }
  }
  return out;
}

class KeepOne : public testing::TestWithParam<std::tuple<RoutingMode, LinearScope, Method>> {};

TEST_P(KeepOne, IsFullAttention) {
  Problem problem = two_heads(1);
  problem.num_kv_heads = 1;
  std::tie(problem.config.routing, problem.config.linear_scope, problem.config.method) = GetParam();
  Call call(problem);
  const auto operands = call.operands<double>();
  const auto result = forward(problem, operands);
  EXPECT_LT(largest_difference(result.out, full_attention(problem, operands)), kRounding);
  const auto gradient = reference::backward(problem, operands, result, call.d_out.values());
  for (const double g : gradient.d_alpha_logit) EXPECT_EQ(g, 0);
}
INSTANTIATE_TEST_SUITE_P(Options, KeepOne,
                         testing::Combine(testing::Values(RoutingMode::kHard, RoutingMode::kSoft),
                                          testing::Values(LinearScope::kComplement,
                                                          LinearScope::kAll),
                                          testing::Values(Method::kSla2, Method::kSla)));

TEST(Mix, AlphaPicksABranch) {
  const Problem problem = two_heads();
  auto operands = Call(problem).operands<double>();
  operands.alpha_logit.assign(2, 60);
  auto result = forward(problem, operands);
  EXPECT_LT(largest_difference(result.out, result.out_sparse), kRounding);
  operands.alpha_logit.assign(2, -60);
  result = forward(problem, operands);
  EXPECT_LT(largest_difference(result.out, result.out_linear), kRounding);
}

TEST(Sparse, IsSoftmaxOverTheRoutedBlocksAlone) {
  const Problem problem = two_heads();
  auto operands = Call(problem).operands<double>();
  const auto result = forward(problem, operands);
  // Full attention over a copy of the keys in which the blocks that row 0 left out are far away.
  const std::int32_t* blocks = result.routing.blocks.data();
  Problem reduced = problem;
  reduced.k_tokens = 0;
  Operands<double> kept{operands.q, {}, {}, {}, {}, {}, {}, {}};
  for (std::int64_t c = 0; c < max_routed_blocks(problem); ++c) {
    const std::int64_t first = blocks[c] * 32;
    const std::int64_t last = std::min<std::int64_t>(150, first + 32);
    reduced.k_tokens += last - first;
    kept.k.insert(kept.k.end(), &operands.k[first * 16], &operands.k[last * 16 - 1] + 1);
    kept.v.insert(kept.v.end(), &operands.v[first * 32], &operands.v[last * 32 - 1] + 1);
  }
  reduced.num_heads = reduced.num_kv_heads = 1;
  const Vector expected = full_attention(reduced, kept);
  for (std::int64_t i = 0; i < 32 * 32; ++i) {
    EXPECT_NEAR(result.out_sparse[i], expected[i], kRounding);
  }
}

TEST(Smoothing, AConstantInKeysChangesNothing) {
  const Problem problem = two_heads();
  auto operands = Call(problem).operands<double>();
  const auto before = forward(problem, operands);
  for (std::size_t i = 0; i < operands.k.size(); ++i) operands.k[i] += 3.0 + 0.1 * double(i % 16);
  const auto after = forward(problem, operands);
  EXPECT_EQ(before.routing.blocks, after.routing.blocks);
  EXPECT_LT(largest_difference(before.out_sparse, after.out_sparse), kRounding);
  EXPECT_LT(largest_difference(before.out_linear, after.out_linear), kRounding);
}

TEST(Blocks, TheirOrderDoesNotMatter) {
  for (const Precision precision : {Precision::kFp32, Precision::kInt8, Precision::kFp8}) {
    Problem problem = small_problem(70, 160, 16, 32);
    problem.config.precision = precision;
    auto operands = Call(problem).operands<double>();
    const auto before = forward(problem, operands);
    std::rotate(operands.k.begin(), operands.k.begin() + 64 * 16, operands.k.end());
    std::rotate(operands.v.begin(), operands.v.begin() + 64 * 32, operands.v.end());
    const auto after = forward(problem, operands);
    // The mean is rounded once to fp32 and its block sums are added in another order: low bits.
    EXPECT_LT(relative_error(after.out, before.out), precision == Precision::kFp32 ? 1e-12 : 1e-6);
  }
}

TEST(KeyLengths, EqualAShorterCall) {
  for (const RoutingMode routing : {RoutingMode::kHard, RoutingMode::kSoft}) {
    Problem problem = small_problem(70, 150, 16, 32);
    problem.config.routing = routing;
    problem.protected_keys = {60, 120};
    Call call(problem, 3, Layout::kDense, {75});
    auto padded = call.operands<double>();
    std::fill(padded.k.begin() + 75 * 16, padded.k.end(), std::nan(""));  // do not exist
    std::fill(padded.v.begin() + 75 * 32, padded.v.end(), std::nan(""));
    const auto result = forward(problem, padded);
    const auto gradient = reference::backward(problem, padded, result, call.d_out.values());

    Problem shorter = problem;
    shorter.k_tokens = 75;
    shorter.protected_keys = {60, 75};
    auto cut = padded;
    cut.key_lengths.clear();
    cut.k.resize(75 * 16);
    cut.v.resize(75 * 32);
    const auto expected = forward(shorter, cut);
    const auto expected_gradient = reference::backward(shorter, cut, expected, call.d_out.values());
    EXPECT_EQ(largest_difference(result.out, expected.out), 0);
    EXPECT_EQ(largest_difference(gradient.d_q, expected_gradient.d_q), 0);
    for (std::int64_t i = 0; i < 150 * 16; ++i) {
      EXPECT_EQ(gradient.d_k[i], i < 75 * 16 ? expected_gradient.d_k[i] : 0);
    }
  }
}

TEST(GroupedHeads, EqualRepeatedKeys) {
  Problem problem = two_heads();
  problem.num_kv_heads = 1;
  auto operands = Call(problem).operands<double>();
  const auto grouped = forward(problem, operands);
  problem.num_kv_heads = 2;
  for (Vector* x : {&operands.k, &operands.v}) {
    const Vector copy = *x;
    x->insert(x->end(), copy.begin(), copy.end());
  }
  EXPECT_EQ(largest_difference(grouped.out, forward(problem, operands).out), 0);
}

TEST(Protected, BlocksAreAlwaysRoutedBesideTheKept) {
  Problem problem = two_heads(0.2);   // one of five
  problem.protected_keys = {40, 70};  // blocks 1 and 2
  for (const RoutingMode routing : {RoutingMode::kHard, RoutingMode::kSoft}) {
    problem.config.routing = routing;
    const auto result = reference::route(problem, Call(problem).operands<double>());
    ASSERT_EQ(max_routed_blocks(problem), 3);
    for (std::size_t row = 0; row < result.blocks.size(); row += 3) {
      const std::vector<std::int32_t> blocks(&result.blocks[row], &result.blocks[row] + 3);
      EXPECT_TRUE(std::is_sorted(blocks.begin(), blocks.end()));
      EXPECT_TRUE(std::count(blocks.begin(), blocks.end(), 1));
      EXPECT_TRUE(std::count(blocks.begin(), blocks.end(), 2));
    }
    for (std::size_t row = 0; row < result.logits.size(); row += 5) {
      EXPECT_EQ(result.logits[row + 1], std::numeric_limits<double>::infinity());
      double sum = 0;
      for (const int j : {0, 3, 4}) sum += 1 / (1 + std::exp(-result.logits[row + j]));
      EXPECT_NEAR(sum, 1, kRounding);
    }
  }
}

class ExtremeTest : public testing::TestWithParam<std::tuple<Precision, FeatureMap, double>> {};

TEST_P(ExtremeTest, StaysFiniteAndWithinTheRangeOfV) {
  const auto [precision, map, magnitude] = GetParam();
  Problem problem = two_heads();
  problem.dtype = DType::kF16;
  problem.config.precision = precision;
  problem.config.feature_map = map;
  Call call(problem);
  auto operands = call.operands<double>();
  for (Vector* x : {&operands.q, &operands.k, &operands.v}) {
    for (double& value : *x) value = value > 0 ? magnitude : -magnitude;
  }
  const auto result = forward(problem, operands);
  EXPECT_TRUE(all_finite(result.out));
  for (const double o : result.out_linear) EXPECT_LE(std::abs(o), magnitude * (1 + 1e-9));
  const auto gradient = reference::backward(problem, operands, result, call.d_out.values());
  EXPECT_TRUE(all_finite(gradient.d_q) && all_finite(gradient.d_k) && all_finite(gradient.d_v));
}
INSTANTIATE_TEST_SUITE_P(Options, ExtremeTest,
                         testing::Combine(testing::Values(Precision::kInt8, Precision::kFp8,
                                                          Precision::kBf16, Precision::kFp32),
                                          testing::Values(FeatureMap::kSoftmax, FeatureMap::kElu,
                                                          FeatureMap::kRelu),
                                          testing::Values(65504.0, 1e-7, 0.0)));

TEST(LargestFp16, MeansOfItStayInRange) {
  for (const Precision precision :
       {Precision::kInt8, Precision::kFp8, Precision::kBf16, Precision::kFp32}) {
    Problem problem = small_problem(64, 256, 16, 16);
    problem.dtype = DType::kF16;
    problem.config.precision = precision;
    problem.config.keep = 1;
    Call call(problem);
    use_the_largest_fp16(call);
    const auto result = forward(problem, call.operands<double>());
    for (const double o : result.out) {
      EXPECT_LE(std::abs(o), 65504.0) << static_cast<int>(precision);
      EXPECT_GE(std::abs(o), 0.99 * 65504) << static_cast<int>(precision);
    }
  }
}

TEST(SmallShapes, OneTokenAndOneBlock) {
  for (const auto& [q_tokens, k_tokens] : {std::pair{1, 1}, {1, 33}, {33, 1}, {32, 32}}) {
    for (const Precision precision : {Precision::kInt8, Precision::kFp8, Precision::kFp32}) {
      Problem problem = small_problem(q_tokens, k_tokens, 16, 16);
      problem.config.precision = precision;
      Call call(problem);
      const auto operands = call.operands<double>();
      const auto result = forward(problem, operands);
      EXPECT_TRUE(all_finite(result.out));
      if (k_tokens == 1 && precision == Precision::kFp32) {
        EXPECT_LT(
            largest_difference(Vector(result.out.begin(), result.out.begin() + 16), operands.v),
            kRounding);
      }
    }
  }
}

TEST(AllEqualKeys, GiveTheMeanOfTheRoutedValues) {
  Problem problem = small_problem(40, 150, 16, 32);
  auto operands = Call(problem).operands<double>();
  std::fill(operands.k.begin(), operands.k.end(), 0.5);
  const auto result = forward(problem, operands);
  EXPECT_EQ(result.routing.blocks[0], 0);  // ties go to the lower block
  EXPECT_EQ(result.routing.blocks[1], 1);
  double mean = 0;
  for (std::int64_t n = 0; n < 64; ++n) mean += operands.v[n * 32] / 64;
  EXPECT_NEAR(result.out_sparse[0], mean, kRounding);
}

TEST(NotFinite, StaysInItsRowsAndIndicesStayValid) {
  for (const RoutingMode routing : {RoutingMode::kHard, RoutingMode::kSoft}) {
    for (const Precision precision : {Precision::kInt8, Precision::kFp8, Precision::kBf16}) {
      for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
        Problem problem = two_heads();
        problem.config.precision = precision;
        problem.config.routing = routing;
        Call call(problem);
        auto operands = call.operands<double>();
        operands.q[5] = bad;  // row 0 of block 0 of head 0
        auto result = forward(problem, operands);
        // The router pools a block of queries, so soft weights carry it to that block.
        const std::int64_t reach = routing == RoutingMode::kSoft ? 32 * 32 : 32;
        EXPECT_TRUE(all_finite(Vector(result.out.begin() + reach, result.out.end())));
        operands.k[7] = operands.v[9] = bad;
        result = forward(problem, operands);
        for (const std::int32_t j : result.routing.blocks) EXPECT_TRUE(j >= -1 && j < 5) << j;
        EXPECT_TRUE(all_finite(Vector(result.out.begin() + 70 * 32, result.out.end())));
        reference::backward(problem, operands, result, call.d_out.values());
      }
    }
  }
}

TEST(Float, AgreesWithDouble) {
  for (const RoutingMode routing : {RoutingMode::kHard, RoutingMode::kSoft}) {
    Problem problem = two_heads();
    problem.config.routing = routing;
    Call call(problem);
    const auto exact = forward(problem, call.operands<double>());
    const auto naive = forward(problem, call.operands<float>());
    // 150 products and exponentials of scores below 20 at 6e-8 each.
    EXPECT_LT(relative_error(naive.out, exact.out), 1e-5);
  }
}

TEST(Precision, QuantisationErrorHasItsKnownSize) {
  Problem problem = small_problem(256, 512, 64, 64);
  Call call(problem);
  const auto operands = call.operands<double>();
  const auto exact = forward(problem, operands);
  const auto error_of = [&](Precision precision, DType dtype) {
    problem.config.precision = precision;
    problem.dtype = dtype;
    return relative_error(forward(problem, operands, &exact.routing).out_sparse, exact.out_sparse);
  };
  EXPECT_EQ(error_of(Precision::kFp32, DType::kF32), 0);
  const double bf16 = error_of(Precision::kBf16, DType::kF32);
  EXPECT_LT(bf16, 1e-2);
  EXPECT_GT(bf16, 5e-4);
  EXPECT_LT(error_of(Precision::kBf16, DType::kF16), bf16 / 4);  // three more bits
  EXPECT_LT(error_of(Precision::kInt8, DType::kF32), 4e-2);
  EXPECT_LT(error_of(Precision::kFp8, DType::kF32), 8e-2);
}

TEST(Soft, LowBitPrecisionsMeanTheUnquantisedOnes) {
  Problem problem = two_heads();
  problem.config.routing = RoutingMode::kSoft;
  const auto operands = Call(problem).operands<double>();
  const auto out = [&](Precision precision, DType dtype) {
    problem.config.precision = precision;
    problem.dtype = dtype;
    return forward(problem, operands).out;
  };
  EXPECT_EQ(out(Precision::kInt8, DType::kF32), out(Precision::kFp32, DType::kF32));
  EXPECT_EQ(out(Precision::kFp8, DType::kF16), out(Precision::kBf16, DType::kF16));
}

TEST(Implementation, ReferenceGivesTheSameBitsOnAnyThreadsAndLayout) {
  Problem problem = two_heads();
  problem.batch = 2;
  problem.implementation = "reference";
  SerialExecutor serial;
  Call expected(problem, 4);
  expected.run_forward(serial);
  expected.run_backward(serial);
  for (const Layout layout : {Layout::kDense, Layout::kTransposed, Layout::kPadded}) {
    for (const std::int64_t threads : {2, 5}) {
      const auto pool = make_thread_pool(threads);
      Call call(problem, 4, layout);
      call.run_forward(*pool);
      call.run_backward(*pool);
      EXPECT_EQ(call.out.values(), expected.out.values());
      EXPECT_EQ(call.d_q.values(), expected.d_q.values());
      EXPECT_EQ(call.d_k.values(), expected.d_k.values());
      EXPECT_EQ(call.d_v.values(), expected.d_v.values());
      EXPECT_EQ(call.d_alpha_logit.values(), expected.d_alpha_logit.values());
      EXPECT_TRUE(call.guards_intact());
    }
  }
}

}  // namespace
}  // namespace sla2::test

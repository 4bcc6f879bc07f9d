// The judge judged: what a norm over a whole tensor forgives must still fail.
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include "core/problems.h"
#include "cpu/parity.h"

namespace sla2::test {
namespace {

constexpr std::int64_t kRows = 75;
constexpr std::int64_t kWidth = 64;

/// Exact values, and a naive run of int8's error: 2% in every row.
struct Sample {
  std::vector<double> exact;
  std::vector<float> naive;
  std::vector<double> ours;

  Sample() {
    std::mt19937_64 generator(1);
    exact = random_normal(generator, kRows * kWidth);
    for (const double error : random_normal(generator, kRows * kWidth, 0.02)) {
      naive.push_back(static_cast<float>(exact[naive.size()] + error));
    }
    for (const double error : random_normal(generator, kRows * kWidth, 0.02)) {
      ours.push_back(exact[ours.size()] + error);
    }
  }
  void scale_rows(std::int64_t first, std::int64_t end, double factor) {
    for (std::int64_t at = first * kWidth; at < end * kWidth; ++at) ours[at] *= factor;
  }
  void judge() const { expect_rows_close("ours", ours, naive, exact, DType::kF32, kWidth); }
  [[nodiscard]] bool whole_tensor_passes() const {
    return relative_error(ours, exact) <= 2 * relative_error(naive, exact);
  }
};

/// The texts of what fails in `body`, in one.
template <typename Body>
std::string failures_of(const Body& body) {
  testing::TestPartResultArray results;
  {
    const testing::ScopedFakeTestPartResultReporter reporter(
        testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &results);
    body();
  }
  std::string text;
  for (int i = 0; i < results.size(); ++i) text += results.GetTestPartResult(i).message();
  return text;
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

TEST(Judge, PassesAnErrorLikeTheNaiveRuns) { Sample().judge(); }

TEST(Judge, RefusesOneWrongRow) {
  Sample sample;
  sample.scale_rows(kRows - 1, kRows, 0.75);
  EXPECT_TRUE(sample.whole_tensor_passes());
  EXPECT_TRUE(has(failures_of([&] { sample.judge(); }), "the worst of every 1 rows"));
}

TEST(Judge, RefusesAWrongBlock) {
  Sample sample;
  sample.scale_rows(32, 64, 0.955);
  EXPECT_TRUE(sample.whole_tensor_passes());
  const std::string text = failures_of([&] { sample.judge(); });
  EXPECT_TRUE(has(text, "the worst of every 32 rows")) << text;
}

TEST(Judge, RefusesOneNotANumber) {
  Sample sample;
  sample.ours[70] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_FALSE(worst_part_error(sample.ours, sample.exact, kWidth) <= 1e300);
}

/// A call whose forward has run.
Call run_forward(const char* implementation, Precision precision,
                 RoutingMode routing = RoutingMode::kHard) {
  Problem problem = small_problem(75, 200, 64, 64);
  problem.config.precision = precision;
  problem.config.routing = routing;
  problem.implementation = implementation;
  Call call(problem, 7);
  SerialExecutor serial;
  call.run_forward(serial);
  return call;
}

/// One row's o_s off by 3%: within twice the error of int8 itself, not of its emulation.
TEST(Judge, ComparesIntegersWithTheEmulation) {
  Call call = run_forward("reference", Precision::kInt8);
  const auto routing = routing_of<double>(call);
  std::vector<double> values = call.out_sparse.values();
  const std::vector<float> emulated(values.begin(), values.end());
  expect_integers_close(call, routing, emulated, Chunks::kSame);
  for (std::int64_t c = 0; c < 64; ++c) values[74 * 64 + c] *= 1.03;
  call.out_sparse.set(values);
  const std::string text =
      failures_of([&] { expect_integers_close(call, routing, emulated, Chunks::kSame); });
  EXPECT_TRUE(has(text, "out_sparse against int8 emulated, head 0, row 74")) << text;
}

/// The lse of one row off by 2%, in int8.
TEST(Judge, RefusesAWrongSumOfIntegers) {
  Call call = run_forward("cpu_baseline", Precision::kInt8);
  expect_forward(call);
  call.lse[74] *= 1.02F;
  const std::string text = failures_of([&] { expect_forward(call); });
  EXPECT_TRUE(has(text, "lse against int8 emulated, head 0, row 74")) << text;
}

/// One row of a gradient, and a router's, off by 1e-3: the second opinion of what cancels does not
/// excuse that.
TEST(Judge, RefusesWrongGradients) {
  Call call = run_forward("cpu_baseline", Precision::kFp32, RoutingMode::kSoft);
  SerialExecutor serial;
  call.run_backward(serial);
  expect_backward(call);
  auto d_k = call.d_k.values();
  for (std::int64_t c = 0; c < 64; ++c) d_k[12 * 64 + c] *= 1.001;
  call.d_k.set(d_k);
  for (std::int64_t i = 0; i < call.d_proj_q.size(); ++i) call.d_proj_q[i] *= 1.001F;
  const std::string text = failures_of([&] { expect_backward(call); });
  EXPECT_TRUE(has(text, "d_k: relative error")) << text;
  EXPECT_TRUE(has(text, "the worst of every 1 rows")) << text;
  EXPECT_TRUE(has(text, "d_proj_q")) << text;
}

}  // namespace
}  // namespace sla2::test

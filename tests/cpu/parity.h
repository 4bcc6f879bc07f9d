// One error rule for every comparison of a backend with the oracle.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/float16.h"
#include "core/problems.h"
#include "cpu/job.h"
#include "reference/reference.h"
#include "sla2/sla2.h"

namespace sla2::test {

/// The implementations of the CPU backend. A visible skip for what this machine lacks.
inline const char* const kCpuImplementations[] = {
    "cpu_amx", "cpu_avx512_vnni", "cpu_avx512", "cpu_avx2_vnni", "cpu_avx2", "cpu_baseline"};

/// Their tables, in the same order.
inline const cpu::Kernels& kernels_of(const std::string& name) {
  const cpu::Kernels* const tables[] = {&cpu::amx::kKernels,    &cpu::avx512_vnni::kKernels,
                                        &cpu::avx512::kKernels, &cpu::avx2_vnni::kKernels,
                                        &cpu::avx2::kKernels,   &cpu::baseline::kKernels};
  const auto* found =
      std::find(std::begin(kCpuImplementations), std::end(kCpuImplementations), name);
  return *tables[found - std::begin(kCpuImplementations)];
}

inline const Implementation* find_implementation(const char* name) {
  for (const Implementation* implementation : implementations()) {
    if (std::string(implementation->name) == name) return implementation;
  }
  return nullptr;
}

/// The routing that a call used.
template <typename Real>
reference::RoutingResult<Real> routing_of(const Call& call) {
  reference::RoutingResult<Real> routing;
  const auto logits = call.logits.values();
  routing.logits.assign(logits.begin(), logits.end());
  for (const double x : call.blocks.values()) {
    routing.blocks.push_back(static_cast<std::int32_t>(x));
  }
  return routing;
}

/// What its forward left for the backward; with the scores where a router learns.
template <typename Real>
reference::ForwardResult<Real> saved_of(Call& call, bool learns_router) {
  const auto copy = [](const std::vector<double>& x) {
    return std::vector<Real>(x.begin(), x.end());
  };
  reference::ForwardResult<Real> saved;
  saved.out_sparse = copy(call.out_sparse.values());
  saved.out_linear = copy(call.out_linear.values());
  saved.lse = copy(call.lse.values());
  saved.k_mean = copy(call.k_mean.values());
  saved.routing = routing_of<Real>(call);
  if (learns_router) {
    saved.routing.scores = reference::route(call.problem, call.operands<Real>()).scores;
  }
  return saved;
}

template <typename Number>
[[nodiscard]] double largest(const std::vector<Number>& values) {
  double most = 0;
  for (const Number x : values) most = std::max(most, std::abs(static_cast<double>(x)));
  return most;
}

#define SLA2_SKIP_IF_REFUSED(problem, pass)                                          \
  do {                                                                               \
    const Implementation* found = find_implementation((problem).implementation);     \
    ASSERT_NE(found, nullptr);                                                       \
    const std::string reason = found->refusal((problem), (pass));                    \
    if (!reason.empty()) GTEST_SKIP() << (problem).implementation << ": " << reason; \
  } while (false)

/// About what storing a right result costs, relative to its norm: a quarter of a unit of the last
/// place of a 16-bit type, half a unit of fp32's.
inline double storage_error(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kBF16 ? 0x1p-9 : 0x1p-12;
}

/// fp32 sums of `terms` terms: sqrt(terms) roundings of 2^-24 add up at random, times 4 for the
/// chain of products, exp and divisions behind them.
inline double sum_error(double terms) { return 4 * std::sqrt(terms) * 0x1p-24; }
/// A few hundred terms.
inline constexpr double kSumError = 64 * 0x1p-24;

/// The exact result in the type.
inline std::vector<double> stored_as(const std::vector<double>& exact, DType dtype) {
  std::vector<double> stored;
  for (const double x : exact) {
    const auto value = static_cast<float>(x);
    stored.push_back(dtype == DType::kF32    ? value
                     : dtype == DType::kBF16 ? from_bf16(to_bf16(value))
                                             : from_fp16(to_fp16(value)));
  }
  return stored;
}
/// What storing the exact result in the type costs, relative to its norm. At the worst half a unit
/// of the last place (2^-8 for bf16, 2^-11 for fp16), on most data half of that.
inline double stored_error(const std::vector<double>& exact, DType dtype) {
  if (dtype == DType::kF32) return storage_error(dtype);
  return relative_error(stored_as(exact, dtype), exact);
}

/// Ours may be at most twice as far from the exact result as the naive run in the same precision,
/// plus what rounding costs any run: `floor` for its sums.
inline double close_bound(const std::vector<float>& naive, const std::vector<double>& exact,
                          DType dtype, double floor) {
  return 2 * relative_error(naive, exact) + floor + stored_error(exact, dtype);
}
/// The same rule for the worst `part` values: a norm over a whole tensor forgives one wrong row or
/// block. There the floors are those of extremes: storing costs half a unit of the last place, and
/// the largest of R Gaussian errors is sqrt(2 ln R) deviations, 4.1 for 4096 rows, where the rule
/// for the whole speaks of one. What lies below the type's normal numbers costs more to store.
/// `stored`: the exact result in the type.
inline double close_bound_of_rows(const std::vector<float>& naive, const std::vector<double>& exact,
                                  const std::vector<double>& stored, DType dtype, std::size_t part,
                                  double floor) {
  return 2 * worst_part_error(naive, exact, part) + 4.1 * floor +
         2 * std::max(storage_error(dtype), worst_part_error(stored, exact, part));
}

template <typename Ours>
void expect_close(const char* what, const std::vector<Ours>& ours, const std::vector<float>& naive,
                  const std::vector<double>& exact, DType dtype, double floor = kSumError) {
  ASSERT_EQ(ours.size(), exact.size()) << what;
  if (largest(exact) == 0) {
    // Terms of order d that cancel exactly in exact arithmetic (one key: dP = Ds).
    for (const Ours x : ours) ASSERT_LE(std::abs(static_cast<double>(x)), kSumError) << what;
    return;
  }
  const double bound = close_bound(naive, exact, dtype, floor);
  const double error = relative_error(ours, exact);
  EXPECT_TRUE(error <= bound) << what << ": relative error " << error << ", bound " << bound;
}

/// Whether a tensor of rows of `width` values is close as a whole, in its worst row and in the
/// worst of every 32 rows; `exact` is not all zeros.
template <typename Ours>
testing::AssertionResult rows_are_close(const std::vector<Ours>& ours,
                                        const std::vector<float>& naive,
                                        const std::vector<double>& exact, DType dtype,
                                        std::int64_t width, double floor) {
  testing::AssertionResult result = testing::AssertionSuccess();
  const auto judge = [&](const std::string& of, double error, double bound) {
    if (error <= bound) return;
    if (result) result = testing::AssertionFailure();
    result << of << "relative error " << error << ", bound " << bound << "; ";
  };
  judge("", relative_error(ours, exact), close_bound(naive, exact, dtype, floor));
  const std::vector<double> stored = stored_as(exact, dtype);
  for (const std::int64_t rows : {1, 32}) {
    const auto part = static_cast<std::size_t>(rows * width);
    judge("the worst of every " + std::to_string(rows) + " rows: ",
          worst_part_error(ours, exact, part),
          close_bound_of_rows(naive, exact, stored, dtype, part, floor));
  }
  return result;
}

/// expect_close for a tensor of such rows.
template <typename Ours>
void expect_rows_close(const char* what, const std::vector<Ours>& ours,
                       const std::vector<float>& naive, const std::vector<double>& exact,
                       DType dtype, std::int64_t width, double floor = kSumError) {
  if (ours.size() != exact.size() || largest(exact) == 0) {
    return expect_close(what, ours, naive, exact, dtype, floor);
  }
  const testing::AssertionResult result = rows_are_close(ours, naive, exact, dtype, width, floor);
  if (!result) ADD_FAILURE() << what << ": " << result.message();
}

/// o_s of precision int8 against the reference's emulation. Both quantise q, ks and v to the same
/// integers and sum exactly; only p can differ, which has a grid of 1/255 of the largest weight:
/// - the same chunks, so the same grid: p differs by one where 255 e^(s - max) lies within `kReach`
///   of a half. A row whose p sum to S has 2 kReach S / 255 such keys on average, n + 3 sqrt(n) + 2
///   at the most (Poisson), and each moves o_s by |v - o_s| / S <= 2 max|v| / S;
/// - other chunks, so another grid: every p of the row's keys differs by a rounding on either side,
///   sqrt(1/12 + 1/12) each, 5 deviations at the most.
enum class Chunks : std::uint8_t { kSame, kOther };
void expect_integers_close(Call& call, const reference::RoutingResult<double>& routing,
                           const std::vector<float>& emulated, Chunks chunks);
/// The lse of such rows: S is known to within as many units.
void expect_integer_lse_close(Call& call, const reference::RoutingResult<double>& routing,
                              const std::vector<float>& emulated, Chunks chunks);

/// A NaN in q or k shows in its rows of out, out_sparse and lse, also where every block is routed
/// and no complement can show it.
inline void expect_nan_shows(Problem problem, const std::function<void(Call&)>& forward) {
  for (const double keep : {0.5, 1.0}) {
    for (const bool in_keys : {false, true}) {
      problem.config.keep = keep;
      Call call(problem, 23);
      Tensor& x = in_keys ? call.k : call.q;
      std::vector<double> spoilt = x.values();
      spoilt[5] = std::numeric_limits<double>::quiet_NaN();
      x.set(spoilt);
      forward(call);
      // One row of q, or by their mean all keys of the head.
      const std::int64_t rows = in_keys ? problem.q_tokens : 1;
      const auto expect_nan = [&](const std::vector<double>& values, std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) {
          ASSERT_TRUE(std::isnan(values[i]))
              << "precision " << static_cast<int>(problem.config.precision) << ", keep " << keep
              << ", in " << (in_keys ? "k" : "q") << ": " << values[i] << " at " << i;
        }
      };
      expect_nan(call.out.values(), rows * problem.value_dim);
      expect_nan(call.out_sparse.values(), rows * problem.value_dim);
      expect_nan(call.lse.values(), rows);
    }
  }
}

/// One call: what is not set is small_problem's.
struct ParityCase {
  std::string name;
  Problem problem;
  Layout layout = Layout::kDense;
  std::vector<std::int64_t> key_lengths;
};

/// What a forward, and a backward behind it, left in the call against the reference in double,
/// under the routing that the call holds; the naive run is the reference in float and in the same
/// format.
void expect_forward(Call& call);
void expect_backward(Call& call);
/// Forward and backward of an implementation, both judged.
void expect_parity(const char* implementation, const ParityCase& c);

}  // namespace sla2::test

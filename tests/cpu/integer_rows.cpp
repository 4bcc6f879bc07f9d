// The bound of o_s in precision int8 (parity.h), row by row.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/parity.h"
#include "reference/stages.h"

namespace sla2::test {
namespace {

// How far a backend's 255 e^x may lie from the exact one before it is rounded (scaled_exp2 in
// src/cpu/stages/vector.inc): the reach of "one side of a half or the other".
constexpr double kReach = 0.03;

/// What one row's softmax is made of.
struct Row {
  double keys = 0;  // routed ones
  double sum = 0;   // S, in units of p: 255 for the largest

  /// Keys that lie so near a half that their p may differ by one, on average.
  [[nodiscard]] double flips() const { return 2 * kReach * sum / 255; }
  /// The variance of the sum of p between two grids.
  [[nodiscard]] double grid_variance(Chunks chunks) const {
    return chunks == Chunks::kOther ? keys / 6 : 0;
  }
  /// How many units the sum may differ by.
  [[nodiscard]] double most_units(Chunks chunks) const {
    return flips() + 3 * std::sqrt(flips()) + 2 + 5 * std::sqrt(grid_variance(chunks)) / 2;
  }
};

Row read_row(const reference::Head<double>& head, const Problem& p, const std::int32_t* blocks,
             std::int64_t row) {
  const double scale = softmax_scale(p);
  std::vector<double> scores;
  for (std::int64_t c = 0; c < max_routed_blocks(p) && blocks[c] >= 0; ++c) {
    const std::int64_t end = std::min((blocks[c] + 1) * p.config.block_k, head.length);
    for (std::int64_t n = blocks[c] * p.config.block_k; n < end; ++n) {
      double score = 0;
      for (std::int64_t i = 0; i < p.head_dim; ++i) {
        score += head.q[row * p.head_dim + i] * head.ks[n * p.head_dim + i];
      }
      scores.push_back(scale * score);
    }
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  Row result{static_cast<double>(scores.size()), 0};
  for (const double score : scores) result.sum += 255 * std::exp(score - top);
  return result;
}

/// visit(at, row, what, head) for every row of every head `at`, until it says false.
template <typename Visit>
void for_each_row(Call& call, const reference::RoutingResult<double>& routing, const Visit& visit) {
  const Problem& p = call.problem;
  const auto operands = call.operands<double>();
  const reference::Sizes s(p);
  const auto smoothed = reference::smooth(p, operands);
  for (std::int64_t at = 0; at < s.B * s.H; ++at) {
    const auto head = reference::make_head(s, operands, smoothed.ks, at / s.H, at % s.H);
    for (std::int64_t row = 0; row < s.Nq; ++row) {
      const std::int32_t* blocks = &routing.blocks[(at * s.M + row / s.bq) * max_routed_blocks(p)];
      if (!visit(at, row, read_row(head, p, blocks, row), head)) return;
    }
  }
}

/// The longest row of v.
double widest_value(const reference::Head<double>& head, std::int64_t dv) {
  double widest = 0;
  for (std::int64_t n = 0; n < head.length; ++n) {
    double norm = 0;
    for (std::int64_t c = 0; c < dv; ++c) norm += head.v[n * dv + c] * head.v[n * dv + c];
    widest = std::max(widest, std::sqrt(norm));
  }
  return widest;
}

}  // namespace

void expect_integers_close(Call& call, const reference::RoutingResult<double>& routing,
                           const std::vector<float>& emulated, Chunks chunks) {
  const Problem& p = call.problem;
  const std::int64_t dv = p.value_dim;
  const std::vector<double> ours = call.out_sparse.values();
  double squares = 0;
  double expected = 0;  // of them
  double largest = 0;   // one key's share where it is largest
  double widest = 0;
  bool passes = true;
  for_each_row(
      call, routing,
      [&](std::int64_t at, std::int64_t row, const Row& what, const reference::Head<double>& head) {
        if (row == 0) widest = widest_value(head, dv);
        const double one = 2 * widest / what.sum;
        const double most = one * what.most_units(chunks);
        double norm = 0;
        double error = 0;
        for (std::int64_t c = 0; c < dv; ++c) {
          const auto wanted = static_cast<double>(emulated[(at * p.q_tokens + row) * dv + c]);
          const double x = ours[(at * p.q_tokens + row) * dv + c] - wanted;
          error += x * x;
          norm += wanted * wanted;
        }
        const double rounding = (4.1 * kSumError + 2 * storage_error(p.dtype)) * std::sqrt(norm);
        passes = std::sqrt(error) <= most + rounding;
        EXPECT_TRUE(passes) << "out_sparse against int8 emulated, head " << at << ", row " << row
                            << ": error " << std::sqrt(error) << ", bound " << most + rounding;
        squares += error;
        largest = std::max(largest, one);
        // |v - o_s| is about |v|, half of the 2 |v| that one row may meet.
        expected +=
            one * one * (what.flips() + what.grid_variance(chunks)) / 4 + rounding * rounding;
        return passes;
      });
  if (!passes) return;
  // All rows together; a few keys in all may fall into the worst row.
  const double bound = 2 * std::sqrt(expected) + 2 * largest;
  EXPECT_TRUE(std::sqrt(squares) <= bound)
      << "out_sparse against int8 emulated: error " << std::sqrt(squares) << ", bound " << bound;
}

void expect_integer_lse_close(Call& call, const reference::RoutingResult<double>& routing,
                              const std::vector<float>& emulated, Chunks chunks) {
  const std::vector<double> ours = call.lse.values();
  for_each_row(
      call, routing,
      [&](std::int64_t at, std::int64_t row, const Row& what, const reference::Head<double>&) {
        const std::int64_t n = at * call.problem.q_tokens + row;
        const auto wanted = static_cast<double>(emulated[n]);
        // lse = max + log(S / 255), both rounded.
        const double size = std::abs(wanted) + 2 * std::log(what.sum / 255);
        const double bound = what.most_units(chunks) / what.sum + 4.1 * kSumError * size;
        const double error = std::abs(ours[n] - wanted);
        const bool passes = error <= bound;
        EXPECT_TRUE(passes) << "lse against int8 emulated, head " << at << ", row " << row
                            << ": error " << error << ", bound " << bound;
        return passes;
      });
}

}  // namespace sla2::test

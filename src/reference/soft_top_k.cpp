// Step 1, soft (Eq. 17): block weights m = sigmoid(x) whose sum is fixed, and their gradient.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/stages.h"

namespace sla2::reference {
namespace {

template <typename Real>
Real sigmoid(Real x) {
  if (x >= 0) return 1 / (1 + std::exp(-x));
  const Real e = std::exp(x);
  return e / (1 + e);
}

/// log sigmoid(x) = -softplus(-x).
template <typename Real>
Real log_sigmoid(Real x) {
  return x >= 0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x));
}

/// lambda with sum_j sigmoid(z_j + lambda) = target, 0 < target < z.size(), by bisection.
double solve_lambda(const std::vector<double>& z, double target) {
  // If every z were the largest one, this lambda would do; the sum is smaller, so the root is
  // above. Likewise for the smallest one.
  const double share = target / static_cast<double>(z.size());
  const double level = std::log(share / (1 - share));
  double low = level - *std::max_element(z.begin(), z.end());
  double high = level - *std::min_element(z.begin(), z.end());
  while (true) {
    const double middle = low + (high - low) / 2;
    if (!(low < middle && middle < high)) return middle;  // adjacent numbers, or NaN
    double sum = 0;
    for (const double value : z) sum += sigmoid(value + middle);
    (sum < target ? low : high) = middle;
  }
}

}  // namespace

template <typename Real>
std::vector<Real> soft_scores(const Problem& problem, const Real* scores, std::int64_t k_blocks) {
  std::vector<Real> p(scores, scores + k_blocks);
  if (problem.config.score_norm == ScoreNorm::kNone) return p;
  const Real max = *std::max_element(p.begin(), p.end());
  Real sum = 0;
  for (Real& value : p) sum += value = std::exp(value - max);
  for (Real& value : p) value /= sum;
  return p;
}

template <typename Real>
std::vector<Real> soft_top_k(const std::vector<Real>& p, double target, double tau,
                             BlockRange fixed) {
  std::vector<double> others;
  for (std::size_t j = 0; j < p.size(); ++j) {
    if (!fixed.contains(static_cast<std::int64_t>(j))) {
      others.push_back(static_cast<double>(p[j]) / tau);
    }
  }
  std::vector<Real> logits(p.size(), std::numeric_limits<Real>::infinity());
  if (static_cast<double>(others.size()) <= target) return logits;
  const double lambda = solve_lambda(others, target);
  std::size_t next = 0;
  for (std::size_t j = 0; j < p.size(); ++j) {
    if (!fixed.contains(static_cast<std::int64_t>(j))) {
      logits[j] = static_cast<Real>(others[next++] + lambda);
    }
  }
  return logits;
}

template <typename Real>
std::vector<Real> soft_top_k_backward(const Real* logits, const Real* u, const Real* l,
                                      std::int64_t k_blocks, double tau) {
  const auto inverse_tau = static_cast<Real>(1 / tau);
  std::vector<Real> d_p(k_blocks);  // holds t first
  std::vector<Real> g(k_blocks);
  Real sum_t = 0;
  Real sum_g = 0;
  for (std::int64_t j = 0; j < k_blocks; ++j) {
    const Real rest = sigmoid(-logits[j]);
    g[j] = sigmoid(logits[j]) * rest * inverse_tau;
    d_p[j] = rest * u[j] * inverse_tau + g[j] * l[j];
    sum_t += d_p[j];
    sum_g += g[j];
  }
  for (std::int64_t j = 0; j < k_blocks; ++j) {
    d_p[j] = sum_g == 0 ? 0 : d_p[j] - g[j] * (sum_t / sum_g);
  }
  return d_p;
}

template <typename Real>
BlockWeights<Real> block_weights(const Problem& problem, const RoutingResult<Real>& routing,
                                 std::int64_t b, std::int64_t h, std::int64_t k_blocks) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  const Sizes sizes(problem);
  BlockWeights<Real> weights{k_blocks, std::vector<Real>(sizes.M * k_blocks, -kInfinity),
                             std::vector<Real>(sizes.M * k_blocks, Real(1)),
                             std::vector<bool>(sizes.M)};
  for (std::int64_t i = 0; i < sizes.M; ++i) {
    const std::int64_t row = (b * sizes.H + h) * sizes.M + i;
    Real* log_m = weights.log_m.data() + i * k_blocks;
    Real* rest = weights.rest.data() + i * k_blocks;
    if (problem.config.routing == RoutingMode::kSoft) {
      const Real* logits = routing.logits.data() + row * sizes.T;
      for (std::int64_t j = 0; j < k_blocks; ++j) {
        log_m[j] = log_sigmoid(logits[j]);
        rest[j] = sigmoid(-logits[j]);
      }
      weights.complement_empty[i] =
          std::all_of(logits, logits + k_blocks, [](Real x) { return x == kInfinity; });
    } else {
      const std::int32_t* blocks = routing.blocks.data() + row * sizes.L;
      std::int64_t count = 0;
      for (; count < sizes.L && blocks[count] >= 0; ++count) {
        log_m[blocks[count]] = 0;
        rest[blocks[count]] = 0;
      }
      weights.complement_empty[i] = count == k_blocks;
    }
  }
  return weights;
}

#define SLA2_INSTANTIATE(Real)                                                                 \
  template std::vector<Real> soft_scores(const Problem&, const Real*, std::int64_t);           \
  template std::vector<Real> soft_top_k(const std::vector<Real>&, double, double, BlockRange); \
  template std::vector<Real> soft_top_k_backward(const Real*, const Real*, const Real*,        \
                                                 std::int64_t, double);                        \
  template BlockWeights<Real> block_weights(const Problem&, const RoutingResult<Real>&,        \
                                            std::int64_t, std::int64_t, std::int64_t);
SLA2_INSTANTIATE(float)
SLA2_INSTANTIATE(double)
#undef SLA2_INSTANTIATE

}  // namespace sla2::reference

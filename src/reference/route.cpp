// Step 1 (Eq. 15, 16): pool, project, score, choose.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/stages.h"

namespace sla2::reference {

template <typename Real>
std::vector<Real> pool_queries(const Sizes& sizes, const Operands<Real>& operands) {
  std::vector<Real> pooled(sizes.B * sizes.H * sizes.M * sizes.d);
  for (std::int64_t head = 0; head < sizes.B * sizes.H; ++head) {
    for (std::int64_t i = 0; i < sizes.M; ++i) {
      const std::int64_t rows = sizes.query_rows(i);
      const Real* q = operands.q.data() + (head * sizes.Nq + i * sizes.bq) * sizes.d;
      Real* mean = pooled.data() + (head * sizes.M + i) * sizes.d;
      for (std::int64_t c = 0; c < sizes.d; ++c) {
        Real sum = 0;
        for (std::int64_t r = 0; r < rows; ++r) sum += q[r * sizes.d + c];
        mean[c] = sum / static_cast<Real>(rows);
      }
    }
  }
  return pooled;
}

template <typename Real>
std::vector<Real> project(const Problem& problem, const Real* x, const std::vector<Real>& w,
                          std::int64_t head) {
  const std::int64_t d = problem.head_dim;
  if (w.empty()) return std::vector<Real>(x, x + d);
  const Real* matrix = w.data() + (problem.num_routers == 1 ? 0 : head) * d * d;
  std::vector<Real> y(d);
  for (std::int64_t r = 0; r < d; ++r) {
    for (std::int64_t c = 0; c < d; ++c) y[c] += x[r] * matrix[r * d + c];
  }
  return y;
}

template <typename Real>
std::vector<std::int32_t> choose_blocks(const Real* scores, std::int64_t k_blocks,
                                        std::int64_t kept, BlockRange fixed, std::int64_t width) {
  std::vector<std::int32_t> others;
  std::vector<std::int32_t> chosen;
  for (std::int32_t j = 0; j < k_blocks; ++j) (fixed.contains(j) ? chosen : others).push_back(j);
  std::stable_sort(others.begin(), others.end(), [scores](std::int32_t a, std::int32_t b) {
    if (std::isnan(scores[a]) || std::isnan(scores[b])) {
      return !std::isnan(scores[a]) && std::isnan(scores[b]);
    }
    return scores[a] > scores[b];
  });
  others.resize(std::min<std::size_t>(others.size(), static_cast<std::size_t>(kept)));
  chosen.insert(chosen.end(), others.begin(), others.end());
  std::sort(chosen.begin(), chosen.end());
  chosen.resize(static_cast<std::size_t>(width), -1);
  return chosen;
}

namespace {

/// s_ij of one head, [M, T]; -inf behind its length.
template <typename Real>
std::vector<Real> score_head(const Problem& problem, const Operands<Real>& operands,
                             const Real* pooled_q,  // [M, d]
                             const Real* pooled_k,  // [T, d]
                             std::int64_t h, std::int64_t k_blocks) {
  const Sizes sizes(problem);
  const auto scale = static_cast<Real>(softmax_scale(problem));
  std::vector<std::vector<Real>> keys;
  for (std::int64_t j = 0; j < k_blocks; ++j) {
    keys.push_back(project(problem, pooled_k + j * sizes.d, operands.proj_k, h));
  }
  std::vector<Real> scores(sizes.M * sizes.T, -std::numeric_limits<Real>::infinity());
  for (std::int64_t i = 0; i < sizes.M; ++i) {
    const std::vector<Real> query = project(problem, pooled_q + i * sizes.d, operands.proj_q, h);
    for (std::int64_t j = 0; j < k_blocks; ++j) {
      scores[i * sizes.T + j] =
          scale * std::inner_product(query.begin(), query.end(), keys[j].begin(), Real(0));
    }
  }
  return scores;
}

}  // namespace

template <typename Real>
RoutingResult<Real> route_smoothed(const Problem& problem, const Operands<Real>& operands,
                                   const Smoothed<Real>& smoothed) {
  const Sizes sizes(problem);
  const bool soft = problem.config.routing == RoutingMode::kSoft;
  const std::vector<Real> pooled_q = pool_queries(sizes, operands);
  RoutingResult<Real> result;
  for (std::int64_t head = 0; head < sizes.B * sizes.H; ++head) {
    const std::int64_t b = head / sizes.H;
    const std::int64_t h = head % sizes.H;
    const std::int64_t kv = h / (sizes.H / sizes.Hkv);
    const std::int64_t length = key_length(sizes, operands, b);
    const std::int64_t k_blocks = num_k_blocks(problem, length);
    const std::int64_t kept = num_kept_blocks(problem, k_blocks);
    const BlockRange fixed = protected_blocks(problem, length);
    const auto total = static_cast<double>(k_blocks);
    const double target = std::clamp(problem.config.keep * total, 1.0, total);

    const std::vector<Real> scores =
        score_head(problem, operands, pooled_q.data() + head * sizes.M * sizes.d,
                   smoothed.pooled.data() + (b * sizes.Hkv + kv) * sizes.T * sizes.d, h, k_blocks);
    result.scores.insert(result.scores.end(), scores.begin(), scores.end());
    for (std::int64_t i = 0; i < sizes.M; ++i) {
      const Real* row = scores.data() + i * sizes.T;
      const auto blocks = choose_blocks(row, k_blocks, kept, fixed, sizes.L);
      result.blocks.insert(result.blocks.end(), blocks.begin(), blocks.end());
      if (!soft) continue;
      std::vector<Real> logits =
          soft_top_k(soft_scores(problem, row, k_blocks), target, problem.config.tau, fixed);
      logits.resize(sizes.T, -std::numeric_limits<Real>::infinity());
      result.logits.insert(result.logits.end(), logits.begin(), logits.end());
    }
  }
  return result;
}

template <typename Real>
RoutingResult<Real> route(const Problem& problem, const Operands<Real>& operands) {
  return route_smoothed(problem, operands, smooth(problem, operands));
}

#define SLA2_INSTANTIATE(Real)                                                              \
  template std::vector<Real> pool_queries(const Sizes&, const Operands<Real>&);             \
  template std::vector<Real> project(const Problem&, const Real*, const std::vector<Real>&, \
                                     std::int64_t);                                         \
  template std::vector<std::int32_t> choose_blocks(const Real*, std::int64_t, std::int64_t, \
                                                   BlockRange, std::int64_t);               \
  template RoutingResult<Real> route_smoothed(const Problem&, const Operands<Real>&,        \
                                              const Smoothed<Real>&);                       \
  template RoutingResult<Real> route(const Problem&, const Operands<Real>&);
SLA2_INSTANTIATE(float)
SLA2_INSTANTIATE(double)
#undef SLA2_INSTANTIATE

}  // namespace sla2::reference

// Sizes that follow from a problem.
#include "sla2/problem.h"

#include <algorithm>
#include <cmath>

namespace sla2 {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

}  // namespace

std::int64_t num_q_blocks(const Problem& problem) {
  return ceil_div(problem.q_tokens, problem.config.block_q);
}

std::int64_t num_k_blocks(const Problem& problem, std::int64_t length) {
  return ceil_div(length, problem.config.block_k);
}

std::int64_t num_kept_blocks(const Problem& problem, std::int64_t k_blocks) {
  // The 1e-6 keeps a product such as 0.07 * 100 = 7.000000000000001 or 6.999999999999999 at 7.
  const double kept = std::floor(problem.config.keep * static_cast<double>(k_blocks) + 1e-6);
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(kept), 1, k_blocks);
}

BlockRange protected_blocks(const Problem& problem, std::int64_t length) {
  const std::int64_t begin = problem.protected_keys.begin;
  const std::int64_t end = std::min(problem.protected_keys.end, length);
  if (end <= begin) return {};
  return {begin / problem.config.block_k, ceil_div(end, problem.config.block_k)};
}

std::int64_t max_routed_blocks(const Problem& problem) {
  // min(K + protected, T) grows with the length, so the full length has the widest rows.
  const std::int64_t k_blocks = num_k_blocks(problem, problem.k_tokens);
  const BlockRange fixed = protected_blocks(problem, problem.k_tokens);
  return std::min(k_blocks, num_kept_blocks(problem, k_blocks) + fixed.size());
}

double softmax_scale(const Problem& problem) {
  return problem.config.scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.head_dim)));
}

}  // namespace sla2

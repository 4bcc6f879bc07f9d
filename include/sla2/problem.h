// The shapes of one call, and everything that follows from them.
#pragma once

#include <cstdint>

#include "sla2/config.h"
#include "sla2/tensor.h"

namespace sla2 {

/// A half-open range of key tokens.
struct TokenRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] constexpr bool empty() const { return end <= begin; }
};

/// Shapes and options of one call. Symbols as in the paper (docs/operator.md has the table).
struct Problem {
  std::int64_t batch = 1;         // B
  std::int64_t num_heads = 1;     // H
  std::int64_t num_kv_heads = 1;  // Hkv, divides H: head h reads kv head h / (H / Hkv)
  std::int64_t q_tokens = 0;      // Nq
  std::int64_t k_tokens = 0;      // Nk
  std::int64_t head_dim = 64;     // d of q and k: a multiple of 16 up to 256
  std::int64_t value_dim = 64;    // dv of v and o: a multiple of 16 up to 256
  DType dtype = DType::kF32;      // of q, k, v, o and their gradients
  Device device = Device::kCpu;
  std::int64_t num_routers = 1;   // proj_q, proj_k are [num_routers, d, d]: 1 or H
  std::int64_t alpha_blocks = 1;  // alpha_logit is [H, alpha_blocks]: 1 or M
  TokenRange protected_keys;      // key blocks that hold one of these are always routed sparse
  Config config;
  /// Take the implementation of this name (see implementations()), or throw; null: the first that
  /// supports the problem.
  const char* implementation = nullptr;
};

/// M = ceil(Nq / bq).
[[nodiscard]] std::int64_t num_q_blocks(const Problem& problem);
/// T = ceil(length / bk); `length` is Nk, or one batch element's key length.
[[nodiscard]] std::int64_t num_k_blocks(const Problem& problem, std::int64_t length);
/// K = clamp(floor(keep * T + 1e-6), 1, T), in double.
[[nodiscard]] std::int64_t num_kept_blocks(const Problem& problem, std::int64_t k_blocks);
/// Blocks of a sequence of `k_blocks` blocks that hold a protected token, as a half-open range.
struct BlockRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] constexpr std::int64_t size() const { return end > begin ? end - begin : 0; }
  [[nodiscard]] constexpr bool contains(std::int64_t block) const {
    return block >= begin && block < end;
  }
};
[[nodiscard]] BlockRange protected_blocks(const Problem& problem, std::int64_t length);
/// L, the width of the block table: the most blocks that a row of any key length can route.
[[nodiscard]] std::int64_t max_routed_blocks(const Problem& problem);
/// config.scale, or 1/sqrt(head_dim).
[[nodiscard]] double softmax_scale(const Problem& problem);

/// Throws sla2::Error naming the first field that breaks its rule; sizes are checked for overflow.
void validate(const Problem& problem);

}  // namespace sla2

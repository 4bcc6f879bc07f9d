// The stages of the reference and what passes between them. One head at a time: `Head` points at
// the rows of one batch element and query head, and no stage sees a key behind its length.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/reference.h"
#include "sla2/problem.h"

namespace sla2::reference {

/// The symbols of the paper as numbers.
struct Sizes {
  std::int64_t B, H, Hkv, Nq, Nk, d, dv, bq, bk, M, T, L;
  explicit Sizes(const Problem& problem);
  [[nodiscard]] std::int64_t query_rows(std::int64_t q_block) const;  // rows of query block i
};

template <typename Real>
[[nodiscard]] std::int64_t key_length(const Sizes& sizes, const Operands<Real>& operands,
                                      std::int64_t b) {
  return operands.key_lengths.empty() ? sizes.Nk : operands.key_lengths[b];
}

/// Number format of the sparse branch, once soft routing and the input's type had their say.
enum class Arithmetic { kExact, kRound16, kInt8, kFp8 };
[[nodiscard]] Arithmetic sparse_arithmetic(const Problem& problem);

// ---- Step 0 ----------------------------------------------------------------------------------

template <typename Real>
struct Smoothed {
  std::vector<Real> k_mean;  // [B, Hkv, d]
  std::vector<Real> ks;      // [B, Hkv, Nk, d] K - mean; 0 behind a key length
  std::vector<Real> pooled;  // [B, Hkv, T, d] kb_j
};
/// int8 and fp8: the fp32 chain of step 0 whatever Real is. Otherwise everything in Real.
template <typename Real>
Smoothed<Real> smooth(const Problem& problem, const Operands<Real>& operands);

// ---- Step 1 ----------------------------------------------------------------------------------

template <typename Real>
std::vector<Real> pool_queries(const Sizes& sizes, const Operands<Real>& operands);  // [B,H,M,d]

/// x W for one row; an empty W is the identity. `head` picks the router.
template <typename Real>
std::vector<Real> project(const Problem& problem, const Real* x, const std::vector<Real>& w,
                          std::int64_t head);

template <typename Real>
RoutingResult<Real> route_smoothed(const Problem& problem, const Operands<Real>& operands,
                                   const Smoothed<Real>& smoothed);

/// The K largest of scores[0, k_blocks) outside `fixed`, and `fixed`, ascending, -1 behind the
/// last of `width`. Ties go to the lower block, NaN comes last.
template <typename Real>
std::vector<std::int32_t> choose_blocks(const Real* scores, std::int64_t k_blocks,
                                        std::int64_t kept, BlockRange fixed, std::int64_t width);

/// p of Eq. 17: the scores, or their softmax over all k_blocks.
template <typename Real>
std::vector<Real> soft_scores(const Problem& problem, const Real* scores, std::int64_t k_blocks);

/// Eq. 17 for one row: x_j = p_j/tau + lambda with sum_j sigmoid(x_j) = target over the blocks
/// outside `fixed`; +inf in `fixed`, and everywhere if the others are at most `target`.
template <typename Real>
std::vector<Real> soft_top_k(const std::vector<Real>& p, double target, double tau,
                             BlockRange fixed);

/// dp of one row from x, u and l (dm = u/m + l), by t_j = (1-m)u/tau + g l.
template <typename Real>
std::vector<Real> soft_top_k_backward(const Real* logits, const Real* u, const Real* l,
                                      std::int64_t k_blocks, double tau);

/// log m and 1 - m of one head, both computed from x so that neither loses digits.
template <typename Real>
struct BlockWeights {
  std::int64_t k_blocks;
  std::vector<Real> log_m;             // [M, k_blocks]; -inf: the block is left out
  std::vector<Real> rest;              // [M, k_blocks] 1 - m
  std::vector<bool> complement_empty;  // [M]
};
template <typename Real>
BlockWeights<Real> block_weights(const Problem& problem, const RoutingResult<Real>& routing,
                                 std::int64_t b, std::int64_t h, std::int64_t k_blocks);

// ---- Steps 2 and 3 ---------------------------------------------------------------------------

/// q, ks, v of the low-bit formats as the numbers that they stand for, before their scales.
struct LowBit {
  std::vector<float> q, k, v;  // as in QuantizedOperands; v: integers or e4m3 values
  std::vector<float> q_scale, k_scale, v_scale;
};
template <typename Real>
LowBit low_bit(const Problem& problem, const Operands<Real>& operands,
               const Smoothed<Real>& smoothed, Arithmetic arithmetic);

/// Nearest number with `bits` significant bits, ties to even; the exponent is unlimited.
template <typename Real>
[[nodiscard]] Real round_significand(Real x, int bits);
/// Nearest e4m3 number, ties to even, saturating at 448.
[[nodiscard]] double round_e4m3(double x);
/// Significant bits of the 16-bit type that products of an input of `dtype` are rounded to.
[[nodiscard]] int bits_of_16(DType dtype);

template <typename Real>
struct Head {
  std::int64_t b, h, kv;  // batch element, query head, key/value head
  std::int64_t length;    // keys
  std::int64_t k_blocks;
  const Real* q;   // [Nq, d]
  const Real* k;   // [length, d]
  const Real* ks;  // [length, d]
  const Real* v;   // [length, dv]
};
template <typename Real>
Head<Real> make_head(const Sizes& sizes, const Operands<Real>& operands,
                     const std::vector<Real>& ks, std::int64_t b, std::int64_t h);

/// Unquantised, or with operands and p rounded to `significant_bits` (0: not rounded).
template <typename Real>
void sparse_forward(const Problem& problem, const Head<Real>& head,
                    const BlockWeights<Real>& weights, int significant_bits,
                    Real* out,   // [Nq, dv] o_s
                    Real* lse);  // [Nq]

/// int8 and fp8. The chunk is 16 routed blocks; p is quantised against the chunk's own maximum.
template <typename Real>
void sparse_forward_low_bit(const Problem& problem, const Head<Real>& head,
                            const BlockWeights<Real>& weights, const LowBit& low,
                            Arithmetic arithmetic,
                            Real* out,   // [Nq, dv] o_s
                            Real* lse);  // [Nq]

template <typename Real>
void sparse_backward(const Problem& problem, const Head<Real>& head,
                     const BlockWeights<Real>& weights,
                     const Real* out,    // [Nq, dv] o_s
                     const Real* lse,    // [Nq]
                     const Real* d_out,  // [Nq, dv] dO_s
                     Real* d_q,          // [Nq, d], added to
                     Real* d_ks,         // [length, d], added to
                     Real* d_v,          // [length, dv], added to
                     Real* u);           // [M, k_blocks], written: sum of P (dP - Ds), unscaled

template <typename Real>
void linear_forward(const Problem& problem, const Head<Real>& head,
                    const BlockWeights<Real>& weights,
                    Real* out);  // [Nq, dv] o_l

template <typename Real>
void linear_backward(const Problem& problem, const Head<Real>& head,
                     const BlockWeights<Real>& weights,
                     const Real* out,    // [Nq, dv] o_l
                     const Real* d_out,  // [Nq, dv] dO_l
                     Real* d_q,          // [Nq, d], added to
                     Real* d_keys,       // [length, d], added to: of ks, or of k with raw keys
                     Real* d_v,          // [length, dv], added to
                     Real* l);           // [M, k_blocks], written: -(<dH_i, h_j> + <dZ_i, z_j>)

// ---- Step 4 ----------------------------------------------------------------------------------

/// alpha of a query block (method sla2).
template <typename Real>
[[nodiscard]] Real alpha_of(const Problem& problem, const Operands<Real>& operands, std::int64_t h,
                            std::int64_t q_block);

}  // namespace sla2::reference

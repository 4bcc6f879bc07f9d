// Step 0 (Alg. 2 line 2): K minus its mean over tokens, and the mean of each key block.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "reference/stages.h"

namespace sla2::reference {

Sizes::Sizes(const Problem& p)
    : B(p.batch),
      H(p.num_heads),
      Hkv(p.num_kv_heads),
      Nq(p.q_tokens),
      Nk(p.k_tokens),
      d(p.head_dim),
      dv(p.value_dim),
      bq(p.config.block_q),
      bk(p.config.block_k),
      M(num_q_blocks(p)),
      T(num_k_blocks(p, p.k_tokens)),
      L(max_routed_blocks(p)) {}

std::int64_t Sizes::query_rows(std::int64_t q_block) const {
  return std::min(bq, Nq - q_block * bq);
}

Arithmetic sparse_arithmetic(const Problem& problem) {
  const bool low_bit =
      problem.config.precision == Precision::kInt8 || problem.config.precision == Precision::kFp8;
  if (low_bit && problem.config.routing == RoutingMode::kSoft) {
    return problem.dtype == DType::kF32 ? Arithmetic::kExact : Arithmetic::kRound16;
  }
  switch (problem.config.precision) {
    case Precision::kInt8:
      return Arithmetic::kInt8;
    case Precision::kFp8:
      return Arithmetic::kFp8;
    case Precision::kBf16:
      return Arithmetic::kRound16;
    case Precision::kFp32:
      break;
  }
  return Arithmetic::kExact;
}

namespace {

/// `Chain` is the type of the block sums and of the mean.
template <typename Chain, typename Real>
void smooth_head(const Sizes& sizes, std::int64_t length,
                 const Real* k,   // [length, d]
                 Real* mean,      // [d]
                 Real* ks,        // [length, d]
                 Real* pooled) {  // [T, d]
  const std::int64_t d = sizes.d;
  const std::int64_t k_blocks = (length + sizes.bk - 1) / sizes.bk;
  std::vector<Chain> block_sums(k_blocks * d);
  for (std::int64_t n = 0; n < length; ++n) {
    for (std::int64_t c = 0; c < d; ++c) {
      block_sums[n / sizes.bk * d + c] += static_cast<Chain>(k[n * d + c]);
    }
  }
  for (std::int64_t c = 0; c < d; ++c) {
    double sum = 0;
    for (std::int64_t j = 0; j < k_blocks; ++j) sum += static_cast<double>(block_sums[j * d + c]);
    const auto chain_mean = static_cast<Chain>(sum / static_cast<double>(length));
    mean[c] = static_cast<Real>(chain_mean);
    for (std::int64_t n = 0; n < length; ++n) {
      ks[n * d + c] = static_cast<Real>(static_cast<Chain>(k[n * d + c]) - chain_mean);
    }
    for (std::int64_t j = 0; j < k_blocks; ++j) {
      const std::int64_t rows = std::min(sizes.bk, length - j * sizes.bk);
      pooled[j * d + c] =
          static_cast<Real>(block_sums[j * d + c] / static_cast<Chain>(rows) - chain_mean);
    }
  }
}

}  // namespace

template <typename Real>
Smoothed<Real> smooth(const Problem& problem, const Operands<Real>& operands) {
  const Sizes sizes(problem);
  const Arithmetic arithmetic = sparse_arithmetic(problem);
  const bool in_fp32 = arithmetic == Arithmetic::kInt8 || arithmetic == Arithmetic::kFp8;
  const std::int64_t heads = sizes.B * sizes.Hkv;
  Smoothed<Real> result;
  result.k_mean.resize(heads * sizes.d);
  result.ks.resize(heads * sizes.Nk * sizes.d);
  result.pooled.resize(heads * sizes.T * sizes.d);
  for (std::int64_t head = 0; head < heads; ++head) {
    const std::int64_t length = key_length(sizes, operands, head / sizes.Hkv);
    const Real* k = operands.k.data() + head * sizes.Nk * sizes.d;
    Real* mean = result.k_mean.data() + head * sizes.d;
    Real* ks = result.ks.data() + head * sizes.Nk * sizes.d;
    Real* pooled = result.pooled.data() + head * sizes.T * sizes.d;
    if (in_fp32) {
      smooth_head<float>(sizes, length, k, mean, ks, pooled);
    } else {
      smooth_head<Real>(sizes, length, k, mean, ks, pooled);
    }
  }
  return result;
}

template Smoothed<float> smooth(const Problem&, const Operands<float>&);
template Smoothed<double> smooth(const Problem&, const Operands<double>&);

}  // namespace sla2::reference

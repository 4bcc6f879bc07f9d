// Step 2 (Eq. 14): softmax attention over the routed key blocks, row by row.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/stages.h"

namespace sla2::reference {
namespace {

constexpr std::int64_t kChunkBlocks = 16;

template <typename Real>
Real dot(const Real* a, const Real* b, std::int64_t n) {
  return std::inner_product(a, a + n, b, Real(0));
}

/// The blocks of a row of weights with m > 0, ascending.
template <typename Real>
std::vector<std::int64_t> read_blocks(const BlockWeights<Real>& weights, std::int64_t q_block) {
  std::vector<std::int64_t> blocks;
  for (std::int64_t j = 0; j < weights.k_blocks; ++j) {
    // Not "m > 0": a NaN weight must reach the output.
    if (weights.log_m[q_block * weights.k_blocks + j] != -std::numeric_limits<Real>::infinity()) {
      blocks.push_back(j);
    }
  }
  return blocks;
}

template <typename Real>
std::vector<Real> rounded(const Real* x, std::int64_t n, int bits) {
  std::vector<Real> y(x, x + n);
  if (bits > 0) {
    for (Real& value : y) value = round_significand(value, bits);
  }
  return y;
}

}  // namespace

template <typename Real>
Head<Real> make_head(const Sizes& s, const Operands<Real>& operands, const std::vector<Real>& ks,
                     std::int64_t b, std::int64_t h) {
  const std::int64_t kv = h / (s.H / s.Hkv);
  const std::int64_t key_row = (b * s.Hkv + kv) * s.Nk;
  const std::int64_t length = key_length(s, operands, b);
  return {b,
          h,
          kv,
          length,
          (length + s.bk - 1) / s.bk,
          operands.q.data() + (b * s.H + h) * s.Nq * s.d,
          operands.k.data() + key_row * s.d,
          ks.data() + key_row * s.d,
          operands.v.data() + key_row * s.dv};
}

template <typename Real>
void sparse_forward(const Problem& problem, const Head<Real>& head,
                    const BlockWeights<Real>& weights, int significant_bits, Real* out, Real* lse) {
  const Sizes s(problem);
  const auto scale = static_cast<Real>(softmax_scale(problem));
  const std::vector<Real> q = rounded(head.q, s.Nq * s.d, significant_bits);
  const std::vector<Real> ks = rounded(head.ks, head.length * s.d, significant_bits);
  const std::vector<Real> v = rounded(head.v, head.length * s.dv, significant_bits);

  for (std::int64_t row = 0; row < s.Nq; ++row) {
    const std::int64_t i = row / s.bq;
    std::vector<std::int64_t> keys;
    std::vector<Real> scores;
    for (const std::int64_t j : read_blocks(weights, i)) {
      for (std::int64_t n = j * s.bk; n < std::min((j + 1) * s.bk, head.length); ++n) {
        keys.push_back(n);
        scores.push_back(scale * dot(&q[row * s.d], &ks[n * s.d], s.d) +
                         weights.log_m[i * weights.k_blocks + j]);
      }
    }
    Real max = -std::numeric_limits<Real>::infinity();
    for (const Real score : scores) max = std::max(max, score);

    Real sum = 0;
    Real* o = out + row * s.dv;
    std::fill_n(o, s.dv, Real(0));
    for (std::size_t n = 0; n < keys.size(); ++n) {
      Real p = std::exp(scores[n] - max);
      sum += p;
      if (significant_bits > 0) p = round_significand(p, significant_bits);
      for (std::int64_t c = 0; c < s.dv; ++c) o[c] += p * v[keys[n] * s.dv + c];
    }
    if (!keys.empty()) {
      for (std::int64_t c = 0; c < s.dv; ++c) o[c] /= sum;
    }
    lse[row] = max + std::log(sum);
  }
}

namespace {

/// One row of the low-bit branch: weighted sums relative to the largest score so far.
struct LowBitRow {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;
  std::vector<double> out;  // [dv]

  void add(double chunk_max, double chunk_sum, const std::vector<double>& chunk_out) {
    const double new_max = std::max(max, chunk_max);
    const double keep_old = sum == 0 ? 0 : std::exp(max - new_max);
    const double keep_new = std::exp(chunk_max - new_max);
    sum = sum * keep_old + chunk_sum * keep_new;
    for (std::size_t c = 0; c < out.size(); ++c) {
      out[c] = out[c] * keep_old + chunk_out[c] * keep_new;
    }
    max = new_max;
  }
};

}  // namespace

template <typename Real>
void sparse_forward_low_bit(const Problem& problem, const Head<Real>& head,
                            const BlockWeights<Real>& weights, const LowBit& low,
                            Arithmetic arithmetic, Real* out, Real* lse) {
  const Sizes s(problem);
  const double scale = softmax_scale(problem);
  const bool fp8 = arithmetic == Arithmetic::kFp8;
  const double p_limit = fp8 ? 448.0 : 255.0;
  const std::int64_t kv_head = head.b * s.Hkv + head.kv;
  const float* k = low.k.data() + kv_head * s.Nk * s.d;
  const float* v = low.v.data() + kv_head * s.Nk * s.dv;

  for (std::int64_t row = 0; row < s.Nq; ++row) {
    const std::int64_t q_row = (head.b * s.H + head.h) * s.Nq + row;
    const float* q = low.q.data() + q_row * s.d;
    const std::vector<std::int64_t> blocks = read_blocks(weights, row / s.bq);
    LowBitRow total;
    total.out.resize(s.dv);
    for (std::size_t first = 0; first < blocks.size(); first += kChunkBlocks) {
      const std::size_t last = std::min(blocks.size(), first + kChunkBlocks);
      std::vector<std::int64_t> keys;
      std::vector<double> scores;
      for (std::size_t at = first; at < last; ++at) {
        const std::int64_t j = blocks[at];
        const double factor =
            scale * static_cast<double>(low.q_scale[q_row]) * low.k_scale[kv_head * s.T + j];
        for (std::int64_t n = j * s.bk; n < std::min((j + 1) * s.bk, head.length); ++n) {
          keys.push_back(n);
          // Sums of products of integers under 2^24: exact in fp32.
          scores.push_back(factor * static_cast<double>(dot(q, k + n * s.d, s.d)));
        }
      }
      const double max = *std::max_element(scores.begin(), scores.end());
      double sum = 0;
      std::vector<double> o(s.dv);
      for (std::size_t n = 0; n < keys.size(); ++n) {
        const double exact = p_limit * std::exp(scores[n] - max);
        const double p = fp8 ? round_e4m3(exact) : std::nearbyint(exact);
        sum += p;
        for (std::int64_t c = 0; c < s.dv; ++c) {
          o[c] += p * static_cast<double>(v[keys[n] * s.dv + c]);
        }
      }
      total.add(max, sum, o);
    }
    for (std::int64_t c = 0; c < s.dv; ++c) {
      out[row * s.dv + c] = static_cast<Real>(static_cast<double>(low.v_scale[kv_head * s.dv + c]) *
                                              (total.out[c] / total.sum));
    }
    lse[row] = static_cast<Real>(total.max + std::log(total.sum / p_limit));
  }
}

template <typename Real>
void sparse_backward(const Problem& problem, const Head<Real>& head,
                     const BlockWeights<Real>& weights, const Real* out, const Real* lse,
                     const Real* d_out, Real* d_q, Real* d_ks, Real* d_v, Real* u) {
  const Sizes s(problem);
  const auto scale = static_cast<Real>(softmax_scale(problem));
  std::fill_n(u, s.M * weights.k_blocks, Real(0));
  for (std::int64_t row = 0; row < s.Nq; ++row) {
    const std::int64_t i = row / s.bq;
    const Real* q = head.q + row * s.d;
    const Real* d_o = d_out + row * s.dv;
    const Real delta = dot(d_o, out + row * s.dv, s.dv);  // Ds
    for (const std::int64_t j : read_blocks(weights, i)) {
      const std::int64_t at = i * weights.k_blocks + j;
      for (std::int64_t n = j * s.bk; n < std::min((j + 1) * s.bk, head.length); ++n) {
        const Real* ks = head.ks + n * s.d;
        Real p = std::exp(scale * dot(q, ks, s.d) + weights.log_m[at] - lse[row]);
        if (p > 1) p = 1;  // lse may come from a low-bit forward
        const Real d_p = dot(d_o, head.v + n * s.dv, s.dv);
        const Real d_log_m = p * (d_p - delta);
        const Real d_s = scale * d_log_m;
        u[at] += d_log_m;
        for (std::int64_t c = 0; c < s.dv; ++c) d_v[n * s.dv + c] += p * d_o[c];
        for (std::int64_t c = 0; c < s.d; ++c) {
          d_q[row * s.d + c] += d_s * ks[c];
          d_ks[n * s.d + c] += d_s * q[c];
        }
      }
    }
  }
}

#define SLA2_INSTANTIATE(Real)                                                                    \
  template Head<Real> make_head(const Sizes&, const Operands<Real>&, const std::vector<Real>&,    \
                                std::int64_t, std::int64_t);                                      \
  template void sparse_forward(const Problem&, const Head<Real>&, const BlockWeights<Real>&, int, \
                               Real*, Real*);                                                     \
  template void sparse_forward_low_bit(const Problem&, const Head<Real>&,                         \
                                       const BlockWeights<Real>&, const LowBit&, Arithmetic,      \
                                       Real*, Real*);                                             \
  template void sparse_backward(const Problem&, const Head<Real>&, const BlockWeights<Real>&,     \
                                const Real*, const Real*, const Real*, Real*, Real*, Real*,       \
                                Real*);
SLA2_INSTANTIATE(float)
SLA2_INSTANTIATE(double)
#undef SLA2_INSTANTIATE

}  // namespace sla2::reference

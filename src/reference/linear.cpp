// Step 3: linear attention over the complement of the routed blocks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/stages.h"

namespace sla2::reference {
namespace {

constexpr double kTinyDenominator = 0x1p-64;

template <typename Real>
void apply_phi(FeatureMap map, const Real* x, std::int64_t d, Real* phi) {
  if (map == FeatureMap::kSoftmax) {
    const Real max = *std::max_element(x, x + d);
    Real sum = 0;
    for (std::int64_t c = 0; c < d; ++c) sum += phi[c] = std::exp(x[c] - max);
    for (std::int64_t c = 0; c < d; ++c) phi[c] /= sum;
    return;
  }
  for (std::int64_t c = 0; c < d; ++c) {
    const bool negative = x[c] < 0;
    phi[c] = map == FeatureMap::kElu ? (negative ? std::exp(x[c]) : x[c] + 1)
                                     : (negative ? Real(0) : x[c]);
  }
}

/// d_x += d_phi^T dphi/dx.
template <typename Real>
void add_phi_gradient(FeatureMap map, const Real* x, const Real* phi, const Real* d_phi,
                      std::int64_t d, Real* d_x) {
  Real mean = 0;  // softmax only: sum of phi d_phi
  if (map == FeatureMap::kSoftmax) {
    for (std::int64_t c = 0; c < d; ++c) mean += phi[c] * d_phi[c];
  }
  for (std::int64_t c = 0; c < d; ++c) {
    switch (map) {
      case FeatureMap::kSoftmax:
        d_x[c] += phi[c] * (d_phi[c] - mean);
        break;
      case FeatureMap::kElu:
        d_x[c] += x[c] < 0 ? phi[c] * d_phi[c] : d_phi[c];
        break;
      case FeatureMap::kRelu:
        d_x[c] += x[c] > 0 ? d_phi[c] : Real(0);
        break;
    }
  }
}

/// phi of every row, and per key block h_j [d, dv] followed by z_j [d].
template <typename Real>
struct LinearState {
  std::int64_t block_size;  // d * dv + d
  std::vector<Real> phi_q;  // [Nq, d]
  std::vector<Real> phi_k;  // [length, d]
  std::vector<Real> hz;     // [k_blocks, block_size]
};

template <typename Real>
const Real* linear_keys(const Problem& problem, const Head<Real>& head) {
  return problem.config.linear_keys == LinearKeys::kSmoothed ? head.ks : head.k;
}

template <typename Real>
LinearState<Real> make_state(const Problem& problem, const Head<Real>& head) {
  const Sizes s(problem);
  const Real* keys = linear_keys(problem, head);
  LinearState<Real> state;
  state.block_size = s.d * s.dv + s.d;
  state.phi_q.resize(s.Nq * s.d);
  state.phi_k.resize(head.length * s.d);
  state.hz.resize(head.k_blocks * state.block_size);
  for (std::int64_t row = 0; row < s.Nq; ++row) {
    apply_phi(problem.config.feature_map, head.q + row * s.d, s.d, &state.phi_q[row * s.d]);
  }
  for (std::int64_t n = 0; n < head.length; ++n) {
    Real* phi = &state.phi_k[n * s.d];
    apply_phi(problem.config.feature_map, keys + n * s.d, s.d, phi);
    Real* h = &state.hz[n / s.bk * state.block_size];
    Real* z = h + s.d * s.dv;
    for (std::int64_t a = 0; a < s.d; ++a) {
      z[a] += phi[a];
      for (std::int64_t c = 0; c < s.dv; ++c) h[a * s.dv + c] += phi[a] * head.v[n * s.dv + c];
    }
  }
  return state;
}

/// 1 - m_ij, or 1 for every block with linear_scope = all.
template <typename Real>
Real linear_weight(const Problem& problem, const BlockWeights<Real>& weights, std::int64_t i,
                   std::int64_t j) {
  return problem.config.linear_scope == LinearScope::kAll ? Real(1)
                                                          : weights.rest[i * weights.k_blocks + j];
}

/// H_i and Z_i, summed over the blocks with a weight: never a total minus the routed part, which
/// would leave the range of v.
template <typename Real>
std::vector<Real> sum_blocks(const Problem& problem, const BlockWeights<Real>& weights,
                             const LinearState<Real>& state, std::int64_t i) {
  std::vector<Real> sum(state.block_size);
  for (std::int64_t j = 0; j < weights.k_blocks; ++j) {
    const Real weight = linear_weight(problem, weights, i, j);
    if (weight == 0) continue;
    const Real* hz = &state.hz[j * state.block_size];
    for (std::int64_t c = 0; c < state.block_size; ++c) sum[c] += weight * hz[c];
  }
  return sum;
}

template <typename Real>
Real denominator(const LinearState<Real>& state, const std::vector<Real>& sums, const Sizes& s,
                 std::int64_t row) {
  Real value = 0;
  for (std::int64_t a = 0; a < s.d; ++a) value += state.phi_q[row * s.d + a] * sums[s.d * s.dv + a];
  return value;
}

}  // namespace

template <typename Real>
void linear_forward(const Problem& problem, const Head<Real>& head,
                    const BlockWeights<Real>& weights, Real* out) {
  const Sizes s(problem);
  const LinearState<Real> state = make_state(problem, head);
  std::fill_n(out, s.Nq * s.dv, Real(0));
  for (std::int64_t i = 0; i < s.M; ++i) {
    if (weights.complement_empty[i]) continue;
    const std::vector<Real> sums = sum_blocks(problem, weights, state, i);
    for (std::int64_t row = i * s.bq; row < i * s.bq + s.query_rows(i); ++row) {
      const Real bottom = denominator(state, sums, s, row);
      if (bottom < kTinyDenominator) continue;
      Real* o = out + row * s.dv;
      for (std::int64_t a = 0; a < s.d; ++a) {
        const Real phi = state.phi_q[row * s.d + a];
        for (std::int64_t c = 0; c < s.dv; ++c) o[c] += phi * sums[a * s.dv + c];
      }
      for (std::int64_t c = 0; c < s.dv; ++c) o[c] /= bottom;
    }
  }
}

namespace {

/// The query side of one block: adds to d_q, returns dH_i followed by dZ_i.
template <typename Real>
std::vector<Real> query_block_backward(const Problem& problem, const Head<Real>& head,
                                       const LinearState<Real>& state,
                                       const std::vector<Real>& sums, std::int64_t i,
                                       const Real* out, const Real* d_out, Real* d_q) {
  const Sizes s(problem);
  const std::int64_t z_at = s.d * s.dv;
  std::vector<Real> d_sums(state.block_size);
  std::vector<Real> d_phi(s.d);
  for (std::int64_t row = i * s.bq; row < i * s.bq + s.query_rows(i); ++row) {
    const Real bottom = denominator(state, sums, s, row);
    if (bottom < kTinyDenominator) continue;
    const Real* phi = &state.phi_q[row * s.d];
    const Real* d_o = d_out + row * s.dv;
    Real delta = 0;  // Dl
    for (std::int64_t c = 0; c < s.dv; ++c) delta += d_o[c] * out[row * s.dv + c];
    for (std::int64_t a = 0; a < s.d; ++a) {
      Real d_top = 0;
      for (std::int64_t c = 0; c < s.dv; ++c) {
        d_top += d_o[c] * sums[a * s.dv + c];
        d_sums[a * s.dv + c] += phi[a] * d_o[c] / bottom;
      }
      d_phi[a] = (d_top - delta * sums[z_at + a]) / bottom;
      d_sums[z_at + a] -= phi[a] * delta / bottom;
    }
    add_phi_gradient(problem.config.feature_map, head.q + row * s.d, phi, d_phi.data(), s.d,
                     d_q + row * s.d);
  }
  return d_sums;
}

/// The key side: d_hz [k_blocks, block_size] to d_keys and d_v.
template <typename Real>
void keys_backward(const Problem& problem, const Head<Real>& head, const LinearState<Real>& state,
                   const std::vector<Real>& d_hz, Real* d_keys, Real* d_v) {
  const Sizes s(problem);
  const Real* keys = linear_keys(problem, head);
  std::vector<Real> d_phi(s.d);
  for (std::int64_t n = 0; n < head.length; ++n) {
    const Real* phi = &state.phi_k[n * s.d];
    const Real* v = head.v + n * s.dv;
    const Real* d_h = &d_hz[n / s.bk * state.block_size];
    const Real* d_z = d_h + s.d * s.dv;
    for (std::int64_t a = 0; a < s.d; ++a) {
      d_phi[a] = d_z[a];
      for (std::int64_t c = 0; c < s.dv; ++c) {
        d_phi[a] += d_h[a * s.dv + c] * v[c];
        d_v[n * s.dv + c] += phi[a] * d_h[a * s.dv + c];
      }
    }
    add_phi_gradient(problem.config.feature_map, keys + n * s.d, phi, d_phi.data(), s.d,
                     d_keys + n * s.d);
  }
}

}  // namespace

template <typename Real>
void linear_backward(const Problem& problem, const Head<Real>& head,
                     const BlockWeights<Real>& weights, const Real* out, const Real* d_out,
                     Real* d_q, Real* d_keys, Real* d_v, Real* l) {
  const Sizes s(problem);
  const LinearState<Real> state = make_state(problem, head);
  std::vector<Real> d_hz(head.k_blocks * state.block_size);
  std::fill_n(l, s.M * weights.k_blocks, Real(0));
  for (std::int64_t i = 0; i < s.M; ++i) {
    if (weights.complement_empty[i]) continue;
    const std::vector<Real> sums = sum_blocks(problem, weights, state, i);
    const std::vector<Real> d_sums =
        query_block_backward(problem, head, state, sums, i, out, d_out, d_q);
    for (std::int64_t j = 0; j < weights.k_blocks; ++j) {
      const Real weight = linear_weight(problem, weights, i, j);
      const Real* hz = &state.hz[j * state.block_size];
      Real inner = 0;
      for (std::int64_t c = 0; c < state.block_size; ++c) {
        inner += d_sums[c] * hz[c];
        if (weight != 0) d_hz[j * state.block_size + c] += weight * d_sums[c];
      }
      if (problem.config.linear_scope == LinearScope::kComplement) {
        l[i * weights.k_blocks + j] = -inner;
      }
    }
  }
  keys_backward(problem, head, state, d_hz, d_keys, d_v);
}

#define SLA2_INSTANTIATE(Real)                                                                \
  template void linear_forward(const Problem&, const Head<Real>&, const BlockWeights<Real>&,  \
                               Real*);                                                        \
  template void linear_backward(const Problem&, const Head<Real>&, const BlockWeights<Real>&, \
                                const Real*, const Real*, Real*, Real*, Real*, Real*);
SLA2_INSTANTIATE(float)
SLA2_INSTANTIATE(double)
#undef SLA2_INSTANTIATE

}  // namespace sla2::reference

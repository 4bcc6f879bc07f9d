#include "cpu/naive_linear.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/float16.h"

namespace sla2::test {
namespace {

using Index = std::int64_t;
using Floats = std::vector<float>;

float rounded(float x) { return from_bf16(to_bf16(x)); }

/// phi of rows of d features, rounded.
Floats features(FeatureMap map, const float* x, Index rows, Index d) {
  Floats phi(x, x + rows * d);
  for (Index r = 0; r < rows; ++r) {
    float* row = phi.data() + r * d;
    const float top = *std::max_element(row, row + d);
    float sum = 0;
    for (Index c = 0; c < d; ++c) {
      if (map == FeatureMap::kSoftmax) {
        sum += row[c] = std::exp(row[c] - top);
      } else if (map == FeatureMap::kElu) {
        row[c] = row[c] < 0 ? std::exp(row[c]) : row[c] + 1;
      } else {
        row[c] = std::max(row[c], 0.0F);
      }
    }
    for (Index c = 0; c < d && map == FeatureMap::kSoftmax; ++c) row[c] /= sum;
    for (Index c = 0; c < d; ++c) row[c] = rounded(row[c]);
  }
  return phi;
}

/// 1 - m_ij of a row of blocks, rounded; true if the complement is empty.
bool weights_of(const Problem& p, const reference::RoutingResult<float>& routing, Index row,
                Index k_blocks, Floats& weights) {
  weights.assign(k_blocks, 1);
  bool empty = true;
  if (p.config.routing == RoutingMode::kSoft) {
    const float* logits = routing.logits.data() + row * num_k_blocks(p, p.k_tokens);
    for (Index j = 0; j < k_blocks; ++j) {
      weights[j] = rounded(1 / (1 + std::exp(logits[j])));
      empty = empty && logits[j] == INFINITY;
    }
  } else {
    const Index width = max_routed_blocks(p);
    Index routed = 0;
    for (Index c = 0; c < width; ++c) {
      const std::int32_t j = routing.blocks[row * width + c];
      if (j >= 0) weights[j] = 0;
      if (j >= 0) ++routed;
    }
    empty = routed == k_blocks;
  }
  if (p.config.linear_scope == LinearScope::kAll) weights.assign(k_blocks, 1);
  return empty;
}

/// h_j [d, dv], rounded, and z_j [d] of every key block.
struct BlockSums {
  Index k_blocks;
  Floats h, z;
};
BlockSums block_sums(const Problem& p, const float* keys, const float* v, Index length) {
  const Index d = p.head_dim, dv = p.value_dim;
  BlockSums s{num_k_blocks(p, length), {}, {}};
  s.h.resize(s.k_blocks * d * dv);
  s.z.resize(s.k_blocks * d);
  const Floats phi = features(p.config.feature_map, keys, length, d);
  for (Index n = 0; n < length; ++n) {
    const Index j = n / p.config.block_k;
    for (Index c = 0; c < d; ++c) {
      s.z[j * d + c] += phi[n * d + c];
      for (Index e = 0; e < dv; ++e) {
        s.h[(j * d + c) * dv + e] += phi[n * d + c] * rounded(v[n * dv + e]);
      }
    }
  }
  for (float& x : s.h) x = rounded(x);
  return s;
}

/// o_l of one query block; `rows` rows of q.
void linear_rows(const Problem& p, const BlockSums& s, const Floats& weights, const float* q,
                 Index rows, float* out) {
  const Index d = p.head_dim, dv = p.value_dim;
  Floats H(d * dv);
  Floats Z(d);
  for (Index j = 0; j < s.k_blocks; ++j) {
    for (Index c = 0; c < d * dv; ++c) H[c] += weights[j] * s.h[j * d * dv + c];
    for (Index c = 0; c < d; ++c) Z[c] += weights[j] * s.z[j * d + c];
  }
  for (float& x : H) x = rounded(x);
  const Floats phi = features(p.config.feature_map, q, rows, d);
  for (Index r = 0; r < rows; ++r) {
    float bottom = 0;
    for (Index c = 0; c < d; ++c) bottom += phi[r * d + c] * Z[c];
    for (Index e = 0; e < dv; ++e) {
      float top = 0;
      for (Index c = 0; c < d; ++c) top += phi[r * d + c] * H[c * dv + e];
      out[r * dv + e] = bottom < 0x1p-64F ? 0.0F : top / bottom;
    }
  }
}

}  // namespace

bool has_bf16_linear_branch(const Problem& problem) {
  const bool hard = problem.config.routing == RoutingMode::kHard;
  if (problem.config.precision == Precision::kInt8 && hard) return true;
  if (problem.config.precision == Precision::kFp32 || problem.dtype == DType::kF16) return false;
  return problem.config.precision == Precision::kBf16 || problem.dtype == DType::kBF16;
}

void round_linear_branch(Call& call, const reference::RoutingResult<float>& routing,
                         reference::ForwardResult<float>& naive) {
  const Problem& p = call.problem;
  if (!has_bf16_linear_branch(p)) return;
  const auto x = call.operands<float>();
  const Index d = p.head_dim, dv = p.value_dim, Nk = p.k_tokens, M = num_q_blocks(p);
  for (Index b = 0; b < p.batch; ++b) {
    for (Index h = 0; h < p.num_heads; ++h) {
      const Index kv = b * p.num_kv_heads + h / (p.num_heads / p.num_kv_heads);
      const Index length = x.key_lengths.empty() ? Nk : x.key_lengths[b];
      Floats keys(x.k.begin() + kv * Nk * d, x.k.begin() + (kv * Nk + length) * d);
      for (Index at = 0; at < std::ssize(keys); ++at) {
        if (p.config.linear_keys == LinearKeys::kSmoothed)
          keys[at] -= naive.k_mean[kv * d + at % d];
      }
      const BlockSums sums = block_sums(p, keys.data(), &x.v[kv * Nk * dv], length);
      for (Index i = 0; i < M; ++i) {
        Floats weights;
        const Index row = b * p.num_heads + h;
        if (weights_of(p, routing, row * M + i, sums.k_blocks, weights)) continue;
        const Index first = row * p.q_tokens + i * p.config.block_q;
        const Index rows = std::min(p.config.block_q, p.q_tokens - i * p.config.block_q);
        Floats o_l(rows * dv);
        linear_rows(p, sums, weights, &x.q[first * d], rows, o_l.data());
        const float logit = x.alpha_logit.empty()
                                ? 0
                                : x.alpha_logit[h * p.alpha_blocks + (p.alpha_blocks == 1 ? 0 : i)];
        const float rest = 1 - 1 / (1 + std::exp(-logit));
        for (Index r = 0; r < rows; ++r) {
          for (Index e = 0; e < dv; ++e) {
            const Index at = (first + r) * dv + e;
            float change = rest * (o_l[r * dv + e] - naive.out_linear[at]);
            if (p.config.method == Method::kSla) {
              change = 0;
              for (Index a = 0; a < dv && !x.proj_out.empty(); ++a) {
                change += (o_l[r * dv + a] - naive.out_linear[(first + r) * dv + a]) *
                          x.proj_out[a * dv + e];
              }
            }
            naive.out[at] += change;
          }
        }
        std::copy(o_l.begin(), o_l.end(), naive.out_linear.begin() + first * dv);
      }
    }
  }
}

}  // namespace sla2::test

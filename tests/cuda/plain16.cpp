#include "cuda/plain16.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "reference/stages.h"

namespace sla2::test {
namespace {

using reference::BlockWeights;
using reference::Head;
using reference::Sizes;
using Matrix = std::vector<float>;

/// What rounds, and the head that it is about.
struct Plain {
  const Problem& problem;
  Sizes s;
  int bits;
  std::mt19937_64* dither = nullptr;  // rounds up or down at random, by how near the two are
  [[nodiscard]] float round(float x) const {
    if (dither == nullptr || !std::isfinite(x) || std::abs(x) < 0x1p-100F) {
      return reference::round_significand(x, bits);
    }
    int exponent = 0;
    std::frexp(x, &exponent);
    const float unit = std::ldexp(1.0F, exponent - bits);
    return std::floor(x / unit + std::uniform_real_distribution<float>()(*dither)) * unit;
  }

  /// [m, n] = a [m, k] b [k, n], either one stored transposed.
  [[nodiscard]] Matrix product(const Matrix& a, bool a_turned, const Matrix& b, bool b_turned,
                               std::int64_t m, std::int64_t n, std::int64_t k) const {
    Matrix c(m * n);
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        float sum = 0;
        for (std::int64_t t = 0; t < k; ++t) {
          sum +=
              (a_turned ? a[t * m + i] : a[i * k + t]) * (b_turned ? b[j * k + t] : b[t * n + j]);
        }
        c[i * n + j] = round(sum);
      }
    }
    return c;
  }
  [[nodiscard]] Matrix rounded(Matrix x) const {
    for (float& value : x) value = round(value);
    return x;
  }
};

/// What one head's forward leaves for its backward.
struct State {
  Head<float> head;
  BlockWeights<float> weights;
  Matrix q, ks, v;           // [Nq, d], [length, d], [length, dv]
  Matrix phi_q, phi_k;       // [Nq, d], [length, d]
  std::vector<Matrix> h;     // [k_blocks][d, dv]
  std::vector<Matrix> z;     // [k_blocks][d]
  std::vector<Matrix> H, Z;  // [M]
};

Matrix slice(const Matrix& x, std::int64_t first, std::int64_t rows, std::int64_t width) {
  return {x.begin() + first * width, x.begin() + (first + rows) * width};
}

Matrix phi_of(const Plain& plain, const float* x, std::int64_t rows, std::int64_t d) {
  Matrix phi(rows * d);
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* from = x + r * d;
    float* to = &phi[r * d];
    const float max = *std::max_element(from, from + d);
    float sum = 0;
    for (std::int64_t c = 0; c < d; ++c) {
      switch (plain.problem.config.feature_map) {
        case FeatureMap::kSoftmax:
          sum += to[c] = std::exp(from[c] - max);
          break;
        case FeatureMap::kElu:
          to[c] = from[c] < 0 ? std::exp(from[c]) : from[c] + 1;
          break;
        case FeatureMap::kRelu:
          to[c] = std::max(from[c], 0.0F);
          break;
      }
    }
    for (std::int64_t c = 0; c < d; ++c) to[c] = plain.round(sum > 0 ? to[c] / sum : to[c]);
  }
  return phi;
}

/// d_phi to d_x, row by row.
Matrix phi_gradient(const Plain& plain, const Matrix& phi, const Matrix& d_phi, std::int64_t d) {
  Matrix d_x(phi.size());
  for (std::size_t r = 0; r < phi.size() / d; ++r) {
    float mean = 0;
    for (std::int64_t c = 0; c < d; ++c) mean += phi[r * d + c] * d_phi[r * d + c];
    for (std::int64_t c = 0; c < d; ++c) {
      const std::size_t at = r * d + c;
      switch (plain.problem.config.feature_map) {
        case FeatureMap::kSoftmax:
          d_x[at] = phi[at] * (d_phi[at] - mean);
          break;
        case FeatureMap::kElu:
          d_x[at] = std::min(phi[at], 1.0F) * d_phi[at];
          break;
        case FeatureMap::kRelu:
          d_x[at] = phi[at] > 0 ? d_phi[at] : 0;
          break;
      }
    }
  }
  return d_x;
}

State make_state(const Plain& plain, const reference::Operands<float>& operands,
                 const std::vector<float>& ks, const reference::RoutingResult<float>& routing,
                 std::int64_t b, std::int64_t h) {
  const Sizes& s = plain.s;
  State state{reference::make_head(s, operands, ks, b, h), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const Head<float>& head = state.head;
  state.weights = reference::block_weights(plain.problem, routing, b, h, head.k_blocks);
  state.q = plain.rounded(Matrix(head.q, head.q + s.Nq * s.d));
  state.ks = plain.rounded(Matrix(head.ks, head.ks + head.length * s.d));
  state.v = plain.rounded(Matrix(head.v, head.v + head.length * s.dv));
  const bool raw = plain.problem.config.linear_keys == LinearKeys::kRaw;
  state.phi_q = phi_of(plain, head.q, s.Nq, s.d);
  state.phi_k = phi_of(plain, raw ? head.k : state.ks.data(), head.length, s.d);
  for (std::int64_t j = 0; j < head.k_blocks; ++j) {
    const std::int64_t rows = std::min(s.bk, head.length - j * s.bk);
    const Matrix phi = slice(state.phi_k, j * s.bk, rows, s.d);
    state.h.push_back(
        plain.product(phi, true, slice(state.v, j * s.bk, rows, s.dv), false, s.d, s.dv, rows));
    state.z.push_back(plain.product(phi, true, Matrix(rows, 1.0F), false, s.d, 1, rows));
  }
  const bool all = plain.problem.config.linear_scope == LinearScope::kAll;
  for (std::int64_t i = 0; i < s.M; ++i) {
    Matrix H(s.d * s.dv);
    Matrix Z(s.d);
    for (std::int64_t j = 0; j < head.k_blocks; ++j) {
      const float rest = all ? 1 : plain.round(state.weights.rest[i * head.k_blocks + j]);
      if (rest == 0) continue;
      for (std::size_t c = 0; c < H.size(); ++c) H[c] += rest * state.h[j][c];
      for (std::size_t c = 0; c < Z.size(); ++c) Z[c] += rest * state.z[j][c];
    }
    state.H.push_back(plain.rounded(H));
    state.Z.push_back(plain.rounded(Z));
  }
  return state;
}

/// Scores of one query block over the keys [first, first + keys), log m included.
Matrix scores_of(const Plain& plain, const State& state, std::int64_t i, std::int64_t j,
                 std::int64_t keys) {
  const Sizes& s = plain.s;
  const std::int64_t rows = s.query_rows(i);
  Matrix scores = plain.product(slice(state.q, i * s.bq, rows, s.d), false,
                                slice(state.ks, j * s.bk, keys, s.d), true, rows, keys, s.d);
  for (float& x : scores) {
    x = x * static_cast<float>(softmax_scale(plain.problem)) +
        state.weights.log_m[i * state.head.k_blocks + j];
  }
  return scores;
}

std::int64_t keys_of(const Plain& plain, const State& state, std::int64_t j) {
  return std::min(plain.s.bk, state.head.length - j * plain.s.bk);
}
bool reads(const State& state, std::int64_t i, std::int64_t j) {
  return state.weights.log_m[i * state.head.k_blocks + j] !=
         -std::numeric_limits<float>::infinity();
}

/// o_s [rows, dv] and lse [rows] of one query block.
void sparse_block(const Plain& plain, const State& state, std::int64_t i, float* out, float* lse) {
  const Sizes& s = plain.s;
  const std::int64_t rows = s.query_rows(i);
  std::vector<Matrix> scores(state.head.k_blocks);
  for (std::int64_t j = 0; j < state.head.k_blocks; ++j) {
    if (reads(state, i, j)) scores[j] = scores_of(plain, state, i, j, keys_of(plain, state, j));
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    float max = -std::numeric_limits<float>::infinity();
    for (std::size_t j = 0; j < scores.size(); ++j) {
      const auto keys = static_cast<std::int64_t>(scores[j].size()) / rows;
      for (std::int64_t n = 0; n < keys; ++n) max = std::max(max, scores[j][r * keys + n]);
    }
    float sum = 0;
    Matrix o(s.dv);
    for (std::size_t j = 0; j < scores.size(); ++j) {
      const auto keys = static_cast<std::int64_t>(scores[j].size()) / rows;
      for (std::int64_t n = 0; n < keys; ++n) {
        const float p = std::exp(scores[j][r * keys + n] - max);
        sum += p;
        for (std::int64_t c = 0; c < s.dv; ++c) {
          o[c] += plain.round(p) * state.v[(static_cast<std::int64_t>(j) * s.bk + n) * s.dv + c];
        }
      }
    }
    for (std::int64_t c = 0; c < s.dv; ++c) out[r * s.dv + c] = plain.round(o[c] / sum);
    lse[r] = max + std::log(sum);
  }
}

void linear_block(const Plain& plain, const State& state, std::int64_t i, float* out) {
  const Sizes& s = plain.s;
  const std::int64_t rows = s.query_rows(i);
  const Matrix phi = slice(state.phi_q, i * s.bq, rows, s.d);
  const Matrix top = plain.product(phi, false, state.H[i], false, rows, s.dv, s.d);
  const Matrix bottom = plain.product(phi, false, state.Z[i], false, rows, 1, s.d);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < s.dv; ++c) {
      out[r * s.dv + c] = bottom[r] < 0x1p-64F ? 0 : plain.round(top[r * s.dv + c] / bottom[r]);
    }
  }
}

/// What the heads add to.
struct Sums {
  Matrix d_sparse_keys, d_linear_keys;  // [Nk, d]
};

/// dO_s and dO_l of one query block, and the gradient of alpha or proj_out.
void mix_backward(const Plain& plain, const State& state,
                  const reference::Operands<float>& operands, std::int64_t i, const float* o_s,
                  const float* o_l, const float* d_o, Matrix& d_s, Matrix& d_l,
                  reference::GradientResult<float>& result) {
  const Sizes& s = plain.s;
  const std::int64_t rows = s.query_rows(i);
  const std::int64_t h = state.head.h;
  if (state.weights.complement_empty[i]) {
    d_s = Matrix(d_o, d_o + rows * s.dv);
    return;
  }
  if (plain.problem.config.method == Method::kSla2) {
    const float alpha = reference::alpha_of(plain.problem, operands, h, i);
    float d_alpha = 0;
    for (std::int64_t at = 0; at < rows * s.dv; ++at) {
      d_s[at] = plain.round(alpha * d_o[at]);
      d_l[at] = plain.round((1 - alpha) * d_o[at]);
      d_alpha += d_o[at] * (o_s[at] - o_l[at]);
    }
    result.d_alpha_logit[h * plain.problem.alpha_blocks +
                         (plain.problem.alpha_blocks == 1 ? 0 : i)] +=
        alpha * (1 - alpha) * d_alpha;
    return;
  }
  d_s = Matrix(d_o, d_o + rows * s.dv);
  const Matrix d_rows = d_s;
  if (!operands.proj_out.empty()) {
    d_l = plain.product(d_rows, false, plain.rounded(operands.proj_out), true, rows, s.dv, s.dv);
  }
  const Matrix d_proj =
      plain.product(Matrix(o_l, o_l + rows * s.dv), true, d_rows, false, s.dv, s.dv, rows);
  for (std::size_t at = 0; at < d_proj.size(); ++at) result.d_proj_out[at] += d_proj[at];
}

void add(const Matrix& from, float* to) {
  for (std::size_t c = 0; c < from.size(); ++c) to[c] += from[c];
}

/// The pair (i, j) of the sparse branch; returns u_ij.
float sparse_pair(const Plain& plain, const State& state, std::int64_t i, std::int64_t j,
                  const Matrix& d_s, const float* o_s, const float* lse, float* d_q,
                  Matrix& d_sparse_keys, float* d_v) {
  const Sizes& s = plain.s;
  const std::int64_t rows = s.query_rows(i);
  const std::int64_t keys = keys_of(plain, state, j);
  Matrix p = scores_of(plain, state, i, j, keys);
  Matrix d_p =
      plain.product(d_s, false, slice(state.v, j * s.bk, keys, s.dv), true, rows, keys, s.dv);
  float u = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    float delta = 0;
    for (std::int64_t c = 0; c < s.dv; ++c) delta += d_s[r * s.dv + c] * o_s[r * s.dv + c];
    for (std::int64_t n = 0; n < keys; ++n) {
      const std::int64_t at = r * keys + n;
      const float exact = std::min(1.0F, std::exp(p[at] - lse[r]));
      u += exact * (d_p[at] - delta);
      d_p[at] = plain.round(exact * (d_p[at] - delta));
      p[at] = plain.round(exact);
    }
  }
  const auto scale = static_cast<float>(softmax_scale(plain.problem));
  Matrix to_q =
      plain.product(d_p, false, slice(state.ks, j * s.bk, keys, s.d), false, rows, s.d, keys);
  Matrix to_k =
      plain.product(d_p, true, slice(state.q, i * s.bq, rows, s.d), false, keys, s.d, rows);
  for (float& x : to_q) x *= scale;
  for (float& x : to_k) x *= scale;
  add(to_q, d_q);
  add(to_k, d_sparse_keys.data() + j * s.bk * s.d);
  add(plain.product(p, true, d_s, false, keys, s.dv, rows), d_v + j * s.bk * s.dv);
  return u;
}

/// The query side of the linear branch: adds to d_q, returns dH_i and dZ_i.
std::pair<Matrix, Matrix> linear_queries(const Plain& plain, const State& state, std::int64_t i,
                                         const Matrix& d_l, const float* o_l, float* d_q) {
  const Sizes& s = plain.s;
  const std::int64_t rows = s.query_rows(i);
  const Matrix phi = slice(state.phi_q, i * s.bq, rows, s.d);
  const Matrix bottom = plain.product(phi, false, state.Z[i], false, rows, 1, s.d);
  Matrix d_top(rows * s.dv);
  Matrix d_bottom(rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    if (bottom[r] < 0x1p-64F) continue;
    float delta = 0;
    for (std::int64_t c = 0; c < s.dv; ++c) {
      delta += d_l[r * s.dv + c] * o_l[r * s.dv + c];
      d_top[r * s.dv + c] = plain.round(d_l[r * s.dv + c] / bottom[r]);
    }
    d_bottom[r] = plain.round(-delta / bottom[r]);
  }
  Matrix d_phi = plain.product(d_top, false, state.H[i], true, rows, s.d, s.dv);
  for (std::int64_t at = 0; at < rows * s.d; ++at) {
    d_phi[at] = plain.round(d_phi[at] + d_bottom[at / s.d] * state.Z[i][at % s.d]);
  }
  add(phi_gradient(plain, phi, d_phi, s.d), d_q);
  return {plain.product(phi, true, d_top, false, s.d, s.dv, rows),
          plain.product(phi, true, d_bottom, false, s.d, 1, rows)};
}

float dot(const Matrix& a, const Matrix& b) {
  float sum = 0;
  for (std::size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

/// The router's gradients of one head from u and l.
void router_backward(const Plain& plain, const State& state,
                     const reference::Operands<float>& operands,
                     const reference::ForwardResult<float>& saved, const Matrix& u, const Matrix& l,
                     const std::vector<float>& pooled_q, const std::vector<float>& pooled_k,
                     reference::GradientResult<float>& result) {
  const Sizes& s = plain.s;
  const auto [b, h, kv] = std::array{state.head.b, state.head.h, state.head.kv};
  const std::int64_t k_blocks = state.head.k_blocks;
  const auto scale = static_cast<float>(softmax_scale(plain.problem));
  const std::int64_t router = (plain.problem.num_routers == 1 ? 0 : h) * s.d * s.d;
  for (std::int64_t i = 0; i < s.M; ++i) {
    const std::int64_t row = (b * s.H + h) * s.M + i;
    Matrix d_s =
        reference::soft_top_k_backward(saved.routing.logits.data() + row * s.T, &u[i * k_blocks],
                                       &l[i * k_blocks], k_blocks, plain.problem.config.tau);
    if (plain.problem.config.score_norm == ScoreNorm::kSoftmax) {
      const Matrix p =
          reference::soft_scores(plain.problem, saved.routing.scores.data() + row * s.T, k_blocks);
      const float mean = dot(p, d_s);
      for (std::int64_t j = 0; j < k_blocks; ++j) d_s[j] = p[j] * (d_s[j] - mean);
    }
    const float* qb = pooled_q.data() + row * s.d;
    const Matrix query = reference::project(plain.problem, qb, operands.proj_q, h);
    for (std::int64_t j = 0; j < k_blocks; ++j) {
      const float* kb = pooled_k.data() + ((b * s.Hkv + kv) * s.T + j) * s.d;
      const Matrix key = reference::project(plain.problem, kb, operands.proj_k, h);
      for (std::int64_t a = 0; a < s.d; ++a) {
        for (std::int64_t c = 0; c < s.d; ++c) {
          result.d_proj_q[router + a * s.d + c] += scale * d_s[j] * qb[a] * key[c];
          result.d_proj_k[router + a * s.d + c] += scale * d_s[j] * kb[a] * query[c];
        }
      }
    }
  }
}

/// The key side of the linear branch.
void linear_keys(const Plain& plain, const State& state, const std::vector<Matrix>& d_h,
                 const std::vector<Matrix>& d_z, Matrix& d_linear_keys, float* d_v) {
  const Sizes& s = plain.s;
  for (std::int64_t j = 0; j < state.head.k_blocks; ++j) {
    const std::int64_t rows = keys_of(plain, state, j);
    const Matrix phi = slice(state.phi_k, j * s.bk, rows, s.d);
    const Matrix h = plain.rounded(d_h[j]);
    Matrix d_phi =
        plain.product(slice(state.v, j * s.bk, rows, s.dv), false, h, true, rows, s.d, s.dv);
    for (std::int64_t at = 0; at < rows * s.d; ++at) {
      d_phi[at] = plain.round(d_phi[at] + plain.round(d_z[j][at % s.d]));
    }
    add(phi_gradient(plain, phi, d_phi, s.d), d_linear_keys.data() + j * s.bk * s.d);
    add(plain.product(phi, false, h, false, rows, s.dv, s.d), d_v + j * s.bk * s.dv);
  }
}

/// u and l of one head, [M, k_blocks]; adds to the gradients of q, v and the keys.
struct RouterSums {
  Matrix u, l;
};
RouterSums head_backward(const Plain& plain, const State& state,
                         const reference::Operands<float>& operands,
                         const reference::ForwardResult<float>& saved,
                         const std::vector<float>& d_out, Sums& sums,
                         reference::GradientResult<float>& result) {
  const Sizes& s = plain.s;
  const std::int64_t k_blocks = state.head.k_blocks;
  const std::int64_t head_row = (state.head.b * s.H + state.head.h) * s.Nq;
  float* d_v = result.d_v.data() + (state.head.b * s.Hkv + state.head.kv) * s.Nk * s.dv;
  RouterSums router{Matrix(s.M * k_blocks), Matrix(s.M * k_blocks)};
  std::vector<Matrix> d_h(k_blocks, Matrix(s.d * s.dv));
  std::vector<Matrix> d_z(k_blocks, Matrix(s.d));
  const bool all = plain.problem.config.linear_scope == LinearScope::kAll;
  for (std::int64_t i = 0; i < s.M; ++i) {
    const std::int64_t row = head_row + i * s.bq;
    const std::int64_t rows = s.query_rows(i);
    Matrix exact_o(rows * s.dv);
    Matrix exact_lse(rows);
    const float* o_s = saved.out_sparse.data() + row * s.dv;
    const float* lse = saved.lse.data() + row;
    if (plain.problem.config.backward == BackwardMode::kMatched) {
      sparse_block(plain, state, i, exact_o.data(), exact_lse.data());
      o_s = exact_o.data();
      lse = exact_lse.data();
    }
    const float* o_l = saved.out_linear.data() + row * s.dv;
    float* d_q = result.d_q.data() + row * s.d;
    Matrix d_s(rows * s.dv);
    Matrix d_l(rows * s.dv);
    mix_backward(plain, state, operands, i, o_s, o_l, d_out.data() + row * s.dv, d_s, d_l, result);
    for (std::int64_t j = 0; j < k_blocks; ++j) {
      if (!reads(state, i, j)) continue;
      router.u[i * k_blocks + j] =
          sparse_pair(plain, state, i, j, d_s, o_s, lse, d_q, sums.d_sparse_keys, d_v);
    }
    if (state.weights.complement_empty[i]) continue;
    const auto [dH, dZ] = linear_queries(plain, state, i, d_l, o_l, d_q);
    for (std::int64_t j = 0; j < k_blocks; ++j) {
      const float rest = all ? 1 : plain.round(state.weights.rest[i * k_blocks + j]);
      if (!all) router.l[i * k_blocks + j] = -(dot(dH, state.h[j]) + dot(dZ, state.z[j]));
      for (std::size_t c = 0; c < dH.size(); ++c) d_h[j][c] += rest * dH[c];
      for (std::size_t c = 0; c < dZ.size(); ++c) d_z[j][c] += rest * dZ[c];
    }
  }
  linear_keys(plain, state, d_h, d_z, sums.d_linear_keys, d_v);
  return router;
}

}  // namespace

reference::ForwardResult<float> plain16_forward(const Problem& problem,
                                                const reference::Operands<float>& operands,
                                                const reference::RoutingResult<float>& given) {
  const Plain plain{problem, Sizes(problem), reference::bits_of_16(problem.dtype)};
  const Sizes& s = plain.s;
  const auto smoothed = reference::smooth(problem, operands);
  reference::ForwardResult<float> result = reference::forward(problem, operands, &given);
  result.out_sparse = plain.rounded(result.out_sparse);
  std::fill(result.out_linear.begin(), result.out_linear.end(), 0.0F);
  for (std::int64_t at = 0; at < s.B * s.H; ++at) {
    const State state = make_state(plain, operands, smoothed.ks, given, at / s.H, at % s.H);
    for (std::int64_t i = 0; i < s.M; ++i) {
      const std::int64_t row = at * s.Nq + i * s.bq;
      const std::int64_t rows = s.query_rows(i);
      const float* o_s = &result.out_sparse[row * s.dv];
      float* o_l = &result.out_linear[row * s.dv];
      float* out = &result.out[row * s.dv];
      std::copy_n(o_s, rows * s.dv, out);
      if (state.weights.complement_empty[i]) continue;
      linear_block(plain, state, i, o_l);
      if (problem.config.method == Method::kSla2) {
        const float alpha = reference::alpha_of(problem, operands, state.head.h, i);
        for (std::int64_t c = 0; c < rows * s.dv; ++c) {
          out[c] = plain.round(alpha * o_s[c] + (1 - alpha) * o_l[c]);
        }
      } else if (!operands.proj_out.empty()) {
        const Matrix projected =
            plain.product(Matrix(o_l, o_l + rows * s.dv), false, plain.rounded(operands.proj_out),
                          false, rows, s.dv, s.dv);
        for (std::int64_t c = 0; c < rows * s.dv; ++c) out[c] = plain.round(o_s[c] + projected[c]);
      }
    }
  }
  return result;
}

reference::GradientResult<float> plain16_backward(const Problem& problem,
                                                  const reference::Operands<float>& operands,
                                                  const reference::ForwardResult<float>& saved,
                                                  const std::vector<float>& d_out,
                                                  std::mt19937_64* dither) {
  const Plain plain{problem, Sizes(problem), reference::bits_of_16(problem.dtype), dither};
  const Sizes& s = plain.s;
  const auto smoothed = reference::smooth(problem, operands);
  const auto pooled_q = reference::pool_queries(s, operands);
  reference::GradientResult<float> result;
  result.d_q.resize(s.B * s.H * s.Nq * s.d);
  result.d_k.resize(s.B * s.Hkv * s.Nk * s.d);
  result.d_v.resize(s.B * s.Hkv * s.Nk * s.dv);
  result.d_alpha_logit.resize(s.H * problem.alpha_blocks);
  result.d_proj_q.resize(problem.num_routers * s.d * s.d);
  result.d_proj_k.resize(problem.num_routers * s.d * s.d);
  result.d_proj_out.resize(s.dv * s.dv);
  const std::int64_t group = s.H / s.Hkv;
  for (std::int64_t at = 0; at < s.B * s.Hkv; ++at) {
    Sums sums{Matrix(s.Nk * s.d), Matrix(s.Nk * s.d)};
    const std::int64_t length = reference::key_length(s, operands, at / s.Hkv);
    for (std::int64_t h = at % s.Hkv * group; h < (at % s.Hkv + 1) * group; ++h) {
      const State state = make_state(plain, operands, smoothed.ks, saved.routing, at / s.Hkv, h);
      const RouterSums router = head_backward(plain, state, operands, saved, d_out, sums, result);
      if (!saved.routing.scores.empty() && problem.config.method == Method::kSla2) {
        router_backward(plain, state, operands, saved, router.u, router.l, pooled_q,
                        smoothed.pooled, result);
      }
    }
    for (std::int64_t c = 0; c < s.d; ++c) {
      float mean = 0;
      if (problem.config.linear_keys == LinearKeys::kSmoothed) {
        for (std::int64_t n = 0; n < length; ++n) mean += sums.d_linear_keys[n * s.d + c];
        mean /= static_cast<float>(length);
      }
      for (std::int64_t n = 0; n < length; ++n) {
        result.d_k[(at * s.Nk + n) * s.d + c] =
            sums.d_sparse_keys[n * s.d + c] + sums.d_linear_keys[n * s.d + c] - mean;
      }
    }
  }
  for (Matrix* x : {&result.d_q, &result.d_k, &result.d_v}) *x = plain.rounded(*x);
  return result;
}

}  // namespace sla2::test

// Alg. 3, corrected (docs/operator.md). Key/value heads run in parallel, their query heads in turn.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/stages.h"

namespace sla2::reference {
namespace {

/// Where one query head's share of the parameter gradients goes; summed afterwards.
template <typename Real>
struct HeadGradients {
  std::vector<Real> d_alpha_logit;  // [alpha_blocks]
  std::vector<Real> d_proj_q;       // [d, d]
  std::vector<Real> d_proj_k;       // [d, d]
  std::vector<Real> d_proj_out;     // [dv, dv]
};

template <typename Real>
struct Branches {
  std::vector<Real> d_sparse, d_linear;  // [Nq, dv] dO_s, dO_l
};

/// Step 4 backwards: dO to dO_s and dO_l, and the gradient of alpha_logit or proj_out.
template <typename Real>
Branches<Real> mix_backward(const Problem& problem, const Operands<Real>& operands, std::int64_t h,
                            const std::vector<bool>& complement_empty,
                            const Real* sparse,  // [Nq, dv]
                            const Real* linear,  // [Nq, dv]
                            const Real* d_out,   // [Nq, dv]
                            HeadGradients<Real>& parameters) {
  const Sizes s(problem);
  Branches<Real> result{std::vector<Real>(d_out, d_out + s.Nq * s.dv),
                        std::vector<Real>(s.Nq * s.dv)};
  for (std::int64_t row = 0; row < s.Nq; ++row) {
    const std::int64_t i = row / s.bq;
    if (complement_empty[i]) continue;  // o = o_s
    const Real* o_s = sparse + row * s.dv;
    const Real* o_l = linear + row * s.dv;
    const Real* d_o = d_out + row * s.dv;
    Real* d_s = &result.d_sparse[row * s.dv];
    Real* d_l = &result.d_linear[row * s.dv];
    if (problem.config.method == Method::kSla2) {
      const Real alpha = alpha_of(problem, operands, h, i);
      Real d_alpha = 0;
      for (std::int64_t c = 0; c < s.dv; ++c) {
        d_s[c] = alpha * d_o[c];
        d_l[c] = (1 - alpha) * d_o[c];
        d_alpha += d_o[c] * (o_s[c] - o_l[c]);
      }
      parameters.d_alpha_logit[problem.alpha_blocks == 1 ? 0 : i] += alpha * (1 - alpha) * d_alpha;
    } else {
      for (std::int64_t a = 0; a < s.dv; ++a) {
        for (std::int64_t c = 0; c < s.dv; ++c) {
          parameters.d_proj_out[a * s.dv + c] += o_l[a] * d_o[c];
          if (!operands.proj_out.empty()) d_l[a] += operands.proj_out[a * s.dv + c] * d_o[c];
        }
      }
    }
  }
  return result;
}

/// dp of one row of block scores to ds.
template <typename Real>
void score_norm_backward(const Problem& problem, const Real* scores, std::vector<Real>& d_p) {
  if (problem.config.score_norm == ScoreNorm::kNone) return;
  const auto k_blocks = static_cast<std::int64_t>(d_p.size());
  const std::vector<Real> p = soft_scores(problem, scores, k_blocks);
  Real mean = 0;
  for (std::int64_t j = 0; j < k_blocks; ++j) mean += p[j] * d_p[j];
  for (std::int64_t j = 0; j < k_blocks; ++j) d_p[j] = p[j] * (d_p[j] - mean);
}

/// Step 1 backwards for one head: s_ij = scale (qb_i Wq) . (kb_j Wk).
template <typename Real>
void router_backward(const Problem& problem, const Operands<Real>& operands,
                     const RoutingResult<Real>& routing, std::int64_t b, std::int64_t h,
                     const BlockWeights<Real>& weights, const std::vector<Real>& u,
                     const std::vector<Real>& l,
                     const Real* pooled_q,  // [M, d]
                     const Real* pooled_k,  // [T, d]
                     HeadGradients<Real>& parameters) {
  const Sizes s(problem);
  const auto scale = static_cast<Real>(softmax_scale(problem));
  for (std::int64_t i = 0; i < s.M; ++i) {
    const std::int64_t row = (b * s.H + h) * s.M + i;
    const std::int64_t at = i * weights.k_blocks;
    std::vector<Real> d_s = soft_top_k_backward(routing.logits.data() + row * s.T, &u[at], &l[at],
                                                weights.k_blocks, problem.config.tau);
    score_norm_backward(problem, routing.scores.data() + row * s.T, d_s);
    const Real* qb = pooled_q + i * s.d;
    const std::vector<Real> query = project(problem, qb, operands.proj_q, h);
    for (std::int64_t j = 0; j < weights.k_blocks; ++j) {
      const Real* kb = pooled_k + j * s.d;
      const std::vector<Real> key = project(problem, kb, operands.proj_k, h);
      for (std::int64_t a = 0; a < s.d; ++a) {
        for (std::int64_t c = 0; c < s.d; ++c) {
          parameters.d_proj_q[a * s.d + c] += scale * d_s[j] * qb[a] * key[c];
          parameters.d_proj_k[a * s.d + c] += scale * d_s[j] * kb[a] * query[c];
        }
      }
    }
  }
}

template <typename Real>
struct Call {
  const Problem& problem;
  const Operands<Real>& operands;
  const ForwardResult<Real>& saved;
  const std::vector<Real>& d_out;
  Sizes s;
  bool learns_router;
  std::vector<Real> ks;        // [B, Hkv, Nk, d]
  std::vector<Real> pooled_q;  // [B, H, M, d], if learns_router
  std::vector<Real> pooled_k;  // [B, Hkv, T, d], if learns_router
};

/// Adds one query head's part to the gradients of q, k and v.
template <typename Real>
HeadGradients<Real> head_backward(const Call<Real>& call, std::int64_t b, std::int64_t h,
                                  GradientResult<Real>& result,
                                  Real* d_sparse_keys,  // [Nk, d] of ks
                                  Real* d_linear_keys)  // [Nk, d] of ks, or of k with raw keys
{
  const Problem& problem = call.problem;
  const Sizes& s = call.s;
  const Head<Real> head = make_head(s, call.operands, call.ks, b, h);
  const BlockWeights<Real> weights =
      block_weights(problem, call.saved.routing, b, h, head.k_blocks);
  const std::int64_t row = (b * s.H + h) * s.Nq;
  const std::int64_t key_row = (b * s.Hkv + head.kv) * s.Nk;
  HeadGradients<Real> parameters{std::vector<Real>(problem.alpha_blocks),
                                 std::vector<Real>(s.d * s.d), std::vector<Real>(s.d * s.d),
                                 std::vector<Real>(s.dv * s.dv)};

  const Real* o_s = call.saved.out_sparse.data() + row * s.dv;
  const Real* o_l = call.saved.out_linear.data() + row * s.dv;
  const Real* lse = call.saved.lse.data() + row;
  std::vector<Real> exact_o_s(s.Nq * s.dv);
  std::vector<Real> exact_lse(s.Nq);
  if (problem.config.backward == BackwardMode::kMatched) {
    sparse_forward(problem, head, weights, 0, exact_o_s.data(), exact_lse.data());
    o_s = exact_o_s.data();
    lse = exact_lse.data();
  }

  const Branches<Real> branches =
      mix_backward(problem, call.operands, h, weights.complement_empty, o_s, o_l,
                   call.d_out.data() + row * s.dv, parameters);
  std::vector<Real> u(s.M * head.k_blocks);
  std::vector<Real> l(s.M * head.k_blocks);
  Real* d_q = result.d_q.data() + row * s.d;
  Real* d_v = result.d_v.data() + key_row * s.dv;
  sparse_backward(problem, head, weights, o_s, lse, branches.d_sparse.data(), d_q, d_sparse_keys,
                  d_v, u.data());
  linear_backward(problem, head, weights, o_l, branches.d_linear.data(), d_q, d_linear_keys, d_v,
                  l.data());
  if (call.learns_router) {
    router_backward(problem, call.operands, call.saved.routing, b, h, weights, u, l,
                    call.pooled_q.data() + (b * s.H + h) * s.M * s.d,
                    call.pooled_k.data() + (b * s.Hkv + head.kv) * s.T * s.d, parameters);
  }
  return parameters;
}

/// dK of one key/value head. The linear branch's gradient also goes through the mean of step 0;
/// the sparse branch is unchanged by it.
template <typename Real>
void join_key_gradients(const Call<Real>& call, std::int64_t length, const Real* d_sparse_keys,
                        const Real* d_linear_keys, Real* d_k) {
  const std::int64_t d = call.s.d;
  for (std::int64_t c = 0; c < d; ++c) {
    Real mean = 0;
    if (call.problem.config.linear_keys == LinearKeys::kSmoothed) {
      for (std::int64_t n = 0; n < length; ++n) mean += d_linear_keys[n * d + c];
      mean /= static_cast<Real>(length);
    }
    for (std::int64_t n = 0; n < length; ++n) {
      d_k[n * d + c] = d_sparse_keys[n * d + c] + d_linear_keys[n * d + c] - mean;
    }
  }
}

template <typename Real>
void add(const std::vector<Real>& from, Real* to) {
  for (std::size_t c = 0; c < from.size(); ++c) to[c] += from[c];
}

template <typename Real>
Call<Real> make_call(const Problem& problem, const Operands<Real>& operands,
                     const ForwardResult<Real>& saved, const std::vector<Real>& d_out) {
  const Sizes s(problem);
  Call<Real> call{problem, operands, saved, d_out, s, false, operands.k, {}, {}};
  for (std::int64_t at = 0; at < s.B * s.Hkv * s.Nk * s.d; ++at) {
    call.ks[at] -= saved.k_mean[at / (s.Nk * s.d) * s.d + at % s.d];
  }
  call.learns_router = problem.config.routing == RoutingMode::kSoft &&
                       problem.config.method == Method::kSla2 && !saved.routing.scores.empty();
  if (call.learns_router) {
    call.pooled_q = pool_queries(s, operands);
    call.pooled_k = smooth(problem, operands).pooled;
  }
  return call;
}

}  // namespace

template <typename Real>
GradientResult<Real> backward(const Problem& problem, const Operands<Real>& operands,
                              const ForwardResult<Real>& saved, const std::vector<Real>& d_out,
                              Executor* executor) {
  const Call<Real> call = make_call(problem, operands, saved, d_out);
  const Sizes& s = call.s;
  GradientResult<Real> result;
  result.d_q.resize(s.B * s.H * s.Nq * s.d);
  result.d_k.resize(s.B * s.Hkv * s.Nk * s.d);
  result.d_v.resize(s.B * s.Hkv * s.Nk * s.dv);
  std::vector<HeadGradients<Real>> parameters(s.B * s.H);

  SerialExecutor serial;
  Executor& runner = executor != nullptr ? *executor : serial;
  runner.parallel_for(s.B * s.Hkv, [&](std::int64_t at, std::int64_t) {
    const std::int64_t b = at / s.Hkv;
    const std::int64_t group = s.H / s.Hkv;
    std::vector<Real> d_sparse_keys(s.Nk * s.d);
    std::vector<Real> d_linear_keys(s.Nk * s.d);
    for (std::int64_t h = at % s.Hkv * group; h < (at % s.Hkv + 1) * group; ++h) {
      parameters[b * s.H + h] =
          head_backward(call, b, h, result, d_sparse_keys.data(), d_linear_keys.data());
    }
    join_key_gradients(call, key_length(s, operands, b), d_sparse_keys.data(), d_linear_keys.data(),
                       result.d_k.data() + at * s.Nk * s.d);
  });

  if (problem.config.method == Method::kSla2) {
    result.d_alpha_logit.resize(s.H * problem.alpha_blocks);
    result.d_proj_q.resize(problem.num_routers * s.d * s.d);
    result.d_proj_k.resize(problem.num_routers * s.d * s.d);
  } else {
    result.d_proj_out.resize(s.dv * s.dv);
  }
  for (std::int64_t at = 0; at < s.B * s.H; ++at) {
    const std::int64_t h = at % s.H;
    const std::int64_t router = problem.num_routers == 1 ? 0 : h;
    if (problem.config.method == Method::kSla2) {
      add(parameters[at].d_alpha_logit, result.d_alpha_logit.data() + h * problem.alpha_blocks);
      add(parameters[at].d_proj_q, result.d_proj_q.data() + router * s.d * s.d);
      add(parameters[at].d_proj_k, result.d_proj_k.data() + router * s.d * s.d);
    } else {
      add(parameters[at].d_proj_out, result.d_proj_out.data());
    }
  }
  return result;
}

#define SLA2_INSTANTIATE(Real)                                                                 \
  template GradientResult<Real> backward(const Problem&, const Operands<Real>&,                \
                                         const ForwardResult<Real>&, const std::vector<Real>&, \
                                         Executor*);
SLA2_INSTANTIATE(float)
SLA2_INSTANTIATE(double)
#undef SLA2_INSTANTIATE

}  // namespace sla2::reference

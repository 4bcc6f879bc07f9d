// How results of the kernels are judged: against the reference in double, by the error of a plain
// computation in the same precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/parity.h"
#include "cuda/cases.h"
#include "cuda/plain16.h"

namespace sla2::test {

template <typename Real>
reference::RoutingResult<Real> routing_of(const Call& call) {
  reference::RoutingResult<Real> routing;
  const auto logits = call.logits.values();
  routing.logits.assign(logits.begin(), logits.end());
  for (const double x : call.blocks.values()) {
    routing.blocks.push_back(static_cast<std::int32_t>(x));
  }
  return routing;
}

inline void judge_forward(Call& call) {
  const Problem& problem = call.problem;
  Problem exact_problem = problem;
  exact_problem.config.precision = Precision::kFp32;
  const auto given = routing_of<double>(call);
  const auto given_float = routing_of<float>(call);
  const auto exact = reference::forward(exact_problem, call.operands<double>(), &given);
  const auto naive = problem.dtype == DType::kF32
                         ? reference::forward(problem, call.operands<float>(), &given_float)
                         : plain16_forward(problem, call.operands<float>(), given_float);
  const DType dtype = problem.dtype;
  expect_close("out", call.out.values(), naive.out, exact.out, dtype);
  expect_close("out_sparse", call.out_sparse.values(), naive.out_sparse, exact.out_sparse, dtype);
  expect_close("out_linear", call.out_linear.values(), naive.out_linear, exact.out_linear, dtype);
  expect_close("lse", call.lse.values(), naive.lse, exact.lse, DType::kF32);
  expect_close("k_mean", call.k_mean.values(), naive.k_mean, exact.k_mean, DType::kF32);
}

template <typename Real>
reference::ForwardResult<Real> saved_of(Call& call, bool learns_router) {
  const auto copy = [](const std::vector<double>& x) {
    return std::vector<Real>(x.begin(), x.end());
  };
  reference::ForwardResult<Real> saved;
  saved.out_sparse = copy(call.out_sparse.values());
  saved.out_linear = copy(call.out_linear.values());
  saved.lse = copy(call.lse.values());
  saved.k_mean = copy(call.k_mean.values());
  saved.routing = routing_of<Real>(call);
  if (learns_router) {
    saved.routing.scores = reference::route(call.problem, call.operands<Real>()).scores;
  }
  return saved;
}

inline double largest(const std::vector<double>& values) {
  double most = 0;
  for (const double x : values) most = std::max(most, std::abs(x));
  return most;
}

/// expect_close, but a gradient that is exactly zero (one key: dP = Ds) may keep what `terms` fp32
/// roundings of numbers up to `magnitude` leave of it.
template <typename Naive>
void expect_gradient(const char* what, const std::vector<double>& ours, const Naive& naive,
                     const std::vector<double>& exact, DType dtype, double terms,
                     double magnitude) {
  if (largest(exact) == 0) {
    EXPECT_LE(largest(ours), terms * 0x1p-24 * magnitude) << what;
  } else {
    expect_close(what, ours, naive, exact, dtype);
  }
}

/// What the call saved is taken as it is; `given`: no gradient reaches the router.
inline void judge_backward(Call& call, bool given = false) {
  const Problem& problem = call.problem;
  const bool learns = problem.config.routing == RoutingMode::kSoft && !given;
  const auto d_out = call.d_out.values();
  const std::vector<float> d_out_float(d_out.begin(), d_out.end());
  const auto exact =
      reference::backward(problem, call.operands<double>(), saved_of<double>(call, learns), d_out);
  const auto saved = saved_of<float>(call, learns);
  const auto naive = problem.dtype == DType::kF32
                         ? reference::backward(problem, call.operands<float>(), saved, d_out_float)
                         : plain16_backward(problem, call.operands<float>(), saved, d_out_float);
  const DType dtype = problem.dtype;
  // dP and Ds are sums of dv products; a row of dQ or dK adds as many rows as there are.
  const auto group = static_cast<double>(problem.num_heads / problem.num_kv_heads);
  const double products = static_cast<double>(problem.value_dim) * largest(d_out) *
                          largest(call.v.values()) * softmax_scale(problem);
  expect_gradient("d_q", call.d_q.values(), naive.d_q, exact.d_q, dtype,
                  static_cast<double>(problem.k_tokens), products * 2 * largest(call.k.values()));
  expect_gradient("d_k", call.d_k.values(), naive.d_k, exact.d_k, dtype,
                  group * static_cast<double>(problem.q_tokens),
                  products * largest(call.q.values()));
  expect_close("d_v", call.d_v.values(), naive.d_v, exact.d_v, dtype);
  const auto parameter = [&](const char* what, const Array<float>& ours, const auto& naive_of,
                             const auto& exact_of) {
    if (ours.size() > 0) expect_close(what, ours.values(), naive_of, exact_of, DType::kF32);
  };
  parameter("d_alpha_logit", call.d_alpha_logit, naive.d_alpha_logit, exact.d_alpha_logit);
  parameter("d_proj_q", call.d_proj_q, naive.d_proj_q, exact.d_proj_q);
  parameter("d_proj_k", call.d_proj_k, naive.d_proj_k, exact.d_proj_k);
  parameter("d_proj_out", call.d_proj_out, naive.d_proj_out, exact.d_proj_out);
  EXPECT_TRUE(call.guards_intact());
}

}  // namespace sla2::test

// How results of the kernels are judged: against the reference in double, by the error of a plain
// computation in the same precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "cpu/parity.h"
#include "cuda/cases.h"
#include "cuda/plain16.h"
#include "reference/stages.h"

namespace sla2::test {

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
  const std::int64_t dv = problem.value_dim;
  expect_rows_close("out", call.out.values(), naive.out, exact.out, dtype, dv);
  expect_rows_close("out_sparse", call.out_sparse.values(), naive.out_sparse, exact.out_sparse,
                    dtype, dv);
  expect_rows_close("out_linear", call.out_linear.values(), naive.out_linear, exact.out_linear,
                    dtype, dv);
  expect_rows_close("lse", call.lse.values(), naive.lse, exact.lse, DType::kF32, 1);
  expect_rows_close("k_mean", call.k_mean.values(), naive.k_mean, exact.k_mean, DType::kF32,
                    problem.head_dim);
  if (problem.config.precision == Precision::kInt8 &&
      problem.config.routing == RoutingMode::kHard) {
    const auto emulated = reference::forward(problem, call.operands<float>(), &given_float);
    expect_integers_close(call, given, emulated.out_sparse, Chunks::kOther);  // one tile a chunk
  }
}

/// expect_rows_close, but a gradient that is exactly zero (one key: dP = Ds) may keep what `terms`
/// fp32 roundings of numbers up to `magnitude` leave of it.
template <typename Naive>
void expect_gradient(const char* what, const std::vector<double>& ours, const Naive& naive,
                     const std::vector<double>& exact, DType dtype, std::int64_t width,
                     double terms, double magnitude) {
  if (largest(exact) == 0) {
    EXPECT_LE(largest(ours), terms * 0x1p-24 * magnitude) << what;
  } else {
    expect_rows_close(what, ours, naive, exact, dtype, width);
  }
}

/// The size of what cancels in d_alpha_logit = alpha (1 - alpha) sum dO . (o_s - o_l): the norm of
/// its terms, all parameters together.
inline double alpha_terms(Call& call, const std::vector<double>& d_out) {
  const Problem& p = call.problem;
  const auto operands = call.operands<double>();
  const std::vector<double> o_s = call.out_sparse.values();
  const std::vector<double> o_l = call.out_linear.values();
  double sum = 0;
  for (std::int64_t at = 0; at < std::ssize(d_out); ++at) {
    const std::int64_t row = at / p.value_dim;
    const double alpha = reference::alpha_of(p, operands, row / p.q_tokens % p.num_heads,
                                             row % p.q_tokens / p.config.block_q);
    const double slope = alpha * (1 - alpha) * d_out[at];
    sum += slope * slope * (o_s[at] * o_s[at] + o_l[at] * o_l[at]);
  }
  return std::sqrt(sum);
}

/// A parameter's gradient. fp32 sums round by the size of their terms, `terms` (0: about that of
/// the result), and not by what is left of them. Few numbers that many errors add up to come out
/// nearly exact from one plain run now and then; the error that the rule speaks of is then the
/// root mean square over `plain_errors()`.
template <typename Plain>
void expect_parameter(const char* what, const std::vector<double>& ours,
                      const std::vector<float>& naive, const std::vector<double>& exact,
                      double terms, const Plain& plain_errors) {
  double norm = 0;
  for (const double x : exact) norm += x * x;
  norm = std::sqrt(norm);
  if (norm == 0) return expect_close(what, ours, naive, exact, DType::kF32);
  const double floor = kSumError * std::max(1.0, terms / norm) + storage_error(DType::kF32);
  const double error = relative_error(ours, exact);
  double bound = 2 * relative_error(naive, exact) + floor;
  if (error > bound) {
    double squares = 0;
    const std::vector<double> errors = plain_errors();
    for (const double x : errors) squares += x * x;
    if (!errors.empty()) {
      bound = std::max(bound, 2 * std::sqrt(squares / static_cast<double>(errors.size())) + floor);
    }
  }
  EXPECT_TRUE(error <= bound) << what << ": relative error " << error << ", bound " << bound;
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
  expect_gradient("d_q", call.d_q.values(), naive.d_q, exact.d_q, dtype, problem.head_dim,
                  static_cast<double>(problem.k_tokens), products * 2 * largest(call.k.values()));
  expect_gradient("d_k", call.d_k.values(), naive.d_k, exact.d_k, dtype, problem.head_dim,
                  group * static_cast<double>(problem.q_tokens),
                  products * largest(call.q.values()));
  expect_rows_close("d_v", call.d_v.values(), naive.d_v, exact.d_v, dtype, problem.value_dim);
  using Gradient = reference::GradientResult<float>;
  std::vector<Gradient> dithered;  // made when somebody asks; none for fp32
  const auto parameter = [&](const char* what, const Array<float>& ours,
                             std::vector<float> Gradient::*naive_of,
                             const std::vector<double>& exact_of, double terms) {
    if (ours.size() == 0) return;
    expect_parameter(what, ours.values(), naive.*naive_of, exact_of, terms, [&] {
      std::mt19937_64 generator(1);
      while (dtype != DType::kF32 && dithered.size() < 16) {
        dithered.push_back(
            plain16_backward(problem, call.operands<float>(), saved, d_out_float, &generator));
      }
      std::vector<double> errors;
      for (const Gradient& one : dithered) {
        errors.push_back(relative_error(one.*naive_of, exact_of) / std::sqrt(2));
      }
      return errors;
    });
  };
  const bool mixes = problem.config.method == Method::kSla2;
  parameter("d_alpha_logit", call.d_alpha_logit, &Gradient::d_alpha_logit, exact.d_alpha_logit,
            mixes ? alpha_terms(call, d_out) : 0);
  parameter("d_proj_q", call.d_proj_q, &Gradient::d_proj_q, exact.d_proj_q, 0);
  parameter("d_proj_k", call.d_proj_k, &Gradient::d_proj_k, exact.d_proj_k, 0);
  parameter("d_proj_out", call.d_proj_out, &Gradient::d_proj_out, exact.d_proj_out, 0);
  EXPECT_TRUE(call.guards_intact());
}

}  // namespace sla2::test

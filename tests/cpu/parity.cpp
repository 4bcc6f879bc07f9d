#include "cpu/parity.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/naive_linear.h"
#include "cpu/plan.h"
#include "cuda/plain16.h"
#include "reference/reference.h"
#include "reference/stages.h"

namespace sla2::test {
namespace {

/// `in_bf16`: with every product in bf16, as a framework would run it; `dither`: then see
/// plain16.h, without it gives each number of dO and v a sign at random.
template <typename Real>
reference::GradientResult<Real> naive_backward(Call& call, bool in_bf16,
                                               std::mt19937_64* dither = nullptr) {
  auto operands = call.operands<Real>();
  auto d_out = call.d_out.values();
  if (dither != nullptr && !in_bf16) {
    for (double& x : d_out) x = (*dither)() % 2 == 0 ? x : -x;
    for (Real& x : operands.v) x = (*dither)() % 2 == 0 ? x : -x;
  }
  const auto saved = saved_of<Real>(call, call.problem.config.routing == RoutingMode::kSoft);
  const std::vector<Real> d_o(d_out.begin(), d_out.end());
  if constexpr (std::is_same_v<Real, float>) {
    if (in_bf16) return plain16_backward(call.problem, operands, saved, d_o, dither);
  }
  return reference::backward(call.problem, operands, saved, d_o);
}

/// backward = matched in bf16 takes dO . o_s as sum of p dP, whose dO is rounded: 2^-9/sqrt(3) of
/// each term of d_alpha_logit at random, which the naive run does not have. Twice that, relative to
/// the norm of `exact`.
double rounded_d_out_error(Call& call, const std::vector<double>& exact) {
  const Problem& p = call.problem;
  const auto operands = call.operands<double>();
  const std::vector<double> d_out = call.d_out.values();
  const std::vector<double> o_s = call.out_sparse.values();
  double terms = 0;
  for (std::int64_t at = 0; at < std::ssize(d_out); ++at) {
    const std::int64_t row = at / p.value_dim;
    const double alpha = reference::alpha_of(p, operands, row / p.q_tokens % p.num_heads,
                                             row % p.q_tokens / p.config.block_q);
    const double term = alpha * (1 - alpha) * d_out[at] * o_s[at];
    terms += term * term;
  }
  double norm = 0;
  for (const double x : exact) norm += x * x;
  return norm == 0 ? 0 : 2 * 0x1p-9 / std::sqrt(3) * std::sqrt(terms / norm);
}

constexpr int kRuns = 16;

/// The size of what cancels in a parameter's gradient, relative to what is left of it: the gradient
/// is linear in dO and, but for what was saved, in v (u = sum P (dP - Ds)), so with their signs at
/// random its mean square is the sum of the squares of all its terms.
double cancelled_terms(Call& call, std::vector<double> reference::GradientResult<double>::*member,
                       const std::vector<double>& exact) {
  const auto squares_of = [](const std::vector<double>& x) {
    return std::inner_product(x.begin(), x.end(), x.begin(), 0.0);
  };
  std::mt19937_64 generator(1);
  double squares = 0;
  for (int run = 0; run < kRuns; ++run) {
    squares += squares_of(naive_backward<double>(call, false, &generator).*member);
  }
  return std::sqrt(squares / kRuns / squares_of(exact));
}

/// The exact run's operands, each number half a unit of fp32's last place away, up or down; 32 rows
/// alike, so that a block's mean moves as far.
reference::Operands<double> moved_operands(Call& call, std::mt19937_64& generator) {
  auto operands = call.operands<double>();
  const auto move = [&](std::vector<double>& tensor, std::int64_t width) {
    std::vector<double> factors(static_cast<std::size_t>(width));
    for (std::size_t at = 0; at < tensor.size(); ++at) {
      const std::size_t column = at % factors.size();
      if (column == 0 && at / factors.size() % 32 == 0) {
        for (double& x : factors) x = generator() % 2 == 0 ? 1 + 0x1p-24 : 1 - 0x1p-24;
      }
      tensor[at] *= factors[column];
    }
  };
  move(operands.q, call.problem.head_dim);
  move(operands.k, call.problem.head_dim);
  move(operands.v, call.problem.value_dim);
  return operands;
}

/// How far such steps move an exact gradient; what the forward saved stays. Rounding its inputs
/// costs any run in fp32 as much, and where terms cancel one naive run may be luckier than that.
/// The larger one of the whole's and the worst row's, as floors of expect_rows_close; its factor 2,
/// or that of a long product: n partial sums, each rounded by 2^-24 / sqrt(3) at random, of sizes
/// that grow like sqrt(c), add up to sqrt(n / 6) times what n terms moved by 2^-24 do.
double input_error(Call& call, std::vector<double> reference::GradientResult<double>::*member,
                   const std::vector<double>& exact, std::int64_t width) {
  const auto saved = saved_of<double>(call, call.problem.config.routing == RoutingMode::kSoft);
  const std::vector<double> d_out = call.d_out.values();
  std::mt19937_64 generator(2);
  double worst = 0;
  for (int run = 0; run < kRuns; ++run) {
    const std::vector<double> moved =
        reference::backward(call.problem, moved_operands(call, generator), saved, d_out).*member;
    worst = std::max({worst, relative_error(moved, exact),
                      worst_part_error(moved, exact, static_cast<std::size_t>(width)) / 4.1});
  }
  const auto terms = static_cast<double>(std::max(call.problem.head_dim, call.problem.value_dim));
  return std::max(2.0, std::sqrt(terms / 6)) * worst;
}

/// SoftTop-k's derivatives are functions of scores over tau: what four roundings of the largest
/// score cost them.
double score_error(Call& call) {
  if (call.problem.config.routing != RoutingMode::kSoft) return 0;
  return 4 * 0x1p-24 * largest(saved_of<double>(call, true).routing.scores) /
         call.problem.config.tau;
}

/// The gradient of few numbers, each one sum of many errors, comes out nearly exact from one naive
/// run now and then. In bf16 the rule speaks of the root mean square over some runs that round up
/// or down at random, whose errors are sqrt(2) times as large (see plain16.h). fp32 sums round by
/// the size of their terms, not of what is left of them (SoftTop-k's gradient of two blocks is a
/// single number, a difference): the floor, or that of a `long_sum`, grows by `terms_of` that
/// cancel.
void expect_parameter(const char* what, Call& call, const Array<float>& ours,
                      std::vector<float> reference::GradientResult<float>::*member,
                      const reference::GradientResult<float>& naive,
                      const std::vector<double>& exact, bool in_bf16, double floor = kSumError,
                      std::vector<double> reference::GradientResult<double>::*terms_of = nullptr,
                      double long_sum = 0) {
  if (ours.size() == 0) return;
  const double error = relative_error(ours.values(), exact);
  const bool passes = error <= 2 * relative_error(naive.*member, exact) + floor;
  if (!in_bf16 && !passes && terms_of != nullptr && largest(exact) != 0) {
    floor = std::max(floor, long_sum) * std::max(1.0, cancelled_terms(call, terms_of, exact));
    floor += score_error(call);
    floor += input_error(call, terms_of, exact, std::ssize(exact));
  }
  if (!in_bf16 || passes) {
    return expect_close(what, ours.values(), naive.*member, exact, DType::kF32, floor);
  }
  std::mt19937_64 generator(1);
  double squares = 0;
  for (int run = 0; run < kRuns; ++run) {
    const double one = relative_error(naive_backward<float>(call, true, &generator).*member, exact);
    squares += one * one / 2;
  }
  EXPECT_LE(error, 2 * std::sqrt(squares / kRuns) + floor) << what;
}

/// The largest Euclidean norm of a row.
double largest_row(const std::vector<double>& values, std::int64_t width) {
  double most = 0;
  for (std::int64_t first = 0; first < std::ssize(values); first += width) {
    double squares = 0;
    for (std::int64_t c = 0; c < width; ++c) squares += values[first + c] * values[first + c];
    most = std::max(most, squares);
  }
  return std::sqrt(most);
}

/// What fp32 leaves of a gradient that cancels exactly: with one key dP = Ds, and no complement.
/// Each term is scale * p (dP - Ds) x, p <= 1, x of q (for dK) or of ks (for dQ). dP and Ds are
/// sums over dv whose partial sums grow like sqrt(c / dv) |dO| |v|, so that their dv roundings of
/// 2^-24 add up at random to 2^-24 |dO| |v| (row norms), whatever dv is. `rows` such terms add up
/// at random to sum_error(rows), whose 4 is for the largest of all numbers.
double cancelled_error(Call& call, std::int64_t rows, double largest_x) {
  const Problem& p = call.problem;
  return sum_error(static_cast<double>(rows)) * softmax_scale(p) * largest_x *
         largest_row(call.d_out.values(), p.value_dim) * largest_row(call.v.values(), p.value_dim);
}

/// A gradient that is exactly zero keeps of bf16 products what the naive run keeps, at most twice,
/// and `zero_floor` of fp32 sums.
void expect_gradient(const char* what, Call& call, Tensor& ours, const std::vector<float>& naive,
                     std::vector<double> reference::GradientResult<double>::*member,
                     const std::vector<double>& exact, std::int64_t width, double zero_floor) {
  const DType dtype = call.problem.dtype;
  const std::vector<double> values = ours.values();
  if (largest(exact) == 0) {
    EXPECT_LE(largest(values), 2 * largest(naive) + zero_floor) << what;
  } else {
    const bool passes = rows_are_close(values, naive, exact, dtype, width, kSumError);
    const double more = passes ? 0 : input_error(call, member, exact, width);
    expect_rows_close(what, values, naive, exact, dtype, width, kSumError + more);
  }
}

}  // namespace

void expect_forward(Call& call) {
  const Problem& problem = call.problem;
  Problem exact_problem = problem;
  exact_problem.config.precision = Precision::kFp32;
  const auto given = routing_of<double>(call);
  const auto given_float = routing_of<float>(call);
  const auto exact = reference::forward(exact_problem, call.operands<double>(), &given);
  auto naive = reference::forward(problem, call.operands<float>(), &given_float);
  round_linear_branch(call, given_float, naive);
  const DType dtype = problem.dtype;
  const std::int64_t d = problem.head_dim;
  const std::int64_t dv = problem.value_dim;
  expect_rows_close("out", call.out.values(), naive.out, exact.out, dtype, dv);
  expect_rows_close("out_sparse", call.out_sparse.values(), naive.out_sparse, exact.out_sparse,
                    dtype, dv);
  expect_rows_close("out_linear", call.out_linear.values(), naive.out_linear, exact.out_linear,
                    dtype, dv);
  expect_rows_close("k_mean", call.k_mean.values(), naive.k_mean, exact.k_mean, DType::kF32, d);
  if (problem.config.precision != Precision::kInt8 ||
      problem.config.routing != RoutingMode::kHard) {
    expect_rows_close("lse", call.lse.values(), naive.lse, exact.lse, DType::kF32, 1);
  } else {
    // One chunk on either side (stages/forward_queries.inc, reference/sparse.cpp)?
    const std::int64_t routed = max_routed_blocks(problem);
    const bool one_chunk = routed <= 16 && routed * problem.config.block_k <= 1024;
    const Chunks chunks = one_chunk ? Chunks::kSame : Chunks::kOther;
    expect_integers_close(call, given, naive.out_sparse, chunks);
    expect_integer_lse_close(call, given, naive.lse, chunks);
  }
}

void expect_backward(Call& call) {
  const Problem& problem = call.problem;
  const std::string name = problem.implementation;
  const bool in_bf16 =
      name.starts_with("cpu_") && cpu::has_bf16_products(problem, kernels_of(name));
  const auto exact_d = naive_backward<double>(call, false);
  const auto naive_d = naive_backward<float>(call, in_bf16);
  // The p of a row of dQ add up to 1: one term. A row of dK sums the rows of its query heads; ks
  // differs from k by a mean of it.
  const std::int64_t rows = problem.num_heads / problem.num_kv_heads * problem.q_tokens;
  using Exact = reference::GradientResult<double>;
  expect_gradient("d_q", call, call.d_q, naive_d.d_q, &Exact::d_q, exact_d.d_q, problem.head_dim,
                  cancelled_error(call, 1, 2 * largest(call.k.values())));
  expect_gradient("d_k", call, call.d_k, naive_d.d_k, &Exact::d_k, exact_d.d_k, problem.head_dim,
                  cancelled_error(call, rows, largest(call.q.values())));
  expect_gradient("d_v", call, call.d_v, naive_d.d_v, &Exact::d_v, exact_d.d_v, problem.value_dim,
                  kSumError);
  using Gradient = reference::GradientResult<float>;
  // One sum over the rows and columns of a query block.
  const auto terms = static_cast<double>(problem.config.block_q * problem.value_dim);
  double floor = std::max(kSumError, sum_error(terms));
  if (in_bf16 && problem.config.backward == BackwardMode::kMatched &&
      call.d_alpha_logit.size() > 0) {
    floor += rounded_d_out_error(call, exact_d.d_alpha_logit);
  }
  expect_parameter("d_alpha_logit", call, call.d_alpha_logit, &Gradient::d_alpha_logit, naive_d,
                   exact_d.d_alpha_logit, in_bf16, floor, &Exact::d_alpha_logit);
  // l_ij is a product of dH_i and h_j.
  const auto products = static_cast<double>(problem.head_dim * problem.value_dim);
  const double long_sum = sum_error(products);
  expect_parameter("d_proj_q", call, call.d_proj_q, &Gradient::d_proj_q, naive_d, exact_d.d_proj_q,
                   in_bf16, kSumError, &Exact::d_proj_q, long_sum);
  expect_parameter("d_proj_k", call, call.d_proj_k, &Gradient::d_proj_k, naive_d, exact_d.d_proj_k,
                   in_bf16, kSumError, &Exact::d_proj_k, long_sum);
  expect_parameter("d_proj_out", call, call.d_proj_out, &Gradient::d_proj_out, naive_d,
                   exact_d.d_proj_out, in_bf16);
}

void expect_parity(const char* implementation, const ParityCase& c) {
  Problem problem = c.problem;
  problem.implementation = implementation;
  Call call(problem, 7, c.layout, c.key_lengths);
  const auto executor = make_thread_pool(2);
  call.run_forward(*executor);
  expect_forward(call);
  call.run_backward(*executor);
  expect_backward(call);
  EXPECT_TRUE(call.guards_intact());
}

}  // namespace sla2::test

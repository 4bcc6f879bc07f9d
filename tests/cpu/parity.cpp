#include "cpu/parity.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/naive_linear.h"
#include "reference/reference.h"

namespace sla2::test {
namespace {

template <typename Real>
reference::RoutingResult<Real> routing_of(const Call& call) {
  reference::RoutingResult<Real> routing;
  const auto logits = call.logits.values();
  const auto blocks = call.blocks.values();
  routing.logits.assign(logits.begin(), logits.end());
  for (const double x : blocks) routing.blocks.push_back(static_cast<std::int32_t>(x));
  return routing;
}

template <typename Real>
reference::ForwardResult<Real> saved_of(Call& call, const std::vector<Real>& scores) {
  const auto copy = [](const std::vector<double>& x) {
    return std::vector<Real>(x.begin(), x.end());
  };
  reference::ForwardResult<Real> saved;
  saved.out_sparse = copy(call.out_sparse.values());
  saved.out_linear = copy(call.out_linear.values());
  saved.lse = copy(call.lse.values());
  saved.k_mean = copy(call.k_mean.values());
  saved.routing = routing_of<Real>(call);
  saved.routing.scores = scores;
  return saved;
}

template <typename Real>
reference::GradientResult<Real> naive_backward(Call& call) {
  const auto operands = call.operands<Real>();
  const auto d_out = call.d_out.values();
  std::vector<Real> scores;
  if (call.problem.config.routing == RoutingMode::kSoft) {
    scores = reference::route(call.problem, operands).scores;
  }
  return reference::backward(call.problem, operands, saved_of<Real>(call, scores),
                             std::vector<Real>(d_out.begin(), d_out.end()));
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
  expect_rows_close("lse", call.lse.values(), naive.lse, exact.lse, DType::kF32, 1);
  expect_rows_close("k_mean", call.k_mean.values(), naive.k_mean, exact.k_mean, DType::kF32, d);
  if (problem.config.precision == Precision::kInt8 &&
      problem.config.routing == RoutingMode::kHard) {
    // One chunk on either side (stages/forward_queries.inc, reference/sparse.cpp)?
    const std::int64_t routed = max_routed_blocks(problem);
    const bool one_chunk = routed <= 16 && routed * problem.config.block_k <= 1024;
    expect_integers_close(call, given, naive.out_sparse,
                          one_chunk ? Chunks::kSame : Chunks::kOther);
  }
}

void expect_backward(Call& call) {
  const Problem& problem = call.problem;
  const DType dtype = problem.dtype;
  const std::int64_t d = problem.head_dim;
  const std::int64_t dv = problem.value_dim;
  const auto exact_d = naive_backward<double>(call);
  const auto naive_d = naive_backward<float>(call);
  expect_rows_close("d_q", call.d_q.values(), naive_d.d_q, exact_d.d_q, dtype, d);
  expect_rows_close("d_k", call.d_k.values(), naive_d.d_k, exact_d.d_k, dtype, d);
  expect_rows_close("d_v", call.d_v.values(), naive_d.d_v, exact_d.d_v, dtype, dv);
  const auto parameter = [&](const char* what, const Array<float>& ours, const auto& naive_of,
                             const auto& exact_of) {
    if (ours.size() > 0) expect_close(what, ours.values(), naive_of, exact_of, DType::kF32);
  };
  if (call.d_alpha_logit.size() > 0) {  // one sum over the rows and columns of a query block
    const auto terms = static_cast<double>(problem.config.block_q * problem.value_dim);
    expect_close("d_alpha_logit", call.d_alpha_logit.values(), naive_d.d_alpha_logit,
                 exact_d.d_alpha_logit, DType::kF32, std::max(kSumError, sum_error(terms)));
  }
  parameter("d_proj_q", call.d_proj_q, naive_d.d_proj_q, exact_d.d_proj_q);
  parameter("d_proj_k", call.d_proj_k, naive_d.d_proj_k, exact_d.d_proj_k);
  parameter("d_proj_out", call.d_proj_out, naive_d.d_proj_out, exact_d.d_proj_out);
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

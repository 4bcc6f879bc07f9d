// The CPU backend against the reference in double, forward and backward, under one routing.
#include "cpu/parity.h"

#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"
#include "reference/reference.h"

namespace sla2::test {
namespace {

/// One call: what is not set is small_problem's.
struct Case {
  std::string name;
  Problem problem;
  Layout layout = Layout::kDense;
  std::vector<std::int64_t> key_lengths;
};

std::vector<Case> size_cases() {
  std::vector<Case> cases;
  for (const std::int64_t d : {16, 64, 80, 128, 256}) {
    for (const Precision precision : {Precision::kFp32, Precision::kBf16, Precision::kInt8}) {
      Case c{std::string("d")
                 .append(std::to_string(d))
                 .append("_p")
                 .append(std::to_string(static_cast<int>(precision))),
             small_problem(75, 200, d, d),
             Layout::kDense,
             {}};
      c.problem.config.precision = precision;
      cases.push_back(c);
    }
  }
  for (const std::int64_t bq : {32, 64, 128, 256}) {
    for (const std::int64_t bk : {32, 64, 128, 256}) {
      Case c{std::string("bq").append(std::to_string(bq)).append("_bk").append(std::to_string(bk)),
             small_problem(300, 600, 32, 48),
             Layout::kDense,
             {}};
      c.problem.config.block_q = bq;
      c.problem.config.block_k = bk;
      c.problem.config.precision = bq == bk ? Precision::kFp32 : Precision::kInt8;
      cases.push_back(c);
    }
  }
  return cases;
}

template <typename Edit>
Case edited(const char* name, Edit edit, Layout layout = Layout::kDense) {
  Case c{name, small_problem(100, 230, 32, 48), layout, {}};
  c.problem.num_heads = 2;
  c.problem.num_kv_heads = 2;
  edit(c);
  return c;
}

std::vector<Case> option_cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, auto edit, Layout layout = Layout::kDense) {
    for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
      Case c = edited(name, edit, layout);
      c.problem.config.routing = mode;
      c.name += mode == RoutingMode::kHard ? "_hard" : "_soft";
      cases.push_back(c);
    }
  };
  add("plain", [](Case&) {});
  add("elu", [](Case& c) { c.problem.config.feature_map = FeatureMap::kElu; });
  add("relu", [](Case& c) { c.problem.config.feature_map = FeatureMap::kRelu; });
  add("raw_keys", [](Case& c) { c.problem.config.linear_keys = LinearKeys::kRaw; });
  add("scope_all", [](Case& c) { c.problem.config.linear_scope = LinearScope::kAll; });
  add("score_softmax", [](Case& c) { c.problem.config.score_norm = ScoreNorm::kSoftmax; });
  add("matched", [](Case& c) {
    c.problem.config.backward = BackwardMode::kMatched;
    c.problem.config.precision = Precision::kInt8;
  });
  add("paper_int8", [](Case& c) { c.problem.config.precision = Precision::kInt8; });
  add("sla", [](Case& c) { c.problem.config.method = Method::kSla; });
  add("keep_one", [](Case& c) { c.problem.config.keep = 1; });
  add("scale", [](Case& c) { c.problem.config.scale = 0.3; });
  add("protected", [](Case& c) { c.problem.protected_keys = {40, 70}; });
  add("lengths", [](Case& c) {
    c.problem.batch = 2;
    c.key_lengths = {230, 97};
  });
  add("grouped", [](Case& c) { c.problem.num_heads = 6; });
  add("head_routers", [](Case& c) {
    c.problem.num_routers = 2;
    c.problem.alpha_blocks = 4;
  });
  add(
      "bf16", [](Case& c) { c.problem.dtype = DType::kBF16; }, Layout::kTransposed);
  add(
      "fp16", [](Case& c) { c.problem.dtype = DType::kF16; }, Layout::kPadded);
  add("bf16_low", [](Case& c) {
    c.problem.dtype = DType::kBF16;
    c.problem.config.precision = Precision::kInt8;
  });
  add(
      "transposed", [](Case&) {}, Layout::kTransposed);
  add(
      "padded", [](Case& c) { c.problem.config.precision = Precision::kInt8; }, Layout::kPadded);
  add("one_token", [](Case& c) { c.problem.q_tokens = c.problem.k_tokens = 1; });
  add("one_block", [](Case& c) { c.problem.q_tokens = c.problem.k_tokens = 32; });
  return cases;
}

class Parity : public testing::TestWithParam<std::tuple<const char*, Case>> {};

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

/// Query rows of bf16 inputs with a sparse branch in fp32 arithmetic are exact products all the
/// same.
TEST_P(Parity, ForwardAndBackward) {
  const auto& [name, c] = GetParam();
  Problem problem = c.problem;
  problem.implementation = name;
  SLA2_SKIP_IF_REFUSED(problem, Pass::kForward);
  Call call(problem, 7, c.layout, c.key_lengths);
  const auto executor = make_thread_pool(2);
  call.run_forward(*executor);

  Problem exact_problem = problem;
  exact_problem.config.precision = Precision::kFp32;
  const auto given = routing_of<double>(call);
  const auto given_float = routing_of<float>(call);
  const auto exact = reference::forward(exact_problem, call.operands<double>(), &given);
  const auto naive = reference::forward(problem, call.operands<float>(), &given_float);
  const DType dtype = problem.dtype;
  expect_close("out", call.out.values(), naive.out, exact.out, dtype);
  expect_close("out_sparse", call.out_sparse.values(), naive.out_sparse, exact.out_sparse, dtype);
  expect_close("out_linear", call.out_linear.values(), naive.out_linear, exact.out_linear, dtype);
  expect_close("lse", call.lse.values(), naive.lse, exact.lse, DType::kF32);
  expect_close("k_mean", call.k_mean.values(), naive.k_mean, exact.k_mean, DType::kF32);

  call.run_backward(*executor);
  const auto exact_d = naive_backward<double>(call);
  const auto naive_d = naive_backward<float>(call);
  expect_close("d_q", call.d_q.values(), naive_d.d_q, exact_d.d_q, dtype);
  expect_close("d_k", call.d_k.values(), naive_d.d_k, exact_d.d_k, dtype);
  expect_close("d_v", call.d_v.values(), naive_d.d_v, exact_d.d_v, dtype);
  const auto parameter = [&](const char* what, const Array<float>& ours, const auto& naive_of,
                             const auto& exact_of) {
    if (ours.size() > 0) expect_close(what, ours.values(), naive_of, exact_of, DType::kF32);
  };
  parameter("d_alpha_logit", call.d_alpha_logit, naive_d.d_alpha_logit, exact_d.d_alpha_logit);
  parameter("d_proj_q", call.d_proj_q, naive_d.d_proj_q, exact_d.d_proj_q);
  parameter("d_proj_k", call.d_proj_k, naive_d.d_proj_k, exact_d.d_proj_k);
  parameter("d_proj_out", call.d_proj_out, naive_d.d_proj_out, exact_d.d_proj_out);
  EXPECT_TRUE(call.guards_intact());
}

std::string parity_name(const testing::TestParamInfo<std::tuple<const char*, Case>>& info) {
  std::string name = std::get<0>(info.param);
  name += '_';
  return name += std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(Sizes, Parity,
                         testing::Combine(testing::ValuesIn(kCpuImplementations),
                                          testing::ValuesIn(size_cases())),
                         parity_name);
INSTANTIATE_TEST_SUITE_P(Options, Parity,
                         testing::Combine(testing::ValuesIn(kCpuImplementations),
                                          testing::ValuesIn(option_cases())),
                         parity_name);

}  // namespace
}  // namespace sla2::test

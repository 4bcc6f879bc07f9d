// The CPU backend against the reference in double, forward and backward, under one routing.
#include "cpu/parity.h"

#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"

namespace sla2::test {
namespace {

using Case = ParityCase;

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

TEST_P(Parity, ForwardAndBackward) {
  const auto& [name, c] = GetParam();
  Problem problem = c.problem;
  problem.implementation = name;
  SLA2_SKIP_IF_REFUSED(problem, Pass::kForward);
  expect_parity(name, c);
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

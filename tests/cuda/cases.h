// The cases that every kernel runs, forward and backward.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "core/problems.h"

namespace sla2::test {

/// One call: what is not set is small_problem's.
struct Case {
  std::string name;
  Problem problem;
  Layout layout = Layout::kDense;
  std::vector<std::int64_t> key_lengths;
};
inline void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

inline const char* name_of(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kBF16 ? "bf16" : "f16";
}
inline const char* name_of(Precision precision) {
  switch (precision) {
    case Precision::kInt8:
      return "int8";
    case Precision::kFp8:
      return "fp8";
    case Precision::kBf16:
      return "round16";
    case Precision::kFp32:
      break;
  }
  return "exact";
}

inline constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
inline constexpr Precision kPrecisions[] = {Precision::kFp32, Precision::kBf16, Precision::kInt8,
                                            Precision::kFp8};

/// Every type x precision x head size, then every pair of block sizes.
inline std::vector<Case> size_cases() {
  std::vector<Case> cases;
  for (const std::int64_t d : {16, 64, 80, 128, 256}) {
    for (const DType dtype : kTypes) {
      for (const Precision precision : kPrecisions) {
        Case c;
        c.name = std::string("d").append(std::to_string(d)) + "_" + name_of(dtype) + "_" +
                 name_of(precision);
        c.problem = small_problem(75, 200, d, d);
        c.problem.dtype = dtype;
        c.problem.config.precision = precision;
        cases.push_back(c);
      }
    }
  }
  for (const std::int64_t bq : {32, 64, 128, 256}) {
    for (const std::int64_t bk : {32, 64, 128, 256}) {
      Case c;
      c.name = std::string("bq").append(std::to_string(bq)) + "_bk" + std::to_string(bk);
      c.problem = small_problem(300, 600, 32, 48);
      c.problem.dtype = DType::kBF16;
      c.problem.config.block_q = bq;
      c.problem.config.block_k = bk;
      c.problem.config.precision = bq == bk ? Precision::kBf16 : Precision::kInt8;
      cases.push_back(c);
    }
  }
  return cases;
}

/// Every option, hard and soft routing, in fp32 (exact formulas) and bf16.
inline std::vector<Case> option_cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, auto edit, Layout layout = Layout::kDense) {
    for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        Case c;
        c.problem = small_problem(100, 230, 32, 48);
        c.problem.num_heads = 2;
        c.problem.num_kv_heads = 2;
        c.problem.dtype = dtype;
        c.problem.config.routing = mode;
        c.problem.config.precision = dtype == DType::kF32 ? Precision::kFp32 : Precision::kBf16;
        c.layout = layout;
        edit(c);
        c.name = std::string(name) + (mode == RoutingMode::kHard ? "_hard_" : "_soft_") +
                 name_of(c.problem.dtype);
        cases.push_back(c);
      }
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
  add("int8", [](Case& c) { c.problem.config.precision = Precision::kInt8; });
  add("fp8", [](Case& c) { c.problem.config.precision = Precision::kFp8; });
  add("sla", [](Case& c) { c.problem.config.method = Method::kSla; });
  add("keep_one", [](Case& c) { c.problem.config.keep = 1; });
  add("scale", [](Case& c) { c.problem.config.scale = 0.3; });
  add("tau", [](Case& c) { c.problem.config.tau = 0.7; });
  add("sla_matched", [](Case& c) {
    c.problem.config.method = Method::kSla;
    c.problem.config.backward = BackwardMode::kMatched;
  });
  add("all_protected", [](Case& c) { c.problem.protected_keys = {0, 230}; });
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
      "transposed", [](Case&) {}, Layout::kTransposed);
  add(
      "padded", [](Case&) {}, Layout::kPadded);
  add(
      "padded_int8", [](Case& c) { c.problem.config.precision = Precision::kInt8; },
      Layout::kPadded);
  add(
      "wide_values",
      [](Case& c) {
        c.problem.head_dim = 64;
        c.problem.value_dim = 128;
      },
      Layout::kTransposed);
  add("one_token", [](Case& c) { c.problem.q_tokens = c.problem.k_tokens = 1; });
  add("one_block", [](Case& c) { c.problem.q_tokens = c.problem.k_tokens = 32; });
  return cases;
}

}  // namespace sla2::test

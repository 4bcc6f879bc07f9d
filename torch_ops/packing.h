// How a Config and a protected range travel through an operator's schema: `int[] options` and
// `float[] numbers`. (A str argument would be clearer, but torch 2.11's stable ABI leaks one string
// a call.) python/sla2/config.py packs in the same order; sla2::info() names it.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "sla2/config.h"
#include "sla2/error.h"
#include "sla2/problem.h"

namespace sla2::torch_ops {

inline constexpr std::array kOptionNames = {
    "block_q",     "block_k",      "feature_map", "precision", "routing",         "score_norm",
    "linear_keys", "linear_scope", "backward",    "method",    "protected_begin", "protected_end"};
inline constexpr std::array kNumberNames = {"keep", "tau", "scale"};  // scale 0: unset

/// Bits of sla2::backward's `wanted`, in the order of its results.
enum Wanted : std::int64_t {
  kWantQ = 1,
  kWantK = 2,
  kWantV = 4,
  kWantAlphaLogit = 8,
  kWantProjQ = 16,
  kWantProjK = 32,
  kWantProjOut = 64,
};

struct Packed {
  std::vector<std::int64_t> options;
  std::vector<double> numbers;
};

inline Packed pack(const Config& config, const TokenRange& protected_keys) {
  return {
      {config.block_q, config.block_k, static_cast<std::int64_t>(config.feature_map),
       static_cast<std::int64_t>(config.precision), static_cast<std::int64_t>(config.routing),
       static_cast<std::int64_t>(config.score_norm), static_cast<std::int64_t>(config.linear_keys),
       static_cast<std::int64_t>(config.linear_scope), static_cast<std::int64_t>(config.backward),
       static_cast<std::int64_t>(config.method), protected_keys.begin, protected_keys.end},
      {config.keep, config.tau, config.scale.value_or(0.0)}};
}

/// Throws sla2::Error unless the lists have the lengths above and the enumerators fit a byte; the
/// values are checked where the problem is.
inline std::pair<Config, TokenRange> unpack(const std::vector<std::int64_t>& options,
                                            const std::vector<double>& numbers) {
  if (options.size() != kOptionNames.size()) {
    throw Error("options must have " + std::to_string(kOptionNames.size()) + " values, got " +
                std::to_string(options.size()));
  }
  if (numbers.size() != kNumberNames.size()) {
    throw Error("numbers must have " + std::to_string(kNumberNames.size()) + " values, got " +
                std::to_string(numbers.size()));
  }
  for (std::size_t i = 2; i < 10; ++i) {
    if (options[i] < 0 || options[i] > 255) {
      throw Error(std::string(kOptionNames[i]) + " must be one of its named values, got " +
                  std::to_string(options[i]));
    }
  }
  Config config;
  config.block_q = options[0];
  config.block_k = options[1];
  config.feature_map = static_cast<FeatureMap>(options[2]);
  config.precision = static_cast<Precision>(options[3]);
  config.routing = static_cast<RoutingMode>(options[4]);
  config.score_norm = static_cast<ScoreNorm>(options[5]);
  config.linear_keys = static_cast<LinearKeys>(options[6]);
  config.linear_scope = static_cast<LinearScope>(options[7]);
  config.backward = static_cast<BackwardMode>(options[8]);
  config.method = static_cast<Method>(options[9]);
  config.keep = numbers[0];
  config.tau = numbers[1];
  if (numbers[2] != 0.0) config.scale = numbers[2];
  return {config, {options[10], options[11]}};
}

}  // namespace sla2::torch_ops

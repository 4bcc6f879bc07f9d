// What random problems are drawn with.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <string>

namespace sla2::test {

/// A number from an environment variable, or `otherwise`.
inline std::uint64_t environment(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::stoull(text);
}

/// Draws from one seed: the same on every machine but for chance().
struct Random {
  std::mt19937_64 generator;
  template <typename T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[generator() % values.size()];
  }
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low +
           static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool chance(double p) { return std::uniform_real_distribution<double>()(generator) < p; }
};

}  // namespace sla2::test

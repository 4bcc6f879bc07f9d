// Seeded damage to bytes and to JSON text.
#pragma once

#include <cstdint>
#include <random>
#include <string>

namespace sla2::io::test {

/// SLA2_FUZZ_SEED, or a fixed one; printed, so that a failure can be repeated.
std::uint64_t fuzz_seed();

/// The same seed gives the same damage on every machine.
class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  /// In [0, bound).
  std::size_t below(std::size_t bound) { return bound == 0 ? 0 : random_() % bound; }
  /// One to four changes: bits, bytes, ranges cut, copied or moved, the end cut off.
  std::string bytes(std::string text);
  /// The same and changes that know JSON: numbers, words, brackets and whole members.
  std::string json(std::string text);

 private:
  void change_bytes(std::string& text);
  void change_json(std::string& text);

  std::mt19937_64 random_;
};

}  // namespace sla2::io::test

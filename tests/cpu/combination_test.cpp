// Options together: seeded sets of problems in which every pair of values of two options occurs,
// and on small sizes every four values of four, each against the reference in double, forward and
// backward.
#include <array>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"
#include "cpu/parity.h"

namespace sla2::test {
namespace {

/// How many values each option has; a choice is one index an option, in this order.
enum Option : std::size_t {
  kHeadDim,     // 16, 64, 80, 128, 256
  kValueDim,    // the same
  kBlockQ,      // 32, 64, 128, 256
  kBlockK,      // the same
  kPrecision,   // fp32, bf16, int8
  kType,        // fp32, bf16, fp16
  kRouting,     // hard, soft
  kFeatures,    // softmax, elu, relu
  kScoreNorm,   // none, softmax
  kKeys,        // smoothed, raw
  kScope,       // complement, all
  kMode,        // paper, matched
  kMethod,      // sla2, sla
  kLayout,      // dense, transposed, padded
  kHeads,       // one; two; two that share keys
  kLengths,     // full; padded keys
  kProtected,   // none; a few tokens
  kParameters,  // a layer's; a head's, with alpha per block
  kNumOptions
};
constexpr std::array<int, kNumOptions> kValues{5, 5, 4, 4, 3, 3, 2, 3, 2,
                                               2, 2, 2, 2, 3, 3, 2, 2, 2};
constexpr std::size_t kNumSizes = 4;  // the first ones
using Choice = std::array<int, kNumOptions>;

/// Values of some options, eight bits each: option and value. At most eight of them.
using Tuple = std::uint64_t;
Tuple extend(Tuple tuple, std::size_t option, int value) {
  return tuple << 8 | option << 3 | static_cast<Tuple>(value);
}

/// Every tuple of `strength` options from `first` on, with their values in the choice.
template <typename Visit>
void for_each_tuple(const Choice& choice, std::size_t first, int strength, const Visit& visit,
                    Tuple tuple = 0) {
  if (strength == 0) {
    visit(tuple);
    return;
  }
  for (std::size_t at = first; at < kNumOptions; ++at) {
    for_each_tuple(choice, at + 1, strength - 1, visit, extend(tuple, at, choice[at]));
  }
}

/// The same over all values.
void add_tuples(std::size_t first, int strength, Tuple tuple, std::set<Tuple>& tuples) {
  if (strength == 0) {
    tuples.insert(tuple);
    return;
  }
  for (std::size_t at = first; at < kNumOptions; ++at) {
    for (int value = 0; value < kValues[at]; ++value) {
      add_tuples(at + 1, strength - 1, extend(tuple, at, value), tuples);
    }
  }
}

/// Choices in which every tuple of values of `strength` options from `first` on occurs; those
/// before take one of their two lowest values. Greedy: a tuple that is still missing, the rest at
/// random, the best of a few such tries.
std::vector<Choice> covering_choices(std::size_t first, int strength) {
  std::mt19937_64 generator(20260212);
  std::set<Tuple> missing;
  add_tuples(first, strength, 0, missing);
  std::vector<Choice> choices;
  while (!missing.empty()) {
    Choice best{};
    int most = -1;
    for (int attempt = 0; attempt < 10; ++attempt) {
      Choice choice{};
      for (std::size_t at = 0; at < kNumOptions; ++at) {
        const int values = at < first ? 2 : kValues[at];
        choice[at] = static_cast<int>(generator() % static_cast<std::uint64_t>(values));
      }
      for (Tuple tuple = *missing.begin(); tuple != 0; tuple >>= 8) {
        choice[tuple >> 3 & 31] = static_cast<int>(tuple & 7);
      }
      int found = 0;
      for_each_tuple(choice, first, strength,
                     [&](Tuple tuple) { found += missing.contains(tuple) ? 1 : 0; });
      if (found > most) {
        most = found;
        best = choice;
      }
    }
    for_each_tuple(best, first, strength, [&](Tuple tuple) { missing.erase(tuple); });
    choices.push_back(best);
  }
  return choices;
}

ParityCase case_of(const Choice& choice) {
  constexpr std::array<std::int64_t, 5> kDims{16, 64, 80, 128, 256};
  const std::int64_t bq = 32LL << choice[kBlockQ];
  const std::int64_t bk = 32LL << choice[kBlockK];
  // Two query blocks and three key blocks, the last ones short.
  ParityCase c{"",
               small_problem(bq + 7, 2 * bk + 5, kDims[choice[kHeadDim]], kDims[choice[kValueDim]]),
               static_cast<Layout>(choice[kLayout]),
               {}};
  Problem& p = c.problem;
  p.config.block_q = bq;
  p.config.block_k = bk;
  p.config.precision =
      std::array{Precision::kFp32, Precision::kBf16, Precision::kInt8}[choice[kPrecision]];
  p.dtype = static_cast<DType>(choice[kType]);
  p.config.routing = static_cast<RoutingMode>(choice[kRouting]);
  p.config.feature_map = static_cast<FeatureMap>(choice[kFeatures]);
  p.config.score_norm = static_cast<ScoreNorm>(choice[kScoreNorm]);
  p.config.linear_keys = static_cast<LinearKeys>(choice[kKeys]);
  p.config.linear_scope = static_cast<LinearScope>(choice[kScope]);
  p.config.backward = static_cast<BackwardMode>(choice[kMode]);
  p.config.method = static_cast<Method>(choice[kMethod]);
  p.num_heads = choice[kHeads] == 0 ? 1 : 2;
  p.num_kv_heads = choice[kHeads] == 1 ? 2 : 1;
  if (choice[kLengths] == 1) {
    p.batch = 2;
    c.key_lengths = {p.k_tokens, bk + 3};
  }
  if (choice[kProtected] == 1) p.protected_keys = {bk - 2, bk + 2};
  if (choice[kParameters] == 1) {
    p.num_routers = p.num_heads;
    p.alpha_blocks = num_q_blocks(p);
  }
  for (const int value : choice) c.name += static_cast<char>('0' + value);
  return c;
}

class Combinations : public testing::TestWithParam<const char*> {};

void expect_parity_of(const char* implementation, const std::vector<Choice>& choices) {
  Problem probe = small_problem(32, 32, 16, 16);
  probe.implementation = implementation;
  SLA2_SKIP_IF_REFUSED(probe, Pass::kForward);
  testing::Test::RecordProperty("combinations", static_cast<int>(choices.size()));
  for (const Choice& choice : choices) {
    const ParityCase c = case_of(choice);
    SCOPED_TRACE(c.name);
    expect_parity(implementation, c);
  }
}

TEST_P(Combinations, OfTwoAgreeWithTheReference) {
  expect_parity_of(GetParam(), covering_choices(0, 2));
}

TEST_P(Combinations, OfFourAgreeWithTheReference) {
  expect_parity_of(GetParam(), covering_choices(kNumSizes, 4));
}

INSTANTIATE_TEST_SUITE_P(All, Combinations, testing::ValuesIn(kCpuImplementations),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace sla2::test

// Options together: a seeded set of problems in which every pair of values of two options occurs,
// each against the reference in double, forward and backward.
#include <array>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <tuple>
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
using Choice = std::array<int, kNumOptions>;
using Pair = std::tuple<std::size_t, int, std::size_t, int>;

template <typename Visit>
void for_each_pair(const Choice& choice, Visit visit) {
  for (std::size_t a = 0; a < kNumOptions; ++a) {
    for (std::size_t b = a + 1; b < kNumOptions; ++b) visit(Pair{a, choice[a], b, choice[b]});
  }
}

std::set<Pair> every_pair() {
  std::set<Pair> pairs;
  for (std::size_t a = 0; a < kNumOptions; ++a) {
    for (std::size_t b = a + 1; b < kNumOptions; ++b) {
      for (int x = 0; x < kValues[a]; ++x) {
        for (int y = 0; y < kValues[b]; ++y) pairs.insert({a, x, b, y});
      }
    }
  }
  return pairs;
}

/// Greedy: a pair that is still missing, the rest at random, the best of a few such tries.
std::vector<Choice> covering_choices() {
  std::mt19937_64 generator(20260212);
  std::set<Pair> missing = every_pair();
  std::vector<Choice> choices;
  while (!missing.empty()) {
    Choice best{};
    int most = -1;
    for (int attempt = 0; attempt < 10; ++attempt) {
      Choice choice{};
      for (std::size_t at = 0; at < kNumOptions; ++at) {
        choice[at] = static_cast<int>(generator() % static_cast<std::uint64_t>(kValues[at]));
      }
      const auto [a, x, b, y] = *missing.begin();
      choice[a] = x;
      choice[b] = y;
      int found = 0;
      for_each_pair(choice, [&](const Pair& pair) { found += missing.count(pair) ? 1 : 0; });
      if (found > most) {
        most = found;
        best = choice;
      }
    }
    for_each_pair(best, [&](const Pair& pair) { missing.erase(pair); });
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

TEST_P(Combinations, AgreeWithTheReference) {
  Problem probe = small_problem(32, 32, 16, 16);
  probe.implementation = GetParam();
  SLA2_SKIP_IF_REFUSED(probe, Pass::kForward);
  const std::vector<Choice> choices = covering_choices();
  RecordProperty("combinations", static_cast<int>(choices.size()));
  for (const Choice& choice : choices) {
    const ParityCase c = case_of(choice);
    SCOPED_TRACE(c.name);
    expect_parity(GetParam(), c);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Combinations, testing::ValuesIn(kCpuImplementations),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace sla2::test

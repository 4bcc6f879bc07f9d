// One random problem of the public API from one seed: shapes, options, layouts, values, routing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/problems.h"
#include "core/random.h"
#include "sla2/sla2.h"

namespace sla2::test {

/// What the tensors hold, and so what may be asked of the results.
enum class Values {
  kNormal,      // moderate, zeros and denormals among them: judged by the error rule
  kFp16Limits,  // +-65504: finite, the averages within the range of v
  kTiny,        // down to denormals: the same
  kConstant,    // rows all equal: the same
  kHuge,        // up to the type's largest: sums overflow; nothing is written outside
  kNonFinite,   // NaN, Inf at a few places: the same, and rows that do not read them are unchanged
};

struct FuzzCase {
  Problem problem;
  Layout layout = Layout::kDense;
  Values values = Values::kNormal;
  std::vector<std::int64_t> key_lengths;
  bool given_routing = false;
  std::int64_t threads = 1;

  [[nodiscard]] std::string text() const;
};

/// A valid problem.
[[nodiscard]] FuzzCase random_case(Random& random);

/// The call of a case, its inputs filled. kNonFinite starts as kNormal; see spoil().
[[nodiscard]] Call make_fuzz_call(const FuzzCase& c, Random& random);

/// Where spoil() put what is not finite.
struct Spoilt {
  enum class Where { kQ, kK, kV } where = Where::kQ;
  std::int64_t batch = 0, head = 0, token = 0;  // head of q, or of k and v
};
Spoilt spoil(Call& call, Random& random);

/// Fills the call's blocks (hard) or logits (soft) with a valid routing of random blocks.
void fill_routing(Call& call, Random& random);

}  // namespace sla2::test

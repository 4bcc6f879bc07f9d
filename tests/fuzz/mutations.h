// One broken rule at a time: what each call must refuse by sla2::Error before it writes anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "fuzz/fuzz_case.h"

namespace sla2::test {

/// The arguments of a call, and copies of what a mutation may change behind a pointer.
struct Arguments {
  Problem problem;
  Pass pass = Pass::kForward;
  Inputs inputs;
  Outputs outputs;
  Saved saved;
  ConstView d_out;
  Gradients gradients;
  std::span<std::byte> workspace;
  std::vector<std::int64_t> key_lengths;
  std::vector<std::int32_t> blocks;
  std::vector<float> numbers;

  void run(Executor& executor) const;
};

struct Mutation {
  const char* name;
  /// False if it does not apply to these arguments.
  bool (*apply)(Arguments&, Random&);
};

[[nodiscard]] std::span<const Mutation> mutations();

}  // namespace sla2::test

// Measuring one pass of the operator. Links sla2 alone.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "sla2/sla2.h"

namespace sla2::bench {

struct Seconds {
  double median = 0, quartile1 = 0, quartile3 = 0;
};

/// Quartiles of `repeats` runs after one that is not counted.
Seconds measure(const std::function<void()>& run, std::int64_t repeats);
Seconds quartiles(std::vector<double> samples);

struct Result {
  Seconds forward, backward;  // zero if not asked for
  const char* forward_implementation = "";
  const char* backward_implementation = "";
  double workspace_mib = 0;  // the larger of the two passes
};

/// Random normal inputs of `problem`; the router is the identity, alpha 1/2.
Result measure_operator(const Problem& problem, Executor& executor, std::int64_t repeats,
                        bool with_backward);

/// TFLOP/s of full attention done in this time: 4 Nq Nk d forward, 2.5 times that backward.
double effective_tflops(const Problem& problem, Pass pass, double seconds);

}  // namespace sla2::bench

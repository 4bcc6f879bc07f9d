// The operator as somebody would write it with the tensor operations of a framework in a 16-bit
// type: every product's result and every operand is rounded to the type, sums and softmax run in
// fp32. Its error is the yardstick of the kernels' error for 16-bit inputs.
#pragma once

#include <random>
#include <vector>

#include "reference/reference.h"
#include "sla2/sla2.h"

namespace sla2::test {

/// `given` holds blocks or logits. The sparse branch is the reference's in fp32, which already
/// rounds what its precision says; its output is rounded here.
reference::ForwardResult<float> plain16_forward(const Problem& problem,
                                                const reference::Operands<float>& operands,
                                                const reference::RoutingResult<float>& given);

/// saved.routing.scores are set if the router learns. `dither`: every rounding goes up or down at
/// random, the nearer way more often; the mean square of its error is twice that of the nearest.
reference::GradientResult<float> plain16_backward(const Problem& problem,
                                                  const reference::Operands<float>& operands,
                                                  const reference::ForwardResult<float>& saved,
                                                  const std::vector<float>& d_out,
                                                  std::mt19937_64* dither = nullptr);

}  // namespace sla2::test

// The naive run of the linear branch where a backend multiplies in bf16: plain float loops that
// round what a bf16 product takes, and nothing else.
#pragma once

#include "core/problems.h"
#include "reference/reference.h"

namespace sla2::test {

/// True if the linear branch of the forward may use bf16 products: int8 and bf16, except where soft
/// routing makes int8 fp32, and fp16's products, which are fp16's.
[[nodiscard]] bool has_bf16_linear_branch(const Problem& problem);

/// Replaces naive.out_linear, and its share of naive.out, by the run with roundings.
void round_linear_branch(Call& call, const reference::RoutingResult<float>& routing,
                         reference::ForwardResult<float>& naive);

}  // namespace sla2::test

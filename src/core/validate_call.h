// What a call passes must fit its problem. Each function throws sla2::Error naming the argument,
// the rule and the value received.
#pragma once

#include "sla2/attention.h"

namespace sla2 {

/// `pass` kRoute reads neither v nor a given routing.
void check_inputs(const Problem& problem, const Inputs& inputs, Pass pass);
void check_routing_output(const Problem& problem, const Routing& routing);
void check_outputs(const Problem& problem, const Inputs& inputs, const Outputs& outputs);
void check_saved(const Problem& problem, const Inputs& inputs, const Saved& saved, ConstView d_out);
void check_gradients(const Problem& problem, const Inputs& inputs, const Saved& saved,
                     ConstView d_out, const Gradients& gradients);

}  // namespace sla2

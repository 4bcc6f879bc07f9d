// The way of every call, to read first: check what came in, select an implementation, check the
// workspace, run.
#include "sla2/attention.h"

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/message.h"
#include "core/validate_call.h"
#include "sla2/implementation.h"

namespace sla2 {
namespace {

constexpr std::size_t kAlignment = 64;

/// The selected implementation and the context it gets: a workspace of the size that it asked for,
/// aligned to 64 bytes whatever the caller's alignment.
struct Plan {
  const Implementation& implementation;
  Context context;
};

Plan make_plan(const Problem& problem, Pass pass, const Context& caller) {
  const Implementation& implementation = select_implementation(problem, pass);
  const std::int64_t num_threads = caller.executor.num_threads();
  require(num_threads >= 1, "executor must have at least one thread, got ", num_threads);
  const std::size_t wanted = implementation.workspace_bytes(problem, pass, num_threads);
  if (wanted == 0)
    return {implementation, {caller.executor, {}, caller.stream, caller.after_stage}};

  require(caller.workspace.data() != nullptr && caller.workspace.size() >= wanted + kAlignment,
          "workspace must hold at least ", wanted + kAlignment, " bytes, got ",
          caller.workspace.size());
  const std::size_t misalignment =
      reinterpret_cast<std::uintptr_t>(caller.workspace.data()) % kAlignment;
  const std::size_t skip = misalignment == 0 ? 0 : kAlignment - misalignment;
  return {
      implementation,
      {caller.executor, caller.workspace.subspan(skip, wanted), caller.stream, caller.after_stage}};
}

}  // namespace

std::size_t workspace_bytes(const Problem& problem, Pass pass, std::int64_t num_threads) {
  validate(problem);
  require(num_threads >= 1 && num_threads <= 1024, "num_threads must be in [1, 1024], got ",
          num_threads);
  const std::size_t wanted =
      select_implementation(problem, pass).workspace_bytes(problem, pass, num_threads);
  return wanted == 0 ? 0 : wanted + kAlignment;
}

void route(const Problem& problem, const Inputs& inputs, const Routing& routing,
           const Context& context) {
  validate(problem);
  check_inputs(problem, inputs, Pass::kRoute);
  check_routing_output(problem, routing);
  const Plan plan = make_plan(problem, Pass::kRoute, context);
  plan.implementation.route(problem, inputs, routing, plan.context);
}

void forward(const Problem& problem, const Inputs& inputs, const Outputs& outputs,
             const Context& context) {
  validate(problem);
  check_inputs(problem, inputs, Pass::kForward);
  check_outputs(problem, inputs, outputs);
  const Plan plan = make_plan(problem, Pass::kForward, context);
  plan.implementation.forward(problem, inputs, outputs, plan.context);
}

void backward(const Problem& problem, const Inputs& inputs, const Saved& saved, ConstView d_out,
              const Gradients& gradients, const Context& context) {
  validate(problem);
  check_inputs(problem, inputs, Pass::kBackward);
  check_saved(problem, inputs, saved, d_out);
  check_gradients(problem, inputs, saved, d_out, gradients);
  const Plan plan = make_plan(problem, Pass::kBackward, context);
  plan.implementation.backward(problem, inputs, saved, d_out, gradients, plan.context);
}

}  // namespace sla2

// The backend as core sees it: what it refuses, and the launches of a call in order.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cuda/backward_plan.h"
#include "cuda/cuda.h"
#include "cuda/machine.h"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

/// Threads' blocks of the largest launch, were it one dimension of 64 bits.
std::int64_t largest_grid(const Problem& p) {
  const std::int64_t query_blocks = p.batch * p.num_heads * num_q_blocks(p);
  const std::int64_t key_blocks = p.batch * p.num_heads * num_k_blocks(p, p.k_tokens);
  const std::int64_t states =
      p.batch * p.num_heads * (num_q_blocks(p) / 64 + 1) * (p.head_dim * p.value_dim / 64 + 2);
  return 8 * (query_blocks + key_blocks) + states + p.batch * p.num_heads * p.q_tokens / 8;
}

std::string refusal(const Problem& p, Pass pass) {
  DeviceInfo device;
  try {
    device = device_info();
  } catch (const Error& error) {
    return std::string("no usable GPU: ") + error.what();
  }
  const std::string capability = std::to_string(device.major) + "." + std::to_string(device.minor);
  if (device.major < 8)
    return "it needs compute capability 8.0 or later, this GPU has " + capability;
  const bool fp8 = pass == Pass::kForward && p.config.precision == Precision::kFp8 &&
                   p.config.routing == RoutingMode::kHard;
  if (fp8 && device.major * 10 + device.minor < 89) {
    return "fp8 needs compute capability 8.9 or later, this GPU has " + capability;
  }
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (p.q_tokens > kMost - 512 || p.k_tokens > kMost - 512 || largest_grid(p) > kMost) {
    return "the problem has more blocks than a launch can take, 2^31";
  }
  if (pass == Pass::kBackward && p.batch * p.num_heads > 65535) {
    return "batch * num_heads must be at most 65535 in a backward, got " +
           std::to_string(p.batch * p.num_heads);
  }
  return {};
}

void take_forward(Call& call, Arena& arena) {
  take_router(call, arena);
  take_weights(call, arena);
  take_queries(call, arena);
  take_keys(call, arena);
  take_states(call, arena);
  take_sla_rows(call, arena);
}

}  // namespace

std::vector<Stage> forward_stages(const Call& call) {
  const bool given = call.given_blocks != nullptr || call.given_logits != nullptr;
  std::vector<Stage> stages{{"reduce", reduce}, {"mean", finish_mean}};
  if (!given) stages.push_back({"project", project});
  stages.insert(
      stages.end(),
      {{"route", route}, {"keys", prepare_keys}, {"states", sum_states}, {"attend", attend}});
  if (call.is_sla) stages.push_back({"project_out", project_out});
  return stages;
}

Call make_forward(const Problem& problem, const Inputs& inputs, const Outputs& outputs,
                  std::byte* workspace) {
  Call call = describe(problem);
  set_inputs(call, inputs);
  call.out = rows_of(outputs.out);
  call.out_sparse = rows_of(outputs.out_sparse);
  call.out_linear = rows_of(outputs.out_linear);
  call.lse = outputs.lse;
  call.k_mean = outputs.k_mean;
  call.blocks = outputs.routing.blocks;
  call.logits = outputs.routing.logits;
  Arena arena(workspace);
  take_forward(call, arena);
  if (call.given_blocks != nullptr || call.given_logits != nullptr) call.pooled_q = nullptr;
  return call;
}

namespace {

std::size_t workspace_bytes(const Problem& problem, Pass pass, std::int64_t /*num_threads*/) {
  if (pass == Pass::kBackward) return backward_bytes(problem);
  Call call = describe(problem);
  Arena arena(nullptr);
  if (pass == Pass::kRoute) {
    take_router(call, arena);
  } else {
    take_forward(call, arena);
  }
  return arena.used();
}

void run_route(const Problem& problem, const Inputs& inputs, const Routing& routing,
               const Context& context) {
  Call call = describe(problem);
  set_inputs(call, inputs);
  call.blocks = routing.blocks;
  call.logits = routing.logits;
  Arena arena(context.workspace.data());
  take_router(call, arena);
  reduce(call, context.stream);
  finish_mean(call, context.stream);
  project(call, context.stream);
  route(call, context.stream);
}

void run_forward(const Problem& problem, const Inputs& inputs, const Outputs& outputs,
                 const Context& context) {
  const Call call = make_forward(problem, inputs, outputs, context.workspace.data());
  for (const Stage& stage : forward_stages(call)) {
    stage.run(call, context.stream);
    if (context.after_stage != nullptr) (*context.after_stage)(stage.name);
  }
}

}  // namespace

const Implementation kImplementation = {
#if defined(SLA2_EMULATE)
    "emulated",
#else
    "cuda",
#endif
    Device::kCuda, refusal, workspace_bytes, run_route, run_forward, run_backward, &kMachine};

}  // namespace sla2::SLA2_CUDA_ROOM

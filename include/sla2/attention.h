// The operator: route, forward, backward (symbols and maths: docs/operator.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "sla2/executor.h"
#include "sla2/problem.h"
#include "sla2/tensor.h"

namespace sla2 {

/// Learned parameters, fp32, dense. Null pointers mean the start values.
struct Parameters {
  const float* proj_q = nullptr;       // [num_routers, d, d], applied as x @ W; null: identity
  const float* proj_k = nullptr;       // [num_routers, d, d]; null: identity
  const float* alpha_logit = nullptr;  // [H, alpha_blocks]; null: zeros
  const float* proj_out = nullptr;     // [dv, dv], method sla only; null: zeros
};

/// Which key blocks a query block reads exactly.
template <typename Int, typename Float>
struct BasicRouting {
  Int* blocks = nullptr;  // [B, H, M, L] int32: ascending, -1 behind the last
  Float* logits =
      nullptr;  // [B, H, M, T] fp32, soft routing only: x with m = sigmoid(x);
                // +inf: m = 1 (protected), -inf: m = 0; blocks behind a key length: -inf
};
using Routing = BasicRouting<std::int32_t, float>;
using ConstRouting = BasicRouting<const std::int32_t, const float>;

struct Inputs {
  ConstView q;  // [B, H, Nq, d]
  ConstView k;  // [B, Hkv, Nk, d]
  ConstView v;  // [B, Hkv, Nk, dv]
  Parameters parameters;
  const std::int64_t* key_lengths = nullptr;  // [B], each in [1, Nk]; null: Nk
  ConstRouting routing;  // given instead of computed when set: blocks (hard) or logits (soft)
};

struct Outputs {
  View out;              // [B, H, Nq, dv]
  View out_sparse;       // [B, H, Nq, dv] o_s; empty: not wanted (inference)
  View out_linear;       // [B, H, Nq, dv] o_l (before proj_out); empty: not wanted
  float* lse = nullptr;  // [B, H, Nq], natural log, smoothed keys, log m included; null: not wanted
  float* k_mean = nullptr;  // [B, Hkv, d]; null: not wanted
  Routing routing;          // what was used; blocks null: not wanted; soft routing: blocks hold the
                            // hard choice at the same scores, for display only
};

/// What the backward needs of the forward, besides its inputs.
struct Saved {
  ConstView out_sparse;           // [B, H, Nq, dv]
  ConstView out_linear;           // [B, H, Nq, dv]
  const float* lse = nullptr;     // [B, H, Nq]
  const float* k_mean = nullptr;  // [B, Hkv, d]
  ConstRouting routing;           // blocks (hard) or logits (soft)
};

/// Gradients of the loss; an empty view or null pointer is not computed. They are overwritten.
struct Gradients {
  View d_q;                        // [B, H, Nq, d]
  View d_k;                        // [B, Hkv, Nk, d]; rows behind a key length are zero
  View d_v;                        // [B, Hkv, Nk, dv]
  float* d_alpha_logit = nullptr;  // [H, alpha_blocks], summed over the batch
  float* d_proj_q = nullptr;       // [num_routers, d, d]; soft routing only
  float* d_proj_k = nullptr;       // [num_routers, d, d]; soft routing only
  float* d_proj_out = nullptr;     // [dv, dv]; method sla only
};

/// Where a call runs.
struct Context {
  Executor& executor;
  std::span<std::byte>
      workspace;           // at least workspace_bytes(...), aligned to 64 bytes; see workspace.h
  void* stream = nullptr;  // cudaStream_t for Device::kCuda
  /// Called after each stage (Device::kCuda: each launch) with its name, for benchmarks; null:
  /// nobody.
  const std::function<void(const char* stage)>* after_stage = nullptr;
};

enum class Pass : std::uint8_t { kRoute, kForward, kBackward };

/// Bytes of workspace that `pass` needs with `num_threads` workers. Throws sla2::Error as the call
/// itself would for an invalid problem.
[[nodiscard]] std::size_t workspace_bytes(const Problem& problem, Pass pass,
                                          std::int64_t num_threads);

/// Steps 0 and 1 (Eq. 15-17): smooth, pool, score, choose. Writes routing.blocks and, with soft
/// routing, routing.logits. Throws sla2::Error for a view that does not fit the problem, a
/// workspace that is too small, or when no implementation supports the problem.
void route(const Problem& problem, const Inputs& inputs, const Routing& routing,
           const Context& context);

/// Steps 0 to 4 (Alg. 2). Throws as route() does.
void forward(const Problem& problem, const Inputs& inputs, const Outputs& outputs,
             const Context& context);

/// Alg. 3, corrected. Throws as route() does.
void backward(const Problem& problem, const Inputs& inputs, const Saved& saved, ConstView d_out,
              const Gradients& gradients, const Context& context);

}  // namespace sla2

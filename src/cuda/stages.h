// The stages of the forward, each one launch on `stream` (cudaStream_t), in the order of a call.
// Each reads and writes the fields of Call that it names; none waits for the device.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/plan.h"

namespace sla2::SLA2_CUDA_ROOM {

/// k_sums, v_amax (if set), pooled_q (if set); q_low, q_scale and phi_q if q_low is set.
void reduce(const Call& call, void* stream);
/// k_mean and v_scale (if set) from k_sums and v_amax.
void finish_mean(const Call& call, void* stream);
/// routed_q, routed_k.
void project(const Call& call, void* stream);
/// scores, blocks, logits, unless a routing is given (then only what it leaves open); rest and
/// complement_empty if set.
void route(const Call& call, void* stream);
/// k_low, v_low, k_scale (if k_low is set) and h (if set), from k, v and k_mean.
void prepare_keys(const Call& call, void* stream);
/// sums = rest h.
void sum_states(const Call& call, void* stream);

/// c [heads, m, n] = a b, or a^T b: a is [heads, m, a_pitch] or, by_k, [heads, k, a_pitch], b
/// [heads / group, k, n]; n a multiple of 8, a_pitch of 32.
struct BlockSums {
  Terms a, b, c;
  std::int64_t a_pitch = 0, n = 0, heads = 0;
  int m = 0, k = 0, group = 1;
  bool by_k = false;
  // Where keys have lengths, only their blocks of b exist: of `bk` keys, one length for each
  // `lengths_heads` heads.
  const std::int64_t* key_lengths = nullptr;
  int lengths_heads = 1, bk = 1;
};
void sum_blocks(const BlockSums& sums, void* stream);

/// Sparse branch, linear branch, mix: out, out_sparse, out_linear, lse; method sla: sparse_rows and
/// linear_rows instead of out.
void attend(const Call& call, void* stream);
/// out = o_s + o_l proj_out (method sla).
void project_out(const Call& call, void* stream);

struct Stage {
  const char* name;
  void (*run)(const Call&, void* stream);
};
/// The launches of a forward, in order.
[[nodiscard]] std::vector<Stage> forward_stages(const Call& call);
/// The call with its workspace carved.
[[nodiscard]] Call make_forward(const Problem& problem, const Inputs& inputs,
                                const Outputs& outputs, std::byte* workspace);

}  // namespace sla2::SLA2_CUDA_ROOM

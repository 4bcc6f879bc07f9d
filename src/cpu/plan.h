// Who owns what during a call: the workspace, carved, and the job of each head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/back.h"
#include "cpu/job.h"
#include "sla2/attention.h"

namespace sla2::cpu {

/// Hands out pieces of the workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(std::int64_t count) {
    const auto at = used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  [[nodiscard]] std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

/// What the driver itself keeps in the workspace, beside the job's pointers.
struct DriverBuffers {
  float* alpha = nullptr;                     // [M]
  unsigned char* complement_empty = nullptr;  // [M]
  std::int32_t* blocks = nullptr;             // [M, L]
  float* logits = nullptr;                    // [M, T]
  float* log_m = nullptr;                     // [M, T]
  float* rest = nullptr;                      // [M, T]
  std::uint16_t* rest16 = nullptr;            // [M, rest_stride(T)], forward
  float* routed_k_t = nullptr;                // [d, T rounded up to 16], packed
  double* soft = nullptr;                     // [workers, T]
  std::int32_t* ranks = nullptr;              // [M, L] or, soft, [M, T]
  std::int32_t* turns = nullptr;              // [T]
  std::int32_t* readers = nullptr;            // [M * L], hard
  std::int32_t* readers_begin = nullptr;      // [T + 1], hard
  float* d_scores = nullptr;                  // [M, T rounded up to 16]
  float* router_rows = nullptr;               // [max(M, T), d]
  float* proj_out_t = nullptr;                // [dv, dv]
  float* d_k = nullptr;                       // [T, bk, d]
  float* d_v = nullptr;                       // [T, bk, dv]
};

/// A call on one instruction set.
struct Call {
  const Problem& problem;
  const Inputs& inputs;
  Executor& executor;
  const Kernels& kernels;
  Job job;    // of the current head
  Back back;  // backward only
  DriverBuffers own;
  std::int64_t L, T, padded_T;
};

/// The backward's products are in bf16.
[[nodiscard]] bool has_bf16_products(const Problem& problem, const Kernels& kernels);
/// Carves the workspace for `pass` and fills what does not depend on the head.
void lay_out(const Problem& problem, Pass pass, std::int64_t workers, const Kernels& kernels,
             Arena& arena, Job& job, Back& back, DriverBuffers& own);
/// The backward's part of it; the job's sizes are set.
void lay_out_backward(const Problem& problem, Arena& arena, const Job& job, Back& back,
                      DriverBuffers& own);
/// Bytes that one worker of any stage of the backward needs.
std::int64_t back_scratch_bytes(const Problem& problem);
Call make_call(const Problem& problem, const Inputs& inputs, const Context& context, Pass pass,
               const Kernels& kernels);

[[nodiscard]] Rows rows_of(const ConstView& view, std::int64_t b, std::int64_t h);
[[nodiscard]] MutableRows rows_of(const View& view, std::int64_t b, std::int64_t h);

/// Points the job at batch element b and key/value head kv, at query head h.
void select_keys(Call& call, std::int64_t b, std::int64_t kv);
void select_queries(Call& call, std::int64_t b, std::int64_t h);

/// The executor's loop; its std::function holds a reference, for which it needs no memory.
template <typename Task>
void parallel_for(Call& call, std::int64_t n, const Task& task) {
  call.executor.parallel_for(n, std::cref(task));
}
/// Runs a stage over `count` indices.
void run(Call& call, Stage stage, std::int64_t count);
/// Runs a stage whose tasks share `count` indices out, one task a worker.
void run_workers(Call& call, Stage stage, std::int64_t count);
/// Block sums, mean, channel maxima of v.
void smooth(Call& call);
/// Scores, then blocks and logits (soft) of the current head.
void score(Call& call, std::int64_t h);
void choose(Call& call, std::int32_t* blocks, float* logits);
/// log_m, rest, complement_empty, alpha from the routing in use.
void weigh(Call& call, std::int64_t h, const std::int32_t* blocks, const float* logits);
/// The K best of the scores and the protected blocks, ascending, -1 behind the last of L.
void choose_blocks(const Call& call, const float* scores, std::int32_t* blocks);
/// Router gradients of the current head, added.
void back_router(Call& call, std::int64_t h, float* d_proj_q, float* d_proj_k);

[[nodiscard]] std::int64_t num_panel_groups(const Problem& problem);

void route(const Problem&, const Inputs&, const Routing&, const Context&, const Kernels&);
void forward(const Problem&, const Inputs&, const Outputs&, const Context&, const Kernels&);
void backward(const Problem&, const Inputs&, const Saved&, ConstView d_out, const Gradients&,
              const Context&, const Kernels&);

}  // namespace sla2::cpu

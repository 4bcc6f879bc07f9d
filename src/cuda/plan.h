// What the kernels of one call read: sizes, options, inputs, outputs and the caller's workspace,
// carved. One trivially copyable struct, passed to every kernel by value.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"
#include "sla2/attention.h"

namespace sla2::SLA2_CUDA_ROOM {

/// Number format of the sparse branch's products. kFp32: three bf16 terms, six products.
enum class Format : std::uint8_t { kInt8, kFp8, kBf16, kF16, kFp32 };

/// Rows of a tensor [batch, heads, tokens, features], strides in elements, features dense.
struct Rows {
  void* data = nullptr;
  std::int64_t batch = 0, head = 0, token = 0;
  DType dtype = DType::kF32;
  bool vectors = false;  // every row starts at a multiple of 16 bytes
};

inline constexpr int kKeyStep = 32;  // keys that a row of transposed 8-bit v holds
inline constexpr int kMaxTerms = 3;

/// A number as a sum of bf16 terms, largest first: 1 (bf16), 2 (fp16) or 3 (fp32) planes.
struct Terms {
  Bf16* data = nullptr;
  std::int64_t plane = 0;  // elements from one term to the next
  int count = 0;
};

struct Call {
  // Sizes. Symbols as in sla2/problem.h.
  int B, H, Hkv, group;  // group = H / Hkv
  int Nq, Nk, d, dv, bq, bk, M, T, L;
  int D;             // 64, 128 or 256: d and dv rounded up to what kernels are compiled for
  int Tp;            // T rounded up to 32
  int router_heads;  // heads of routed_k: Hkv, or H with a router for each head
  std::int64_t S;    // d * dv + d: elements of h_j and z_j
  int terms;         // of the linear branch: by dtype
  Format format;
  DType dtype;
  FeatureMap feature_map;
  bool soft, raw_keys, scope_all, is_sla, softmax_scores;
  float scale;
  double keep, tau;
  int protected_begin, protected_end;  // tokens
  int num_routers, alpha_blocks;

  // Inputs.
  Rows q;                            // [B, H, Nq, d]
  Rows k;                            // [B, Hkv, Nk, d]
  Rows v;                            // [B, Hkv, Nk, dv]
  const float* proj_q;               // [num_routers, d, d]; null: identity
  const float* proj_k;               // [num_routers, d, d]
  const float* alpha_logit;          // [H, alpha_blocks]; null: zeros
  const float* proj_out;             // [dv, dv]; null: zeros
  const std::int64_t* key_lengths;   // [B]; null: Nk. Device memory: clamped to [1, Nk] in kernels
  const std::int32_t* given_blocks;  // [B, H, M, L]; entries outside [0, T) are skipped
  const float* given_logits;         // [B, H, M, T]

  // Outputs; null: not wanted.
  Rows out, out_sparse, out_linear;  // [B, H, Nq, dv]
  float* lse;                        // [B, H, Nq]

  // Outputs or workspace.
  float* k_mean;         // [B, Hkv, d]
  std::int32_t* blocks;  // [B, H, M, L]
  float* logits;         // [B, H, M, T]; soft routing only

  // Workspace.
  float* k_sums;                   // [B, Hkv, T, d] sums of the rows of K
  float* v_amax;                   // [B, Hkv, T, dv]; 8-bit formats only
  float* v_scale;                  // [B, Hkv, dv] amax / limit, NaN if not finite
  float* v_factor;                 // [B, Hkv, dv] limit / amax, 0 if all zero or not finite
  float* pooled_q;                 // [B, H, M, d] qb_i
  float* routed_q;                 // [B, H, M, d] qb_i Wq
  float* routed_k;                 // [B, router_heads, d, Tp] (kb_j Wk) transposed
  float* scores;                   // [B, H, M, T] s_ij, -inf behind a key length
  std::int32_t* complement_empty;  // [B, H, M]
  Terms rest;                      // [B, H, M, Tp] 1 - m, zero behind a key length
  void* q_low;     // Q, zero in features past d, [B, H, Nq, D]: s8; 16-bit; three planes of bf16
  float* q_scale;  // [B, H, Nq]; 8-bit formats only
  Terms phi_q;     // [B, H, Nq, D] phi(q), zero in features past d; not if phi_in_attend()
  float* k_scale;  // [B, Hkv, T]; 8-bit formats only
  void* k_low;     // Ks, zero behind a key length and in features past d, [B, Hkv, T * bk, D]:
                   // s8; 16-bit in the format's type (kF16: Ks / 2); kFp32: three planes of bf16
  void* v_low;     // V. 16-bit and kFp32: as k_low, [B, Hkv, T * bk, D]. 8-bit:
                   // [B, Hkv, T * bk / 32, D, 32], keys in the order of key_position()
  std::int64_t q_plane, k_plane, v_plane;  // elements from one plane to the next
  Terms h;                                 // [B, Hkv, T, S]: h_j [d, dv], then z_j [d]
  Terms sums;                              // [B, H, M, S]: H_i, then Z_i
  float* sparse_rows;                      // [B, H, Nq, dv] o_s in fp32; method sla only
  float* linear_rows;                      // [B, H, Nq, dv] o_l in fp32; method sla only
};

/// Whether attend computes phi(q) itself: one term, and shared memory has the room.
SLA2_HOST_DEVICE bool phi_in_attend(const Call& c) { return c.terms == 1 && c.D <= 128; }

/// Hands out pieces of the workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(std::int64_t count) {
    const std::size_t at = used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 127) / 128 * 128;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  [[nodiscard]] std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

/// Sizes and options; pointers null. `format` is that of the forward.
[[nodiscard]] Call describe(const Problem& problem);
/// Points the call at the inputs.
void set_inputs(Call& call, const Inputs& inputs);
[[nodiscard]] Rows rows_of(const ConstView& view);
[[nodiscard]] Rows rows_of(const View& view);

// Workspace by stage. Pointers that are set already (outputs) are left.
void take_router(Call& call, Arena& arena);   // reduce, finish_mean, project, route without weights
void take_weights(Call& call, Arena& arena);  // rest, complement_empty
void take_queries(Call& call, Arena& arena);  // q_low, q_scale, phi_q, in call.format
void take_keys(Call& call, Arena& arena);     // k_low, v_low, k_scale, in call.format
void take_states(Call& call, Arena& arena);   // h, sums
void take_sla_rows(Call& call, Arena& arena);

}  // namespace sla2::SLA2_CUDA_ROOM

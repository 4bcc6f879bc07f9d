// What the kernels of a backward call read: the forward's sizes and inputs, what was saved, the
// gradients, and the workspace, carved. Every operand of a matrix product is kept as a sum of bf16
// terms, dense, with D features and whole blocks, zero where there is no token or feature, so that
// the large kernels know neither strides nor ragged ends.
#pragma once

#include "cuda/plan.h"

namespace sla2::SLA2_CUDA_ROOM {

struct Backward {
  Call call;  // key_lengths, k_mean and the routing (given_blocks, given_logits) are set

  Rows d_out, saved_sparse, saved_linear;   // [B, H, Nq, dv]
  const float* saved_lse;                   // [B, H, Nq]
  Rows d_q, d_k, d_v;                       // null: not wanted
  float* d_alpha_logit;                     // [H, alpha_blocks]
  float *d_proj_q, *d_proj_k, *d_proj_out;  // [num_routers, d, d] twice, [dv, dv]
  bool matched;                             // recompute lse and rowsum(dO o_s)
  bool learns_router;

  // Sizes.
  int C;            // D * D + D: elements of h_j and z_j
  int query_tiles;  // tiles of kTileRows rows in a query block, in a key block
  int key_tiles;
  int projection_parts;

  // Workspace. R = M * bq rows of queries, N = T * bk rows of keys.
  Terms q, phi_q, d_o;             // [B, H, R, D]
  Terms d_l;                       // [B, H, R, D] dO_l before 1 - alpha; d_o except with SLA
  Terms d_top;                     // [B, H, R, D] dO_l (1 - alpha) / (phi(q) . Z_i)
  Terms ks, phi_k, v;              // [B, Hkv, N, D]
  Terms rest;                      // [B, H, M, Tp] weight of block j in H_i
  Terms h, d_h;                    // [B, Hkv, T, C] h_j [D, D] then z_j [D]; their gradients
  Terms sums, d_sums;              // [B, H, M, C] H_i, Z_i; their gradients
  std::uint8_t* reads;             // [B, H, T, M] 1: query block i reads key block j
  std::int32_t* complement_empty;  // [B, H, M]
  float* alphas;                   // [B, H, M] dO_s = alphas dO
  float* lse;                      // [B, H, R] times log2(e); +inf behind the last query
  float* delta_sparse;             // [B, H, R] rowsum(dO o_s)
  float* delta_linear;             // [B, H, R] rowsum(dO_l o_l)
  float* d_bottom;                 // [B, H, R] what a row adds to dZ_i: times phi(q)
  float* d_q_linear;               // [B, H, R, D]
  float* d_keys;                   // [B, Hkv, N, D] of the linear branch
  float* d_v_linear;               // [B, Hkv, N, D]
  float* key_sums;                 // [B, Hkv, T * key_tiles, D] sums of the rows of d_keys
  float* key_mean;                 // [B, Hkv, D]
  float* alpha_parts;              // [B, H, M * query_tiles]
  float* projection_sums;          // [projection_parts, dv, dv]; SLA only
  // Soft routing with router gradients only.
  float *pooled_q, *routed_q;  // [B, H, M, D] qb_i, qb_i Wq
  float* pooled_k;             // [B, Hkv, T, D] kb_j
  float* routed_k;             // [B, H, T, D] kb_j Wk
  float* u;                    // [B, H, M * query_tiles, T] sum of P (dP - Ds), without the scale
  float* d_scores;             // [B, H, M, Tp] <dH_i, h_j> + <dZ_i, z_j>, then ds_ij
  float* softmax_rows;         // [B, H, M, Tp] softmax of the scores; with score_norm = softmax
  float* routed_k_sums;        // [B, H, M, D] sum_j ds_ij kb_j Wk
  float* pooled_k_sums;        // [B, H, M, D] sum_j ds_ij kb_j
};

inline constexpr int kBackThreads = 128;
inline constexpr int kTileRows = 64;  // rows of queries or keys that a block owns: 16 a warp

[[nodiscard]] Backward describe_backward(const Problem& problem, const Inputs& inputs,
                                         const Gradients& gradients);
void take_backward(Backward& back, Arena& arena);

// The launches, in the order of a call.
void back_prepare(const Backward& back, void* stream);          // operands, deltas, weights
void back_key_states(const Backward& back, void* stream);       // h; routed_q, routed_k
void back_query_states(const Backward& back, void* stream);     // sums
void back_linear_queries(const Backward& back, void* stream);   // d_q_linear, d_top, d_bottom
void back_query_gradients(const Backward& back, void* stream);  // d_sums
void back_key_gradients(const Backward& back, void* stream);    // d_h
void back_linear_keys(const Backward& back,
                      void* stream);  // d_keys, d_v_linear, key_sums; d_scores
void back_sparse_queries(const Backward& back, void* stream);  // d_q; u; matched: lse, deltas
void back_project_out(const Backward& back, void* stream);     // projection_sums
void back_reduce(const Backward& back, void* stream);          // key_mean, alpha, proj_out
void back_sparse_keys(const Backward& back, void* stream);     // d_k, d_v
void back_scores(const Backward& back, void* stream);          // d_scores, *_k_sums
void back_router(const Backward& back, void* stream);          // d_proj_q, d_proj_k

/// The backward of one call, at most 12 launches. `workspace` is at least backward_bytes(problem).
void run_backward(const Problem& problem, const Inputs& inputs, const Saved& saved, ConstView d_out,
                  const Gradients& gradients, const Context& context);
[[nodiscard]] std::size_t backward_bytes(const Problem& problem);

}  // namespace sla2::SLA2_CUDA_ROOM

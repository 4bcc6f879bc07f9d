// What the stages of the backward share beside the job. Element: fp32, or bf16 where `is16`.
// "Packed" elements are a right operand of stages/micro_kernels.inc; all others lie in rows.
#pragma once

#include <cstdint>

#include "cpu/job.h"

namespace sla2::cpu {

/// Rows of fp32 that the stages add to: the caller's tensor (fp32) or the workspace. Null: not
/// wanted.
struct FloatSums {
  float* data;
  std::int64_t stride;
};

struct Back {
  bool is16;
  bool needs_pairs;                               // a gradient of q, k, v or the router is wanted
  std::int64_t padded_q_blocks, padded_k_blocks;  // M and T to multiples of 32

  // ---- of the key/value head
  void* ks_rows;       // [T, bk, d] Ks_j, 0 behind the length
  void* ks_columns;    // [T, d, bk] Ks_j^T
  void* v_rows;        // [T, bk, dv]
  void* h;             // [d*dv/64, T, 64] h_j in panels of 64 columns
  float* z;            // [T, d]
  FloatSums d_k;       // [Nk, d] sums of both branches, over the heads of a group
  FloatSums d_v;       // [Nk, dv]
  float* d_keys_sums;  // [T, d] of the linear branch's part of d_k
  float* d_keys_mean;  // [d]

  // ---- of the query head
  void* rest_rows;          // [M, padded T]
  void* rest_columns;       // [T, padded M]
  void* sums;               // [M, d, dv] H_i
  float* sums_z;            // [M, d] Z_i
  void* d_sums;             // [d*dv/64, M, 64] dH_i
  float* d_sums_z;          // [M, d] dZ_i
  void* d_h;                // [T, d, dv]; shares its memory with `pairs`
  float* d_z;               // [T, d]
  float* d_alpha;           // [M]
  float* u;                 // [M, T], soft
  float* l;                 // [M, T], soft
  float* linear_copy;       // [Nq, dv] o_l, SLA
  float* d_out_copy;        // [Nq, dv] dO, SLA
  const float* proj_out_t;  // [dv, dv] P^T or null
  Rows d_out, saved_sparse, saved_linear;
  const float* lse;  // [Nq]
  bool matched;      // o_s and lse are recomputed
  MutableRows d_q_out, d_k_out, d_v_out;
  const std::int32_t* readers;        // hard: query block and place of each pair, by key block
  const std::int64_t* readers_begin;  // [T + 1]

  // ---- of a batch of query blocks and a round of their routed blocks (backward.cpp)
  std::int64_t batch_begin, batch_end;  // query blocks
  std::int64_t round_begin, round_end;  // places in the rows of routed blocks; soft: key blocks
  std::int64_t round_places;            // of a full round
  bool is_first_round, is_last_round;
  void* pairs;          // [blocks, places][2][bk, bq] P^T and dS^T
  void* q_columns;      // [blocks] packed [d, bq] Q^T
  void* d_out_columns;  // [blocks] packed [dv, bq] dO^T
  void* q_packed;       // [blocks] packed [bq, d] Q
  void* d_out_packed;   // [blocks] packed [bq, dv] dO
  float* row_lse;       // [blocks, bq]; inf behind the last query
  float* row_delta;     // [blocks, bq] rowsum(dO o_s), before alpha
  float* d_q_columns;   // [blocks, d, bq] dQ^T
};

}  // namespace sla2::cpu

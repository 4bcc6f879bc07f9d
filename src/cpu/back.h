// What the stages of the backward share beside the job. Element: fp32, or bf16 where `is16`.
// "Packed" elements are a right operand of stages/micro_kernels.inc; all others lie in rows.
#pragma once

#include <cstdint>

#include "cpu/job.h"

namespace sla2::cpu {

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
  float* d_k;          // [T, bk, d] sums of both branches, over the heads of a group; null: not
                       // wanted. Not in the caller's rows, which may lie a page apart each
  float* d_v;          // [T, bk, dv]
  float* d_keys_sums;  // [T, d] of the linear branch's part of d_k
  float* d_keys_mean;  // [d]

  // ---- of the query head
  void* rest_rows;          // [M, padded T]
  void* rest_columns;       // [T, padded M]
  void* sums;               // [M, d, dv] H_i
  float* sums_z;            // [M, d] Z_i
  void* d_sums;             // [d*dv/64, M, 64] dH_i
  float* d_sums_z;          // [M, d] dZ_i
  void* d_h;                // [T, d, dv]; may lie where h did
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
  const std::int32_t* ranks;  // [M, places] of each pair among those of its key block
  bool adds_heads;            // d_k and d_v hold those of the group's heads before
  std::int32_t* turns;        // [T] pairs that d_k and d_v of a key block have taken
  // hard routing: the query blocks that route key block j, ascending, from readers_begin[j] on
  const std::int32_t* readers;        // [M * L]
  const std::int32_t* readers_begin;  // [T + 1]
};

}  // namespace sla2::cpu

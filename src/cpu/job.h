// What the stages of the CPU backend share: the operands of one head, and the table of stages that
// each instruction set fills. Plain data only: the stages are compiled with their own flags and
// must not emit a function that another unit could be linked to (see kernels.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace sla2::cpu {

/// kRound16: fp16's products, in fp32 from rounded operands.
enum class Arithmetic : std::int32_t { kFp32, kRound16, kBf16, kInt8 };
enum class Type : std::int32_t { kF32, kBF16, kF16 };
enum class Phi : std::int32_t { kSoftmax, kElu, kRelu };

/// Rows of one head in a caller's tensor: element (n, c) at n * stride + c.
struct Rows {
  const void* data;
  std::int64_t stride;
};
struct MutableRows {
  void* data;  // null: not wanted
  std::int64_t stride;
};

/// One query head and its key/value head. Pointers without a caller live in the workspace.
struct Job {
  std::int64_t num_queries, num_keys;  // keys: this batch element's length
  std::int64_t d, dv, block_q, block_k;
  std::int64_t q_blocks, k_blocks;  // M, T of this length
  Type type;
  Arithmetic arithmetic;
  Phi phi;
  bool soft, raw_keys, scope_all;
  bool linear16;               // forward: the linear branch's products in bf16
  bool subtracts;              // sums over blocks in fp32: totals less the routed blocks
  float most_cancelled;        // of it: see stages/forward_sums.inc
  std::int32_t rounding_bits;  // kRound16: significant bits of fp16
  float scale;

  Rows q, k, v;                             // [Nq, d], [Nk, d], [Nk, dv]
  MutableRows out, out_sparse, out_linear;  // [Nq, dv]
  float* lse;                               // [Nq] or null
  const float* proj_out;                    // [dv, dv] or null
  bool is_sla;

  // ---- of the key/value head
  float* k_block_sums;  // [T, d]
  float* k_mean;        // [d]
  float* v_amax;        // [T, dv], linear16
  float* v_factor;      // [dv], int8: 127/amax of the head, 0 without a finite one
  float* pooled_k;      // [T, d] kb_j
  // Forward: packed right operands (stages/micro_kernels.inc) in the arithmetic's format.
  void* keys;                  // [T, d, bk] Ks_j transposed; int8: key_offset added
  void* values;                // [T, bk, dv]
  float* k_scale;              // [T], int8
  float* v_scale;              // [dv], int8
  void* h_packed;              // d*dv/64 panels [T, 64] of h_j (bf16: T rounded up), see store_h
  float* z;                    // [T, d] z_j, packed
  unsigned char* sums_direct;  // [M] H_i is a product, not total minus routed, linear16
  float* sum_z;                // [M, d] Z_i
  void* sums_packed;           // [M, d, dv] H_i, each packed

  // ---- of the query head
  float* pooled_q;             // [M, d]
  float* routed_q;             // [M, d] qb_i Wq
  float* routed_k;             // [T, d] kb_j Wk
  float* scores;               // [M, T] s_ij
  float* log_m;                // [M, T] (soft)
  float* rest;                 // [M, T] the linear branch's weight of block j for query block i
  std::uint16_t* rest16;       // the same in bf16, [M, rest_stride(T)], linear16; then rest has
                               // the rounded ones too
  const std::int32_t* blocks;  // [M, width], routed blocks, -1 behind the last
  std::int64_t width;
  const unsigned char* complement_empty;  // [M]
  const float* alpha;                     // [M], SLA: unused

  const struct Back* back;  // backward only: back.h

  std::int64_t workers;
  std::int64_t* next_index;  // of the stages whose tasks share their indices out
  std::byte* scratch;        // one part a worker
  std::int64_t scratch_bytes;
};

using Stage = void (*)(const Job& job, std::int64_t index, std::int64_t worker);

/// C [m, n] = or += A [m, k] B [k, n]; element (i, t) of A at i * a_row + t * a_col. n is a
/// multiple of 16.
using Gemm = void (*)(std::int64_t m, std::int64_t n, std::int64_t k, const float* a,
                      std::int64_t a_row, std::int64_t a_col, const float* b, std::int64_t ldb,
                      float* c, std::int64_t ldc, bool accumulate);

/// C [m, n] = or += A [m, count * k] B [count * k, n], B in parts: see stages/micro_kernels.inc.
template <typename A, typename B, typename C>
using ProductOf = void (*)(std::int64_t m, std::int64_t n, std::int64_t k, const A* a,
                           std::int64_t lda, const B* const* b, std::int64_t count, C* c,
                           std::int64_t ldc, bool accumulate);

/// The products and their packing, see stages/packing.inc; bf16 as its bits.
struct Products {
  ProductOf<float, float, float> fp32;
  ProductOf<std::uint16_t, std::uint16_t, float> bf16;
  ProductOf<std::uint8_t, std::int8_t, std::int32_t> int8;
  void (*pack_rows_fp32)(Type, Rows, std::int64_t k, std::int64_t n, float* b);
  void (*pack_rows_bf16)(Type, Rows, std::int64_t k, std::int64_t n, std::uint16_t* b);
  void (*pack_transposed_fp32)(Type, Rows, std::int64_t columns, std::int64_t n, std::int64_t k,
                               float* b);
  void (*pack_transposed_bf16)(Type, Rows, std::int64_t columns, std::int64_t n, std::int64_t k,
                               std::uint16_t* b);
  void (*pack_transposed_int8)(const std::int8_t* x, std::int64_t stride, std::int64_t n,
                               std::int64_t k, std::int8_t* b);
  void (*convert_rows)(Type, Rows, std::int64_t m, std::int64_t k, std::uint16_t* a,
                       std::int64_t lda);
  void (*transpose_to_bf16)(const float* x, std::int64_t x_stride, std::int64_t k, std::int64_t n,
                            std::uint16_t* a, std::int64_t lda);
};

enum class Speed : std::int32_t { kSlower, kFasterOnAmd, kFaster };

/// The stages of the backward.
struct BackStages {
  Stage pack_keys;         // key block: operands, h, z; zeroes d_keys_sums
  Stage weigh;             // kBlockTile query blocks: rest_rows, rest_columns
  Stage sum_key_blocks;    // group of panels: sums; num_panel_groups of them
  Stage query_blocks;      // worker: query blocks by next_index; d_q, d_sums, d_alpha; pairs to
                           // d_k, d_v
  Stage sum_query_blocks;  // group of panels: d_h
  Stage block_products;    // kPanel key blocks: l
  Stage linear_keys;       // key block: the linear branch's d_k, d_v
  Stage write_keys;        // key block: d_k, d_v in the caller's type
};

/// The stages of one instruction set; the comment says what an index is.
struct Kernels {
  Products products;
  std::int32_t key_offset;  // what is added to the packed integers of k
  Gemm gemm;
  /// Integers and scale of one row of q, as query_blocks uses them (for tests).
  float (*quantized_row)(const float* x, std::int64_t d, std::int8_t* out);
  Stage sum_keys;      // key block: k_block_sums, v_amax
  Stage pack_keys;     // worker: everything of the key/value head, pairs of key blocks by
                       // next_index, num_packed_pairs of them
  Stage pool_keys;     // key block: pooled_k alone
  Stage pool_queries;  // query block
  Stage sum_z;         // kSumRows query blocks: sum_z, sums_direct
  Stage sum_forward;   // kPanelsPerTask panels: sums_packed
  Stage query_blocks;  // worker: steps 2 to 4 of query blocks by next_index
  Speed bf16;          // of products, beside fp32
  BackStages back;
};

namespace amx {
extern const Kernels kKernels;
}
namespace avx512_vnni {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2_vnni {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace baseline {
extern const Kernels kKernels;
}

/// Bytes that one worker of any stage needs.
std::int64_t scratch_bytes(std::int64_t d, std::int64_t dv, std::int64_t block_k);

inline constexpr std::int64_t kPanel = 64;         // columns of h side by side
inline constexpr std::int64_t kPanelsPerTask = 8;  // the last task has z_j
inline constexpr std::int64_t kBlockTile = 32;
inline constexpr std::int64_t kRowTile = 64;        // query rows that a stage holds at once
inline constexpr std::int64_t kForwardKeys = 1024;  // keys of one chunk of the softmax, at most
inline constexpr std::int64_t kSumRows = 32;        // query blocks whose sums are in flight

// Strides, in elements: rows a power of two of bytes apart would fall into few sets of a cache.
inline constexpr std::int64_t kScoreStride = kForwardKeys + 16;
inline constexpr std::int64_t kLeftStride = kForwardKeys + 64;
/// Key blocks of h_packed in bf16: whole tiles of 16 pairs.
constexpr std::int64_t padded_blocks(std::int64_t blocks) { return (blocks + 31) / 32 * 32; }
/// Pairs of key blocks that pack_keys fills, with the zeros behind the last block.
constexpr std::int64_t num_packed_pairs(const Job& job) {
  return (job.linear16 ? padded_blocks(job.k_blocks) : job.k_blocks + 1) / 2;
}
/// Between panels of h_packed; the second one in bf16.
constexpr std::int64_t h_stride(std::int64_t blocks) { return (blocks + 1) * kPanel; }
constexpr std::int64_t h_stride16(std::int64_t blocks) {
  return (padded_blocks(blocks) + 2) * kPanel;
}
/// Between rows of rest16.
constexpr std::int64_t rest_stride(std::int64_t blocks) { return padded_blocks(blocks) + 32; }
/// Between the H_i of sums_packed.
constexpr std::int64_t sums_stride(std::int64_t d, std::int64_t dv) { return d * dv + 32; }

}  // namespace sla2::cpu

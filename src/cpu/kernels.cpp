// Every stage for one instruction set: compiled once for each, with its own flags. Nothing here may
// become a symbol that another unit could be linked to (an inline function compiled for AVX-512
// would run on older processors), so no standard C++ header with code is included and all but the
// table is internal. A test looks at the object files (tests/cpu/no_leak.cmake).
#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>

#include "cpu/back.h"
#include "cpu/job.h"

#if defined(__AMX_TILE__)
#define SLA2_VECTOR_BYTES 64
#define SLA2_TABLE amx
#elif defined(__AVX512F__)
#define SLA2_VECTOR_BYTES 64
#if defined(__AVX512VNNI__)
#define SLA2_TABLE avx512_vnni
#else
#define SLA2_TABLE avx512
#endif
#elif defined(__AVX2__)
#define SLA2_VECTOR_BYTES 32
#if defined(__AVXVNNI__)
#define SLA2_TABLE avx2_vnni
#else
#define SLA2_TABLE avx2
#endif
#else
#define SLA2_VECTOR_BYTES 16
#define SLA2_TABLE baseline
#endif

namespace sla2::cpu {
namespace {

// Register tiles. AVX-512: 16 of 32 registers accumulate; the others have 16 registers in all.
// Where every product needs a register of its own (SSE overwrites an operand), 6 rows are one too
// many.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// The stages in the order of the data: each uses those above it.
// clang-format off
#include "cpu/stages/vector.inc"
#include "cpu/stages/micro_kernels.inc"
#include "cpu/stages/products.inc"
#include "cpu/stages/packing.inc"
#include "cpu/stages/gemm.inc"
#include "cpu/stages/ahead.inc"
#include "cpu/stages/keys.inc"
#include "cpu/stages/forward_keys.inc"
#include "cpu/stages/forward_sums.inc"
#include "cpu/stages/softmax.inc"
#include "cpu/stages/forward_queries.inc"
#include "cpu/stages/formats.inc"
#include "cpu/stages/back_keys.inc"
#include "cpu/stages/back_pairs.inc"
#include "cpu/stages/back_queries.inc"
#include "cpu/stages/back_sums.inc"
// clang-format on

/// A stage between begin_products() and end_products(): the tiles are free again when a task ends.
template <Stage kStage>
static void with_products(const Job& job, Index index, Index worker) {
  begin_products();
  kStage(job, index, worker);
  end_products();
}

/// A stage of the backward in the format of the call.
template <Stage kFp32, Stage kBf16>
static void in_format(const Job& job, Index index, Index worker) {
  // The two are one where the set has no bf16 products.
  // NOLINTNEXTLINE(bugprone-branch-clone)
  (job.back->is16 ? kBf16 : kFp32)(job, index, worker);
}
#ifdef SLA2_BF16
#ifdef __AMX_TILE__
constexpr Speed kBf16Speed = Speed::kFaster;
#else
constexpr Speed kBf16Speed = Speed::kFasterOnAmd;
#endif
#define SLA2_BACK(stage) with_products<in_format<stage<Fp32>, stage<Bf16>>>
#else
constexpr Speed kBf16Speed = Speed::kSlower;
#define SLA2_BACK(stage) with_products<in_format<stage<Fp32>, stage<Fp32>>>
#endif

template <typename A, typename B, typename C>
static void single_product(Index m, Index n, Index k, const A* a, Index lda, const B* const* b,
                           Index count, C* c, Index ldc, bool accumulate) {
  begin_products();
  product(m, n, k, a, lda, Chain<B>{b, count}, c, ldc, accumulate);
  end_products();
}

}  // namespace

namespace SLA2_TABLE {
extern const Kernels kKernels = {
    {single_product<float, float, float>, single_product<std::uint16_t, std::uint16_t, float>,
     single_product<std::uint8_t, std::int8_t, std::int32_t>, pack_rows<float>,
     pack_rows<std::uint16_t>, pack_transposed<float>, pack_transposed<std::uint16_t>,
     pack_transposed, convert_rows, transpose_to_bf16},
    kKeyOffset,
    gemm,
    quantized_row,
    with_products<sum_keys>,
    with_products<pack_keys>,
    with_products<pool_keys>,
    with_products<pool_queries>,
    with_products<sum_z>,
    with_products<sum_forward>,
    with_products<query_blocks>,
    kBf16Speed,
    {SLA2_BACK(pack_keys_of), SLA2_BACK(weights_of), SLA2_BACK(sum_key_blocks),
     SLA2_BACK(back_query_blocks), SLA2_BACK(sum_query_blocks), SLA2_BACK(block_products),
     SLA2_BACK(linear_keys_of), with_products<back_write_keys>},
};
}  // namespace SLA2_TABLE

}  // namespace sla2::cpu

// Every stage for one instruction set: compiled once for each, with its own flags. Nothing here may
// become a symbol that another unit could be linked to (an inline function compiled for AVX-512
// would run on older processors), so no standard C++ header with code is included and all but the
// table is internal. A test looks at the object files (tests/cpu/no_leak.cmake).
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include "cpu/job.h"

#if defined(__AVX512F__)
#define SLA2_VECTOR_BYTES 64
#define SLA2_VNNI 1
#define SLA2_TABLE avx512
#elif defined(__AVX2__)
#define SLA2_VECTOR_BYTES 32
#define SLA2_TABLE avx2
#else
#define SLA2_VECTOR_BYTES 16
#define SLA2_TABLE baseline
#endif

namespace sla2::cpu {
namespace {

// Register tiles. AVX-512: 16 of 32 registers accumulate; the others have 16 registers in all.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileVectors = 4, kIntVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileVectors = 2, kIntVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2, kIntVectors = 2;
#endif

// The stages in the order of the data: each uses those above it.
// clang-format off
#include "cpu/stages/vector.inc"
#include "cpu/stages/gemm.inc"
#include "cpu/stages/keys.inc"
#include "cpu/stages/queries.inc"
#include "cpu/stages/backward.inc"
// clang-format on

}  // namespace

namespace SLA2_TABLE {
extern const Kernels kKernels = {
    sizeof(IntB),     gemm,           quantized_row,    sum_keys,        pack_keys,
    pool_keys,        pack_keys_back, pool_queries,     sum_blocks,      query_block,
    prepare_queries,  back_queries,   back_sparse_keys, back_sum_blocks, back_block_products,
    back_linear_keys, write_keys,
};
}  // namespace SLA2_TABLE

}  // namespace sla2::cpu

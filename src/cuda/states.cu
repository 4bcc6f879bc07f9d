// Step 3: H_i and Z_i for all query blocks of a head as one matrix product, (1 - m) [M, T] times
// h [T, d dv + d], summed block by block and never a total minus a part; in the backward also its
// transpose, dh = (1 - m)^T dH.
// A block owns 128 x 128 of a result, a warp 64 x 32 of it; steps of 32 of what is summed over come
// by asynchronous copies into a ring of three; neighbouring blocks share their columns of b in the
// L2 cache. The sums leave through shared memory in whole lines. The order of a sum is fixed: the
// same bits every run.
#include "cuda/rows.cuh"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kThreads = 256;
constexpr int kTileM = 128, kTileN = 128, kStep = 32, kRing = 3;
constexpr int kStrideA = kStep + 8;  // bf16; 16-byte units odd: ldmatrix without conflicts
constexpr int kStrideB = kTileN + 8;
constexpr int kBytesA = kTileM * kStrideA * 2;
constexpr int kBytesB = kStep * kStrideB * 2;
static_assert(kBytesA >= kStep * kStrideB * 2);  // a by k lies like b
constexpr int kWarpsN = 4;                       // 2 x 4 warps of 64 x 32
constexpr int kTilesM = 4, kTilesN = 4;
constexpr std::size_t kRingBytes = std::size_t{kRing} * (kBytesA + kBytesB);
static_assert(kTileM * kStrideB * 2 <= kRingBytes);  // the sums, term by term

struct Tile {
  const Bf16* a;  // of the head
  const Bf16* b;
  int m0, k;  // k: of the sum
  std::int64_t n0;
};

/// Steps of all pairs of terms, the pairs with the smallest products first. Not kExact: one pair.
struct Step {
  int a_term, b_term, k0;
};
template <bool kExact>
SLA2_DEVICE Step step_of(const BlockSums& x, int index, int steps) {
  if (!kExact) return {0, 0, index * kStep};
  const int pair = index / steps;
  const int k0 = index % steps * kStep;
  int seen = 0;
  for (int order = x.a.count + x.b.count - 2; order >= 0; --order) {
    if (order >= max_int(x.a.count, x.b.count)) continue;
    for (int a = 0; a <= min_int(order, x.a.count - 1); ++a) {
      if (order - a >= x.b.count) continue;
      if (seen++ == pair) return {a, order - a, k0};
    }
  }
  return {0, 0, k0};
}
template <bool kExact>
SLA2_DEVICE int pairs_of(const BlockSums& x) {
  if (!kExact) return 1;
  int pairs = 0;
  for (int a = 0; a < x.a.count; ++a) {
    for (int b = 0; b < x.b.count; ++b) pairs += a + b < max_int(x.a.count, x.b.count) ? 1 : 0;
  }
  return pairs;
}

/// Starts the copy of kStep rows [k0, k0 + kStep) x kTileN columns from n0 on, of a matrix [k, n].
SLA2_DEVICE void load_rows(Bf16* to, const Bf16* from, std::int64_t pitch, int k0, int k,
                           std::int64_t n0, std::int64_t n) {
  constexpr int kUnits = kTileN / 8;
  const int row = thread_index() / kUnits;
  const int column = thread_index() % kUnits * 8;
  const bool inside = n0 + column < n;
  SLA2_UNROLL for (int r = row; r < row + kStep; r += kThreads / kUnits) {
    const bool valid = inside && k0 + r < k;
    const std::int64_t at = valid ? (k0 + r) * pitch + n0 + column : 0;
    copy_async_16(to + r * kStrideB + column, from + at, valid);
  }
}

template <bool kByK>
SLA2_DEVICE void load_step(const BlockSums& x, const Tile& tile, const Step& step, int stage) {
  Bf16* a = shared_memory<Bf16>(static_cast<std::size_t>(stage) * (kBytesA + kBytesB));
  Bf16* b = a + kBytesA / 2;
  const Bf16* a_from = tile.a + step.a_term * x.a.plane;
  load_rows(b, tile.b + step.b_term * x.b.plane, x.n, step.k0, tile.k, tile.n0, x.n);
  if constexpr (kByK) {
    // Columns of a come in units of eight: those behind m are numbers of no result.
    load_rows(a, a_from, x.a_pitch, step.k0, tile.k, tile.m0, x.a_pitch);
  } else {
    constexpr int kUnits = kStep / 8;
    const int row = thread_index() / kUnits;
    const int column = thread_index() % kUnits * 8;
    SLA2_UNROLL for (int r = row; r < row + kTileM; r += kThreads / kUnits) {
      const bool valid = tile.m0 + r < x.m;
      const std::int64_t at =
          valid ? std::int64_t{tile.m0 + r} * x.a_pitch + step.k0 + column : std::int64_t{0};
      copy_async_16(a + r * kStrideA + column, a_from + at, valid);
    }
  }
}

/// kExact: products are added to the sums in fp32, rounded to nearest; tensor cores truncate.
template <bool kExact, bool kByK>
SLA2_DEVICE void multiply_step(int stage, float (&acc)[kTilesM][kTilesN][4]) {
  const Bf16* a = shared_memory<Bf16>(static_cast<std::size_t>(stage) * (kBytesA + kBytesB));
  const Bf16* b = a + kBytesA / 2;
  const int lane = lane_index();
  const int m0 = warp_index() / kWarpsN * kTilesM * 16;
  const int n0 = warp_index() % kWarpsN * kTilesN * 8;
  SLA2_UNROLL for (int k = 0; k < kStep; k += 16) {
    std::uint32_t x[kTilesM][4];
    SLA2_UNROLL for (int m = 0; m < kTilesM; ++m) {
      if constexpr (kByK) {
        ldmatrix_x4_transposed(
            x[m], a + (k + lane / 16 * 8 + lane % 8) * kStrideB + m0 + m * 16 + lane / 8 % 2 * 8);
      } else {
        ldmatrix_x4(x[m], a + (m0 + m * 16 + lane % 16) * kStrideA + k + lane / 16 * 8);
      }
    }
    SLA2_UNROLL for (int n = 0; n < kTilesN; n += 2) {
      std::uint32_t y[4];
      ldmatrix_x4_transposed(y, b + (k + lane % 16) * kStrideB + n0 + n * 8 + lane / 16 * 8);
      SLA2_UNROLL for (int m = 0; m < kTilesM; ++m) {
        SLA2_UNROLL for (int half = 0; half < 2; ++half) {
          if constexpr (kExact) {
            float product[4] = {};
            mma_bf16(product, x[m], y[2 * half], y[2 * half + 1]);
            SLA2_UNROLL for (int e = 0; e < 4; ++e) acc[m][n + half][e] += product[e];
          } else {
            mma_bf16(acc[m][n + half], x[m], y[2 * half], y[2 * half + 1]);
          }
        }
      }
    }
  }
}

template <bool kExact>
SLA2_DEVICE void store_sums(const BlockSums& x, const Tile& tile, Bf16* to,
                            float (&acc)[kTilesM][kTilesN][4]) {
  const int lane = lane_index();
  Bf16* staged = shared_memory<Bf16>(0);
  Bf16* own = staged + (warp_index() / kWarpsN * kTilesM * 16 + lane / 4) * kStrideB +
              warp_index() % kWarpsN * kTilesN * 8 + lane % 4 * 2;
  const int terms = kExact ? x.c.count : 1;
  SLA2_NO_UNROLL for (int term = 0; term < terms; ++term) {
    block_barrier();  // the ring, or the last term, has been read
    SLA2_UNROLL for (int m = 0; m < kTilesM; ++m) {
      SLA2_UNROLL for (int n = 0; n < kTilesN; ++n) {
        SLA2_UNROLL for (int half = 0; half < 2; ++half) {
          float(&sum)[4] = acc[m][n];
          store_4(own + (m * 16 + 8 * half) * kStrideB + n * 8,
                  next_term(sum[2 * half], sum[2 * half + 1]));
        }
      }
    }
    block_barrier();
    constexpr int kUnits = kTileN / 8;
    SLA2_UNROLL for (int i = 0; i < kTileM * kUnits / kThreads; ++i) {
      const int unit = thread_index() + i * kThreads;
      const int row = unit / kUnits;
      const int column = unit % kUnits * 8;
      if (tile.m0 + row < x.m && tile.n0 + column < x.n) {
        store_16(to + term * x.c.plane + row * x.n + column,
                 load_16(staged + row * kStrideB + column));
      }
    }
  }
}

template <bool kExact, bool kByK>
SLA2_KERNEL(kThreads, 2)
void sums_kernel(BlockSums x) {
  const int m_tiles = static_cast<int>(ceil_div(x.m, kTileM));
  const int n_tiles = static_cast<int>(ceil_div(x.n, kTileN));
  const std::int64_t head = block_x() / (m_tiles * n_tiles);
  Tile tile;
  tile.m0 = block_x() % m_tiles * kTileM;
  tile.n0 = std::int64_t{block_x() / m_tiles % n_tiles} * kTileN;
  tile.k = x.k;
  if (x.key_lengths != nullptr) {
    const std::int64_t length = x.key_lengths[head / x.lengths_heads];
    tile.k = static_cast<int>(ceil_div(length < 1 ? 1 : length, x.bk));
    tile.k = min_int(tile.k, x.k);
  }
  tile.a = x.a.data + head * (kByK ? x.k : x.m) * x.a_pitch;
  tile.b = x.b.data + head / x.group * x.k * x.n;

  const int steps = (tile.k + kStep - 1) / kStep;
  const int total = steps * pairs_of<kExact>(x);
  float acc[kTilesM][kTilesN][4] = {};
  for (int i = 0; i < kRing - 1; ++i) {
    if (i < total) load_step<kByK>(x, tile, step_of<kExact>(x, i, steps), i);
    copy_async_commit();
  }
  int stage = 0;
  SLA2_NO_UNROLL for (int i = 0; i < total; ++i) {
    copy_async_wait<kRing - 2>();
    block_barrier();
    const int next = i + kRing - 1;
    if (next < total) {
      load_step<kByK>(x, tile, step_of<kExact>(x, next, steps), stage == 0 ? kRing - 1 : stage - 1);
    }
    copy_async_commit();
    multiply_step<kExact, kByK>(stage, acc);
    stage = stage + 1 == kRing ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  store_sums<kExact>(x, tile, x.c.data + (head * x.m + tile.m0) * x.n + tile.n0, acc);
}

template <bool kByK>
void launch_sums(const BlockSums& x, void* stream) {
  const std::int64_t blocks = x.heads * ceil_div(x.m, kTileM) * ceil_div(x.n, kTileN);
  const bool is_exact = x.a.count > 1 || x.b.count > 1 || x.c.count > 1;
  launch(stream, is_exact ? sums_kernel<true, kByK> : sums_kernel<false, kByK>, {blocks}, kThreads,
         kRingBytes, x);
}

}  // namespace

void sum_blocks(const BlockSums& x, void* stream) {
  if (x.by_k) {
    launch_sums<true>(x, stream);
  } else {
    launch_sums<false>(x, stream);
  }
}

void sum_states(const Call& c, void* stream) {
  sum_blocks({.a = c.rest,
              .b = c.h,
              .c = c.sums,
              .a_pitch = c.Tp,
              .n = c.S,
              .heads = std::int64_t{c.B} * c.H,
              .m = c.M,
              .k = c.T,
              .group = c.group,
              .key_lengths = c.key_lengths,
              .lengths_heads = c.H,
              .bk = c.bk},
             stream);
}

}  // namespace sla2::SLA2_CUDA_ROOM

// Step 3: H_i and Z_i for all query blocks of a head as one matrix product, (1 - m) [M, T] times
// h [T, d dv + d], summed block by block and never a total minus a part.
// A block owns 128 query blocks x 256 columns, a warp 64 x 64 of them; steps of 32 key blocks come
// by asynchronous copies into a ring of three; neighbouring blocks share their columns of h in the
// L2 cache. The sums leave through shared memory in whole lines. The order of a sum is fixed: the
// same bits every run.
#include "cuda/rows.cuh"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kThreads = 256;
constexpr int kTileM = 128, kTileN = 256, kStep = 32, kRing = 3;
constexpr int kStrideA = kStep + 8;  // bf16; 16-byte units odd: ldmatrix without conflicts
constexpr int kStrideB = kTileN + 8;
constexpr int kBytesA = kTileM * kStrideA * 2;
constexpr int kBytesB = kStep * kStrideB * 2;
constexpr int kWarpsN = 4;  // 2 x 4 warps of 64 x 64
constexpr int kTilesM = 4, kTilesN = 8;
constexpr std::size_t kRingBytes = std::size_t{kRing} * (kBytesA + kBytesB);
static_assert(kTileM * kStrideB * 2 <= kRingBytes);  // the sums, term by term

struct Tile {
  const Bf16* a;  // [M, Tp] of the head
  const Bf16* b;  // [T, S] of the key/value head
  int m0, blocks;
  std::int64_t n0;
};

/// Steps of all pairs of terms, the pairs with the smallest products first.
struct Step {
  int a_term, b_term, k0;
};
SLA2_DEVICE Step step_of(const Call& c, int index, int steps) {
  const int pair = index / steps;
  const int k0 = index % steps * kStep;
  int seen = 0;
  for (int order = c.rest.count + c.h.count - 2; order >= 0; --order) {
    if (order >= max_int(c.rest.count, c.h.count)) continue;
    for (int a = 0; a <= min_int(order, c.rest.count - 1); ++a) {
      if (order - a >= c.h.count) continue;
      if (seen++ == pair) return {a, order - a, k0};
    }
  }
  return {0, 0, k0};
}
SLA2_DEVICE int pairs_of(const Call& c) {
  int pairs = 0;
  for (int a = 0; a < c.rest.count; ++a) {
    for (int b = 0; b < c.h.count; ++b) pairs += a + b < max_int(c.rest.count, c.h.count) ? 1 : 0;
  }
  return pairs;
}

SLA2_DEVICE void load_step(const Call& c, const Tile& tile, const Step& step, int stage) {
  Bf16* a = shared_memory<Bf16>(static_cast<std::size_t>(stage) * (kBytesA + kBytesB));
  Bf16* b = a + kTileM * kStrideA;
  const Bf16* a_from = tile.a + step.a_term * c.rest.plane + step.k0;
  const Bf16* b_from = tile.b + step.b_term * c.h.plane;
  SLA2_UNROLL for (int i = 0; i < kTileM * kStep / 8 / kThreads; ++i) {
    const int at = thread_index() + i * kThreads;
    const int row = at / (kStep / 8);
    const int column = at % (kStep / 8) * 8;
    const bool valid = tile.m0 + row < c.M;
    const std::int64_t from = valid ? std::int64_t{tile.m0 + row} * c.Tp + column : 0;
    copy_async_16(a + row * kStrideA + column, a_from + from, valid);
  }
  SLA2_UNROLL for (int i = 0; i < kStep * kTileN / 8 / kThreads; ++i) {
    const int at = thread_index() + i * kThreads;
    const int row = at / (kTileN / 8);
    const int column = at % (kTileN / 8) * 8;
    const bool valid = step.k0 + row < tile.blocks && tile.n0 + column < c.S;
    const std::int64_t from = valid ? std::int64_t{step.k0 + row} * c.S + tile.n0 + column : 0;
    copy_async_16(b + row * kStrideB + column, b_from + from, valid);
  }
}

/// kExact: products are added to the sums in fp32, rounded to nearest; tensor cores truncate.
template <bool kExact>
SLA2_DEVICE void multiply_step(int stage, float (&acc)[kTilesM][kTilesN][4]) {
  const Bf16* a = shared_memory<Bf16>(static_cast<std::size_t>(stage) * (kBytesA + kBytesB));
  const Bf16* b = a + kTileM * kStrideA;
  const int lane = lane_index();
  const int m0 = warp_index() / kWarpsN * kTilesM * 16;
  const int n0 = warp_index() % kWarpsN * kTilesN * 8;
  SLA2_UNROLL for (int k = 0; k < kStep; k += 16) {
    std::uint32_t x[kTilesM][4];
    SLA2_UNROLL for (int m = 0; m < kTilesM; ++m) {
      ldmatrix_x4(x[m], a + (m0 + m * 16 + lane % 16) * kStrideA + k + lane / 16 * 8);
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

SLA2_DEVICE void store_sums(const Call& c, const Tile& tile, std::int64_t head,
                            float (&acc)[kTilesM][kTilesN][4]) {
  const int lane = lane_index();
  Bf16* staged = shared_memory<Bf16>(0);
  Bf16* own = staged + (warp_index() / kWarpsN * kTilesM * 16 + lane / 4) * kStrideB +
              warp_index() % kWarpsN * kTilesN * 8 + lane % 4 * 2;
  Bf16* to = c.sums.data + (head * c.M + tile.m0) * c.S + tile.n0;
  SLA2_NO_UNROLL for (int term = 0; term < c.sums.count; ++term) {
    block_barrier();  // the ring, or the last term, has been read
    SLA2_UNROLL for (int m = 0; m < kTilesM; ++m) {
      SLA2_UNROLL for (int n = 0; n < kTilesN; ++n) {
        SLA2_UNROLL for (int half = 0; half < 2; ++half) {
          float(&x)[4] = acc[m][n];
          store_4(own + (m * 16 + 8 * half) * kStrideB + n * 8,
                  next_term(x[2 * half], x[2 * half + 1]));
        }
      }
    }
    block_barrier();
    constexpr int kUnits = kTileN / 8;
    SLA2_UNROLL for (int i = 0; i < kTileM * kUnits / kThreads; ++i) {
      const int unit = thread_index() + i * kThreads;
      const int row = unit / kUnits;
      const int column = unit % kUnits * 8;
      if (tile.m0 + row < c.M && tile.n0 + column < c.S) {
        store_16(to + term * c.sums.plane + row * c.S + column,
                 load_16(staged + row * kStrideB + column));
      }
    }
  }
}

template <bool kExact>
SLA2_KERNEL(kThreads, 1)
void sums_kernel(Call c) {
  const int m_tiles = static_cast<int>(ceil_div(c.M, kTileM));
  const int n_tiles = static_cast<int>(ceil_div(c.S, kTileN));
  const std::int64_t head = block_x() / (m_tiles * n_tiles);
  const int b = static_cast<int>(head / c.H);
  const int h = static_cast<int>(head % c.H);
  Tile tile;
  tile.m0 = block_x() % m_tiles * kTileM;
  tile.n0 = std::int64_t{block_x() / m_tiles % n_tiles} * kTileN;
  tile.blocks = blocks_of(c, key_length(c, b));
  tile.a = c.rest.data + head * c.M * c.Tp;
  tile.b = c.h.data + (std::int64_t{b} * c.Hkv + h / c.group) * c.T * c.S;

  const int steps = (tile.blocks + kStep - 1) / kStep;
  const int total = steps * pairs_of(c);
  float acc[kTilesM][kTilesN][4] = {};
  for (int i = 0; i < kRing - 1; ++i) {
    if (i < total) load_step(c, tile, step_of(c, i, steps), i);
    copy_async_commit();
  }
  for (int i = 0; i < total; ++i) {
    copy_async_wait<kRing - 2>();
    block_barrier();
    const int next = i + kRing - 1;
    if (next < total) load_step(c, tile, step_of(c, next, steps), next % kRing);
    copy_async_commit();
    multiply_step<kExact>(i % kRing, acc);
  }
  copy_async_wait<0>();
  store_sums(c, tile, head, acc);
}

}  // namespace

void sum_states(const Call& c, void* stream) {
  const std::int64_t blocks =
      std::int64_t{c.B} * c.H * ceil_div(c.M, kTileM) * ceil_div(c.S, kTileN);
  launch(stream, c.terms == 1 ? sums_kernel<false> : sums_kernel<true>, {blocks}, kThreads,
         kRingBytes, c);
}

}  // namespace sla2::SLA2_CUDA_ROOM

// d_scores = <dH_i, h_j> + <dZ_i, z_j> for all blocks of a head: what the router learns from the
// linear branch. A block of threads owns 128 x 64 of it, 32 at a time of what is summed over,
// copied one step ahead.
#pragma once

#include "cuda/terms.cuh"

namespace sla2::SLA2_CUDA_ROOM {

inline constexpr int kProductM = 128;
inline constexpr int kProductN = 64;
inline constexpr int kProductK = 32;
inline constexpr int kProductPitch = kProductK + 8;
inline constexpr int kProductPlaneA = kProductM * kProductPitch;
inline constexpr int kProductPlaneB = kProductN * kProductPitch;

/// d_scores [m0, m0 + 128) x [n0, n0 + 64) = <dH_i, h_j> + <dZ_i, z_j>, of one head.
template <int kTerms>
SLA2_DEVICE void score_tile(const Backward& back, int head, int m0, int n0) {
  constexpr int kStage = kTerms * (kProductPlaneA + kProductPlaneB);
  const Call& c = back.call;
  const std::int64_t C = back.C;
  Bf16* shared = shared_memory<Bf16>(0);
  const std::int64_t a_at = (std::int64_t{head} * c.M + m0) * C;
  const std::int64_t b_at = (std::int64_t{head} / c.group * c.T + n0) * C;
  const int steps = (back.C + kProductK - 1) / kProductK;
  const auto copy = [&](int step) {
    if (step < steps) {
      Bf16* a = shared + step % 2 * kStage;
      const int k0 = step * kProductK;
      copy_tile<kTerms>(a, kProductPitch, kProductPlaneA, back.d_sums, a_at + k0, C, kProductM,
                        kProductK, c.M - m0, back.C - k0);
      copy_tile<kTerms>(a + kTerms * kProductPlaneA, kProductPitch, kProductPlaneB, back.h,
                        b_at + k0, C, kProductN, kProductK, c.T - n0, back.C - k0);
    }
    copy_async_commit();
  };
  const int row0 = warp_index() * 32;
  const bool active = m0 + row0 < c.M;
  float acc[2][8][4] = {};
  copy(0);
  for (int step = 0; step < steps; ++step) {
    copy(step + 1);
    copy_async_wait<1>();
    block_barrier();
    const Bf16* a = shared + step % 2 * kStage;
    const Bf16* b = a + kTerms * kProductPlaneA;
    if (active) {
      SLA2_UNROLL for (int k = 0; k < kProductK; k += 16) {
        Fragment<kTerms> left[2];
        SLA2_UNROLL for (int i = 0; i < 2; ++i) {
          load_left(left[i], a + (row0 + 16 * i) * kProductPitch + k, kProductPitch,
                    kProductPlaneA);
        }
        SLA2_UNROLL for (int n = 0; n < 4; ++n) {
          Fragment<kTerms> right;
          load_right(right, b + n * 16 * kProductPitch + k, kProductPitch, kProductPlaneB);
          SLA2_UNROLL for (int i = 0; i < 2; ++i) {
            multiply_add(acc[i][2 * n], left[i], right, 0);
            multiply_add(acc[i][2 * n + 1], left[i], right, 1);
          }
        }
      }
    }
    block_barrier();
  }
  copy_async_wait<0>();

  SLA2_UNROLL for (int i = 0; i < 2; ++i) {
    SLA2_UNROLL for (int n = 0; n < 8; ++n) {
      SLA2_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = m0 + row0 + 16 * i + 8 * half + lane_index() / 4;
        const int column = n0 + n * 8 + lane_index() % 4 * 2;
        if (row >= c.M || column >= c.Tp) continue;
        const float* value = acc[i][n] + 2 * half;
        store_8(back.d_scores + (std::int64_t{head} * c.M + row) * c.Tp + column,
                {{float_to_bits(value[0]), float_to_bits(value[1])}});
      }
    }
  }
}

SLA2_HOST_DEVICE std::int64_t score_tiles(const Call& c) {
  return ceil_div(c.M, kProductM) * ceil_div(c.T, kProductN);
}
template <int kTerms>
SLA2_DEVICE void score_blocks(const Backward& back) {
  if (block_x() >= score_tiles(back.call)) return;
  const int m_tiles = (back.call.M + kProductM - 1) / kProductM;
  // Blocks of one column of tiles are neighbours: they read the same part of h.
  score_tile<kTerms>(back, block_y(), block_x() % m_tiles * kProductM,
                     block_x() / m_tiles * kProductN);
}

}  // namespace sla2::SLA2_CUDA_ROOM

// Products of matrices whose elements are sums of bf16 terms: one product for 1 term (bf16), three
// for 2 (fp16: 16 significant bits, the range of bf16), six for 3 (fp32: 24 bits).
#pragma once

#include "cuda/backward_plan.h"
#include "cuda/rows.cuh"

namespace sla2::SLA2_CUDA_ROOM {

/// 16 x 16 of a left operand, or of a right operand (two tiles of 8 columns).
template <int kTerms>
struct Fragment {
  std::uint32_t x[kTerms][4];
};

/// c [16, 8] += a b, b's columns [8 * half, 8 * half + 8). The smallest products come first. Tensor
/// cores cut their sums off; with three terms c is added to in fp32, or it would show.
template <int kTerms>
SLA2_DEVICE void multiply_add(float (&c)[4], const Fragment<kTerms>& a, const Fragment<kTerms>& b,
                              int half) {
  float own[4] = {};
  float(&sum)[4] = kTerms == 3 ? own : c;
  SLA2_UNROLL for (int order = kTerms - 1; order >= 0; --order) {
    SLA2_UNROLL for (int i = 0; i <= order; ++i) {
      const int j = order - i;
      mma_bf16(sum, a.x[i], b.x[j][2 * half], b.x[j][2 * half + 1]);
    }
  }
  if constexpr (kTerms == 3) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) c[e] += own[e];
  }
}

/// Left operand at (0, 0) of a row-major tile [m][k].
template <int kTerms>
SLA2_DEVICE void load_left(Fragment<kTerms>& f, const Bf16* tile, int pitch, int plane) {
  const int lane = lane_index();
  const Bf16* row = tile + lane % 16 * pitch + lane / 16 * 8;
  SLA2_UNROLL for (int p = 0; p < kTerms; ++p) ldmatrix_x4(f.x[p], row + p * plane);
}
/// Left operand from a tile [k][m].
template <int kTerms>
SLA2_DEVICE void load_left_transposed(Fragment<kTerms>& f, const Bf16* tile, int pitch, int plane) {
  const int lane = lane_index();
  const Bf16* row = tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
  SLA2_UNROLL for (int p = 0; p < kTerms; ++p) ldmatrix_x4_transposed(f.x[p], row + p * plane);
}
/// Right operand from a tile [n][k].
template <int kTerms>
SLA2_DEVICE void load_right(Fragment<kTerms>& f, const Bf16* tile, int pitch, int plane) {
  const int lane = lane_index();
  const Bf16* row = tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
  SLA2_UNROLL for (int p = 0; p < kTerms; ++p) ldmatrix_x4(f.x[p], row + p * plane);
}
/// Right operand from a tile [k][n].
template <int kTerms>
SLA2_DEVICE void load_right_transposed(Fragment<kTerms>& f, const Bf16* tile, int pitch,
                                       int plane) {
  const int lane = lane_index();
  const Bf16* row = tile + (lane / 8 % 2 * 8 + lane % 8) * pitch + lane / 16 * 8;
  SLA2_UNROLL for (int p = 0; p < kTerms; ++p) ldmatrix_x4_transposed(f.x[p], row + p * plane);
}
/// Left operand at `at` of row-major rows in global memory.
template <int kTerms>
SLA2_DEVICE void load_left_global(Fragment<kTerms>& f, const Terms& from, std::int64_t at,
                                  int pitch) {
  const int lane = lane_index();
  const Bf16* row = from.data + at + static_cast<std::int64_t>(lane / 4) * pitch + lane % 4 * 2;
  SLA2_UNROLL for (int p = 0; p < kTerms; ++p) {
    const Bf16* term = row + p * from.plane;
    f.x[p][0] = load_4(term);
    f.x[p][1] = load_4(term + 8 * pitch);
    f.x[p][2] = load_4(term + 8);
    f.x[p][3] = load_4(term + 8 * pitch + 8);
  }
}
/// Left operand from two neighbouring tiles of accumulators.
template <int kTerms>
SLA2_DEVICE void split_left(Fragment<kTerms>& f, const float (&low)[4], const float (&high)[4]) {
  float x[8] = {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
  SLA2_UNROLL for (int p = 0; p < kTerms; ++p) {
    SLA2_UNROLL for (int i = 0; i < 4; ++i) f.x[p][i] = next_term(x[2 * i], x[2 * i + 1]);
  }
}

/// Writes two neighbours; `at` is even.
template <int kTerms>
SLA2_DEVICE void store_terms(const Terms& to, std::int64_t at, float low, float high) {
  SLA2_UNROLL for (int p = 0; p < kTerms; ++p) {
    store_4(to.data + p * to.plane + at, next_term(low, high));
  }
}
SLA2_DEVICE void store_terms(const Terms& to, std::int64_t at, float low, float high) {
  for (int p = 0; p < to.count; ++p) store_4(to.data + p * to.plane + at, next_term(low, high));
}

/// Starts the copy of a tile [rows, columns] of `from` at `at` (columns a multiple of 8) by the
/// whole block; rows and columns that are not valid become zero.
template <int kTerms>
SLA2_DEVICE void copy_tile(Bf16* tile, int pitch, int plane, const Terms& from, std::int64_t at,
                           std::int64_t from_pitch, int rows, int columns, int valid_rows,
                           int valid_columns) {
  const int chunks = columns / 8;
  for (int i = thread_index(); i < rows * chunks; i += kBackThreads) {
    const int r = i / chunks;
    const int c = i % chunks * 8;
    const bool valid = r < valid_rows && c < valid_columns;
    const std::int64_t source = valid ? at + r * from_pitch + c : 0;
    SLA2_UNROLL for (int p = 0; p < kTerms; ++p) {
      copy_async_16(tile + p * plane + r * pitch + c, from.data + p * from.plane + source, valid);
    }
  }
}

}  // namespace sla2::SLA2_CUDA_ROOM

// The sparse branch: P = min(1, exp(scale q.ks + log m - lse)) recomputed on both sides,
//   dS = P (dP - Ds), dP = dO v;   dQ = scale dS Ks,   dV = P^T dO,   dKs = scale dS^T Q.
// A block of 4 warps owns 64 queries (and walks the key blocks that they read) or 64 keys (and
// walks the query blocks that read them, head after head of the group); a warp owns 16 rows, whose
// operands stay in registers where they fit. The others' tiles come through shared memory one step
// ahead. Sums run in the order of the walk: the same bits every time. The scale is applied at the
// end, for queries alpha too, for keys it is applied to P; with 256 features dV and dK have a block
// each, or their sums would not fit.
#pragma once

#include "cuda/backward_rows.cuh"

namespace sla2::SLA2_CUDA_ROOM {

template <int kTerms, int D>
struct Sizes {
  static constexpr int kStep = kTerms * D <= 256 ? 32 : 16;  // keys or queries of a step
  static constexpr int kStages = kTerms * D <= 512 ? 2 : 1;
  static constexpr bool kHold = kTerms == 1 && D <= 128;  // own operands in registers
  static constexpr int kPitch = D + 8;
  static constexpr int kPlane = kStep * kPitch;
  static constexpr int kMatrix = kTerms * kPlane;
  static constexpr int kRowBytes = 2 * kStep * 4;             // lse and Ds of a step
  static constexpr int kUnits = D / 8;                        // of 16 bytes, of a row
  static constexpr int kCopyRows = kBackThreads / kUnits;     // that the block copies at once
  static constexpr int kStage = 2 * kMatrix * 2 + kRowBytes;  // bytes
  static constexpr int kFragments = kHold ? D / 16 : 1;
  static_assert(kStages * kStage + 4352 <= 99 * 1024);  // and Readers
};

/// The rows that a warp owns of one operand.
template <int kTerms, int D>
struct Own {
  Fragment<kTerms> held[Sizes<kTerms, D>::kFragments];
  Terms from;
  std::int64_t at = 0;

  SLA2_DEVICE void load(const Terms& terms, std::int64_t element, bool active) {
    from = terms;
    at = element;
    if constexpr (Sizes<kTerms, D>::kHold) {
      SLA2_UNROLL for (int k = 0; k < D / 16; ++k) {
        if (active) load_left_global(held[k], from, at + k * 16, D);
      }
    }
  }
  SLA2_DEVICE const Fragment<kTerms>& get(int k) {
    if constexpr (Sizes<kTerms, D>::kHold) return held[k];
    load_left_global(held[0], from, at + k * 16, D);
    return held[0];
  }
};

/// out [16, kColumns] = own [16, D] times tile [kColumns, D] transposed.
template <int kTerms, int D, int kColumns>
SLA2_DEVICE void scores(float (&out)[kColumns / 8][4], Own<kTerms, D>& own, const Bf16* tile) {
  using S = Sizes<kTerms, D>;
  SLA2_UNROLL for (int n = 0; n < kColumns / 8; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) out[n][e] = 0.0f;
  }
  const auto step = [&](int k) {
    const Fragment<kTerms>& a = own.get(k);
    SLA2_UNROLL for (int n = 0; n < kColumns / 16; ++n) {
      Fragment<kTerms> b;
      load_right(b, tile + n * 16 * S::kPitch + k * 16, S::kPitch, S::kPlane);
      multiply_add(out[2 * n], a, b, 0);
      multiply_add(out[2 * n + 1], a, b, 1);
    }
  };
  if constexpr (S::kHold) {
    SLA2_UNROLL for (int k = 0; k < D / 16; ++k) step(k);
  } else {
    SLA2_NO_UNROLL for (int k = 0; k < D / 16; ++k) step(k);
  }
}

/// acc [16, D] += weights [16, kColumns] times tile [kColumns, D].
template <int kTerms, int D, int kColumns>
SLA2_DEVICE void accumulate(float (&acc)[D / 8][4], const float (&weights)[kColumns / 8][4],
                            const Bf16* tile) {
  using S = Sizes<kTerms, D>;
  SLA2_UNROLL for (int k = 0; k < kColumns / 16; ++k) {
    Fragment<kTerms> a;
    split_left(a, weights[2 * k], weights[2 * k + 1]);
    SLA2_UNROLL for (int n = 0; n < D / 16; ++n) {
      Fragment<kTerms> b;
      load_right_transposed(b, tile + k * 16 * S::kPitch + n * 16, S::kPitch, S::kPlane);
      multiply_add(acc[2 * n], a, b, 0);
      multiply_add(acc[2 * n + 1], a, b, 1);
    }
  }
}

/// Starts the copy of kStep rows of D features that lie one behind the other.
template <int kTerms, int D>
SLA2_DEVICE void copy_rows(Bf16* tile, const Terms& from, std::int64_t at) {
  using S = Sizes<kTerms, D>;
  static_assert(S::kStep % S::kCopyRows == 0);
  const int row = thread_index() / S::kUnits;
  const int unit = thread_index() % S::kUnits * 8;
  Bf16* const to = tile + row * S::kPitch + unit;
  const Bf16* const source = from.data + at + row * D + unit;
  SLA2_UNROLL for (int p = 0; p < kTerms; ++p) {
    SLA2_UNROLL for (int r = 0; r < S::kStep; r += S::kCopyRows) {
      copy_async_16(to + p * S::kPlane + r * S::kPitch, source + p * from.plane + r * D, true);
    }
  }
}

/// log m in units of log 2; m = sigmoid(x).
SLA2_DEVICE float log2_weight(float x) {
  return kLog2E * (x >= 0.0f ? -exact_log1p(exact_exp(-x)) : x - exact_log1p(exact_exp(x)));
}

/// 2^min(x, 0); NaN stays.
SLA2_DEVICE float probability(float x) { return fast_exp2(min_or_nan(x, 0.0f)); }

/// Runs compute(walk, stage, next) for every step, the next one's tiles on their way meanwhile.
/// Ends with a barrier: the stages may be used again.
template <int kStages, int kStage, typename Walk, typename Copy, typename Compute>
SLA2_DEVICE void pipeline(const Walk& first, Copy copy, Compute compute) {
  Walk now = first;
  int step = 0;
  if (kStages == 2 && !now.done()) copy(now, 0);
  copy_async_commit();
  SLA2_NO_UNROLL while (!now.done()) {
    Walk next = now;
    next.advance();
    if constexpr (kStages == 1) {
      copy(now, 0);
      copy_async_commit();
    }
    copy_async_wait<0>();
    block_barrier();  // the step is there, and the last one has been read
    if constexpr (kStages == 2) {
      if (!next.done()) copy(next, (step + 1) % 2 * kStage);
      copy_async_commit();
    }
    compute(now, step % kStages * kStage, next);
    if constexpr (kStages == 1) block_barrier();
    now = next;
    ++step;
  }
  block_barrier();
}

/// Pairs of a row that are loaded together, before a store: one after the other they would wait.
inline constexpr int kEpilogue = 8;
SLA2_DEVICE void load_pairs(const float* row, int first, Words2 (&pairs)[kEpilogue]) {
  const int column = first * 8 + fresh_thread_index() % 4 * 2;
  SLA2_UNROLL for (int n = 0; n < kEpilogue; ++n) pairs[n] = load_8(row + column + n * 8);
}

}  // namespace sla2::SLA2_CUDA_ROOM

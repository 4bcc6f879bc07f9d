// Step 2 (Eq. 14): softmax attention of 16 query rows a warp over the routed key blocks.
// Keys come in tiles (16 to 64), made of parts that lie in one key block each; the maximum is the
// running one, taken tile by tile (int8: a chunk is one tile, p = round(255 exp(s - running max))).
// Scores, weights and outputs (all but kParked fragments) stay in registers: the fragments of the
// scores are those of p, which is why 8-bit v is stored in permuted key order. s32 sums start at
// the integer form of 1.5 * 2^23, so that their bits, read as a float, are that number plus the
// sum: no conversion.
#pragma once

#include "cuda/sparse_tiles.cuh"

namespace sla2::SLA2_CUDA_ROOM {

// ---- Queries ---------------------------------------------------------------------------------

/// The fragment of one step of a product: 32 bytes of both rows. `base` is the plane of the term.
SLA2_DEVICE void row_fragment(const void* base, const Call& c, const Queries& q, int row_bytes,
                              int step, std::uint32_t (&fragment)[4]) {
  const auto* bytes = static_cast<const unsigned char*>(base) + step * 32 + lane_index() % 4 * 4;
  SLA2_UNROLL for (int e = 0; e < 4; ++e) {
    fragment[e] = load_4(bytes + q.line(c, e % 2) * row_bytes + e / 2 * 16);
  }
}

/// Starts the copy of the warp's 16 rows of q.
template <Format F, int D>
SLA2_DEVICE void load_queries(const Call& c, const Queries& q) {
  using S = Sparse<F, D>;
  constexpr int kUnits = D * S::kBytes / 16;
  const int first = warp_index() * 16;
  unsigned char* to = shared_memory<unsigned char>(S::kQueriesAt) + first * S::kQueryStride;
  const auto* from = static_cast<const unsigned char*>(c.q_low) +
                     (std::int64_t{q.head} * c.Nq + q.first + first) * D * S::kBytes;
  const int rows = q.end(c) - q.first - first;
  SLA2_UNROLL for (int i = 0; i < 16 * kUnits; i += 32) {
    const int at = i + lane_index();
    const bool valid = at / kUnits < rows;
    copy_async_16(to + at / kUnits * S::kQueryStride + at % kUnits * 16,
                  valid ? from + at * 16 : static_cast<const unsigned char*>(c.q_low), valid);
  }
}

/// q's fragments, wherever they lie.
template <Format F, int D>
struct QueryFragments {
  using S = Sparse<F, D>;
  std::uint32_t kept[S::kKeptQ ? S::kSteps : 1][4];

  SLA2_DEVICE void load(const Call& c, const Queries& q, int step,
                        std::uint32_t (&fragment)[4]) const {
    if constexpr (S::kSharedQ) {
      ldmatrix_x4(fragment, shared_memory<unsigned char>(S::kQueriesAt) +
                                (warp_index() * 16 + lane_index() % 16) * S::kQueryStride +
                                step * 32 + lane_index() / 16 * 16);
    } else if constexpr (S::kKeptQ) {
      SLA2_UNROLL for (int e = 0; e < 4; ++e) fragment[e] = kept[step][e];
    } else {
      row_fragment(c.q_low, c, q, D * S::kBytes, step, fragment);
    }
  }
};

/// What the scores of this thread's two rows are multiplied by, log2(e) included.
template <Format F, int D>
class RowScales {
 public:
  SLA2_DEVICE RowScales(const Call& c, const Queries& q)
      : unit_((F == Format::kF16 ? 2.0f : 1.0f) * c.scale * kLog2E) {  // kF16 holds Ks / 2
    if constexpr (S::kLowBit) {
      SLA2_UNROLL for (int r = 0; r < 2; ++r) {
        const float scale = c.q_scale[q.line(c, r)] * unit_;
        if constexpr (!kIsShared) {
          kept_[r] = scale;
        } else if (lane_index() % 4 == 0) {
          *place(r) = scale;
        }
      }
      warp_barrier();
    }
  }
  [[nodiscard]] SLA2_DEVICE float of(int r) const {
    if constexpr (!S::kLowBit) return unit_;
    if constexpr (!kIsShared) return kept_[r];
    return *place(r);
  }

 private:
  using S = Sparse<F, D>;
  static constexpr bool kIsShared = S::kLowBit && S::kSharedQ;  // registers are short there
  SLA2_DEVICE static float* place(int r) {
    return shared_memory<float>(
        S::kQueriesAt + S::kQueryScale +
        static_cast<std::size_t>(warp_index() * 16 + lane_index() / 4 + 8 * r) * S::kQueryStride);
  }
  float unit_;
  float kept_[2] = {};
};

// ---- Products --------------------------------------------------------------------------------

template <Format F>
SLA2_DEVICE void mma_16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                        std::uint32_t b1) {
  if constexpr (F == Format::kF16) {
    mma_f16(c, a, b0, b1);
  } else {
    mma_bf16(c, a, b0, b1);
  }
}

/// Addresses of the fragments of 8 rows x 64 bytes: two steps of a product.
SLA2_DEVICE const unsigned char* fragment_row(const unsigned char* base, int row, int stride,
                                              int byte) {
  return base + (row + lane_index() % 8) * stride + byte + lane_index() / 8 * 16;
}

/// q.ks, not scaled.
template <Format F, int D>
SLA2_DEVICE void score(const Call& c, const Queries& rows, const unsigned char* keys,
                       const QueryFragments<F, D>& q, float (&s)[Sparse<F, D>::kScores][4]) {
  using S = Sparse<F, D>;
  using Sum = std::conditional_t<S::kLowBit, std::int32_t, float>;
  Sum dot[S::kScores][4];
  SLA2_UNROLL for (int n = 0; n < S::kScores; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) dot[n][e] = S::kLowBit ? Sum{kMagicBits} : Sum{0};
  }
  const unsigned char* row =
      keys + (lane_index() / 16 * 8 + lane_index() % 8) * S::kKeyStride + lane_index() / 8 % 2 * 16;
  SLA2_UNROLL for (int step = 0; step < S::kSteps; ++step) {
    std::uint32_t a[4];
    q.load(c, rows, step, a);
    SLA2_UNROLL for (int n = 0; n < S::kScores; n += 2) {
      std::uint32_t k[4];
      ldmatrix_x4(k, row + n * 8 * S::kKeyStride + step * 32);
      SLA2_UNROLL for (int half = 0; half < 2; ++half) {
        if constexpr (S::kLowBit) {
          mma_s8_s8(dot[n + half], a, k[2 * half], k[2 * half + 1]);
        } else {
          mma_16<F>(dot[n + half], a, k[2 * half], k[2 * half + 1]);
        }
      }
    }
  }
  SLA2_UNROLL for (int n = 0; n < S::kScores; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) {
      if constexpr (S::kLowBit) {
        s[n][e] = bits_to_float(static_cast<std::uint32_t>(dot[n][e])) - kMagic;
      } else {
        s[n][e] = dot[n][e];
      }
    }
  }
}

/// q.ks of three terms each, small products first; sums rounded to nearest in fp32.
template <int D>
SLA2_DEVICE void score_fp32(const Call& c, const Queries& rows, const unsigned char* keys,
                            float (&s)[Sparse<Format::kFp32, D>::kScores][4]) {
  using S = Sparse<Format::kFp32, D>;
  SLA2_UNROLL for (int n = 0; n < S::kScores; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) s[n][e] = 0;
  }
  for (int order = 2; order >= 0; --order) {
    for (int term = 0; term <= order; ++term) {
      const unsigned char* plane = keys + (order - term) * S::kKeyPlane;
      const Bf16* q_plane = static_cast<const Bf16*>(c.q_low) + term * c.q_plane;
      SLA2_NO_UNROLL for (int step = 0; step < S::kSteps; step += 2) {
        std::uint32_t q0[4], q1[4];
        row_fragment(q_plane, c, rows, D * 2, step, q0);
        row_fragment(q_plane, c, rows, D * 2, step + 1, q1);
        SLA2_UNROLL for (int n = 0; n < S::kScores; ++n) {
          std::uint32_t k[4];
          ldmatrix_x4(k, fragment_row(plane, n * 8, S::kKeyStride, step * 32));
          float product[4] = {};
          mma_bf16(product, q0, k[0], k[1]);
          SLA2_UNROLL for (int e = 0; e < 4; ++e) s[n][e] += product[e];
          float second[4] = {};
          mma_bf16(second, q1, k[2], k[3]);
          SLA2_UNROLL for (int e = 0; e < 4; ++e) s[n][e] += second[e];
        }
      }
    }
  }
}

/// o = o * correction + p v for 8-bit p and v; adds p's row sums to `sum`.
template <Format F, int D>
SLA2_DEVICE void weigh_low_bit(const unsigned char* values,
                               const float (&s)[Sparse<F, D>::kScores][4],
                               const float (&correction)[2], Running<D>& run) {
  using S = Sparse<F, D>;
  std::uint32_t p[2][4];
  SLA2_UNROLL for (int n = 0; n < S::kScores; n += 2) {
    SLA2_UNROLL for (int r = 0; r < 2; ++r) {
      std::uint32_t word;
      if constexpr (F == Format::kInt8) {
        std::uint32_t q[4];
        SLA2_UNROLL for (int e = 0; e < 4; ++e) {
          q[e] = float_to_bits(fused(s[n + e / 2][2 * r + e % 2], 255.0f, kMagic));
        }
        word = pack_low_bytes(q[0], q[1], q[2], q[3]);
      } else {
        word = pack_e4m3(s[n][2 * r], s[n][2 * r + 1]) |
               pack_e4m3(s[n + 1][2 * r], s[n + 1][2 * r + 1]) << 16;
      }
      p[n / 4][n / 2 % 2 * 2 + r] = word;
    }
  }
  // Always 0, which the compiler cannot know: it starts no product before the last exponential, as
  // it would at the cost of o's registers.
  const auto zero = static_cast<std::uint32_t>(block_y());
  SLA2_UNROLL for (int e = 0; e < 4; ++e) p[0][e] |= p[1][e] & zero;
  if constexpr (F == Format::kInt8) {
    std::int32_t total[4] = {};
    mma_u8_s8(total, p[0], 0x01010101u, 0x01010101u);
    mma_u8_s8(total, p[1], 0x01010101u, 0x01010101u);
    run.sum[0] = run.sum[0] * correction[0] + static_cast<float>(total[0]);
    run.sum[1] = run.sum[1] * correction[1] + static_cast<float>(total[2]);
  } else {
    float total[4] = {};
    mma_e4m3(total, p[0], 0x38383838u, 0x38383838u);  // ones
    mma_e4m3(total, p[1], 0x38383838u, 0x38383838u);
    run.sum[0] = run.sum[0] * correction[0] + total[0];
    run.sum[1] = run.sum[1] * correction[1] + total[2];
  }
  SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
    // Keeps the compiler from loading many fragments ahead, which would cost it the registers of o.
    if (F == Format::kFp8 || n % 4 != 0) warp_barrier();
    if (n >= S::kHeld) fetch<F, D>(run, n, S::parked_at(block_threads() / 2));
    std::uint32_t v[4];
    ldmatrix_x4(v, fragment_row(values, n * 8, S::kValueStride, 0));
    if constexpr (F == Format::kInt8) {
      std::int32_t dot[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
      mma_u8_s8(dot, p[0], v[0], v[1]);
      mma_u8_s8(dot, p[1], v[2], v[3]);
      SLA2_UNROLL for (int e = 0; e < 4; ++e) {
        run.o[n][e] = fused(run.o[n][e], correction[e / 2],
                            bits_to_float(static_cast<std::uint32_t>(dot[e])) - kMagic);
      }
    } else {
      float dot[4] = {};
      mma_e4m3(dot, p[0], v[0], v[1]);
      mma_e4m3(dot, p[1], v[2], v[3]);
      SLA2_UNROLL for (int e = 0; e < 4; ++e) {
        run.o[n][e] = fused(run.o[n][e], correction[e / 2], dot[e]);
      }
    }
    if (n >= S::kHeld) park<F, D>(run, n, S::parked_at(block_threads() / 2));
  }
}

/// o = o * correction + p v for 16-bit p and v, and for three terms of each.
template <Format F, int D>
SLA2_DEVICE void weigh_16(const unsigned char* values, const float (&s)[Sparse<F, D>::kScores][4],
                          const float (&correction)[2], Running<D>& run) {
  using S = Sparse<F, D>;
  SLA2_UNROLL for (int r = 0; r < 2; ++r) {
    float total = 0;
    SLA2_UNROLL for (int n = 0; n < S::kScores; ++n) total += s[n][2 * r] + s[n][2 * r + 1];
    run.sum[r] = fused(run.sum[r], correction[r], total);
  }
  if (ballot(correction[0] != 1 || correction[1] != 1) != 0) {  // a maximum of the warp moved
    SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
      SLA2_UNROLL for (int e = 0; e < 4; ++e) run.o[n][e] *= correction[e / 2];
    }
  }
  const int lane = lane_index();
  SLA2_UNROLL for (int step = 0; step < S::kScores / 2; ++step) {
    std::uint32_t p[S::kPlanes][4];
    SLA2_UNROLL for (int e = 0; e < 4; ++e) {
      float low = s[step * 2 + e / 2][e % 2 * 2];
      float high = s[step * 2 + e / 2][e % 2 * 2 + 1];
      if constexpr (F == Format::kFp32) {
        SLA2_UNROLL for (int term = 0; term < 3; ++term) p[term][e] = next_term(low, high);
      } else {
        p[0][e] = F == Format::kF16 ? pack_f16(low, high) : pack_bf16(low, high);
      }
    }
    SLA2_UNROLL for (int n = 0; n < D / 8; n += 2) {
      SLA2_UNROLL for (int plane = S::kPlanes - 1; plane >= 0; --plane) {
        std::uint32_t v[4];
        ldmatrix_x4_transposed(v, values + plane * S::kValuePlane +
                                      (step * 16 + lane % 16) * S::kValueStride +
                                      (n * 8 + lane / 16 * 8) * 2);
        SLA2_UNROLL for (int half = 0; half < 2; ++half) {
          if constexpr (F == Format::kFp32) {
            SLA2_UNROLL for (int term = 2 - plane; term >= 0; --term) {
              float product[4] = {};
              mma_bf16(product, p[term], v[2 * half], v[2 * half + 1]);
              SLA2_UNROLL for (int e = 0; e < 4; ++e) run.o[n + half][e] += product[e];
            }
          } else {
            mma_16<F>(run.o[n + half], p[0], v[2 * half], v[2 * half + 1]);
          }
        }
      }
    }
  }
}

// ---- The branch ------------------------------------------------------------------------------

/// Scores of one tile to weights exp2(s - max): scales, masks, moves the running maximum.
template <Format F, int D>
SLA2_DEVICE void soften(const Call& c, int tile, const RowScales<F, D>& scales,
                        float (&s)[Sparse<F, D>::kScores][4], Running<D>& run,
                        float (&correction)[2]) {
  using S = Sparse<F, D>;
  constexpr int kPerPart = S::kPartKeys / 8;
  const float row_scale[2] = {scales.of(0), scales.of(1)};
  float max[2] = {run.max[0], run.max[1]};
  SLA2_UNROLL for (int p = 0; p < S::kParts; ++p) {
    const Part part = part_of<F, D>(c, tile * S::kParts + p);
    const float key_scale = S::kLowBit ? part.value : 1.0f;
    const float factor[2] = {row_scale[0] * key_scale, row_scale[1] * key_scale};
    SLA2_UNROLL for (int m = 0; m < kPerPart; ++m) {
      float(&x)[4] = s[p * kPerPart + m];
      SLA2_UNROLL for (int e = 0; e < 4; ++e) {
        x[e] *= factor[e / 2];
        if constexpr (!S::kLowBit) x[e] += part.value;
      }
    }
    if (part.valid < S::kPartKeys) {
      SLA2_UNROLL for (int m = 0; m < kPerPart; ++m) {
        SLA2_UNROLL for (int e = 0; e < 4; ++e) {
          const int key = m * 8 + lane_index() % 4 * 2 + e % 2;
          if (key >= part.valid) s[p * kPerPart + m][e] = -kInfinity;
        }
      }
    }
    if constexpr (S::kLowBit) {  // a scale that is NaN makes the row NaN
      SLA2_UNROLL for (int r = 0; r < 2; ++r) run.sum[r] += key_scale - key_scale;
    }
  }
  SLA2_UNROLL for (int n = 0; n < S::kScores; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) max[e / 2] = max_of(max[e / 2], s[n][e]);
  }
  SLA2_UNROLL for (int r = 0; r < 2; ++r) {
    max[r] = max_of(max[r], shuffle_xor(max[r], 1));
    max[r] = max_of(max[r], shuffle_xor(max[r], 2));
    correction[r] = fast_exp2(run.max[r] - max[r]);
    run.max[r] = max[r];
  }
  // fp8: p comes out times 448.
  if constexpr (F == Format::kFp8) {
    SLA2_UNROLL for (int r = 0; r < 2; ++r) max[r] -= kLog2Of448;
  }
  SLA2_UNROLL for (int n = 0; n < S::kScores; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) s[n][e] = fast_exp2(s[n][e] - max[e / 2]);
  }
}

/// All routed keys of the warp's rows. Afterwards run.o is o_s (low-bit: before the scales of v),
/// `lse` the natural log of the sum.
template <Format F, int D>
SLA2_DEVICE void sparse_branch(const Call& c, const Queries& q, Running<D>& run, float (&lse)[2]) {
  using S = Sparse<F, D>;
  QueryFragments<F, D> fragments;
  if constexpr (S::kSharedQ) load_queries<F, D>(c, q);
  if constexpr (S::kKeptQ) {
    SLA2_UNROLL for (int step = 0; step < S::kSteps; ++step) {
      row_fragment(c.q_low, c, q, D * S::kBytes, step, fragments.kept[step]);
    }
  }
  const RowScales<F, D> scales(c, q);
  SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) run.o[n][e] = 0;
    if (n >= S::kHeld) park<F, D>(run, n, S::parked_at(block_threads() / 2));
  }
  SLA2_UNROLL for (int r = 0; r < 2; ++r) {
    run.max[r] = kLowest;
    run.sum[r] = 0;
  }

  const int tiles = ((routed_count(c, q) << part_bits<F, D>(c)) + S::kParts - 1) / S::kParts;
  fill_entries<F, D>(c, q, 0);
  block_barrier();
  if (S::kStages == 2 && tiles > 0) load_tile<F, D>(c, 0, 0);
  copy_async_commit();
  SLA2_NO_UNROLL for (int tile = 0; tile < tiles; ++tile) {
    if constexpr (S::kStages == 1) {
      block_barrier();
      load_tile<F, D>(c, tile, 0);
      copy_async_commit();
    }
    copy_async_wait<0>();
    block_barrier();
    const int next = (tile + 1) * S::kParts;  // part; the first of 32 entries?
    if ((next & ((32 << part_bits<F, D>(c)) - 1)) == 0) {
      fill_entries<F, D>(c, q, next >> part_bits<F, D>(c));
      block_barrier();
    }
    if (S::kStages == 2 && tile + 1 < tiles) {
      load_tile<F, D>(c, tile + 1, (tile + 1) % 2);
      copy_async_commit();
    }
    const unsigned char* keys = shared_memory<unsigned char>(
        kTilesAt + static_cast<std::size_t>(S::kStages == 2 ? tile % 2 : 0) * S::kStageBytes);
    const unsigned char* values = keys + S::kPlanes * S::kKeyPlane;
    float s[S::kScores][4];
    float correction[2];
    if constexpr (F == Format::kFp32) {
      score_fp32<D>(c, q, keys, s);
    } else {
      score<F, D>(c, q, keys, fragments, s);
    }
    soften<F, D>(c, tile, scales, s, run, correction);
    if constexpr (S::kLowBit) {
      weigh_low_bit<F, D>(values, s, correction, run);
    } else {
      weigh_16<F, D>(values, s, correction, run);
    }
  }

  SLA2_UNROLL for (int n = S::kHeld; n < D / 8; ++n) {
    fetch<F, D>(run, n, S::parked_at(block_threads() / 2));
  }
  float poison[2] = {};
  SLA2_UNROLL for (int r = 0; r < 2; ++r) {
    if constexpr (S::kLowBit) {
      poison[r] += scales.of(r) - scales.of(r);
    } else {
      run.sum[r] += shuffle_xor(run.sum[r], 1);
      run.sum[r] += shuffle_xor(run.sum[r], 2);
    }
    // No key: o_s = 0, lse = -inf.
    const float inverse = run.sum[r] == 0 ? 0.0f : 1.0f / run.sum[r];
    lse[r] = run.max[r] * kLn2 + exact_log(run.sum[r] / S::kLimit) + poison[r];
    SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
      SLA2_UNROLL for (int e = 0; e < 2; ++e) {
        float& o = run.o[n][2 * r + e];
        o = o * inverse + poison[r];
      }
    }
  }
}

}  // namespace sla2::SLA2_CUDA_ROOM

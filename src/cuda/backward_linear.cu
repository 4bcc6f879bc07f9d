// The linear branch by rows. Queries (64 rows of one query block i):
//   d phi(q) = w (dO_l H_i^T - Dl Z_i), w = (1 - alpha) / (phi(q) . Z_i), dTop = w dO_l,
//   dBottom = -w Dl; keys (64 rows of key block j): d phi(k) = v dh_j^T + dz_j, dv = phi(k) dh_j;
// then through phi. One block of 4 warps owns its rows, 16 a warp; the state is copied through
// shared memory one step ahead. phi' follows from phi: softmax phi (d - <phi, d>), elu + 1
// min(phi, 1), relu phi > 0.
#include "cuda/backward_rows.cuh"
#include "cuda/backward_scores.cuh"
#include "cuda/lines.cuh"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

/// How a [rows, D] = [rows, D] [D, D] product streams the right operand.
template <int kTerms, int D>
struct RowProduct {
  static constexpr int kDepth = kTerms * D <= 256 ? 32 : 16;  // of a step
  static constexpr int kPitchByN = kDepth + 8;                // tile [D, kDepth]
  static constexpr int kPitchByK = D + 8;                     // tile [kDepth, D]
  static constexpr int kPlane =
      D * kPitchByN > kDepth* kPitchByK ? D* kPitchByN : kDepth* kPitchByK;
  static constexpr int kStage = kTerms * kPlane;
  static constexpr std::size_t kShared = sizeof(Bf16) * 2 * kStage;
};

/// acc = left [16 rows a warp, D] times right [D, D]; kByN: right is stored [n, k].
template <int kTerms, int D, bool kByN>
SLA2_DEVICE void row_product(float (&acc)[D / 8][4], const Terms& left, std::int64_t left_at,
                             const Terms& right, std::int64_t right_at, bool active) {
  using Sizes = RowProduct<kTerms, D>;
  Bf16* shared = shared_memory<Bf16>(0);
  constexpr int kSteps = D / Sizes::kDepth;
  constexpr int kPitch = kByN ? Sizes::kPitchByN : Sizes::kPitchByK;
  const auto copy = [&](int step) {
    if (step < kSteps) {
      Bf16* stage = shared + step % 2 * Sizes::kStage;
      const int k = step * Sizes::kDepth;
      if constexpr (kByN) {
        copy_tile<kTerms>(stage, kPitch, Sizes::kPlane, right, right_at + k, D, D, Sizes::kDepth, D,
                          Sizes::kDepth);
      } else {
        copy_tile<kTerms>(stage, kPitch, Sizes::kPlane, right,
                          right_at + static_cast<std::int64_t>(k) * D, D, Sizes::kDepth, D,
                          Sizes::kDepth, D);
      }
    }
    copy_async_commit();
  };
  SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
  }
  copy(0);
  SLA2_NO_UNROLL for (int step = 0; step < kSteps; ++step) {
    copy(step + 1);
    Fragment<kTerms> own[Sizes::kDepth / 16];
    SLA2_UNROLL for (int k = 0; active && k < Sizes::kDepth / 16; ++k) {
      load_left_global(own[k], left, left_at + step * Sizes::kDepth + k * 16, D);
    }
    copy_async_wait<1>();
    block_barrier();
    const Bf16* stage = shared + step % 2 * Sizes::kStage;
    if (active) {
      SLA2_UNROLL for (int k = 0; k < Sizes::kDepth; k += 16) {
        const Fragment<kTerms>& a = own[k / 16];
        SLA2_UNROLL for (int n = 0; n < D / 16; ++n) {
          Fragment<kTerms> b;
          if constexpr (kByN) {
            load_right(b, stage + n * 16 * kPitch + k, kPitch, Sizes::kPlane);
          } else {
            load_right_transposed(b, stage + k * kPitch + n * 16, kPitch, Sizes::kPlane);
          }
          multiply_add(acc[2 * n], a, b, 0);
          multiply_add(acc[2 * n + 1], a, b, 1);
        }
      }
    }
    block_barrier();
  }
  copy_async_wait<0>();
}

/// Two neighbours; `at` is even.
template <int kTerms>
SLA2_DEVICE void load_pair(const Terms& from, std::int64_t at, float& low, float& high) {
  low = high = 0.0f;
  SLA2_UNROLL for (int p = kTerms - 1; p >= 0; --p) {
    const std::uint32_t word = load_4(from.data + p * from.plane + at);
    low += bits_to_float(word << 16);
    high += bits_to_float(word & 0xffff0000u);
  }
}

/// In place: gradient of phi to gradient of x, for the rows g and g + 8 of a warp.
template <int kTerms, int D>
SLA2_DEVICE void through_phi(float (&acc)[D / 8][4], const Terms& phi, std::int64_t at,
                             FeatureMap map) {
  const std::int64_t first =
      at + static_cast<std::int64_t>(lane_index() / 4) * D + lane_index() % 4 * 2;
  SLA2_UNROLL for (int half = 0; half < 2; ++half) {
    const std::int64_t row = first + half * 8 * D;
    float mean = 0.0f;
    if (map == FeatureMap::kSoftmax) {
      SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
        float p[2];
        load_pair<kTerms>(phi, row + n * 8, p[0], p[1]);
        mean += p[0] * acc[n][2 * half] + p[1] * acc[n][2 * half + 1];
      }
      mean += shuffle_xor(mean, 1);
      mean += shuffle_xor(mean, 2);
    }
    SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
      float p[2];
      load_pair<kTerms>(phi, row + n * 8, p[0], p[1]);
      SLA2_UNROLL for (int e = 0; e < 2; ++e) {
        float& d = acc[n][2 * half + e];
        if (map == FeatureMap::kSoftmax) {
          d = p[e] * (d - mean);
        } else if (map == FeatureMap::kElu) {
          d = min_of(p[e], 1.0f) * d;
        } else {
          d = p[e] > 0.0f ? d : 0.0f;
        }
      }
    }
  }
}

template <int D>
SLA2_DEVICE void store_acc(const float (&acc)[D / 8][4], float* to, std::int64_t at) {
  float* row = to + at + static_cast<std::int64_t>(lane_index() / 4) * D + lane_index() % 4 * 2;
  SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
    store_8(row + n * 8, {{float_to_bits(acc[n][0]), float_to_bits(acc[n][1])}});
    store_8(row + 8 * D + n * 8, {{float_to_bits(acc[n][2]), float_to_bits(acc[n][3])}});
  }
}

/// Eight neighbours, the sum of their terms.
template <int kTerms>
SLA2_DEVICE void load_line(const Terms& from, std::int64_t at, float (&x)[kLine]) {
  SLA2_UNROLL for (int e = 0; e < kLine; ++e) x[e] = 0.0f;
  SLA2_UNROLL for (int p = kTerms - 1; p >= 0; --p) {
    const Words4 words = load_16(from.data + p * from.plane + at);
    SLA2_UNROLL for (int w = 0; w < 4; ++w) {
      x[2 * w] += bits_to_float(words.x[w] << 16);
      x[2 * w + 1] += bits_to_float(words.x[w] & 0xffff0000u);
    }
  }
}

/// w and -w Dl of the warp's 16 rows, also to shared memory, and dTop; eight features a lane.
template <int kTerms, int D>
SLA2_DEVICE void scale_rows(const Backward& back, std::int64_t row, std::int64_t z_at, float factor,
                            float* weights, float* bottoms) {
  constexpr int kLanes = D / kLine;
  constexpr int kRows = 32 / kLanes;           // at once
  constexpr int kBatch = kTerms == 1 ? 4 : 2;  // loads of so many are under way together
  const int channel = lane_index() % kLanes * kLine;
  const int own = lane_index() / kLanes;
  float z[kLine];
  load_line<kTerms>(back.sums, z_at + channel, z);
  SLA2_NO_UNROLL for (int first = 0; first < 16; first += kRows * kBatch) {
    float phi[kBatch][kLine], d_l[kBatch][kLine], delta[kBatch];
    SLA2_UNROLL for (int s = 0; s < kBatch; ++s) {
      const std::int64_t at = row + first + s * kRows + own;
      load_line<kTerms>(back.phi_q, at * D + channel, phi[s]);
      load_line<kTerms>(back.d_l, at * D + channel, d_l[s]);
      delta[s] = back.delta_linear[at];
    }
    SLA2_UNROLL for (int s = 0; s < kBatch; ++s) {
      const int r = first + s * kRows + own;
      float bottom = 0.0f;
      SLA2_UNROLL for (int e = 0; e < kLine; ++e) bottom += phi[s][e] * z[e];
      bottom = sum_over_row<kLanes>(bottom);
      // Under 2^-64 the branch gives nothing, and no gradient.
      const float weight = factor == 0.0f || bottom < 0x1p-64f ? 0.0f : factor / bottom;
      SLA2_UNROLL for (int e = 0; e < kLine; ++e) {
        d_l[s][e] = weight == 0.0f ? 0.0f : weight * d_l[s][e];
      }
      store_line_terms<kTerms>(back.d_top.data + (row + r) * D + channel, back.d_top.plane, d_l[s]);
      if (channel != 0) continue;
      const float d_bottom = weight == 0.0f ? 0.0f : -weight * delta[s];
      weights[r] = weight;
      bottoms[r] = d_bottom;
      back.d_bottom[row + r] = d_bottom;
    }
  }
}

template <int kTerms, int D>
SLA2_KERNEL(kBackThreads, 1)
void linear_queries_kernel(Backward back) {
  const Call& c = back.call;
  const std::int64_t head = block_y();
  const int i = block_x() / back.query_tiles;
  const int tile = block_x() % back.query_tiles;
  const int warp_row = tile * kTileRows + warp_index() * 16;
  const bool active = warp_row < c.bq;
  const std::int64_t row = (head * c.M + i) * c.bq + warp_row;
  const std::int64_t state = (head * c.M + i) * back.C;
  const float factor = linear_factor(back, block_y() / c.H, block_y() % c.H, i);
  float* weights = shared_memory<float>(RowProduct<kTerms, D>::kShared);  // [64]
  float* bottoms = weights + kTileRows;                                   // [64]
  if (active) {
    scale_rows<kTerms, D>(back, row, state + static_cast<std::int64_t>(D) * D, factor,
                          weights + warp_index() * 16, bottoms + warp_index() * 16);
  }
  warp_barrier();
  float acc[D / 8][4];
  row_product<kTerms, D, true>(acc, back.d_l, row * D, back.sums, state, active);
  if (!active) return;

  float row_weights[2];
  float row_bottoms[2];
  SLA2_UNROLL for (int half = 0; half < 2; ++half) {
    const int r = warp_index() * 16 + lane_index() / 4 + half * 8;
    row_weights[half] = weights[r];
    row_bottoms[half] = bottoms[r];
  }
  SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
    float z[2];
    load_pair<kTerms>(back.sums, state + D * D + n * 8 + lane_index() % 4 * 2, z[0], z[1]);
    SLA2_UNROLL for (int e = 0; e < 4; ++e) {
      // A row without weight stays 0 even where its state is not finite.
      const float weight = row_weights[e / 2];
      acc[n][e] = weight == 0.0f ? 0.0f : weight * acc[n][e] + row_bottoms[e / 2] * z[e % 2];
    }
  }
  through_phi<kTerms, D>(acc, back.phi_q, row * D, c.feature_map);
  store_acc<D>(acc, back.d_q_linear, row * D);
}

template <int kTerms, int D>
SLA2_KERNEL(kBackThreads, 1)
void linear_keys_kernel(Backward back) {
  const Call& c = back.call;
  if (block_z() == 1) return score_blocks<kTerms>(back);
  if (block_x() >= c.T * back.key_tiles || block_y() >= c.B * c.Hkv) return;
  const std::int64_t head = block_y();
  const int j = block_x() / back.key_tiles;
  const int tile = block_x() % back.key_tiles;
  const int warp_row = tile * kTileRows + warp_index() * 16;
  const bool active = warp_row < c.bk;
  const std::int64_t row = (head * c.T + j) * c.bk + warp_row;
  const std::int64_t state = (head * c.T + j) * back.C;
  float acc[D / 8][4];
  row_product<kTerms, D, false>(acc, back.phi_k, row * D, back.d_h, state, active);
  if (active) store_acc<D>(acc, back.d_v_linear, row * D);
  row_product<kTerms, D, true>(acc, back.v, row * D, back.d_h, state, active);
  float* parts = shared_memory<float>(0);  // [4, D]
  if (active) {
    SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
      float z[2];
      load_pair<kTerms>(back.d_h, state + D * D + n * 8 + lane_index() % 4 * 2, z[0], z[1]);
      SLA2_UNROLL for (int e = 0; e < 4; ++e) acc[n][e] += z[e % 2];
    }
    through_phi<kTerms, D>(acc, back.phi_k, row * D, c.feature_map);
    store_acc<D>(acc, back.d_keys, row * D);
  }
  // Rows behind the last key have phi = 0, hence no gradient (softmax, relu; elu: min(phi, 1)).
  SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
    SLA2_UNROLL for (int e = 0; e < 2; ++e) {
      float sum = active ? acc[n][e] + acc[n][2 + e] : 0.0f;
      sum += shuffle_xor(sum, 4);
      sum += shuffle_xor(sum, 8);
      sum += shuffle_xor(sum, 16);
      if (lane_index() < 4) parts[warp_index() * D + n * 8 + lane_index() * 2 + e] = sum;
    }
  }
  block_barrier();
  for (int a = thread_index(); a < D; a += kBackThreads) {
    const float sum = parts[a] + parts[D + a] + parts[2 * D + a] + parts[3 * D + a];
    back.key_sums[(head * c.T * back.key_tiles + block_x()) * D + a] = sum;
  }
}

template <int kTerms, int D>
void launch_linear(const Backward& back, bool queries, void* stream) {
  const Call& c = back.call;
  constexpr std::size_t kShared = RowProduct<kTerms, D>::kShared + 2 * kTileRows * sizeof(float);
  static_assert(kShared <= 99 * 1024);
  if (queries) {
    launch(stream, linear_queries_kernel<kTerms, D>, {c.M * back.query_tiles, c.B * c.H, 1},
           kBackThreads, kShared, back);
  } else {
    Grid grid{c.T * back.key_tiles, c.B * c.Hkv, 1};
    std::size_t bytes = kShared;
    if (back.learns_router && !c.scope_all) {
      constexpr std::size_t kScores = sizeof(Bf16) * 2 * kTerms * (kProductPlaneA + kProductPlaneB);
      static_assert(kScores <= 99 * 1024);
      grid = {score_tiles(c) > grid.x ? score_tiles(c) : grid.x, c.B * c.H, 2};
      bytes = kScores > bytes ? kScores : bytes;
    }
    launch(stream, linear_keys_kernel<kTerms, D>, grid, kBackThreads, bytes, back);
  }
}

}  // namespace

void back_linear_queries(const Backward& back, void* stream) {
  with_sizes(back, [&](auto terms, auto d) {
    launch_linear<decltype(terms)::value, decltype(d)::value>(back, true, stream);
  });
}

void back_linear_keys(const Backward& back, void* stream) {
  with_sizes(back, [&](auto terms, auto d) {
    launch_linear<decltype(terms)::value, decltype(d)::value>(back, false, stream);
  });
}

}  // namespace sla2::SLA2_CUDA_ROOM

// dQ of the sparse branch, and what soft routing learns from it: see backward_sparse.cuh.
#include "cuda/backward_sparse.cuh"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

template <int D>
SLA2_DEVICE void clear(float (&acc)[D / 8][4]) {
  SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
  }
}

/// The steps of keys that one query block reads, ascending.
template <int kStep>
struct KeyWalk {
  const std::int32_t* blocks;  // hard routing
  const float* logits;         // soft routing
  int end, k_blocks, bk, length;
  int at, first;  // first key of the step; at == end: no step
  int j;
  int upcoming;  // hard routing: blocks[at], read one find ahead: nothing waits for it

  SLA2_DEVICE void start() {
    if (blocks != nullptr && end > 0) upcoming = blocks[0];
    find();
  }
  SLA2_DEVICE void find() {
    for (; at < end; ++at) {
      j = at;
      if (blocks != nullptr) {
        j = upcoming;
        if (at + 1 < end) upcoming = blocks[at + 1];
      }
      first = j * bk;
      if (blocks != nullptr ? j >= 0 && j < k_blocks : logits[j] != -kInfinity) return;
    }
  }
  SLA2_DEVICE void advance() {
    first += kStep;
    if (first < length && first < (j + 1) * bk) return;
    ++at;
    find();
  }
  [[nodiscard]] SLA2_DEVICE bool done() const { return at >= end; }
};

/// One warp's 16 query rows: lane l has rows l / 4 and l / 4 + 8.
template <int kTerms, int D>
struct QueryTile {
  const Backward& back;
  int b, h, i, tile;
  std::int64_t head, row;  // row: of the warp
  bool active;
  float factor;
  float lse[2], delta[2];
  Own<kTerms, D> q, d_o;
  float s[Sizes<kTerms, D>::kStep / 8][4];
  float d_p[Sizes<kTerms, D>::kStep / 8][4];

  /// s becomes the exponents without lse, -inf behind the last key; d_p becomes dP.
  SLA2_DEVICE void products(const KeyWalk<Sizes<kTerms, D>::kStep>& walk, int stage) {
    using S = Sizes<kTerms, D>;
    const Bf16* tiles = shared_memory<Bf16>(static_cast<std::size_t>(stage));
    scores<kTerms, D, S::kStep>(s, q, tiles);
    scores<kTerms, D, S::kStep>(d_p, d_o, tiles + S::kMatrix);
    const float log_m = walk.logits != nullptr ? log2_weight(walk.logits[walk.j]) : 0.0f;
    const float scale = back.call.scale * kLog2E;
    SLA2_UNROLL for (int n = 0; n < S::kStep / 8; ++n) {
      SLA2_UNROLL for (int e = 0; e < 4; ++e) s[n][e] = fused(s[n][e], scale, log_m);
    }
    const int keys = walk.length - walk.first;
    if (keys >= S::kStep) return;
    SLA2_UNROLL for (int n = 0; n < S::kStep / 8; ++n) {
      SLA2_UNROLL for (int e = 0; e < 4; ++e) {
        if (n * 8 + lane_index() % 4 * 2 + e % 2 >= keys) s[n][e] = -kInfinity;
      }
    }
  }
};

SLA2_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
SLA2_DEVICE float quad_max(float x) {
  x = max_of(x, shuffle_xor(x, 1));
  return max_of(x, shuffle_xor(x, 2));
}

/// backward = matched: lse and Ds of the unquantised branch, by one more pass over the keys (Ds is
/// the mean of dP under P), and with them the gradient of alpha.
template <int kTerms, int D, typename Copy>
SLA2_DEVICE void recompute(QueryTile<kTerms, D>& t, const KeyWalk<Sizes<kTerms, D>::kStep>& first,
                           Copy copy) {
  using S = Sizes<kTerms, D>;
  const Call& c = t.back.call;
  float max[2] = {-kInfinity, -kInfinity};
  float sum[2] = {};
  float weighted[2] = {};
  pipeline<S::kStages, S::kStage>(first, copy, [&](const auto& walk, int stage, const auto&) {
    if (!t.active) return;
    t.products(walk, stage);
    SLA2_UNROLL for (int half = 0; half < 2; ++half) {
      float top = max[half];
      SLA2_UNROLL for (int n = 0; n < S::kStep / 8; ++n) {
        top = max_of(top, max_of(t.s[n][2 * half], t.s[n][2 * half + 1]));
      }
      top = quad_max(top);
      if (top == -kInfinity) continue;  // only weights of 0 so far
      const float keep = fast_exp2(max[half] - top);
      sum[half] *= keep;
      weighted[half] *= keep;
      max[half] = top;
      SLA2_UNROLL for (int n = 0; n < S::kStep / 8; ++n) {
        SLA2_UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const float p = fast_exp2(t.s[n][e] - top);
          sum[half] += p;
          weighted[half] += p * t.d_p[n][e];
        }
      }
    }
  });
  float* parts = shared_memory<float>(0);
  float total = 0.0f;
  if (t.active) {
    SLA2_UNROLL for (int half = 0; half < 2; ++half) {
      const float all = quad_sum(sum[half]);
      const float mean = quad_sum(weighted[half]) / all;
      t.delta[half] = all == 0.0f ? 0.0f : mean;  // no key: no gradient
      const std::int64_t row = t.row + lane_index() / 4 + half * 8;
      const std::int64_t n = row - t.head * c.M * c.bq;
      if (n >= c.Nq) {
        t.delta[half] = 0.0f;
        continue;
      }
      t.lse[half] = max[half] + kLog2E * exact_log(all);
      total += t.delta[half] - t.back.delta_linear[row];
      if (lane_index() % 4 == 0) {
        t.back.lse[row] = t.lse[half];
        t.back.delta_sparse[row] = t.delta[half];
      }
    }
  }
  total = lane_index() % 4 == 0 ? total : 0.0f;
  total = sum_over_warp(total);
  if (lane_index() == 0) parts[warp_index()] = total;
  block_barrier();
  const std::int64_t block = t.head * c.M + t.i;
  if (thread_index() == 0) {
    const float alpha = back_alpha(t.back, t.h, t.i);
    const bool none = c.is_sla || t.back.complement_empty[block] != 0;
    t.back.alpha_parts[block * t.back.query_tiles + t.tile] =
        none ? 0.0f : alpha * (1.0f - alpha) * (parts[0] + parts[1] + parts[2] + parts[3]);
  }
  block_barrier();
}

template <int kTerms, int D>
SLA2_KERNEL(kBackThreads, 1)
void sparse_queries_kernel(Backward back) {
  using S = Sizes<kTerms, D>;
  const Call& c = back.call;
  QueryTile<kTerms, D> t{back,
                         block_y() / c.H,
                         block_y() % c.H,
                         block_x() / back.query_tiles,
                         block_x() % back.query_tiles,
                         block_y(),
                         0,
                         false,
                         0.0f,
                         {},
                         {},
                         {},
                         {},
                         {},
                         {}};
  const int warp_row = t.tile * kTileRows + warp_index() * 16;
  t.active = warp_row < c.bq;
  t.row = (t.head * c.M + t.i) * c.bq + warp_row;
  t.factor = back.alphas[t.head * c.M + t.i];
  t.q.load(back.q, t.row * D, t.active);
  t.d_o.load(back.d_o, t.row * D, t.active);
  SLA2_UNROLL for (int half = 0; half < 2; ++half) {
    const std::int64_t row = t.row + lane_index() / 4 + half * 8;
    t.lse[half] = t.active ? back.lse[row] : kInfinity;
    t.delta[half] = t.active ? back.delta_sparse[row] : 0.0f;
  }

  const std::int64_t kv = static_cast<std::int64_t>(t.b) * c.Hkv + t.h / c.group;
  const std::int64_t block = t.head * c.M + t.i;
  const int length = key_length(c, t.b);
  const int k_blocks = blocks_of(c, length);
  KeyWalk<S::kStep> first{c.soft ? nullptr : c.given_blocks + block * c.L,
                          c.soft ? c.given_logits + block * c.T : nullptr,
                          c.soft ? k_blocks : c.L,
                          k_blocks,
                          c.bk,
                          length,
                          0,
                          0,
                          0,
                          -1};
  first.start();
  const auto copy = [&](const KeyWalk<S::kStep>& walk, int stage) {
    Bf16* tiles = shared_memory<Bf16>(static_cast<std::size_t>(stage));
    const std::int64_t at = (kv * c.T * c.bk + walk.first) * D;
    copy_rows<kTerms, D>(tiles, back.ks, at);
    copy_rows<kTerms, D>(tiles + S::kMatrix, back.v, at);
  };
  if (back.matched) recompute<kTerms, D>(t, first, copy);

  float acc[D / 8][4];
  clear<D>(acc);
  float u = 0.0f;
  float* parts = shared_memory<float>(S::kStages * S::kStage);  // [4]
  pipeline<S::kStages, S::kStage>(first, copy, [&](const auto& walk, int stage, const auto& next) {
    if (t.active) {
      t.products(walk, stage);
      SLA2_UNROLL for (int n = 0; n < S::kStep / 8; ++n) {
        SLA2_UNROLL for (int e = 0; e < 4; ++e) {
          const float p = probability(t.s[n][e] - t.lse[e / 2]);
          t.s[n][e] = p == 0.0f ? 0.0f : p * (t.d_p[n][e] - t.delta[e / 2]);
        }
      }
      if (back.u != nullptr) {
        SLA2_UNROLL for (int n = 0; n < S::kStep / 8; ++n) {
          SLA2_UNROLL for (int e = 0; e < 4; ++e) u += t.factor * t.s[n][e];
        }
      }
      accumulate<kTerms, D, S::kStep>(acc, t.s,
                                      shared_memory<Bf16>(static_cast<std::size_t>(stage)));
    }
    if (back.u != nullptr && (next.done() || next.j != walk.j)) {
      u = sum_over_warp(u);
      if (lane_index() == 0) parts[warp_index()] = u;
      block_barrier();
      if (thread_index() == 0) {  // read before the next step's barrier, written behind it
        back.u[(block * back.query_tiles + t.tile) * c.T + walk.j] =
            parts[0] + parts[1] + parts[2] + parts[3];
      }
      u = 0.0f;
    }
  });

  if (!t.active || back.d_q.data == nullptr) return;
  const float scale = t.factor * c.scale;
  SLA2_UNROLL for (int half = 0; half < 2; ++half) {
    const std::int64_t row = t.row + lane_index() / 4 + half * 8;
    const int n = static_cast<int>(row - t.head * c.M * c.bq);
    if (n >= c.Nq) continue;
    const Row out = row_of(back.d_q, t.b, t.h, n);
    const float* linear = back.d_q_linear + row * D;
    SLA2_UNROLL for (int first = 0; first < D / 8; first += kEpilogue) {
      Words2 others[kEpilogue];
      load_pairs(linear, first, others);
      SLA2_UNROLL for (int a = first; a < first + kEpilogue; ++a) {
        const int column = a * 8 + lane_index() % 4 * 2;
        // alpha = 0 gives nothing, even where the branch is not finite.
        float sum[2];
        SLA2_UNROLL for (int e = 0; e < 2; ++e) {
          const float sparse = scale == 0.0f ? 0.0f : acc[a][2 * half + e] * scale;
          sum[e] = sparse + bits_to_float(others[a - first].x[e]);
        }
        if (column < c.d) store_pair(out, column, sum[0], sum[1]);
      }
    }
  }
}

}  // namespace

void back_sparse_queries(const Backward& back, void* stream) {
  with_sizes(back, [&](auto terms, auto d) {
    constexpr int kTerms = decltype(terms)::value;
    constexpr int D = decltype(d)::value;
    using S = Sizes<kTerms, D>;
    const Call& c = back.call;
    launch(stream, sparse_queries_kernel<kTerms, D>, {c.M * back.query_tiles, c.B * c.H, 1},
           kBackThreads, S::kStages * S::kStage + 4 * sizeof(float), back);
  });
}

}  // namespace sla2::SLA2_CUDA_ROOM

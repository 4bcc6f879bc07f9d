// The sparse branch: P = min(1, exp(scale q.ks + log m - lse)) recomputed on both sides,
//   dS = P (dP - Ds), dP = dO v;   dQ = scale dS Ks,   dV = P^T dO,   dKs = scale dS^T Q.
// A block of 4 warps owns 64 queries (and walks the key blocks that they read) or 64 keys (and
// walks the query blocks that read them, head after head of the group); a warp owns 16 rows, whose
// operands stay in registers where they fit. The others' tiles come through shared memory one step
// ahead. Sums run in the order of the walk: the same bits every time. The scale is applied at the
// end, alpha to P; with 256 features dV and dK have a block each, or their sums would not fit.
#include "cuda/backward_rows.cuh"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

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

/// out = own [16, D] times tile [16, D] transposed, for two operands at once: the products of one
/// fill the latency of the other's.
template <int kTerms, int D>
SLA2_DEVICE void two_scores(float (&s)[2][4], Own<kTerms, D>& left, const Bf16* tile,
                            float (&s_other)[2][4], Own<kTerms, D>& left_other,
                            const Bf16* tile_other) {
  using S = Sizes<kTerms, D>;
  static_assert(S::kHold);
  SLA2_UNROLL for (int n = 0; n < 2; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) s[n][e] = s_other[n][e] = 0.0f;
  }
  SLA2_UNROLL for (int k = 0; k < D / 16; ++k) {
    Fragment<kTerms> b, b_other;
    load_right(b, tile + k * 16, S::kPitch, S::kPlane);
    load_right(b_other, tile_other + k * 16, S::kPitch, S::kPlane);
    SLA2_UNROLL for (int half = 0; half < 2; ++half) {
      multiply_add(s[half], left.get(k), b, half);
      multiply_add(s_other[half], left_other.get(k), b_other, half);
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

template <int D>
SLA2_DEVICE void clear(float (&acc)[D / 8][4]) {
  SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) acc[n][e] = 0.0f;
  }
}

/// log m in units of log 2; m = sigmoid(x).
SLA2_DEVICE float log2_weight(float x) {
  return kLog2E * (x >= 0.0f ? -exact_log1p(exact_exp(-x)) : x - exact_log1p(exact_exp(x)));
}

/// 2^min(x, 0); NaN stays.
SLA2_DEVICE float probability(float x) { return fast_exp2(min_or_nan(x, 0.0f)); }

// ---- Queries -----------------------------------------------------------------------------------

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
    SLA2_UNROLL for (int a = 0; a < D / 8; ++a) {
      const int column = a * 8 + lane_index() % 4 * 2;
      if (column >= c.d) continue;
      const Words2 linear = load_8(back.d_q_linear + row * D + column);
      // alpha = 0 gives nothing, even where the branch is not finite.
      float sparse[2];
      SLA2_UNROLL for (int e = 0; e < 2; ++e) {
        sparse[e] = scale == 0.0f ? 0.0f : acc[a][2 * half + e] * scale;
      }
      store_pair(out, column, sparse[0] + bits_to_float(linear.x[0]),
                 sparse[1] + bits_to_float(linear.x[1]));
    }
  }
}

// ---- Keys --------------------------------------------------------------------------------------

/// What the walk over a key block's readers keeps in shared memory: `kCandidates` query blocks are
/// looked at together, those that read the key block are listed in order.
constexpr int kWarps = kBackThreads / 32;
constexpr int kRounds = 8;
constexpr int kCandidates = kBackThreads * kRounds;
struct Readers {
  int list[kCandidates];
  int counts[kRounds * kWarps];  // 32: one a lane
};
static_assert(kRounds * kWarps == 32);

/// The steps of queries that read one key block: head after head of the group, ascending.
template <int kStep>
struct QueryWalk {
  const std::uint8_t* reads;  // [group, T, M] at this key block
  std::int64_t head_step;     // T * M
  Readers* readers;
  int group, M, bq, Nq;
  int base;         // the first candidate that the list does not cover
  int at, count;    // of the list
  int g, i, first;  // head of the group, query block, first query of the step

  /// The next candidates; the whole block of threads.
  SLA2_DEVICE void list_next() {
    const int all = group * M;
    std::uint32_t bits[kRounds];
    SLA2_UNROLL for (int u = 0; u < kRounds; ++u) {
      const int n = base + u * kBackThreads + thread_index();
      const int head = n / M;
      const bool inside = n < all;
      bits[u] = ballot(inside && reads[inside ? head * head_step + (n - head * M) : 0] != 0);
    }
    block_barrier();  // the list and the counts have been read
    if (lane_index() == 0) {
      SLA2_UNROLL for (int u = 0; u < kRounds; ++u) {
        readers->counts[u * kWarps + warp_index()] = count_bits(bits[u]);
      }
    }
    block_barrier();
    int sum = readers->counts[lane_index()];  // inclusive, over the lanes
    SLA2_UNROLL for (int step = 1; step < 32; step *= 2) {
      const int before = shuffle(sum, max_int(lane_index() - step, 0));
      if (lane_index() >= step) sum += before;
    }
    SLA2_UNROLL for (int u = 0; u < kRounds; ++u) {
      const int group_at = u * kWarps + warp_index();
      const int behind = shuffle(sum, group_at);
      const std::uint32_t own = 1u << lane_index();
      if ((bits[u] & own) != 0) {
        const int to = behind - count_bits(bits[u]) + count_bits(bits[u] & (own - 1u));
        readers->list[to] = base + u * kBackThreads + thread_index();
      }
    }
    count = shuffle(sum, 31);
    at = 0;
    base += kCandidates;
    block_barrier();
  }
  SLA2_DEVICE void find() {
    while (at >= count && base < group * M) list_next();
    if (at >= count) return;
    const int n = readers->list[at];
    g = group == 1 ? 0 : n / M;
    i = n - g * M;
    first = i * bq;
  }
  SLA2_DEVICE void advance() {
    first += kStep;
    if (first < Nq && first < (i + 1) * bq) return;
    ++at;
    find();
  }
  [[nodiscard]] SLA2_DEVICE bool done() const { return at >= count; }
};

/// Writes 16 rows of a warp: value(n, e) is the gradient at accumulator e of tile n.
template <int D, typename Value>
SLA2_DEVICE void store_keys(const Call& c, const Rows& to, int b, int kv, int first, int length,
                            int width, Value value) {
  if (to.data == nullptr) return;
  SLA2_UNROLL for (int half = 0; half < 2; ++half) {
    const int r = lane_index() / 4 + half * 8;
    if (first + r >= c.Nk) continue;
    const bool inside = first + r < length;
    const Row out = row_of(to, b, kv, first + r);
    SLA2_UNROLL for (int n = 0; n < D / 8; ++n) {
      const int column = n * 8 + lane_index() % 4 * 2;
      if (column >= width) continue;
      store_pair(out, column, inside ? value(r, n, 2 * half, column) : 0.0f,
                 inside ? value(r, n, 2 * half + 1, column + 1) : 0.0f);
    }
  }
}

template <int kTerms, int D, bool kValues, bool kKeys>
SLA2_DEVICE void sparse_keys(const Backward& back) {
  using S = Sizes<kTerms, D>;
  const Call& c = back.call;
  const int b = block_y() / c.Hkv;
  const int kv = block_y() % c.Hkv;
  const int j = block_x() / back.key_tiles;
  const int warp_row = block_x() % back.key_tiles * kTileRows + warp_index() * 16;
  const bool active = warp_row < c.bk;
  const std::int64_t head = block_y();
  const std::int64_t row = (head * c.T + j) * c.bk + warp_row;
  const std::int64_t first_head = static_cast<std::int64_t>(b) * c.H + kv * c.group;
  const int length = key_length(c, b);

  Own<kTerms, D> ks;
  Own<kTerms, D> v;
  ks.load(back.ks, row * D, active);
  if constexpr (kKeys) v.load(back.v, row * D, active);
  const std::int64_t head_step = static_cast<std::int64_t>(c.T) * c.M;
  QueryWalk<S::kStep> first{
      back.reads + first_head * head_step + static_cast<std::int64_t>(j) * c.M,
      head_step,
      shared_memory<Readers>(S::kStages * S::kStage),
      c.group,
      c.M,
      c.bq,
      c.Nq,
      0,
      0,
      0,
      0,
      0,
      0};
  first.find();
  const auto copy = [&](const QueryWalk<S::kStep>& walk, int stage) {
    Bf16* tiles = shared_memory<Bf16>(static_cast<std::size_t>(stage));
    float* rows = shared_memory<float>(static_cast<std::size_t>(stage + 4 * S::kMatrix));
    const std::int64_t from = (first_head + walk.g) * c.M * c.bq + walk.first;
    copy_rows<kTerms, D>(tiles, back.q, from * D);
    copy_rows<kTerms, D>(tiles + S::kMatrix, back.d_o, from * D);
    const int t = thread_index();
    if (t < S::kStep / 4) {
      copy_async_16(rows + t * 4, back.lse + from + t * 4, true);
    } else if (t < S::kStep / 2) {
      copy_async_16(rows + t * 4, back.delta_sparse + from + (t * 4 - S::kStep), true);
    }
  };
  float d_v[kValues ? D / 8 : 1][4] = {};
  float d_k[kKeys ? D / 8 : 1][4] = {};
  pipeline<S::kStages, S::kStage>(first, copy, [&](const auto& walk, int stage, const auto&) {
    if (!active) return;
    const Bf16* tiles = shared_memory<Bf16>(static_cast<std::size_t>(stage));
    const float* rows = shared_memory<float>(static_cast<std::size_t>(stage + 4 * S::kMatrix));
    const std::int64_t block = (first_head + walk.g) * c.M + walk.i;
    const float factor = back.alphas[block];
    const float log_m = c.soft ? log2_weight(c.given_logits[block * c.T + j]) : 0.0f;
    const float scale = c.scale * kLog2E;
    // 16 queries at a time: more would not leave registers for dV and dK.
    SLA2_NO_UNROLL for (int first = 0; first < S::kStep; first += 16) {
      const Bf16* q = tiles + first * S::kPitch;
      const Bf16* d_o = q + S::kMatrix;
      const float* row_lse = rows + first + lane_index() % 4 * 2;
      float p[2][4], d_p[2][4];
      if constexpr (kKeys && S::kHold) {
        two_scores<kTerms, D>(p, ks, q, d_p, v, d_o);
      } else {
        scores<kTerms, D, 16>(p, ks, q);
      }
      SLA2_UNROLL for (int n = 0; n < 2; ++n) {
        SLA2_UNROLL for (int e = 0; e < 4; ++e) {
          const float x = fused(p[n][e], scale, log_m - row_lse[n * 8 + e % 2]);
          p[n][e] = factor * probability(x);
        }
      }
      if constexpr (kValues) accumulate<kTerms, D, 16>(d_v, p, d_o);
      if constexpr (kKeys) {
        if constexpr (!S::kHold) scores<kTerms, D, 16>(d_p, v, d_o);
        SLA2_UNROLL for (int n = 0; n < 2; ++n) {
          SLA2_UNROLL for (int e = 0; e < 4; ++e) {
            const float delta = row_lse[S::kStep + n * 8 + e % 2];
            p[n][e] = p[n][e] == 0.0f ? 0.0f : p[n][e] * (d_p[n][e] - delta);
          }
        }
        accumulate<kTerms, D, 16>(d_k, p, q);
      }
    }
  });

  if (!active) return;
  const int first_key = j * c.bk + warp_row;
  if constexpr (kValues) {
    const float* linear = back.d_v_linear + row * D;
    store_keys<D>(
        c, back.d_v, b, kv, first_key, length, c.dv,
        [&](int r, int n, int e, int column) { return d_v[n][e] + linear[r * D + column]; });
  }
  if constexpr (kKeys) {
    const float* linear = back.d_keys + row * D;
    const float* mean = back.key_mean + head * D;
    store_keys<D>(c, back.d_k, b, kv, first_key, length, c.d, [&](int r, int n, int e, int column) {
      return d_k[n][e] * c.scale + (linear[r * D + column] - mean[column]);
    });
  }
}

template <int kTerms, int D>
SLA2_KERNEL(kBackThreads, 1)
void sparse_keys_kernel(Backward back) {
  if constexpr (D <= 128) {
    sparse_keys<kTerms, D, true, true>(back);
  } else if (block_z() == 0) {
    sparse_keys<kTerms, D, true, false>(back);
  } else {
    sparse_keys<kTerms, D, false, true>(back);
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

void back_sparse_keys(const Backward& back, void* stream) {
  with_sizes(back, [&](auto terms, auto d) {
    constexpr int kTerms = decltype(terms)::value;
    constexpr int D = decltype(d)::value;
    using S = Sizes<kTerms, D>;
    const Call& c = back.call;
    launch(stream, sparse_keys_kernel<kTerms, D>,
           {c.T * back.key_tiles, c.B * c.Hkv, D <= 128 ? 1 : 2}, kBackThreads,
           S::kStages * S::kStage + sizeof(Readers), back);
  });
}

}  // namespace sla2::SLA2_CUDA_ROOM

// dK and dV of the sparse branch: see backward_sparse.cuh.
#include "cuda/backward_sparse.cuh"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

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

/// What the walk over a key block's readers keeps in shared memory: `kCandidates` query blocks are
/// looked at together, those that read the key block are listed in order.
constexpr int kWarps = kBackThreads / 32;
constexpr int kRounds = 8;
constexpr int kCandidates = kBackThreads * kRounds;
struct Readers {
  int list[kCandidates];
  int counts[kRounds * kWarps];  // 32: one a lane
  const std::uint8_t* reads;     // [group, T, M] at this key block
  std::int64_t head_step;        // T * M
};
static_assert(kRounds * kWarps == 32);

/// The steps of queries that read one key block: head after head of the group, ascending.
template <int kStep>
struct QueryWalk {
  Readers* readers;
  int group, M, bq, Nq;
  int base;       // the first candidate that the list does not cover
  int at, count;  // of the list
  int block;      // head of the group * M + query block
  int within;     // the step's first query, counted from the block's

  /// The next candidates; the whole block of threads.
  SLA2_DEVICE void list_next() {
    const int all = group * M;
    const std::uint8_t* reads = readers->reads;
    const std::int64_t head_step = readers->head_step;
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
    block = readers->list[at];
    within = 0;
  }
  SLA2_DEVICE void advance() {
    within += kStep;
    if (within < bq && (group == 1 ? block : block % M) * bq + within < Nq) return;
    ++at;
    find();
  }
  [[nodiscard]] SLA2_DEVICE bool done() const { return at >= count; }
};

/// Writes 16 rows of a warp: acc * scale, plus the linear branch's `rows` [16, D], minus `mean` [D]
/// (null: 0); zero behind the last key.
template <int D>
SLA2_DEVICE void store_keys(const Call& c, const Rows& to, int b, int kv, int first, int length,
                            int width, const float (&acc)[D / 8][4], float scale, const float* rows,
                            const float* mean) {
  if (to.data == nullptr) return;
  SLA2_UNROLL for (int half = 0; half < 2; ++half) {
    const int lane = fresh_thread_index() % 32;
    const int r = lane / 4 + half * 8;
    if (first + r >= c.Nk) continue;
    const bool inside = first + r < length;
    const Row out = row_of(to, b, kv, first + r);
    SLA2_UNROLL for (int at = 0; at < D / 8; at += kEpilogue) {
      Words2 linear[kEpilogue];
      Words2 shift[kEpilogue] = {};
      load_pairs(rows + r * D, at, linear);
      if (mean != nullptr) load_pairs(mean, at, shift);
      SLA2_UNROLL for (int n = at; n < at + kEpilogue; ++n) {
        const int column = n * 8 + lane % 4 * 2;
        float x[2];
        SLA2_UNROLL for (int e = 0; e < 2; ++e) {
          const float others =
              bits_to_float(linear[n - at].x[e]) - bits_to_float(shift[n - at].x[e]);
          x[e] = inside ? acc[n][2 * half + e] * scale + others : 0.0f;
        }
        if (column < width) store_pair(out, column, x[0], x[1]);
      }
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
  // The warp's first row of the key block; computed anew, so that no register holds it for long.
  const auto warp_row = [&] {
    return block_x() % back.key_tiles * kTileRows + fresh_thread_index() / 32 * 16;
  };
  const auto active = [&] { return warp_row() < c.bk; };
  const std::int64_t head = block_y();
  const std::int64_t row = (head * c.T + j) * c.bk + warp_row();
  // Of the group's first head: query blocks of all heads lie one behind the other.
  const std::int64_t first_block = std::int64_t{b * c.H + kv * c.group} * c.M;
  const int length = key_length(c, b);

  Own<kTerms, D> ks;
  Own<kTerms, D> v;
  ks.load(back.ks, row * D, active());
  if constexpr (kKeys) v.load(back.v, row * D, active());
  Readers* const readers = shared_memory<Readers>(S::kStages * S::kStage);
  if (thread_index() == 0) {
    readers->head_step = std::int64_t{c.T} * c.M;
    readers->reads = back.reads + first_block * c.T + std::int64_t{j} * c.M;
  }
  block_barrier();
  QueryWalk<S::kStep> first{readers, c.group, c.M, c.bq, c.Nq, 0, 0, 0, 0, 0};
  first.find();
  const auto copy = [&](const QueryWalk<S::kStep>& walk, int stage) {
    Bf16* tiles = shared_memory<Bf16>(static_cast<std::size_t>(stage));
    float* rows = shared_memory<float>(static_cast<std::size_t>(stage + 4 * S::kMatrix));
    const std::int64_t from = (first_block + walk.block) * c.bq + walk.within;
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
    if (!active()) return;
    const Bf16* tiles = shared_memory<Bf16>(static_cast<std::size_t>(stage));
    const float* rows = shared_memory<float>(static_cast<std::size_t>(stage + 4 * S::kMatrix));
    const std::int64_t block = first_block + walk.block;
    const float factor = back.alphas[block];
    const float log_m = c.soft ? log2_weight(c.given_logits[block * c.T + j]) : 0.0f;
    const float scale = c.scale * kLog2E;
    // 16 queries at a time: more would not leave registers for dV and dK.
    SLA2_NO_UNROLL for (int first = 0; first < S::kStep; first += 16) {
      const Bf16* q = tiles + first * S::kPitch;
      const Bf16* d_o = q + S::kMatrix;
      const float* row_lse = rows + first + lane_index() % 4 * 2;
      float p[2][4];
      [[maybe_unused]] float d_p[2][4];
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

  if (!active()) return;
  const int own = warp_row();
  const int first_key = j * c.bk + own;
  const std::int64_t line = (head * c.T + j) * c.bk + own;
  if constexpr (kValues) {
    store_keys<D>(c, back.d_v, b, kv, first_key, length, c.dv, d_v, 1.0f,
                  back.d_v_linear + line * D, nullptr);
  }
  if constexpr (kKeys) {
    store_keys<D>(c, back.d_k, b, kv, first_key, length, c.d, d_k, c.scale, back.d_keys + line * D,
                  back.key_mean + head * D);
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

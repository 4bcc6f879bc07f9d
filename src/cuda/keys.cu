// Steps 2 and 3, the key side: Ks and V in the format of the sparse branch, and h_j = phi(Ks_j)^T
// V_j, z_j = column sums of phi(Ks_j), per key block.
// A block owns one key block (with head size 256 a quarter of v's channels of it); a warp smooths
// and quantises a row at a time, then all warps multiply steps of rows on tensor cores. Every
// output has one owner and sums run in token order: the same bits every run.
#include "cuda/lines.cuh"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <int D>
struct Shape {
  static constexpr int kColumns = D == 256 ? 64 : D;  // channels of v that a block owns
  static constexpr int kSlices = D / kColumns;
  static constexpr int kWarpsM = D == 256 ? 8 : 4;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kTilesM = D / kWarpsM / 16;
  static constexpr int kTilesN = kColumns / kWarpsN / 8;
  static constexpr int kPhiStride = D + 8;  // bf16; 8 more than a multiple of 64: no conflicts
  static constexpr int kValueStride = kColumns + 8;
  static constexpr int kByteStride = kColumns + 4;
};

/// Rows staged at once: less with more terms, so that every architecture has the shared memory.
SLA2_HOST_DEVICE int step_rows(int terms) { return terms == 1 ? 64 : terms == 2 ? 32 : 16; }

struct Layout {
  std::size_t mean, red, phi, value, bytes, total;  // offsets
};
template <int D>
SLA2_HOST_DEVICE Layout layout_of(int terms, int bk) {
  using S = Shape<D>;
  const std::size_t rows = static_cast<std::size_t>(step_rows(terms));
  Layout l;
  l.mean = 0;
  l.red = D * sizeof(float);
  l.phi = l.red + 32 * sizeof(float);
  l.value = l.phi + rows * S::kPhiStride * 2 * static_cast<std::size_t>(terms);
  l.bytes = l.value + rows * S::kValueStride * 2 * static_cast<std::size_t>(terms);
  l.total = l.bytes + static_cast<std::size_t>(bk) * S::kByteStride;
  return l;
}

struct KeyBlock {
  int b, kv, j, slice;
  int first, rows;       // tokens of the block that exist
  std::int64_t head;     // b * Hkv + kv
  std::int64_t low_row;  // first row in k_low and v_low
};

/// Rows that a warp loads before it works on the first: their latencies overlap.
constexpr int kBatch = 2;

template <int D>
SLA2_HOST_DEVICE constexpr int groups_of() {
  return (D + 127) / 128;
}

/// What a lane has of a row of K and of V; 0 behind the features and behind the last key.
template <int D>
struct Line {
  float k[groups_of<D>()][4];
  float v[4];
};

/// Channels of v that this lane has of a row, in the block's slice.
template <int D>
SLA2_DEVICE bool has_value() {
  return lane_index() * 4 < Shape<D>::kColumns;
}
template <int D>
SLA2_DEVICE int value_channel(const KeyBlock& at) {
  return at.slice * Shape<D>::kColumns + lane_index() * 4;
}

template <int D>
SLA2_DEVICE void load_line(const Call& c, const KeyBlock& at, int r, bool values, Line<D>& line) {
  SLA2_UNROLL for (int e = 0; e < 4; ++e) line.v[e] = 0;
  const bool valid = r < at.rows;
  const Row row = row_of(c.k, at.b, at.kv, at.first + (valid ? r : 0));
  SLA2_UNROLL for (int g = 0; g < groups_of<D>(); ++g) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) line.k[g][e] = 0;
    if (valid && line_channel(g) < c.d) load_some<4>(row, line_channel(g), line.k[g]);
  }
  if (values && valid && has_value<D>() && value_channel<D>(at) < c.dv) {
    load_some<4>(row_of(c.v, at.b, at.kv, at.first + r), value_channel<D>(at), line.v);
  }
}

/// K minus the mean; 0 behind the features and behind the last key.
SLA2_DEVICE void smooth(const Call& c, bool valid, const float* mean, int channel,
                        const float (&k)[4], float (&ks)[4]) {
  const bool inside = valid && channel < c.d;
  SLA2_UNROLL for (int e = 0; e < 4; ++e) ks[e] = inside ? k[e] - mean[channel + e] : 0.0f;
}

/// The factor of the block's integers; writes k_scale.
template <int D>
SLA2_DEVICE float block_factor(const Call& c, const KeyBlock& at, const float* mean, float* red) {
  float amax = 0;
  for (int first = warp_index(); first < at.rows; first += kBatch * kWarps) {
    Line<D> lines[kBatch];
    SLA2_UNROLL for (int i = 0; i < kBatch; ++i) {
      load_line<D>(c, at, first + i * kWarps, false, lines[i]);
    }
    SLA2_UNROLL for (int i = 0; i < kBatch; ++i) {
      SLA2_UNROLL for (int g = 0; g < groups_of<D>(); ++g) {
        float ks[4];
        smooth(c, first + i * kWarps < at.rows, mean, line_channel(g), lines[i].k[g], ks);
        SLA2_UNROLL for (int e = 0; e < 4; ++e) amax = larger_or_nan(amax, abs_of(ks[e]));
      }
    }
  }
  amax = amax_over_warp(amax);
  if (lane_index() == 0) red[warp_index()] = amax;
  block_barrier();
  amax = red[0];
  SLA2_UNROLL for (int w = 1; w < kWarps; ++w) amax = larger_or_nan(amax, red[w]);
  float scale, factor;
  quantiser(amax, 127.0f, scale, factor);
  if (at.slice == 0 && thread_index() == 0) c.k_scale[at.head * c.T + at.j] = scale;
  return factor;
}

/// One row of K: k_low and phi.
template <int D>
SLA2_DEVICE void stage_key(const Call& c, const KeyBlock& at, int r, float factor,
                           const float* mean, Line<D>& line, Bf16* phi, int plane) {
  const bool valid = r < at.rows;
  SLA2_UNROLL for (int g = 0; g < groups_of<D>(); ++g) {
    const int channel = line_channel(g);
    float ks[4];
    smooth(c, valid, mean, channel, line.k[g], ks);
    if (!c.raw_keys) {
      SLA2_UNROLL for (int e = 0; e < 4; ++e) line.k[g][e] = ks[e];
    }
    if (c.k_low == nullptr || at.slice != 0 || channel >= D) continue;
    const std::int64_t to = (at.low_row + r) * D + channel;
    if (is_low_bit(c)) {
      store_4(static_cast<std::uint8_t*>(c.k_low) + to, quantise_line(ks, factor));
    } else {
      store_line(c.format, c.k_low, c.k_plane, to, ks, 0.5f);
    }
  }
  if (c.h.data == nullptr) return;
  apply_phi(c, valid, line.k);
  SLA2_UNROLL for (int g = 0; g < groups_of<D>(); ++g) {
    if (line_channel(g) < D) store_line_terms(phi + line_channel(g), plane, c.terms, line.k[g]);
  }
}

/// One row of V: v_low (8 bits: into `bytes`) and the term planes. factor: of the lane's channels.
template <int D>
SLA2_DEVICE void stage_value(const Call& c, const KeyBlock& at, int r, const float (&factor)[4],
                             float (&v)[4], Bf16* value, int plane, std::uint8_t* bytes) {
  if (!has_value<D>()) return;
  const int local = lane_index() * 4;
  if (c.h.data != nullptr) store_line_terms(value + local, plane, c.terms, v);
  if (c.v_low == nullptr) return;
  if (!is_low_bit(c)) {
    store_line(c.format, c.v_low, c.v_plane, (at.low_row + r) * D + value_channel<D>(at), v, 1.0f);
    return;
  }
  std::uint32_t word;
  if (c.format == Format::kFp8) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) v[e] = factor[e] == 0.0f ? 0.0f : v[e] * factor[e];
    word = pack_e4m3(v[0], v[1]) | pack_e4m3(v[2], v[3]) << 16;
  } else {
    word = pack_s8(to_s8(v[0], factor[0]), to_s8(v[1], factor[1]), to_s8(v[2], factor[2]),
                   to_s8(v[3], factor[3]));
  }
  store_4(bytes + local, word);
}

/// acc += phi^T V over the staged rows, one temporary a product: rounded to nearest between them,
/// which tensor cores are not within.
template <int D>
SLA2_DEVICE void multiply(int terms, int rows, const Bf16* phi, int phi_plane, const Bf16* value,
                          int value_plane, float (&acc)[Shape<D>::kTilesM][Shape<D>::kTilesN][4]) {
  using S = Shape<D>;
  const int lane = lane_index();
  const int m0 = warp_index() / S::kWarpsN * S::kTilesM * 16;
  const int n0 = warp_index() % S::kWarpsN * S::kTilesN * 8;
  for (int order = terms - 1; order >= 0; --order) {  // small products first
    for (int ta = 0; ta <= order; ++ta) {
      const Bf16* a_plane = phi + ta * phi_plane;
      const Bf16* b_plane = value + (order - ta) * value_plane;
      for (int key = 0; key < rows; key += 16) {
        std::uint32_t a[S::kTilesM][4];
        SLA2_UNROLL for (int m = 0; m < S::kTilesM; ++m) {
          ldmatrix_x4_transposed(a[m], a_plane + (key + lane / 16 * 8 + lane % 8) * S::kPhiStride +
                                           m0 + m * 16 + lane / 8 % 2 * 8);
        }
        SLA2_UNROLL for (int n = 0; n < S::kTilesN; n += 2) {
          std::uint32_t v[4];
          ldmatrix_x4_transposed(
              v, b_plane + (key + lane % 16) * S::kValueStride + n0 + n * 8 + lane / 16 * 8);
          SLA2_UNROLL for (int m = 0; m < S::kTilesM; ++m) {
            SLA2_UNROLL for (int half = 0; half < 2; ++half) {
              float product[4] = {};
              mma_bf16(product, a[m], v[2 * half], v[2 * half + 1]);
              SLA2_UNROLL for (int e = 0; e < 4; ++e) acc[m][n + half][e] += product[e];
            }
          }
        }
      }
    }
  }
}

template <int D>
SLA2_DEVICE void store_states(const Call& c, const KeyBlock& at,
                              float (&acc)[Shape<D>::kTilesM][Shape<D>::kTilesN][4]) {
  using S = Shape<D>;
  const int g = lane_index() / 4;
  const int t = lane_index() % 4;
  Bf16* to = c.h.data + (at.head * c.T + at.j) * c.S;
  SLA2_UNROLL for (int m = 0; m < S::kTilesM; ++m) {
    SLA2_UNROLL for (int n = 0; n < S::kTilesN; ++n) {
      const int column =
          at.slice * S::kColumns + (warp_index() % S::kWarpsN * S::kTilesN + n) * 8 + 2 * t;
      SLA2_UNROLL for (int half = 0; half < 2; ++half) {
        const int a = (warp_index() / S::kWarpsN * S::kTilesM + m) * 16 + g + 8 * half;
        if (a >= c.d || column >= c.dv) continue;
        float x = acc[m][n][2 * half];
        float y = acc[m][n][2 * half + 1];
        for (int term = 0; term < c.terms; ++term) {
          store_4(to + term * c.h.plane + std::int64_t{a} * c.dv + column, next_term(x, y));
        }
      }
    }
  }
}

/// 8-bit V of the block, a row per channel and 32 keys, in the order in which the scores' fragments
/// lie in registers: position 4t + r of 16 is key 2t + r for r < 2, else 8 + 2t + r - 2.
template <int D>
SLA2_DEVICE void store_transposed(const Call& c, const KeyBlock& at, const std::uint8_t* bytes) {
  using S = Shape<D>;
  const int steps = c.bk / kKeyStep;
  for (int task = thread_index(); task < steps * S::kColumns; task += kThreads) {
    const int channel = task % S::kColumns;
    const int step = task / S::kColumns;
    Words4 words[2];
    SLA2_UNROLL for (int w = 0; w < 8; ++w) {
      const std::uint8_t* from =
          bytes + (step * kKeyStep + w / 4 * 16 + w % 4 * 2) * S::kByteStride + channel;
      words[w / 4].x[w % 4] = pack_low_bytes(from[0], from[S::kByteStride],
                                             from[8 * S::kByteStride], from[9 * S::kByteStride]);
    }
    std::uint8_t* to =
        static_cast<std::uint8_t*>(c.v_low) +
        ((at.low_row / kKeyStep + step) * D + at.slice * S::kColumns + channel) * kKeyStep;
    store_16(to, words[0]);
    store_16(to + 16, words[1]);
  }
}

template <int D>
SLA2_KERNEL(kThreads, D <= 128 ? 2 : 1)
void keys_kernel(Call c) {
  using S = Shape<D>;
  KeyBlock at;
  at.slice = block_x() % S::kSlices;
  const int index = block_x() / S::kSlices;
  at.j = index % c.T;
  at.head = index / c.T;
  at.b = static_cast<int>(at.head / c.Hkv);
  at.kv = static_cast<int>(at.head % c.Hkv);
  at.first = at.j * c.bk;
  at.rows = min_int(c.bk, key_length(c, at.b) - at.first);
  at.low_row = (at.head * c.T + at.j) * c.bk;
  if (at.rows <= 0) return;

  const Layout layout = layout_of<D>(c.terms, c.bk);
  float* mean = shared_memory<float>(layout.mean);
  Bf16* phi = shared_memory<Bf16>(layout.phi);
  Bf16* value = shared_memory<Bf16>(layout.value);
  std::uint8_t* bytes = shared_memory<std::uint8_t>(layout.bytes);
  for (int a = thread_index(); a < c.d; a += kThreads) mean[a] = c.k_mean[at.head * c.d + a];
  block_barrier();
  float factor = 0;
  if (c.k_low != nullptr && is_low_bit(c)) {
    factor = block_factor<D>(c, at, mean, shared_memory<float>(layout.red));
  }

  float v_factor[4] = {};
  if (c.v_low != nullptr && is_low_bit(c) && has_value<D>() && value_channel<D>(at) < c.dv) {
    const float* from = c.v_factor + at.head * c.dv + value_channel<D>(at);
    SLA2_UNROLL for (int e = 0; e < 4; ++e) v_factor[e] = from[e];
  }

  const int step = min_int(step_rows(c.terms), c.bk);
  static_assert(kBatch * kWarps == 16);  // every step is a multiple of it
  const int phi_plane = step * S::kPhiStride;
  const int value_plane = step * S::kValueStride;
  float acc[S::kTilesM][S::kTilesN][4] = {};
  float z = 0;
  for (int first = 0; first < c.bk; first += step) {
    for (int r0 = warp_index(); r0 < step; r0 += kBatch * kWarps) {
      Line<D> lines[kBatch];
      SLA2_UNROLL for (int i = 0; i < kBatch; ++i) {
        load_line<D>(c, at, first + r0 + i * kWarps, true, lines[i]);
      }
      SLA2_UNROLL for (int i = 0; i < kBatch; ++i) {
        const int r = r0 + i * kWarps;
        stage_key<D>(c, at, first + r, factor, mean, lines[i], phi + r * S::kPhiStride, phi_plane);
        stage_value<D>(c, at, first + r, v_factor, lines[i].v, value + r * S::kValueStride,
                       value_plane, bytes + (first + r) * S::kByteStride);
      }
    }
    block_barrier();
    if (c.h.data != nullptr) {
      multiply<D>(c.terms, step, phi, phi_plane, value, value_plane, acc);
      if (at.slice == 0 && thread_index() < c.d) {
        for (int term = 0; term < c.terms; ++term) {
          const Bf16* column = phi + term * phi_plane + thread_index();
          for (int r0 = 0; r0 < step; r0 += 8) {
            SLA2_UNROLL for (int r = r0; r < r0 + 8; ++r) z += to_float(column[r * S::kPhiStride]);
          }
        }
      }
    }
    block_barrier();
  }
  if (c.v_low != nullptr && is_low_bit(c)) store_transposed<D>(c, at, bytes);
  if (c.h.data == nullptr) return;
  store_states<D>(c, at, acc);
  if (at.slice == 0 && thread_index() < c.d) {
    Bf16* to = c.h.data + (at.head * c.T + at.j) * c.S + std::int64_t{c.d} * c.dv + thread_index();
    for (int term = 0; term < c.terms; ++term) {
      const Bf16 rounded = from_float<Bf16>(z);
      to[term * c.h.plane] = rounded;
      z -= to_float(rounded);
    }
  }
}

template <int D>
void launch_keys(const Call& c, void* stream) {
  const std::int64_t blocks = std::int64_t{c.B} * c.Hkv * c.T * Shape<D>::kSlices;
  launch(stream, keys_kernel<D>, {blocks}, kThreads, layout_of<D>(c.terms, c.bk).total, c);
}

}  // namespace

void prepare_keys(const Call& c, void* stream) {
  if (c.D == 64) {
    launch_keys<64>(c, stream);
  } else if (c.D == 128) {
    launch_keys<128>(c, stream);
  } else {
    launch_keys<256>(c, stream);
  }
}

}  // namespace sla2::SLA2_CUDA_ROOM

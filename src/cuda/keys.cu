// Steps 2 and 3, the key side: Ks and V in the format of the sparse branch, and h_j = phi(Ks_j)^T
// V_j, z_j = column sums of phi(Ks_j) (a product with ones), per key block.
// A block owns one key block (with head size 256 a quarter of v's channels of it). Each lane keeps
// eight channels of its rows in registers from the load to the integers; phi and V meet in shared
// memory for tensor cores, and h leaves through it in whole lines. Every output has one owner and
// sums have one order: the same bits every run.
#include "cuda/lines.cuh"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr std::uint32_t kOnes = 0x3f803f80u;  // two bf16

template <typename T, int D>
struct Shape {
  static constexpr int kTerms = kTermsOf<T>;
  static constexpr int kColumns = D == 256 ? 64 : D;  // channels of v that a block owns
  static constexpr int kSlices = D / kColumns;
  static constexpr int kWarpsM = D == 256 ? 8 : 4;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kTilesM = D / kWarpsM / 16;
  static constexpr int kTilesN = kColumns / kWarpsN / 8;
  static constexpr int kPhiStride = D + 8;  // bf16; 8 more than a multiple of 64: no conflicts
  static constexpr int kValueStride = kColumns + 8;
  static constexpr int kByteStride = kColumns + 8;
  // Rows staged at once: less with more terms, so that every architecture has the shared memory.
  static constexpr int kRows = kTerms == 1 ? 64 : kTerms == 2 ? 32 : 16;
  // Lanes of a row of K and of V; rows of the block of threads at once; how often per step.
  static constexpr int kKeyLanes = D / kLine;
  static constexpr int kValueLanes = kColumns / kLine;
  static constexpr int kKeyRows = kThreads / kKeyLanes;
  static constexpr int kValueRows = kThreads / kValueLanes;
  static constexpr int kKeyPasses = kRows < kKeyRows ? 1 : kRows / kKeyRows;
  static constexpr int kValuePasses = kRows < kValueRows ? 1 : kRows / kValueRows;
  static constexpr int kPhiPlane = kRows * kPhiStride;
  static constexpr int kValuePlane = kRows * kValueStride;
  // Shared memory: maxima of the warps; KeyBlock; phi and V (afterwards h); V's bytes.
  static constexpr int kStaged = kTerms * (kPhiPlane + kValuePlane);
  static constexpr int kStates = D * kValueStride;
  static constexpr std::size_t kMaxima = 0;
  static constexpr std::size_t kKeyBlock = 64;
  static constexpr std::size_t kPhi = 128;
  static constexpr std::size_t kValue =
      kPhi + static_cast<std::size_t>(kTerms) * kPhiPlane * sizeof(Bf16);
  static constexpr std::size_t kBytes =
      kPhi + static_cast<std::size_t>(kStaged > kStates ? kStaged : kStates) * sizeof(Bf16);
};

/// What a block works on. It lies in shared memory: registers are what the sums leave few of.
struct KeyBlock {
  int b, kv, j, slice;
  int first, rows;       // tokens of the block that exist
  std::int64_t head;     // b * Hkv + kv
  std::int64_t low_row;  // first row in k_low and v_low
};

/// A lane's part of the rows of `passes` passes, as loaded.
template <typename T, int kPasses>
struct Lines {
  RawLine<T> of[kPasses];
};

template <typename T, int D>
SLA2_DEVICE int key_channel() {
  return thread_index() % Shape<T, D>::kKeyLanes * kLine;
}
/// Row of this thread in pass `pass` of a step.
template <typename T, int D>
SLA2_DEVICE int key_row(int pass) {
  return pass * Shape<T, D>::kKeyRows + thread_index() / Shape<T, D>::kKeyLanes;
}
/// Within the block's slice.
template <typename T, int D>
SLA2_DEVICE int value_channel() {
  return thread_index() % Shape<T, D>::kValueLanes * kLine;
}
template <typename T, int D>
SLA2_DEVICE int value_row(int pass) {
  return pass * Shape<T, D>::kValueRows + thread_index() / Shape<T, D>::kValueLanes;
}

/// Passes [pass, pass + kPasses) of the step that starts at row `first` of the block.
template <typename T, int D, int kPasses>
SLA2_DEVICE void load_keys(const Call& c, const KeyBlock& at, int first, int pass,
                           Lines<T, kPasses>& k) {
  const int channel = key_channel<T, D>();
  const T* from = static_cast<const T*>(c.k.data) + at.b * c.k.batch + at.kv * c.k.head +
                  (at.first + first) * c.k.token + channel;
  SLA2_UNROLL for (int i = 0; i < kPasses; ++i) {
    const int r = key_row<T, D>(pass + i);
    k.of[i] = load_raw(from + r * c.k.token, c.k.vectors,
                       r < Shape<T, D>::kRows && first + r < at.rows && channel < c.d);
  }
}
template <typename T, int D, int kPasses>
SLA2_DEVICE void load_values(const Call& c, const KeyBlock& at, int first, int pass,
                             Lines<T, kPasses>& v) {
  const int channel = at.slice * Shape<T, D>::kColumns + value_channel<T, D>();
  const T* from = static_cast<const T*>(c.v.data) + at.b * c.v.batch + at.kv * c.v.head +
                  (at.first + first) * c.v.token + channel;
  SLA2_UNROLL for (int i = 0; i < kPasses; ++i) {
    const int r = value_row<T, D>(pass + i);
    v.of[i] = load_raw(from + r * c.v.token, c.v.vectors,
                       r < Shape<T, D>::kRows && first + r < at.rows && channel < c.dv);
  }
}

/// K minus the mean; 0 behind the features and behind the last key.
template <typename T>
SLA2_DEVICE void smooth(const RawLine<T>& raw, bool valid, const float (&mean)[kLine],
                        float (&ks)[kLine]) {
  unpack_line(raw, ks);
  SLA2_UNROLL for (int i = 0; i < kLine; ++i) ks[i] = valid ? ks[i] - mean[i] : 0.0f;
}

/// The mean of this lane's channels.
template <typename T, int D>
SLA2_DEVICE void load_mean(const Call& c, const KeyBlock& at, float (&mean)[kLine]) {
  const int channel = key_channel<T, D>();
  const float* from = c.k_mean + at.head * c.d + channel;
  SLA2_UNROLL for (int i = 0; i < kLine; ++i) mean[i] = channel < c.d ? from[i] : 0.0f;
}

/// The factor of the block's integers; writes k_scale. Leaves the last step's rows in `k`.
template <typename T, int D>
SLA2_DEVICE float block_factor(const Call& c, const KeyBlock& at,
                               Lines<T, Shape<T, D>::kKeyPasses>& k) {
  using S = Shape<T, D>;
  float mean[kLine];
  load_mean<T, D>(c, at, mean);
  float amax = 0;
  for (int first = 0; first < at.rows; first += S::kRows) {
    if (c.bk > S::kRows) load_keys<T, D>(c, at, first, 0, k);
    SLA2_UNROLL for (int pass = 0; pass < S::kKeyPasses; ++pass) {
      const int r = key_row<T, D>(pass);
      float ks[kLine];
      smooth(k.of[pass], r < S::kRows && first + r < at.rows, mean, ks);
      amax = amax_of_line(amax, ks);
    }
  }
  amax = amax_over_row<32>(amax);
  float* maxima = shared_memory<float>(S::kMaxima);
  if (lane_index() == 0) maxima[warp_index()] = amax;
  block_barrier();
  SLA2_UNROLL for (int w = 0; w < kWarps; ++w) amax = max_or_nan(amax, maxima[w]);
  float scale, factor;
  quantiser(amax, 127.0f, scale, factor);
  if (at.slice == 0 && thread_index() == 0) c.k_scale[at.head * c.T + at.j] = scale;
  return factor;
}

/// Rows of K: k_low and phi.
template <typename T, int D, int kPasses>
SLA2_DEVICE void stage_keys(const Call& c, const KeyBlock& at, int first, int pass, float factor,
                            const Lines<T, kPasses>& k) {
  using S = Shape<T, D>;
  float mean[kLine];
  load_mean<T, D>(c, at, mean);
  Bf16* phi = shared_memory<Bf16>(S::kPhi);
  const int channel = key_channel<T, D>();
  SLA2_UNROLL for (int i = 0; i < kPasses; ++i) {
    const int r = key_row<T, D>(pass + i);
    const bool staged = r < S::kRows && first + r < c.bk;
    const bool valid = staged && first + r < at.rows && channel < c.d;
    float ks[kLine];
    smooth(k.of[i], valid, mean, ks);
    if (c.k_low != nullptr && at.slice == 0 && staged) {
      const std::int64_t to = (at.low_row + first + r) * D + channel;
      if (is_low_bit(c)) {
        store_8(static_cast<std::uint8_t*>(c.k_low) + to, quantise_line(ks, factor));
      } else {
        store_line(c.format, c.k_low, c.k_plane, to, ks, 0.5f);
      }
    }
    if (c.h.data == nullptr) continue;
    if (c.raw_keys) unpack_line(k.of[i], ks);
    apply_phi<S::kKeyLanes, S::kTerms == 1>(c.feature_map, valid, ks);
    if (r < S::kRows) {
      store_line_terms<S::kTerms>(phi + r * S::kPhiStride + channel, S::kPhiPlane, ks);
    }
  }
}

/// Rows of V: v_low (8 bits: into `bytes`) and the term planes.
template <typename T, int D, int kPasses>
SLA2_DEVICE void stage_values(const Call& c, const KeyBlock& at, int first, int pass,
                              const Lines<T, kPasses>& lines) {
  using S = Shape<T, D>;
  Bf16* value = shared_memory<Bf16>(S::kValue);
  const int channel = value_channel<T, D>();
  float factor[kLine] = {};
  Words2 mask{};  // bytes of the channels whose factor is not 0
  if (c.v_low != nullptr && is_low_bit(c) && at.slice * S::kColumns + channel < c.dv) {
    const float* from = c.v_factor + at.head * c.dv + at.slice * S::kColumns + channel;
    SLA2_UNROLL for (int i = 0; i < kLine; ++i) {
      factor[i] = from[i];
      if (factor[i] != 0.0f) mask.x[i / 4] |= 0xffu << i % 4 * 8;
    }
  }
  SLA2_UNROLL for (int i = 0; i < kPasses; ++i) {
    const int r = value_row<T, D>(pass + i);
    if (r >= S::kRows) continue;
    float v[kLine];
    unpack_line(lines.of[i], v);
    if (c.v_low != nullptr && first + r < c.bk) {
      std::uint8_t* bytes =
          shared_memory<std::uint8_t>(S::kBytes) + (first + r) * S::kByteStride + channel;
      if (c.format == Format::kInt8) {
        store_8(bytes, quantise_line(v, factor, mask));
      } else if (c.format == Format::kFp8) {
        Words2 words;
        SLA2_UNROLL for (int w = 0; w < 2; ++w) {
          words.x[w] =
              (pack_e4m3(v[4 * w] * factor[4 * w], v[4 * w + 1] * factor[4 * w + 1]) |
               pack_e4m3(v[4 * w + 2] * factor[4 * w + 2], v[4 * w + 3] * factor[4 * w + 3])
                   << 16) &
              mask.x[w];
        }
        store_8(bytes, words);
      } else {
        const std::int64_t to = (at.low_row + first + r) * D + at.slice * S::kColumns + channel;
        store_line(c.format, c.v_low, c.v_plane, to, v, 1.0f);
      }
    }
    if (c.h.data == nullptr) continue;
    Bf16* to = value + r * S::kValueStride + channel;
    if constexpr (S::kTerms == 1) {
      store_16(to, lines.of[i].words[0]);
    } else {
      store_line_terms<S::kTerms>(to, S::kValuePlane, v);
    }
  }
}

template <typename T, int D>
struct States {
  float h[Shape<T, D>::kTilesM][Shape<T, D>::kTilesN][4];
  float z[Shape<T, D>::kTilesM][4];
};

/// sum += a b. With several terms in fp32, rounded to nearest between products: tensor cores
/// truncate.
template <bool kExact>
SLA2_DEVICE void add_product(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                             std::uint32_t b1) {
  if constexpr (kExact) {
    float product[4] = {};
    mma_bf16(product, a, b0, b1);
    SLA2_UNROLL for (int e = 0; e < 4; ++e) sum[e] += product[e];
  } else {
    mma_bf16(sum, a, b0, b1);
  }
}

/// h += phi^T V and z += phi^T 1 over the staged rows.
template <typename T, int D>
SLA2_DEVICE void multiply(int rows, States<T, D>& sum) {
  using S = Shape<T, D>;
  constexpr bool kExact = S::kTerms > 1;
  const int lane = lane_index();
  const int m0 = warp_index() / S::kWarpsN * S::kTilesM * 16;
  const int n0 = warp_index() % S::kWarpsN * S::kTilesN * 8;
  SLA2_UNROLL for (int order = S::kTerms - 1; order >= 0; --order) {  // small products first
    SLA2_UNROLL for (int ta = 0; ta <= order; ++ta) {
      const Bf16* a_plane = shared_memory<Bf16>(S::kPhi) + ta * S::kPhiPlane;
      const Bf16* b_plane = shared_memory<Bf16>(S::kValue) + (order - ta) * S::kValuePlane;
      SLA2_NO_UNROLL for (int key = 0; key < rows; key += 16) {
        std::uint32_t a[S::kTilesM][4];
        SLA2_UNROLL for (int m = 0; m < S::kTilesM; ++m) {
          ldmatrix_x4_transposed(a[m], a_plane + (key + lane / 16 * 8 + lane % 8) * S::kPhiStride +
                                           m0 + m * 16 + lane / 8 % 2 * 8);
          if (ta == order) add_product<kExact>(sum.z[m], a[m], kOnes, kOnes);
        }
        SLA2_UNROLL for (int n = 0; n < S::kTilesN; n += 2) {
          std::uint32_t v[4];
          ldmatrix_x4_transposed(
              v, b_plane + (key + lane % 16) * S::kValueStride + n0 + n * 8 + lane / 16 * 8);
          SLA2_UNROLL for (int m = 0; m < S::kTilesM; ++m) {
            SLA2_UNROLL for (int half = 0; half < 2; ++half) {
              add_product<kExact>(sum.h[m][n + half], a[m], v[2 * half], v[2 * half + 1]);
            }
          }
        }
      }
    }
  }
}

/// h and z to memory, term by term through shared memory.
template <typename T, int D>
SLA2_DEVICE void store_states(const Call& c, const KeyBlock& at, States<T, D>& sum) {
  using S = Shape<T, D>;
  const int g = lane_index() / 4;
  const int t = lane_index() % 4;
  Bf16* staged = shared_memory<Bf16>(S::kPhi);
  Bf16* to = c.h.data + (at.head * c.T + at.j) * c.S;
  const int columns = min_int(c.dv - at.slice * S::kColumns, S::kColumns);
  SLA2_UNROLL for (int term = 0; term < S::kTerms; ++term) {
    if (term > 0) block_barrier();
    SLA2_UNROLL for (int m = 0; m < S::kTilesM; ++m) {
      SLA2_UNROLL for (int half = 0; half < 2; ++half) {
        const int a = (warp_index() / S::kWarpsN * S::kTilesM + m) * 16 + g + 8 * half;
        Bf16* row = staged + a * S::kValueStride + warp_index() % S::kWarpsN * S::kTilesN * 8;
        SLA2_UNROLL for (int n = 0; n < S::kTilesN; ++n) {
          float(&x)[4] = sum.h[m][n];
          store_4(row + n * 8 + 2 * t, next_term(x[2 * half], x[2 * half + 1]));
        }
        if (at.slice == 0 && warp_index() % S::kWarpsN == 0 && t == 0 && a < c.d) {
          const Bf16 rounded = from_float<Bf16>(sum.z[m][2 * half]);
          to[term * c.h.plane + std::int64_t{c.d} * c.dv + a] = rounded;
          sum.z[m][2 * half] -= to_float(rounded);
        }
      }
    }
    block_barrier();
    Bf16* plane = to + term * c.h.plane + at.slice * S::kColumns;
    constexpr int kUnits = S::kColumns / 8;
    SLA2_UNROLL for (int i = 0; i < D * kUnits / kThreads; ++i) {
      const int unit = thread_index() + i * kThreads;
      const int a = unit / kUnits;
      const int column = unit % kUnits * 8;
      if (a < c.d && column < columns) {
        store_16(plane + a * c.dv + column, load_16(staged + a * S::kValueStride + column));
      }
    }
  }
}

/// 8-bit V of the block, a row per channel and 32 keys, in the order in which the scores' fragments
/// lie in registers: position 4t + r of 16 is key 2t + r for r < 2, else 8 + 2t + r - 2.
template <typename T, int D>
SLA2_DEVICE void store_transposed(const Call& c, const KeyBlock& at) {
  using S = Shape<T, D>;
  const std::uint8_t* bytes = shared_memory<std::uint8_t>(S::kBytes);
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

template <typename T, int D>
SLA2_KERNEL(kThreads, D <= 128 && kTermsOf<T> == 1 ? 2 : 1)
void keys_kernel(Call c) {
  using S = Shape<T, D>;
  KeyBlock own;
  own.slice = block_x() % S::kSlices;
  const int index = block_x() / S::kSlices;
  own.j = index % c.T;
  own.head = index / c.T;
  own.b = static_cast<int>(own.head / c.Hkv);
  own.kv = static_cast<int>(own.head % c.Hkv);
  own.first = own.j * c.bk;
  own.rows = min_int(c.bk, key_length(c, own.b) - own.first);
  own.low_row = (own.head * c.T + own.j) * c.bk;
  if (own.rows <= 0) return;
  KeyBlock& at = *shared_memory<KeyBlock>(S::kKeyBlock);
  if (thread_index() == 0) at = own;
  block_barrier();

  Lines<T, S::kKeyPasses> k;
  Lines<T, S::kValuePasses> v;
  if (c.bk <= S::kRows) {
    load_keys<T, D>(c, at, 0, 0, k);
    load_values<T, D>(c, at, 0, 0, v);
  }
  const bool low = c.k_low != nullptr && is_low_bit(c);
  const float factor = low ? block_factor<T, D>(c, at, k) : 0.0f;
  if (c.bk > S::kRows) {
    load_keys<T, D>(c, at, 0, 0, k);
    load_values<T, D>(c, at, 0, 0, v);
  }
  stage_keys<T, D>(c, at, 0, 0, factor, k);
  stage_values<T, D>(c, at, 0, 0, v);
  block_barrier();
  // The first step stands apart: all its rows are in registers at once, before the sums are.
  States<T, D> sum{};
  if (c.h.data != nullptr) multiply<T, D>(min_int(S::kRows, c.bk), sum);
  SLA2_NO_UNROLL for (int first = S::kRows; first < c.bk; first += S::kRows) {
    block_barrier();
    SLA2_NO_UNROLL for (int pass = 0; pass < S::kKeyPasses; ++pass) {
      Lines<T, 1> line;
      load_keys<T, D>(c, at, first, pass, line);
      stage_keys<T, D>(c, at, first, pass, factor, line);
    }
    SLA2_NO_UNROLL for (int pass = 0; pass < S::kValuePasses; ++pass) {
      Lines<T, 1> line;
      load_values<T, D>(c, at, first, pass, line);
      stage_values<T, D>(c, at, first, pass, line);
    }
    block_barrier();
    if (c.h.data != nullptr) multiply<T, D>(S::kRows, sum);
  }
  block_barrier();
  if (low) store_transposed<T, D>(c, at);
  if (c.h.data != nullptr) store_states<T, D>(c, at, sum);
}

}  // namespace

void prepare_keys(const Call& c, void* stream) {
  with_type_and_size(c, [&](auto type, auto size) {
    constexpr int D = decltype(size)::value;
    using S = Shape<decltype(type), D>;
    const std::int64_t blocks = std::int64_t{c.B} * c.Hkv * c.T * S::kSlices;
    launch(stream, keys_kernel<decltype(type), D>, {blocks}, kThreads,
           S::kBytes + static_cast<std::size_t>(c.bk) * S::kByteStride, c);
  });
}

}  // namespace sla2::SLA2_CUDA_ROOM

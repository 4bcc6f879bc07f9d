// Step 0 and the poolings of step 1: k_sums, v_amax, pooled_q, then k_mean and v_scale; in the same
// pass over q its formats, q_low and phi(q).
// Keys: two neighbouring channels a thread over the rows of one key block, sums in token order, so
// the mean, and with it every integer of int8, has the bits of the reference. Queries: a block per
// query block, eight channels a lane; rows are loaded four at a time, or latency would rule.
#include "cuda/lines.cuh"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kThreads = 256;
constexpr int kMeanThreads = 1024;
constexpr int kBatch = 4;      // rows of a lane under way
constexpr int kKeyBatch = 16;  // rows of a thread under way

template <typename T>
SLA2_DEVICE const T* row_at(const Rows& r, int b, int h, int n, int channel) {
  return static_cast<const T*>(r.data) + b * r.batch + h * r.head + n * r.token + channel;
}

/// Two neighbours.
template <typename T>
SLA2_DEVICE void load_two(const T* from, bool vectors, float (&x)[2]) {
  if (!vectors) {
    x[0] = to_float(from[0]);
    x[1] = to_float(from[1]);
  } else if constexpr (sizeof(T) == 4) {
    const Words2 words = load_8(from);
    x[0] = bits_to_float(words.x[0]);
    x[1] = bits_to_float(words.x[1]);
  } else {
    unpack_16(load_4(from), std::is_same_v<T, Bf16> ? DType::kBF16 : DType::kF16, x[0], x[1]);
  }
}

/// Sums (in token order), or largest magnitudes, of two columns of `rows` rows.
template <typename T, bool kSum>
SLA2_DEVICE void fold_columns(const T* from, std::int64_t stride, bool vectors, int rows,
                              float (&total)[2]) {
  total[0] = total[1] = 0;
  const auto add = [&total](const float(&x)[2]) {
    SLA2_UNROLL for (int e = 0; e < 2; ++e) {
      total[e] = kSum ? add_rounded(total[e], x[e]) : max_or_nan(total[e], abs_of(x[e]));
    }
  };
  int n = 0;
  for (; n + kKeyBatch <= rows; n += kKeyBatch) {
    float x[kKeyBatch][2];
    SLA2_UNROLL for (int i = 0; i < kKeyBatch; ++i) {
      load_two(from + (n + i) * stride, vectors, x[i]);
    }
    SLA2_UNROLL for (int i = 0; i < kKeyBatch; ++i) add(x[i]);
  }
  for (; n < rows; ++n) {
    float x[2];
    load_two(from + n * stride, vectors, x);
    add(x);
  }
}

/// k_sums or v_amax of one key block, by D / 2 threads.
template <typename T, int D>
SLA2_DEVICE void reduce_keys(const Call& c, std::int64_t block, bool values) {
  const std::int64_t blocks = std::int64_t{c.B} * c.Hkv * c.T;
  if (block >= blocks) return;
  const int channel = thread_index() % (D / 2) * 2;
  const int j = static_cast<int>(block % c.T);
  const int head = static_cast<int>(block / c.T);
  const int b = head / c.Hkv;
  const int rows = min_int(c.bk, key_length(c, b) - j * c.bk);
  const int width = values ? c.dv : c.d;
  if (rows <= 0 || channel >= width) return;
  const Rows& from = values ? c.v : c.k;
  const T* column = row_at<T>(from, b, head % c.Hkv, j * c.bk, channel);
  float total[2];
  if (values) {
    fold_columns<T, false>(column, from.token, from.vectors, rows, total);
  } else {
    fold_columns<T, true>(column, from.token, from.vectors, rows, total);
  }
  store_8((values ? c.v_amax : c.k_sums) + block * width + channel,
          {{float_to_bits(total[0]), float_to_bits(total[1])}});
}

/// q_low, q_scale and phi_q of a row; `at`: its first element there.
template <typename T, int D>
SLA2_DEVICE void store_query(const Call& c, std::int64_t line, bool inside, bool valid,
                             float (&x)[kLine]) {
  constexpr int kLanes = D / kLine;
  const int channel = lane_index() % kLanes * kLine;
  if (is_low_bit(c)) {
    float scale, factor;
    quantiser(amax_over_row<kLanes>(amax_of_line(0.0f, x)), 127.0f, scale, factor);
    const Words2 words = quantise_line(x, factor);
    if (valid) {
      if (channel == 0) c.q_scale[line] = scale;
      store_8(static_cast<std::uint8_t*>(c.q_low) + line * D + channel, words);
    }
  } else if (valid) {
    store_line(c.format, c.q_low, c.q_plane, line * D + channel, x, 1.0f);
  }
  if constexpr (kTermsOf<T> != 1 || D > 128) {  // else attend computes it
    apply_phi<kLanes, kTermsOf<T> == 1>(c.feature_map, inside, x);
    if (valid) {
      store_line_terms<kTermsOf<T>>(c.phi_q.data + line * D + channel, c.phi_q.plane, x);
    }
  }
}

/// pooled_q (if set) of one query block, and its formats (if set).
template <typename T, int D>
SLA2_DEVICE void reduce_queries(const Call& c, std::int64_t block) {
  constexpr int kLanes = D / kLine;
  constexpr int kRows = kThreads / kLanes;   // at once
  float* partial = shared_memory<float>(0);  // [kRows, D]
  const int i = static_cast<int>(block % c.M);
  const std::int64_t head = block / c.M;
  const int rows = min_int(c.bq, c.Nq - i * c.bq);
  const int own = thread_index() / kLanes;
  const int channel = thread_index() % kLanes * kLine;
  const T* from =
      row_at<T>(c.q, static_cast<int>(head / c.H), static_cast<int>(head % c.H), i * c.bq, channel);
  float sums[kLine] = {};
  SLA2_NO_UNROLL for (int first = 0; first < rows; first += kBatch * kRows) {
    RawLine<T> raw[kBatch];
    SLA2_UNROLL for (int s = 0; s < kBatch; ++s) {
      const int r = first + s * kRows + own;
      raw[s] = load_raw(from + r * c.q.token, c.q.vectors, r < rows && channel < c.d);
    }
    SLA2_UNROLL for (int s = 0; s < kBatch; ++s) {
      const int r = first + s * kRows + own;
      float x[kLine];
      unpack_line(raw[s], x);
      SLA2_UNROLL for (int e = 0; e < kLine; ++e) sums[e] += x[e];
      if (c.q_low == nullptr) continue;
      store_query<T, D>(c, head * c.Nq + i * c.bq + r, channel < c.d, r < rows, x);
    }
  }
  if (c.pooled_q == nullptr) return;
  SLA2_UNROLL for (int e = 0; e < kLine; e += 4) {
    store_16(partial + own * D + channel + e,
             {{float_to_bits(sums[e]), float_to_bits(sums[e + 1]), float_to_bits(sums[e + 2]),
               float_to_bits(sums[e + 3])}});
  }
  block_barrier();
  for (int a = thread_index(); a < c.d; a += kThreads) {
    float sum = 0;
    SLA2_UNROLL for (int w = 0; w < kRows; ++w) sum += partial[w * D + a];
    c.pooled_q[block * c.d + a] = sum / static_cast<float>(rows);
  }
}

/// Blocks of threads for the keys, D / 2 threads for each key block's K, and V if wanted.
template <int D>
SLA2_HOST_DEVICE std::int64_t key_blocks_of_threads(const Call& c) {
  const std::int64_t units = std::int64_t{c.B} * c.Hkv * c.T * (c.v_amax == nullptr ? 1 : 2);
  return ceil_div(units * (D / 2), kThreads);
}

template <typename T, int D>
SLA2_KERNEL(kThreads, sizeof(T) == 2 ? 3 : 2)
void reduce_kernel(Call c) {
  const std::int64_t keys = key_blocks_of_threads<D>(c);
  if (block_x() >= keys) return reduce_queries<T, D>(c, block_x() - keys);
  const std::int64_t unit =
      std::int64_t{block_x()} * (kThreads / (D / 2)) + thread_index() / (D / 2);
  if (c.v_amax == nullptr) {
    reduce_keys<T, D>(c, unit, false);
  } else {
    reduce_keys<T, D>(c, unit / 2, unit % 2 != 0);
  }
}

/// One block per key/value head: fp64 sum of the block sums.
SLA2_KERNEL(kMeanThreads, 1) void mean_kernel(Call c) {
  double* sums = shared_memory<double>(0);                              // [parts, D]
  float* maxima = shared_memory<float>(kMeanThreads * sizeof(double));  // [parts, D]
  const int channel = thread_index() & (c.D - 1);
  const int part = thread_index() / c.D;
  const int parts = kMeanThreads / c.D;
  const int head = block_x();
  const int length = key_length(c, head / c.Hkv);
  const int blocks = blocks_of(c, length);
  const int step = (blocks + parts - 1) / parts;
  const int first = min_int(blocks, part * step);
  const int last = min_int(blocks, first + step);
  const std::int64_t base = static_cast<std::int64_t>(head) * c.T;
  double sum = 0;
  if (channel < c.d) {
    const float* from = c.k_sums + base * c.d + channel;
    for (int j = first; j < last; ++j) sum += static_cast<double>(from[j * std::int64_t{c.d}]);
  }
  float amax = 0;
  if (c.v_amax != nullptr && channel < c.dv) {
    const float* from = c.v_amax + base * c.dv + channel;
    for (int j = first; j < last; ++j) amax = max_or_nan(amax, from[j * std::int64_t{c.dv}]);
  }
  sums[thread_index()] = sum;
  maxima[thread_index()] = amax;
  block_barrier();
  if (part != 0) return;
  for (int p = 1; p < parts; ++p) {
    sum += sums[p * c.D + channel];
    amax = max_or_nan(amax, maxima[p * c.D + channel]);
  }
  if (channel < c.d) {
    c.k_mean[head * c.d + channel] = static_cast<float>(sum / static_cast<double>(length));
  }
  if (c.v_scale != nullptr && channel < c.dv) {
    float scale, factor;
    quantiser(amax, c.format == Format::kFp8 ? 448.0f : 127.0f, scale, factor);
    c.v_scale[head * c.dv + channel] = scale;
    c.v_factor[head * c.dv + channel] = factor;
  }
}

}  // namespace

void reduce(const Call& c, void* stream) {
  const std::int64_t queries =
      c.pooled_q == nullptr && c.q_low == nullptr ? 0 : std::int64_t{c.B} * c.H * c.M;
  with_type_and_size(c, [&](auto type, auto size) {
    constexpr int D = decltype(size)::value;
    constexpr std::size_t kShared = kThreads * kLine * sizeof(float);
    launch(stream, reduce_kernel<decltype(type), D>, {key_blocks_of_threads<D>(c) + queries},
           kThreads, kShared, c);
  });
}

void finish_mean(const Call& c, void* stream) {
  launch(stream, mean_kernel, {std::int64_t{c.B} * c.Hkv}, kMeanThreads,
         kMeanThreads * (sizeof(double) + sizeof(float)), c);
}

}  // namespace sla2::SLA2_CUDA_ROOM

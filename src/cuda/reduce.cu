// Step 0 and the poolings of step 1: k_sums, v_amax, pooled_q, then k_mean and v_scale; in the same
// pass over q its formats, q_low and phi(q).
// One block per key block or query block, a thread per channel: sums run in token order, so the
// mean, and with it every integer of int8, has the bits of the reference.
#include "cuda/lines.cuh"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kThreads = 256;
constexpr int kMeanThreads = 1024;

struct Sum {
  SLA2_DEVICE static void add(float& total, float x) { total = add_rounded(total, x); }
};
struct Amax {
  SLA2_DEVICE static void add(float& total, float x) { total = larger_or_nan(total, abs_of(x)); }
};

template <typename Fold, typename T>
SLA2_DEVICE float fold_column(const T* from, std::int64_t stride, int rows) {
  float total = 0;
  int n = 0;
  for (; n + 8 <= rows; n += 8) {
    float x[8];
    SLA2_UNROLL for (int i = 0; i < 8; ++i) x[i] = to_float(from[(n + i) * stride]);
    SLA2_UNROLL for (int i = 0; i < 8; ++i) Fold::add(total, x[i]);
  }
  for (; n < rows; ++n) Fold::add(total, to_float(from[n * stride]));
  return total;
}

/// Folds column `c` of `rows` rows from token `first` on.
template <typename Fold>
SLA2_DEVICE float fold(const Rows& r, int b, int h, int first, int rows, int c) {
  const std::int64_t at = b * r.batch + h * r.head + first * r.token + c;
  switch (r.dtype) {
    case DType::kF32:
      return fold_column<Fold>(static_cast<const float*>(r.data) + at, r.token, rows);
    case DType::kBF16:
      return fold_column<Fold>(static_cast<const Bf16*>(r.data) + at, r.token, rows);
    default:
      return fold_column<Fold>(static_cast<const F16*>(r.data) + at, r.token, rows);
  }
}

SLA2_DEVICE void reduce_keys(const Call& c, std::int64_t block, int part, int parts, int channel) {
  const int j = static_cast<int>(block % c.T);
  const int head = static_cast<int>(block / c.T);
  const int b = head / c.Hkv;
  const int rows = min_int(c.bk, key_length(c, b) - j * c.bk);
  if (rows <= 0) return;
  for (int task = part; task < 2; task += parts) {
    if (task == 0 && channel < c.d) {
      c.k_sums[block * c.d + channel] = fold<Sum>(c.k, b, head % c.Hkv, j * c.bk, rows, channel);
    }
    if (task == 1 && c.v_amax != nullptr && channel < c.dv) {
      c.v_amax[block * c.dv + channel] = fold<Amax>(c.v, b, head % c.Hkv, j * c.bk, rows, channel);
    }
  }
}

SLA2_DEVICE void pool_queries(const Call& c, std::int64_t block, int part, int parts, int channel) {
  float* partial = shared_memory<float>(0);  // [parts, D]
  const int i = static_cast<int>(block % c.M);
  const int head = static_cast<int>(block / c.M);
  const int rows = min_int(c.bq, c.Nq - i * c.bq);
  const int step = (rows + parts - 1) / parts;
  const int first = min_int(rows, part * step);
  const int count = min_int(rows - first, step);
  float sum = 0;
  if (channel < c.d) {
    sum = fold<Sum>(c.q, head / c.H, head % c.H, i * c.bq + first, count, channel);
  }
  partial[part * c.D + channel] = sum;
  block_barrier();
  if (part != 0 || channel >= c.d) return;
  for (int p = 1; p < parts; ++p) sum += partial[p * c.D + channel];
  c.pooled_q[block * c.d + channel] = sum / static_cast<float>(rows);
}

/// pooled_q, q_low, q_scale and phi_q of one query block, a warp per row.
SLA2_DEVICE void prepare_queries(const Call& c, std::int64_t block) {
  constexpr int kGroups = 2;
  float* partial = shared_memory<float>(0);  // [warps, D]
  const int i = static_cast<int>(block % c.M);
  const std::int64_t head = block / c.M;
  const int rows = min_int(c.bq, c.Nq - i * c.bq);
  float sums[kGroups][4] = {};
  for (int r = warp_index(); r < rows; r += kThreads / 32) {
    const int n = i * c.bq + r;
    const Row row = row_of(c.q, static_cast<int>(head / c.H), static_cast<int>(head % c.H), n);
    const std::int64_t at = (head * c.Nq + n) * c.D;
    float x[kGroups][4] = {};
    float amax = 0;
    SLA2_UNROLL for (int g = 0; g < kGroups; ++g) {
      if (line_channel(g) < c.d) load_some<4>(row, line_channel(g), x[g]);
      SLA2_UNROLL for (int e = 0; e < 4; ++e) {
        sums[g][e] += x[g][e];
        amax = larger_or_nan(amax, abs_of(x[g][e]));
      }
    }
    if (is_low_bit(c)) {
      float scale, factor;
      quantiser(amax_over_warp(amax), 127.0f, scale, factor);
      if (lane_index() == 0) c.q_scale[head * c.Nq + n] = scale;
      SLA2_UNROLL for (int g = 0; g < kGroups; ++g) {
        if (line_channel(g) >= c.D) continue;
        store_4(static_cast<std::uint8_t*>(c.q_low) + at + line_channel(g),
                quantise_line(x[g], factor));
      }
    } else {
      SLA2_UNROLL for (int g = 0; g < kGroups; ++g) {
        if (line_channel(g) >= c.D) continue;
        store_line(c.format, c.q_low, c.q_plane, at + line_channel(g), x[g], 1.0f);
      }
    }
    apply_phi(c, true, x);
    SLA2_UNROLL for (int g = 0; g < kGroups; ++g) {
      if (line_channel(g) >= c.D) continue;
      store_line_terms(c.phi_q.data + at + line_channel(g), c.phi_q.plane, c.phi_q.count, x[g]);
    }
  }
  SLA2_UNROLL for (int g = 0; g < kGroups; ++g) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) {
      if (line_channel(g) < c.D) partial[warp_index() * c.D + line_channel(g) + e] = sums[g][e];
    }
  }
  block_barrier();
  if (c.pooled_q == nullptr) return;
  for (int channel = thread_index(); channel < c.d; channel += kThreads) {
    float sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += partial[w * c.D + channel];
    c.pooled_q[block * c.d + channel] = sum / static_cast<float>(rows);
  }
}

SLA2_KERNEL(kThreads, 3) void reduce_kernel(Call c) {
  const int channel = thread_index() & (c.D - 1);
  const int part = thread_index() / c.D;
  const int parts = kThreads / c.D;
  const std::int64_t key_blocks = static_cast<std::int64_t>(c.B) * c.Hkv * c.T;
  if (block_x() < key_blocks) {
    reduce_keys(c, block_x(), part, parts, channel);
  } else if (c.q_low != nullptr) {
    prepare_queries(c, block_x() - key_blocks);
  } else {
    pool_queries(c, block_x() - key_blocks, part, parts, channel);
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
    for (int j = first; j < last; ++j) amax = larger_or_nan(amax, from[j * std::int64_t{c.dv}]);
  }
  sums[thread_index()] = sum;
  maxima[thread_index()] = amax;
  block_barrier();
  if (part != 0) return;
  for (int p = 1; p < parts; ++p) {
    sum += sums[p * c.D + channel];
    amax = larger_or_nan(amax, maxima[p * c.D + channel]);
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
  const std::int64_t keys = static_cast<std::int64_t>(c.B) * c.Hkv * c.T;
  const std::int64_t queries =
      c.pooled_q == nullptr && c.q_low == nullptr ? 0 : static_cast<std::int64_t>(c.B) * c.H * c.M;
  // Sums of 8 warps over D channels, or of one thread each.
  const std::size_t shared = kThreads / 32 * static_cast<std::size_t>(c.D) * sizeof(float);
  launch(stream, reduce_kernel, {keys + queries}, kThreads, shared, c);
}

void finish_mean(const Call& c, void* stream) {
  launch(stream, mean_kernel, {std::int64_t{c.B} * c.Hkv}, kMeanThreads,
         kMeanThreads * (sizeof(double) + sizeof(float)), c);
}

}  // namespace sla2::SLA2_CUDA_ROOM

// First launch of the backward: one block for each query block and one for each key block. Queries:
// q, phi(q) and dO as terms, rowsum(dO o_s), rowsum(dO_l o_l), lse, alpha, the weights 1 - m and
// who reads what; keys: ks, phi(ks) and v as terms. Everything behind the last token or feature
// becomes zero (lse: +inf, so that p = 0). A lane holds eight neighbouring features of a row, as
// they lie in memory; sums over rows in a fixed order.
#include "cuda/backward_rows.cuh"
#include "cuda/lines.cuh"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kWarps = kBackThreads / 32;

/// How rows of D features lie in a block of threads.
template <typename T, int D>
struct Lines {
  static constexpr int kLanes = D / kLine;          // of a row
  static constexpr int kWarpRows = 32 / kLanes;     // of a warp at once
  static constexpr int kRows = kWarps * kWarpRows;  // of the block at once
  static constexpr int kTerms = kTermsOf<T>;
};

/// This lane's first feature, and its row of those that the block handles at once.
template <typename T, int D>
SLA2_DEVICE int own_channel() {
  return lane_index() % Lines<T, D>::kLanes * kLine;
}
template <typename T, int D>
SLA2_DEVICE int own_row() {
  return warp_index() * Lines<T, D>::kWarpRows + lane_index() / Lines<T, D>::kLanes;
}

/// This lane's features of the block's first row, n.
template <typename T>
SLA2_DEVICE const T* line_at(const Rows& rows, int b, int h, int n, int channel) {
  const Row row = row_of(rows, b, h, n);
  return static_cast<const T*>(row.data) + row.at + channel;
}

template <typename T, int D>
SLA2_DEVICE void store_line_at(const Terms& to, std::int64_t row, const float (&x)[kLine]) {
  float rest[kLine];
  SLA2_UNROLL for (int e = 0; e < kLine; ++e) rest[e] = x[e];
  store_line_terms<Lines<T, D>::kTerms>(to.data + row * D + own_channel<T, D>(), to.plane, rest);
}

/// Of a row, in each of its lanes.
template <typename T, int D>
SLA2_DEVICE float dot(const float (&a)[kLine], const float (&b)[kLine]) {
  float sum = 0.0f;
  SLA2_UNROLL for (int e = 0; e < kLine; ++e) sum += a[e] * b[e];
  return sum_over_row<Lines<T, D>::kLanes>(sum);
}

/// Sum over the warps of the block, in their order; in every thread. Barriers.
SLA2_DEVICE float sum_over_block(float of_warp) {
  float* parts = shared_memory<float>(0);
  if (lane_index() == 0) parts[warp_index()] = of_warp;
  block_barrier();
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  block_barrier();
  return sum;
}

/// The mean of `rows` rows from the lanes' sums, minus `shift`. Barriers.
template <typename T, int D>
SLA2_DEVICE void store_mean(const float (&sums)[kLine], int rows, const float* shift, int d,
                            float* out) {
  float* parts = shared_memory<float>(0);  // [kRows, D]
  SLA2_UNROLL for (int e = 0; e < kLine; ++e) {
    parts[own_row<T, D>() * D + own_channel<T, D>() + e] = sums[e];
  }
  block_barrier();
  for (int c = thread_index(); c < D; c += kBackThreads) {
    float sum = 0.0f;
    for (int r = 0; r < Lines<T, D>::kRows; ++r) sum += parts[r * D + c];
    const float mean = rows > 0 ? sum / static_cast<float>(rows) : 0.0f;
    out[c] = c < d ? mean - (shift == nullptr || rows == 0 ? 0.0f : shift[c]) : 0.0f;
  }
  block_barrier();
}

/// dO_l = dO P^T of a row (SLA).
template <typename T, int D>
SLA2_DEVICE void project_back(const Backward& back, const float (&d_o)[kLine],
                              float (&result)[kLine]) {
  constexpr int kLanes = Lines<T, D>::kLanes;
  const int dv = back.call.dv;
  const int channel = own_channel<T, D>();
  SLA2_UNROLL for (int e = 0; e < kLine; ++e) result[e] = 0.0f;
  SLA2_NO_UNROLL for (int first = 0; first < dv; first += kLine) {
    SLA2_UNROLL for (int i = 0; i < kLine; ++i) {
      const float value = shuffle(d_o[i], lane_index() / kLanes * kLanes + first / kLine);
      const float* column = back.call.proj_out + first + i;
      SLA2_UNROLL for (int e = 0; e < kLine; ++e) {
        if (channel < dv) result[e] += column[(channel + e) * dv] * value;
      }
    }
  }
}

/// Weights of one row of blocks: rest, reads, and whether the complement is empty.
SLA2_DEVICE bool weigh(const Backward& back, int b, int h, int i) {
  const Call& c = back.call;
  const int k_blocks = blocks_of(c, key_length(c, b));
  const std::int64_t head = static_cast<std::int64_t>(b) * c.H + h;
  const std::int64_t row = head * c.M + i;
  std::uint8_t* reads = back.reads + head * c.T * c.M + i;
  const float* logits = c.given_logits + (c.soft ? row * c.T : 0);
  const std::int32_t* blocks = c.given_blocks + (c.soft ? 0 : row * c.L);
  for (int j = thread_index(); j < c.T; j += kBackThreads) {
    reads[static_cast<std::int64_t>(j) * c.M] =
        c.soft && j < k_blocks && logits[j] != -kInfinity ? 1 : 0;
  }
  for (int j = 2 * thread_index(); j < c.Tp; j += 2 * kBackThreads) {
    float rest[2];
    SLA2_UNROLL for (int e = 0; e < 2; ++e) {
      const bool inside = j + e < k_blocks;
      rest[e] = !inside                  ? 0.0f
                : c.soft && !c.scope_all ? 1.0f / (1.0f + exact_exp(logits[j + e]))
                                         : 1.0f;
    }
    store_terms(back.rest, row * c.Tp + j, rest[0], rest[1]);
  }
  block_barrier();
  int routed = 0;
  if (c.soft) {
    for (int j = 0; j < k_blocks; j += kBackThreads) {
      const int at = j + thread_index();
      routed += block_count(at < k_blocks && logits[at < k_blocks ? at : 0] == kInfinity);
    }
    return routed == k_blocks;
  }
  for (int at = 0; at < c.L; at += kBackThreads) {
    const int mine = at + thread_index();
    const int j = mine < c.L ? blocks[mine] : -1;
    const bool valid = j >= 0 && j < k_blocks;
    if (valid) {
      reads[static_cast<std::int64_t>(j) * c.M] = 1;
      if (!c.scope_all) {
        for (int p = 0; p < back.rest.count; ++p) {
          back.rest.data[p * back.rest.plane + row * c.Tp + j] = Bf16{0};
        }
      }
    }
    routed += block_count(valid);
  }
  return routed == k_blocks;
}

template <typename T, int D>
SLA2_DEVICE void prepare_queries(const Backward& back, int b, int h, int i) {
  using L = Lines<T, D>;
  const Call& c = back.call;
  const bool empty = weigh(back, b, h, i);
  const std::int64_t head = static_cast<std::int64_t>(b) * c.H + h;
  const int channel = own_channel<T, D>();
  const int first = i * c.bq;
  const T* q_from = line_at<T>(c.q, b, h, first, channel);
  const T* d_o_from = line_at<T>(back.d_out, b, h, first, channel);
  const T* sparse_from = line_at<T>(back.saved_sparse, b, h, first, channel);
  const T* linear_from = line_at<T>(back.saved_linear, b, h, first, channel);
  float sums[kLine] = {};
  float d_alpha = 0.0f;
  SLA2_NO_UNROLL for (int r = own_row<T, D>(); r < c.bq; r += L::kRows) {
    const bool valid = first + r < c.Nq;
    const std::int64_t row = head * c.M * c.bq + first + r;
    const bool inside = valid && channel < c.d;
    const bool value = valid && channel < c.dv;
    const RawLine<T> raw_q = load_raw(q_from + r * c.q.token, c.q.vectors, inside);
    const RawLine<T> raw_d_o = load_raw(d_o_from + r * back.d_out.token, back.d_out.vectors, value);
    const RawLine<T> raw_sparse =
        load_raw(sparse_from + r * back.saved_sparse.token, back.saved_sparse.vectors, value);
    const RawLine<T> raw_linear = load_raw(linear_from + r * back.saved_linear.token,
                                           back.saved_linear.vectors, value && !empty);
    float x[kLine];
    unpack_line(raw_q, x);
    SLA2_UNROLL for (int e = 0; e < kLine; ++e) sums[e] += x[e];
    store_line_at<T, D>(back.q, row, x);
    apply_phi<L::kLanes, L::kTerms == 1>(c.feature_map, inside, x);
    store_line_at<T, D>(back.phi_q, row, x);

    float d_o[kLine], sparse[kLine], linear[kLine];
    unpack_line(raw_d_o, d_o);
    unpack_line(raw_sparse, sparse);
    unpack_line(raw_linear, linear);
    store_line_at<T, D>(back.d_o, row, d_o);
    SLA2_UNROLL for (int e = 0; e < kLine; ++e) d_alpha += d_o[e] * (sparse[e] - linear[e]);
    const float delta_sparse = dot<T, D>(d_o, sparse);
    if (c.is_sla) {
      float d_l[kLine] = {};
      if (c.proj_out != nullptr && !empty) project_back<T, D>(back, d_o, d_l);
      store_line_at<T, D>(back.d_l, row, d_l);
      SLA2_UNROLL for (int e = 0; e < kLine; ++e) d_o[e] = d_l[e];
    }
    const float delta_linear = dot<T, D>(d_o, linear);
    if (channel == 0) {
      back.delta_sparse[row] = delta_sparse;
      back.delta_linear[row] = delta_linear;
      back.lse[row] = valid ? back.saved_lse[head * c.Nq + first + r] * kLog2E : kInfinity;
    }
  }
  const float total = sum_over_block(sum_over_warp(d_alpha));
  if (thread_index() == 0) {
    const std::int64_t block = head * c.M + i;
    back.complement_empty[block] = empty ? 1 : 0;
    const float alpha = back_alpha(back, h, i);
    back.alphas[block] = c.is_sla || empty ? 1.0f : alpha;
    for (int t = 0; t < back.query_tiles; ++t) {
      back.alpha_parts[block * back.query_tiles + t] =
          t > 0 || empty || c.is_sla ? 0.0f : alpha * (1.0f - alpha) * total;
    }
  }
  if (back.learns_router) {
    store_mean<T, D>(sums, min_int(c.bq, c.Nq - first), nullptr, c.d,
                     back.pooled_q + (head * c.M + i) * D);
  }
}

template <typename T, int D>
SLA2_DEVICE void prepare_keys(const Backward& back, int b, int kv, int j) {
  using L = Lines<T, D>;
  const Call& c = back.call;
  const int length = key_length(c, b);
  const std::int64_t head = static_cast<std::int64_t>(b) * c.Hkv + kv;
  const int channel = own_channel<T, D>();
  const int first = j * c.bk;
  const float* mean_from = c.k_mean + head * c.d;
  float mean[kLine];
  SLA2_UNROLL for (int e = 0; e < kLine; ++e) {
    mean[e] = channel < c.d ? mean_from[channel + e] : 0.0f;
  }
  const T* k_from = line_at<T>(c.k, b, kv, first, channel);
  const T* v_from = line_at<T>(c.v, b, kv, first, channel);
  float sums[kLine] = {};
  SLA2_NO_UNROLL for (int r = own_row<T, D>(); r < c.bk; r += L::kRows) {
    const bool valid = first + r < length;
    const std::int64_t row = head * c.T * c.bk + first + r;
    const bool inside = valid && channel < c.d;
    const RawLine<T> raw_k = load_raw(k_from + r * c.k.token, c.k.vectors, inside);
    const RawLine<T> raw_v = load_raw(v_from + r * c.v.token, c.v.vectors, valid && channel < c.dv);
    float k[kLine], ks[kLine];
    unpack_line(raw_k, k);
    SLA2_UNROLL for (int e = 0; e < kLine; ++e) {
      sums[e] += k[e];
      ks[e] = inside ? k[e] - mean[e] : 0.0f;
    }
    store_line_at<T, D>(back.ks, row, ks);
    if (c.raw_keys) {
      SLA2_UNROLL for (int e = 0; e < kLine; ++e) ks[e] = k[e];
    }
    apply_phi<L::kLanes, L::kTerms == 1>(c.feature_map, inside, ks);
    store_line_at<T, D>(back.phi_k, row, ks);
    unpack_line(raw_v, k);
    store_line_at<T, D>(back.v, row, k);
  }
  if (back.learns_router) {
    store_mean<T, D>(sums, max_int(0, min_int(c.bk, length - first)), mean_from, c.d,
                     back.pooled_k + (head * c.T + j) * D);
  }
}

template <typename T, int D>
SLA2_KERNEL(kBackThreads, sizeof(T) == 2 ? 6 : 4)
void prepare_kernel(Backward back) {
  const Call& c = back.call;
  if (block_z() == 0) {
    if (block_x() < c.M) prepare_queries<T, D>(back, block_y() / c.H, block_y() % c.H, block_x());
  } else if (block_x() < c.T && block_y() < c.B * c.Hkv) {
    prepare_keys<T, D>(back, block_y() / c.Hkv, block_y() % c.Hkv, block_x());
  }
}

}  // namespace

void back_prepare(const Backward& back, void* stream) {
  with_type_and_size(back.call, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int D = decltype(size)::value;
    constexpr std::size_t kShared = Lines<T, D>::kRows * D * sizeof(float);
    const Call& c = back.call;
    launch(stream, prepare_kernel<T, D>, {c.M > c.T ? c.M : c.T, c.B * c.H, 2}, kBackThreads,
           kShared, back);
  });
}

}  // namespace sla2::SLA2_CUDA_ROOM

// First launch of the backward: one block for each query block and one for each key block. Queries:
// q, phi(q) and dO as terms, rowsum(dO o_s), rowsum(dO_l o_l), lse, the weights 1 - m and who reads
// what; keys: ks, phi(ks) and v as terms. Everything behind the last token or feature becomes zero
// (lse: +inf, so that p = 0). One warp a row; sums over rows in a fixed order.
#include "cuda/backward_rows.cuh"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kWarps = kBackThreads / 32;
constexpr int kMaxPairs = 4;  // pairs of neighbouring features that a lane holds: 256 / 64

/// One row, spread over a warp: feature 64 * t + 2 * lane + e is x[2 * t + e].
struct WarpRow {
  float x[2 * kMaxPairs];
};

SLA2_DEVICE int feature_of(int t) { return 64 * t + 2 * lane_index(); }

SLA2_DEVICE WarpRow load_row(const Rows& rows, int b, int h, int n, int width, bool valid) {
  WarpRow row;
  SLA2_UNROLL for (int t = 0; t < kMaxPairs; ++t) {
    float pair[2] = {0.0f, 0.0f};
    if (valid && feature_of(t) < width) load_some<2>(row_of(rows, b, h, n), feature_of(t), pair);
    row.x[2 * t] = pair[0];
    row.x[2 * t + 1] = pair[1];
  }
  return row;
}

SLA2_DEVICE void store_row(const Terms& to, std::int64_t at, int D, const WarpRow& row) {
  SLA2_UNROLL for (int t = 0; t < kMaxPairs; ++t) {
    if (64 * t < D) store_terms(to, at + feature_of(t), row.x[2 * t], row.x[2 * t + 1]);
  }
}

SLA2_DEVICE float dot(const WarpRow& a, const WarpRow& b) {
  float sum = 0.0f;
  SLA2_UNROLL for (int i = 0; i < 2 * kMaxPairs; ++i) sum += a.x[i] * b.x[i];
  return sum_over_warp(sum);
}

/// phi of a row of d features; zero behind them.
SLA2_DEVICE WarpRow phi_row(const WarpRow& row, FeatureMap map, int d) {
  float max = -kInfinity;
  SLA2_UNROLL for (int i = 0; i < 2 * kMaxPairs; ++i) {
    if (feature_of(i / 2) < d) max = max_of(max, row.x[i]);
  }
  max = max_over_warp(max);
  WarpRow phi;
  float sum = 0.0f;
  SLA2_UNROLL for (int i = 0; i < 2 * kMaxPairs; ++i) {
    phi.x[i] = feature_of(i / 2) < d ? phi_of(map, row.x[i], max) : 0.0f;
    sum += phi.x[i];
  }
  if (map == FeatureMap::kSoftmax) {
    sum = sum_over_warp(sum);
    SLA2_UNROLL for (int i = 0; i < 2 * kMaxPairs; ++i) phi.x[i] = phi.x[i] / sum;
  }
  return phi;
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

/// The mean of `rows` rows from the warps' sums, minus `shift`. Barriers.
SLA2_DEVICE void store_mean(const WarpRow& sums, int rows, const float* shift, int d, int D,
                            float* out) {
  float* parts = shared_memory<float>(0);  // [warps, D]
  SLA2_UNROLL for (int t = 0; t < kMaxPairs; ++t) {
    if (64 * t < D) {
      parts[warp_index() * D + feature_of(t)] = sums.x[2 * t];
      parts[warp_index() * D + feature_of(t) + 1] = sums.x[2 * t + 1];
    }
  }
  block_barrier();
  for (int c = thread_index(); c < D; c += kBackThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += parts[w * D + c];
    const float mean = rows > 0 ? sum / static_cast<float>(rows) : 0.0f;
    out[c] = c < d ? mean - (shift == nullptr || rows == 0 ? 0.0f : shift[c]) : 0.0f;
  }
  block_barrier();
}

/// dO_l = dO P^T of a row (SLA).
SLA2_DEVICE WarpRow project_back(const Backward& back, const WarpRow& d_o) {
  const int dv = back.call.dv;
  WarpRow result = {};
  for (int c = 0; c < dv; ++c) {
    float mine = 0.0f;
    SLA2_UNROLL for (int i = 0; i < 2 * kMaxPairs; ++i) {
      if (i == c / 64 * 2 + c % 2) mine = d_o.x[i];
    }
    const float value = shuffle(mine, c % 64 / 2);
    SLA2_UNROLL for (int i = 0; i < 2 * kMaxPairs; ++i) {
      const int a = feature_of(i / 2) + i % 2;
      if (a < dv) result.x[i] += back.call.proj_out[a * dv + c] * value;
    }
  }
  return result;
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

SLA2_DEVICE void prepare_queries(const Backward& back, int b, int h, int i) {
  const Call& c = back.call;
  const bool empty = weigh(back, b, h, i);
  const std::int64_t head = static_cast<std::int64_t>(b) * c.H + h;
  WarpRow sums = {};
  float d_alpha = 0.0f;
  for (int r = warp_index(); r < c.bq; r += kWarps) {
    const int n = i * c.bq + r;
    const bool valid = n < c.Nq;
    const std::int64_t row = head * c.M * c.bq + n;
    const WarpRow q = load_row(c.q, b, h, n, c.d, valid);
    store_row(back.q, row * c.D, c.D, q);
    WarpRow phi = {};
    if (valid) phi = phi_row(q, c.feature_map, c.d);
    store_row(back.phi_q, row * c.D, c.D, phi);
    SLA2_UNROLL for (int e = 0; e < 2 * kMaxPairs; ++e) sums.x[e] += q.x[e];

    const WarpRow d_o = load_row(back.d_out, b, h, n, c.dv, valid);
    const WarpRow sparse = load_row(back.saved_sparse, b, h, n, c.dv, valid);
    const WarpRow linear = load_row(back.saved_linear, b, h, n, c.dv, valid && !empty);
    store_row(back.d_o, row * c.D, c.D, d_o);
    WarpRow d_l = d_o;
    if (c.is_sla) {
      d_l = c.proj_out == nullptr || empty ? WarpRow{} : project_back(back, d_o);
      store_row(back.d_l, row * c.D, c.D, d_l);
    }
    WarpRow difference;
    SLA2_UNROLL for (int e = 0; e < 2 * kMaxPairs; ++e) {
      difference.x[e] = sparse.x[e] - linear.x[e];
    }
    d_alpha += dot(d_o, difference);
    const float delta_sparse = dot(d_o, sparse);
    const float delta_linear = dot(d_l, linear);
    if (lane_index() == 0) {
      back.delta_sparse[row] = delta_sparse;
      back.delta_linear[row] = delta_linear;
      back.lse[row] = valid ? back.saved_lse[head * c.Nq + n] * kLog2E : kInfinity;
    }
  }
  const float total = sum_over_block(d_alpha);
  if (thread_index() == 0) {
    back.complement_empty[head * c.M + i] = empty ? 1 : 0;
    const float alpha = back_alpha(back, h, i);
    for (int t = 0; t < back.query_tiles; ++t) {
      back.alpha_parts[(head * c.M + i) * back.query_tiles + t] =
          t > 0 || empty || c.is_sla ? 0.0f : alpha * (1.0f - alpha) * total;
    }
  }
  if (back.learns_router) {
    store_mean(sums, min_int(c.bq, c.Nq - i * c.bq), nullptr, c.d, c.D,
               back.pooled_q + (head * c.M + i) * c.D);
  }
}

SLA2_DEVICE void prepare_keys(const Backward& back, int b, int kv, int j) {
  const Call& c = back.call;
  const int length = key_length(c, b);
  const std::int64_t head = static_cast<std::int64_t>(b) * c.Hkv + kv;
  const float* mean = c.k_mean + head * c.d;
  WarpRow sums = {};
  for (int r = warp_index(); r < c.bk; r += kWarps) {
    const int n = j * c.bk + r;
    const bool valid = n < length;
    const std::int64_t row = head * c.T * c.bk + n;
    const WarpRow k = load_row(c.k, b, kv, n, c.d, valid);
    WarpRow ks = k;
    SLA2_UNROLL for (int e = 0; e < 2 * kMaxPairs; ++e) {
      sums.x[e] += k.x[e];
      const int feature = feature_of(e / 2) + e % 2;
      if (valid && feature < c.d) ks.x[e] -= mean[feature];
    }
    WarpRow phi = {};
    if (valid) phi = phi_row(c.raw_keys ? k : ks, c.feature_map, c.d);
    store_row(back.ks, row * c.D, c.D, ks);
    store_row(back.phi_k, row * c.D, c.D, phi);
    store_row(back.v, row * c.D, c.D, load_row(c.v, b, kv, n, c.dv, valid));
  }
  if (back.learns_router) {
    store_mean(sums, max_int(0, min_int(c.bk, length - j * c.bk)), mean, c.d, c.D,
               back.pooled_k + (head * c.T + j) * c.D);
  }
}

SLA2_KERNEL(kBackThreads, 4) void prepare_kernel(Backward back) {
  const Call& c = back.call;
  if (block_z() == 0) {
    if (block_x() < c.M) prepare_queries(back, block_y() / c.H, block_y() % c.H, block_x());
  } else if (block_x() < c.T && block_y() < c.B * c.Hkv) {
    prepare_keys(back, block_y() / c.Hkv, block_y() % c.Hkv, block_x());
  }
}

}  // namespace

void back_prepare(const Backward& back, void* stream) {
  const Call& c = back.call;
  launch(stream, prepare_kernel, {c.M > c.T ? c.M : c.T, c.B * c.H, 2}, kBackThreads,
         static_cast<std::size_t>(kWarps * c.D) * sizeof(float), back);
}

}  // namespace sla2::SLA2_CUDA_ROOM

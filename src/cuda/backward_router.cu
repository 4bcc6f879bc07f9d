// The small sums at the end of a backward: the mean of the linear branch's key gradients, the
// gradients of alpha_logit and proj_out, and the router's: from u and l to d m, through SoftTop-k
// (Eq. 17) and the score norm to ds_ij, then dWq = scale sum qb_i^T (sum_j ds_ij kb_j Wk) and dWk =
// scale sum (sum_j ds_ij kb_j)^T (qb_i Wq). Every sum has one owner and one order.
#include "cuda/backward_rows.cuh"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kColumns = 32;  // results of a block of reduce_kernel, summed in 4 parts each
constexpr int kParts = kBackThreads / kColumns;

struct Counts {
  Backward back;
  int mean_blocks, alpha_blocks, projection_blocks;
};

/// Sum of value(t), t < count, by the kParts threads of a column; in every one of them. Barriers.
template <typename Value>
SLA2_DEVICE double sum_in_parts(int count, Value value) {
  double* parts = shared_memory<double>(0);  // [kParts, kColumns]
  const int column = thread_index() % kColumns;
  double sum = 0.0;
  for (int t = thread_index() / kColumns; t < count; t += kParts) {
    sum += static_cast<double>(value(t));
  }
  parts[thread_index()] = sum;
  block_barrier();
  sum = 0.0;
  for (int p = 0; p < kParts; ++p) sum += parts[p * kColumns + column];
  return sum;
}

SLA2_DEVICE void reduce_means(const Backward& back, std::int64_t first) {
  const Call& c = back.call;
  const std::int64_t at = first + thread_index() % kColumns;  // D is a multiple of 32
  const std::int64_t head = at / c.D;
  const int b = static_cast<int>(head / c.Hkv);
  const int tiles = c.T * back.key_tiles;
  const float* sums = back.key_sums + head * tiles * c.D + at % c.D;
  const double sum = sum_in_parts(c.raw_keys ? 0 : tiles,
                                  [&](int t) { return sums[static_cast<std::int64_t>(t) * c.D]; });
  if (thread_index() < kColumns) {
    back.key_mean[at] = static_cast<float>(sum / static_cast<double>(key_length(c, b)));
  }
}

SLA2_DEVICE void reduce_alpha(const Backward& back, int first) {
  const Call& c = back.call;
  const int count = c.H * c.alpha_blocks;
  const int at = first + thread_index() % kColumns;
  const int h = min_int(at, count - 1) / c.alpha_blocks;
  const int column = min_int(at, count - 1) % c.alpha_blocks;
  // One logit for all blocks, or one for each.
  const int parts = (c.alpha_blocks == 1 ? c.M : 1) * back.query_tiles;
  const double sum = sum_in_parts(c.B * parts, [&](int t) {
    const std::int64_t head = static_cast<std::int64_t>(t / parts) * c.H + h;
    return back.alpha_parts[(head * c.M + column) * back.query_tiles + t % parts];
  });
  if (thread_index() < kColumns && at < count) back.d_alpha_logit[at] = static_cast<float>(sum);
}

SLA2_DEVICE void reduce_projection(const Backward& back, int first) {
  const Call& c = back.call;
  const int count = c.dv * c.dv;  // a multiple of 256
  const int at = first + thread_index() % kColumns;
  const double sum = sum_in_parts(c.is_sla ? back.projection_parts : 0, [&](int t) {
    return back.projection_sums[static_cast<std::int64_t>(t) * count + at];
  });
  if (thread_index() < kColumns) back.d_proj_out[at] = static_cast<float>(sum);
}

SLA2_KERNEL(kBackThreads, 4) void reduce_kernel(Counts counts) {
  int block = block_x();
  if (block < counts.mean_blocks) {
    reduce_means(counts.back, static_cast<std::int64_t>(block) * kColumns);
    return;
  }
  block -= counts.mean_blocks;
  if (block < counts.alpha_blocks) {
    reduce_alpha(counts.back, block * kColumns);
    return;
  }
  reduce_projection(counts.back, (block - counts.alpha_blocks) * kColumns);
}

/// Part of d proj_out = sum of o_l^T dO: one block for 16 x 8 of it and every n-th query block.
SLA2_KERNEL(kBackThreads, 4) void project_out_kernel(Backward back) {
  const Call& c = back.call;
  const int patches = c.dv / 16;
  const int a = block_x() / (2 * patches) * 16 + thread_index() / 8;
  const int column = block_x() % (2 * patches) * 8 + thread_index() % 8;
  const std::int64_t blocks = static_cast<std::int64_t>(c.B) * c.H * c.M;
  float sum = 0.0f;
  for (std::int64_t at = block_y(); at < blocks; at += back.projection_parts) {
    if (back.complement_empty[at] != 0) continue;
    const int i = static_cast<int>(at % c.M);
    const int h = static_cast<int>(at / c.M % c.H);
    const int b = static_cast<int>(at / c.M / c.H);
    for (int n = i * c.bq; n < min_int(c.Nq, (i + 1) * c.bq); ++n) {
      sum += load_one(row_of(back.saved_linear, b, h, n), a) *
             load_one(row_of(back.d_out, b, h, n), column);
    }
  }
  back.projection_sums[(static_cast<std::int64_t>(block_y()) * c.dv + a) * c.dv + column] = sum;
}

/// Sum over the block of a pair of values; in every thread. Barriers.
SLA2_DEVICE void sum_pair(float& x, float& y) {
  float* parts = shared_memory<float>(0);
  x = sum_over_warp(x);
  y = sum_over_warp(y);
  if (lane_index() == 0) {
    parts[2 * warp_index()] = x;
    parts[2 * warp_index() + 1] = y;
  }
  block_barrier();
  x = y = 0.0f;
  for (int w = 0; w < kBackThreads / 32; ++w) {
    x += parts[2 * w];
    y += parts[2 * w + 1];
  }
  block_barrier();
}

SLA2_DEVICE float sigmoid(float x) {
  if (x >= 0.0f) return 1.0f / (1.0f + exact_exp(-x));
  const float e = exact_exp(x);
  return e / (1.0f + e);
}

/// Row i of p = softmax(s) times scale (Alg. 2 line 8), into `p`; barriers.
SLA2_DEVICE void softmax_scores(const Backward& back, std::int64_t head, std::int64_t row,
                                int k_blocks, float* p) {
  const Call& c = back.call;
  const float* query = back.routed_q + row * c.D;
  const float* keys = back.routed_k + head * c.T * c.D;
  for (int j = warp_index(); j < k_blocks; j += kBackThreads / 32) {
    float s = 0.0f;
    for (int a = lane_index(); a < c.D; a += 32) {
      s += query[a] * keys[static_cast<std::int64_t>(j) * c.D + a];
    }
    s = sum_over_warp(s);
    if (lane_index() == 0) p[j] = s * c.scale;
  }
  block_barrier();
  float max = -kInfinity;
  for (int j = 0; j < k_blocks; ++j) max = max_of(max, p[j]);
  block_barrier();
  float sum = 0.0f;
  float unused = 0.0f;
  for (int j = thread_index(); j < k_blocks; j += kBackThreads) {
    p[j] = exact_exp(p[j] - max);
    sum += p[j];
  }
  sum_pair(sum, unused);
  for (int j = thread_index(); j < k_blocks; j += kBackThreads) p[j] = p[j] / sum;
}

/// One block for each query block: ds_ij, and its products with kb_j Wk and kb_j.
SLA2_KERNEL(kBackThreads, 4) void scores_kernel(Backward back) {
  const Call& c = back.call;
  const std::int64_t head = block_y();
  const std::int64_t row = head * c.M + block_x();
  const int b = static_cast<int>(head / c.H);
  const int h = static_cast<int>(head % c.H);
  const int k_blocks = blocks_of(c, key_length(c, b));
  const float* logits = c.given_logits + row * c.T;
  float* d_scores = back.d_scores + row * c.Tp;  // comes as <dH_i, h_j> + <dZ_i, z_j> = -l_ij
  const float inverse_tau = static_cast<float>(1.0 / c.tau);
  float sum_t = 0.0f;
  float sum_g = 0.0f;
  for (int j = thread_index(); j < k_blocks; j += kBackThreads) {
    const float rest = sigmoid(-logits[j]);
    const float g = sigmoid(logits[j]) * rest * inverse_tau;
    float u = 0.0f;
    if (logits[j] != -kInfinity) {
      for (int t = 0; t < back.query_tiles; ++t)
        u += back.u[(row * back.query_tiles + t) * c.T + j];
    }
    const float l = c.scope_all ? 0.0f : -d_scores[j];
    const float t = rest * u * inverse_tau + g * l;
    d_scores[j] = t;
    sum_t += t;
    sum_g += g;
  }
  sum_pair(sum_t, sum_g);
  float mean = 0.0f;
  float unused = 0.0f;
  float* p = back.softmax_rows + row * c.Tp;
  if (c.softmax_scores) softmax_scores(back, head, row, k_blocks, p);
  for (int j = thread_index(); j < k_blocks; j += kBackThreads) {
    const float g = sigmoid(logits[j]) * sigmoid(-logits[j]) * inverse_tau;
    d_scores[j] = sum_g == 0.0f ? 0.0f : d_scores[j] - g * (sum_t / sum_g);
    if (c.softmax_scores) mean += p[j] * d_scores[j];
  }
  if (c.softmax_scores) {
    sum_pair(mean, unused);
    for (int j = thread_index(); j < k_blocks; j += kBackThreads) {
      d_scores[j] = p[j] * (d_scores[j] - mean);
    }
  }
  block_barrier();
  const std::int64_t kv = static_cast<std::int64_t>(b) * c.Hkv + h / c.group;
  const float* routed = back.routed_k + head * c.T * c.D;
  const float* pooled = back.pooled_k + kv * c.T * c.D;
  for (int a = thread_index(); a < c.D; a += kBackThreads) {
    float routed_sum = 0.0f;
    float pooled_sum = 0.0f;
    for (int j = 0; j < k_blocks; ++j) {
      const std::int64_t at = static_cast<std::int64_t>(j) * c.D + a;
      routed_sum += d_scores[j] * routed[at];
      pooled_sum += d_scores[j] * pooled[at];
    }
    back.routed_k_sums[row * c.D + a] = routed_sum;
    back.pooled_k_sums[row * c.D + a] = pooled_sum;
  }
}

/// 16 x 8 of one router's gradient: of Wq (z = 0) or Wk.
SLA2_KERNEL(kBackThreads, 4) void router_kernel(Backward back) {
  const Call& c = back.call;
  float* out = block_z() == 0 ? back.d_proj_q : back.d_proj_k;
  if (out == nullptr) return;
  const int patches = c.d / 16;
  const int a = block_x() / (2 * patches) * 16 + thread_index() / 8;
  const int column = block_x() % (2 * patches) * 8 + thread_index() % 8;
  const float* left = block_z() == 0 ? back.pooled_q : back.pooled_k_sums;
  const float* right = block_z() == 0 ? back.routed_k_sums : back.routed_q;
  float sum = 0.0f;
  if (back.learns_router) {
    for (int b = 0; b < c.B; ++b) {
      for (int h = 0; h < c.H; ++h) {
        if (c.num_routers != 1 && h != block_y()) continue;
        const std::int64_t first = (static_cast<std::int64_t>(b) * c.H + h) * c.M;
        for (int i = 0; i < c.M; ++i) {
          sum += left[(first + i) * c.D + a] * right[(first + i) * c.D + column];
        }
      }
    }
  }
  out[(static_cast<std::int64_t>(block_y()) * c.d + a) * c.d + column] = sum * c.scale;
}

}  // namespace

void back_reduce(const Backward& back, void* stream) {
  const Call& c = back.call;
  const int projection = back.d_proj_out == nullptr ? 0 : c.dv * c.dv / kColumns;
  const int alpha = back.d_alpha_logit == nullptr
                        ? 0
                        : static_cast<int>(ceil_div(c.H * c.alpha_blocks, kColumns));
  const Counts counts{back, c.B * c.Hkv * c.D / kColumns, alpha, projection};
  launch(stream, reduce_kernel, {counts.mean_blocks + alpha + projection, 1, 1}, kBackThreads,
         kBackThreads * sizeof(double), counts);
}

void back_project_out(const Backward& back, void* stream) {
  const Call& c = back.call;
  launch(stream, project_out_kernel, {2 * (c.dv / 16) * (c.dv / 16), back.projection_parts, 1},
         kBackThreads, 0, back);
}

void back_scores(const Backward& back, void* stream) {
  const Call& c = back.call;
  launch(stream, scores_kernel, {c.M, c.B * c.H, 1}, kBackThreads,
         2 * (kBackThreads / 32) * sizeof(float), back);
}

void back_router(const Backward& back, void* stream) {
  const Call& c = back.call;
  launch(stream, router_kernel, {2 * (c.d / 16) * (c.d / 16), c.num_routers, 2}, kBackThreads, 0,
         back);
}

}  // namespace sla2::SLA2_CUDA_ROOM

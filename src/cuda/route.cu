// Step 1 (Eq. 15-17): routed_q = qb Wq, routed_k = kb Wk, scores, choice, weights of the blocks.
// A block scores eight query blocks, a thread per key block, in fp32; then a warp owns a row.
// Hard: the K-th largest score by bisection over the bits of an order-preserving integer, ties to
// the lower block by counting lanes. Soft: lambda by Newton's steps inside a bracket, in double.
// Sums run in a fixed order, so results never depend on scheduling.
#include "cuda/rows.cuh"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kThreads = 256;
constexpr int kProjectRows = 16;
constexpr int kRouteRows = 8;  // warps of a block
constexpr int kBatch = 16;     // features under way; head sizes are multiples of it

// ---- Projection ------------------------------------------------------------------------------

/// y[r][channel] = sum_a x[r][a] w[a][channel] for the rows of this part.
SLA2_DEVICE void project_rows(const float* x, const float* w, int d, int ld, int part, int parts,
                              int channel, float (&y)[kProjectRows]) {
  SLA2_UNROLL for (int r = 0; r < kProjectRows; ++r) y[r] = 0;
  if (w == nullptr) {
    SLA2_UNROLL for (int r = 0; r < kProjectRows; ++r) {
      if (r % parts == part) y[r] = x[r * ld + channel];
    }
    return;
  }
  for (int a = 0; a < d; ++a) {
    const float weight = w[a * d + channel];
    SLA2_UNROLL for (int r = 0; r < kProjectRows; ++r) {
      if (r % parts == part) y[r] += x[r * ld + a] * weight;
    }
  }
}

SLA2_KERNEL(kThreads, 2) void project_kernel(Call c) {
  float* x = shared_memory<float>(0);  // [kProjectRows, D]
  const int channel = thread_index() & (c.D - 1);
  const int part = thread_index() / c.D;
  const int parts = kThreads / c.D;
  const int q_tiles = static_cast<int>(ceil_div(c.M, kProjectRows));
  const int k_tiles = static_cast<int>(ceil_div(c.T, kProjectRows));
  const std::int64_t q_blocks = static_cast<std::int64_t>(c.B) * c.H * q_tiles;
  const bool keys = block_x() >= q_blocks;
  const std::int64_t index = keys ? block_x() - q_blocks : block_x();
  const int tiles = keys ? k_tiles : q_tiles;
  const int first = static_cast<int>(index % tiles) * kProjectRows;
  const int heads = keys ? c.router_heads : c.H;
  const int b = static_cast<int>(index / tiles / heads);
  const int h = static_cast<int>(index / tiles % heads);
  const int length = key_length(c, b);
  const int count = keys ? blocks_of(c, length) : c.M;

  for (int r = part; r < kProjectRows; r += parts) {
    const int row = first + r;
    float value = 0;
    if (row < count && channel < c.d) {
      if (keys) {
        const int kv = c.router_heads == c.Hkv ? h : h / c.group;
        const std::int64_t head = std::int64_t{b} * c.Hkv + kv;
        const float rows = static_cast<float>(min_int(c.bk, length - row * c.bk));
        value =
            c.k_sums[(head * c.T + row) * c.d + channel] / rows - c.k_mean[head * c.d + channel];
      } else {
        value = c.pooled_q[((std::int64_t{b} * c.H + h) * c.M + row) * c.d + channel];
      }
    }
    x[r * c.D + channel] = value;
  }
  block_barrier();
  if (channel >= c.d) return;
  const float* w = keys ? c.proj_k : c.proj_q;
  if (w != nullptr && c.num_routers > 1) w += std::int64_t{h} * c.d * c.d;
  float y[kProjectRows];
  project_rows(x, w, c.d, c.D, part, parts, channel, y);
  const std::int64_t head = std::int64_t{b} * heads + h;
  SLA2_UNROLL for (int r = 0; r < kProjectRows; ++r) {
    const int row = first + r;
    if (r % parts != part || row >= count) continue;
    if (keys) {
      c.routed_k[(head * c.d + channel) * c.Tp + row] = y[r];
    } else {
      c.routed_q[(head * c.M + row) * c.d + channel] = y[r];
    }
  }
}

// ---- Scores ----------------------------------------------------------------------------------

struct BlockSpan {
  int begin, end;
  SLA2_DEVICE bool contains(int j) const { return j >= begin && j < end; }
};
SLA2_DEVICE BlockSpan protected_span(const Call& c, int length) {
  const int end = min_int(c.protected_end, length);
  if (end <= c.protected_begin) return {0, 0};
  return {c.protected_begin / c.bk, (end + c.bk - 1) / c.bk};
}

SLA2_DEVICE void score_rows(const Call& c, int b, int h, int first_row, int blocks) {
  float* queries = shared_memory<float>(0);  // [D, kRouteRows]
  const std::int64_t head = std::int64_t{b} * c.H + h;
  for (int at = thread_index(); at < c.d * kRouteRows; at += kThreads) {
    const int r = at / c.d;
    const int row = first_row + r;
    queries[(at % c.d) * kRouteRows + r] =
        row < c.M ? c.routed_q[(head * c.M + row) * c.d + at % c.d] : 0.0f;
  }
  block_barrier();
  const int key_head = c.router_heads == c.H ? h : h / c.group;
  const float* keys = c.routed_k + (std::int64_t{b} * c.router_heads + key_head) * c.d * c.Tp;
  for (int j = thread_index(); j < c.T; j += kThreads) {
    float sum[kRouteRows] = {};
    if (j < blocks) {
      for (int first = 0; first < c.d; first += kBatch) {
        float key[kBatch];
        SLA2_UNROLL for (int i = 0; i < kBatch; ++i) {
          key[i] = keys[std::int64_t{first + i} * c.Tp + j];
        }
        SLA2_UNROLL for (int i = 0; i < kBatch; ++i) {
          SLA2_UNROLL for (int r = 0; r < kRouteRows; ++r) {
            sum[r] += queries[(first + i) * kRouteRows + r] * key[i];
          }
        }
      }
    }
    SLA2_UNROLL for (int r = 0; r < kRouteRows; ++r) {
      if (first_row + r < c.M) {
        c.scores[(head * c.M + first_row + r) * c.T + j] =
            j < blocks ? c.scale * sum[r] : -kInfinity;
      }
    }
  }
  block_barrier();
}

// ---- Hard choice -----------------------------------------------------------------------------

/// Greater scores are greater integers, NaN is 0 and -0 is +0.
SLA2_DEVICE std::uint32_t ordered(float x) {
  if (is_nan(x)) return 0;
  const std::uint32_t bits = float_to_bits(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

/// The integers of a row's scores, 0 where there is none to choose: kHeld of each lane in registers
/// (T up to 32 kHeld), or, with kHeld = 0, read again whenever they are wanted.
template <int kHeld>
struct Keys {
  const float* scores;
  int blocks;
  BlockSpan fixed;
  std::uint32_t held[kHeld == 0 ? 1 : kHeld];

  SLA2_DEVICE bool inside(int j) const { return j < blocks && !fixed.contains(j); }
  SLA2_DEVICE std::uint32_t read(int step) const {
    const int j = step * 32 + lane_index();
    return inside(j) ? ordered(scores[j]) : 0;
  }
  SLA2_DEVICE void hold() {
    if constexpr (kHeld > 0) {
      SLA2_UNROLL for (int step = 0; step < kHeld; ++step) held[step] = read(step);
    }
  }
  /// body(step, key) for all of a lane's keys.
  template <typename Body>
  SLA2_DEVICE void for_each(const Body& body) const {
    if constexpr (kHeld > 0) {
      SLA2_UNROLL for (int step = 0; step < kHeld; ++step) body(step, held[step]);
    } else {
      for (int step = 0; step * 32 < blocks; ++step) body(step, read(step));
    }
  }
  /// How many keys are at least `least`, which is not 0.
  SLA2_DEVICE int count(std::uint32_t least) const {
    int total = 0;
    for_each([&](int, std::uint32_t key) { total += key >= least ? 1 : 0; });
    SLA2_UNROLL for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    return total;
  }
};

/// A row's K best scores and the protected blocks, ascending, -1 behind the last.
template <int kHeld>
SLA2_DEVICE void choose(const Call& c, const float* scores, int blocks, BlockSpan fixed,
                        std::int32_t* out) {
  const int lane = lane_index();
  const int fixed_count = fixed.end - fixed.begin;
  const double wanted = c.keep * static_cast<double>(blocks) + 1e-6;
  const int kept = min_int(wanted < 1.0       ? 1
                           : wanted >= blocks ? blocks
                                              : static_cast<int>(wanted),
                           blocks - fixed_count);
  Keys<kHeld> keys{scores, blocks, fixed, {}};
  keys.hold();
  // The kept-th largest, or a number between it and the next: then nothing ties with it.
  std::uint32_t threshold = 0;
  SLA2_NO_UNROLL for (int bit = 31; bit >= 0; --bit) {
    const std::uint32_t candidate = threshold | 1u << bit;
    const int count = keys.count(candidate);
    if (count >= kept) threshold = candidate;
    if (count == kept) break;
  }
  // How many at the threshold may still come in.
  int ties = kept - (threshold == 0xffffffffu ? 0 : keys.count(threshold + 1));
  int size = 0;
  const std::uint32_t below = (1u << lane) - 1;
  keys.for_each([&](int step, std::uint32_t key) {
    const int j = step * 32 + lane;
    const bool is_fixed = j < blocks && fixed.contains(j);
    const bool inside = keys.inside(j);
    const std::uint32_t tied = ballot(inside && key == threshold);
    const bool taken = is_fixed || (inside && key > threshold) ||
                       (inside && key == threshold && count_bits(tied & below) < ties);
    ties -= min_int(ties, count_bits(tied));
    const std::uint32_t all = ballot(taken);
    const int at = size + count_bits(all & below);
    if (taken && at < c.L) out[at] = j;
    size += count_bits(all);
  });
  for (int at = size + lane; at < c.L; at += 32) out[at] = -1;
  warp_barrier();
}

// ---- Soft choice -----------------------------------------------------------------------------

SLA2_DEVICE double sigmoid(double x) {
  if (x >= 0) return 1 / (1 + exact_exp(-x));
  const double e = exact_exp(x);
  return e / (1 + e);
}
SLA2_DEVICE double sum_over_warp(double x) {
  SLA2_UNROLL for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
SLA2_DEVICE double max_over_warp(double x) {
  SLA2_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const double y = shuffle_xor(x, mask);
    x = y > x ? y : x;
  }
  return x;
}

/// p/tau of Eq. 17 for one block.
struct SoftScore {
  const float* scores;
  double max, inverse_sum, inverse_tau;
  bool softmax;
  SLA2_DEVICE double operator()(int j) const {
    const auto s = static_cast<double>(scores[j]);
    return (softmax ? exact_exp(s - max) * inverse_sum : s) * inverse_tau;
  }
};

/// x of one row: sum over the blocks outside `fixed` of sigmoid(x) is the target.
SLA2_DEVICE void solve_soft(const Call& c, const float* scores, int blocks, BlockSpan fixed,
                            float* logits) {
  const int lane = lane_index();
  SoftScore z{scores, 0, 1, 1 / c.tau, c.softmax_scores};
  if (z.softmax) {
    double max = -kInfinity;
    for (int j = lane; j < blocks; j += 32) {
      max = static_cast<double>(scores[j]) > max ? static_cast<double>(scores[j]) : max;
    }
    z.max = max_over_warp(max);
    double sum = 0;
    for (int j = lane; j < blocks; j += 32) {
      sum += exact_exp(static_cast<double>(scores[j]) - z.max);
    }
    z.inverse_sum = 1 / sum_over_warp(sum);
  }
  const int others = blocks - (fixed.end - fixed.begin);
  const double wanted = c.keep * static_cast<double>(blocks);
  const double target = wanted < 1 ? 1 : wanted > blocks ? blocks : wanted;
  const bool all = static_cast<double>(others) <= target;
  double lambda = 0;
  if (!all) {
    double largest = -kInfinity;
    double smallest = kInfinity;
    for (int j = lane; j < blocks; j += 32) {
      if (fixed.contains(j)) continue;
      const double value = z(j);
      largest = value > largest ? value : largest;
      smallest = value < smallest ? value : smallest;
    }
    const double share = target / static_cast<double>(others);
    const double level = exact_log(share / (1 - share));
    double low = level - max_over_warp(largest);
    double high = level + max_over_warp(-smallest);
    lambda = low + (high - low) / 2;
    for (int step = 0; step < 100; ++step) {
      double sum = 0;
      double slope = 0;
      for (int j = lane; j < blocks; j += 32) {
        if (fixed.contains(j)) continue;
        const double m = sigmoid(z(j) + lambda);
        sum += m;
        slope += m * (1 - m);
      }
      const double error = sum_over_warp(sum) - target;
      slope = sum_over_warp(slope);
      if (!(error > 1e-13 * target || error < -1e-13 * target)) break;  // solved, or NaN
      (error < 0 ? low : high) = lambda;
      double next = lambda - error / slope;
      if (!(low < next && next < high)) next = low + (high - low) / 2;
      if (next == lambda) break;
      lambda = next;
    }
  }
  for (int j = lane; j < c.T; j += 32) {
    float x = -kInfinity;
    if (j < blocks) x = all || fixed.contains(j) ? kInfinity : static_cast<float>(z(j) + lambda);
    logits[j] = x;
  }
  warp_barrier();
}

// ---- Weights ---------------------------------------------------------------------------------

SLA2_DEVICE void store_terms(const Terms& to, std::int64_t at, float x) {
  for (int term = 0; term < to.count; ++term) {
    const Bf16 rounded = from_float<Bf16>(x);
    to.data[term * to.plane + at] = rounded;
    x -= to_float(rounded);
  }
}

/// 1 - m of one row, and whether it is zero everywhere.
SLA2_DEVICE void weigh(const Call& c, std::int64_t row, int blocks, const std::int32_t* chosen,
                       const float* logits) {
  const int lane = lane_index();
  const std::int64_t at = row * c.Tp;
  bool is_empty = true;
  for (int first = 0; first < c.Tp; first += 32) {
    const int j = first + lane;
    float rest = j < blocks ? 1.0f : 0.0f;
    if (c.soft && j < blocks) {
      const float x = logits[j];
      is_empty = is_empty && x == kInfinity;
      if (!c.scope_all) {
        rest = x >= 0 ? exact_exp(-x) / (1 + exact_exp(-x)) : 1 / (1 + exact_exp(x));
      }
    }
    store_terms(c.rest, at + j, rest);
  }
  warp_barrier();
  int count = 0;
  if (!c.soft) {
    for (int first = 0; first < c.L; first += 32) {
      const int l = first + lane;
      const int j = l < c.L ? chosen[l] : -1;
      const bool valid = j >= 0 && j < blocks;
      count += count_bits(ballot(valid));
      if (valid && !c.scope_all) store_terms(c.rest, at + j, 0.0f);
    }
  }
  const bool empty = c.soft ? ballot(!is_empty) == 0 : count >= blocks;
  if (lane == 0) c.complement_empty[row] = empty ? 1 : 0;
}

SLA2_KERNEL(kThreads, 2) void route_kernel(Call c) {
  const int tiles = static_cast<int>(ceil_div(c.M, kRouteRows));
  const int first_row = block_x() % tiles * kRouteRows;
  const int b = block_x() / tiles / c.H;
  const int h = block_x() / tiles % c.H;
  const int length = key_length(c, b);
  const int blocks = blocks_of(c, length);
  const bool given = c.given_blocks != nullptr || c.given_logits != nullptr;
  if (!given) score_rows(c, b, h, first_row, blocks);
  const int i = first_row + warp_index();
  if (i >= c.M) return;
  const std::int64_t row = (std::int64_t{b} * c.H + h) * c.M + i;
  const BlockSpan fixed = protected_span(c, length);
  const float* scores = given ? c.given_logits : c.scores;  // for display, a given row's weights
  if (scores != nullptr) scores += row * c.T;
  const float* logits = c.given_logits;
  if (logits != nullptr) logits += row * c.T;
  const std::int32_t* chosen = c.given_blocks;
  if (chosen != nullptr) chosen += row * c.L;

  if (c.soft && !given) {
    solve_soft(c, scores, blocks, fixed, c.logits + row * c.T);
    logits = c.logits + row * c.T;
  }
  if (c.given_blocks == nullptr && c.blocks != nullptr) {
    std::int32_t* const out = c.blocks + row * c.L;
    if (blocks <= 512) {
      choose<16>(c, scores, blocks, fixed, out);
    } else if (blocks <= 1280) {
      choose<40>(c, scores, blocks, fixed, out);
    } else {
      choose<0>(c, scores, blocks, fixed, out);
    }
    chosen = c.blocks + row * c.L;
  }
  for (int l = lane_index(); l < c.L && c.given_blocks != nullptr && c.blocks != nullptr; l += 32) {
    c.blocks[row * c.L + l] = chosen[l];
  }
  for (int j = lane_index(); j < c.T && c.given_logits != nullptr && c.logits != nullptr; j += 32) {
    c.logits[row * c.T + j] = logits[j];
  }
  if (c.rest.data != nullptr) weigh(c, row, blocks, chosen, logits);
}

}  // namespace

void project(const Call& c, void* stream) {
  const std::int64_t blocks = std::int64_t{c.B} * c.H * ceil_div(c.M, kProjectRows) +
                              std::int64_t{c.B} * c.router_heads * ceil_div(c.T, kProjectRows);
  launch(stream, project_kernel, {blocks}, kThreads,
         kProjectRows * static_cast<std::size_t>(c.D) * sizeof(float), c);
}

void route(const Call& c, void* stream) {
  launch(stream, route_kernel, {std::int64_t{c.B} * c.H * ceil_div(c.M, kRouteRows)}, kThreads,
         kRouteRows * static_cast<std::size_t>(c.D) * sizeof(float), c);
}

}  // namespace sla2::SLA2_CUDA_ROOM

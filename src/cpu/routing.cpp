// Step 1 (Eq. 15-17): scores by the products of the instruction set, choice in plain code.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "core/float16.h"
#include "cpu/back.h"
#include "cpu/plan.h"

namespace sla2::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kRowsPerTask = 16;

double sigmoid(double x) {
  if (x >= 0) return 1 / (1 + std::exp(-x));
  const double e = std::exp(x);
  return e / (1 + e);
}

/// lambda with sum_j sigmoid(z_j + lambda) = target, 0 < target < n: Newton's steps inside a
/// bracket that is halved whenever a step leaves it.
double solve_lambda(const double* z, std::int64_t n, double target) {
  const double share = target / static_cast<double>(n);
  const double level = std::log(share / (1 - share));
  double low = level - *std::max_element(z, z + n);
  double high = level - *std::min_element(z, z + n);
  double lambda = low + (high - low) / 2;
  for (int step = 0; step < 200; ++step) {
    double sum = 0;
    double slope = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      const double m = sigmoid(z[j] + lambda);
      sum += m;
      slope += m * (1 - m);
    }
    const double error = sum - target;
    if (!(std::abs(error) > 1e-13 * target)) break;  // solved, or NaN
    (error < 0 ? low : high) = lambda;
    double next = lambda - error / slope;
    if (!(low < next && next < high)) next = low + (high - low) / 2;
    if (next == lambda) break;
    lambda = next;
  }
  return lambda;
}

/// p of Eq. 17 in place.
void normalise(const Call& call, double* p, std::int64_t n) {
  if (call.problem.config.score_norm == ScoreNorm::kNone) return;
  const double max = *std::max_element(p, p + n);
  double sum = 0;
  for (std::int64_t j = 0; j < n; ++j) sum += p[j] = std::exp(p[j] - max);
  for (std::int64_t j = 0; j < n; ++j) p[j] /= sum;
}

void soft_row(const Call& call, const float* scores, double* p, float* logits) {
  const std::int64_t n = call.job.k_blocks;
  const BlockRange fixed = protected_blocks(call.problem, call.job.num_keys);
  const auto total = static_cast<double>(n);
  const double target = std::clamp(call.problem.config.keep * total, 1.0, total);
  std::copy_n(scores, n, p);
  normalise(call, p, n);
  std::fill_n(logits, n, kInfinity);
  std::fill(logits + n, logits + call.T, -kInfinity);
  std::int64_t others = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    if (!fixed.contains(j)) p[others++] = p[j] / call.problem.config.tau;
  }
  if (static_cast<double>(others) <= target) return;
  const double lambda = solve_lambda(p, others, target);
  std::int64_t next = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    if (!fixed.contains(j)) logits[j] = static_cast<float>(p[next++] + lambda);
  }
}

const float* router(const Call& call, const float* w, std::int64_t h) {
  const std::int64_t d = call.job.d;
  return w == nullptr ? nullptr : w + (call.problem.num_routers == 1 ? 0 : h) * d * d;
}

/// y = x W, rows in parallel.
void project(Call& call, const float* x, const float* w, std::int64_t rows, float* y) {
  const std::int64_t d = call.job.d;
  if (w == nullptr) {
    std::copy_n(x, rows * d, y);
    return;
  }
  parallel_for(call, (rows + kRowsPerTask - 1) / kRowsPerTask,
               [&](std::int64_t task, std::int64_t) {
                 const std::int64_t first = task * kRowsPerTask;
                 call.kernels.gemm(std::min(kRowsPerTask, rows - first), d, d, x + first * d, d, 1,
                                   w, d, y + first * d, d, false);
               });
}

/// A score that at least `kept` blocks outside `fixed` reach; close to the worst of the kept ones.
/// The largest of each of some groups of blocks: `kept` of those are as many blocks.
float reached_by(const float* scores, std::int64_t n, const BlockRange& fixed, std::int64_t kept) {
  constexpr std::int64_t kMostGroups = 1024;
  const std::int64_t groups = std::min(4 * kept, n / 4);  // the blocks of one are `groups` apart
  if (kept < 1 || groups < kept || groups > kMostGroups) return -kInfinity;
  std::array<float, kMostGroups> largest;
  std::fill_n(largest.data(), groups, -kInfinity);
  for (std::int64_t first = 0; first + groups <= n; first += groups) {
    if (fixed.size() > 0 && first < fixed.end && fixed.begin < first + groups) continue;
    for (std::int64_t g = 0; g < groups; ++g) {
      const float score = scores[first + g];
      const auto at = static_cast<std::size_t>(g);
      largest[at] = score > largest[at] ? score : largest[at];
    }
  }
  const auto worst = largest.begin() + kept - 1;
  std::nth_element(largest.begin(), worst, largest.begin() + groups, std::greater<>());
  return *worst;
}

}  // namespace

void choose_blocks(const Call& call, const float* scores, std::int32_t* blocks) {
  const std::int64_t n = call.job.k_blocks;
  const BlockRange fixed = protected_blocks(call.problem, call.job.num_keys);
  const std::int64_t kept = std::min(num_kept_blocks(call.problem, n), n - fixed.size());
  // The kept best as a heap of indices whose top is the worst: NaN, then low scores, then high
  // indices.
  const auto better = [scores](std::int32_t a, std::int32_t b) {
    const float x = scores[a];
    const float y = scores[b];
    if (std::isnan(x) || std::isnan(y))
      return std::isnan(x) == std::isnan(y) ? a < b : std::isnan(y);
    return x != y ? x > y : a < b;
  };
  std::int64_t size = 0;
  const float reached = reached_by(scores, n, fixed, kept);
  float worst = -kInfinity;  // of a full heap
  const auto consider = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j) {
      if (scores[j] < reached) continue;  // most blocks
      // Not above the worst of those kept, whose index is lower.
      if (size == kept && scores[j] <= worst) continue;
      const auto index = static_cast<std::int32_t>(j);
      if (size < kept) {
        blocks[size++] = index;
      } else if (size > 0 && better(index, blocks[0])) {
        std::pop_heap(blocks, blocks + size, better);
        blocks[size - 1] = index;
      } else {
        continue;
      }
      std::push_heap(blocks, blocks + size, better);
      worst = scores[blocks[0]];
    }
  };
  consider(0, fixed.begin);
  consider(fixed.begin + fixed.size(), n);
  for (std::int64_t j = fixed.begin; j < fixed.begin + fixed.size(); ++j) {
    blocks[size++] = static_cast<std::int32_t>(j);
  }
  std::sort(blocks, blocks + size);
  std::fill(blocks + size, blocks + call.L, -1);
}

void score(Call& call, std::int64_t h) {
  Job& job = call.job;
  const std::int64_t d = job.d, T = job.k_blocks, ld = call.padded_T;
  run(call, call.kernels.pool_queries, job.q_blocks);
  project(call, job.pooled_q, router(call, call.inputs.parameters.proj_q, h), job.q_blocks,
          job.routed_q);
  project(call, job.pooled_k, router(call, call.inputs.parameters.proj_k, h), T, job.routed_k);
  const float* routed_k_t = call.own.routed_k_t;
  call.kernels.products.pack_transposed_fp32(Type::kF32, {job.routed_k, d}, T, ld, d,
                                             call.own.routed_k_t);
  parallel_for(call, (job.q_blocks + kRowsPerTask - 1) / kRowsPerTask,
               [&](std::int64_t task, std::int64_t) {
                 const std::int64_t first = task * kRowsPerTask;
                 const std::int64_t rows = std::min(kRowsPerTask, job.q_blocks - first);
                 float* scores = job.scores + first * ld;
                 call.kernels.products.fp32(rows, ld, d, job.routed_q + first * d, d, &routed_k_t,
                                            1, scores, ld, false);
                 for (std::int64_t c = 0; c < rows * ld; ++c) scores[c] *= job.scale;
               });
}

void choose(Call& call, std::int32_t* blocks, float* logits) {
  parallel_for(call, call.job.q_blocks, [&](std::int64_t i, std::int64_t worker) {
    const float* scores = call.job.scores + i * call.padded_T;
    choose_blocks(call, scores, blocks + i * call.L);
    if (logits != nullptr) {
      soft_row(call, scores, call.own.soft + worker * call.T, logits + i * call.T);
    }
  });
}

namespace {

/// A row of rest in bf16, and rounded to it; zeros behind the blocks.
void round_weights(const Job& job, std::int64_t i) {
  const std::int64_t T = job.k_blocks;
  std::uint16_t* rounded = job.rest16 + i * rest_stride(T);
  float* rest = job.rest + i * T;
  if (job.soft) {
    for (std::int64_t j = 0; j < T; ++j) {
      rounded[j] = to_bf16(rest[j]);
      rest[j] = from_bf16(rounded[j]);
    }
  } else {
    for (std::int64_t j = 0; j < T; ++j) rounded[j] = rest[j] == 0 ? 0 : to_bf16(1.0F);
  }
  std::fill(rounded + T, rounded + padded_blocks(T), std::uint16_t{0});
}

}  // namespace

void weigh(Call& call, std::int64_t h, const std::int32_t* blocks, const float* logits) {
  Job& job = call.job;
  const std::int64_t T = job.k_blocks;
  job.blocks = blocks;
  parallel_for(call, job.q_blocks, [&](std::int64_t i, std::int64_t) {
    float* rest = call.own.rest + i * T;
    bool empty = true;
    if (job.soft) {
      const float* x = logits + i * call.T;
      float* log_m = call.own.log_m + i * T;
      for (std::int64_t j = 0; j < T; ++j) {
        // Not 1 - m: that loses the digits of a small complement, and log m those of a small m.
        log_m[j] = x[j] >= 0 ? -std::log1p(std::exp(-x[j])) : x[j] - std::log1p(std::exp(x[j]));
        rest[j] = x[j] >= 0 ? std::exp(-x[j]) / (1 + std::exp(-x[j])) : 1 / (1 + std::exp(x[j]));
        if (x[j] == -kInfinity) log_m[j] = -kInfinity;
        empty = empty && x[j] == kInfinity;
      }
    } else {
      const std::int32_t* row = blocks + i * call.L;
      std::int64_t count = 0;
      std::fill_n(rest, T, 1.0F);
      for (; count < call.L && row[count] >= 0; ++count) rest[row[count]] = 0;
      empty = count == T;
    }
    if (job.scope_all) std::fill_n(rest, T, 1.0F);
    if (job.rest16 != nullptr) round_weights(job, i);
    call.own.complement_empty[i] = empty ? 1 : 0;
    const float* logit = call.inputs.parameters.alpha_logit;
    const std::int64_t columns = call.problem.alpha_blocks;
    call.own.alpha[i] =
        logit == nullptr ? 0.5F : 1 / (1 + std::exp(-logit[h * columns + (columns == 1 ? 0 : i)]));
  });
}

namespace {

/// dp of one row (Eq. 17 backwards), then ds, times the scale of s.
void back_scores(const Call& call, std::int64_t i, const float* logits, double* p, float* d_s) {
  const Job& job = call.job;
  const std::int64_t T = job.k_blocks;
  const double inverse_tau = 1 / call.problem.config.tau;
  const float* u = job.back->u + i * T;
  const float* l = job.back->l + i * T;
  double sum_t = 0;
  double sum_g = 0;
  const auto weight = [&](std::int64_t j) {
    return sigmoid(logits[j]) * sigmoid(-logits[j]) * inverse_tau;
  };
  const auto term = [&](std::int64_t j) {
    return sigmoid(-logits[j]) * inverse_tau * u[j] + weight(j) * l[j];
  };
  for (std::int64_t j = 0; j < T; ++j) {
    sum_t += term(j);
    sum_g += weight(j);
  }
  const double ratio = sum_g == 0 ? 0 : sum_t / sum_g;
  for (std::int64_t j = 0; j < T; ++j) {
    d_s[j] = sum_g == 0 ? 0.0F : static_cast<float>(term(j) - weight(j) * ratio);
  }
  if (call.problem.config.score_norm == ScoreNorm::kSoftmax) {
    std::copy_n(job.scores + i * call.padded_T, T, p);
    normalise(call, p, T);
    double mean = 0;
    for (std::int64_t j = 0; j < T; ++j) mean += p[j] * d_s[j];
    for (std::int64_t j = 0; j < T; ++j) d_s[j] = static_cast<float>(p[j] * (d_s[j] - mean));
  }
  for (std::int64_t j = 0; j < T; ++j) d_s[j] *= job.scale;
}

}  // namespace

void back_router(Call& call, std::int64_t h, float* d_proj_q, float* d_proj_k) {
  Job& job = call.job;
  const std::int64_t d = job.d, T = job.k_blocks, M = job.q_blocks, ld = call.padded_T;
  const std::int64_t at = (call.problem.num_routers == 1 ? 0 : h) * d * d;
  float* d_s = call.own.d_scores;
  const float* logits = call.own.logits;
  parallel_for(call, M, [&](std::int64_t i, std::int64_t worker) {
    back_scores(call, i, logits + i * call.T, call.own.soft + worker * call.T, d_s + i * ld);
  });
  // dW += x^T y, 16 rows of W a task; y = dS (kb Wk) for Wq, dS^T (qb Wq) for Wk.
  const auto add = [&](const float* x, const float* other, std::int64_t rows, std::int64_t inner,
                       std::int64_t a_row, std::int64_t a_col, float* d_w) {
    float* y = call.own.router_rows;
    parallel_for(
        call, (rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t task, std::int64_t) {
          const std::int64_t first = task * kRowsPerTask;
          call.kernels.gemm(std::min(kRowsPerTask, rows - first), d, inner, d_s + first * a_row,
                            a_row, a_col, other, d, y + first * d, d, false);
        });
    parallel_for(call, d / 16, [&](std::int64_t a, std::int64_t) {
      call.kernels.gemm(16, d, rows, x + a * 16, 1, d, y, d, d_w + at + a * 16 * d, d, true);
    });
  };
  if (d_proj_q != nullptr) add(job.pooled_q, job.routed_k, M, T, ld, 1, d_proj_q);
  if (d_proj_k != nullptr) add(job.pooled_k, job.routed_q, T, M, 1, ld, d_proj_k);
}

void route(const Problem& problem, const Inputs& inputs, const Routing& routing,
           const Context& context, const Kernels& kernels) {
  Call call = make_call(problem, inputs, context, Pass::kRoute, kernels);
  const std::int64_t group = problem.num_heads / problem.num_kv_heads;
  const std::int64_t M = call.job.q_blocks;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    for (std::int64_t kv = 0; kv < problem.num_kv_heads; ++kv) {
      select_keys(call, b, kv);
      smooth(call);
      run(call, kernels.pool_keys, call.job.k_blocks);
      for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        select_queries(call, b, h);
        score(call, h);
        const std::int64_t row = (b * problem.num_heads + h) * M;
        choose(call, routing.blocks + row * call.L,
               call.job.soft ? routing.logits + row * call.T : nullptr);
      }
    }
  }
}

}  // namespace sla2::cpu

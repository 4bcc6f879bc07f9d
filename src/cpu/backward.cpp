// Alg. 3, corrected: one key/value head after the other, its query heads in turn, every stage on
// all threads. Parameter gradients are summed over heads in the order of this loop.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/plan.h"

namespace sla2::cpu {
namespace {

/// Which query blocks read key block j, ascending.
void invert_routing(Call& call) {
  const Job& job = call.job;
  const std::int64_t T = job.k_blocks;
  std::int64_t* begin = call.own.readers_begin;
  const auto for_each = [&](auto visit) {
    for (std::int64_t i = 0; i < job.q_blocks; ++i) {
      if (job.soft) {
        for (std::int64_t j = 0; j < T; ++j) {
          if (job.log_m[i * T + j] != -std::numeric_limits<float>::infinity()) visit(i, j);
        }
      } else {
        const std::int32_t* row = job.blocks + i * job.width;
        for (std::int64_t c = 0; c < job.width && row[c] >= 0; ++c) visit(i, std::int64_t{row[c]});
      }
    }
  };
  std::fill_n(begin, T + 1, 0);
  for_each([&](std::int64_t, std::int64_t j) { ++begin[j + 1]; });
  for (std::int64_t j = 0; j < T; ++j) begin[j + 1] += begin[j];
  for_each([&](std::int64_t i, std::int64_t j) {
    call.own.readers[begin[j]++] = static_cast<std::int32_t>(i);
  });
  for (std::int64_t j = T; j > 0; --j) begin[j] = begin[j - 1];  // the fill moved every begin on
  begin[0] = 0;
}

FloatRows float_rows(const Rows& rows, const float* copy, std::int64_t width) {
  return copy != nullptr ? FloatRows{copy, width}
                         : FloatRows{static_cast<const float*>(rows.data), rows.stride};
}

void select_saved(Call& call, const Saved& saved, const ConstView& d_out,
                  const Gradients& gradients, std::int64_t b, std::int64_t h) {
  Job& job = call.job;
  select_queries(call, b, h);
  job.d_out = rows_of(d_out, b, h);
  job.saved_sparse = rows_of(saved.out_sparse, b, h);
  job.saved_linear = rows_of(saved.out_linear, b, h);
  job.lse_in = saved.lse + (b * call.problem.num_heads + h) * call.problem.q_tokens;
  job.d_q_out = rows_of(gradients.d_q, b, h);
  job.q_f = float_rows(job.q, job.q_copy, job.d);
  job.d_out_f = float_rows(job.d_out, job.d_out_copy, job.dv);
  job.d_linear = job.is_sla ? FloatRows{job.d_linear_out, job.dv} : job.d_out_f;
}

/// All of one query head: adds to d_ks, d_keys, d_v and to the parameter gradients.
void back_head(Call& call, const Saved& saved, const Gradients& gradients, bool learns_router,
               std::int64_t b, std::int64_t h) {
  Job& job = call.job;
  const Kernels& kernels = call.kernels;
  const std::int64_t M = job.q_blocks;
  const std::int64_t row = (b * call.problem.num_heads + h) * M;
  if (job.soft) std::copy_n(saved.routing.logits + row * call.T, M * call.T, call.own.logits);
  if (learns_router) score(call, h);
  weigh(call, h, job.soft ? nullptr : saved.routing.blocks + row * call.L, call.own.logits);
  invert_routing(call);
  job.readers = call.own.readers;
  job.readers_begin = call.own.readers_begin;

  run(call, kernels.prepare_queries, M);
  run(call, kernels.sum_blocks, num_panel_groups(call.problem));
  run(call, kernels.back_queries, M);
  run(call, kernels.back_sparse_keys, job.k_blocks);
  run(call, kernels.back_sum_blocks, num_panel_groups(call.problem));
  run(call, kernels.back_linear_keys, job.k_blocks);

  if (gradients.d_alpha_logit != nullptr) {
    const std::int64_t columns = call.problem.alpha_blocks;
    float* d_alpha = gradients.d_alpha_logit + h * columns;
    for (std::int64_t i = 0; i < M; ++i) d_alpha[columns == 1 ? 0 : i] += job.d_alpha[i];
  }
  if (gradients.d_proj_out != nullptr) {
    call.executor.parallel_for(job.dv / 16, [&](std::int64_t a, std::int64_t) {
      kernels.gemm(16, job.dv, job.num_queries, job.linear_copy + a * 16, 1, job.dv,
                   job.d_out_f.data, job.d_out_f.stride, gradients.d_proj_out + a * 16 * job.dv,
                   job.dv, true);
    });
  }
  if (learns_router) {
    if (job.scope_all) {
      std::fill_n(job.l, M * job.k_blocks, 0.0F);
    } else {
      run(call, kernels.back_block_products, (M + kBlockTile - 1) / kBlockTile);
    }
    back_router(call, h, gradients.d_proj_q, gradients.d_proj_k);
  }
}

void zero_rows(const View& view, std::int64_t b, std::int64_t h, std::int64_t first) {
  if (view.empty()) return;
  const MutableRows rows = rows_of(view, b, h);
  const std::int64_t bytes = bytes_of(view.dtype);
  for (std::int64_t n = first; n < view.shape[2]; ++n) {
    std::memset(static_cast<std::byte*>(rows.data) + n * rows.stride * bytes, 0,
                static_cast<std::size_t>(view.shape[3] * bytes));
  }
}

/// dK and dV of the current key/value head in the caller's type.
void write_keys(Call& call, const Gradients& gradients, std::int64_t b, std::int64_t kv) {
  Job& job = call.job;
  for (std::int64_t c = 0; c < job.d; ++c) {
    double sum = 0;
    for (std::int64_t j = 0; j < job.k_blocks; ++j) sum += job.d_keys_sums[j * job.d + c];
    job.d_keys_mean[c] =
        job.raw_keys ? 0.0F : static_cast<float>(sum / static_cast<double>(job.num_keys));
  }
  job.d_k_out = rows_of(gradients.d_k, b, kv);
  job.d_v_out = rows_of(gradients.d_v, b, kv);
  run(call, call.kernels.write_keys, job.k_blocks);
  zero_rows(gradients.d_k, b, kv, job.num_keys);
  zero_rows(gradients.d_v, b, kv, job.num_keys);
}

void zero_parameters(const Problem& p, const Gradients& gradients) {
  const auto zero = [](float* x, std::int64_t n) {
    if (x != nullptr) std::fill_n(x, n, 0.0F);
  };
  zero(gradients.d_alpha_logit, p.num_heads * p.alpha_blocks);
  zero(gradients.d_proj_q, p.num_routers * p.head_dim * p.head_dim);
  zero(gradients.d_proj_k, p.num_routers * p.head_dim * p.head_dim);
  zero(gradients.d_proj_out, p.value_dim * p.value_dim);
}

}  // namespace

void backward(const Problem& problem, const Inputs& inputs, const Saved& saved, ConstView d_out,
              const Gradients& gradients, const Context& context, const Kernels& kernels) {
  Call call = make_call(problem, inputs, context, Pass::kBackward, kernels);
  Job& job = call.job;
  const std::int64_t dv = job.dv;
  zero_parameters(problem, gradients);
  if (job.is_sla && job.proj_out != nullptr) {
    for (std::int64_t a = 0; a < dv; ++a) {
      for (std::int64_t c = 0; c < dv; ++c) {
        call.own.proj_out_t[c * dv + a] = job.proj_out[a * dv + c];
      }
    }
    job.proj_out_t = call.own.proj_out_t;
  }
  // A given routing does not depend on the router.
  const bool learns_router = job.soft && !job.is_sla && inputs.routing.logits == nullptr &&
                             (gradients.d_proj_q != nullptr || gradients.d_proj_k != nullptr);
  const std::int64_t group = problem.num_heads / problem.num_kv_heads;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    for (std::int64_t kv = 0; kv < problem.num_kv_heads; ++kv) {
      select_keys(call, b, kv);
      run(call, kernels.sum_keys, job.k_blocks);
      std::copy_n(saved.k_mean + (b * problem.num_kv_heads + kv) * job.d, job.d, job.k_mean);
      run(call, kernels.pack_keys_back, job.k_blocks);
      for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        job.first_in_group = h == kv * group;
        select_saved(call, saved, d_out, gradients, b, h);
        back_head(call, saved, gradients, learns_router, b, h);
      }
      write_keys(call, gradients, b, kv);
    }
  }
}

}  // namespace sla2::cpu

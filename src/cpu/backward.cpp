// Alg. 3, corrected: one key/value head after the other, its query heads in turn, every stage on
// all threads. Parameter gradients are summed over heads in the order of this loop.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/back.h"
#include "cpu/plan.h"

namespace sla2::cpu {
namespace {

/// Of each pair its rank among those of its key block, query blocks ascending, and, hard, the query
/// blocks of each key block; nobody has had a turn.
void rank_pairs(Call& call) {
  const Job& job = call.job;
  std::int32_t* turns = call.own.turns;
  std::fill_n(turns, job.k_blocks, 0);
  if (job.soft) {
    for (std::int64_t at = 0; at < job.q_blocks * job.k_blocks; ++at) {
      if (job.log_m[at] != -std::numeric_limits<float>::infinity()) {
        call.own.ranks[at] = turns[at % job.k_blocks]++;
      }
    }
  } else {
    const std::int64_t pairs = job.q_blocks * job.width;
    for (std::int64_t at = 0; at < pairs; ++at) {
      if (job.blocks[at] >= 0) call.own.ranks[at] = turns[job.blocks[at]]++;
    }
    std::int32_t* begin = call.own.readers_begin;
    begin[0] = 0;
    for (std::int64_t j = 0; j < job.k_blocks; ++j) begin[j + 1] = begin[j] + turns[j];
    for (std::int64_t at = 0; at < pairs; ++at) {
      if (job.blocks[at] < 0) continue;
      call.own.readers[begin[job.blocks[at]] + call.own.ranks[at]] =
          static_cast<std::int32_t>(at / job.width);
    }
  }
  std::fill_n(turns, job.k_blocks, 0);
}

void select_saved(Call& call, const Saved& saved, const ConstView& d_out,
                  const Gradients& gradients, std::int64_t b, std::int64_t h) {
  Back& back = call.back;
  select_queries(call, b, h);
  back.d_out = rows_of(d_out, b, h);
  back.saved_sparse = rows_of(saved.out_sparse, b, h);
  back.saved_linear = rows_of(saved.out_linear, b, h);
  back.lse = saved.lse + (b * call.problem.num_heads + h) * call.problem.q_tokens;
  back.d_q_out = rows_of(gradients.d_q, b, h);
}

bool wants_keys(const Back& back) { return back.d_k != nullptr || back.d_v != nullptr; }

void done(const Context& context, const char* stage) {
  if (context.after_stage != nullptr) (*context.after_stage)(stage);
}

/// All of one query head: adds to d_k, d_v and to the parameter gradients.
void back_head(Call& call, const Saved& saved, const Gradients& gradients, bool learns_router,
               std::int64_t b, std::int64_t h, const Context& context) {
  const Job& job = call.job;
  Back& back = call.back;
  const BackStages& kernels = call.kernels.back;
  const std::int64_t M = job.q_blocks;
  const std::int64_t row = (b * call.problem.num_heads + h) * M;
  if (job.soft) std::copy_n(saved.routing.logits + row * call.T, M * call.T, call.own.logits);
  if (learns_router) score(call, h);
  weigh(call, h, job.soft ? nullptr : saved.routing.blocks + row * call.L, call.own.logits);
  rank_pairs(call);
  back.needs_pairs = learns_router || wants_keys(back) || back.d_q_out.data != nullptr;
  done(context, "route");

  if (!job.subtracts) run(call, kernels.weigh, (M + kBlockTile - 1) / kBlockTile);
  run(call, kernels.sum_key_blocks, num_panel_groups(call.problem));
  done(context, "sum_blocks");
  run_workers(call, kernels.query_blocks, M);
  done(context, "query_blocks");
  if (learns_router) {
    if (job.scope_all) {
      std::fill_n(back.l, M * job.k_blocks, 0.0F);
    } else {
      run(call, kernels.block_products, (job.k_blocks + kPanel - 1) / kPanel);
    }
  }
  if (wants_keys(back)) {
    run(call, kernels.sum_query_blocks, num_panel_groups(call.problem));
    run(call, kernels.linear_keys, job.k_blocks);
    done(context, "linear_keys");
  }
  if (gradients.d_alpha_logit != nullptr) {
    const std::int64_t columns = call.problem.alpha_blocks;
    float* d_alpha = gradients.d_alpha_logit + h * columns;
    for (std::int64_t i = 0; i < M; ++i) d_alpha[columns == 1 ? 0 : i] += back.d_alpha[i];
  }
  if (gradients.d_proj_out != nullptr) {
    parallel_for(call, job.dv / 16, [&](std::int64_t a, std::int64_t) {
      call.kernels.gemm(16, job.dv, job.num_queries, back.linear_copy + a * 16, 1, job.dv,
                        back.d_out_copy, job.dv, gradients.d_proj_out + a * 16 * job.dv, job.dv,
                        true);
    });
  }
  if (learns_router) back_router(call, h, gradients.d_proj_q, gradients.d_proj_k);
  done(context, "parameters");
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
  const Job& job = call.job;
  Back& back = call.back;
  for (std::int64_t c = 0; c < job.d; ++c) {
    double sum = 0;
    for (std::int64_t j = 0; j < job.k_blocks; ++j) sum += back.d_keys_sums[j * job.d + c];
    back.d_keys_mean[c] =
        job.raw_keys ? 0.0F : static_cast<float>(sum / static_cast<double>(job.num_keys));
  }
  run(call, call.kernels.back.write_keys, job.k_blocks);
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
  Back& back = call.back;
  job.back = &back;
  const std::int64_t dv = job.dv;
  zero_parameters(problem, gradients);
  if (job.is_sla && job.proj_out != nullptr) {
    for (std::int64_t a = 0; a < dv; ++a) {
      for (std::int64_t c = 0; c < dv; ++c) {
        call.own.proj_out_t[c * dv + a] = job.proj_out[a * dv + c];
      }
    }
    back.proj_out_t = call.own.proj_out_t;
  }
  // A given routing does not depend on the router.
  const bool learns_router = job.soft && !job.is_sla && inputs.routing.logits == nullptr &&
                             (gradients.d_proj_q != nullptr || gradients.d_proj_k != nullptr);
  const std::int64_t group = problem.num_heads / problem.num_kv_heads;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    for (std::int64_t kv = 0; kv < problem.num_kv_heads; ++kv) {
      select_keys(call, b, kv);
      back.d_k_out = rows_of(gradients.d_k, b, kv);
      back.d_v_out = rows_of(gradients.d_v, b, kv);
      back.d_k = back.d_k_out.data == nullptr ? nullptr : call.own.d_k;
      back.d_v = back.d_v_out.data == nullptr ? nullptr : call.own.d_v;
      std::copy_n(saved.k_mean + (b * problem.num_kv_heads + kv) * job.d, job.d, job.k_mean);
      if (learns_router) {
        run(call, kernels.sum_keys, job.k_blocks);
        run(call, kernels.pool_keys, job.k_blocks);
      }
      run(call, kernels.back.pack_keys, job.k_blocks);
      done(context, "pack_keys");
      for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        select_saved(call, saved, d_out, gradients, b, h);
        back.adds_heads = h > kv * group;
        back_head(call, saved, gradients, learns_router, b, h, context);
      }
      if (wants_keys(back)) {
        write_keys(call, gradients, b, kv);
        done(context, "write_keys");
      }
    }
  }
}

std::int64_t back_scratch_bytes(const Problem& p) {
  const std::int64_t d = p.head_dim, dv = p.value_dim;
  const std::int64_t bq = p.config.block_q, bk = p.config.block_k;
  const std::int64_t blocks = std::max(num_q_blocks(p), num_k_blocks(p, p.k_tokens));
  const std::int64_t pack = bk * (3 * d + 2 * dv) + d * dv;
  const std::int64_t linear_keys = bk * (5 * d + dv) + d * dv;
  const std::int64_t block = bq * (3 * d + 2 * dv + 2);
  const std::int64_t linear_queries = bq * (4 * d + 5 * dv + std::max(d, dv) + 3) + d * dv + 2 * dv;
  const std::int64_t pairs = 3 * bk * kPanel + 2 * bk * bq + bq * (d + 3);
  const std::int64_t sums = 256 * kPanel + (blocks + 34) * kPanel;
  const std::int64_t products = 3 * kPanel * kPanel;
  const std::int64_t pieces = 16;  // each rounded up to 64 bytes
  const std::int64_t floats =
      std::max({pack, linear_keys, block + linear_queries + pairs, sums, products}) + pieces * 16;
  return (floats * 4 + 63) / 64 * 64;
}

void lay_out_backward(const Problem& p, Arena& arena, const Job& job, Back& back,
                      DriverBuffers& own) {
  const std::int64_t d = job.d, dv = job.dv, M = job.q_blocks, T = job.k_blocks;
  const std::int64_t keys = T * p.config.block_k;
  const auto elements = [&](std::int64_t n) {
    return arena.take<std::byte>(n * (back.is16 ? 2 : 4));
  };
  back.matched = p.config.backward == BackwardMode::kMatched;
  back.padded_q_blocks = (M + kBlockTile - 1) / kBlockTile * kBlockTile;
  back.padded_k_blocks = (T + kBlockTile - 1) / kBlockTile * kBlockTile;
  back.ks_rows = elements(keys * d);
  back.ks_columns = elements(keys * d);
  back.v_rows = elements(keys * dv);
  back.h = elements(T * d * dv);
  back.z = arena.take<float>(T * d);
  back.d_keys_sums = arena.take<float>(T * d);
  back.d_keys_mean = arena.take<float>(d);
  own.d_k = arena.take<float>(keys * d);
  own.d_v = arena.take<float>(keys * dv);
  if (!job.subtracts) {
    back.rest_rows = elements(M * back.padded_k_blocks);
    back.rest_columns = elements(T * back.padded_q_blocks);
  }
  back.sums = elements(M * d * dv);
  back.sums_z = arena.take<float>(M * d);
  back.d_sums = elements(M * d * dv);
  back.d_sums_z = arena.take<float>(M * d);
  back.d_z = arena.take<float>(T * d);
  back.d_alpha = arena.take<float>(M);
  if (job.is_sla) {
    back.linear_copy = arena.take<float>(job.num_queries * dv);
    back.d_out_copy = arena.take<float>(job.num_queries * dv);
    own.proj_out_t = arena.take<float>(dv * dv);
  }
  // Where no other head and no gradient of the weights reads h again it makes room for dh.
  const bool is_last_use = !job.soft && p.num_heads == p.num_kv_heads;
  back.d_h = is_last_use ? back.h : elements(T * d * dv);
  own.turns = back.turns = arena.take<std::int32_t>(T);
  own.ranks = arena.take<std::int32_t>(M * (job.soft ? T : job.width));
  back.ranks = own.ranks;
  if (!job.soft) {
    back.readers = own.readers = arena.take<std::int32_t>(M * job.width);
    back.readers_begin = own.readers_begin = arena.take<std::int32_t>(T + 1);
  }
  if (job.soft) {
    back.u = arena.take<float>(M * T);
    back.l = arena.take<float>(M * T);
    own.d_scores = arena.take<float>(M * ((T + 15) / 16 * 16));
    own.router_rows = arena.take<float>(std::max(M, T) * d);
  }
}

}  // namespace sla2::cpu

// Steps 0 to 4 (Alg. 2): one key/value head after the other, every stage on all threads.
#include <algorithm>
#include <cstdint>

#include "cpu/plan.h"

namespace sla2::cpu {
namespace {

/// The routing of the current head: given, or computed; copied to the caller if wanted.
void route_head(Call& call, const Outputs& outputs, std::int64_t b, std::int64_t h) {
  const std::int64_t M = call.job.q_blocks;
  const std::int64_t row = (b * call.problem.num_heads + h) * M;
  const ConstRouting& given = call.inputs.routing;
  const bool soft = call.job.soft;
  std::int32_t* blocks =
      outputs.routing.blocks != nullptr ? outputs.routing.blocks + row * call.L : call.own.blocks;
  float* logits = !soft                               ? nullptr
                  : outputs.routing.logits != nullptr ? outputs.routing.logits + row * call.T
                                                      : call.own.logits;
  if (soft && given.logits != nullptr) {
    std::copy_n(given.logits + row * call.T, M * call.T, logits);
    for (std::int64_t i = 0; i < M; ++i) {
      choose_blocks(call, logits + i * call.T, blocks + i * call.L);
    }
  } else if (!soft && given.blocks != nullptr) {
    std::copy_n(given.blocks + row * call.L, M * call.L, blocks);
  } else {
    score(call, h);
    choose(call, blocks, logits);
  }
  weigh(call, h, blocks, logits);
}

}  // namespace

void forward(const Problem& problem, const Inputs& inputs, const Outputs& outputs,
             const Context& context, const Kernels& kernels) {
  const auto done = [&context](const char* stage) {
    if (context.after_stage != nullptr) (*context.after_stage)(stage);
  };
  Call call = make_call(problem, inputs, context, Pass::kForward, kernels);
  Job& job = call.job;
  const std::int64_t group = problem.num_heads / problem.num_kv_heads;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    for (std::int64_t kv = 0; kv < problem.num_kv_heads; ++kv) {
      select_keys(call, b, kv);
      smooth(call);
      done("smooth");
      if (outputs.k_mean != nullptr) {
        std::copy_n(job.k_mean, job.d,
                    outputs.k_mean + (b * problem.num_kv_heads + kv) * problem.head_dim);
      }
      run_workers(call, kernels.pack_keys, num_packed_pairs(job));
      done("pack_keys");
      for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        select_queries(call, b, h);
        route_head(call, outputs, b, h);
        done("route");
        run(call, kernels.sum_z, (job.q_blocks + kSumRows - 1) / kSumRows);
        run(call, kernels.sum_forward,
            num_panel_groups(problem) - 1);  // without the backward's z_j
        done("sum_blocks");
        job.out = rows_of(outputs.out, b, h);
        job.out_sparse = rows_of(outputs.out_sparse, b, h);
        job.out_linear = rows_of(outputs.out_linear, b, h);
        job.lse = outputs.lse == nullptr
                      ? nullptr
                      : outputs.lse + (b * problem.num_heads + h) * problem.q_tokens;
        run_workers(call, kernels.query_blocks, job.q_blocks);
        done("query_blocks");
      }
    }
  }
}

}  // namespace sla2::cpu

// Alg. 3, corrected: the workspace of the backward and its launches, in order.
#include <cstdint>

#include "cuda/backward_plan.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

/// Terms that hold the input's type exactly: bf16, fp16 or fp32 as sums of bf16.
int terms_of(DType dtype) { return dtype == DType::kBF16 ? 1 : dtype == DType::kF16 ? 2 : 3; }

Terms take_terms(Arena& arena, int terms, std::int64_t elements) {
  const std::int64_t plane = (elements + 63) / 64 * 64;
  return {arena.take<Bf16>(plane * terms), plane, terms};
}

}  // namespace

Backward describe_backward(const Problem& problem, const Inputs& inputs,
                           const Gradients& gradients) {
  Backward back{};
  back.call = describe(problem);
  const Call& c = back.call;
  back.d_alpha_logit = gradients.d_alpha_logit;
  back.d_proj_q = gradients.d_proj_q;
  back.d_proj_k = gradients.d_proj_k;
  back.d_proj_out = gradients.d_proj_out;
  back.matched = problem.config.backward == BackwardMode::kMatched;
  // A given routing does not depend on the router.
  back.learns_router = c.soft && !c.is_sla && inputs.routing.logits == nullptr &&
                       (back.d_proj_q != nullptr || back.d_proj_k != nullptr);
  back.C = c.D * c.D + c.D;
  back.query_tiles = (c.bq + kTileRows - 1) / kTileRows;
  back.key_tiles = (c.bk + kTileRows - 1) / kTileRows;
  const std::int64_t blocks = static_cast<std::int64_t>(c.B) * c.H * c.M;
  back.projection_parts = static_cast<int>(blocks < 32 ? blocks : 32);
  return back;
}

void take_backward(Backward& back, Arena& arena) {
  const Call& c = back.call;
  const int terms = terms_of(c.dtype);
  const std::int64_t heads = static_cast<std::int64_t>(c.B) * c.H;
  const std::int64_t kv_heads = static_cast<std::int64_t>(c.B) * c.Hkv;
  const std::int64_t q_rows = heads * c.M * c.bq;
  const std::int64_t k_rows = kv_heads * c.T * c.bk;
  for (Terms* rows : {&back.q, &back.phi_q, &back.d_o, &back.d_top}) {
    *rows = take_terms(arena, terms, q_rows * c.D);
  }
  back.d_l = c.is_sla ? take_terms(arena, terms, q_rows * c.D) : back.d_o;
  for (Terms* rows : {&back.ks, &back.phi_k, &back.v}) {
    *rows = take_terms(arena, terms, k_rows * c.D);
  }
  back.rest = take_terms(arena, terms, heads * c.M * c.Tp);
  for (Terms* states : {&back.h, &back.d_h}) {
    *states = take_terms(arena, terms, kv_heads * c.T * back.C);
  }
  for (Terms* states : {&back.sums, &back.d_sums}) {
    *states = take_terms(arena, terms, heads * c.M * back.C);
  }
  back.reads = arena.take<std::uint8_t>(heads * c.T * c.M);
  back.complement_empty = arena.take<std::int32_t>(heads * c.M);
  back.alphas = arena.take<float>(heads * c.M);
  for (float** rows : {&back.lse, &back.delta_sparse, &back.delta_linear, &back.d_bottom}) {
    *rows = arena.take<float>(q_rows);
  }
  back.d_q_linear = arena.take<float>(q_rows * c.D);
  back.d_keys = arena.take<float>(k_rows * c.D);
  back.d_v_linear = arena.take<float>(k_rows * c.D);
  back.key_sums = arena.take<float>(kv_heads * c.T * back.key_tiles * c.D);
  back.key_mean = arena.take<float>(kv_heads * c.D);
  back.alpha_parts = arena.take<float>(heads * c.M * back.query_tiles);
  if (c.is_sla) {
    back.projection_sums =
        arena.take<float>(static_cast<std::int64_t>(back.projection_parts) * c.dv * c.dv);
  }
  if (!back.learns_router) return;
  for (float** rows : {&back.pooled_q, &back.routed_q, &back.routed_k_sums, &back.pooled_k_sums}) {
    *rows = arena.take<float>(heads * c.M * c.D);
  }
  back.pooled_k = arena.take<float>(kv_heads * c.T * c.D);
  back.routed_k = arena.take<float>(heads * c.T * c.D);
  back.u = arena.take<float>(heads * c.M * back.query_tiles * c.T);
  back.d_scores = arena.take<float>(heads * c.M * c.Tp);
  if (c.softmax_scores) back.softmax_rows = arena.take<float>(heads * c.M * c.Tp);
}

std::size_t backward_bytes(const Problem& problem) {
  // The most that any choice of gradients needs.
  float wanted = 0.0f;
  Gradients gradients;
  gradients.d_proj_q = gradients.d_proj_k = &wanted;
  Backward back = describe_backward(problem, {}, gradients);
  Arena arena(nullptr);
  take_backward(back, arena);
  return arena.used();
}

void run_backward(const Problem& problem, const Inputs& inputs, const Saved& saved, ConstView d_out,
                  const Gradients& gradients, const Context& context) {
  Backward back = describe_backward(problem, inputs, gradients);
  set_inputs(back.call, inputs);
  back.call.k_mean = const_cast<float*>(saved.k_mean);
  back.call.given_blocks = saved.routing.blocks;
  back.call.given_logits = saved.routing.logits;
  back.saved_sparse = rows_of(saved.out_sparse);
  back.saved_linear = rows_of(saved.out_linear);
  back.saved_lse = saved.lse;
  back.d_out = rows_of(d_out);
  back.d_q = rows_of(gradients.d_q);
  back.d_k = rows_of(gradients.d_k);
  back.d_v = rows_of(gradients.d_v);
  Arena arena(context.workspace.data());
  take_backward(back, arena);

  struct Stage {
    const char* name;
    void (*run)(const Backward&, void* stream);
    bool wanted;
  };
  const Stage stages[] = {
      {"prepare", back_prepare, true},
      {"key_states", back_key_states, true},
      {"query_states", back_query_states, true},
      {"linear_queries", back_linear_queries, true},
      {"query_gradients", back_query_gradients, true},
      {"key_gradients", back_key_gradients, true},
      {"linear_keys", back_linear_keys, true},
      {"sparse_queries", back_sparse_queries, true},
      {"project_out", back_project_out, back.call.is_sla && back.d_proj_out != nullptr},
      {"reduce", back_reduce, true},
      {"sparse_keys", back_sparse_keys, true},
      {"scores", back_scores, back.learns_router},
      {"router", back_router, back.d_proj_q != nullptr || back.d_proj_k != nullptr},
  };
  for (const Stage& stage : stages) {
    if (!stage.wanted) continue;
    stage.run(back, context.stream);
    if (context.after_stage != nullptr) (*context.after_stage)(stage.name);
  }
}

}  // namespace sla2::SLA2_CUDA_ROOM

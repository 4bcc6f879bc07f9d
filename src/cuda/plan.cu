// Sizes and workspace of a call.
#include <algorithm>
#include <cstdint>

#include "cuda/plan.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

template <typename View>
Rows make_rows(const View& view) {
  if (view.empty()) return {};
  const std::int64_t width = bytes_of(view.dtype);
  bool vectors = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
  for (std::size_t axis = 0; axis < 3; ++axis) {
    // The stride of an axis of one element is never taken.
    vectors = vectors && (view.shape[axis] == 1 || view.strides[axis] * width % 16 == 0);
  }
  return {const_cast<void*>(static_cast<const void*>(view.data)),
          view.strides[0],
          view.strides[1],
          view.strides[2],
          view.dtype,
          vectors};
}

Format format_of(const Problem& p) {
  const bool soft = p.config.routing == RoutingMode::kSoft;
  const Precision precision = p.config.precision;
  if (precision == Precision::kFp32) return Format::kFp32;
  if (!soft && precision == Precision::kInt8) return Format::kInt8;
  if (!soft && precision == Precision::kFp8) return Format::kFp8;
  // bf16, or low-bit with soft routing: the input's 16-bit type; for fp32 inputs bf16, except that
  // soft routing is never quantised.
  if (p.dtype == DType::kF16) return Format::kF16;
  if (p.dtype == DType::kF32 && precision != Precision::kBf16) return Format::kFp32;
  return Format::kBf16;
}

Terms take_terms(Arena& arena, std::int64_t elements, int count) {
  const std::int64_t plane = (elements + 63) / 64 * 64;  // planes stay aligned for vectors
  return {arena.take<Bf16>(plane * count), plane, count};
}

/// A tensor in the sparse branch's format.
void* take_low(Arena& arena, Format format, std::int64_t elements, std::int64_t& plane) {
  plane = elements;
  if (format == Format::kInt8 || format == Format::kFp8) return arena.take<std::uint8_t>(elements);
  return arena.take<Bf16>(elements * (format == Format::kFp32 ? 3 : 1));
}

std::int64_t query_blocks(const Call& c) { return std::int64_t{c.B} * c.H * c.M; }
std::int64_t key_blocks(const Call& c) { return std::int64_t{c.B} * c.Hkv * c.T; }
bool is_8_bit(const Call& c) { return c.format == Format::kInt8 || c.format == Format::kFp8; }

}  // namespace

Rows rows_of(const ConstView& view) { return make_rows(view); }
Rows rows_of(const View& view) { return make_rows(view); }

Call describe(const Problem& p) {
  Call c{};
  c.B = static_cast<int>(p.batch);
  c.H = static_cast<int>(p.num_heads);
  c.Hkv = static_cast<int>(p.num_kv_heads);
  c.group = c.H / c.Hkv;
  c.Nq = static_cast<int>(p.q_tokens);
  c.Nk = static_cast<int>(p.k_tokens);
  c.d = static_cast<int>(p.head_dim);
  c.dv = static_cast<int>(p.value_dim);
  c.bq = static_cast<int>(p.config.block_q);
  c.bk = static_cast<int>(p.config.block_k);
  c.M = static_cast<int>(num_q_blocks(p));
  c.T = static_cast<int>(num_k_blocks(p, p.k_tokens));
  c.L = static_cast<int>(max_routed_blocks(p));
  const int widest = std::max(c.d, c.dv);
  c.D = widest <= 64 ? 64 : widest <= 128 ? 128 : 256;
  c.Tp = (c.T + 31) / 32 * 32;
  c.S = std::int64_t{c.d} * c.dv + c.d;
  c.terms = p.dtype == DType::kBF16 ? 1 : p.dtype == DType::kF16 ? 2 : 3;
  c.format = format_of(p);
  c.dtype = p.dtype;
  c.feature_map = p.config.feature_map;
  c.soft = p.config.routing == RoutingMode::kSoft;
  c.raw_keys = p.config.linear_keys == LinearKeys::kRaw;
  c.scope_all = p.config.linear_scope == LinearScope::kAll;
  c.is_sla = p.config.method == Method::kSla;
  c.softmax_scores = p.config.score_norm == ScoreNorm::kSoftmax;
  c.scale = static_cast<float>(softmax_scale(p));
  c.keep = p.config.keep;
  c.tau = p.config.tau;
  c.protected_begin = static_cast<int>(std::min(p.protected_keys.begin, p.k_tokens));
  c.protected_end = static_cast<int>(std::min(p.protected_keys.end, p.k_tokens));
  c.num_routers = static_cast<int>(p.num_routers);
  c.alpha_blocks = static_cast<int>(p.alpha_blocks);
  c.router_heads = c.num_routers > 1 ? c.H : c.Hkv;
  return c;
}

void set_inputs(Call& c, const Inputs& inputs) {
  c.q = rows_of(inputs.q);
  c.k = rows_of(inputs.k);
  c.v = rows_of(inputs.v);
  c.proj_q = inputs.parameters.proj_q;
  c.proj_k = inputs.parameters.proj_k;
  c.alpha_logit = inputs.parameters.alpha_logit;
  c.proj_out = inputs.parameters.proj_out;
  c.key_lengths = inputs.key_lengths;
  c.given_blocks = c.soft ? nullptr : inputs.routing.blocks;
  c.given_logits = c.soft ? inputs.routing.logits : nullptr;
}

void take_router(Call& c, Arena& arena) {
  c.k_sums = arena.take<float>(key_blocks(c) * c.d);
  c.pooled_q = arena.take<float>(query_blocks(c) * c.d);
  c.routed_q = arena.take<float>(query_blocks(c) * c.d);
  c.routed_k = arena.take<float>(std::int64_t{c.B} * c.router_heads * c.d * c.Tp);
  c.scores = arena.take<float>(query_blocks(c) * c.T);
  // The size must not depend on which outputs the caller wants.
  float* const k_mean = arena.take<float>(std::int64_t{c.B} * c.Hkv * c.d);
  if (c.k_mean == nullptr) c.k_mean = k_mean;
  if (c.soft) {
    float* const logits = arena.take<float>(query_blocks(c) * c.T);
    if (c.logits == nullptr) c.logits = logits;
  } else {
    std::int32_t* const blocks = arena.take<std::int32_t>(query_blocks(c) * c.L);
    if (c.blocks == nullptr) c.blocks = blocks;
  }
}

void take_weights(Call& c, Arena& arena) {
  c.complement_empty = arena.take<std::int32_t>(query_blocks(c));
  c.rest = take_terms(arena, query_blocks(c) * c.Tp, c.soft ? c.terms : 1);
}

void take_queries(Call& c, Arena& arena) {
  const std::int64_t rows = std::int64_t{c.B} * c.H * c.Nq;
  c.q_low = take_low(arena, c.format, rows * c.D, c.q_plane);
  if (is_8_bit(c)) c.q_scale = arena.take<float>(rows);
  if (!phi_in_attend(c)) c.phi_q = take_terms(arena, rows * c.D, c.terms);
}

void take_keys(Call& c, Arena& arena) {
  const std::int64_t elements = key_blocks(c) * c.bk * c.D;
  c.k_low = take_low(arena, c.format, elements, c.k_plane);
  c.v_low = take_low(arena, c.format, elements, c.v_plane);
  if (!is_8_bit(c)) return;
  c.k_scale = arena.take<float>(key_blocks(c));
  c.v_amax = arena.take<float>(key_blocks(c) * c.dv);
  c.v_scale = arena.take<float>(std::int64_t{c.B} * c.Hkv * c.dv);
  c.v_factor = arena.take<float>(std::int64_t{c.B} * c.Hkv * c.dv);
}

void take_states(Call& c, Arena& arena) {
  c.h = take_terms(arena, key_blocks(c) * c.S, c.terms);
  c.sums = take_terms(arena, query_blocks(c) * c.S, c.terms);
}

void take_sla_rows(Call& c, Arena& arena) {
  if (!c.is_sla) return;
  const std::int64_t elements = std::int64_t{c.B} * c.H * c.Nq * c.dv;
  c.sparse_rows = arena.take<float>(elements);
  c.linear_rows = arena.take<float>(elements);
}

}  // namespace sla2::SLA2_CUDA_ROOM

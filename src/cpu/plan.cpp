#include "cpu/plan.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace sla2::cpu {
namespace {

/// A single row's stride may be anything: rows that are only asked for must have addresses too.
std::int64_t row_stride(const std::array<std::int64_t, 4>& shape,
                        const std::array<std::int64_t, 4>& strides) {
  return shape[2] == 1 ? shape[3] : strides[2];
}

constexpr std::int64_t kMaxHeadDim = 256;

Arithmetic arithmetic_of(const Problem& problem) {
  const Arithmetic in_16_bits =
      problem.dtype == DType::kF16 ? Arithmetic::kRound16 : Arithmetic::kBf16;
  switch (problem.config.precision) {
    case Precision::kFp32:
      return Arithmetic::kFp32;
    case Precision::kBf16:
      return in_16_bits;
    default:
      break;
  }
  if (problem.config.routing == RoutingMode::kHard) return Arithmetic::kInt8;
  return problem.dtype == DType::kF32 ? Arithmetic::kFp32 : in_16_bits;
}

Type type_of(DType dtype) {
  return dtype == DType::kF32 ? Type::kF32 : dtype == DType::kBF16 ? Type::kBF16 : Type::kF16;
}

void fill_options(const Problem& p, Pass pass, Job& job) {
  job.num_queries = p.q_tokens;
  job.num_keys = p.k_tokens;
  job.d = p.head_dim;
  job.dv = p.value_dim;
  job.block_q = p.config.block_q;
  job.block_k = p.config.block_k;
  job.q_blocks = num_q_blocks(p);
  job.k_blocks = num_k_blocks(p, p.k_tokens);
  job.type = type_of(p.dtype);
  job.arithmetic = pass == Pass::kForward ? arithmetic_of(p) : Arithmetic::kFp32;
  job.rounding_bits = 11;
  job.linear16 = job.arithmetic == Arithmetic::kInt8 || job.arithmetic == Arithmetic::kBf16;
  job.phi = p.config.feature_map == FeatureMap::kSoftmax ? Phi::kSoftmax
            : p.config.feature_map == FeatureMap::kElu   ? Phi::kElu
                                                         : Phi::kRelu;
  job.soft = p.config.routing == RoutingMode::kSoft;
  job.raw_keys = p.config.linear_keys == LinearKeys::kRaw;
  job.scope_all = p.config.linear_scope == LinearScope::kAll;
  job.is_sla = p.config.method == Method::kSla;
  job.scale = static_cast<float>(softmax_scale(p));
  job.width = max_routed_blocks(p);
  // Where a quarter of the blocks are left out, at most, little of a total goes. 16-bit products
  // bear more cancellation than fp32 ones.
  job.subtracts = !job.soft && !job.scope_all && 4 * job.width <= job.k_blocks;
  job.most_cancelled = p.config.precision == Precision::kFp32 ? 2.0F : 64.0F;
}

}  // namespace

/// The backward's products: those of the inputs' 16-bit type unless the precision is fp32. fp16's
/// run in fp32, which is finer, and so do bf16's where fp32 is not slower: Intel's vdpbf16ps has
/// two thirds of the speed of its fp32 multiply-adds, its tiles have eight times that.
bool has_bf16_products(const Problem& p, const Kernels& kernels) {
  if (p.dtype == DType::kF16 || arithmetic_of(p) == Arithmetic::kFp32) return false;
  if (kernels.bf16 == Speed::kFaster) return true;
  __builtin_cpu_init();
  return kernels.bf16 == Speed::kFasterOnAmd && __builtin_cpu_is("amd");
}

std::int64_t scratch_bytes(std::int64_t d, std::int64_t dv, std::int64_t block_k) {
  const std::int64_t forward_keys = block_k * (2 * d + 16 + 2 * dv) + 2 * d * dv + 16;
  const std::int64_t forward_queries =
      kRowTile * (3 * d + 3 * dv + kScoreStride + kLeftStride / 2 + 5);
  const std::int64_t forward_sums = kSumRows * kPanel * kPanelsPerTask;
  const std::int64_t floats = std::max({forward_keys, forward_queries, forward_sums}) + 16;
  return (floats * 4 + 63) / 64 * 64;
}

std::int64_t num_panel_groups(const Problem& p) {
  const std::int64_t panels = p.head_dim * p.value_dim / kPanel;
  return (panels + kPanelsPerTask - 1) / kPanelsPerTask + 1;
}

void lay_out(const Problem& p, Pass pass, std::int64_t workers, const Kernels& kernels,
             Arena& arena, Job& job, Back& back, DriverBuffers& own) {
  job = Job{};
  fill_options(p, pass, job);
  const std::int64_t d = job.d, dv = job.dv, M = job.q_blocks, T = job.k_blocks;
  const std::int64_t keys = T * job.block_k, padded_T = (T + 15) / 16 * 16;
  const bool is_backward = pass == Pass::kBackward;

  job.scratch_bytes = is_backward ? back_scratch_bytes(p) : scratch_bytes(d, dv, job.block_k);
  job.workers = workers;
  job.scratch = arena.take<std::byte>(workers * job.scratch_bytes);
  job.next_index = arena.take<std::int64_t>(1);
  job.k_block_sums = arena.take<float>(T * d);
  job.k_mean = arena.take<float>(d);
  job.pooled_k = arena.take<float>(T * d);
  job.pooled_q = arena.take<float>(M * d);
  job.routed_q = arena.take<float>(M * d);
  job.routed_k = arena.take<float>(T * d);
  job.scores = arena.take<float>(M * padded_T);
  own.routed_k_t = arena.take<float>(d * padded_T);
  own.soft = arena.take<double>(workers * T);
  if (pass == Pass::kRoute) return;

  own.alpha = arena.take<float>(M);
  own.complement_empty = arena.take<unsigned char>(M);
  own.blocks = arena.take<std::int32_t>(M * job.width);
  if (job.soft) own.logits = arena.take<float>(M * T);
  if (job.soft) own.log_m = arena.take<float>(M * T);
  own.rest = arena.take<float>(M * T);
  if (is_backward) {
    back = Back{};
    back.is16 = has_bf16_products(p, kernels);
    job.subtracts = job.subtracts && !back.is16;  // whose products are faster
    return lay_out_backward(p, arena, job, back, own);
  }
  const std::int64_t bytes = job.arithmetic == Arithmetic::kInt8   ? 1
                             : job.arithmetic == Arithmetic::kBf16 ? 2
                                                                   : 4;
  job.keys = arena.take<std::byte>(keys * d * bytes);
  job.values = arena.take<std::byte>(keys * dv * bytes);
  if (job.linear16) job.v_amax = arena.take<float>(T * dv);
  if (bytes == 1) {
    job.v_factor = arena.take<float>(dv);
    job.v_scale = arena.take<float>(dv);
    job.k_scale = arena.take<float>(T);
  }
  const std::int64_t panels = d * dv / kPanel;
  if (job.linear16) own.rest16 = arena.take<std::uint16_t>(M * rest_stride(T));
  job.h_packed =
      arena.take<std::byte>(panels * (job.linear16 ? 2 * h_stride16(T) : 4 * h_stride(T)));
  job.sums_packed = arena.take<std::byte>(M * sums_stride(d, dv) * (job.linear16 ? 2 : 4));
  job.z = arena.take<float>(T * d);
  job.sum_z = arena.take<float>(M * d);
  job.sums_direct = arena.take<unsigned char>(M);
}

Call make_call(const Problem& problem, const Inputs& inputs, const Context& context, Pass pass,
               const Kernels& kernels) {
  Call call{problem, inputs, context.executor, kernels, {}, {}, {}, 0, 0, 0};
  Arena arena(context.workspace.data());
  lay_out(problem, pass, context.executor.num_threads(), kernels, arena, call.job, call.back,
          call.own);
  call.L = call.job.width;
  call.T = call.job.k_blocks;
  call.padded_T = (call.T + 15) / 16 * 16;
  call.job.log_m = call.own.log_m;
  call.job.rest = call.own.rest;
  call.job.rest16 = call.own.rest16;
  call.job.alpha = call.own.alpha;
  call.job.complement_empty = call.own.complement_empty;
  call.job.proj_out = inputs.parameters.proj_out;
  return call;
}

Rows rows_of(const ConstView& view, std::int64_t b, std::int64_t h) {
  if (view.empty()) return {nullptr, 0};
  const std::int64_t at = (b * view.strides[0] + h * view.strides[1]) * bytes_of(view.dtype);
  return {static_cast<const std::byte*>(view.data) + at, row_stride(view.shape, view.strides)};
}

MutableRows rows_of(const View& view, std::int64_t b, std::int64_t h) {
  if (view.empty()) return {nullptr, 0};
  const std::int64_t at = (b * view.strides[0] + h * view.strides[1]) * bytes_of(view.dtype);
  return {static_cast<std::byte*>(view.data) + at, row_stride(view.shape, view.strides)};
}

void select_keys(Call& call, std::int64_t b, std::int64_t kv) {
  Job& job = call.job;
  const std::int64_t* lengths = call.inputs.key_lengths;
  job.num_keys = lengths != nullptr ? lengths[b] : call.problem.k_tokens;
  job.k_blocks = num_k_blocks(call.problem, job.num_keys);
  job.k = rows_of(call.inputs.k, b, kv);
  job.v = rows_of(call.inputs.v, b, kv);
}

void select_queries(Call& call, std::int64_t b, std::int64_t h) {
  call.job.q = rows_of(call.inputs.q, b, h);
}

void run(Call& call, Stage stage, std::int64_t count) {
  const Job& job = call.job;
  parallel_for(call, count,
               [stage, &job](std::int64_t i, std::int64_t worker) { stage(job, i, worker); });
}

void run_workers(Call& call, Stage stage, std::int64_t count) {
  *call.job.next_index = 0;
  run(call, stage, std::min(call.executor.num_threads(), count));
}

void smooth(Call& call) {
  Job& job = call.job;
  run(call, call.kernels.sum_keys, job.k_blocks);
  double sums[kMaxHeadDim] = {};
  for (std::int64_t j = 0; j < job.k_blocks; ++j) {
    const float* row = job.k_block_sums + j * job.d;
    for (std::int64_t c = 0; c < job.d; ++c) sums[c] += row[c];
  }
  for (std::int64_t c = 0; c < job.d; ++c) {
    job.k_mean[c] = static_cast<float>(sums[c] / static_cast<double>(job.num_keys));
  }
  if (job.v_factor == nullptr) return;
  // As integers the bits of magnitudes order as the values do, NaN on top.
  std::uint32_t bits[kMaxHeadDim] = {};
  for (std::int64_t j = 0; j < job.k_blocks; ++j) {
    const float* row = job.v_amax + j * job.dv;
    for (std::int64_t c = 0; c < job.dv; ++c) {
      bits[c] = std::max(bits[c], std::bit_cast<std::uint32_t>(row[c]));
    }
  }
  for (std::int64_t c = 0; c < job.dv; ++c) {
    const auto amax = std::bit_cast<float>(bits[c]);
    const bool finite = std::isfinite(amax);
    const bool zero = !finite || amax < 1e-30F;
    job.v_scale[c] = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0 : amax / 127.0F;
    job.v_factor[c] = zero ? 0 : 127.0F / amax;
  }
}

}  // namespace sla2::cpu

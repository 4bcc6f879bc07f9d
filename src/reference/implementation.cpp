#include "reference/implementation.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/float16.h"
#include "reference/stages.h"

namespace sla2::reference {
namespace {

template <typename Call>
void for_each_row(const std::array<std::int64_t, 4>& shape,
                  const std::array<std::int64_t, 4>& strides, Call call) {
  std::int64_t dense = 0;
  for (std::int64_t b = 0; b < shape[0]; ++b) {
    for (std::int64_t h = 0; h < shape[1]; ++h) {
      for (std::int64_t n = 0; n < shape[2]; ++n, dense += shape[3]) {
        call(b * strides[0] + h * strides[1] + n * strides[2], dense);
      }
    }
  }
}

template <typename Real>
std::vector<Real> read(const ConstView& view) {
  std::vector<Real> values(view.shape[0] * view.shape[1] * view.shape[2] * view.shape[3]);
  for_each_row(view.shape, view.strides, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t c = 0; c < view.shape[3]; ++c) {
      if (view.dtype == DType::kF32) {
        values[to + c] = static_cast<const float*>(view.data)[from + c];
      } else {
        const std::uint16_t bits = static_cast<const std::uint16_t*>(view.data)[from + c];
        values[to + c] = view.dtype == DType::kBF16 ? from_bf16(bits) : from_fp16(bits);
      }
    }
  });
  return values;
}

void write(const std::vector<double>& values, const View& view) {
  if (view.empty()) return;
  for_each_row(view.shape, view.strides, [&](std::int64_t to, std::int64_t from) {
    for (std::int64_t c = 0; c < view.shape[3]; ++c) {
      const auto value = static_cast<float>(values[from + c]);
      if (view.dtype == DType::kF32) {
        static_cast<float*>(view.data)[to + c] = value;
      } else {
        static_cast<std::uint16_t*>(view.data)[to + c] =
            view.dtype == DType::kBF16 ? to_bf16(value) : to_fp16(value);
      }
    }
  });
}

template <typename Real, typename From>
std::vector<Real> copy(const From* values, std::int64_t count) {
  return values == nullptr ? std::vector<Real>{} : std::vector<Real>(values, values + count);
}

template <typename From, typename To>
void copy_to(const std::vector<From>& values, To* out) {
  if (out == nullptr) return;
  std::transform(values.begin(), values.end(), out, [](From x) { return static_cast<To>(x); });
}

RoutingResult<double> read_routing(const Problem& problem, const ConstRouting& routing) {
  const Sizes s(problem);
  const bool soft = problem.config.routing == RoutingMode::kSoft;
  RoutingResult<double> result;
  result.logits = copy<double>(soft ? routing.logits : nullptr, s.B * s.H * s.M * s.T);
  result.blocks = copy<std::int32_t>(soft ? nullptr : routing.blocks, s.B * s.H * s.M * s.L);
  return result;
}

void write_routing(const RoutingResult<double>& result, const Routing& routing) {
  copy_to(result.blocks, routing.blocks);
  copy_to(result.logits, routing.logits);
}

void run_route(const Problem& problem, const Inputs& inputs, const Routing& routing,
               const Context&) {
  write_routing(route(problem, make_operands<double>(problem, inputs)), routing);
}

void run_forward(const Problem& problem, const Inputs& inputs, const Outputs& outputs,
                 const Context& context) {
  const RoutingResult<double> given = read_routing(problem, inputs.routing);
  const bool is_given = !given.blocks.empty() || !given.logits.empty();
  const ForwardResult<double> result = forward(problem, make_operands<double>(problem, inputs),
                                               is_given ? &given : nullptr, &context.executor);
  write(result.out, outputs.out);
  write(result.out_sparse, outputs.out_sparse);
  write(result.out_linear, outputs.out_linear);
  copy_to(result.lse, outputs.lse);
  copy_to(result.k_mean, outputs.k_mean);
  write_routing(result.routing, outputs.routing);
}

void run_backward(const Problem& problem, const Inputs& inputs, const Saved& saved, ConstView d_out,
                  const Gradients& gradients, const Context& context) {
  const Sizes s(problem);
  const Operands<double> operands = make_operands<double>(problem, inputs);
  ForwardResult<double> result;
  result.out_sparse = read<double>(saved.out_sparse);
  result.out_linear = read<double>(saved.out_linear);
  result.lse = copy<double>(saved.lse, s.B * s.H * s.Nq);
  result.k_mean = copy<double>(saved.k_mean, s.B * s.Hkv * s.d);
  result.routing = read_routing(problem, saved.routing);
  const bool learns_router = problem.config.routing == RoutingMode::kSoft &&
                             inputs.routing.logits == nullptr &&
                             (gradients.d_proj_q != nullptr || gradients.d_proj_k != nullptr);
  if (learns_router) result.routing.scores = route(problem, operands).scores;

  const GradientResult<double> gradient =
      backward(problem, operands, result, read<double>(d_out), &context.executor);
  write(gradient.d_q, gradients.d_q);
  write(gradient.d_k, gradients.d_k);
  write(gradient.d_v, gradients.d_v);
  copy_to(gradient.d_alpha_logit, gradients.d_alpha_logit);
  copy_to(gradient.d_proj_q, gradients.d_proj_q);
  copy_to(gradient.d_proj_k, gradients.d_proj_k);
  copy_to(gradient.d_proj_out, gradients.d_proj_out);
}

}  // namespace

template <typename Real>
Operands<Real> make_operands(const Problem& problem, const Inputs& inputs) {
  const Parameters& p = inputs.parameters;
  const std::int64_t router = problem.num_routers * problem.head_dim * problem.head_dim;
  return {read<Real>(inputs.q),
          read<Real>(inputs.k),
          inputs.v.empty() ? std::vector<Real>{} : read<Real>(inputs.v),
          copy<Real>(p.proj_q, router),
          copy<Real>(p.proj_k, router),
          copy<Real>(p.alpha_logit, problem.num_heads * problem.alpha_blocks),
          copy<Real>(p.proj_out, problem.value_dim * problem.value_dim),
          copy<std::int64_t>(inputs.key_lengths, problem.batch)};
}
template Operands<float> make_operands(const Problem&, const Inputs&);
template Operands<double> make_operands(const Problem&, const Inputs&);

const Implementation kReference = {
    "reference",
    Device::kCpu,
    [](const Problem&, Pass) { return std::string{}; },
    [](const Problem&, Pass, std::int64_t) { return std::size_t{0}; },
    run_route,
    run_forward,
    run_backward,
};

}  // namespace sla2::reference

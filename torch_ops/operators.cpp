// The operators: schemas, and their kernels, one set of functions for CPU and CUDA. Autograd lives
// with the callers (Python and libtorch): the stable ABI has none. Each kernel reads its tensors
// into Arguments, allocates the results and makes a Run: the executor over torch's threads, the
// workspace, the current stream on a GPU, and the Context of all.
#include "operators.h"

#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "cuda_stream.h"
#include "executor.h"
#include "kept_workspace.h"
#include "packing.h"
#include "sla2/implementation.h"
#include "sla2/sla2.h"

extern "C" const char* sla2_torch_version() { return SLA2_VERSION; }

namespace sla2::torch_ops {
namespace {

using Integers = std::vector<std::int64_t>;
using Numbers = std::vector<double>;

/// Runs a kernel; a sla2::Error leaves as text with its kind in front (see operators.h).
template <typename Body>
auto translated(const Body& body) {
  try {
    return body();
  } catch (const Error& error) {
    const char* kind = error.kind() == ErrorKind::kInvalidArgument ? kInvalidArgument
                       : error.kind() == ErrorKind::kUnsupported   ? kUnsupported
                                                                   : kRuntime;
    throw std::runtime_error(kind + std::string(error.what()));
  }
}

/// Executor, device, stream and workspace of one call; on a GPU torch's allocator owns the
/// workspace.
struct Run {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;  // before anything asks the device
  TorchExecutor executor;
  std::size_t bytes;
  KeptWorkspace on_cpu;
  Tensor on_gpu;
  Context context;

  Run(const Arguments& arguments, const Tensor& q, Pass pass)
      : guard(guard_of(q)),
        bytes(workspace_bytes(arguments.problem, pass, executor.num_threads())),
        on_cpu(q.is_cuda() ? 0 : bytes),
        on_gpu(torch::stable::new_empty(
            q, Integers{q.is_cuda() ? static_cast<std::int64_t>(bytes) : 0},
            torch::headeronly::ScalarType::Byte)),
        context{executor,
                q.is_cuda() ? std::span(static_cast<std::byte*>(on_gpu.mutable_data_ptr()), bytes)
                            : on_cpu.span(),
                q.is_cuda() ? current_cuda_stream(q.get_device_index()) : nullptr} {}
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

 private:
  static std::optional<torch::stable::accelerator::DeviceGuard> guard_of(const Tensor& q) {
    if (!q.is_cuda()) return std::nullopt;
    return torch::stable::accelerator::DeviceGuard(q.get_device_index());
  }
};

bool is_soft(const Problem& problem) { return problem.config.routing == RoutingMode::kSoft; }

/// Tensors of a routing of this problem; logits has no element with hard routing.
struct RoutingTensors {
  Tensor blocks;  // int32 [B, H, M, L]
  Tensor logits;  // fp32 [B, H, M, T]

  RoutingTensors(const Problem& p, const Tensor& q)
      : blocks(empty_i32(q, {p.batch, p.num_heads, num_q_blocks(p), max_routed_blocks(p)})),
        logits(is_soft(p) ? empty_f32(q, {p.batch, p.num_heads, num_q_blocks(p),
                                          num_k_blocks(p, p.k_tokens)})
                          : empty_f32(q, {0})) {}

  [[nodiscard]] Routing pointers() const {
    return {static_cast<std::int32_t*>(blocks.mutable_data_ptr()),
            logits.numel() > 0 ? static_cast<float*>(logits.mutable_data_ptr()) : nullptr};
  }
};

std::tuple<Tensor, Tensor> route_kernel(const Tensor& q, const Tensor& k,
                                        const OptionalTensor& proj_q, const OptionalTensor& proj_k,
                                        const OptionalTensor& key_lengths, Integers options,
                                        Numbers numbers) {
  return translated([&] {
    const OptionalTensor none;
    const Arguments arguments(
        {q, k, nullptr, proj_q, proj_k, none, none, key_lengths, options, numbers});
    const RoutingTensors routing(arguments.problem, q);
    const Run run(arguments, q, Pass::kRoute);
    route(arguments.problem, arguments.inputs, routing.pointers(), run.context);
    return std::tuple{routing.blocks, routing.logits};
  });
}

/// Without `save` only `out` is computed and the other results have no element; a routing that was
/// given is not returned again.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_kernel(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& proj_q,
    const OptionalTensor& proj_k, const OptionalTensor& alpha_logit, const OptionalTensor& proj_out,
    const OptionalTensor& key_lengths, const OptionalTensor& blocks, const OptionalTensor& logits,
    Integers options, Numbers numbers, bool save) {
  return translated([&] {
    Arguments arguments(
        {q, k, &v, proj_q, proj_k, alpha_logit, proj_out, key_lengths, options, numbers});
    arguments.give_routing(blocks, logits, q);
    const Problem& p = arguments.problem;

    const Tensor out = empty_in_layout_of(q, p.value_dim);
    const auto no_value = [&] { return torch::stable::new_empty(q, Integers{0}); };
    const auto no_f32 = [&] { return empty_f32(q, {0}); };  // results must not alias each other
    Tensor out_sparse = no_value(), out_linear = no_value();
    Tensor lse = no_f32(), k_mean = no_f32(), used_logits = no_f32();
    Tensor used_blocks = empty_i32(q, {0});
    Outputs outputs;
    outputs.out = mutable_view(out);
    if (save) {
      out_sparse = empty_in_layout_of(q, p.value_dim);
      out_linear = empty_in_layout_of(q, p.value_dim);
      lse = empty_f32(q, {p.batch, p.num_heads, p.q_tokens});
      k_mean = empty_f32(q, {p.batch, p.num_kv_heads, p.head_dim});
      outputs.out_sparse = mutable_view(out_sparse);
      outputs.out_linear = mutable_view(out_linear);
      outputs.lse = static_cast<float*>(lse.mutable_data_ptr());
      outputs.k_mean = static_cast<float*>(k_mean.mutable_data_ptr());
      if (!blocks && !logits) {
        const RoutingTensors used(p, q);
        used_blocks = used.blocks;
        used_logits = used.logits;
        outputs.routing = used.pointers();
      }
    }
    const Run run(arguments, q, Pass::kForward);
    forward(p, arguments.inputs, outputs, run.context);
    return std::tuple{out, out_sparse, out_linear, lse, k_mean, used_blocks, used_logits};
  });
}

/// `wanted`: bits of Wanted; a gradient that is not wanted has no element.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_kernel(
    const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& proj_q, const OptionalTensor& proj_k, const OptionalTensor& alpha_logit,
    const OptionalTensor& proj_out, const OptionalTensor& key_lengths, const Tensor& out_sparse,
    const Tensor& out_linear, const Tensor& lse, const Tensor& k_mean, const OptionalTensor& blocks,
    const OptionalTensor& logits, Integers options, Numbers numbers, std::int64_t wanted) {
  return translated([&] {
    Arguments arguments(
        {q, k, &v, proj_q, proj_k, alpha_logit, proj_out, key_lengths, options, numbers});
    arguments.give_routing(blocks, logits, q);
    const Problem& p = arguments.problem;
    if (lse.numel() != p.batch * p.num_heads * p.q_tokens ||
        k_mean.numel() != p.batch * p.num_kv_heads * p.head_dim) {
      throw Error("lse and k_mean must be those that forward saved, got " +
                  std::to_string(lse.numel()) + " and " + std::to_string(k_mean.numel()) +
                  " elements");
    }
    const std::pair<const char*, const Tensor&> others[] = {{"d_out", d_out},
                                                            {"out_sparse", out_sparse},
                                                            {"out_linear", out_linear},
                                                            {"lse", lse},
                                                            {"k_mean", k_mean}};
    for (const auto& [name, tensor] : others) require_same_place(name, tensor, q);
    const ConstRouting routing = arguments.inputs.routing;
    arguments.inputs.routing = {};  // it is what forward used, not one that the caller imposes
    const Saved saved{arguments.view("out_sparse", out_sparse),
                      arguments.view("out_linear", out_linear), arguments.dense_f32(lse),
                      arguments.dense_f32(k_mean), routing};
    const ConstView d_out_view = arguments.view("d_out", d_out);

    Gradients gradients;
    const auto activation = [&](std::int64_t bit, const Tensor& like, View& view) {
      if ((wanted & bit) == 0) return torch::stable::new_empty(like, Integers{0});
      Tensor gradient = empty_in_layout_of(like, like.size(3));
      view = mutable_view(gradient);
      return gradient;
    };
    const auto parameter = [&](std::int64_t bit, const OptionalTensor& like, float*& pointer) {
      if ((wanted & bit) == 0) return empty_f32(q, {0});
      if (!like) throw Error("wanted must not name the gradient of a parameter that is not given");
      const auto sizes = like->sizes();
      Tensor gradient = empty_f32(q, Integers(sizes.begin(), sizes.end()));
      pointer = static_cast<float*>(gradient.mutable_data_ptr());
      return gradient;
    };
    const std::tuple result{activation(kWantQ, q, gradients.d_q),
                            activation(kWantK, k, gradients.d_k),
                            activation(kWantV, v, gradients.d_v),
                            parameter(kWantAlphaLogit, alpha_logit, gradients.d_alpha_logit),
                            parameter(kWantProjQ, proj_q, gradients.d_proj_q),
                            parameter(kWantProjK, proj_k, gradients.d_proj_k),
                            parameter(kWantProjOut, proj_out, gradients.d_proj_out)};
    const Run run(arguments, q, Pass::kBackward);
    backward(p, arguments.inputs, saved, d_out_view, gradients, run.context);
    return result;
  });
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return result + "\"";
}

template <typename Names>
std::string quoted_list(const Names& names) {
  std::string result;
  for (const char* name : names) result += (result.empty() ? "" : ", ") + quoted(name);
  return "[" + result + "]";
}

/// JSON: version, threads, and per pass each implementation with why it would be refused for a
/// typical problem (empty: it would not).
std::string info_kernel() {
  return translated([] {
    Problem problem;
    problem.q_tokens = problem.k_tokens = 4096;
    problem.head_dim = problem.value_dim = 128;
    std::string list;
    for (const Implementation* const one : implementations()) {
      problem.device = one->device;
      list += list.empty() ? "" : ", ";
      list += "{\"name\": " + quoted(one->name) +
              ", \"device\": " + quoted(one->device == Device::kCpu ? "cpu" : "cuda") +
              ", \"refusal_forward\": " + quoted(one->refusal(problem, Pass::kForward)) +
              ", \"refusal_backward\": " + quoted(one->refusal(problem, Pass::kBackward)) + "}";
    }
    return "{\"version\": " + quoted(SLA2_VERSION) +
           ", \"threads\": " + std::to_string(TorchExecutor().num_threads()) +
           ", \"implementations\": [" + list + "], \"options\": " + quoted_list(kOptionNames) +
           ", \"numbers\": " + quoted_list(kNumberNames) + "}";
  });
}

/// JSON: one object for each accelerator's implementation that was compared with the reference.
std::string self_test_kernel(bool use_cache) {
  return translated([&] {
    std::string list;
    for (const SelfTest& test : self_test(use_cache)) {
      list += list.empty() ? "" : ", ";
      list += "{\"implementation\": " + quoted(test.implementation) +
              ", \"machine\": " + quoted(test.machine) + ", \"driver\": " + quoted(test.driver) +
              ", \"checks\": " + std::to_string(test.checks) +
              ", \"cached\": " + (test.cached ? "true" : "false") + "}";
    }
    return "[" + list + "]";
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(sla2, m) {
  m.def(
      "route(Tensor q, Tensor k, Tensor? proj_q, Tensor? proj_k, Tensor? key_lengths, "
      "int[] options, float[] numbers) -> (Tensor blocks, Tensor logits)");
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor? proj_q, Tensor? proj_k, Tensor? alpha_logit, "
      "Tensor? proj_out, Tensor? key_lengths, Tensor? blocks, Tensor? logits, int[] options, "
      "float[] numbers, bool save) -> (Tensor out, Tensor out_sparse, Tensor out_linear, "
      "Tensor lse, Tensor k_mean, Tensor used_blocks, Tensor used_logits)");
  m.def(
      "backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? proj_q, Tensor? proj_k, "
      "Tensor? alpha_logit, Tensor? proj_out, Tensor? key_lengths, Tensor out_sparse, "
      "Tensor out_linear, Tensor lse, Tensor k_mean, Tensor? blocks, Tensor? logits, "
      "int[] options, float[] numbers, int wanted) -> (Tensor d_q, Tensor d_k, Tensor d_v, "
      "Tensor d_alpha_logit, Tensor d_proj_q, Tensor d_proj_k, Tensor d_proj_out)");
  m.def("info() -> str");
  m.def("self_test(bool use_cache) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sla2, CPU, m) {
  m.impl("route", TORCH_BOX(&route_kernel));
  m.impl("forward", TORCH_BOX(&forward_kernel));
  m.impl("backward", TORCH_BOX(&backward_kernel));
}

STABLE_TORCH_LIBRARY_IMPL(sla2, CUDA, m) {
  m.impl("route", TORCH_BOX(&route_kernel));
  m.impl("forward", TORCH_BOX(&forward_kernel));
  m.impl("backward", TORCH_BOX(&backward_kernel));
}

STABLE_TORCH_LIBRARY_IMPL(sla2, CompositeExplicitAutograd, m) {
  m.impl("info", TORCH_BOX(&info_kernel));
  m.impl("self_test", TORCH_BOX(&self_test_kernel));
}

}  // namespace sla2::torch_ops

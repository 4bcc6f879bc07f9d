#include "arguments.h"

#include <array>
#include <string>
#include <utility>

#include <torch/csrc/stable/ops.h>

#include "packing.h"

namespace sla2::torch_ops {
namespace {

using torch::headeronly::ScalarType;

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (std::int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis > 0 ? ", " : "") + std::to_string(tensor.size(axis));
  }
  return text + "]";
}

void require_shape(bool holds, const char* name, const std::string& rule, const Tensor& tensor) {
  if (!holds)
    throw Error(std::string(name) + " must have shape " + rule + ", got " + shape_text(tensor));
}

std::string type_text(const Tensor& tensor) {
  constexpr std::array kNames = {
      std::pair{ScalarType::Float, "float32"},     std::pair{ScalarType::Double, "float64"},
      std::pair{ScalarType::BFloat16, "bfloat16"}, std::pair{ScalarType::Half, "float16"},
      std::pair{ScalarType::Long, "int64"},        std::pair{ScalarType::Int, "int32"},
      std::pair{ScalarType::Short, "int16"},       std::pair{ScalarType::Char, "int8"},
      std::pair{ScalarType::Byte, "uint8"},        std::pair{ScalarType::Bool, "bool"}};
  for (const auto& [type, name] : kNames) {
    if (tensor.scalar_type() == type) return name;
  }
  return "torch's type number " + std::to_string(static_cast<int>(tensor.scalar_type()));
}

std::string device_text(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "device " + std::to_string(tensor.get_device_index());
}

void require_rank4(const char* name, const Tensor& tensor) {
  require_shape(tensor.dim() == 4, name, "[batch, heads, tokens, features]", tensor);
}

DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      throw Error(std::string(name) + " must be of type float32, bfloat16 or float16, got " +
                  type_text(tensor));
  }
}

void require_float(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half &&
      type != ScalarType::Double) {
    throw Error(std::string(name) + " must be of a float type, got " + type_text(tensor));
  }
}

bool has_shape(const Tensor& tensor, std::initializer_list<std::int64_t> shape) {
  if (tensor.dim() != static_cast<std::int64_t>(shape.size())) return false;
  std::int64_t axis = 0;
  for (const std::int64_t size : shape) {
    if (tensor.size(axis++) != size) return false;
  }
  return true;
}

Problem make_problem(const RawArguments& raw) {
  require_rank4("q", raw.q);
  require_rank4("k", raw.k);
  Problem problem;
  const auto [config, protected_keys] = unpack(raw.options, raw.numbers);
  problem.config = config;
  problem.protected_keys = protected_keys;
  problem.batch = raw.q.size(0);
  problem.num_heads = raw.q.size(1);
  problem.num_kv_heads = raw.k.size(1);
  problem.q_tokens = raw.q.size(2);
  problem.k_tokens = raw.k.size(2);
  problem.head_dim = raw.q.size(3);
  problem.dtype = dtype_of("q", raw.q);
  problem.device = raw.q.is_cuda() ? Device::kCuda : Device::kCpu;
  if (raw.v != nullptr) {
    require_rank4("v", *raw.v);
    problem.value_dim = raw.v->size(3);
  }
  for (const OptionalTensor* projection : {&raw.proj_q, &raw.proj_k}) {
    if (projection->has_value() && (*projection)->dim() == 3) {
      problem.num_routers = (*projection)->size(0);
    }
  }
  if (raw.alpha_logit && raw.alpha_logit->dim() == 2) {
    problem.alpha_blocks = raw.alpha_logit->size(1);
  }
  validate(problem);
  return problem;
}

}  // namespace

void require_same_place(const char* name, const Tensor& tensor, const Tensor& q) {
  if (tensor.is_cpu() != q.is_cpu() || tensor.get_device_index() != q.get_device_index()) {
    throw Error(std::string(name) + " must be on q's device (" + device_text(q) + "), got " +
                device_text(tensor));
  }
}

Arguments::Arguments(const RawArguments& raw) : problem(make_problem(raw)) {
  const std::int64_t d = problem.head_dim;
  inputs.q = view("q", raw.q);
  require_same_place("k", raw.k, raw.q);
  inputs.k = view("k", raw.k);
  if (raw.v != nullptr) {
    require_same_place("v", *raw.v, raw.q);
    inputs.v = view("v", *raw.v);
  }

  const auto parameter = [&](const char* name, const OptionalTensor& tensor, bool fits,
                             const std::string& rule) -> const float* {
    if (!tensor) return nullptr;
    require_shape(fits, name, rule, *tensor);
    require_float(name, *tensor);
    require_same_place(name, *tensor, raw.q);
    return dense_f32(*tensor);
  };
  const auto router = [&](const char* name, const OptionalTensor& tensor) {
    const std::int64_t n = problem.num_routers;
    const bool fits =
        tensor && ((n == 1 && has_shape(*tensor, {d, d})) || has_shape(*tensor, {n, d, d}));
    return parameter(name, tensor, fits,
                     "[head_dim, head_dim] or [num_heads, head_dim, head_dim], both of one form");
  };
  inputs.parameters.proj_q = router("proj_q", raw.proj_q);
  inputs.parameters.proj_k = router("proj_k", raw.proj_k);
  inputs.parameters.alpha_logit = parameter(
      "alpha_logit", raw.alpha_logit,
      raw.alpha_logit && has_shape(*raw.alpha_logit, {problem.num_heads, problem.alpha_blocks}),
      "[num_heads, query blocks] or [num_heads, 1]");
  inputs.parameters.proj_out =
      parameter("proj_out", raw.proj_out,
                raw.proj_out && has_shape(*raw.proj_out, {problem.value_dim, problem.value_dim}),
                "[value_dim, value_dim]");

  if (raw.key_lengths) {
    require_shape(has_shape(*raw.key_lengths, {problem.batch}), "key_lengths", "[batch]",
                  *raw.key_lengths);
    if (raw.key_lengths->scalar_type() != ScalarType::Long) {
      throw Error("key_lengths must be of type int64, got " + type_text(*raw.key_lengths));
    }
    require_same_place("key_lengths", *raw.key_lengths, raw.q);
    owned.push_back(torch::stable::contiguous(*raw.key_lengths));
    inputs.key_lengths = static_cast<const std::int64_t*>(owned.back().const_data_ptr());
  }
}

void Arguments::give_routing(const OptionalTensor& blocks, const OptionalTensor& logits,
                             const Tensor& q) {
  const std::int64_t rows = num_q_blocks(problem);
  if (blocks) {
    require_shape(
        has_shape(*blocks, {problem.batch, problem.num_heads, rows, max_routed_blocks(problem)}),
        "routing.blocks", "[batch, heads, query blocks, routed blocks]", *blocks);
    require_same_place("routing.blocks", *blocks, q);
    if (blocks->scalar_type() != ScalarType::Int) {
      throw Error("routing.blocks must be of type int32, got " + type_text(*blocks));
    }
    owned.push_back(torch::stable::contiguous(*blocks));
    inputs.routing.blocks = static_cast<const std::int32_t*>(owned.back().const_data_ptr());
  }
  if (logits) {
    require_shape(has_shape(*logits, {problem.batch, problem.num_heads, rows,
                                      num_k_blocks(problem, problem.k_tokens)}),
                  "routing.weights", "[batch, heads, query blocks, key blocks]", *logits);
    require_float("routing.weights", *logits);
    require_same_place("routing.weights", *logits, q);
    inputs.routing.logits = dense_f32(*logits);
  }
}

const float* Arguments::dense_f32(const Tensor& tensor) {
  Tensor dense = tensor;
  if (dense.scalar_type() != ScalarType::Float) {
    dense = torch::stable::to(dense, ScalarType::Float);
  }
  owned.push_back(torch::stable::contiguous(dense));
  return static_cast<const float*>(owned.back().const_data_ptr());
}

ConstView Arguments::view(const char* name, const Tensor& tensor) {
  require_rank4(name, tensor);
  if (dtype_of(name, tensor) != problem.dtype) {
    const char* const wanted = problem.dtype == DType::kF32    ? "float32"
                               : problem.dtype == DType::kBF16 ? "bfloat16"
                                                               : "float16";
    throw Error(std::string(name) + " must have q's type " + wanted + ", got " + type_text(tensor));
  }
  // torch leaves any stride on an axis of one element; here every axis has a usable one.
  owned.push_back(tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor
                                                               : torch::stable::contiguous(tensor));
  const Tensor& kept = owned.back();
  ConstView result{kept.const_data_ptr(), problem.dtype, {}, {}};
  for (std::int64_t axis = 0; axis < 4; ++axis) {
    result.shape[static_cast<std::size_t>(axis)] = kept.size(axis);
    result.strides[static_cast<std::size_t>(axis)] = kept.stride(axis);
  }
  return result;
}

View mutable_view(const Tensor& tensor) {
  View result{tensor.mutable_data_ptr(), dtype_of("result", tensor), {}, {}};
  for (std::int64_t axis = 0; axis < 4; ++axis) {
    result.shape[static_cast<std::size_t>(axis)] = tensor.size(axis);
    result.strides[static_cast<std::size_t>(axis)] = tensor.stride(axis);
  }
  return result;
}

Tensor empty_in_layout_of(const Tensor& like, std::int64_t features) {
  if (like.stride(1) < like.stride(2)) {
    const std::array shape{like.size(0), like.size(2), like.size(1), features};
    return torch::stable::transpose(torch::stable::new_empty(like, shape), 1, 2);
  }
  const std::array shape{like.size(0), like.size(1), like.size(2), features};
  return torch::stable::new_empty(like, shape);
}

Tensor empty_f32(const Tensor& device_of, const std::vector<std::int64_t>& shape) {
  return torch::stable::new_empty(device_of, shape, ScalarType::Float);
}

Tensor empty_i32(const Tensor& device_of, const std::vector<std::int64_t>& shape) {
  return torch::stable::new_empty(device_of, shape, ScalarType::Int);
}

}  // namespace sla2::torch_ops

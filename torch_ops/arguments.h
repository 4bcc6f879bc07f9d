// From torch's tensors to the library's Problem, views and parameters.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "sla2/attention.h"

namespace sla2::torch_ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// What every operator takes. Shapes as in sla2/attention.h.
struct RawArguments {
  const Tensor& q;                    // [B, H, Nq, d]
  const Tensor& k;                    // [B, Hkv, Nk, d]
  const Tensor* v;                    // [B, Hkv, Nk, dv]; null: routing only
  const OptionalTensor& proj_q;       // [d, d] or [H, d, d], any float type
  const OptionalTensor& proj_k;       // likewise, of the same rank
  const OptionalTensor& alpha_logit;  // [H, M] or [H, 1], any float type
  const OptionalTensor& proj_out;     // [dv, dv], any float type
  const OptionalTensor& key_lengths;  // [B] int64
  const std::vector<std::int64_t>& options;
  const std::vector<double>& numbers;
};

/// A call's problem and inputs, with the tensors that the pointers point into. q, k, v are copied
/// only if their last stride is not 1; parameters only if they are not dense fp32.
struct Arguments {
  Problem problem;
  Inputs inputs;
  std::vector<Tensor> owned;

  /// Throws sla2::Error for a tensor of the wrong rank, type, device or shape.
  explicit Arguments(const RawArguments& raw);

  /// Sets inputs.routing; throws as the constructor does.
  void give_routing(const OptionalTensor& blocks, const OptionalTensor& logits, const Tensor& q);

  /// A dense fp32 copy of `tensor` unless it is one, kept alive here.
  const float* dense_f32(const Tensor& tensor);
  /// A view of a rank-4 tensor of the problem's type, copied if the last stride is not 1.
  ConstView view(const char* name, const Tensor& tensor);
};

/// Throws sla2::Error unless the tensor is on q's device.
void require_same_place(const char* name, const Tensor& tensor, const Tensor& q);
View mutable_view(const Tensor& tensor);

/// An uninitialised tensor of this shape and type; in memory the heads lie inside the tokens when
/// those of `like` do, so that a caller who passes [B, N, H, D].transpose(1, 2) gets it back.
Tensor empty_in_layout_of(const Tensor& like, std::int64_t features);
Tensor empty_f32(const Tensor& device_of, const std::vector<std::int64_t>& shape);
Tensor empty_i32(const Tensor& device_of, const std::vector<std::int64_t>& shape);

}  // namespace sla2::torch_ops

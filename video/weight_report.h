// What is wrong with a set of tensors, gathered so that one message can name all of it.
#pragma once

#include <set>
#include <string>

#include <torch/torch.h>

namespace sla2::video {

struct Report {
  std::set<std::string> missing, extra, misshapen;

  /// Whether the tensor is a float of this shape; if not it is noted as misshapen.
  bool fits(const std::string& name, const torch::Tensor& tensor, at::IntArrayRef shape);
  /// Throws sla2::Error with up to ten names of each kind, if there is one.
  void finish(const std::string& where) const;
};

}  // namespace sla2::video

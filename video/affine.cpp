#include "video/affine.h"

#include <cmath>

namespace sla2::video {

torch::Tensor new_parameter(at::IntArrayRef shape, Fill fill) {
  if (fill == Fill::kRandom) return torch::empty(shape);
  const torch::Tensor one = torch::zeros({1});
  const std::vector<std::int64_t> strides(shape.size(), 0);
  // Not expand(): a view could not be made a parameter of its own.
  return torch::empty({0}).set_(one.storage(), 0, shape, strides);
}

torch::Tensor new_table(std::int64_t rows, std::int64_t dim, Fill fill) {
  if (fill == Fill::kNone) return new_parameter({1, rows, dim}, fill);
  return torch::randn({1, rows, dim}) / std::sqrt(static_cast<double>(dim));
}

AffineImpl::AffineImpl(const std::vector<std::int64_t>& shape, Fill fill) {
  weight_ = register_parameter("weight", new_parameter(shape, fill));
  bias_ = register_parameter("bias", new_parameter({shape.front()}, fill));
  if (fill == Fill::kNone) return;
  const double inputs = static_cast<double>(weight_.numel() / weight_.size(0));
  const double bound = 1 / std::sqrt(inputs);
  torch::nn::init::kaiming_uniform_(weight_, std::sqrt(5.0));
  torch::nn::init::uniform_(bias_, -bound, bound);
}

torch::Tensor AffineImpl::forward(const torch::Tensor& x) const {
  return torch::linear(x, weight_.flatten(1), bias_);
}

}  // namespace sla2::video

// A linear map, and what fills the parameters of a module that is made.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <torch/torch.h>

namespace sla2::video {

/// What the parameters of a fresh module hold.
enum class Fill : std::uint8_t {
  kRandom,  ///< where training starts; drawn from torch's own generator
  kNone,    ///< a shape without memory behind it: weights that were loaded take their place
};

/// A parameter to fill; with kNone every number of it is the same one.
torch::Tensor new_parameter(at::IntArrayRef shape, Fill fill);

/// [1, rows, dim]: shifts and scales that a block adds to the modulation.
torch::Tensor new_table(std::int64_t rows, std::int64_t dim, Fill fill);

/// x W^T + b, started as torch starts a Linear or a convolution: weight [out, ...], whose other
/// axes together are the input's last one, and bias [out].
class AffineImpl : public torch::nn::Module {
 public:
  AffineImpl(const std::vector<std::int64_t>& shape, Fill fill);
  torch::Tensor forward(const torch::Tensor& x) const;
  [[nodiscard]] const torch::Tensor& weight() const { return weight_; }

 private:
  torch::Tensor weight_, bias_;
};
TORCH_MODULE(Affine);

}  // namespace sla2::video

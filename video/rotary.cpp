#include "video/rotary.h"

namespace sla2::video {
namespace {

/// Angles of one axis, double [positions, features / 2].
torch::Tensor angles(std::int64_t positions, std::int64_t features) {
  const auto options = torch::TensorOptions().dtype(torch::kFloat64);
  const torch::Tensor exponents =
      torch::arange(0, features, 2, options) / static_cast<double>(features);
  return torch::outer(torch::arange(positions, options),
                      torch::pow(10000.0, exponents).reciprocal());
}

}  // namespace

torch::Tensor rotary_table(std::int64_t head_dim, const std::array<std::int64_t, 3>& grid) {
  const std::int64_t spatial = 2 * (head_dim / 6);
  const std::array<std::int64_t, 3> features{head_dim - 2 * spatial, spatial, spatial};
  std::vector<torch::Tensor> parts;
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const std::int64_t width = features[axis] / 2;
    std::array<std::int64_t, 4> shape{1, 1, 1, width};
    shape[axis] = grid[axis];
    parts.push_back(
        angles(grid[axis], features[axis]).view(shape).expand({grid[0], grid[1], grid[2], width}));
  }
  const torch::Tensor all = torch::cat(parts, -1).view({-1, 1, head_dim / 2});
  return torch::polar(torch::ones_like(all), all).to(torch::kComplexFloat);
}

torch::Tensor rotate(const torch::Tensor& x, const torch::Tensor& table) {
  const torch::Tensor pairs = torch::view_as_complex(x.unflatten(-1, {x.size(-1) / 2, 2}));
  return torch::view_as_real(pairs * table).flatten(-2);
}

}  // namespace sla2::video

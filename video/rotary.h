// Rotary position embedding over (frame, row, column), as in Wan2.1.
#pragma once

#include <array>
#include <cstdint>

#include <torch/torch.h>

namespace sla2::video {

/// exp(i * position * frequency) for the raster of `grid`, complex64 [N, 1, head_dim / 2] on the
/// CPU. Of the head's features, 2 * (head_dim / 6) turn with the row, as many with the column, the
/// others with the frame; frequencies 10000^(-2j / features), angles in double.
torch::Tensor rotary_table(std::int64_t head_dim, const std::array<std::int64_t, 3>& grid);

/// x [B, N, H, D] fp32: neighbouring features (2j, 2j+1) are turned by the table's angles.
torch::Tensor rotate(const torch::Tensor& x, const torch::Tensor& table);

}  // namespace sla2::video

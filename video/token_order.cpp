#include "video/token_order.h"

#include <algorithm>
#include <limits>

#include <fmt/format.h>

#include "sla2/error.h"

namespace sla2::video {
namespace {

void check(const TokenOrder& order, const std::array<std::int64_t, 3>& grid) {
  std::int64_t tokens = 1;
  for (const std::int64_t size : grid) {
    if (size < 1 || tokens > std::numeric_limits<std::int32_t>::max() / size) {
      throw Error(
          fmt::format("grid must have positive sides and fewer than 2^31 tokens, got {}x{}x{}",
                      grid[0], grid[1], grid[2]));
    }
    tokens *= size;
  }
  for (const std::int64_t size : order.tile) {
    if (size < 1) {
      throw Error(fmt::format("tile must have positive sides, got {}x{}x{}", order.tile[0],
                              order.tile[1], order.tile[2]));
    }
  }
}

}  // namespace

std::vector<std::int64_t> token_permutation(const TokenOrder& order,
                                            const std::array<std::int64_t, 3>& grid) {
  check(order, grid);
  // Raster order is the order of a single tile that covers everything.
  std::array<std::int64_t, 3> tile = grid;
  if (order.kind == TokenOrderKind::kTiles) {
    for (std::size_t axis = 0; axis < 3; ++axis)
      tile[axis] = std::min(order.tile[axis], grid[axis]);
  }
  std::vector<std::int64_t> permutation;
  permutation.reserve(static_cast<std::size_t>(grid[0] * grid[1] * grid[2]));
  for (std::int64_t f0 = 0; f0 < grid[0]; f0 += tile[0]) {
    for (std::int64_t h0 = 0; h0 < grid[1]; h0 += tile[1]) {
      for (std::int64_t w0 = 0; w0 < grid[2]; w0 += tile[2]) {
        for (std::int64_t f = f0; f < std::min(f0 + tile[0], grid[0]); ++f) {
          for (std::int64_t h = h0; h < std::min(h0 + tile[1], grid[1]); ++h) {
            for (std::int64_t w = w0; w < std::min(w0 + tile[2], grid[2]); ++w) {
              permutation.push_back((f * grid[1] + h) * grid[2] + w);
            }
          }
        }
      }
    }
  }
  return permutation;
}

std::vector<std::int64_t> inverse_permutation(const std::vector<std::int64_t>& permutation) {
  std::vector<std::int64_t> inverse(permutation.size(), -1);
  for (std::size_t i = 0; i < permutation.size(); ++i) {
    const std::int64_t target = permutation[i];
    if (target < 0 || target >= static_cast<std::int64_t>(permutation.size()) ||
        inverse[static_cast<std::size_t>(target)] != -1) {
      throw Error(
          fmt::format("permutation must hold every index once, got {} at position {}", target, i));
    }
    inverse[static_cast<std::size_t>(target)] = static_cast<std::int64_t>(i);
  }
  return inverse;
}

}  // namespace sla2::video

// The order in which tokens enter the transformer's blocks: raster, or space-time tiles, so that a
// block of consecutive tokens is a small cube.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace sla2::video {

enum class TokenOrderKind : std::uint8_t { kRaster, kTiles };

struct TokenOrder {
  TokenOrderKind kind = TokenOrderKind::kTiles;
  std::array<std::int64_t, 3> tile{
      4, 4, 4};  // tokens in (frames, height, width); border tiles are cut short
};

/// order[i] is the raster index of the i-th token: tiles in raster order, raster inside each tile.
std::vector<std::int64_t> token_permutation(const TokenOrder& order,
                                            const std::array<std::int64_t, 3>& grid);
std::vector<std::int64_t> inverse_permutation(const std::vector<std::int64_t>& permutation);

}  // namespace sla2::video

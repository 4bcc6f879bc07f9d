// What both stages start from: the modules of every layer, and the attention mass that alpha starts
// at.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "video/attention.h"
#include "video/denoiser.h"
#include "video/weights.h"

namespace sla2::video {

/// Mean attention mass of each block pair, [B, H, M, T] fp32: softmax over the keys, summed over a
/// key block, averaged over the query block (Eq. 7). Memory: one group of query blocks at a time.
torch::Tensor block_attention_mass(const torch::Tensor& q, const torch::Tensor& k,
                                   std::int64_t block_q, std::int64_t block_k);
/// Share of it that the routed blocks hold, [B, H, M]; blocks [B, H, M, L], -1 behind the last.
torch::Tensor routed_mass(const torch::Tensor& mass, const torch::Tensor& blocks);

/// Modules of every layer for these weights, outside any model.
std::vector<sla2::nn::Attention> make_attention(const Sla2Weights& weights, const WanConfig& config,
                                                const torch::Device& device);
/// Start values for a model at its card's size (or the given grid): config, tiles, all layers.
Sla2Weights start_weights(const Denoiser& denoiser, const Config& config, const TokenOrder& order);
/// "blocks.{layer}.attn1": where a layer's weights lie.
[[nodiscard]] std::string module_path(std::int64_t layer);

}  // namespace sla2::video

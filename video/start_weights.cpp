#include "video/start_weights.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

namespace sla2::video {

using torch::Tensor;

std::string module_path(std::int64_t layer) { return fmt::format("blocks.{}.attn1", layer); }

Tensor block_attention_mass(const Tensor& q, const Tensor& k, std::int64_t block_q,
                            std::int64_t block_k) {
  const torch::NoGradGuard no_grad;
  const std::int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  const std::int64_t rows = (queries + block_q - 1) / block_q;
  const std::int64_t columns = (keys + block_k - 1) / block_k;
  const double scale = 1 / std::sqrt(static_cast<double>(q.size(3)));
  Tensor mass = torch::empty({batch, heads, rows, columns}, q.options().dtype(torch::kFloat32));
  const Tensor keys_t = k.to(torch::kFloat32).repeat_interleave(heads / k.size(1), 1);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t begin = row * block_q, end = std::min(queries, begin + block_q);
    const Tensor scores =
        torch::matmul(q.slice(2, begin, end).to(torch::kFloat32), keys_t.transpose(2, 3)) * scale;
    Tensor weights = torch::softmax(scores, -1).mean(2);  // [B, H, keys]
    weights = torch::constant_pad_nd(weights, {0, columns * block_k - keys});
    mass.select(2, row).copy_(weights.view({batch, heads, columns, block_k}).sum(-1));
  }
  return mass;
}

Tensor routed_mass(const Tensor& mass, const Tensor& blocks) {
  const Tensor held = mass.gather(3, blocks.clamp_min(0).to(torch::kInt64));
  return (held * (blocks >= 0)).sum(-1);
}

std::vector<sla2::nn::Attention> make_attention(const Sla2Weights& weights, const WanConfig& config,
                                                const torch::Device& device) {
  const torch::NoGradGuard no_grad;
  std::vector<sla2::nn::Attention> modules;
  sla2::nn::AttentionOptions options;
  options.num_heads = config.num_attention_heads;
  options.head_dim = config.attention_head_dim;
  options.seq_len = weights.grid[0] * weights.grid[1] * weights.grid[2];
  options.config = weights.config;
  options.router = weights.router;
  options.alpha = weights.alpha;
  for (std::int64_t i = 0; i < config.num_layers; ++i) {
    sla2::nn::Attention module(options);
    module->to(device);
    const auto fill = [&](const char* name, Tensor& tensor) {
      const auto found = weights.tensors.find(module_path(i) + "." + name);
      if (found != weights.tensors.end()) tensor.copy_(found->second);
    };
    fill("proj_q", module->proj_q);
    fill("proj_k", module->proj_k);
    fill("alpha_logit", module->alpha_logit);
    fill("proj_out", module->proj_out);
    modules.push_back(module);
  }
  return modules;
}

Sla2Weights start_weights(const Denoiser& denoiser, const Config& config, const TokenOrder& order) {
  Sla2Weights weights;
  weights.config = config;
  weights.order = order;
  const ModelCard& card = denoiser.card;
  weights.grid = denoiser.transformer->grid(card.frames, card.height, card.width);
  for (std::int64_t i = 0; i < denoiser.transformer->config().num_layers; ++i) {
    weights.layers.push_back(module_path(i));
  }
  return weights;
}

}  // namespace sla2::video

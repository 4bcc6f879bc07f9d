// The parts of Wan's transformer: attention, feed-forward, condition embedder, block. Names of the
// submodules are those of diffusers' weights.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "video/affine.h"
#include "video/attention.h"
#include "video/wan_transformer.h"

namespace sla2::video {

/// Layers and whether all their outputs were finite, as tensors on the device: reading them waits
/// for the device, so nobody does before somebody asks.
using FiniteLog = std::vector<std::pair<std::string, torch::Tensor>>;

/// Who watches one forward of one block; null: nobody.
struct BlockWatch {
  std::int64_t layer = 0;
  const SelfAttentionObserver* observer = nullptr;
  FiniteLog* finite = nullptr;

  /// Logs blocks.{layer}.{part}.
  void check(const char* part, const torch::Tensor& out) const;
};

/// Layer norm over the last dimension, computed and returned in fp32; weight and bias may be
/// undefined.
torch::Tensor layer_norm_fp32(const torch::Tensor& x, double eps, const torch::Tensor& weight = {},
                              const torch::Tensor& bias = {});
/// norm(x) * (1 + scale) + shift in fp32, then x's type; scale and shift [B, 1, dim] fp32.
torch::Tensor modulated_norm(const torch::Tensor& x, const torch::Tensor& scale,
                             const torch::Tensor& shift, double eps);

/// RMS norm over all heads together: its weight is all it owns.
class RmsNormImpl : public torch::nn::Module {
 public:
  RmsNormImpl(std::int64_t dim, double eps);
  torch::Tensor forward(const torch::Tensor& x);  // any float type -> fp32

 private:
  double eps_;
  torch::Tensor weight_;  // [dim]
};
TORCH_MODULE(RmsNorm);

class WanAttentionImpl : public torch::nn::Module {
 public:
  WanAttentionImpl(const WanConfig& config, Fill fill);
  /// x [B, N, dim], rotary [N, 1, D / 2] -> [B, N, dim].
  torch::Tensor self_attention(const torch::Tensor& x, const torch::Tensor& rotary,
                               const BlockWatch& watch);
  /// x [B, N, dim], text [B, L, dim] -> [B, N, dim].
  torch::Tensor cross_attention(const torch::Tensor& x, const torch::Tensor& text);

  void set_sparse(const sla2::nn::Attention& attention);
  [[nodiscard]] const sla2::nn::Attention& sparse() const { return sparse_; }

 private:
  /// [B, N, dim] -> [B, N, H, D].
  [[nodiscard]] torch::Tensor split_heads(const torch::Tensor& x) const;
  torch::Tensor project_out(const torch::Tensor& heads);

  std::int64_t num_heads_;
  Affine to_q_{nullptr}, to_k_{nullptr}, to_v_{nullptr};
  torch::nn::ModuleList to_out_;
  RmsNorm norm_q_{nullptr}, norm_k_{nullptr};
  sla2::nn::Attention sparse_{nullptr};
};
TORCH_MODULE(WanAttention);

class WanBlockImpl : public torch::nn::Module {
 public:
  WanBlockImpl(const WanConfig& config, Fill fill);
  /// x [B, N, dim], text [B, L, dim], modulation [B, 6, dim], rotary [N, 1, D / 2] -> [B, N, dim].
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& text,
                        const torch::Tensor& modulation, const torch::Tensor& rotary,
                        const BlockWatch& watch);
  WanAttention attn1{nullptr};

 private:
  double eps_;
  WanAttention attn2_{nullptr};
  torch::nn::LayerNorm norm2_{nullptr};  // empty without cross_attn_norm
  Affine ffn_in_{nullptr}, ffn_out_{nullptr};
  torch::Tensor scale_shift_table_;  // [1, 6, dim]
};
TORCH_MODULE(WanBlock);

class ConditionEmbedderImpl : public torch::nn::Module {
 public:
  ConditionEmbedderImpl(const WanConfig& config, Fill fill);
  /// timestep [B] -> (embedding [B, dim], modulation [B, 6, dim]), outside autocast, as Wan's own
  /// code.
  std::pair<torch::Tensor, torch::Tensor> embed_time(const torch::Tensor& timestep);
  /// [B, L, text_dim] -> [B, L, dim].
  torch::Tensor embed_text(const torch::Tensor& text);

 private:
  std::int64_t freq_dim_;
  Affine time_in_{nullptr}, time_out_{nullptr}, time_proj_{nullptr};
  Affine text_in_{nullptr}, text_out_{nullptr};
};
TORCH_MODULE(ConditionEmbedder);

}  // namespace sla2::video

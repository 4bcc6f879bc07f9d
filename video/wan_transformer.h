// Wan2.1's text-to-video transformer (diffusers' WanTransformer3DModel, same names of weights),
// with self-attention in three methods: full, SLA2, SLA.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "io/model_files.h"
#include "video/affine.h"
#include "video/attention.h"
#include "video/token_order.h"

namespace sla2::video {

using io::WanConfig;

/// Sees q, k, v [B, H, N, D] (after norm and rotary embedding, in token order) of one layer's
/// self-attention, before it runs; stage 1 trains each layer inside it. What it returns, if
/// defined, is taken for the layer's attention [B, H, N, D]: who computed it need not see it
/// computed again.
using SelfAttentionObserver = std::function<torch::Tensor(
    std::int64_t layer, const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v)>;

class WanTransformerImpl : public torch::nn::Module {
 public:
  explicit WanTransformerImpl(const WanConfig& config, Fill fill = Fill::kRandom);

  /// x [B, C, F, H, W], timestep [B] in [0, 1000], text [B, L, text_dim] -> [B, out_channels, F, H,
  /// W].
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& timestep,
                        const torch::Tensor& text);

  [[nodiscard]] const WanConfig& config() const;
  /// Tokens (F', H', W') of an input of this size.
  [[nodiscard]] std::array<std::int64_t, 3> grid(std::int64_t frames, std::int64_t height,
                                                 std::int64_t width) const;

  /// One nn::Attention per self-attention replaces full attention (methods sla2 and sla); an empty
  /// holder: full attention in that layer. Registered as blocks.{i}.attn1.sla2 but kept out of the
  /// transformer's own state (see weights.h).
  void set_attention(std::int64_t layer, sla2::nn::Attention attention);
  [[nodiscard]] sla2::nn::Attention attention(std::int64_t layer) const;
  void set_token_order(const TokenOrder& order);
  void set_observer(SelfAttentionObserver observer);
  void set_activation_checkpointing(bool on);
  /// First layer whose output held NaN or Inf in the last forward with checking on, if any.
  void set_check_finite(bool on);
  [[nodiscard]] std::optional<std::string> first_non_finite_layer() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};
TORCH_MODULE(WanTransformer);

}  // namespace sla2::video

// A transformer together with what its inputs and outputs mean: text, prediction, sizes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "video/data.h"
#include "video/flow.h"
#include "video/wan_transformer.h"
#include "video/weights.h"

namespace sla2::video {

/// The model of a `--model` folder. `card.caption_table` lies on the transformer's device.
struct Denoiser {
  WanTransformer transformer{nullptr};
  ModelCard card;  // defaults, prediction "velocity" and no captions for Wan's own weights
  bool has_card = false;

  [[nodiscard]] torch::Device device() const;
  [[nodiscard]] Prediction prediction() const { return prediction_from(card.prediction); }
  /// Shape of one sample, [C, F, H, W].
  [[nodiscard]] std::vector<std::int64_t> sample_shape() const;
  /// Rows of the caption table for these names. Throws sla2::Error listing the known names.
  [[nodiscard]] std::int64_t caption_row(const std::string& name) const;
  [[nodiscard]] std::int64_t no_caption_row() const;
  /// Text [B, L, text_dim] of table rows; differentiable in the table.
  [[nodiscard]] torch::Tensor text_of_rows(const std::vector<std::int64_t>& rows) const;
  /// Velocity at x_t [B, C, F, H, W], t [B] (fp32), text [B, L, text_dim].
  torch::Tensor velocity(const torch::Tensor& x_t, const torch::Tensor& t,
                         const torch::Tensor& text);
};

/// Loads MODEL and, if given, the SLA2 weights of `sla2` (whose transformer/ replaces the model's
/// weights when it is there). `progress` may be null. Throws sla2::Error.
Denoiser load_denoiser(const std::filesystem::path& model, const torch::Device& device,
                       const std::optional<std::filesystem::path>& sla2 = std::nullopt,
                       Progress* progress = nullptr);

/// The model's view of one batch: timesteps, noise and caption dropout are drawn from (seed, step,
/// micro). Clips whose name is not in the table go without a caption.
struct DiffusionPass {
  torch::Tensor x, noise, t;  // [B, C, F, H, W], the same, [B]
  torch::Tensor output;       // of the model, [B, C, F, H, W] fp32
  /// The clean sample that the output stands for.
  [[nodiscard]] torch::Tensor denoised(Prediction prediction) const;
};
DiffusionPass diffusion_pass(Denoiser& denoiser, const Dataset& dataset, const Batch& batch,
                             const FlowOptions& options, std::int64_t seed, std::int64_t step,
                             std::int64_t micro = 0);
/// Its flow_loss, a scalar.
torch::Tensor diffusion_loss(Denoiser& denoiser, const Dataset& dataset, const Batch& batch,
                             const FlowOptions& options, std::int64_t seed, std::int64_t step,
                             std::int64_t micro = 0);

/// The first layer whose output in that pass is NaN or Inf; "" if none is.
std::string first_broken_layer(Denoiser& denoiser, const Dataset& dataset, const Batch& batch,
                               const FlowOptions& options, std::int64_t seed, std::int64_t step);

}  // namespace sla2::video

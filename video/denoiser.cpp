#include "video/denoiser.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "sla2/error.h"

namespace sla2::video {

namespace fs = std::filesystem;

torch::Device Denoiser::device() const { return transformer->parameters().front().device(); }

std::vector<std::int64_t> Denoiser::sample_shape() const {
  return {transformer->config().in_channels, card.frames, card.height, card.width};
}

std::int64_t Denoiser::caption_row(const std::string& name) const {
  const auto found = std::find(card.captions.begin(), card.captions.end(), name);
  if (found == card.captions.end()) {
    throw Error(fmt::format("prompt must be one of the model's captions ({}), got \"{}\"",
                            fmt::join(card.captions, ", "), name));
  }
  return found - card.captions.begin();
}

std::int64_t Denoiser::no_caption_row() const {
  return static_cast<std::int64_t>(card.captions.size());
}

torch::Tensor Denoiser::text_of_rows(const std::vector<std::int64_t>& rows) const {
  if (!card.caption_table.defined()) {
    throw Error("this model has no caption table: give text embeddings from a file");
  }
  return card.caption_table.index_select(
      0, torch::tensor(rows, torch::kInt64).to(card.caption_table.device()));
}

torch::Tensor Denoiser::velocity(const torch::Tensor& x_t, const torch::Tensor& t,
                                 const torch::Tensor& text) {
  const torch::Tensor output = transformer->forward(x_t, t * 1000.0, text).to(torch::kFloat32);
  // The sampler's last timesteps may be under the training's t_min: exact division there.
  return to_velocity(output, x_t, t, prediction(), /*t_min=*/1e-4);
}

Denoiser load_denoiser(const fs::path& model, const torch::Device& device,
                       const std::optional<fs::path>& sla2, Progress* progress) {
  Denoiser denoiser;
  fs::path weights = model;
  std::error_code error;
  if (sla2 && fs::exists(*sla2 / "transformer" / "config.json", error)) {
    weights = *sla2 / "transformer";
    check_same_save(*sla2);
  }
  denoiser.transformer = load_transformer(weights, torch::kFloat32, progress);
  const fs::path card = has_model_card(weights) ? weights : model;
  denoiser.has_card = has_model_card(card);
  if (denoiser.has_card) {
    denoiser.card = load_model_card(card);
    prediction_from(denoiser.card.prediction);
  } else {
    denoiser.card.prediction = "velocity";
  }
  if (sla2) {
    const Sla2Weights loaded = load_sla2(*sla2);
    try {
      apply_sla2(denoiser.transformer, loaded);
    } catch (const Error& error) {  // they do not fit the model
      throw Error(error.kind(), fmt::format("{}: {}", sla2->string(), error.what()));
    }
  }
  denoiser.transformer->to(device);
  if (denoiser.card.caption_table.defined()) {
    denoiser.card.caption_table = denoiser.card.caption_table.to(device, torch::kFloat32);
    const torch::Tensor& table = denoiser.card.caption_table;
    if (table.dim() != 3 || table.size(0) != denoiser.no_caption_row() + 1 ||
        table.size(2) != denoiser.transformer->config().text_dim) {
      throw Error(fmt::format("{}: caption table must be [{}, L, {}], got {}", card.string(),
                              denoiser.no_caption_row() + 1,
                              denoiser.transformer->config().text_dim,
                              fmt::join(table.sizes(), " x ")));
    }
  }
  return denoiser;
}

torch::Tensor DiffusionPass::denoised(Prediction prediction) const {
  if (prediction == Prediction::kX) return output;
  const torch::Tensor level = t.to(torch::kFloat32).view({-1, 1, 1, 1, 1});
  return add_noise(x, noise, t) - level * output;
}

DiffusionPass diffusion_pass(Denoiser& denoiser, const Dataset& dataset, const Batch& batch,
                             const FlowOptions& options, std::int64_t seed, std::int64_t step,
                             std::int64_t micro) {
  const torch::Device device = denoiser.device();
  const torch::Tensor x = to_model_input(batch, device);
  const std::int64_t count = x.size(0);
  // Small draws come from the CPU on every device; the noise is drawn where it is used.
  const std::int64_t draw = static_cast<std::int64_t>(mix(step, micro));
  const torch::Tensor t =
      sample_timesteps(count, options, make_generator(torch::kCPU, seed, kStreamTimesteps, draw))
          .to(device, true);
  const torch::Tensor noise =
      torch::randn(x.sizes(), make_generator(device, seed, kStreamNoise, draw), x.options());
  torch::Tensor text;
  if (batch.text.defined()) {
    text = batch.text.to(device, true);
  } else {
    const torch::Tensor dropped =
        torch::rand({count}, make_generator(torch::kCPU, seed, kStreamCaptions, draw));
    std::vector<std::int64_t> rows;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::string& name =
          dataset.names()[static_cast<std::size_t>(batch.clip[static_cast<std::size_t>(i)])];
      const auto& captions = denoiser.card.captions;
      const auto found = std::find(captions.begin(), captions.end(), name);
      const bool drop = dropped[i].item<double>() < options.caption_dropout;
      rows.push_back(drop ? denoiser.no_caption_row() : found - captions.begin());
    }
    text = denoiser.text_of_rows(rows);
  }
  const torch::Tensor x_t = add_noise(x, noise, t);
  const torch::Tensor output =
      denoiser.transformer->forward(x_t, t * 1000.0, text).to(torch::kFloat32);
  return {x, noise, t, output};
}

torch::Tensor diffusion_loss(Denoiser& denoiser, const Dataset& dataset, const Batch& batch,
                             const FlowOptions& options, std::int64_t seed, std::int64_t step,
                             std::int64_t micro) {
  const DiffusionPass pass = diffusion_pass(denoiser, dataset, batch, options, seed, step, micro);
  return flow_loss(pass.output, pass.x, pass.noise, pass.t, options);
}

std::string first_broken_layer(Denoiser& denoiser, const Dataset& dataset, const Batch& batch,
                               const FlowOptions& options, std::int64_t seed, std::int64_t step) {
  const torch::NoGradGuard no_grad;
  denoiser.transformer->set_check_finite(true);
  diffusion_pass(denoiser, dataset, batch, options, seed, step);
  const auto layer = denoiser.transformer->first_non_finite_layer();
  denoiser.transformer->set_check_finite(false);
  return layer.value_or("");
}

}  // namespace sla2::video

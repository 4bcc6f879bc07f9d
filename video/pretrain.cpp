#include "video/pretrain.h"

#include <algorithm>

#include <fmt/format.h>

#include "sla2/error.h"

namespace sla2::video {

namespace {

void check_sizes(const PretrainOptions& options) {
  const std::array<std::int64_t, 3> size{options.data.frames, options.data.height,
                                         options.data.width};
  const char* names[] = {"frames", "height", "width"};
  for (std::size_t i = 0; i < 3; ++i) {
    if (size[i] % options.model.patch_size[i] != 0) {
      throw Error(fmt::format("{} must be a multiple of the patch's {}, got {}", names[i],
                              options.model.patch_size[i], size[i]));
    }
  }
}

std::vector<std::string> captions_of(const Dataset& dataset) {
  std::vector<std::string> names = dataset.names();
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  return names;
}

/// The model that training goes on from: what it predicts and its captions stay.
Denoiser known_denoiser(const PretrainOptions& options, const Dataset& dataset, const Run& run) {
  Denoiser denoiser = load_denoiser(options.from, run.device, std::nullopt, &run.progress);
  const std::string where = options.from.string();
  if (!denoiser.has_card) {
    throw Error(
        fmt::format("{}: has no model_card.json: pretraining goes on from a pixel-space "
                    "model of `sla2 pretrain`",
                    where));
  }
  if (denoiser.prediction() != options.flow.prediction) {
    throw Error(
        fmt::format("prediction must be that of {}, \"{}\"", where, denoiser.card.prediction));
  }
  for (const std::string& name : captions_of(dataset)) {
    static_cast<void>(denoiser.caption_row(name));  // names the captions that there are
  }
  return denoiser;
}

Denoiser new_denoiser(const PretrainOptions& options, const Dataset& dataset, const Run& run) {
  torch::manual_seed(mix(run.seed, kStreamInit));
  Denoiser denoiser;
  denoiser.has_card = true;
  denoiser.transformer = WanTransformer(options.model);
  denoiser.transformer->to(run.device);
  ModelCard& card = denoiser.card;
  card.prediction = options.flow.prediction == Prediction::kX ? "x" : "velocity";
  card.captions = captions_of(dataset);
  card.caption_table =
      torch::randn({denoiser.no_caption_row() + 1, options.caption_tokens, options.model.text_dim})
          .to(run.device);
  return denoiser;
}

Denoiser make_denoiser(const PretrainOptions& options, const Dataset& dataset, const Run& run) {
  Denoiser denoiser = options.from.empty() ? new_denoiser(options, dataset, run)
                                           : known_denoiser(options, dataset, run);
  denoiser.transformer->set_token_order(options.order);
  denoiser.transformer->set_activation_checkpointing(options.checkpoint_activations);
  denoiser.transformer->train();
  for (torch::Tensor& parameter : denoiser.transformer->parameters()) {
    parameter.set_requires_grad(true);
  }
  ModelCard& card = denoiser.card;
  card.frames = options.data.frames;
  card.height = options.data.height;
  card.width = options.data.width;
  card.fps = options.data.fps;
  card.shift = options.flow.shift;
  card.caption_table.requires_grad_(true);
  return denoiser;
}

}  // namespace

PretrainResult pretrain(const PretrainOptions& options, const std::filesystem::path& out,
                        const nlohmann::json& config, Run& run) {
  check_sizes(options);
  validate(options.train);
  const std::unique_ptr<Dataset> dataset = open_dataset(options.data, run);
  if (dataset->has_latents()) {
    throw Error("data must be video files: pretrain trains a pixel-space model, got latents");
  }
  Denoiser denoiser = make_denoiser(options, *dataset, run);
  PretrainResult result;
  // In the order of the data flow: the trainer names the last one whose gradient is broken.
  std::vector<TrainedParameter> parameters{{"caption_table", denoiser.card.caption_table}};
  for (auto& parameter : trained_parameters(*denoiser.transformer)) {
    parameters.push_back(std::move(parameter));
  }
  for (const auto& parameter : parameters) result.parameters += parameter.value.numel();

  Trainer trainer(std::move(parameters), options.train, out, config);
  if (options.resume) trainer.resume();
  BatchLoader loader(*dataset, {.seed = run.seed,
                                .batch = options.batch,
                                .micro_batches = options.train.accumulation,
                                .first_step = trainer.next_step(),
                                .threads = options.loader_threads,
                                .pinned = run.device.is_cuda()});
  trainer.train(
      [&](std::int64_t step, std::int64_t micro) {
        return diffusion_loss(denoiser, *dataset, loader.at(step, micro), options.flow, run.seed,
                              step, micro);
      },
      run,
      [&](std::int64_t step) {
        return first_broken_layer(denoiser, *dataset, dataset->batch(run.seed, step, options.batch),
                                  options.flow, run.seed, step);
      },
      "pretraining");

  trainer.use_average();
  const torch::NoGradGuard no_grad;
  denoiser.transformer->eval();
  save_transformer(out, denoiser.transformer);
  ModelCard card = denoiser.card;
  card.caption_table = card.caption_table.detach().cpu();
  save_model_card(out, card);
  result.losses = trainer.losses();
  result.clips = dataset->names();
  return result;
}

}  // namespace sla2::video

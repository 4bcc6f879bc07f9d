#include "video/tune.h"

#include <bit>
#include <string>

#include <fmt/format.h>

#include "io/files.h"
#include "sla2/error.h"

namespace sla2::video {

namespace {

/// What stage 2 trains: the transformer without its routers, and each layer's alpha_logit or
/// proj_out. Sets requires_grad accordingly.
std::vector<TrainedParameter> tuned_parameters(WanTransformer& model, const TuneOptions& options) {
  std::vector<TrainedParameter> parameters;
  for (auto& item : model->named_parameters()) {
    if (item.key().find(".sla2.") != std::string::npos) continue;
    item.value().set_requires_grad(true);
    parameters.push_back({item.key(), item.value(), 1.0, item.key().ends_with("weight")});
  }
  for (std::int64_t layer = 0; layer < model->config().num_layers; ++layer) {
    sla2::nn::Attention module = model->attention(layer);
    if (module.is_empty()) continue;
    for (torch::Tensor* router : {&module->proj_q, &module->proj_k}) {
      if (router->defined()) router->set_requires_grad(false);
    }
    const auto train = [&](const char* name, torch::Tensor& tensor, double lr_scale) {
      if (!tensor.defined()) return;
      tensor.set_requires_grad(true);
      parameters.push_back({fmt::format("blocks.{}.attn1.{}", layer, name), tensor, lr_scale});
    };
    train("alpha_logit", module->alpha_logit, options.alpha_lr_scale);
    train("proj_out", module->proj_out, options.proj_out_lr_scale);
  }
  return parameters;
}

/// The same for the same training, another one for any other.
std::string save_name(const std::vector<double>& losses) {
  std::uint64_t state = losses.size();
  for (const double loss : losses) {
    state = mix(static_cast<std::int64_t>(state), std::bit_cast<std::int64_t>(loss));
  }
  return fmt::format("{:016x}", state);
}

}  // namespace

TuneResult tune(Denoiser& denoiser, const Dataset& dataset, const Sla2Weights& weights,
                const TuneOptions& options, Run& run, const std::filesystem::path& folder,
                const nlohmann::json& config, bool resume, const std::string& task) {
  if (options.batch < 1)
    throw Error(fmt::format("batch must be at least 1, got {}", options.batch));
  const auto need_scale = [](const char* name, double value) {
    if (!(value > 0)) throw Error(fmt::format("{} must be above 0, got {}", name, value));
  };
  need_scale("alpha_lr_scale", options.alpha_lr_scale);
  need_scale("proj_out_lr_scale", options.proj_out_lr_scale);
  if (weights.config.routing != RoutingMode::kHard) {
    throw Error("routing must be \"hard\" in stage 2, got \"soft\"");
  }
  io::make_output_folder(folder);
  apply_sla2(denoiser.transformer, weights);
  denoiser.transformer->train();
  Trainer trainer(tuned_parameters(denoiser.transformer, options), options.train, folder, config);
  if (resume && std::filesystem::exists(trainer.checkpoint_path())) trainer.resume();
  BatchLoader loader(dataset, {.seed = run.seed,
                               .batch = options.batch,
                               .micro_batches = options.train.accumulation,
                               .first_step = trainer.next_step()});
  const auto loss = [&](std::int64_t step, std::int64_t micro) {
    return diffusion_loss(denoiser, dataset, loader.at(step, micro), options.flow, run.seed, step,
                          micro);
  };
  const Diagnosis diagnosis = [&](std::int64_t step) {
    return first_broken_layer(denoiser, dataset, dataset.batch(run.seed, step, options.batch),
                              options.flow, run.seed, step);
  };
  trainer.train(loss, run, diagnosis, task);
  if (options.train.ema_decay > 0) trainer.use_average();
  denoiser.transformer->eval();
  TuneResult result{collect_sla2(denoiser.transformer, weights), trainer.losses()};
  // sla2.json comes last: without it there is no result, with it there is all of it.
  const std::string save = save_name(result.losses);
  save_transformer(folder / "transformer", denoiser.transformer, torch::kFloat32,
                   std::int64_t{5} << 30, save);
  if (denoiser.has_card) save_model_card(folder / "transformer", denoiser.card);
  save_sla2(folder, result.weights, save);
  return result;
}

}  // namespace sla2::video

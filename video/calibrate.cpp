#include "video/calibrate.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <numbers>
#include <string>

#include <fmt/format.h>
#include <fmt/ostream.h>

#include "io/config_json.h"
#include "io/files.h"
#include "io/safetensors.h"
#include "sla2/error.h"
#include "video/device.h"

namespace sla2::video {

namespace fs = std::filesystem;
using torch::Tensor;

namespace {

constexpr double kBeta1 = 0.9, kBeta2 = 0.99, kEps = 1e-8;
constexpr double kAlphaFloor = 0.02;

Tensor full_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  return torch::scaled_dot_product_attention(q, k, v);
}

/// Adam over the tensors of one layer; its state lies in the checkpoint.
struct LayerOptimizer {
  struct Entry {
    std::string name;
    Tensor value, first, second;
    double lr;
  };
  std::vector<Entry> entries;
  std::int64_t updates = 0;

  void add(const std::string& name, const Tensor& value, double lr) {
    if (!value.defined()) return;
    entries.push_back({name, value, torch::zeros_like(value), torch::zeros_like(value), lr});
  }
  /// A scalar bool on the device: every gradient is finite.
  [[nodiscard]] Tensor finite_gradients(Tensor finite) const {
    for (const Entry& entry : entries) {
      const Tensor& gradient = entry.value.grad();
      if (gradient.defined()) finite = finite.logical_and(gradient.isfinite().all());
    }
    return finite;
  }
  void step(double lr_scale) {
    const torch::NoGradGuard no_grad;
    ++updates;
    const double correct1 = 1 - std::pow(kBeta1, static_cast<double>(updates));
    const double correct2 = 1 - std::pow(kBeta2, static_cast<double>(updates));
    for (Entry& entry : entries) {
      Tensor& gradient = entry.value.mutable_grad();
      if (!gradient.defined()) continue;
      entry.first.mul_(kBeta1).add_(gradient, 1 - kBeta1);
      entry.second.mul_(kBeta2).addcmul_(gradient, gradient, 1 - kBeta2);
      const Tensor scale = (entry.second / correct2).sqrt_().add_(kEps);
      entry.value.addcdiv_(entry.first, scale, -entry.lr * lr_scale / correct1);
      gradient.reset();
    }
  }
};

/// Takes the observer off the model on every way out.
class ObserverGuard {
 public:
  ObserverGuard(WanTransformer model, SelfAttentionObserver observer) : model_(std::move(model)) {
    model_->set_observer(std::move(observer));
  }
  ~ObserverGuard() { model_->set_observer({}); }
  ObserverGuard(const ObserverGuard&) = delete;
  ObserverGuard& operator=(const ObserverGuard&) = delete;

 private:
  WanTransformer model_;
};

Config config_of(const Config& base, double keep, RoutingMode routing) {
  Config config = base;
  config.keep = keep;
  config.routing = routing;
  return config;
}

/// One job of stage 1.
class Calibration {
 public:
  Calibration(Denoiser& denoiser, const Dataset& dataset, const Sla2Weights& start,
              const CalibrateOptions& options, Run& run, fs::path folder)
      : denoiser_(denoiser),
        dataset_(dataset),
        start_(start),
        options_(options),
        run_(run),
        folder_(std::move(folder)) {
    modules_ = make_attention(start, denoiser.transformer->config(), denoiser.device());
    before_ = torch::zeros({num_layers(), num_keeps()}, torch::kFloat64);
    optimizers_.resize(modules_.size());
    for (std::size_t i = 0; i < modules_.size(); ++i) {
      optimizers_[i].add("proj_q", modules_[i]->proj_q, options.router_lr);
      optimizers_[i].add("proj_k", modules_[i]->proj_k, options.router_lr);
      optimizers_[i].add("alpha_logit", modules_[i]->alpha_logit, options.alpha_lr);
    }
  }

  CalibrateResult run(bool resume);

 private:
  std::int64_t num_layers() const { return static_cast<std::int64_t>(modules_.size()); }
  std::int64_t num_keeps() const { return static_cast<std::int64_t>(options_.keeps.size()); }
  Tensor measure_errors(const std::string& task);
  void start_alpha();
  std::size_t keep_of_step(std::int64_t step) const;
  double lr_scale(std::int64_t step) const;
  void train_step(std::int64_t step);
  [[noreturn]] void fail(std::int64_t step, std::int64_t layer, bool in_loss) const;
  void check_stop(const char* doing) const;
  void save(std::int64_t step);
  std::int64_t load();
  nlohmann::json fingerprint() const;
  std::map<std::string, Tensor> checkpoint_tensors();

  Denoiser& denoiser_;
  const Dataset& dataset_;
  const Sla2Weights& start_;
  const CalibrateOptions& options_;
  Run& run_;
  fs::path folder_;
  std::vector<sla2::nn::Attention> modules_;
  std::vector<LayerOptimizer> optimizers_;
  Tensor before_;            // [layers, keeps] fp64
  std::int64_t saved_ = -1;  // the step of the checkpoint on disk, -1: none
  std::vector<double> losses_;
};

Tensor Calibration::measure_errors(const std::string& task) {
  const torch::NoGradGuard no_grad;
  Tensor wrong = torch::zeros({num_layers(), num_keeps()}, torch::kFloat64);
  Tensor right = torch::zeros({num_layers(), 1}, torch::kFloat64);
  const ObserverGuard guard(denoiser_.transformer, [&](std::int64_t layer, const Tensor& q,
                                                       const Tensor& k, const Tensor& v) {
    const Tensor target = full_attention(q, k, v);
    right[layer][0] += target.to(torch::kFloat64).square().sum().cpu();
    sla2::nn::Attention& module = modules_[static_cast<std::size_t>(layer)];
    for (std::int64_t i = 0; i < num_keeps(); ++i) {
      const double keep = options_.keeps[static_cast<std::size_t>(i)];
      module->options.config = config_of(start_.config, keep, RoutingMode::kHard);
      const Tensor out = module->forward(q, k, v);
      wrong[layer][i] += (out - target).to(torch::kFloat64).square().sum().cpu();
    }
    return target;
  });
  run_.progress.begin(task, options_.held_out_samples);
  for (std::int64_t i = 0; i < options_.held_out_samples; ++i) {
    check_stop(task.c_str());
    // Levels spread over (0, 1), the same ones before and after.
    const double t =
        (static_cast<double>(i) + 0.5) / static_cast<double>(options_.held_out_samples);
    run_sample(denoiser_, dataset_, options_.flow, run_.seed, kStreamEvaluate, i, 1, t);
    run_.progress.update(i + 1);
  }
  run_.progress.end();
  return (wrong / right.clamp_min(1e-30)).sqrt();
}

void Calibration::start_alpha() {
  const torch::NoGradGuard no_grad;
  std::vector<Tensor> sums(modules_.size());
  const ObserverGuard guard(denoiser_.transformer, [&](std::int64_t layer, const Tensor& q,
                                                       const Tensor& k, const Tensor&) {
    const Tensor mass = block_attention_mass(q, k, start_.config.block_q, start_.config.block_k);
    Tensor& sum = sums[static_cast<std::size_t>(layer)];
    for (const double keep : options_.keeps) {
      const Config config = config_of(start_.config, keep, RoutingMode::kHard);
      const Tensor held = routed_mass(mass, sla2::nn::route(q, k, {}, config).blocks).mean(0);
      sum = sum.defined() ? sum + held : held;
    }
    return Tensor();
  });
  run_.progress.begin("where alpha starts", options_.alpha_samples);
  for (std::int64_t i = 0; i < options_.alpha_samples; ++i) {
    check_stop("measuring alpha");
    run_sample(denoiser_, dataset_, options_.flow, run_.seed, kStreamCalibrate, i, 1);
    run_.progress.update(i + 1);
  }
  run_.progress.end();
  const auto count = static_cast<double>(options_.alpha_samples * num_keeps());
  for (std::size_t i = 0; i < modules_.size(); ++i) {
    Tensor mean = sums[i] / count;  // [H, M]
    Tensor& alpha = modules_[i]->alpha_logit;
    if (alpha.size(1) == 1) mean = mean.mean(1, /*keepdim=*/true);
    alpha.copy_(mean.clamp(kAlphaFloor, 1 - kAlphaFloor).logit());
  }
}

std::size_t Calibration::keep_of_step(std::int64_t step) const {
  if (num_keeps() == 1 || step % 2 == 0) return 0;
  return static_cast<std::size_t>(1 + step / 2 % (num_keeps() - 1));
}

double Calibration::lr_scale(std::int64_t step) const {
  const double done = static_cast<double>(step) / static_cast<double>(options_.steps);
  return options_.final_lr +
         (1 - options_.final_lr) * 0.5 * (1 + std::cos(std::numbers::pi * std::min(1.0, done)));
}

void Calibration::train_step(std::int64_t step) {
  const torch::NoGradGuard no_grad;
  const std::vector<double> keeps = options_.schedule == KeepSchedule::kTurns
                                        ? std::vector{options_.keeps[keep_of_step(step)]}
                                        : options_.keeps;
  Tensor total = torch::zeros({}, torch::TensorOptions(denoiser_.device()));
  std::int64_t terms = 0;
  const ObserverGuard guard(denoiser_.transformer, [&](std::int64_t layer, const Tensor& q,
                                                       const Tensor& k, const Tensor& v) {
    const Tensor target = full_attention(q, k, v);
    const auto index = static_cast<std::size_t>(layer);
    for (const double keep : keeps) {
      const torch::AutoGradMode with_grad(true);
      modules_[index]->options.config = config_of(start_.config, keep, RoutingMode::kSoft);
      const Tensor out = modules_[index]->forward(q.detach(), k.detach(), v.detach());
      const Tensor loss = torch::mse_loss(out.to(torch::kFloat32), target.to(torch::kFloat32));
      loss.backward();
      const Tensor good = loss.detach().isfinite();
      if (!optimizers_[index].finite_gradients(good).item<bool>()) {
        fail(step, layer, !good.item<bool>());
      }
      optimizers_[index].step(lr_scale(step));
      total += loss.detach();
      ++terms;
    }
    return target;
  });
  // Behind the samples that alpha was measured on.
  const std::int64_t sample = options_.alpha_samples + step * options_.batch;
  run_sample(denoiser_, dataset_, options_.flow, run_.seed, kStreamCalibrate, sample,
             options_.batch);
  losses_.push_back(total.item<double>() / static_cast<double>(std::max<std::int64_t>(terms, 1)));
}

void Calibration::fail(std::int64_t step, std::int64_t layer, bool in_loss) const {
  throw Error(
      ErrorKind::kRuntime,
      fmt::format("stage 1: NaN or Inf in the {} of step {}, first in layer {}; last good "
                  "checkpoint: {}",
                  in_loss ? "loss" : "gradient", step, module_path(layer),
                  saved_ >= 0 ? (folder_ / "checkpoint.safetensors").string() : "none yet"));
}

void Calibration::check_stop(const char* doing) const {
  if (!run_.stop_requested()) return;
  run_.progress.end();
  throw Interrupted(
      saved_ >= 0 ? fmt::format("interrupted ({}) after step {} of {}; {} is saved, --resume "
                                "continues",
                                doing, saved_, options_.steps,
                                (folder_ / "checkpoint.safetensors").string())
                  : fmt::format("interrupted ({}) before the first step: nothing is saved yet, "
                                "start again without --resume",
                                doing));
}

std::map<std::string, Tensor> Calibration::checkpoint_tensors() {
  std::map<std::string, Tensor> tensors;
  for (std::size_t i = 0; i < optimizers_.size(); ++i) {
    for (LayerOptimizer::Entry& entry : optimizers_[i].entries) {
      const std::string name = module_path(static_cast<std::int64_t>(i)) + "." + entry.name;
      tensors[name] = entry.value;
      tensors[name + ".first"] = entry.first;
      tensors[name + ".second"] = entry.second;
    }
  }
  return tensors;
}

nlohmann::json Calibration::fingerprint() const {
  nlohmann::json print{{"keeps", options_.keeps},
                       {"batch", options_.batch},
                       {"router_lr", options_.router_lr},
                       {"alpha_lr", options_.alpha_lr},
                       {"final_lr", options_.final_lr},
                       {"turns", options_.schedule == KeepSchedule::kTurns},
                       {"alpha_samples", options_.alpha_samples},
                       {"held_out_samples", options_.held_out_samples},
                       {"tokens_in_tiles", start_.order.kind == TokenOrderKind::kTiles},
                       {"tile", start_.order.tile},
                       {"grid", start_.grid},
                       {"router_per_head", start_.router == sla2::nn::RouterShape::kHead},
                       {"alpha_per_head", start_.alpha == sla2::nn::AlphaShape::kHead},
                       {"layers", num_layers()},
                       {"seed", run_.seed}};
  print.update(io::to_json(start_.config));
  print.update(options_.identity);
  return print;
}

void Calibration::save(std::int64_t step) {
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, tensor] : checkpoint_tensors()) tensors[name] = tensor.detach().cpu();
  tensors["error_before"] = before_;
  tensors["losses"] = torch::tensor(losses_, torch::kFloat64);
  save_tensors(folder_ / "checkpoint.safetensors", tensors,
               {{"updates", std::to_string(optimizers_.front().updates)},
                {"step", std::to_string(step)},
                {"options", fingerprint().dump()}});
  saved_ = step;
}

std::int64_t Calibration::load() {
  const fs::path path = folder_ / "checkpoint.safetensors";
  const io::SafetensorsFile file(path);
  const auto text = [&](const char* key) {
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end()) {
      throw Error(fmt::format("{}: not a checkpoint of stage 1: no \"{}\"", path.string(), key));
    }
    return found->second;
  };
  const nlohmann::json options = io::parse_json(text("options"), path.string());
  const nlohmann::json wanted = fingerprint();
  for (const auto& [key, value] : wanted.items()) {
    const nlohmann::json was = options.is_object() ? options.value(key, nlohmann::json()) : options;
    if (was == value) continue;
    throw Error(fmt::format("--resume: {} must be {} as in {}, got {}", key, was.dump(),
                            path.string(), value.dump()));
  }
  std::map<std::string, Tensor> saved = load_tensors(path);
  const torch::NoGradGuard no_grad;
  const auto number = [&](const char* key) {
    const std::string value = text(key);
    std::int64_t number = -1;
    const auto [end, error] =
        std::from_chars(value.data(), value.data() + value.size(), number, 10);
    if (error != std::errc{} || end != value.data() + value.size() || number < 0) {
      throw Error(fmt::format("{}: \"{}\" must be a count, got \"{}\"", path.string(), key, value));
    }
    return number;
  };
  const auto take = [&](const std::string& name, at::IntArrayRef shape) {
    const auto found = saved.find(name);
    if (found == saved.end()) throw Error(fmt::format("{}: no tensor {}", path.string(), name));
    if (found->second.sizes() != shape) {
      throw Error(fmt::format("{}: {} must have the shape {}, got {}", path.string(), name,
                              fmt::streamed(shape), fmt::streamed(found->second.sizes())));
    }
    return found->second;
  };
  const std::int64_t step = number("step"), updates = number("updates");
  const Tensor losses = take("losses", {step}).to(torch::kFloat64).contiguous();
  const Tensor before = take("error_before", before_.sizes());
  const auto current = checkpoint_tensors();
  for (const auto& [name, tensor] : current) take(name, tensor.sizes());
  for (const auto& [name, tensor] : current) Tensor(tensor).copy_(saved.at(name));
  before_.copy_(before);
  losses_.assign(losses.data_ptr<double>(), losses.data_ptr<double>() + losses.numel());
  for (LayerOptimizer& optimizer : optimizers_) optimizer.updates = updates;
  saved_ = step;
  return step;
}

CalibrateResult Calibration::run(bool resume) {
  io::make_output_folder(folder_);
  const bool trains = start_.config.method == Method::kSla2;
  std::int64_t step = 0;
  if (trains && resume && fs::exists(folder_ / "checkpoint.safetensors")) {
    step = load();
  } else {
    before_ = measure_errors("attention error before");
    if (trains) start_alpha();
  }
  Tensor after = before_;
  if (trains) {
    run_.progress.begin("stage 1: router and alpha", options_.steps, step);
    for (; step < options_.steps; ++step) {
      if (run_.stop_requested()) {
        save(step);
        check_stop("stage 1");
      }
      train_step(step);
      run_.progress.update(step + 1, losses_.back());
      if ((step + 1) % options_.checkpoint_every == 0 || step + 1 == options_.steps) save(step + 1);
    }
    run_.progress.end();
    after = measure_errors("attention error after");
  }
  CalibrateResult result;
  result.weights = start_;
  result.weights.keeps = options_.keeps;
  result.weights.tensors.clear();
  for (std::int64_t i = 0; i < num_layers(); ++i) {
    const sla2::nn::Attention& module = modules_[static_cast<std::size_t>(i)];
    const auto put = [&](const char* name, const Tensor& tensor) {
      if (tensor.defined()) {
        result.weights.tensors[module_path(i) + "." + name] = tensor.detach().cpu().clone();
      }
    };
    put("proj_q", module->proj_q);
    put("proj_k", module->proj_k);
    put("alpha_logit", module->alpha_logit);
    put("proj_out", module->proj_out);
    for (std::int64_t j = 0; j < num_keeps(); ++j) {
      result.errors.push_back({i, options_.keeps[static_cast<std::size_t>(j)],
                               before_[i][j].item<double>(), after[i][j].item<double>()});
    }
  }
  result.losses = losses_;
  for (std::size_t i = 0; i < losses_.size(); ++i) {
    result.step_keeps.push_back(options_.schedule == KeepSchedule::kTurns
                                    ? options_.keeps[keep_of_step(static_cast<std::int64_t>(i))]
                                    : 0.0);
  }
  return result;
}

}  // namespace

void validate(const CalibrateOptions& options) {
  const auto need = [](bool good, const char* rule, auto value) {
    if (!good) throw Error(fmt::format("{}, got {}", rule, value));
  };
  need(!options.keeps.empty(), "keeps must hold at least one value", 0);
  for (const double keep : options.keeps) {
    need(keep > 0 && keep <= 1, "keeps must be in (0, 1]", keep);
  }
  need(options.steps >= 1, "steps must be at least 1", options.steps);
  need(options.batch >= 1, "batch must be at least 1", options.batch);
  need(options.router_lr > 0 && options.router_lr <= 1, "router_lr must be in (0, 1]",
       options.router_lr);
  need(options.alpha_lr > 0 && options.alpha_lr <= 1, "alpha_lr must be in (0, 1]",
       options.alpha_lr);
  need(options.final_lr >= 0 && options.final_lr <= 1, "final_lr must be in [0, 1]",
       options.final_lr);
  need(options.alpha_samples >= 1, "alpha_samples must be at least 1", options.alpha_samples);
  need(options.held_out_samples >= 1, "held_out_samples must be at least 1",
       options.held_out_samples);
  need(options.checkpoint_every >= 1, "checkpoint_every must be at least 1",
       options.checkpoint_every);
}

void run_sample(Denoiser& denoiser, const Dataset& dataset, const FlowOptions& flow,
                std::int64_t seed, std::int64_t stream, std::int64_t index, std::int64_t count,
                double t) {
  const torch::NoGradGuard no_grad;
  const torch::Device device = denoiser.device();
  const auto data_seed = static_cast<std::int64_t>(mix(seed, stream) >> 1);
  const Batch batch = dataset.batch(data_seed, index, count);
  const Tensor x = to_model_input(batch, device);
  const at::Generator generator = make_generator(torch::kCPU, data_seed, kStreamNoise, index);
  const Tensor noise =
      torch::randn(x.sizes(), generator, torch::TensorOptions(torch::kFloat32)).to(device);
  const Tensor level =
      t >= 0 ? torch::full({count}, t, torch::kFloat32) : sample_timesteps(count, flow, generator);
  Tensor text = batch.text;
  if (!text.defined()) {
    std::vector<std::int64_t> rows;
    for (const std::int64_t clip : batch.clip) {
      const std::string& name = dataset.names()[static_cast<std::size_t>(clip)];
      const auto& captions = denoiser.card.captions;
      const bool known = std::find(captions.begin(), captions.end(), name) != captions.end();
      rows.push_back(known ? denoiser.caption_row(name) : denoiser.no_caption_row());
    }
    text = denoiser.text_of_rows(rows);
  }
  const Tensor on_device = level.to(device);
  const Autocast autocast(device, true);
  denoiser.velocity(add_noise(x, noise, on_device), on_device, text.to(device));
}

nlohmann::json to_json(const std::vector<LayerError>& errors) {
  nlohmann::json list = nlohmann::json::array();
  for (const LayerError& error : errors) {
    list.push_back({{"layer", error.layer},
                    {"keep", error.keep},
                    {"error_before", error.before},
                    {"error_after", error.after}});
  }
  return list;
}

CalibrateResult calibrate(Denoiser& denoiser, const Dataset& dataset, const Sla2Weights& start,
                          const CalibrateOptions& options, Run& run, const fs::path& folder,
                          bool resume) {
  validate(options);
  validate(start.config);
  remove_sla2(denoiser.transformer);
  denoiser.transformer->set_token_order(start.order);
  denoiser.transformer->eval();
  Calibration job(denoiser, dataset, start, options, run, folder);
  return job.run(resume);
}

}  // namespace sla2::video

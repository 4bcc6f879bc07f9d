#include "video/trainer.h"

#include <chrono>
#include <cmath>
#include <fstream>
#include <optional>
#include <sstream>

#include <fmt/format.h>

#include "io/config_json.h"
#include "io/files.h"
#include "io/safetensors.h"
#include "sla2/error.h"
#include "video/device.h"
#include "video/optimizer.h"
#include "video/weights.h"

namespace sla2::video {

namespace fs = std::filesystem;

void validate(const TrainOptions& options) {
  const auto need = [](bool good, const char* rule, auto value) {
    if (!good) throw Error(fmt::format("{}, got {}", rule, value));
  };
  need(options.steps >= 1, "steps must be at least 1", options.steps);
  need(options.lr > 0 && options.lr <= 10, "lr must be in (0, 10]", options.lr);
  need(options.warmup >= 0, "warmup must be at least 0", options.warmup);
  need(options.final_lr >= 0 && options.final_lr <= 1, "final_lr must be in [0, 1]",
       options.final_lr);
  need(options.beta1 >= 0 && options.beta1 < 1, "beta1 must be in [0, 1)", options.beta1);
  need(options.beta2 >= 0 && options.beta2 < 1, "beta2 must be in [0, 1)", options.beta2);
  need(options.weight_decay >= 0, "weight_decay must be at least 0", options.weight_decay);
  need(options.clip_norm >= 0, "clip_norm must be at least 0", options.clip_norm);
  need(options.ema_decay >= 0 && options.ema_decay < 1, "ema_decay must be in [0, 1)",
       options.ema_decay);
  need(options.accumulation >= 1, "accumulation must be at least 1", options.accumulation);
  need(options.checkpoint_every >= 1, "checkpoint_every must be at least 1",
       options.checkpoint_every);
  need(options.log_every >= 1, "log_every must be at least 1", options.log_every);
}

std::vector<TrainedParameter> trained_parameters(const torch::nn::Module& module,
                                                 const std::string& prefix) {
  std::vector<TrainedParameter> parameters;
  for (const auto& item : module.named_parameters()) {
    if (!item.value().requires_grad()) continue;
    // Tables are no matrices, whatever their shape.
    parameters.push_back({prefix + item.key(), item.value(), 1.0, item.key().ends_with("weight")});
  }
  return parameters;
}

struct Trainer::State {
  std::vector<TrainedParameter> parameters;
  TrainOptions options;
  fs::path folder;
  nlohmann::json config;
  Optimizer optimizer;
  torch::Device device;
  std::int64_t next = 0;    // the next step to run
  std::int64_t saved = -1;  // the step of the checkpoint on disk, -1: none
  bool averaged = false;
  std::vector<double> losses;                                // of checked steps
  std::vector<torch::Tensor> pending_losses, pending_norms;  // scalars on the device
  std::vector<std::string> pending_seconds;
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();

  State(std::vector<TrainedParameter> trained, const TrainOptions& train_options, fs::path out,
        nlohmann::json effective)
      : parameters(std::move(trained)),
        options(train_options),
        folder(std::move(out)),
        config(std::move(effective)),
        optimizer(parameters, options),
        device(parameters.front().value.device()) {}

  fs::path log_path() const { return folder / "losses.jsonl"; }
  fs::path checkpoint() const { return folder / "checkpoint.safetensors"; }
  void run_step(const LossFunction& loss);
  void flush(const Diagnosis& diagnosis);
  void save();
  [[noreturn]] void fail(std::int64_t step, double loss, const Diagnosis& diagnosis);
  void check_config(const std::string& saved_text) const;
  void trim_log() const;
};

Trainer::Trainer(std::vector<TrainedParameter> parameters, const TrainOptions& options,
                 fs::path folder, nlohmann::json config) {
  validate(options);
  if (parameters.empty()) throw Error("parameters must hold at least one tensor, got none");
  io::make_output_folder(folder);
  state_ =
      std::make_unique<State>(std::move(parameters), options, std::move(folder), std::move(config));
}

Trainer::~Trainer() = default;

void Trainer::State::run_step(const LossFunction& loss) {
  torch::Tensor total;
  for (std::int64_t micro = 0; micro < options.accumulation; ++micro) {
    torch::Tensor value;
    {
      const Autocast autocast(device, options.bf16);
      value = loss(next, micro);
    }
    value = value.to(torch::kFloat32) / static_cast<double>(options.accumulation);
    value.backward();
    total = total.defined() ? total + value.detach() : value.detach();
  }
  optimizer.step(next, total);
  pending_losses.push_back(total);
  pending_norms.push_back(optimizer.gradient_norm());
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
  pending_seconds.push_back(fmt::format("{:.3f}", passed.count()));
  ++next;
}

void Trainer::State::flush(const Diagnosis& diagnosis) {
  if (pending_losses.empty()) return;
  // The one place that waits for the device.
  const torch::Tensor values = torch::cat({torch::stack(pending_losses).to(torch::kFloat64),
                                           torch::stack(pending_norms).to(torch::kFloat64),
                                           optimizer.bad_step().reshape({1})})
                                   .cpu();
  const double* read = values.data_ptr<double>();
  const std::size_t count = pending_losses.size();
  const auto bad = static_cast<std::int64_t>(read[2 * count]);
  const std::int64_t first = next - static_cast<std::int64_t>(count);
  std::ofstream log(log_path(), std::ios::app);
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t step = first + static_cast<std::int64_t>(i);
    if (bad >= 0 && step >= bad) break;
    losses.push_back(read[i]);
    log << fmt::format(
               R"({{"step": {}, "loss": {}, "gradient_norm": {}, "lr": {}, "seconds": {}}})", step,
               read[i], read[count + i], optimizer.learning_rate(step), pending_seconds[i])
        << '\n';
  }
  log.flush();
  if (!log) {
    throw Error(ErrorKind::kRuntime, log_path().string() + ": cannot be written (disk full?)");
  }
  const double bad_loss = bad >= first ? read[bad - first] : 0;
  pending_losses.clear();
  pending_norms.clear();
  pending_seconds.clear();
  if (bad >= 0) fail(bad, bad_loss, diagnosis);
}

void Trainer::State::fail(std::int64_t step, double loss, const Diagnosis& diagnosis) {
  std::string layer = diagnosis ? diagnosis(step) : std::string();
  const auto broken = [](const torch::Tensor& tensor) {
    return tensor.defined() && !tensor.isfinite().all().item<bool>();
  };
  for (const auto& parameter : parameters) {
    if (layer.empty() && broken(parameter.value)) layer = parameter.name;
  }
  // Weights and outputs are finite: the backward pass, which runs from the last parameter to the
  // first, made the number.
  for (auto parameter = parameters.rbegin(); parameter != parameters.rend(); ++parameter) {
    if (layer.empty() && broken(parameter->value.grad())) layer = parameter->name;
  }
  throw Error(
      ErrorKind::kRuntime,
      fmt::format("NaN or Inf in the {} of step {}, first in layer {}; last good checkpoint: {}",
                  std::isfinite(loss) ? "gradient" : "loss", step,
                  layer.empty() ? "unknown" : layer,
                  saved >= 0 ? checkpoint().string() : "none yet"));
}

void Trainer::train(const LossFunction& loss, Run& run, const Diagnosis& diagnosis,
                    const std::string& task) {
  State& state = *state_;
  const TrainOptions& options = state.options;
  const std::int64_t check_every = state.device.is_cuda() ? options.log_every : 1;
  if (state.next == 0) {
    std::error_code ignored;
    fs::remove(state.log_path(), ignored);
  }
  // Gradients of the failed step are made again for the message, with the weights untouched.
  const Diagnosis diagnose = [&](std::int64_t step) {
    std::string layer = diagnosis ? diagnosis(step) : std::string();
    if (layer.empty()) loss(step, 0).backward();
    return layer;
  };
  run.progress.begin(task, options.steps, state.next);
  while (state.next < options.steps) {
    state.run_step(loss);
    const bool last = state.next == options.steps;
    const bool stop = run.stop_requested();
    const bool checkpoint = last || stop || state.next % options.checkpoint_every == 0;
    if (checkpoint || state.next % check_every == 0) {
      state.flush(diagnose);
      run.progress.update(state.next, state.losses.back());
    } else {
      run.progress.update(state.next);
    }
    if (checkpoint) state.save();
    if (stop && !last) {
      run.progress.end();
      throw Interrupted(
          fmt::format("interrupted after step {} of {}; {} is saved, --resume continues",
                      state.next, options.steps, state.checkpoint().string()));
    }
  }
  run.progress.end();
}

void Trainer::State::save() {
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& [name, value] : optimizer.state()) tensors[name] = value.cpu().contiguous();
  tensors["losses"] = torch::tensor(losses, torch::kFloat64);
  tensors["torch_rng"] = at::globalContext().defaultGenerator(torch::kCPU).get_state();
  save_tensors(checkpoint(), tensors,
               {{"format", "sla2 training checkpoint 1"},
                {"step", std::to_string(next)},
                {"config", config.dump()}});
  saved = next;
}

void Trainer::State::check_config(const std::string& saved_text) const {
  const nlohmann::json saved_config = io::parse_json(saved_text, checkpoint().string());
  for (const auto& [key, value] : config.items()) {
    if (key == "steps" || !saved_config.contains(key) || saved_config.at(key) == value) continue;
    throw Error(fmt::format("--resume: {} must be {} as in {}, got {}", key,
                            saved_config.at(key).dump(), checkpoint().string(), value.dump()));
  }
}

void Trainer::State::trim_log() const {
  std::ifstream log(log_path());
  std::ostringstream kept;
  std::string line;
  for (std::int64_t i = 0; i < next && std::getline(log, line); ++i) kept << line << '\n';
  io::write_file(log_path(), std::string_view(kept.str()));
}

std::int64_t Trainer::resume() {
  State& state = *state_;
  const fs::path path = state.checkpoint();
  if (!fs::exists(path)) {
    throw Error(ErrorKind::kRuntime, "--resume needs " + path.string() + ", which does not exist");
  }
  const std::string broken = path.string() + ": not a checkpoint of this model: ";
  const io::SafetensorsFile file(path);
  const auto& metadata = file.metadata();
  if (!metadata.contains("step") || !metadata.contains("config")) throw Error(broken + "no step");
  state.check_config(metadata.at("config"));
  auto tensors = load_tensors(path);
  const auto current = state.optimizer.state();
  for (const auto& [name, value] : current) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw Error(broken + "no tensor " + name);
    if (found->second.sizes() != value.sizes()) throw Error(broken + "another shape of " + name);
  }
  for (const char* name : {"losses", "torch_rng"}) {
    if (!tensors.contains(name)) throw Error(broken + "no tensor " + name);
  }
  const torch::NoGradGuard no_grad;
  for (const auto& [name, value] : current) torch::Tensor(value).copy_(tensors.at(name));
  const torch::Tensor losses = tensors.at("losses").to(torch::kFloat64).contiguous();
  state.losses.assign(losses.data_ptr<double>(), losses.data_ptr<double>() + losses.numel());
  state.next = static_cast<std::int64_t>(state.losses.size());
  if (metadata.at("step") != std::to_string(state.next))
    throw Error(broken + "step and losses differ");
  at::Generator generator = at::globalContext().defaultGenerator(torch::kCPU);
  generator.set_state(tensors.at("torch_rng"));
  state.saved = state.next;
  state.trim_log();
  return state.next;
}

std::int64_t Trainer::next_step() const { return state_->next; }
const std::vector<double>& Trainer::losses() const { return state_->losses; }
fs::path Trainer::checkpoint_path() const { return state_->checkpoint(); }
void Trainer::save_checkpoint() { state_->save(); }

void Trainer::use_average() {
  if (!state_->averaged) state_->optimizer.swap_average();
  state_->averaged = true;
}

void Trainer::use_raw() {
  if (state_->averaged) state_->optimizer.swap_average();
  state_->averaged = false;
}

}  // namespace sla2::video

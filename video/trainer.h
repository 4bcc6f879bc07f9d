// The training loop, generic over what is trained: parameters and a loss by step. Used by pretrain
// and by stage 2 (tune).
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <torch/torch.h>

#include "video/run.h"

namespace sla2::video {

struct TrainOptions {
  std::int64_t steps = 1000;
  double lr = 3e-4;
  std::int64_t warmup = 100;  ///< steps of linear warm-up
  double final_lr = 1.0;      ///< cosine decay to this fraction of lr at the last step; 1: constant
  double beta1 = 0.9, beta2 = 0.99;
  double weight_decay = 0.01;     ///< of matrices: TrainedParameter::decays
  double clip_norm = 1.0;         ///< 0: no clipping
  double ema_decay = 0.999;       ///< 0: no average; ramps up as (1 + step) / (10 + step)
  std::int64_t accumulation = 1;  ///< losses averaged per step
  bool bf16 = true;               ///< autocast on a GPU; the CPU always trains in fp32
  std::int64_t checkpoint_every = 500;
  std::int64_t log_every = 10;  ///< on a GPU also the interval of the finiteness check
};
/// Throws sla2::Error naming the first option out of range.
void validate(const TrainOptions& options);

struct TrainedParameter {
  std::string name;
  torch::Tensor value;    // a leaf that requires grad
  double lr_scale = 1.0;  // times TrainOptions::lr
  bool decays = false;    // weight decay: matrices alone
};

/// All parameters of a module that require grad, by name.
std::vector<TrainedParameter> trained_parameters(const torch::nn::Module& module,
                                                 const std::string& prefix = "");

/// The loss of one micro-batch of one step, a scalar on the device; called with autocast as
/// TrainOptions say. Must be a pure function of (step, micro) and the parameters.
using LossFunction = std::function<torch::Tensor(std::int64_t step, std::int64_t micro)>;
/// Called after a non-finite step, with the weights as they were before it: names the first layer
/// whose output is not finite ("" if unknown).
using Diagnosis = std::function<std::string(std::int64_t step)>;

class Trainer {
 public:
  /// Writes checkpoint.safetensors and losses.jsonl in `folder`. `config` is saved in the
  /// checkpoint; a resume with another value of a key in it is refused (steps excepted).
  Trainer(std::vector<TrainedParameter> parameters, const TrainOptions& options,
          std::filesystem::path folder, nlohmann::json config);
  ~Trainer();

  /// Restores weights, average, optimiser, losses, torch's CPU generator and the step. Throws
  /// sla2::Error when there is no checkpoint or it does not fit. Returns the next step.
  std::int64_t resume();

  /// Trains up to options.steps. A stop request saves a checkpoint and throws Interrupted; NaN or
  /// Inf throws sla2::Error (kRuntime) with the step, the layer and the last good checkpoint.
  void train(const LossFunction& loss, Run& run, const Diagnosis& diagnosis = {},
             const std::string& task = "training");

  [[nodiscard]] std::int64_t next_step() const;
  /// Loss of every step so far.
  [[nodiscard]] const std::vector<double>& losses() const;
  /// Copies the averaged weights into the parameters (for saving or evaluation); the raw ones are
  /// kept and come back with use_raw().
  void use_average();
  void use_raw();
  void save_checkpoint();
  [[nodiscard]] std::filesystem::path checkpoint_path() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sla2::video

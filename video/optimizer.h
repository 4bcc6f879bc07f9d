// AdamW with clipping, a moving average of the weights and a sticky finiteness flag, all on the
// device: a step never waits for the GPU.
#pragma once

#include <map>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "video/trainer.h"

namespace sla2::video {

class Optimizer {
 public:
  Optimizer(const std::vector<TrainedParameter>& parameters, const TrainOptions& options);

  /// One update from the gradients, which are zeroed. Once a gradient norm or `loss` was not
  /// finite, this and every later update leaves the weights as they are.
  void step(std::int64_t step, const torch::Tensor& loss);

  /// Gradient norm before clipping, of the last step, a scalar on the device.
  [[nodiscard]] const torch::Tensor& gradient_norm() const { return norm_; }
  /// First step that was not finite, or -1: fp64 scalar on the device.
  [[nodiscard]] const torch::Tensor& bad_step() const { return bad_step_; }
  [[nodiscard]] double learning_rate(std::int64_t step) const;

  /// Raw weights, average, moments and count by name ("model.", "ema.", "adam.m.", "adam.v.",
  /// "adam.step"); the tensors share memory with the optimizer's.
  [[nodiscard]] std::map<std::string, torch::Tensor> state() const;

  /// Swaps weights and average (no effect without an average).
  void swap_average();

 private:
  struct Group {
    double lr_scale = 1, weight_decay = 0;
    std::vector<torch::Tensor> values, gradients, mean, square, count;
  };

  const std::vector<TrainedParameter> parameters_;
  const TrainOptions options_;
  std::vector<torch::Tensor> values_, gradients_, average_, mean_, square_;
  torch::Tensor count_, norm_, bad_step_;
  std::vector<Group> groups_;
};

}  // namespace sla2::video

#include "video/optimizer.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace sla2::video {

Optimizer::Optimizer(const std::vector<TrainedParameter>& parameters, const TrainOptions& options)
    : parameters_(parameters), options_(options) {
  const torch::NoGradGuard no_grad;
  const torch::Device device = parameters_.front().value.device();
  count_ = torch::zeros({}, torch::TensorOptions().dtype(torch::kFloat32).device(device));
  norm_ = torch::zeros_like(count_);
  bad_step_ = torch::full({}, -1.0, torch::TensorOptions().dtype(torch::kFloat64).device(device));
  for (const TrainedParameter& parameter : parameters_) {
    torch::Tensor value = parameter.value;
    // Gradients exist from the start: autograd adds into them and the lists below stay valid.
    value.mutable_grad() = torch::zeros_like(value);
    values_.push_back(value.detach());
    gradients_.push_back(value.grad());
    mean_.push_back(torch::zeros_like(value).detach());
    square_.push_back(torch::zeros_like(value).detach());
    if (options_.ema_decay > 0) average_.push_back(value.detach().clone());
    const double decay = parameter.decays && value.dim() >= 2 ? options_.weight_decay : 0.0;
    auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) {
      return g.lr_scale == parameter.lr_scale && g.weight_decay == decay;
    });
    if (group == groups_.end()) {
      group = groups_.emplace(groups_.end());
      group->lr_scale = parameter.lr_scale;
      group->weight_decay = decay;
    }
    group->values.push_back(values_.back());
    group->gradients.push_back(gradients_.back());
    group->mean.push_back(mean_.back());
    group->square.push_back(square_.back());
    group->count.push_back(count_);
  }
}

double Optimizer::learning_rate(std::int64_t step) const {
  const auto at = static_cast<double>(step);
  double factor = 1;
  if (step < options_.warmup) {
    factor = (at + 1) / static_cast<double>(options_.warmup);
  } else if (options_.final_lr < 1 && options_.steps > options_.warmup) {
    const double done = (at - static_cast<double>(options_.warmup)) /
                        static_cast<double>(options_.steps - options_.warmup);
    const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * std::min(1.0, done)));
    factor = options_.final_lr + (1 - options_.final_lr) * cosine;
  }
  return options_.lr * factor;
}

void Optimizer::step(std::int64_t step, const torch::Tensor& loss) {
  const torch::NoGradGuard no_grad;
  norm_ = torch::stack(at::_foreach_norm(gradients_)).norm();
  const torch::Tensor finite = torch::isfinite(norm_).logical_and(torch::isfinite(loss));
  const torch::Tensor first_bad = finite.logical_not().logical_and(bad_step_ < 0);
  bad_step_ =
      torch::where(first_bad, torch::full_like(bad_step_, static_cast<double>(step)), bad_step_);
  const torch::Tensor stop = (bad_step_ >= 0).to(torch::kFloat32);
  std::optional<torch::Tensor> divisor;
  if (options_.clip_norm > 0)
    divisor = (norm_ / options_.clip_norm).clamp_min(1.0).to(torch::kFloat32);
  count_.add_(1.0 - stop);
  const double lr = learning_rate(step);
  for (Group& group : groups_) {
    at::_fused_adamw_(group.values, group.gradients, group.mean, group.square, {}, group.count,
                      lr * group.lr_scale, options_.beta1, options_.beta2, group.weight_decay,
                      /*eps=*/1e-8, /*amsgrad=*/false, /*maximize=*/false, divisor, stop);
  }
  if (!average_.empty()) {
    const auto at = static_cast<double>(step);
    const double decay = std::min(options_.ema_decay, (1 + at) / (10 + at));
    at::_foreach_lerp_(average_, values_, 1 - decay);
  }
  at::_foreach_zero_(gradients_);
}

std::map<std::string, torch::Tensor> Optimizer::state() const {
  std::map<std::string, torch::Tensor> state{{"adam.step", count_}};
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const std::string& name = parameters_[i].name;
    state["model." + name] = values_[i];
    if (!average_.empty()) state["ema." + name] = average_[i];
    state["adam.m." + name] = mean_[i];
    state["adam.v." + name] = square_[i];
  }
  return state;
}

void Optimizer::swap_average() {
  const torch::NoGradGuard no_grad;
  for (std::size_t i = 0; i < average_.size(); ++i) {
    const torch::Tensor raw = values_[i].clone();
    values_[i].copy_(average_[i]);
    average_[i].copy_(raw);
  }
}

}  // namespace sla2::video

#include "video/flow.h"

#include <fmt/format.h>

#include "sla2/error.h"
#include "video/run.h"

namespace sla2::video {

namespace {

// [B] -> [B, 1, ...] of the rank of `like`.
torch::Tensor over(const torch::Tensor& t, const torch::Tensor& like) {
  std::vector<std::int64_t> shape(static_cast<std::size_t>(like.dim()), 1);
  shape[0] = t.size(0);
  return t.to(like.device(), torch::kFloat32).reshape(shape);
}

}  // namespace

Prediction prediction_from(const std::string& name) {
  if (name == "x") return Prediction::kX;
  if (name == "velocity") return Prediction::kVelocity;
  throw Error("prediction must be x or velocity, got \"" + name + "\"");
}

TimestepLaw timestep_law_from(const std::string& name) {
  if (name == "uniform") return TimestepLaw::kUniform;
  if (name == "logit_normal") return TimestepLaw::kLogitNormal;
  throw Error("timesteps must be uniform or logit_normal, got \"" + name + "\"");
}

double shift_timestep(double t, double shift) { return shift * t / (1 + (shift - 1) * t); }

torch::Tensor sample_timesteps(std::int64_t n, const FlowOptions& options,
                               at::Generator generator) {
  const auto kind = torch::TensorOptions().dtype(torch::kFloat32).device(generator.device());
  torch::Tensor t = options.timesteps == TimestepLaw::kLogitNormal
                        ? torch::randn({n}, generator, kind).sigmoid()
                        : torch::rand({n}, generator, kind);
  t = options.shift * t / (1 + (options.shift - 1) * t);
  return t.clamp(1e-4, 1 - 1e-4);
}

torch::Tensor add_noise(const torch::Tensor& x, const torch::Tensor& noise,
                        const torch::Tensor& t) {
  return torch::lerp(x, noise, over(t, x));
}

torch::Tensor to_velocity(const torch::Tensor& output, const torch::Tensor& x_t,
                          const torch::Tensor& t, Prediction prediction, double t_min) {
  if (prediction == Prediction::kVelocity) return output;
  return (x_t - output) / over(t, x_t).clamp_min(t_min);
}

torch::Tensor flow_loss(const torch::Tensor& output, const torch::Tensor& x,
                        const torch::Tensor& noise, const torch::Tensor& t,
                        const FlowOptions& options) {
  if (options.prediction == Prediction::kVelocity) return (output - (noise - x)).square().mean();
  // (x_t - x_hat)/s - (x_t - x)/s with s = max(t, t_min): x_t cancels.
  return ((x - output) / over(t, x).clamp_min(options.t_min)).square().mean();
}

void validate(const SamplerOptions& options) {
  if (options.steps < 1 || options.steps > 1000) {
    throw Error(fmt::format("steps must be in [1, 1000], got {}", options.steps));
  }
  if (!(options.shift > 0 && options.shift <= 100)) {
    throw Error(fmt::format("shift must be in (0, 100], got {}", options.shift));
  }
  if (!(options.guidance >= 0 && options.guidance <= 100)) {
    throw Error(fmt::format("guidance must be in [0, 100], got {}", options.guidance));
  }
  if (!(options.from_t > 0 && options.from_t <= 1)) {
    throw Error(fmt::format("from_t must be in (0, 1], got {}", options.from_t));
  }
}

std::vector<double> sampler_timesteps(const SamplerOptions& options) {
  validate(options);
  // Shifted uniform steps between from_t and 0: the inverse of the shift gives the first one.
  const double first = shift_timestep(options.from_t, 1 / options.shift);
  std::vector<double> t;
  for (std::int64_t i = 0; i <= options.steps; ++i) {
    const double linear =
        first * static_cast<double>(options.steps - i) / static_cast<double>(options.steps);
    t.push_back(shift_timestep(linear, options.shift));
  }
  t.front() = options.from_t;
  return t;
}

torch::Tensor sample(const VelocityFunction& velocity, torch::Tensor start,
                     const SamplerOptions& options, const SamplerObserver& observer) {
  const std::vector<double> t = sampler_timesteps(options);
  torch::Tensor x = std::move(start);
  for (std::size_t i = 0; i + 1 < t.size(); ++i) {
    x = x + (t[i + 1] - t[i]) * velocity(x, t[i]);
    if (observer) observer(static_cast<std::int64_t>(i) + 1);
  }
  return x;
}

torch::Tensor seeded_noise(at::IntArrayRef shape, std::int64_t seed, const torch::Device& device) {
  auto generator = make_generator(torch::kCPU, seed, kStreamSampler);
  return torch::randn(shape, generator, torch::kFloat32).to(device);
}

}  // namespace sla2::video

// Flow matching (rectified flow): x_t = (1-t) x + t noise, t from 0 (data) to 1 (noise), velocity
// v = noise - x. The network predicts v (Wan) or x; the loss is on the velocity either way.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <torch/torch.h>

namespace sla2::video {

enum class Prediction : std::uint8_t { kX, kVelocity };
/// "x" or "velocity". Throws sla2::Error.
Prediction prediction_from(const std::string& name);

enum class TimestepLaw : std::uint8_t { kUniform, kLogitNormal };
/// "uniform" or "logit_normal". Throws sla2::Error.
TimestepLaw timestep_law_from(const std::string& name);

struct FlowOptions {
  Prediction prediction = Prediction::kX;
  TimestepLaw timesteps = TimestepLaw::kLogitNormal;
  double shift = 1.0;            ///< of the training timesteps: t -> shift t / (1 + (shift-1) t)
  double t_min = 0.05;           ///< x prediction: velocity = (x_t - x_hat) / max(t, t_min)
  double caption_dropout = 0.1;  ///< fraction of samples trained without their caption
};

/// shift * t / (1 + (shift - 1) t).
[[nodiscard]] double shift_timestep(double t, double shift);

/// n timesteps in (0, 1), fp32 on the generator's device.
torch::Tensor sample_timesteps(std::int64_t n, const FlowOptions& options, at::Generator generator);

/// (1-t) x + t noise; x and noise [B, ...], t [B].
torch::Tensor add_noise(const torch::Tensor& x, const torch::Tensor& noise, const torch::Tensor& t);

/// The network's output as a velocity; output and x_t [B, ...], t [B].
torch::Tensor to_velocity(const torch::Tensor& output, const torch::Tensor& x_t,
                          const torch::Tensor& t, Prediction prediction, double t_min);

/// Mean of |v_hat - v|^2, a scalar; with x prediction both sides are divided by max(t, t_min), so
/// that the minimum is at x_hat = x for every t.
torch::Tensor flow_loss(const torch::Tensor& output, const torch::Tensor& x,
                        const torch::Tensor& noise, const torch::Tensor& t,
                        const FlowOptions& options);

struct SamplerOptions {
  std::int64_t steps = 16;
  double shift = 1.0;
  double guidance = 1.0;  ///< 1: none; w: v = v_uncond + w (v_cond - v_uncond)
  double from_t = 1.0;    ///< under 1: video to video
};
/// Throws sla2::Error naming the first option out of range.
void validate(const SamplerOptions& options);

/// steps + 1 timesteps, descending from from_t to 0.
[[nodiscard]] std::vector<double> sampler_timesteps(const SamplerOptions& options);

/// velocity(x_t [B, ...], t).
using VelocityFunction = std::function<torch::Tensor(const torch::Tensor& x_t, double t)>;
/// Called after each step with the number of steps done.
using SamplerObserver = std::function<void(std::int64_t done)>;

/// Euler's method from `start` (the state at from_t) to t = 0.
torch::Tensor sample(const VelocityFunction& velocity, torch::Tensor start,
                     const SamplerOptions& options, const SamplerObserver& observer = {});

/// Standard normal noise of `shape` by seed: drawn on the CPU in fp32, so that it does not depend
/// on the device that it is moved to.
torch::Tensor seeded_noise(at::IntArrayRef shape, std::int64_t seed, const torch::Device& device);

}  // namespace sla2::video

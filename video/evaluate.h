// Figures that methods are compared by: validation loss, PSNR to the full model, time of a step.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <torch/torch.h>

#include "video/data.h"
#include "video/denoiser.h"
#include "video/flow.h"
#include "video/run.h"
#include "video/weights.h"

namespace sla2::video {

/// What a model makes of fixed windows, noises and noise levels, without caption dropout.
struct Validation {
  double loss = 0;         // mean diffusion loss
  torch::Tensor denoised;  // [samples, C, F, H, W] fp32, CPU: the clean samples it sees in them
};
Validation validate_denoiser(Denoiser& denoiser, const Dataset& dataset, const FlowOptions& flow,
                             std::int64_t samples, const std::string& task, Run& run);

/// The range of pixels in [-1, 1].
inline constexpr double kPixelPeak = 2;
/// Latents have no range of their own: from the smallest to the largest number of `reference`.
double latent_peak(const torch::Tensor& reference);
/// Peak signal to noise ratio in dB; 99 for equal tensors.
double psnr(const torch::Tensor& a, const torch::Tensor& b, double peak = kPixelPeak);

/// One kind of attention to time.
struct TimedMethod {
  std::string method;  // "full", "sla2", "sla"
  double keep = 1;
  Sla2Weights weights;  // not used for full
};
struct StepTime {
  std::string method;
  double keep = 1;
  double step_ms = 0;       // one velocity of one sample, median
  double attention_ms = 0;  // its self-attention over all layers, median, timed on the same q, k, v
};

/// Times `methods` in turns, `repeats` rounds after one warm-up, on the denoiser's model, which is
/// left with full attention. `text` is [1, L, text_dim].
std::vector<StepTime> time_methods(Denoiser& denoiser, const std::vector<TimedMethod>& methods,
                                   const torch::Tensor& text, std::int64_t repeats, Run& run);
[[nodiscard]] nlohmann::json to_json(const std::vector<StepTime>& times);

/// Processor, cores, threads, memory, this process's peak so far, GPU, chosen kernels; and versions
/// of what computed.
[[nodiscard]] nlohmann::json describe_machine(const torch::Device& device);
[[nodiscard]] nlohmann::json describe_versions();

}  // namespace sla2::video

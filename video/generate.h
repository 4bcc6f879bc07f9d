// Videos from a trained model: from noise and a caption, or from a video (video to video).
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "io/video_file.h"
#include "video/denoiser.h"
#include "video/flow.h"
#include "video/run.h"

namespace sla2::video {

struct GenerateRequest {
  std::string prompt;  ///< a name of the caption table; "": no caption
  std::int64_t seed = 0;
  SamplerOptions sampler;       ///< from_t under 1 needs `source`
  torch::Tensor source;         ///< [C, F, H, W] in [-1, 1] to start from; undefined: noise
  torch::Tensor text;           ///< [L, text_dim] instead of a prompt (Wan's embeddings)
  torch::Tensor negative_text;  ///< [L, text_dim] for guidance, instead of the no-caption row
};

struct Generated {
  torch::Tensor x;          // [C, F, H, W] fp32, CPU; pixel models: clamped to [-1, 1]
  double step_seconds = 0;  // median over the sampling steps, both passes of guidance included
};

/// Progress is reported as one task of sampler.steps. Throws sla2::Error, Interrupted.
Generated generate(Denoiser& denoiser, const GenerateRequest& request, Run& run,
                   const std::string& task = "generating");

/// [3, F, H, W] in [-1, 1] -> RGB frames, and back.
io::Frames to_frames(const torch::Tensor& x, double fps);
torch::Tensor from_frames(const io::Frames& frames);

/// The first card.frames frames of a video at the model's size and rate, [3, F, H, W].
torch::Tensor load_source(const std::filesystem::path& path, const ModelCard& card);

}  // namespace sla2::video

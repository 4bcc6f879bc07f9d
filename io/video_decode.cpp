// Listing, probing and decoding.
#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <system_error>

#include <fmt/format.h>

#include "io/atomic_file.h"
#include "io/process.h"
#include "io/video_file.h"
#include "io/video_program.h"
#include "sla2/error.h"

namespace sla2::io {
namespace fs = std::filesystem;
namespace {

constexpr std::int64_t kMaxSide = 16384;
constexpr double kMaxFps = 1000;

bool has_video_extension(const fs::path& path) {
  static constexpr std::array kExtensions{".mp4", ".m4v",  ".mov", ".mkv", ".webm", ".avi", ".mpg",
                                          ".ts",  ".mpeg", ".flv", ".wmv", ".gif",  ".ogv", ".3gp"};
  std::string extension = path.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return std::find(kExtensions.begin(), kExtensions.end(), extension) != kExtensions.end();
}

void check_options(const DecodeOptions& options) {
  for (const auto& [name, side] : {std::pair("height", options.height), {"width", options.width}}) {
    if (side < 1 || side > kMaxSide) {
      throw Error(fmt::format("{} must be in [1, {}], got {}", name, kMaxSide, side));
    }
  }
  if (!(options.fps >= 0 && options.fps <= kMaxFps)) {
    throw Error(fmt::format("fps must be in [0, {}], got {}", kMaxFps, options.fps));
  }
  if (options.max_frames < 0) {
    throw Error(fmt::format("max_frames must not be negative, got {}", options.max_frames));
  }
  if (!(options.start_seconds >= 0 && options.start_seconds < 1e6)) {
    throw Error(
        fmt::format("start_seconds must be in [0, 1000000), got {}", options.start_seconds));
  }
}

// Scaled, with the pixels' own aspect, to cover the output, then cut to its middle. The bound on
// the scaled size keeps a header with an absurd aspect from asking for gigabytes.
std::string filter_of(const DecodeOptions& options) {
  std::string filter;
  if (options.fps > 0) filter = fmt::format("fps={},", options.fps);
  return filter +
         fmt::format(
             "scale=w='clip(round({1}*dar),{0},{0}*16)':h='clip(round({0}/dar),{1},{1}*16)'"
             ":flags=bicubic+accurate_rnd+full_chroma_int+bitexact,crop={0}:{1},setsar=1",
             options.width, options.height);
}

}  // namespace

VideoInfo probe_video(const fs::path& path) {
  check_video_path(path);
  ProcessOptions process;
  process.arguments = reading_arguments(path, "info", 0);
  const ProcessResult result = run_process(process);
  // It ends with status 1, for want of an output file; the description is what counts.
  if (result.end != ProcessEnd::kExited) {
    throw Error(ErrorKind::kRuntime, fmt::format("{}: {}", path.string(), failure_of(result)));
  }
  return parse_video_info(result.error_text, path);
}

Frames decode_video(const fs::path& path, const DecodeOptions& options) {
  check_options(options);
  const VideoInfo info = probe_video(path);
  Frames frames;
  frames.height = options.height;
  frames.width = options.width;
  frames.fps = options.fps > 0 ? options.fps : info.fps;
  const std::int64_t frame_bytes = options.height * options.width * 3;
  const std::int64_t most = options.max_bytes / frame_bytes;
  if (most < 1 || options.max_frames > most) {
    throw Error(fmt::format("max_bytes must hold max({}, 1) frames of {} bytes, got {}",
                            options.max_frames, frame_bytes, options.max_bytes));
  }

  ProcessOptions process;
  process.arguments = reading_arguments(path, "error", options.start_seconds);
  auto& arguments = process.arguments;
  arguments.insert(arguments.end(), {"-map", "0:V:0", "-vf", filter_of(options)});
  // Without a rate every decoded frame comes through once, whatever its time stamp.
  if (options.fps == 0) arguments.insert(arguments.end(), {"-fps_mode", "passthrough"});
  if (options.max_frames > 0) {
    arguments.insert(arguments.end(), {"-frames:v", std::to_string(options.max_frames)});
  }
  arguments.insert(arguments.end(), {"-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"});
  const auto limit = static_cast<std::size_t>(most * frame_bytes);
  process.on_output = [&](std::span<const std::byte> bytes) {
    if (bytes.size() > limit - frames.rgb.size()) {
      throw Error(
          fmt::format("{}: a video must have at most {} frames of {}x{} (max_bytes {}), got "
                      "more: set max_frames",
                      path.string(), most, options.width, options.height, options.max_bytes));
    }
    const auto* begin = reinterpret_cast<const std::uint8_t*>(bytes.data());
    frames.rgb.insert(frames.rgb.end(), begin, begin + bytes.size());
    return true;
  };
  const ProcessResult result = run_process(process);

  const auto size = static_cast<std::int64_t>(frames.rgb.size());
  frames.count = size / frame_bytes;
  const bool good = result.end == ProcessEnd::kExited && result.code == 0;
  const bool enough = options.max_frames > 0 && frames.count == options.max_frames;
  if (!good || (!enough && !last_message(result.error_text).empty())) {
    throw Error(fmt::format("{}: a video must decode to its end, got {} frames, then: {}",
                            path.string(), frames.count, failure_of(result)));
  }
  if (frames.count == 0) {
    throw Error(fmt::format("{}: a video must have a frame at or behind {} s, got none",
                            path.string(), options.start_seconds));
  }
  frames.rgb.resize(static_cast<std::size_t>(frames.count * frame_bytes));
  return frames;
}

std::vector<fs::path> list_videos(const std::vector<fs::path>& inputs) {
  std::vector<fs::path> videos;
  for (const fs::path& input : inputs) {
    std::error_code error;
    const auto status = fs::status(input, error);
    if (!fs::exists(status)) {
      const int reason = error ? error.value() : ENOENT;
      throw file_error(input, "cannot read the video", reason);
    }
    if (!fs::is_directory(status)) {
      videos.push_back(input);
      continue;
    }
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(input, error)) {
      std::error_code ignored;
      const bool hidden = entry.path().filename().string().starts_with(".");
      if (!hidden && has_video_extension(entry.path()) && entry.is_regular_file(ignored)) {
        found.push_back(entry.path());
      }
    }
    if (error) throw file_error(input, "cannot list the folder", error.value());
    if (found.empty()) {
      throw Error(
          fmt::format("{}: a data folder must hold video files (.mp4, .mkv, .webm, ...), got none",
                      input.string()));
    }
    std::sort(found.begin(), found.end());
    videos.insert(videos.end(), found.begin(), found.end());
  }
  return videos;
}

}  // namespace sla2::io

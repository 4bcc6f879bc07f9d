// Video files through the FFmpeg program: raw RGB frames in pipes. No shell, no codec library.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace sla2::io {

/// RGB24 frames, row-major [frames, height, width, 3].
struct Frames {
  std::int64_t count = 0;
  std::int64_t height = 0;
  std::int64_t width = 0;
  double fps = 0;
  std::vector<std::uint8_t> rgb;
};

struct VideoInfo {
  std::int64_t width = 0, height = 0;
  double fps = 0;
  double seconds = 0;  // 0: the container does not say
};

/// The program: SLA2_FFMPEG, then the one on PATH, then the one inside the Python package
/// imageio-ffmpeg beside this program (.venv). Throws sla2::Error saying how to get one.
std::filesystem::path find_ffmpeg();

/// Throws sla2::Error naming the file and why: missing, empty, no video stream (audio only), broken.
VideoInfo probe_video(const std::filesystem::path& path);

struct DecodeOptions {
  std::int64_t height = 128;      // output size; the source is scaled to cover it and centre-cropped
  std::int64_t width = 128;
  double fps = 0;                 // resampled to this rate; 0: the source's
  std::int64_t max_frames = 0;    // 0: all
  double start_seconds = 0;
};
/// Throws as probe_video, and for a file that ends before one frame.
Frames decode_video(const std::filesystem::path& path, const DecodeOptions& options);

/// H.264 in MP4 (yuv420p, crf, faststart), atomically. Throws sla2::Error with FFmpeg's last line.
void write_mp4(const std::filesystem::path& path, const Frames& frames, int crf = 16);

/// Expands files and folders (not recursive) to video files in name order, by extension.
std::vector<std::filesystem::path> list_videos(const std::vector<std::filesystem::path>& inputs);

}  // namespace sla2::io

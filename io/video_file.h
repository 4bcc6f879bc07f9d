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
  std::int64_t width = 0, height = 0;  // as stored, before any rotation
  double fps = 0;
  double seconds = 0;  // 0: the container does not say
};

/// The program: SLA2_FFMPEG, then the one on PATH, then the one inside the Python package
/// imageio-ffmpeg in an environment of this program (io/environment.h). Throws sla2::Error saying
/// how to get one.
std::filesystem::path find_ffmpeg();

/// Throws sla2::Error naming the file and why: missing, empty, no video stream (audio only),
/// broken.
VideoInfo probe_video(const std::filesystem::path& path);

struct DecodeOptions {
  std::int64_t height = 128;  // output size; the source is scaled to cover it and centre-cropped
  std::int64_t width = 128;
  double fps = 0;               // resampled to this rate; 0: the source's
  std::int64_t max_frames = 0;  // 0: all
  double start_seconds = 0;
  std::int64_t max_bytes = std::int64_t{4} << 30;  // of frames; a longer video is refused
};
/// Throws as probe_video, for a file that ends before one frame, and for one that is damaged or cut
/// off before the frames asked for (all of them with max_frames = 0).
Frames decode_video(const std::filesystem::path& path, const DecodeOptions& options);

/// H.264 in MP4 (yuv420p, crf 1 to 51, faststart), atomically; an odd width or height is made even
/// by repeating the last column or row. Throws sla2::Error with FFmpeg's last line.
void write_mp4(const std::filesystem::path& path, const Frames& frames, int crf = 16);

/// Expands folders (not recursive) to their video files, by extension, in name order; a file that
/// is named stays, whatever its extension. Throws sla2::Error for what is missing or holds no
/// video.
std::vector<std::filesystem::path> list_videos(const std::vector<std::filesystem::path>& inputs);

}  // namespace sla2::io

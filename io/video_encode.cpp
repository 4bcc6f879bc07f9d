// Writing H.264 in MP4.
#include <algorithm>
#include <tuple>

#include <fmt/format.h>

#include "io/atomic_file.h"
#include "io/process.h"
#include "io/video_file.h"
#include "io/video_program.h"
#include "sla2/error.h"

namespace sla2::io {
namespace {

constexpr const char* kToVideoColours =
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int";

void check_frames(const Frames& frames, int crf) {
  constexpr std::int64_t kMaxSide = 16384;
  constexpr std::int64_t kMaxCount = std::int64_t{1} << 30;  // times a frame: under 2^63
  const auto [count, height, width, fps, rgb] =
      std::tie(frames.count, frames.height, frames.width, frames.fps, frames.rgb);
  if (count < 1 || count > kMaxCount) {
    throw Error(fmt::format("frames.count must be in [1, {}], got {}", kMaxCount, count));
  }
  if (height < 1 || height > kMaxSide || width < 1 || width > kMaxSide) {
    throw Error(fmt::format("frames.height and frames.width must be in [1, {}], got {} and {}",
                            kMaxSide, height, width));
  }
  if (!(fps >= 0.01 && fps <= 1000)) {
    throw Error(fmt::format("frames.fps must be in [0.01, 1000], got {}", fps));
  }
  if (static_cast<std::int64_t>(rgb.size()) != count * height * width * 3) {
    throw Error(fmt::format("frames.rgb must have {} bytes, got {}", count * height * width * 3,
                            rgb.size()));
  }
  if (crf < 1 || crf > 51) throw Error(fmt::format("crf must be in [1, 51], got {}", crf));
}

// yuv420p has one colour sample for 2 x 2 pixels.
Frames make_even(const Frames& frames) {
  Frames even;
  even.count = frames.count;
  even.height = (frames.height + 1) / 2 * 2;
  even.width = (frames.width + 1) / 2 * 2;
  even.fps = frames.fps;
  even.rgb.reserve(static_cast<std::size_t>(even.count * even.height * even.width * 3));
  for (std::int64_t frame = 0; frame < frames.count; ++frame) {
    for (std::int64_t y = 0; y < even.height; ++y) {
      const std::int64_t row = frame * frames.height + std::min(y, frames.height - 1);
      const auto begin = frames.rgb.begin() + row * frames.width * 3;
      const auto end = begin + frames.width * 3;
      even.rgb.insert(even.rgb.end(), begin, end);
      if (even.width != frames.width) even.rgb.insert(even.rgb.end(), end - 3, end);
    }
  }
  return even;
}

}  // namespace

void write_mp4(const std::filesystem::path& path, const Frames& frames, int crf) {
  check_frames(frames, crf);
  if (frames.height % 2 != 0 || frames.width % 2 != 0) {
    write_mp4(path, make_even(frames), crf);
    return;
  }
  AtomicFile file(path);
  ProcessOptions process;
  process.input = std::as_bytes(std::span(frames.rgb));
  // The colours are converted by, and labelled as, BT.709: what browsers assume.
  process.arguments = {find_ffmpeg().string(),
                       "-y",
                       "-hide_banner",
                       "-loglevel",
                       "error",
                       "-f",
                       "rawvideo",
                       "-pixel_format",
                       "rgb24",
                       "-video_size",
                       fmt::format("{}x{}", frames.width, frames.height),
                       "-framerate",
                       fmt::format("{}", frames.fps),
                       "-i",
                       "pipe:0",
                       "-vf",
                       kToVideoColours,
                       "-colorspace",
                       "bt709",
                       "-color_primaries",
                       "bt709",
                       "-color_trc",
                       "bt709",
                       "-color_range",
                       "tv",
                       "-c:v",
                       "libx264",
                       "-preset",
                       "medium",
                       "-crf",
                       std::to_string(crf),
                       "-pix_fmt",
                       "yuv420p",
                       "-movflags",
                       "+faststart",
                       "-f",
                       "mp4",
                       file_url(file.temporary())};
  const ProcessResult result = run_process(process);
  if (result.end != ProcessEnd::kExited || result.code != 0) {
    throw Error(ErrorKind::kRuntime,
                fmt::format("{}: cannot write: {}", path.string(), failure_of(result)));
  }
  file.commit();
}

}  // namespace sla2::io

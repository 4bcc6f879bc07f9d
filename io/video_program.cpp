#include "io/video_program.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

#include <fmt/format.h>

#include "io/atomic_file.h"
#include "io/environment.h"
#include "sla2/error.h"

namespace sla2::io {
namespace fs = std::filesystem;
namespace {

// Playlists, text art and image sequences are no videos: some of them name other files.
constexpr const char* kContainers =
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,m4v,ivf,obu,nut,mxf,"
    "yuv4mpegpipe,wav,mp3,flac,aac";

bool is_program(const fs::path& path) {
  std::error_code ignored;
  return fs::is_regular_file(path, ignored) && ::access(path.c_str(), X_OK) == 0;
}

std::optional<fs::path> on_path() {
  const char* variable = std::getenv("PATH");
  std::string_view rest = variable == nullptr ? "" : variable;
  while (!rest.empty()) {
    const auto colon = rest.find(':');
    const std::string_view folder = rest.substr(0, colon);
    rest = colon == std::string_view::npos ? "" : rest.substr(colon + 1);
    const fs::path candidate = fs::path(folder) / "ffmpeg";
    if (!folder.empty() && is_program(candidate)) return candidate;
  }
  return std::nullopt;
}

// <site-packages>/imageio_ffmpeg/binaries/ffmpeg-*, the last by name.
std::optional<fs::path> in_packages(const fs::path& packages) {
  std::optional<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator file(packages / "imageio_ffmpeg" / "binaries", error), end;
       !error && file != end; file.increment(error)) {
    const bool named = file->path().filename().string().starts_with("ffmpeg-");
    if (named && is_program(file->path()) && (!found || *found < file->path())) {
      found = file->path();
    }
  }
  return found;
}

std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const auto end = text.find_first_of("\r\n");
    std::string_view line = text.substr(0, end);
    text = end == std::string_view::npos ? "" : text.substr(end + 1);
    while (!line.empty() && line.front() == ' ') line.remove_prefix(1);
    if (!line.empty()) lines.push_back(line);
  }
  return lines;
}

// "h264 (Main) (avc1 / 0x31), yuv420p(tv, bt709), 640x272, 25 fps": cut at commas outside brackets.
std::vector<std::string_view> fields_of(std::string_view line) {
  std::vector<std::string_view> fields;
  int depth = 0;
  std::size_t begin = 0;
  for (std::size_t i = 0; i <= line.size(); ++i) {
    if (i == line.size() || (line[i] == ',' && depth == 0)) {
      std::string_view field = line.substr(begin, i - begin);
      while (!field.empty() && field.front() == ' ') field.remove_prefix(1);
      fields.push_back(field);
      begin = i + 1;
    } else if (line[i] == '(' || line[i] == '[') {
      ++depth;
    } else if ((line[i] == ')' || line[i] == ']') && depth > 0) {
      --depth;
    }
  }
  return fields;
}

// Reads a number at the front of `text` and drops it.
template <typename T>
bool take_number(std::string_view& text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return false;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return true;
}

bool take(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// "25 fps", "1k fps", "29.97 tbr".
double rate_of(std::string_view field, std::string_view unit) {
  double rate = 0;
  if (!take_number(field, rate)) return 0;
  if (take(field, "k")) rate *= 1000;
  return take(field, " ") && field == unit ? rate : 0;
}

void read_stream(std::string_view description, VideoInfo& info) {
  double base_rate = 0;
  for (const std::string_view field : fields_of(description)) {
    std::string_view size = field;
    std::int64_t width = 0, height = 0;
    if (info.width == 0 && take_number(size, width) && take(size, "x") &&
        take_number(size, height) && (size.empty() || size.front() == ' ')) {
      info.width = width;
      info.height = height;
    }
    if (info.fps == 0) info.fps = rate_of(field, "fps");
    if (base_rate == 0) base_rate = rate_of(field, "tbr");
  }
  if (info.fps == 0) info.fps = base_rate;
}

// "00:01:05.31, start: ..."; "N/A" gives 0.
double seconds_of(std::string_view text) {
  std::int64_t hours = 0, minutes = 0;
  double seconds = 0;
  if (!take_number(text, hours) || !take(text, ":") || !take_number(text, minutes) ||
      !take(text, ":") || !take_number(text, seconds)) {
    return 0;
  }
  return 3600.0 * static_cast<double>(hours) + 60.0 * static_cast<double>(minutes) + seconds;
}

}  // namespace

fs::path find_ffmpeg() {
  if (const char* named = std::getenv("SLA2_FFMPEG"); named != nullptr && *named != '\0') {
    if (is_program(named)) return fs::absolute(named);
    throw Error(fmt::format("SLA2_FFMPEG must name a program, got \"{}\"", named));
  }
  if (auto program = on_path()) return *program;
  for (const fs::path& packages : site_packages()) {
    if (auto program = in_packages(packages)) return *program;
  }
  throw Error(
      ErrorKind::kRuntime,
      "FFmpeg must be on PATH, in SLA2_FFMPEG or in a Python environment of this program, found "
      "none: "
      "install it (apt install ffmpeg) or run `make setup`");
}

void check_video_path(const fs::path& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) throw file_error(path, "cannot read the video", errno);
  if (!S_ISREG(status.st_mode)) {
    throw Error(fmt::format("{}: a video must be a regular file, got {}", path.string(),
                            S_ISDIR(status.st_mode) ? "a folder" : "something else"));
  }
  if (status.st_size == 0) {
    throw Error(fmt::format("{}: a video must have frames, got an empty file", path.string()));
  }
  if (::access(path.c_str(), R_OK) != 0) throw file_error(path, "cannot read the video", errno);
}

std::string file_url(const fs::path& path) { return "file:" + fs::absolute(path).string(); }

std::vector<std::string> reading_arguments(const fs::path& path, const std::string& log_level,
                                           double start_seconds) {
  std::vector<std::string> arguments{find_ffmpeg().string(), "-nostdin", "-hide_banner",
                                     "-loglevel", log_level};
  if (start_seconds > 0) {
    arguments.insert(arguments.end(), {"-ss", fmt::format("{:.6f}", start_seconds)});
  }
  arguments.insert(arguments.end(), {"-protocol_whitelist", "file", "-format_whitelist",
                                     kContainers, "-i", file_url(path)});
  return arguments;
}

std::string last_message(const std::string& error_text) {
  const auto lines = lines_of(error_text);
  if (lines.empty()) return {};
  std::string_view line = lines.back();
  // "[h264 @ 0x55d0c0ffee] message": the address says nothing.
  if (const auto bracket = line.find("] "); line.front() == '[' && bracket < line.size()) {
    line.remove_prefix(bracket + 2);
  }
  // "Error opening input files: reason"
  constexpr std::string_view kOpening = "Error opening input files: ";
  take(line, kOpening);
  constexpr std::size_t kLongest = 200;
  std::string message(line.substr(0, kLongest));
  std::replace_if(
      message.begin(), message.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return message;
}

std::string failure_of(const ProcessResult& result) {
  switch (result.end) {
    case ProcessEnd::kStalled:
      return "FFmpeg hung and was stopped";
    case ProcessEnd::kSignalled:
      return fmt::format("FFmpeg was ended by signal {}", result.code);
    case ProcessEnd::kStopped:
    case ProcessEnd::kExited:
      break;
  }
  const std::string message = last_message(result.error_text);
  return message.empty() ? fmt::format("FFmpeg ended with status {}", result.code) : message;
}

VideoInfo parse_video_info(const std::string& error_text, const fs::path& path) {
  VideoInfo info;
  bool opened = false, video = false, audio = false;
  for (std::string_view line : lines_of(error_text)) {
    if (take(line, "Duration: ")) {
      info.seconds = seconds_of(line);
    } else if (line.starts_with("Input #0")) {
      opened = true;
    } else if (take(line, "Stream #0:")) {
      audio = audio || line.find(": Audio: ") != std::string_view::npos;
      const auto kind = line.find(": Video: ");
      const bool cover = line.find("(attached pic)") != std::string_view::npos;
      if (video || kind == std::string_view::npos || cover) continue;
      video = true;
      read_stream(line.substr(kind + std::string_view(": Video: ").size()), info);
    }
  }
  if (!opened) {
    throw Error(fmt::format("{}: a video must be readable by FFmpeg, got: {}", path.string(),
                            last_message(error_text)));
  }
  if (!video) {
    throw Error(fmt::format("{}: a video must have a picture stream, got {}", path.string(),
                            audio ? "audio only" : "none"));
  }
  if (info.width <= 0 || info.height <= 0) {
    throw Error(
        fmt::format("{}: a video must state its size, got a damaged header", path.string()));
  }
  return info;
}

}  // namespace sla2::io

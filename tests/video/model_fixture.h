// A transformer small enough for tests, and its inputs.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>
#include <unistd.h>

#include <torch/torch.h>

#include "video/weights.h"

namespace sla2::video::test {

inline WanConfig small_config() {
  WanConfig config;
  config.patch_size = {1, 2, 2};
  config.num_attention_heads = 2;
  config.attention_head_dim = 32;
  config.in_channels = config.out_channels = 3;
  config.text_dim = 12;
  config.freq_dim = 16;
  config.ffn_dim = 96;
  config.num_layers = 3;
  config.rope_max_seq_len = 64;
  return config;
}

inline WanTransformer small_model(std::int64_t seed = 7) {
  torch::manual_seed(seed);
  return WanTransformer(small_config());
}

/// 5 x 6 x 7 tokens: no side is a multiple of the tile.
struct SmallInputs {
  torch::Tensor x = torch::randn({2, 3, 5, 12, 14});
  torch::Tensor timestep = torch::tensor({999.0F, 37.5F});
  torch::Tensor text = torch::randn({2, 4, 12});
};

inline double relative_error(const torch::Tensor& a, const torch::Tensor& b) {
  const torch::Tensor difference = a.to(torch::kFloat64) - b.to(torch::kFloat64);
  return (difference.norm() / b.to(torch::kFloat64).norm()).item<double>();
}

/// A folder that is removed with its contents.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "sla2_test_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace sla2::video::test

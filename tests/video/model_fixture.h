// A transformer small enough for tests, and its inputs.
#pragma once

#include <cstdint>

#include <torch/torch.h>

#include "tests/temporary_folder.h"
#include "video/weights.h"

namespace sla2::video::test {

using sla2::test::TemporaryFolder;

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

}  // namespace sla2::video::test

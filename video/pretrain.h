// Training a small video transformer with full attention from random weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include <nlohmann/json.hpp>

#include "video/data.h"
#include "video/denoiser.h"
#include "video/flow.h"
#include "video/run.h"
#include "video/trainer.h"

namespace sla2::video {

struct PretrainOptions {
  DataOptions data;  ///< videos; frames, size and rate are the model's
  WanConfig model{.patch_size = {1, 8, 8},
                  .num_attention_heads = 4,
                  .attention_head_dim = 64,
                  .in_channels = 3,
                  .out_channels = 3,
                  .text_dim = 128,
                  .freq_dim = 256,
                  .ffn_dim = 768,
                  .num_layers = 8};
  std::filesystem::path from;       ///< a pixel-space model to go on from; empty: random weights
  TokenOrder order;                 ///< tiles; has no influence on full attention's result
  std::int64_t caption_tokens = 4;  ///< L of the learned caption table
  FlowOptions flow;
  TrainOptions train;
  std::int64_t batch = 32;
  std::int64_t loader_threads = 2;
  bool checkpoint_activations = false;
  bool resume = false;
};

struct PretrainResult {
  std::vector<double> losses;
  std::int64_t parameters = 0;
  std::vector<std::string> clips;
};

/// Trains and writes the average as a bf16 diffusers folder with model card and caption table.
/// `config` goes into the checkpoint (see Trainer). Throws sla2::Error, Interrupted.
PretrainResult pretrain(const PretrainOptions& options, const std::filesystem::path& out,
                        const nlohmann::json& config, Run& run);

}  // namespace sla2::video

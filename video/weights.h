// Loading and saving: the diffusers layout of a transformer, the folder of SLA2 weights, and the
// card of a small pixel-space model (its captions, size and prediction).
#pragma once

#include <array>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "video/run.h"
#include "video/token_order.h"
#include "video/wan_transformer.h"

namespace sla2::video {

/// Tensors of one safetensors file, copied. Throws sla2::Error naming the file.
std::map<std::string, torch::Tensor> load_tensors(const std::filesystem::path& path);
void save_tensors(const std::filesystem::path& path,
                  const std::map<std::string, torch::Tensor>& tensors,
                  const std::map<std::string, std::string>& metadata = {});

WanConfig load_wan_config(const std::filesystem::path& folder);
/// The folder's config.json and diffusion_pytorch_model*.safetensors (index file if sharded).
/// Missing, extra or misshapen tensors are named (all of them, up to ten). Weights get `dtype`.
/// `progress` may be null.
WanTransformer load_transformer(const std::filesystem::path& folder,
                                torch::Dtype dtype = torch::kFloat32, Progress* progress = nullptr);
void save_transformer(const std::filesystem::path& folder, WanTransformer& model,
                      torch::Dtype dtype = torch::kBFloat16,
                      std::int64_t max_shard_bytes = std::int64_t{5} << 30,
                      const std::string& save = {});

/// What the small models need besides Wan's config: saved as model_card.json and, for the learned
/// caption table, captions.safetensors, in the transformer's folder. Wan's own weights have none.
struct ModelCard {
  std::int64_t frames = 16, height = 128, width = 128;  // pixel space, values in [-1, 1]
  double fps = 8;
  std::string prediction = "x";       // "x" or "velocity" (Wan)
  double shift = 1.0;                 // of the sampler's timesteps
  std::vector<std::string> captions;  // names; row i of the table, one more row: no caption
  torch::Tensor caption_table;        // [captions + 1, L, text_dim]
};
bool has_model_card(const std::filesystem::path& folder);
ModelCard load_model_card(const std::filesystem::path& folder);
void save_model_card(const std::filesystem::path& folder, const ModelCard& card);

/// sla2.json and sla2.safetensors (shared names: interfaces of the program and the Python package).
struct Sla2Weights {
  Config config;
  TokenOrder order;
  std::array<std::int64_t, 3> grid{};  // tokens (F', H', W')
  sla2::nn::RouterShape router = sla2::nn::RouterShape::kLayer;
  sla2::nn::AlphaShape alpha = sla2::nn::AlphaShape::kBlock;
  std::vector<double> keeps;                     // trained for in stage 1
  std::vector<std::string> layers;               // module paths, "blocks.0.attn1"
  std::map<std::string, torch::Tensor> tensors;  // "{module path}.proj_q" and so on
};
Sla2Weights load_sla2(const std::filesystem::path& folder);
void save_sla2(const std::filesystem::path& folder, const Sla2Weights& weights,
               const std::string& save = {});
/// `save` names a save of several files: it lies in each one's metadata. Throws sla2::Error if the
/// files of sla2.safetensors and transformer/ name different ones: a save was cut off between them.
void check_same_save(const std::filesystem::path& sla2);
/// Puts nn::Attention modules holding these weights (fresh ones for an empty `tensors`) into every
/// layer named, and sets the token order; and back.
void apply_sla2(WanTransformer& model, const Sla2Weights& weights);
Sla2Weights collect_sla2(const WanTransformer& model, const Sla2Weights& like);
void remove_sla2(WanTransformer& model);

}  // namespace sla2::video

// What the JSON files of a model's folder and of a folder of SLA2 weights say, checked; the weights
// beside them are read elsewhere (safetensors.h).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "sla2/config.h"

namespace sla2::io {

/// config.json of diffusers' WanTransformer3DModel; image-to-video fields are refused.
struct WanConfig {
  std::array<std::int64_t, 3> patch_size{1, 2, 2};
  std::int64_t num_attention_heads = 40;
  std::int64_t attention_head_dim = 128;
  std::int64_t in_channels = 16;
  std::int64_t out_channels = 16;
  std::int64_t text_dim = 4096;
  std::int64_t freq_dim = 256;
  std::int64_t ffn_dim = 13824;
  std::int64_t num_layers = 40;
  bool cross_attn_norm = true;
  double eps = 1e-6;
  std::int64_t rope_max_seq_len = 1024;
  [[nodiscard]] std::int64_t dim() const { return num_attention_heads * attention_head_dim; }
};

/// `where` names the file in messages. All of these validate, and throw sla2::Error naming key,
/// rule and value.
WanConfig wan_config_from_json(const nlohmann::json& json, const std::string& where);
void validate(const WanConfig& config, const std::string& where = {});

/// Of model_card.json: what a small pixel-space model needs besides Wan's config.
struct CardText {
  std::int64_t frames = 16, height = 128, width = 128;  // pixel space, values in [-1, 1]
  double fps = 8;
  std::string prediction = "x";       // "x" or "velocity" (Wan)
  double shift = 1.0;                 // of the sampler's timesteps
  std::vector<std::string> captions;  // names
};
CardText card_from_json(const nlohmann::json& json, const std::string& where);
void validate(const CardText& card, const std::string& where);

/// Of sla2.json.
struct Sla2Text {
  Config config;
  bool tiles = true;  // token_order; else raster
  std::array<std::int64_t, 3> tile{4, 4, 4};
  std::array<std::int64_t, 3> grid{};
  bool router_per_head = false;
  bool alpha_per_head = false;
  std::vector<double> keeps;
  std::vector<std::string> layers;
};
Sla2Text sla2_from_json(nlohmann::json json, const std::string& where);
void validate(const Sla2Text& text, const std::string& where);
/// i of "blocks.{i}.attn1".
std::int64_t layer_of_attention(const std::string& path);

/// weight_map of a shard index: tensor -> file name without folders.
std::map<std::string, std::string> weight_map_from_json(const nlohmann::json& json,
                                                        const std::string& where);

}  // namespace sla2::io

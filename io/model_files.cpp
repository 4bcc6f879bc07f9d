#include "io/model_files.h"

#include <charconv>
#include <cmath>
#include <filesystem>
#include <optional>
#include <set>
#include <utility>

#include <fmt/format.h>

#include "io/config_json.h"
#include "sla2/error.h"

namespace sla2::io {

namespace {

// The first of two names: false.
bool second_of(const std::string& where, const char* key, const std::string& value,
               const std::array<const char*, 2>& names) {
  if (value != names[0] && value != names[1]) {
    throw Error(fmt::format("{}: {} must be \"{}\" or \"{}\", got \"{}\"", where, key, names[0],
                            names[1], value));
  }
  return value == names[1];
}

constexpr std::int64_t kMaxSide = 1 << 20;

}  // namespace

void validate(const WanConfig& config, const std::string& where) {
  const std::string at = where.empty() ? std::string() : where + ": ";
  const auto positive = [&at](const char* name, std::int64_t value) {
    if (value < 1 || value > (std::int64_t{1} << 24)) {
      throw Error(fmt::format("{}{} must be from 1 to 2^24, got {}", at, name, value));
    }
  };
  for (const std::int64_t side : config.patch_size) positive("patch_size", side);
  positive("num_attention_heads", config.num_attention_heads);
  positive("attention_head_dim", config.attention_head_dim);
  positive("in_channels", config.in_channels);
  positive("out_channels", config.out_channels);
  positive("text_dim", config.text_dim);
  positive("ffn_dim", config.ffn_dim);
  positive("num_layers", config.num_layers);
  positive("rope_max_seq_len", config.rope_max_seq_len);
  if (config.attention_head_dim % 2 != 0) {
    throw Error(
        fmt::format("{}attention_head_dim must be even, got {}", at, config.attention_head_dim));
  }
  if (config.freq_dim < 2 || config.freq_dim > (1 << 24)) {
    throw Error(fmt::format("{}freq_dim must be from 2 to 2^24, got {}", at, config.freq_dim));
  }
  if (!(config.eps > 0) || !std::isfinite(config.eps)) {
    throw Error(fmt::format("{}eps must be positive, got {}", at, config.eps));
  }
}

WanConfig wan_config_from_json(const nlohmann::json& json, const std::string& where) {
  JsonObject object(json, where);
  std::string class_name = "WanTransformer3DModel";
  std::optional<std::string> qk_norm = "rms_norm_across_heads";
  WanConfig config;
  object.optional("_class_name", class_name)
      .ignore("_diffusers_version")
      .ignore("_name_or_path")
      .optional("patch_size", config.patch_size)
      .optional("num_attention_heads", config.num_attention_heads)
      .optional("attention_head_dim", config.attention_head_dim)
      .optional("in_channels", config.in_channels)
      .optional("text_dim", config.text_dim)
      .optional("freq_dim", config.freq_dim)
      .optional("ffn_dim", config.ffn_dim)
      .optional("num_layers", config.num_layers)
      .optional("cross_attn_norm", config.cross_attn_norm)
      .optional("qk_norm", qk_norm)
      .optional("eps", config.eps)
      .optional("rope_max_seq_len", config.rope_max_seq_len);
  if (json.contains("out_channels") && json["out_channels"].is_null()) {
    object.ignore("out_channels");
    config.out_channels = config.in_channels;
  } else {
    object.optional("out_channels", config.out_channels);
  }
  for (const char* image : {"image_dim", "added_kv_proj_dim", "pos_embed_seq_len"}) {
    nlohmann::json value;
    object.optional(image, value);
    if (!value.is_null()) {
      throw Error(ErrorKind::kUnsupported,
                  fmt::format("{}: {} must be null (text to video only), got {}", where, image,
                              value.dump()));
    }
  }
  object.finish();
  if (class_name != "WanTransformer3DModel") {
    throw Error(
        fmt::format("{}: _class_name must be WanTransformer3DModel, got {}", where, class_name));
  }
  if (qk_norm != "rms_norm_across_heads") {
    throw Error(ErrorKind::kUnsupported,
                fmt::format("{}: qk_norm must be rms_norm_across_heads, got {}", where,
                            qk_norm.value_or("null")));
  }
  validate(config, where);
  return config;
}

void validate(const CardText& card, const std::string& where) {
  const auto positive = [&where](const char* name, std::int64_t value) {
    if (value < 1 || value > 1 << 16) {
      throw Error(fmt::format("{}: {} must be from 1 to 65536, got {}", where, name, value));
    }
  };
  positive("frames", card.frames);
  positive("height", card.height);
  positive("width", card.width);
  if (!(card.fps > 0) || !std::isfinite(card.fps)) {
    throw Error(fmt::format("{}: fps must be positive, got {}", where, card.fps));
  }
  if (!(card.shift > 0) || !std::isfinite(card.shift)) {
    throw Error(fmt::format("{}: shift must be positive, got {}", where, card.shift));
  }
  if (card.prediction != "x" && card.prediction != "velocity") {
    throw Error(fmt::format("{}: prediction must be \"x\" or \"velocity\", got \"{}\"", where,
                            card.prediction));
  }
}

CardText card_from_json(const nlohmann::json& json, const std::string& where) {
  CardText card;
  JsonObject object(json, where);
  object.required("frames", card.frames)
      .required("height", card.height)
      .required("width", card.width)
      .required("fps", card.fps)
      .required("prediction", card.prediction)
      .optional("shift", card.shift)
      .optional("captions", card.captions)
      .finish();
  validate(card, where);
  return card;
}

std::int64_t layer_of_attention(const std::string& path) {
  constexpr std::string_view kHead = "blocks.", kTail = ".attn1";
  std::int64_t layer = -1;
  if (path.size() > kHead.size() + kTail.size() && path.starts_with(kHead) &&
      path.ends_with(kTail)) {
    const char* const end = path.data() + path.size() - kTail.size();
    const auto [stop, failed] = std::from_chars(path.data() + kHead.size(), end, layer);
    if (failed != std::errc() || stop != end) layer = -1;
  }
  if (layer < 0 || fmt::format("blocks.{}.attn1", layer) != path) {
    throw Error(fmt::format("layers must be names like blocks.0.attn1, got \"{}\"", path));
  }
  return layer;
}

void validate(const Sla2Text& text, const std::string& where) {
  sla2::validate(text.config);
  for (const double keep : text.keeps) {
    if (!(keep > 0 && keep <= 1)) {
      throw Error(fmt::format("{}: keeps must lie in (0, 1], got {}", where, keep));
    }
  }
  std::set<std::string> seen;
  for (const std::string& layer : text.layers) {
    layer_of_attention(layer);
    if (!seen.insert(layer).second) {
      throw Error(fmt::format("{}: layers must be different, got {} twice", where, layer));
    }
  }
  const auto sides = [&where](const char* name, const std::array<std::int64_t, 3>& values) {
    for (const std::int64_t side : values) {
      if (side < 1 || side > kMaxSide) {
        throw Error(
            fmt::format("{}: {} must be from 1 to 2^20 on each side, got {}", where, name, side));
      }
    }
  };
  sides("tile", text.tile);
  sides("grid", text.grid);
  // Tokens by the hundred million are no video, but memory for their alpha.
  const double tokens = static_cast<double>(text.grid[0]) * static_cast<double>(text.grid[1]) *
                        static_cast<double>(text.grid[2]);
  if (tokens > 1 << 24) {
    throw Error(fmt::format("{}: grid must be at most 2^24 tokens, got {:.0f}", where, tokens));
  }
}

Sla2Text sla2_from_json(nlohmann::json json, const std::string& where) {
  if (!json.is_object()) throw Error(fmt::format("{} must hold an object", where));
  nlohmann::json own = nlohmann::json::object();
  for (const char* key : {"token_order", "tile", "grid", "router", "alpha", "keeps", "layers"}) {
    if (!json.contains(key)) continue;
    own[key] = json[key];
    json.erase(key);
  }
  Sla2Text text;
  try {
    text.config = config_from_json(json);
  } catch (const Error& error) {
    throw Error(error.kind(), fmt::format("{}: {}", where, error.what()));
  }
  std::string order, router, alpha;
  std::optional<std::array<std::int64_t, 3>> tile;
  JsonObject object(own, where);
  object.required("token_order", order)
      .required("grid", text.grid)
      .required("router", router)
      .required("alpha", alpha)
      .required("layers", text.layers)
      .optional("keeps", text.keeps)
      .optional("tile", tile)
      .finish();
  text.tiles = second_of(where, "token_order", order, {"raster", "tiles"});
  if (text.tiles && !tile) {
    throw Error(fmt::format("{}: tile must be given for token_order \"tiles\"", where));
  }
  if (tile) text.tile = *tile;
  text.router_per_head = second_of(where, "router", router, {"layer", "head"});
  text.alpha_per_head = second_of(where, "alpha", alpha, {"block", "head"});
  validate(text, where);
  return text;
}

std::map<std::string, std::string> weight_map_from_json(const nlohmann::json& json,
                                                        const std::string& where) {
  JsonObject object(json, where);
  nlohmann::json map, metadata;
  object.required("weight_map", map).optional("metadata", metadata).finish();
  if (!map.is_object()) throw Error(fmt::format("{}: weight_map must be an object", where));
  std::map<std::string, std::string> files;
  for (const auto& [tensor, file] : map.items()) {
    if (!file.is_string()) {
      throw Error(
          fmt::format("{}: weight_map.{} must be a string, got {}", where, tensor, file.dump()));
    }
    const auto name = file.get<std::string>();
    // A path would let a downloaded index read files outside its folder.
    if (name.empty() || name == "." || name == ".." ||
        std::filesystem::path(name).filename().string() != name) {
      throw Error(fmt::format("{}: weight_map.{} must be a file name without folders, got \"{}\"",
                              where, tensor, name));
    }
    files.emplace(tensor, name);
  }
  return files;
}

}  // namespace sla2::io

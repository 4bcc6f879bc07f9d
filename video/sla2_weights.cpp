#include <set>
#include <utility>

#include <fmt/format.h>

#include "io/config_json.h"
#include "io/files.h"
#include "io/model_files.h"
#include "sla2/error.h"
#include "video/weight_report.h"
#include "video/weights.h"

namespace sla2::video {
namespace {

namespace fs = std::filesystem;
using nn::AlphaShape;
using nn::RouterShape;

constexpr const char* kJson = "sla2.json";
constexpr const char* kTensors = "sla2.safetensors";

std::vector<std::string> parameter_names(Method method) {
  if (method == Method::kSla) return {"proj_out"};
  return {"proj_q", "proj_k", "alpha_logit"};
}

void check(const Sla2Weights& weights, const std::string& where) {
  io::Sla2Text text;
  text.config = weights.config;
  text.tile = weights.order.tile;
  text.grid = weights.grid;
  text.keeps = weights.keeps;
  text.layers = weights.layers;
  io::validate(text, where);
}

/// The tensors are exactly those that the layers own.
void check_names(const Sla2Weights& weights, const std::string& where) {
  Report report;
  std::set<std::string> expected;
  for (const std::string& layer : weights.layers) {
    for (const std::string& name : parameter_names(weights.config.method)) {
      expected.insert(layer + "." + name);
    }
  }
  for (const auto& [name, tensor] : weights.tensors) {
    if (!expected.contains(name)) report.extra.insert(name);
  }
  for (const std::string& name : expected) {
    if (!weights.tensors.contains(name)) report.missing.insert(name);
  }
  report.finish(where);
}

}  // namespace

Sla2Weights load_sla2(const std::filesystem::path& folder) {
  const fs::path path = folder / kJson;
  const io::Sla2Text text = io::sla2_from_json(io::read_json(path), path.string());
  Sla2Weights weights;
  weights.config = text.config;
  weights.order = {text.tiles ? TokenOrderKind::kTiles : TokenOrderKind::kRaster, text.tile};
  weights.grid = text.grid;
  weights.router = text.router_per_head ? RouterShape::kHead : RouterShape::kLayer;
  weights.alpha = text.alpha_per_head ? AlphaShape::kHead : AlphaShape::kBlock;
  weights.keeps = text.keeps;
  weights.layers = text.layers;
  check(weights, path.string());
  weights.tensors = load_tensors(folder / kTensors);
  check_names(weights, (folder / kTensors).string());
  for (const auto& [name, tensor] : weights.tensors) {
    if (!tensor.isfinite().all().item<bool>()) {
      throw Error(
          fmt::format("{}: {} must be finite, got NaN or Inf", (folder / kTensors).string(), name));
    }
  }
  return weights;
}

void save_sla2(const std::filesystem::path& folder, const Sla2Weights& weights,
               const std::string& save) {
  check(weights, (folder / kJson).string());
  check_names(weights, (folder / kTensors).string());
  io::make_output_folder(folder);
  nlohmann::json json = io::to_json(weights.config);
  json["token_order"] = weights.order.kind == TokenOrderKind::kTiles ? "tiles" : "raster";
  json["tile"] = weights.order.tile;
  json["grid"] = weights.grid;
  json["router"] = weights.router == RouterShape::kHead ? "head" : "layer";
  json["alpha"] = weights.alpha == AlphaShape::kHead ? "head" : "block";
  json["keeps"] = weights.keeps;
  json["layers"] = weights.layers;
  std::map<std::string, std::string> metadata{{"format", "pt"}};
  if (!save.empty()) metadata["save"] = save;
  save_tensors(folder / kTensors, weights.tensors, metadata);
  io::write_file(folder / kJson, json.dump(2) + "\n");
}

void apply_sla2(WanTransformer& model, const Sla2Weights& weights) {
  check(weights, kJson);
  if (!weights.tensors.empty()) check_names(weights, kTensors);
  const WanConfig& config = model->config();
  Report report;
  std::vector<std::pair<std::int64_t, nn::Attention>> modules;
  for (const std::string& path : weights.layers) {
    const std::int64_t layer = io::layer_of_attention(path);
    if (layer >= config.num_layers) {
      throw Error(
          fmt::format("layers must be among the model's {}, got {}", config.num_layers, path));
    }
    nn::Attention module(
        nn::AttentionOptions{.num_heads = config.num_attention_heads,
                             .head_dim = config.attention_head_dim,
                             .seq_len = weights.grid[0] * weights.grid[1] * weights.grid[2],
                             .config = weights.config,
                             .router = weights.router,
                             .alpha = weights.alpha});
    for (const auto& entry : module->named_parameters(/*recurse=*/false)) {
      const auto found = weights.tensors.find(path + "." + entry.key());
      if (found == weights.tensors.end()) continue;
      torch::Tensor parameter = entry.value();
      if (!report.fits(found->first, found->second, parameter.sizes())) continue;
      const torch::NoGradGuard no_grad;
      parameter.copy_(found->second);
    }
    modules.emplace_back(layer, module);
  }
  report.finish(kTensors);
  for (const auto& [layer, module] : modules) model->set_attention(layer, module);
  model->set_token_order(weights.order);
}

Sla2Weights collect_sla2(const WanTransformer& model, const Sla2Weights& like) {
  Sla2Weights weights = like;
  weights.tensors.clear();
  for (const std::string& path : like.layers) {
    const nn::Attention module = model->attention(io::layer_of_attention(path));
    if (module.is_empty()) {
      throw Error(fmt::format("{} must hold an SLA2 module, got full attention", path));
    }
    for (const auto& entry : module->named_parameters(/*recurse=*/false)) {
      weights.tensors[path + "." + entry.key()] =
          entry.value().detach().to(torch::kCPU, torch::kFloat32, false, /*copy=*/true);
    }
  }
  return weights;
}

void remove_sla2(WanTransformer& model) {
  for (std::int64_t layer = 0; layer < model->config().num_layers; ++layer) {
    model->set_attention(layer, nn::Attention(nullptr));
  }
  model->set_token_order({.kind = TokenOrderKind::kRaster});
}

}  // namespace sla2::video

#include <charconv>
#include <set>
#include <utility>

#include <fmt/format.h>

#include "io/config_json.h"
#include "io/files.h"
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
constexpr std::array kOwnKeys{"token_order", "tile", "grid", "router", "alpha", "keeps", "layers"};

std::vector<std::string> parameter_names(Method method) {
  if (method == Method::kSla) return {"proj_out"};
  return {"proj_q", "proj_k", "alpha_logit"};
}

/// i of "blocks.{i}.attn1".
std::int64_t layer_index(const std::string& path) {
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

/// The value whose name was read; names and values in the same order.
template <typename T>
T choice(const std::string& where, const char* key, const std::string& value,
         const std::array<std::pair<const char*, T>, 2>& choices) {
  for (const auto& [name, result] : choices) {
    if (value == name) return result;
  }
  throw Error(fmt::format("{}: {} must be \"{}\" or \"{}\", got \"{}\"", where, key,
                          choices[0].first, choices[1].first, value));
}

void check(const Sla2Weights& weights, const std::string& where) {
  validate(weights.config);
  for (const double keep : weights.keeps) {
    if (!(keep > 0 && keep <= 1)) {
      throw Error(fmt::format("{}: keeps must lie in (0, 1], got {}", where, keep));
    }
  }
  std::set<std::string> seen;
  for (const std::string& layer : weights.layers) {
    layer_index(layer);
    if (!seen.insert(layer).second) {
      throw Error(fmt::format("{}: layers must be different, got {} twice", where, layer));
    }
  }
  token_permutation(weights.order, weights.grid);  // refuses sides that are not positive
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
  nlohmann::json options = io::read_json(path);
  if (!options.is_object()) throw Error(fmt::format("{} must hold an object", path.string()));
  nlohmann::json own = nlohmann::json::object();
  for (const char* key : kOwnKeys) {
    if (!options.contains(key)) continue;
    own[key] = options[key];
    options.erase(key);
  }
  Sla2Weights weights;
  try {
    weights.config = io::config_from_json(options);
  } catch (const Error& error) {
    throw Error(error.kind(), fmt::format("{}: {}", path.string(), error.what()));
  }
  std::string order, router, alpha;
  io::JsonObject object(own, path.string());
  object.required("token_order", order)
      .required("grid", weights.grid)
      .required("router", router)
      .required("alpha", alpha)
      .required("layers", weights.layers)
      .optional("keeps", weights.keeps);
  std::optional<std::array<std::int64_t, 3>> tile;
  object.optional("tile", tile).finish();
  weights.order.kind = choice<TokenOrderKind>(
      path.string(), "token_order", order,
      {{{"raster", TokenOrderKind::kRaster}, {"tiles", TokenOrderKind::kTiles}}});
  if (tile) {
    weights.order.tile = *tile;
  } else if (weights.order.kind == TokenOrderKind::kTiles) {
    throw Error(fmt::format("{}: tile must be given for token_order \"tiles\"", path.string()));
  }
  weights.router =
      choice<RouterShape>(path.string(), "router", router,
                          {{{"layer", RouterShape::kLayer}, {"head", RouterShape::kHead}}});
  weights.alpha =
      choice<AlphaShape>(path.string(), "alpha", alpha,
                         {{{"block", AlphaShape::kBlock}, {"head", AlphaShape::kHead}}});
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

void save_sla2(const std::filesystem::path& folder, const Sla2Weights& weights) {
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
  save_tensors(folder / kTensors, weights.tensors, {{"format", "pt"}});
  io::write_file(folder / kJson, json.dump(2) + "\n");
}

void apply_sla2(WanTransformer& model, const Sla2Weights& weights) {
  check(weights, kJson);
  if (!weights.tensors.empty()) check_names(weights, kTensors);
  const WanConfig& config = model->config();
  Report report;
  std::vector<std::pair<std::int64_t, nn::Attention>> modules;
  for (const std::string& path : weights.layers) {
    const std::int64_t layer = layer_index(path);
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
    const nn::Attention module = model->attention(layer_index(path));
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

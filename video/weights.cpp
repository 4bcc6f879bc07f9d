#include "video/weights.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "io/config_json.h"
#include "io/files.h"
#include "io/model_files.h"
#include "io/safetensors.h"
#include "sla2/error.h"
#include "video/weight_report.h"

namespace sla2::video {
namespace {

namespace fs = std::filesystem;
using Tensors = std::map<std::string, torch::Tensor>;

constexpr const char* kStem = "diffusion_pytorch_model";
constexpr const char* kConfig = "config.json";

struct TypePair {
  io::ElementType element;
  torch::ScalarType scalar;
};
constexpr std::array kTypes{TypePair{io::ElementType::kF64, torch::kFloat64},
                            TypePair{io::ElementType::kF32, torch::kFloat32},
                            TypePair{io::ElementType::kF16, torch::kFloat16},
                            TypePair{io::ElementType::kBF16, torch::kBFloat16},
                            TypePair{io::ElementType::kI64, torch::kInt64},
                            TypePair{io::ElementType::kI32, torch::kInt32},
                            TypePair{io::ElementType::kI16, torch::kInt16},
                            TypePair{io::ElementType::kI8, torch::kInt8},
                            TypePair{io::ElementType::kU8, torch::kUInt8},
                            TypePair{io::ElementType::kBool, torch::kBool}};

torch::Tensor copy_of(const io::TensorEntry& entry, const std::string& name) {
  const auto* const found = std::ranges::find(kTypes, entry.type, &TypePair::element);
  if (found == kTypes.end()) {
    throw Error(fmt::format("{}: no torch type for {}", name, io::name_of(entry.type)));
  }
  torch::Tensor tensor = torch::empty(entry.shape, found->scalar);
  if (!entry.data.empty()) std::memcpy(tensor.data_ptr(), entry.data.data(), entry.data.size());
  return tensor;
}

fs::path index_path(const fs::path& folder) {
  return folder / fmt::format("{}.safetensors.index.json", kStem);
}
fs::path single_path(const fs::path& folder) {
  return folder / fmt::format("{}.safetensors", kStem);
}

/// The files that hold the weights: those of the index, or the only one.
std::vector<fs::path> weight_files(const fs::path& folder, Report& report,
                                   const Tensors& expected) {
  const fs::path index = index_path(folder);
  if (!fs::exists(index)) {
    if (!fs::exists(single_path(folder))) {
      throw Error(ErrorKind::kRuntime,
                  fmt::format("{} must hold {}.safetensors or its index, got neither",
                              folder.string(), kStem));
    }
    return {single_path(folder)};
  }
  std::set<std::string> names;
  for (const auto& [tensor, file] :
       io::weight_map_from_json(io::read_json(index), index.string())) {
    names.insert(file);
    if (!expected.contains(tensor)) report.extra.insert(tensor);
  }
  std::vector<fs::path> files;
  for (const std::string& name : names) files.push_back(folder / name);
  return files;
}

/// The transformer's own parameters by name: without those of its SLA2 modules.
Tensors own_parameters(const WanTransformerImpl& model) {
  Tensors parameters;
  for (const auto& entry : model.named_parameters()) {
    if (entry.key().find(".attn1.sla2.") == std::string::npos) {
      parameters.emplace(entry.key(), entry.value());
    }
  }
  return parameters;
}

/// What diffusers computes and keeps in fp32 whatever type it loads.
bool stays_fp32(const std::string& name) {
  for (const char* part : {"time_embedder.", "scale_shift_table", ".norm2."}) {
    if (name.find(part) != std::string::npos) return true;
  }
  return false;
}

/// About how many numbers the weights of a configuration are; what is left out is under 1%.
double parameter_count(const WanConfig& config) {
  const auto number = [](std::int64_t value) { return static_cast<double>(value); };
  const double dim = number(config.num_attention_heads) * number(config.attention_head_dim);
  double patch = 1;
  for (const std::int64_t side : config.patch_size) patch *= number(side);
  const double block = 8 * dim * dim + 2 * dim * number(config.ffn_dim);
  const double text = dim * (number(config.text_dim) + dim);
  const double time = dim * (number(config.freq_dim) + 7 * dim);
  const double ends = dim * patch * (number(config.in_channels) + number(config.out_channels));
  return number(config.num_layers) * block + text + time + ends;
}

/// The files' headers against the configuration, before memory of its size is asked for: numbers in
/// a configuration can be anything, those in a header have their bytes behind them.
void check_against_headers(const fs::path& folder, const WanConfig& config) {
  Report ignored;
  std::set<std::string> layers;
  double held = 0;
  for (const fs::path& path : weight_files(folder, ignored, {})) {
    const io::SafetensorsFile file(path);
    for (const auto& [name, entry] : file.tensors()) {
      held += static_cast<double>(entry.data.size() / io::bytes_of(entry.type));
      const std::size_t end = name.find('.', 7);
      if (name.starts_with("blocks.") && end != std::string::npos) {
        layers.insert(name.substr(7, end - 7));
      }
    }
  }
  // Missing and misshapen tensors of a model of the right size are named later, all of them.
  constexpr std::int64_t kMissingLayers = 8;
  const auto found = static_cast<std::int64_t>(layers.size());
  if (config.num_layers > found + kMissingLayers) {
    throw Error(fmt::format("{}: num_layers must be that of the weights, {}, got {}",
                            (folder / kConfig).string(), found, config.num_layers));
  }
  constexpr double kSpare = 1 << 22;
  if (parameter_count(config) > 2 * held + kSpare) {
    throw Error(
        fmt::format("{}: its sizes must be those of the weights, which hold {:.0f} numbers;"
                    " they ask for {:.3g}",
                    (folder / kConfig).string(), held, parameter_count(config)));
  }
}

void check_float(torch::Dtype dtype) {
  if (dtype != torch::kFloat32 && dtype != torch::kBFloat16 && dtype != torch::kFloat16) {
    throw Error(
        fmt::format("dtype must be float32, bfloat16 or float16, got {}", torch::toString(dtype)));
  }
}

std::string config_text(const WanConfig& config) {
  nlohmann::json json;
  json["_class_name"] = "WanTransformer3DModel";
  json["_diffusers_version"] = "0.35.0";
  json["patch_size"] = config.patch_size;
  json["num_attention_heads"] = config.num_attention_heads;
  json["attention_head_dim"] = config.attention_head_dim;
  json["in_channels"] = config.in_channels;
  json["out_channels"] = config.out_channels;
  json["text_dim"] = config.text_dim;
  json["freq_dim"] = config.freq_dim;
  json["ffn_dim"] = config.ffn_dim;
  json["num_layers"] = config.num_layers;
  json["cross_attn_norm"] = config.cross_attn_norm;
  json["qk_norm"] = "rms_norm_across_heads";
  json["eps"] = config.eps;
  json["rope_max_seq_len"] = config.rope_max_seq_len;
  for (const char* image : {"image_dim", "added_kv_proj_dim", "pos_embed_seq_len"}) {
    json[image] = nullptr;
  }
  return json.dump(2) + "\n";
}

/// Tensors in order of name, cut into shards of at most `max_bytes` (or one tensor).
std::vector<Tensors> cut_into_shards(const Tensors& tensors, std::int64_t max_bytes) {
  std::vector<Tensors> shards(1);
  std::int64_t bytes = 0;
  for (const auto& [name, tensor] : tensors) {
    const auto size = static_cast<std::int64_t>(tensor.nbytes());
    if (!shards.back().empty() && bytes + size > max_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().emplace(name, tensor);
    bytes += size;
  }
  return shards;
}

/// "" or "b": the one whose shards no index names.
std::string free_shard_letter(const fs::path& folder) {
  if (!fs::exists(index_path(folder))) return {};
  const std::string text = io::read_file(index_path(folder), std::size_t{64} << 20);
  return text.find(fmt::format("\"{}-b", kStem)) == std::string::npos ? "b" : "";
}

/// Removes weight files of an earlier save that the new one does not name.
void remove_others(const fs::path& folder, const std::set<fs::path>& keep) {
  std::error_code failed;
  std::vector<fs::path> stale;
  for (const auto& entry : fs::directory_iterator(folder, failed)) {
    const std::string name = entry.path().filename().string();
    const bool shard = name.starts_with(std::string(kStem) + "-") && name.ends_with(".safetensors");
    const bool ours = shard || entry.path() == single_path(folder);
    if (ours && !keep.contains(entry.path())) stale.push_back(entry.path());
  }
  for (const fs::path& path : stale) fs::remove(path, failed);
}

}  // namespace

void Report::finish(const std::string& where) const {
  std::vector<std::string> parts;
  const auto add = [&parts](const char* what, const std::set<std::string>& names) {
    if (names.empty()) return;
    constexpr std::size_t kShown = 10;
    std::vector<std::string> shown(
        names.begin(),
        std::next(names.begin(), static_cast<std::ptrdiff_t>(std::min(kShown, names.size()))));
    if (names.size() > kShown) shown.push_back(fmt::format("{} more", names.size() - kShown));
    parts.push_back(fmt::format("{} {} ({})", names.size(), what, fmt::join(shown, ", ")));
  };
  add("missing", missing);
  add("extra", extra);
  add("of another shape or type", misshapen);
  if (parts.empty()) return;
  throw Error(fmt::format("{}: tensors must be those of the configuration, got {}", where,
                          fmt::join(parts, ", ")));
}

bool Report::fits(const std::string& name, const torch::Tensor& tensor, at::IntArrayRef shape) {
  if (tensor.sizes() == shape && tensor.is_floating_point()) return true;
  misshapen.insert(
      fmt::format("{}: {} [{}] where {} [{}] belongs", name, torch::toString(tensor.scalar_type()),
                  fmt::join(tensor.sizes().vec(), ", "), "a float", fmt::join(shape.vec(), ", ")));
  return false;
}

std::map<std::string, torch::Tensor> load_tensors(const std::filesystem::path& path) {
  const io::SafetensorsFile file(path);
  Tensors tensors;
  for (const auto& [name, entry] : file.tensors()) {
    tensors.emplace(name, copy_of(entry, path.string() + ": " + name));
  }
  return tensors;
}

void save_tensors(const std::filesystem::path& path,
                  const std::map<std::string, torch::Tensor>& tensors,
                  const std::map<std::string, std::string>& metadata) {
  Tensors dense;  // keeps the copies alive until they are written
  std::map<std::string, io::TensorEntry> entries;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.defined()) throw Error(fmt::format("tensor {} must be defined", name));
    const torch::Tensor& flat = dense[name] = tensor.detach().to(torch::kCPU).contiguous();
    const auto* const found = std::ranges::find(kTypes, flat.scalar_type(), &TypePair::scalar);
    if (found == kTypes.end()) {
      throw Error(fmt::format("tensor {} must have a type that safetensors knows, got {}", name,
                              torch::toString(flat.scalar_type())));
    }
    entries.emplace(name, io::TensorEntry{.type = found->element,
                                          .shape = flat.sizes().vec(),
                                          .data = {static_cast<const std::byte*>(flat.data_ptr()),
                                                   flat.nbytes()}});
  }
  io::write_safetensors(path, entries, metadata);
}

WanConfig load_wan_config(const std::filesystem::path& folder) {
  const fs::path path = folder / kConfig;
  return io::wan_config_from_json(io::read_json(path), path.string());
}

WanTransformer load_transformer(const std::filesystem::path& folder, torch::Dtype dtype,
                                Progress* progress) {
  check_float(dtype);
  const WanConfig config = load_wan_config(folder);
  check_against_headers(folder, config);
  WanTransformer model(config, Fill::kNone);
  Tensors parameters = own_parameters(*model);
  Report report;
  std::set<std::string> loaded;
  if (progress != nullptr) {
    progress->begin_if_long("loading " + folder.string(), std::ssize(parameters));
  }
  for (const fs::path& path : weight_files(folder, report, parameters)) {
    const io::SafetensorsFile file(path);
    for (const auto& [name, entry] : file.tensors()) {
      const auto found = parameters.find(name);
      if (found == parameters.end()) {
        report.extra.insert(name);
        continue;
      }
      const torch::Tensor tensor = copy_of(entry, path.string() + ": " + name);
      loaded.insert(name);
      if (progress != nullptr) progress->update(std::ssize(loaded));
      if (!report.fits(name, tensor, found->second.sizes())) continue;
      found->second.set_data(tensor.to(stays_fp32(name) ? torch::kFloat32 : dtype));
    }
  }
  if (progress != nullptr) progress->end();
  for (const auto& [name, parameter] : parameters) {
    if (!loaded.contains(name)) report.missing.insert(name);
  }
  report.finish(folder.string());
  return model;
}

void check_same_save(const std::filesystem::path& sla2) {
  const fs::path parts = sla2 / "transformer";
  if (!fs::exists(parts / kConfig)) return;
  Report ignored;
  std::vector<fs::path> files = weight_files(parts, ignored, {});
  files.insert(files.begin(), sla2 / "sla2.safetensors");
  std::string first;
  for (const fs::path& path : files) {
    const io::SafetensorsFile file(path);
    const auto found = file.metadata().find("save");
    if (found == file.metadata().end()) continue;
    if (first.empty()) first = found->second;
    if (found->second == first) continue;
    throw Error(ErrorKind::kRuntime,
                fmt::format("{}: of another save ({}) than the files beside it ({}): that save was "
                            "cut off; `sla2 tune --resume` repeats it",
                            path.string(), found->second, first));
  }
}

void save_transformer(const std::filesystem::path& folder, WanTransformer& model,
                      torch::Dtype dtype, std::int64_t max_shard_bytes,
                      const std::string& save_id) {
  check_float(dtype);
  if (max_shard_bytes < 1) {
    throw Error(fmt::format("max_shard_bytes must be positive, got {}", max_shard_bytes));
  }
  io::make_output_folder(folder);
  Tensors tensors;
  std::int64_t total = 0;
  for (const auto& [name, parameter] : own_parameters(*model)) {
    const torch::Tensor& saved = tensors[name] = parameter.detach().to(torch::kCPU, dtype);
    total += static_cast<std::int64_t>(saved.nbytes());
  }
  std::map<std::string, std::string> metadata{{"format", "pt"}};
  if (!save_id.empty()) metadata["save"] = save_id;
  const std::vector<Tensors> shards = cut_into_shards(tensors, max_shard_bytes);
  // The index decides what is loaded, so it is written after, and removed before, what it replaces.
  if (shards.size() == 1) {
    save_tensors(single_path(folder), tensors, metadata);
    std::error_code failed;
    fs::remove(index_path(folder), failed);
    remove_others(folder, {single_path(folder)});
  } else {
    nlohmann::json map = nlohmann::json::object();
    std::set<fs::path> files;
    // Names of their own: the shards of an earlier save stay whole until the new index is there.
    const std::string save = free_shard_letter(folder);
    for (std::size_t i = 0; i < shards.size(); ++i) {
      const std::string name =
          fmt::format("{}-{}{:05}-of-{:05}.safetensors", kStem, save, i + 1, shards.size());
      save_tensors(folder / name, shards[i], metadata);
      files.insert(folder / name);
      for (const auto& [tensor, value] : shards[i]) map[tensor] = name;
    }
    const nlohmann::json index{{"metadata", {{"total_size", total}}}, {"weight_map", map}};
    io::write_file(index_path(folder), index.dump(2) + "\n");
    remove_others(folder, files);
  }
  io::write_file(folder / kConfig, config_text(model->config()));
}

}  // namespace sla2::video

#include "video/compare.h"

#include <algorithm>
#include <cmath>
#include <map>

#include <fmt/format.h>

#include "io/config_json.h"
#include "io/files.h"
#include "io/video_file.h"
#include "sla2/error.h"
#include "video/calibrate.h"
#include "video/device.h"
#include "video/generate.h"
#include "video/report/report.h"

namespace sla2::video {

namespace fs = std::filesystem;
using nlohmann::json;
using torch::Tensor;

namespace {

constexpr std::size_t kMaxComparisonBytes = 1 << 20;

struct VariantResult {
  double val_loss = 0;
  double denoised_db = 0;                // to the reference's, of the same noised clips
  std::map<std::string, Tensor> videos;  // by video_key, [3, F, H, W]
  Tensor denoised;                       // of the reference alone
};

std::string video_file(const ComparedClip& clip, const std::string& variant) {
  return fmt::format("videos/{}_{}.mp4", clip.name, variant);
}
std::string video_key(const ComparedClip& clip, std::int64_t number) {
  return fmt::format("video.{}.{}", number, clip.name);
}
constexpr const char* kDenoisedKey = "denoised";

json identity_of(const Variant& variant, const std::vector<ComparedClip>& clips,
                 const CompareOptions& options, const Run& run) {
  json identity = {{"variant", variant.identity},
                   {"seeds", variant.seeds},
                   {"steps", options.sampler.steps},
                   {"shift", options.sampler.shift},
                   {"guidance", options.sampler.guidance},
                   {"from_t", options.sampler.from_t},
                   {"validation_samples", options.validation_samples},
                   {"seed", run.seed}};
  for (const ComparedClip& clip : clips) {
    const auto sum = [](const Tensor& tensor) {
      return tensor.defined() ? json(tensor.sum(torch::kFloat64).item<double>()) : json();
    };
    identity["clips"].push_back(
        {clip.name, clip.prompt, clip.seed, sum(clip.source), sum(clip.text)});
  }
  return identity;
}

std::optional<VariantResult> read_result(const fs::path& base, const json& identity) {
  const fs::path done = base.string() + ".json", tensors = base.string() + ".safetensors";
  if (!fs::exists(done) || !fs::exists(tensors)) return std::nullopt;
  const json saved = io::parse_json(io::read_file(done, kMaxComparisonBytes), done.string());
  if (!saved.is_object() || saved.value("identity", json()) != identity) return std::nullopt;
  VariantResult result;
  result.val_loss = saved.at("val_loss").get<double>();
  result.denoised_db = saved.at("denoised_db").get<double>();
  result.videos = load_tensors(tensors);
  if (auto found = result.videos.extract(kDenoisedKey)) result.denoised = found.mapped();
  return result;
}

double psnr_of(const Tensor& value, const Tensor& reference, const CompareOptions& options) {
  return psnr(value, reference, options.fps ? kPixelPeak : latent_peak(reference));
}

/// Over the samples of a batch.
double mean_psnr(const Tensor& values, const Tensor& references, const CompareOptions& options) {
  double sum = 0;
  for (std::int64_t i = 0; i < values.size(0); ++i) {
    sum += psnr_of(values[i], references[i], options);
  }
  return sum / static_cast<double>(std::max<std::int64_t>(values.size(0), 1));
}

/// The rows of the report's clips with what is shown before any model's work.
json start_clips(const std::vector<ComparedClip>& clips, const CompareOptions& options,
                 const fs::path& folder, std::vector<std::vector<Tensor>>& sheet) {
  json list = json::array();
  for (const ComparedClip& clip : clips) {
    json row = {
        {"name", clip.name}, {"title", clip.title}, {"seed", clip.seed}, {"videos", json::array()}};
    if (options.fps) {
      const std::string file = video_file(clip, "source");
      io::write_mp4(folder / file, to_frames(clip.source, *options.fps));
      row["videos"].push_back(
          {{"column", "source"}, {"keep", nullptr}, {"file", file}, {"cell", 0}});
      sheet[list.size()].push_back(clip.source.to(torch::kCPU, torch::kFloat32));
    }
    list.push_back(std::move(row));
  }
  return list;
}

/// One video of all rows; null without videos.
json write_sheet(const std::vector<std::vector<Tensor>>& sheet, const CompareOptions& options,
                 const fs::path& folder) {
  if (!options.fps) return nullptr;
  const std::string file = "videos/sheet.mp4";
  std::vector<Tensor> rows;
  for (const auto& row : sheet) rows.push_back(torch::cat(row, 3));
  io::write_mp4(folder / file, to_frames(torch::cat(rows, 2), *options.fps));
  return {{"file", file}, {"columns", sheet.front().size()}, {"rows", sheet.size()}};
}

void sample_videos(const Variant& variant, Denoiser& denoiser,
                   const std::vector<ComparedClip>& clips, const CompareOptions& options, Run& run,
                   const fs::path& folder, VariantResult& result) {
  for (const ComparedClip& clip : clips) {
    for (std::int64_t number = 0; number < variant.seeds; ++number) {
      GenerateRequest request{.prompt = clip.prompt,
                              .seed = clip.seed + number,
                              .sampler = options.sampler,
                              .source = {},
                              .text = clip.text,
                              .negative_text = {}};
      if (options.sampler.from_t < 1) request.source = clip.source;
      const Generated made =
          generate(denoiser, request, run,
                   fmt::format("{}: {}, seed {}", variant.id, clip.name, request.seed));
      result.videos[video_key(clip, number)] = made.x.clone();
      if (number > 0 || !options.fps) continue;
      io::write_mp4(folder / video_file(clip, variant.id), to_frames(made.x, *options.fps));
    }
  }
}

/// `reference` is null for the reference itself.
VariantResult make_result(const Variant& variant, const VariantResult* reference, json identity,
                          const std::vector<ComparedClip>& clips, const Dataset& dataset,
                          const CompareOptions& options, Run& run, const fs::path& folder) {
  const fs::path base = folder / "samples" / variant.id;
  if (auto saved = read_result(base, identity)) {
    run.progress.note(fmt::format("{}: already sampled", variant.id));
    return *std::move(saved);
  }
  VariantResult result;
  Denoiser denoiser = variant.load();
  Validation validation =
      validate_denoiser(denoiser, dataset, options.flow, options.validation_samples,
                        fmt::format("{}: validation", variant.id), run);
  result.val_loss = validation.loss;
  sample_videos(variant, denoiser, clips, options, run, folder, result);
  std::map<std::string, Tensor> tensors = result.videos;
  if (reference == nullptr) {
    result.denoised = tensors[kDenoisedKey] = validation.denoised;
  } else {
    result.denoised_db = mean_psnr(validation.denoised, reference->denoised, options);
  }
  save_tensors(base.string() + ".safetensors", tensors);
  io::write_file(base.string() + ".json", json{{"identity", std::move(identity)},
                                               {"val_loss", result.val_loss},
                                               {"denoised_db", result.denoised_db}}
                                              .dump(1));
  return result;
}

json nested_blocks(const Tensor& blocks) {
  const Tensor cpu = blocks[0].to(torch::kCPU, torch::kInt32).contiguous();
  const auto read = cpu.accessor<std::int32_t, 3>();
  json heads = json::array();
  for (std::int64_t h = 0; h < cpu.size(0); ++h) {
    json rows = json::array();
    for (std::int64_t m = 0; m < cpu.size(1); ++m) {
      json row = json::array();
      for (std::int64_t l = 0; l < cpu.size(2); ++l) {
        if (read[h][m][l] >= 0) row.push_back(read[h][m][l]);
      }
      rows.push_back(std::move(row));
    }
    heads.push_back(std::move(rows));
  }
  return heads;
}

json nested_mass(const Tensor& mass) {
  const Tensor cpu = mass[0].to(torch::kCPU, torch::kFloat64).contiguous();
  const auto read = cpu.accessor<double, 2>();
  json heads = json::array();
  for (std::int64_t h = 0; h < cpu.size(0); ++h) {
    json row = json::array();
    for (std::int64_t m = 0; m < cpu.size(1); ++m) {
      row.push_back(std::round(read[h][m] * 1000) / 1000);
    }
    heads.push_back(std::move(row));
  }
  return heads;
}

}  // namespace

Comparison compare(const std::vector<Variant>& variants, const std::vector<ComparedClip>& clips,
                   const Dataset& dataset, const CompareOptions& options, Run& run,
                   const fs::path& folder) {
  if (variants.empty() || clips.empty()) throw Error("nothing to compare: no variant or no clip");
  if (options.fps) io::make_output_folder(folder / "videos");
  io::make_output_folder(folder / "samples");
  Comparison result{json::array(), json::array(), nullptr};
  std::vector<std::vector<Tensor>> sheet(clips.size());  // rows of what is shown
  result.clips = start_clips(clips, options, folder, sheet);
  std::optional<VariantResult> reference;
  json reference_identity;
  for (const Variant& variant : variants) {
    json identity = identity_of(variant, clips, options, run);
    if (reference) {
      identity["reference"] = reference_identity;
    } else {
      reference_identity = identity;
    }
    VariantResult made = make_result(variant, reference ? &*reference : nullptr, identity, clips,
                                     dataset, options, run, folder);
    double sum = 0;
    for (std::size_t i = 0; i < clips.size(); ++i) {
      const ComparedClip& clip = clips[i];
      std::vector<double> ratios;
      for (std::int64_t number = 0; reference && number < variant.seeds; ++number) {
        const std::string key = video_key(clip, number);
        ratios.push_back(psnr_of(made.videos.at(key), reference->videos.at(key), options));
        sum += ratios.back();
      }
      if (variant.seeds == 0 || !options.fps) continue;
      result.clips[i]["videos"].push_back({{"column", variant.id},
                                           {"method", variant.method},
                                           {"stage", variant.stage},
                                           {"keep", reference ? json(variant.keep) : json()},
                                           {"file", video_file(clip, variant.id)},
                                           {"cell", std::ssize(sheet[i])},
                                           {"psnr_db", reference ? json(ratios.front()) : json()}});
      sheet[i].push_back(made.videos.at(video_key(clip, 0)));
    }
    const std::int64_t videos = std::ssize(clips) * variant.seeds;
    const bool compared = reference && videos > 0;
    result.methods.push_back(
        {{"method", variant.method},
         {"keep", variant.keep},
         {"stage", variant.stage},
         {"train_steps", variant.train_steps ? json(*variant.train_steps) : json()},
         {"val_loss", made.val_loss},
         {"psnr_to_full_db", compared ? json(sum / static_cast<double>(videos)) : json()},
         {"videos", videos},
         {"psnr_denoised_db", reference ? json(made.denoised_db) : json()},
         {"step_ms", nullptr}});
    if (!variant.note.empty()) result.methods.back()["note"] = variant.note;
    if (!reference) reference = std::move(made);
  }
  result.sheet = write_sheet(sheet, options, folder);
  return result;
}

void add_times(json& methods, const std::vector<StepTime>& times) {
  for (json& row : methods) {
    if (row.contains("note")) continue;  // computed in another way
    for (const StepTime& time : times) {
      const bool same = std::abs(row["keep"].get<double>() - time.keep) < 1e-9;
      if (row["method"] == time.method && same) row["step_ms"] = time.step_ms;
    }
  }
}

json timing_json(const std::vector<StepTime>& times, double main_keep, std::int64_t repeats) {
  json timing = {{"steps", to_json(times)}, {"repeats", repeats}};
  const StepTime* full = nullptr;
  const StepTime* sla2 = nullptr;
  for (const StepTime& time : times) {
    if (time.method == "full") full = &time;
    if (time.method == "sla2" && std::abs(time.keep - main_keep) < 1e-9) sla2 = &time;
  }
  if (full != nullptr && sla2 != nullptr) {
    timing["speedup_step"] = full->step_ms / sla2->step_ms;
    timing["speedup_attention"] = full->attention_ms / sla2->attention_ms;
  }
  return timing;
}

json routing_map(Denoiser& denoiser, const Dataset& dataset, std::int64_t clip, double t,
                 Run& run) {
  const torch::NoGradGuard no_grad;
  const torch::Device device = denoiser.device();
  const Batch window = dataset.first_window(clip);
  if (!window.pixels.defined()) return nullptr;
  const Tensor x = to_model_input(window, device);
  const Tensor noise = seeded_noise(x.sizes(), run.seed, device);
  const Tensor level = torch::full({1}, t, torch::TensorOptions(device));
  json map = {{"clip", dataset.names()[static_cast<std::size_t>(clip)]}, {"t", t}};
  double best = -1;
  run.progress.begin("routing map", denoiser.transformer->config().num_layers);
  denoiser.transformer->set_observer(
      [&](std::int64_t layer, const Tensor& q, const Tensor& k, const Tensor&) {
        sla2::nn::Attention module = denoiser.transformer->attention(layer);
        const Config& config = module->options.config;
        sla2::nn::AttentionArguments arguments;
        arguments.proj_q = module->proj_q;
        arguments.proj_k = module->proj_k;
        const Tensor blocks = sla2::nn::route(q, k, arguments, config).blocks;
        const Tensor mass = block_attention_mass(q, k, config.block_q, config.block_k);
        const Tensor held = routed_mass(mass, blocks);
        map["blocks"].push_back(nested_blocks(blocks));
        map["mass"].push_back(nested_mass(held));
        map["key_blocks"] = mass.size(3);
        // The page opens on the head whose router holds most of the attention.
        const Tensor by_head = held[0].mean(1);
        if (by_head.max().item<double>() > best) {
          best = by_head.max().item<double>();
          map["start_layer"] = layer;
          map["start_head"] = by_head.argmax().item<std::int64_t>();
          map["start_block"] = held.size(2) * 5 / 8;
        }
        run.progress.update(layer + 1);
        return Tensor();
      });
  const Autocast autocast(device, true);
  denoiser.velocity(add_noise(x, noise, level), level,
                    denoiser.text_of_rows({denoiser.no_caption_row()}));
  denoiser.transformer->set_observer({});
  run.progress.end();
  const Tensor pixels = window.pixels.contiguous();
  map["frames"] = base64({reinterpret_cast<const std::byte*>(pixels.data_ptr<std::uint8_t>()),
                          static_cast<std::size_t>(pixels.numel())});
  return map;
}

}  // namespace sla2::video

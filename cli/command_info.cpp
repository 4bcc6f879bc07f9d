// sla2 info: the machine, the implementations and why, or what a file or folder holds.
#include <algorithm>
#include <array>
#include <fstream>
#include <thread>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/version.h>

#include "cli/command.h"
#include "io/files.h"
#include "io/safetensors.h"
#include "io/video_file.h"
#include "sla2/error.h"
#include "sla2/implementation.h"
#include "sla2/self_test.h"
#include "video/device.h"
#include "video/weights.h"

namespace sla2::cli {

namespace {

namespace fs = std::filesystem;

std::string cpu_field(const std::string& field) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':');
    if (line.starts_with(field) && colon != std::string::npos && colon + 2 <= line.size()) {
      return line.substr(colon + 2);
    }
  }
  return "unknown";
}

std::string instruction_sets() {
  const std::string flags = " " + cpu_field("flags") + " ";
  std::string found;
  for (const char* name : {"avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
                           "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}) {
    if (flags.find(fmt::format(" {} ", name)) != std::string::npos) {
      found += (found.empty() ? "" : " ") + std::string(name);
    }
  }
  return found.empty() ? "baseline" : found;
}

void print_machine() {
  fmt::print("sla2            {}\n", SLA2_VERSION);
  fmt::print("torch           {}\n", TORCH_VERSION);
  fmt::print("processor       {}\n", cpu_field("model name"));
  fmt::print("instructions    {}\n", instruction_sets());
  fmt::print("threads         {} of {}\n", torch::get_num_threads(),
             std::thread::hardware_concurrency());
  const auto gpu = video::find_gpu();
  fmt::print("GPU             {}\n",
             gpu ? fmt::format("{} x {}, {:.0f} GiB", gpu->count, gpu->name,
                               static_cast<double>(gpu->memory_bytes) / (1 << 30))
                 : "none that torch can use");
  std::string ffmpeg;
  try {
    ffmpeg = io::find_ffmpeg().string();
  } catch (const Error& error) {
    ffmpeg = error.what();
  }
  fmt::print("ffmpeg          {}\n", ffmpeg);
  fmt::print(
      "implementations (first that takes the problem; example: 8192 tokens, head size 128)\n");
  Problem problem{.q_tokens = 8192,
                  .k_tokens = 8192,
                  .head_dim = 128,
                  .value_dim = 128,
                  .protected_keys = {},
                  .config = {}};
  const std::array<std::pair<const char*, Pass>, 3> passes{
      {{"route", Pass::kRoute}, {"forward", Pass::kForward}, {"backward", Pass::kBackward}}};
  for (const Implementation* implementation : implementations()) {
    problem.device = implementation->device;
    for (const auto& [name, pass] : passes) {
      const std::string refusal = implementation->refusal(problem, pass);
      fmt::print("  {:<16}{:<10}{}\n", implementation->name, name,
                 refusal.empty() ? "yes" : "no: " + refusal);
    }
  }
}

// Fails where a GPU's kernels are wrong.
void print_self_test() {
  if (!video::find_gpu()) return;
  const std::vector<SelfTest> results = self_test(false);
  if (results.empty()) fmt::print("self-test       no kernels for this GPU in this build\n");
  for (const SelfTest& test : results) {
    fmt::print("self-test       {} on {}, driver {}: {} passes agree with the reference\n",
               test.implementation, test.machine, test.driver, test.checks);
  }
}

void print_tensors(const fs::path& path) {
  const io::SafetensorsFile file(path);
  std::int64_t total = 0;
  for (const auto& [name, entry] : file.tensors()) {
    total += static_cast<std::int64_t>(entry.data.size());
    fmt::print("  {:<60} {:<5} [{}]\n", name, io::name_of(entry.type),
               fmt::join(entry.shape, ", "));
  }
  for (const auto& [key, value] : file.metadata()) fmt::print("  {}: {}\n", key, value);
  fmt::print("{}: {} tensors, {:.1f} MB\n", path.string(), file.tensors().size(),
             static_cast<double>(total) / 1e6);
}

void print_model(const fs::path& folder) {
  video::WanTransformer model = video::load_transformer(folder);
  const video::WanConfig& config = model->config();
  std::int64_t parameters = 0;
  for (const auto& parameter : model->parameters()) parameters += parameter.numel();
  fmt::print("{}: transformer, {:.2f} M parameters, {} layers, {} heads of {}, patch {}\n",
             folder.string(), static_cast<double>(parameters) / 1e6, config.num_layers,
             config.num_attention_heads, config.attention_head_dim,
             fmt::join(config.patch_size, " x "));
  if (!video::has_model_card(folder)) return;
  const video::ModelCard card = video::load_model_card(folder);
  const auto grid = model->grid(card.frames, card.height, card.width);
  fmt::print("  {} frames of {} x {} at {} fps, {} tokens, predicts {}\n  captions: {}\n",
             card.frames, card.width, card.height, card.fps, grid[0] * grid[1] * grid[2],
             card.prediction, fmt::join(card.captions, ", "));
}

void print_path(const fs::path& path) {
  if (!fs::exists(path)) throw Error(ErrorKind::kRuntime, path.string() + ": does not exist");
  if (!fs::is_directory(path)) {
    if (path.extension() == ".safetensors") return print_tensors(path);
    const io::VideoInfo info = io::probe_video(path);
    fmt::print("{}: video, {} x {}, {:.2f} fps, {:.2f} s\n", path.string(), info.width, info.height,
               info.fps, info.seconds);
    return;
  }
  bool known = false;
  if (fs::exists(path / "config.json")) {
    print_model(path);
    known = true;
  }
  if (fs::exists(path / "sla2.json")) {
    const video::Sla2Weights weights = video::load_sla2(path);
    fmt::print(
        "{}: SLA2 weights of {} layers, method {}, keep {}, blocks {} x {}, trained for keep {}\n",
        path.string(), weights.layers.size(),
        weights.config.method == Method::kSla2 ? "sla2" : "sla", weights.config.keep,
        weights.config.block_q, weights.config.block_k, fmt::join(weights.keeps, ", "));
    if (fs::exists(path / "transformer" / "config.json")) print_model(path / "transformer");
    known = true;
  }
  if (fs::exists(path / "checkpoint.safetensors")) {
    const io::SafetensorsFile file(path / "checkpoint.safetensors");
    const auto step = file.metadata().find("step");
    fmt::print("{}: training checkpoint, step {}\n", (path / "checkpoint.safetensors").string(),
               step == file.metadata().end() ? "unknown" : step->second);
    known = true;
  }
  if (!known) {
    throw Error(ErrorKind::kRuntime,
                path.string() + ": holds no config.json, sla2.json or checkpoint.safetensors");
  }
}

class Info final : public Command {
 public:
  const char* name() const override { return "info"; }
  const char* summary() const override {
    return "Show this machine's implementations, or what a file or folder holds";
  }
  bool needs_device() const override { return false; }
  void declare(Options& options) override {
    options.positional("path", path_,
                       "a model, a folder of SLA2 weights, a safetensors or video file");
  }
  void run(Session&) override {
    if (path_.empty()) {
      print_machine();
      print_self_test();
    } else {
      print_path(path_);
    }
  }

 private:
  std::string path_;
};

}  // namespace

std::unique_ptr<Command> make_info() { return std::make_unique<Info>(); }

}  // namespace sla2::cli

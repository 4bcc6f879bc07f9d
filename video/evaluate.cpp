#include "video/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <thread>
#include <unistd.h>

#include <fmt/format.h>

#include "sla2/error.h"
#include "sla2/implementation.h"
#include "sla2/problem.h"
#include "video/calibrate.h"
#include "video/device.h"

namespace sla2::video {

using torch::Tensor;

namespace {

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

template <typename Body>
double milliseconds(const torch::Device& device, const Body& body) {
  synchronize(device);
  const auto start = std::chrono::steady_clock::now();
  body();
  synchronize(device);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

std::string first_match(const char* file, const std::string& key) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    if (line.rfind(key, 0) != 0) continue;
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "unknown";
}

}  // namespace

Validation validate_denoiser(Denoiser& denoiser, const Dataset& dataset, const FlowOptions& flow,
                             std::int64_t samples, const std::string& task, Run& run) {
  const torch::NoGradGuard no_grad;
  const auto seed = static_cast<std::int64_t>(mix(run.seed, kStreamEvaluate) >> 1);
  FlowOptions options = flow;
  options.caption_dropout = 0;
  double sum = 0;
  std::vector<Tensor> denoised;
  run.progress.begin(task, samples);
  for (std::int64_t i = 0; i < samples; ++i) {
    run.check_stop("evaluating");
    const Autocast autocast(denoiser.device(), true);
    const DiffusionPass pass =
        diffusion_pass(denoiser, dataset, dataset.batch(seed, i, 1), options, seed, i);
    sum += flow_loss(pass.output, pass.x, pass.noise, pass.t, options).item<double>();
    denoised.push_back(pass.denoised(options.prediction).to(torch::kCPU, torch::kFloat32));
    run.progress.update(i + 1);
  }
  run.progress.end();
  return {sum / static_cast<double>(std::max<std::int64_t>(samples, 1)),
          denoised.empty() ? Tensor() : torch::cat(denoised)};
}

double latent_peak(const Tensor& reference) {
  return (reference.max() - reference.min()).item<double>();
}

double psnr(const Tensor& a, const Tensor& b, double peak) {
  constexpr double kEqual = 99;
  const double error =
      (a.to(torch::kFloat64) - b.to(torch::kFloat64)).square().mean().item<double>();
  return error <= 0 ? kEqual : std::min(kEqual, 10 * std::log10(peak * peak / error));
}

std::vector<StepTime> time_methods(Denoiser& denoiser, const std::vector<TimedMethod>& methods,
                                   const Tensor& text, std::int64_t repeats, Run& run) {
  const torch::NoGradGuard no_grad;
  const torch::Device device = denoiser.device();
  std::vector<std::int64_t> shape = denoiser.sample_shape();
  shape.insert(shape.begin(), 1);
  const Tensor x = seeded_noise(shape, run.seed, device);
  const Tensor t = torch::full({1}, 0.5, torch::TensorOptions(device));
  std::vector<std::vector<double>> steps(methods.size()), attention(methods.size());
  std::vector<std::vector<sla2::nn::Attention>> modules(methods.size());
  for (std::size_t i = 0; i < methods.size(); ++i) {
    if (methods[i].method == "full") continue;
    modules[i] = make_attention(methods[i].weights, denoiser.transformer->config(), device);
  }
  remove_sla2(denoiser.transformer);
  std::int64_t done = 0;  // a step of every method, then their attention, every round
  run.progress.begin("timing", (repeats + 1) * (std::ssize(methods) + 1));
  for (std::int64_t round = 0; round <= repeats; ++round) {
    for (std::size_t i = 0; i < methods.size(); ++i) {
      run.check_stop("timing");
      const bool full = methods[i].method == "full";
      const auto set = [&](bool on) {
        for (std::int64_t layer = 0; !full && layer < denoiser.transformer->config().num_layers;
             ++layer) {
          denoiser.transformer->set_attention(
              layer,
              on ? modules[i][static_cast<std::size_t>(layer)] : sla2::nn::Attention(nullptr));
        }
      };
      set(true);
      const double step = milliseconds(device, [&] { denoiser.velocity(x, t, text); });
      set(false);
      if (round > 0) steps[i].push_back(step);
      run.progress.update(++done);
    }
    std::vector<double> spent(methods.size(), 0);
    denoiser.transformer->set_observer(
        [&](std::int64_t layer, const Tensor& q, const Tensor& k, const Tensor& v) {
          for (std::size_t i = 0; i < methods.size(); ++i) {
            spent[i] += milliseconds(device, [&] {
              if (methods[i].method == "full") {
                torch::scaled_dot_product_attention(q, k, v);
              } else {
                modules[i][static_cast<std::size_t>(layer)]->forward(q, k, v);
              }
            });
          }
          return Tensor();
        });
    denoiser.velocity(x, t, text);
    denoiser.transformer->set_observer({});
    for (std::size_t i = 0; round > 0 && i < methods.size(); ++i) attention[i].push_back(spent[i]);
    run.progress.update(++done);
  }
  run.progress.end();
  std::vector<StepTime> times;
  for (std::size_t i = 0; i < methods.size(); ++i) {
    times.push_back({methods[i].method, methods[i].keep, median(steps[i]), median(attention[i])});
  }
  return times;
}

nlohmann::json to_json(const std::vector<StepTime>& times) {
  nlohmann::json list = nlohmann::json::array();
  for (const StepTime& time : times) {
    list.push_back({{"method", time.method},
                    {"keep", time.keep},
                    {"step_ms", time.step_ms},
                    {"attention_ms", time.attention_ms}});
  }
  return list;
}

nlohmann::json describe_machine(const torch::Device& device) {
  Problem problem;
  problem.q_tokens = problem.k_tokens = 4096;
  problem.device = device.is_cuda() ? Device::kCuda : Device::kCpu;
  nlohmann::json machine;
  machine["processor"] = first_match("/proc/cpuinfo", "model name");
  machine["cores"] = std::thread::hardware_concurrency();
  machine["threads"] = torch::get_num_threads();
  const double bytes =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  machine["memory_gb"] = std::round(bytes / 1e8) / 10;
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    machine["peak_rss_mb"] = std::round(static_cast<double>(usage.ru_maxrss) * 1024 / 1e6);
  }
  try {
    machine["kernels"] = select_implementation(problem, Pass::kForward).name;
  } catch (const Error&) {
    machine["kernels"] = "none";  // of SLA2; a build without CUDA runs full attention on a GPU
  }
  if (device.is_cuda()) {
    if (const auto gpu = find_gpu()) machine["gpu"] = gpu->name;
  }
  utsname name{};
  if (uname(&name) == 0) machine["system"] = fmt::format("{} {}", name.sysname, name.release);
  return machine;
}

nlohmann::json describe_versions() {
  return {{"sla2", SLA2_VERSION},
          {"torch",
           fmt::format("{}.{}.{}", TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH)},
          {"compiler", __VERSION__}};
}

}  // namespace sla2::video

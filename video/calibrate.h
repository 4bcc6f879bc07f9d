// Stage 1 (Alg. 1): the model is frozen; inside its forward each layer's router and alpha learn to
// reproduce that layer's full attention with soft routing.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include <nlohmann/json.hpp>
#include <torch/torch.h>

#include "video/data.h"
#include "video/denoiser.h"
#include "video/flow.h"
#include "video/run.h"
#include "video/start_weights.h"
#include "video/weights.h"

namespace sla2::video {

/// Which keeps one forward of the model trains for.
enum class KeepSchedule : std::uint8_t {
  kAll,   ///< every keep, one optimiser step each
  kTurns  ///< one keep a step: the first at every other, the others in turns
};

struct CalibrateOptions {
  std::vector<double> keeps{0.05, 0.04, 0.03};
  std::int64_t steps = 60;
  std::int64_t batch = 1;
  double router_lr = 4e-3;
  double alpha_lr = 0.3;
  double final_lr = 0.05;  ///< cosine decay of both to this fraction at the last step; 1: constant
  KeepSchedule schedule = KeepSchedule::kAll;
  std::int64_t alpha_samples = 2;     ///< samples on which the start of alpha is measured
  std::int64_t held_out_samples = 2;  ///< samples of the error table, not trained on
  std::int64_t checkpoint_every = 20;
  FlowOptions flow;
  /// What a resume compares beside these options: the contents of the model and of the data.
  nlohmann::json identity = nlohmann::json::object();
};
/// Throws sla2::Error naming the first option out of range.
void validate(const CalibrateOptions& options);

struct LayerError {
  std::int64_t layer = 0;
  double keep = 0;
  double before = 0, after = 0;  ///< relative L2 of the hard-routed result to full attention
};

struct CalibrateResult {
  Sla2Weights weights;
  std::vector<LayerError> errors;
  std::vector<double> losses;      ///< of each step: mean over layers (and keeps)
  std::vector<double> step_keeps;  ///< the keep of each step; 0 when all were trained
};

/// Trains from `start`: its config, order, grid, shapes; fresh weights. Method sla has nothing to
/// train in this stage and returns at once with before == after. Writes checkpoint.safetensors in
/// `folder`; with `resume` it goes on from there, if it is there and of the same options (`steps`
/// may differ). A loss or gradient that is NaN or Inf ends it before it reaches the weights. Throws
/// sla2::Error, Interrupted.
CalibrateResult calibrate(Denoiser& denoiser, const Dataset& dataset, const Sla2Weights& start,
                          const CalibrateOptions& options, Run& run,
                          const std::filesystem::path& folder, bool resume);

/// The state at (t, noise) of `count` samples drawn from (seed, stream, index), and its velocity
/// pass: what stage 1, its error table and the routing map look at. t in [0, 1] fixes the noise
/// level; under 0 it is drawn.
void run_sample(Denoiser& denoiser, const Dataset& dataset, const FlowOptions& flow,
                std::int64_t seed, std::int64_t stream, std::int64_t index, std::int64_t count,
                double t = -1);

[[nodiscard]] nlohmann::json to_json(const std::vector<LayerError>& errors);

}  // namespace sla2::video

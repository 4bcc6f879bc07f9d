// Stage 2 (Alg. 1): every self-attention is SLA2 with hard routing and a low-bit forward; the whole
// model and alpha (method sla: proj_out) are trained end to end, the router stays as it is.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include <nlohmann/json.hpp>

#include "video/data.h"
#include "video/denoiser.h"
#include "video/flow.h"
#include "video/run.h"
#include "video/trainer.h"
#include "video/weights.h"

namespace sla2::video {

struct TuneOptions {
  TrainOptions train;
  std::int64_t batch = 2;
  double alpha_lr_scale = 300;    ///< learning rate of alpha_logit, in units of train.lr
  double proj_out_lr_scale = 10;  ///< of proj_out (method sla)
  FlowOptions flow;
};

struct TuneResult {
  Sla2Weights weights;
  std::vector<double> losses;
};

/// Puts `weights` into the model, trains, and saves sla2.json, sla2.safetensors and transformer/ in
/// `folder`. `config` is what a resume compares. Throws sla2::Error, Interrupted.
TuneResult tune(Denoiser& denoiser, const Dataset& dataset, const Sla2Weights& weights,
                const TuneOptions& options, Run& run, const std::filesystem::path& folder,
                const nlohmann::json& config, bool resume, const std::string& task = "stage 2");

}  // namespace sla2::video

// From real video to a report: both stages, the same seeds with every method, one page.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "video/run.h"

namespace sla2::video {

struct DemoOptions {
  std::filesystem::path out = "out/demo";
  std::filesystem::path model;                      // a model with a card
  std::vector<std::filesystem::path> train_inputs;  // clips of both stages
  std::vector<std::filesystem::path> own_inputs;    // shown video to video instead, if any
  std::string preset = "small", command;
  /// Pixels of the videos; with model_steps above 0 the model is first trained on, with full
  /// attention, at this size: {frames, height, width}. Without, the size is the model's.
  std::array<std::int64_t, 3> size{};
  std::int64_t model_steps = 0, model_batch = 8;
  double model_lr = 5e-4;
  std::vector<double> keeps{0.10, 0.05, 0.03};  // the first one is the main one
  std::int64_t block_q = 64, block_k = 32;
  std::int64_t stage1_steps = 20, stage1_batch = 1;
  bool keeps_in_turns = true;  // stage 1 trains one keep a step instead of all of them
  std::int64_t stage2_steps = 24, stage2_batch = 2;
  // Of a sweep, the best for each method: SLA2 starts near full attention and is best served by a
  // small rate that decays; SLA has a longer way to go and is best served by a constant one.
  double sla2_lr = 3e-5, sla_lr = 7e-5;
  double sla2_final_lr = 0.05, sla_final_lr = 1;  // cosine decay to this fraction; 1: constant
  double sla2_alpha_lr = 0.015, sla_proj_out_lr = 7e-4;
  std::int64_t sampling_steps = 10, clips = 3, validation_samples = 8, repeats = 3;
  std::int64_t seeds = 2;  // videos of a clip by the methods that are compared, one of them shown
  double from_t = 0.6;     // of video to video
};
/// "small": minutes on two cores; "large": for a GPU. Throws sla2::Error for another name.
DemoOptions demo_preset(const std::string& name);

/// The checkpoint that comes with the program: in the source tree or beside the installed program.
/// Throws sla2::Error saying what was tried.
std::filesystem::path default_model();

/// Runs everything, writes report.html and report.json in options.out and returns the latter. What
/// an earlier, interrupted run of the same options finished is reused. Throws sla2::Error,
/// Interrupted.
nlohmann::json run_demo(const DemoOptions& options, Run& run);

}  // namespace sla2::video

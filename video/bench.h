// Speed of the operator and of a model against full attention, measured in turns in one run.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "sla2/attention.h"
#include "sla2/config.h"
#include "video/denoiser.h"
#include "video/run.h"

namespace sla2::video {

struct Quartiles {
  double q1 = 0, median = 0, q3 = 0;  // seconds
};

struct BenchRow {
  std::string what;  // "sla2 int8", "torch sdpa fp32"
  std::string pass;  // "forward", "backward", "step"
  Quartiles seconds;
  double tflops = 0;    // effective: 4 N N d a head forward, 10 N N d backward; 0: not counted
  double speed_up = 0;  // of SLA2 over this row
};

/// One launch of the CUDA backend within a pass.
struct StageTime {
  std::string pass, stage;
  Quartiles seconds;
};

struct OpBenchOptions {
  std::array<std::int64_t, 4> shape{1, 1, 8192, 128};  // B, H, N, D
  Config config;
  std::vector<Pass> passes{Pass::kForward, Pass::kBackward};
  std::int64_t repeats = 5;
  bool rivals = true;  // PyTorch's attention too
};

/// What was to be measured and could not be.
struct LeftOut {
  std::string what, reason;
};

struct OpBenchResult {
  double error = 0;  // relative L2 against the reference implementation, up to 1024 tokens
  std::vector<BenchRow> rows;
  std::vector<StageTime> stages;
  std::vector<LeftOut> left_out;
  std::string rivals_torch;  // version of the torch that ran FlexAttention; empty: none did
};

/// On a GPU (bench/suite.h measures processors). FlexAttention runs in a Python process of its own
/// (bench/rivals.h), in turns with the others, with SLA2's routing by blocks of 128 x 128 as its
/// mask. Verifies once, then times. Throws sla2::Error, also when the result is wrong.
OpBenchResult bench_operator(const OpBenchOptions& options, Run& run);

/// One sampling step with full attention and with the SLA2 weights that `denoiser` holds.
std::vector<BenchRow> bench_model(Denoiser& denoiser, std::int64_t repeats, Run& run);

}  // namespace sla2::video

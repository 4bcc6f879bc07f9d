// sla2 bench: speed against full attention, of the operator or of a model's sampling step.
#include <array>
#include <cstdlib>
#include <thread>

#include <fmt/format.h>

#include "cli/command.h"
#include "cli/stage_options.h"
#include "io/config_json.h"
#include "io/files.h"
#include "video/bench.h"

namespace sla2::cli {

namespace {

class Bench final : public Command {
 public:
  const char* name() const override { return "bench"; }
  const char* summary() const override { return "Measure the speed against full attention"; }

  void declare(Options& options) override {
    options.positional("what", what_, "op (default) or model");
    options.add("--shape", shape_, "B,H,N,D of op").range(1, 1 << 24);
    options.add("--keep", keep_, "fraction of key blocks kept").range(1e-6, 1);
    options.add("--precision", precision_, "of the sparse branch")
        .one_of({"int8", "fp8", "bf16", "fp32"});
    options.add("--block-q", config_.block_q, "tokens of a query block")
        .one_of_numbers(kBlockSizes);
    options.add("--block-k", config_.block_k, "tokens of a key block").one_of_numbers(kBlockSizes);
    options.add("--repeats", repeats_, "timed rounds").range(1, 10000);
    options.add("--model", model_, "folder of the model, for model");
    options.add("--sla2", sla2_, "folder of SLA2 weights, for model");
    options.add("--json", json_, "also write the figures to this file");
  }

  void run(Session& session) override {
    nlohmann::json report{{"command", session.command_line},
                          {"threads", torch::get_num_threads()},
                          {"device", session.run.device.str()},
                          {"options", session.options.effective()}};
    std::vector<video::BenchRow> rows;
    if (what_ == "op") {
      const auto result = video::bench_operator(operator_options(), session.run);
      fmt::print("verified: {:.1e} relative L2 to the reference\n", result.error);
      report["error"] = result.error;
      rows = result.rows;
      for (const video::StageTime& stage : result.stages) {
        report["stages"].push_back({{"pass", stage.pass},
                                    {"stage", stage.stage},
                                    {"median_ms", stage.seconds.median * 1e3},
                                    {"quartile1_ms", stage.seconds.q1 * 1e3},
                                    {"quartile3_ms", stage.seconds.q3 * 1e3}});
        fmt::print("{:<10}{:<18}{:>12.3f} ms\n", stage.pass, stage.stage,
                   stage.seconds.median * 1e3);
      }
    } else if (what_ == "model") {
      if (sla2_.empty()) throw UsageError("bench model needs --sla2");
      settle_model(model_, sla2_, session.run.progress);
      video::Denoiser denoiser = video::load_denoiser(model_, session.run.device, sla2_);
      rows = video::bench_model(denoiser, repeats_, session.run);
    } else {
      throw UsageError(fmt::format("bench takes op or model, got \"{}\"", what_));
    }
    report["rows"] = print(rows);
    warn_if_busy(report);
    if (!json_.empty()) io::write_file(json_, report.dump(2) + "\n");
  }

 private:
  video::OpBenchOptions operator_options() const {
    if (shape_.size() != 4) {
      throw UsageError(fmt::format("--shape must be B,H,N,D, got {} number(s)", shape_.size()));
    }
    video::OpBenchOptions options{.shape = {shape_[0], shape_[1], shape_[2], shape_[3]},
                                  .config = io::config_from_json({{"keep", keep_},
                                                                  {"precision", precision_},
                                                                  {"block_q", config_.block_q},
                                                                  {"block_k", config_.block_k}}),
                                  .repeats = repeats_};
    return options;
  }

  // torch's threads spin at barriers: on a busy machine its times grow by far more than the load.
  static void warn_if_busy(nlohmann::json& report) {
    std::array<double, 1> load{};
    if (getloadavg(load.data(), 1) != 1) return;
    report["load_average"] = load[0];
    const unsigned cores = std::thread::hardware_concurrency();
    if (load[0] > 1.5 * cores) {
      fmt::print(
          "load average {:.1f} on {} cores: others use this machine, do not trust the times\n",
          load[0], cores);
    }
  }

  static nlohmann::json print(const std::vector<video::BenchRow>& rows) {
    nlohmann::json list = nlohmann::json::array();
    fmt::print("{:<18}{:<10}{:>12}{:>12}{:>12}{:>12}{:>12}\n", "", "", "median ms", "quartile 1",
               "quartile 3", "TFLOP/s", "sla2 is");
    for (const auto& row : rows) {
      fmt::print("{:<18}{:<10}{:>12.2f}{:>12.2f}{:>12.2f}{:>12}{:>11.2f}x\n", row.what, row.pass,
                 row.seconds.median * 1e3, row.seconds.q1 * 1e3, row.seconds.q3 * 1e3,
                 row.tflops > 0 ? fmt::format("{:.3f}", row.tflops) : "", row.speed_up);
      list.push_back({{"what", row.what},
                      {"pass", row.pass},
                      {"median_ms", row.seconds.median * 1e3},
                      {"quartile1_ms", row.seconds.q1 * 1e3},
                      {"quartile3_ms", row.seconds.q3 * 1e3},
                      {"effective_tflops", row.tflops},
                      {"speed_up", row.speed_up}});
    }
    return list;
  }

  std::string what_ = "op";
  std::vector<std::int64_t> shape_{1, 1, 8192, 128};
  Config config_;
  double keep_ = 0.03;
  std::string precision_ = "int8";
  std::int64_t repeats_ = 5;
  std::filesystem::path model_, sla2_, json_;
};

}  // namespace

std::unique_ptr<Command> make_bench() { return std::make_unique<Bench>(); }

}  // namespace sla2::cli

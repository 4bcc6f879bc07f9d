// sla2 bench: speed against full attention, of the operator or of a model's sampling step.
#include <array>
#include <cstdlib>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "bench/suite.h"
#include "cli/command.h"
#include "cli/precision.h"
#include "cli/stage_options.h"
#include "io/config_json.h"
#include "io/files.h"
#include "video/bench.h"
#include "video/device.h"

namespace sla2::cli {

namespace {

class Bench final : public Command {
 public:
  const char* name() const override { return "bench"; }
  const char* summary() const override { return "Measure the speed against full attention"; }

  void declare(Options& options) override {
    options.positional("what", what_, "op (default) or model");
    options.add("--shape", shape_, "B,H,N,D of op; none: the whole grid").range(1, 1 << 24);
    options.add("--keep", keep_, "fractions of key blocks kept; none: 0.03,0.05,0.1,1")
        .range(1e-6, 1);
    options.add("--precision", precision_, "of the sparse branch: int8,bf16,fp32 (a GPU: fp8 too)");
    options.add("--pass", pass_, "forward,backward");
    options.add("--block-q", config_.block_q, "tokens of a query block")
        .one_of_numbers(kBlockSizes);
    options.add("--block-k", config_.block_k, "tokens of a key block").one_of_numbers(kBlockSizes);
    options.add("--dtype", dtype_, "of op's inputs on the CPU").one_of({"fp32", "bf16", "fp16"});
    options.add("--layout", layout_, "of op's tensors on the CPU: bhnd,bnhd");
    options.add("--implementation", implementation_, "of the operator on the CPU, by name");
    options.add("--repeats", repeats_, "timed rounds at most").range(1, 10000);
    options.add("--row-seconds", row_seconds_, "time of a row's repetitions").above(0, 3600);
    options.add("--minutes", minutes_, "what is not begun by then is left out").above(0, 1e6);
    options.add("--no-rivals", no_rivals_, "leave PyTorch's attention out");
    options.add("--model", model_, "folder of the model, for model");
    options.add("--sla2", sla2_, "folder of SLA2 weights, for model");
    options.add("--json", json_, "also write the figures to this file");
  }

  void run(Session& session) override {
    for (const std::string& precision : precision_) check_precision(precision, session);
    nlohmann::json report{{"command", session.command_line},
                          {"device", session.run.device.str()},
                          {"options", session.options.effective()}};
    if (what_ == "op" && session.run.device.is_cpu()) {
      report.update(on_cpu(session));
    } else if (what_ == "op") {
      report.update(on_gpu(session));
    } else if (what_ == "model") {
      if (sla2_.empty()) throw UsageError("bench model needs --sla2");
      settle_model(model_, sla2_, session.run.progress);
      video::Denoiser denoiser =
          video::load_denoiser(model_, session.run.device, sla2_, &session.run.progress);
      report["rows"] = print(video::bench_model(denoiser, repeats_, session.run));
    } else {
      throw UsageError(fmt::format("bench takes op or model, got \"{}\"", what_));
    }
    warn_if_busy(report);
    if (!json_.empty()) io::write_file(json_, report.dump(2) + "\n");
  }

 private:
  /// A shape or a name that the operator refuses came from an option.
  nlohmann::json on_cpu(const Session& session) const {
    try {
      return bench::run_suite(suite_options(session));
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kInvalidArgument) throw;
      throw UsageError(error.what());
    }
  }

  template <typename Value>
  static std::vector<Value> values_of(const char* option, const std::vector<std::string>& names,
                                      const std::map<std::string, Value>& values) {
    std::vector<Value> result;
    for (const std::string& name : names) {
      const auto found = values.find(name);
      if (found == values.end()) {
        std::string all;
        for (const auto& [known, value] : values) all += (all.empty() ? "" : ", ") + known;
        throw UsageError(fmt::format("{} must be of {}, got \"{}\"", option, all, name));
      }
      result.push_back(found->second);
    }
    return result;
  }

  void check_shape() const {
    if (shape_.size() == 4) return;
    throw UsageError(fmt::format("--shape must be B,H,N,D, got {} number(s)", shape_.size()));
  }

  std::vector<Pass> passes() const {
    return values_of<Pass>("--pass", pass_,
                           {{"forward", Pass::kForward}, {"backward", Pass::kBackward}});
  }

  bench::SuiteOptions suite_options(const Session& session) const {
    bench::SuiteOptions o;
    if (!shape_.empty()) {
      check_shape();
      o.batch = shape_[0];
      o.heads = shape_[1];
      o.tokens = {shape_[2]};
      o.head_dims = {shape_[3]};
    }
    if (!keep_.empty()) o.keeps = keep_;
    if (!precision_.empty()) {
      o.precisions = values_of<Precision>(
          "--precision", precision_,
          {{"int8", Precision::kInt8}, {"bf16", Precision::kBf16}, {"fp32", Precision::kFp32}});
    }
    if (!pass_.empty()) o.passes = passes();
    if (!layout_.empty()) {
      o.layouts = values_of<bench::Layout>(
          "--layout", layout_, {{"bhnd", bench::Layout::kBHND}, {"bnhd", bench::Layout::kBNHD}});
    }
    o.dtype = dtype_ == "fp32" ? DType::kF32 : dtype_ == "bf16" ? DType::kBF16 : DType::kF16;
    if (session.threads > 0) o.threads = {session.threads};
    o.config.block_q = config_.block_q;
    o.config.block_k = config_.block_k;
    o.implementation = implementation_;
    o.repeats = repeats_;
    o.seconds_a_row = row_seconds_;
    o.minutes = minutes_;
    o.rivals = !no_rivals_;
    o.print = [](const std::string& line) {
      fmt::print("{}\n", line);
      std::fflush(stdout);
    };
    o.check_stop = [&run = session.run] { run.check_stop("measuring"); };
    return o;
  }

  /// The same rows for the GPU: one shape, keep and precision, events instead of the clock.
  nlohmann::json on_gpu(const Session& session) const {
    video::OpBenchOptions options;
    if (!shape_.empty()) {
      check_shape();
      options.shape = {shape_[0], shape_[1], shape_[2], shape_[3]};
    }
    if (!layout_.empty() || dtype_ != "fp32") {
      throw UsageError("--layout and --dtype are for the CPU: a GPU's rows are bf16 in [B,H,N,D]");
    }
    if (keep_.size() > 1) throw UsageError("--keep must be one number on a GPU");
    if (precision_.size() > 1) throw UsageError("--precision must be one name on a GPU");
    const double keep = keep_.empty() ? 0.03 : keep_.front();
    const std::string precision = precision_.empty() ? "int8" : precision_.front();
    values_of<int>("--precision", {precision}, {{"int8", 0}, {"fp8", 0}, {"bf16", 0}, {"fp32", 0}});
    options.config = io::config_from_json({{"keep", keep},
                                           {"precision", precision},
                                           {"block_q", config_.block_q},
                                           {"block_k", config_.block_k}});
    if (!pass_.empty()) options.passes = passes();
    options.repeats = repeats_;
    options.rivals = !no_rivals_;
    const auto result = video::bench_operator(options, session.run);
    fmt::print("verified: {:.1e} relative L2 to the reference\n", result.error);
    nlohmann::json machine = bench::describe_machine();
    if (const auto gpu = video::find_gpu()) machine["gpu"] = gpu->name;
    if (!result.rivals_torch.empty()) machine["torch"] = result.rivals_torch;
    nlohmann::json report{{"machine", machine},
                          {"peaks", nlohmann::json::array()},
                          {"left_out", nlohmann::json::array()},
                          {"error", result.error}};
    print(result.rows);
    for (const auto& [what, reason] : result.left_out) {
      fmt::print("left out: {}: {}\n", what, reason);
      report["left_out"].push_back({{"what", what}, {"reason", reason}});
    }
    for (const video::BenchRow& row : result.rows) {
      nlohmann::json speedup = nlohmann::json::object();
      const bool own = row.what == "sla2";
      // FlexAttention computes the sparse part alone, the others full attention.
      const bool sparse = own || row.what.starts_with("flex_attention");
      for (const video::BenchRow& rival : result.rows) {
        if (own && rival.what != row.what && rival.pass == row.pass) {
          speedup[rival.what] = rival.speed_up;
        }
      }
      report["rows"].push_back({{"name", row.what},
                                {"impl", own ? "cuda" : "torch"},
                                {"pass", row.pass},
                                {"shape", options.shape},
                                {"keep", sparse ? keep : 1.0},
                                {"precision", own ? precision : "bf16"},
                                {"threads", 1},
                                {"ms_median", row.seconds.median * 1e3},
                                {"ms_q1", row.seconds.q1 * 1e3},
                                {"ms_q3", row.seconds.q3 * 1e3},
                                {"effective_tflops", row.tflops},
                                {"roofline_share", nullptr},
                                {"speedup_over", speedup},
                                {"verified", own}});
      nlohmann::json stages = nlohmann::json::object();
      for (const video::StageTime& stage : result.stages) {
        if (own && stage.pass == row.pass) stages[stage.stage] = stage.seconds.median * 1e3;
      }
      if (!stages.empty()) report["rows"].back()["stages_ms"] = stages;
    }
    for (const video::StageTime& stage : result.stages) {
      fmt::print("{:<10}{:<18}{:>12.3f} ms\n", stage.pass, stage.stage, stage.seconds.median * 1e3);
    }
    return report;
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
    fmt::print("{:<20}{:<10}{:>12}{:>12}{:>12}{:>12}{:>12}\n", "", "", "median ms", "quartile 1",
               "quartile 3", "TFLOP/s", "sla2 is");
    for (const auto& row : rows) {
      fmt::print("{:<20}{:<10}{:>12.2f}{:>12.2f}{:>12.2f}{:>12}{:>11.2f}x\n", row.what, row.pass,
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
  std::vector<std::int64_t> shape_;
  Config config_;
  std::vector<double> keep_;
  std::vector<std::string> precision_, pass_, layout_;
  std::string dtype_ = "fp32", implementation_;
  std::int64_t repeats_ = 9;
  double row_seconds_ = 0.4, minutes_ = 13;
  bool no_rivals_ = false;
  std::filesystem::path model_, sla2_, json_;
};

}  // namespace

std::unique_ptr<Command> make_bench() { return std::make_unique<Bench>(); }

}  // namespace sla2::cli

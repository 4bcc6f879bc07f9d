// The benchmark of the CPU: a grid of shapes, keeps, precisions and passes beside PyTorch's
// attention, in turns, in one run; verified first. A table line by line, and JSON.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "bench.h"
#include "sla2/sla2.h"

namespace sla2::bench {

struct SuiteOptions {
  std::int64_t batch = 1, heads = 1;
  std::vector<std::int64_t> tokens = {4096, 8192, 16384, 32768, 75600};
  std::vector<std::int64_t> head_dims = {128, 64};
  std::vector<double> keeps = {0.03, 0.05, 0.10, 1};
  std::vector<Precision> precisions = {Precision::kInt8, Precision::kBf16, Precision::kFp32};
  std::vector<Pass> passes = {Pass::kForward, Pass::kBackward};
  std::vector<std::int64_t> threads;  // empty: all, then 1
  Config config;                      // everything else of the operator
  DType dtype = DType::kF32;
  std::vector<Layout> layouts = {Layout::kBHND};  // a row of ours for each
  std::string implementation;                     // empty: the one that is selected

  std::int64_t repeats = 9;     // timed runs of a row at most
  double seconds_a_row = 0.4;   // no more runs than fit into this, but at least one
  double longest_seconds = 20;  // a single run that will take longer is left out
  double minutes = 13;          // what is not begun by then is left out
  bool rivals = true;
  std::string python;  // see Rivals

  std::function<void(const std::string& line)> print = [](const std::string&) {};
  std::function<void()> check_stop = [] {};  // throws to stop
};

/// The report that out/bench.json holds: machine, peaks, roofline, rows, left_out. Throws
/// sla2::Error: invalid options, or a result that differs from the reference.
[[nodiscard]] nlohmann::json run_suite(const SuiteOptions& options);

/// Throws sla2::Error (kInvalidArgument) naming the option and the value.
void validate(const SuiteOptions& options);

/// Processor, cores, memory, system, versions.
[[nodiscard]] nlohmann::json describe_machine();

/// Throws sla2::Error naming the first field of a report that is missing or of another type.
void check_report(const nlohmann::json& report);

}  // namespace sla2::bench

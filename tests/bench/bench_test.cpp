// The benchmark's arithmetic, its report, and what it does when something is wrong.
#include "bench.h"

#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "peaks.h"
#include "rivals.h"
#include "roofline.h"
#include "suite.h"

namespace sla2::bench {
namespace {

TEST(Statistics, QuartilesTakeTheNearestSample) {
  const Seconds five = quartiles({5, 1, 4, 2, 3});
  EXPECT_EQ(five.quartile1, 2);
  EXPECT_EQ(five.median, 3);
  EXPECT_EQ(five.quartile3, 4);
  const Seconds one = quartiles({7});
  EXPECT_EQ(one.quartile1, 7);
  EXPECT_EQ(one.median, 7);
  EXPECT_EQ(one.quartile3, 7);
  const Seconds skewed = quartiles({1, 1, 1, 1, 1, 1, 1, 1, 100});
  EXPECT_EQ(skewed.quartile3, 1);  // one interruption does not show
}

Problem counted() {
  Problem p;
  p.q_tokens = p.k_tokens = 1024;  // 8 query blocks, 16 key blocks
  p.head_dim = p.value_dim = 64;
  p.config.keep = 0.25;  // 4 of 16
  p.config.precision = Precision::kInt8;
  return p;
}

TEST(Roofline, CountsTheProductsOfTheSpecification) {
  const Problem p = counted();
  const Work forward = least_work(p, Pass::kForward);
  const double pairs = 1024.0 * 256;
  EXPECT_EQ(forward.int8, pairs * 128);
  EXPECT_EQ(forward.bf16, 2 * 1024.0 * 64 * 64);             // h_j, phi(q) H_i
  EXPECT_EQ(forward.exponentials, pairs + 2 * 1024.0 * 64);  // p, phi(q), phi(k)
  EXPECT_EQ(forward.bytes, 1024.0 * 64 * 4 * 5);             // q, k twice, v, out
  EXPECT_EQ(forward.fp32, 8.0 * 4 * 64 * 64 + 8.0 * 16 * 64 + 24.0 * 64 * 64);
  const Work backward = least_work(p, Pass::kBackward);
  EXPECT_EQ(backward.int8, 0);  // never in 8 bits
  EXPECT_EQ(backward.bf16, pairs * 5 * 64 + 5 * 1024.0 * 64 * 64);
  EXPECT_EQ(backward.bytes, 1024.0 * 64 * 4 * 9);  // q, d_q, o_s, o_l, d_o; k, d_k, v, d_v
}

TEST(Roofline, CountsProductsOfFp16InFp32) {
  Problem p = counted();
  p.dtype = DType::kF16;
  EXPECT_EQ(least_work(p, Pass::kForward).int8, 1024.0 * 256 * 128);
  EXPECT_EQ(least_work(p, Pass::kForward).bf16, 2 * 1024.0 * 64 * 64);
  EXPECT_EQ(least_work(p, Pass::kBackward).bf16, 0);
  EXPECT_GT(least_work(p, Pass::kBackward).fp32, 1024.0 * 256 * 5 * 64);
  p.config.precision = Precision::kBf16;
  EXPECT_EQ(least_work(p, Pass::kForward).bf16, 0);
  p.dtype = DType::kBF16;
  EXPECT_EQ(least_work(p, Pass::kForward).bf16, 1024.0 * 256 * 128 + 2 * 1024.0 * 64 * 64);
}

TEST(Roofline, HasNoLinearBranchWhereEverythingIsRouted) {
  Problem p = counted();
  p.config.keep = 1;
  p.config.precision = Precision::kFp32;
  const Work work = least_work(p, Pass::kForward);
  EXPECT_EQ(work.bf16, 0);
  EXPECT_EQ(work.exponentials, 1024.0 * 1024);
  EXPECT_EQ(work.int8, 0);
}

TEST(Roofline, AddsTheTimesOfEachKind) {
  const InstructionPeaks peaks{"x", 100, 10, 1};
  EXPECT_DOUBLE_EQ(
      roofline_seconds({.int8 = 200, .bf16 = 30, .fp32 = 4, .exponentials = 2, .bytes = 50}, peaks,
                       5),
      2 + 3 + 4 + 2 * kExpCost + 10);
}

TEST(Roofline, CountsFullAttention) {
  EXPECT_EQ(full_attention_flops(counted(), Pass::kForward), 4.0 * 1024 * 1024 * 64);
  EXPECT_EQ(full_attention_flops(counted(), Pass::kBackward), 10.0 * 1024 * 1024 * 64);
}

TEST(Peaks, AnImplementationHasItsOwnSetAndThoseItIncludes) {
  Peaks peaks;
  peaks.sets = {{"amx", 1000, 500, 0},
                {"avx512_vnni", 200, 60, 0},
                {"avx512", 50, 0, 100},
                {"avx2", 20, 0, 50}};
  const InstructionPeaks amx = peaks_of(peaks, "cpu_amx");
  EXPECT_EQ(amx.int8, 1000);
  EXPECT_EQ(amx.fp32, 100);
  const InstructionPeaks vnni = peaks_of(peaks, "cpu_avx512_vnni");
  EXPECT_EQ(vnni.int8, 200);
  EXPECT_EQ(vnni.bf16, 100);  // fp32 products are faster there
  EXPECT_EQ(peaks_of(peaks, "cpu_avx2").fp32, 50);
  EXPECT_EQ(peaks_of(peaks, "reference").fp32, 0);
}

TEST(Peaks, TheLargerOfTwoMeasurementsIsTakenFigureByFigure) {
  Peaks a, b;
  a.threads = b.threads = 2;
  a.sets = {{"avx2", 10, 0, 5}, {"baseline", 4, 0, 2}};
  b.sets = {{"avx2", 8, 0, 6}, {"baseline", 5, 1, 1}};
  a.bytes = 3;
  b.bytes = 2;
  a.row_bytes = 1;
  b.row_bytes = 2;
  const Peaks larger = larger_of(a, b);
  EXPECT_EQ(larger.threads, 2);
  EXPECT_EQ(larger.bytes, 3);
  EXPECT_EQ(larger.row_bytes, 2);
  ASSERT_EQ(larger.sets.size(), 2U);
  EXPECT_EQ(larger.sets[0].name, "avx2");
  EXPECT_EQ(larger.sets[0].int8, 10);
  EXPECT_EQ(larger.sets[0].fp32, 6);
  EXPECT_EQ(larger.sets[1].int8, 5);
  EXPECT_EQ(larger.sets[1].bf16, 1);
  EXPECT_EQ(larger.sets[1].fp32, 2);
}

TEST(Peaks, OfThisMachineAreInOrder) {
  SerialExecutor one;
  const Peaks peaks = measure_peaks(one);
  ASSERT_FALSE(peaks.sets.empty());
  EXPECT_GT(peaks.bytes, 1e8);
  const InstructionPeaks best = peaks_of(peaks, "cpu_" + peaks.sets.front().name);
  EXPECT_GT(best.fp32, 1e8);
  EXPECT_GE(best.int8, best.fp32);
  EXPECT_EQ(peaks.sets.back().name, "baseline");
}

SuiteOptions tiny() {
  SuiteOptions o;
  o.tokens = {64, 160};
  o.head_dims = {16};
  o.keeps = {0.5, 1};
  o.config.block_q = o.config.block_k = 32;
  o.threads = {2, 1};
  o.repeats = 3;
  o.seconds_a_row = 0.01;
  o.rivals = false;
  return o;
}

TEST(Suite, WritesEveryRowOfItsGrid) {
  std::vector<std::string> lines;
  SuiteOptions o = tiny();
  o.print = [&](const std::string& line) { lines.push_back(line); };
  const nlohmann::json report = run_suite(o);
  check_report(report);
  // Forward in three precisions, backward in two (8 bits run bf16's); tokens x keeps x threads.
  EXPECT_EQ(report.at("rows").size(), (3 + 2) * 2 * 2 * 2u);
  EXPECT_TRUE(report.at("left_out").empty());
  EXPECT_TRUE(report.at("peaks").front().at("memory_gb_per_s_bnhd").is_null());
  for (const auto& row : report.at("rows")) {
    EXPECT_TRUE(row.at("verified"));
    EXPECT_GT(row.at("ms_median"), 0);
    EXPECT_LE(row.at("ms_q1"), row.at("ms_median"));
    EXPECT_GE(row.at("ms_q3"), row.at("ms_median"));
    EXPECT_GT(row.at("roofline_share"), 0);
    EXPECT_GT(row.at("workspace_mib"), 0);
    double stages = 0;
    for (const auto& ms : row.at("stages_ms")) stages += ms.get<double>();
    EXPECT_GT(stages, 0);
  }
  EXPECT_GT(lines.size(), report.at("rows").size());
}

/// Tokens outside, and other numbers for it.
TEST(Operator, TakesBothLayouts) {
  Problem p;
  p.num_heads = p.num_kv_heads = 3;
  p.q_tokens = p.k_tokens = 64;
  p.head_dim = p.value_dim = 16;
  SerialExecutor serial;
  Operator by_heads(p, serial, make_data(p));
  Operator by_tokens(p, serial, make_data(p, Layout::kBNHD));
  using Strides = std::array<std::int64_t, 4>;
  EXPECT_EQ(by_heads.out().strides, (Strides{3 * 64 * 16, 64 * 16, 16, 1}));
  EXPECT_EQ(by_tokens.out().strides, (Strides{3 * 64 * 16, 16, 3 * 16, 1}));
  by_heads.forward(false);
  by_tokens.forward(false);
  const auto first_of = [](const ConstView& x) { return *static_cast<const float*>(x.data); };
  EXPECT_NE(first_of(by_heads.out()), first_of(by_tokens.out()));
}

TEST(Suite, HasARowForEachLayout) {
  SuiteOptions o = tiny();
  o.heads = 3;
  o.tokens = {64};
  o.layouts = {Layout::kBHND, Layout::kBNHD};
  std::map<std::string, int> rows;
  const nlohmann::json report = run_suite(o);
  for (const auto& row : report.at("rows")) ++rows[row.at("layout").get<std::string>()];
  EXPECT_EQ(rows, (std::map<std::string, int>{{"bhnd", 5 * 2 * 2}, {"bnhd", 5 * 2 * 2}}));
  for (const auto& peaks : report.at("peaks")) EXPECT_GT(peaks.at("memory_gb_per_s_bnhd"), 0.1);
}

TEST(Suite, SaysWhatItLeavesOut) {
  SuiteOptions o = tiny();
  o.minutes = 1e-9;
  const nlohmann::json report = run_suite(o);
  EXPECT_TRUE(report.at("rows").empty());
  EXPECT_EQ(report.at("left_out").size(), 8u);  // every group
  o = tiny();
  o.longest_seconds = 1e-9;
  const nlohmann::json slow = run_suite(o);
  EXPECT_EQ(slow.at("rows").size(), 10 * 2u);  // the first number of tokens alone
  EXPECT_EQ(slow.at("left_out").size(), 10 * 2u);
}

TEST(Suite, StopsWhenAsked) {
  SuiteOptions o = tiny();
  o.check_stop = [] { throw std::runtime_error("stopped"); };
  EXPECT_THROW((void)run_suite(o), std::runtime_error);
}

std::string refusal(const std::function<void(SuiteOptions&)>& edit) {
  SuiteOptions o = tiny();
  edit(o);
  try {
    validate(o);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument);
    return error.what();
  }
  return "accepted";
}

TEST(Suite, RefusesOptionsByName) {
  EXPECT_EQ(refusal([](auto& o) { o.tokens = {}; }),
            "tokens must be a list of at least one value, got none");
  EXPECT_EQ(refusal([](auto& o) { o.threads = {1025}; }), "threads must be in [1, 1024], got 1025");
  EXPECT_EQ(refusal([](auto& o) { o.repeats = 0; }), "repeats must be at least 1, got 0");
  EXPECT_EQ(refusal([](auto& o) { o.minutes = 0; }), "minutes must be positive, got 0");
  EXPECT_EQ(refusal([](auto& o) {
              o.head_dims = {64, 72};
            }),
            "head_dim must be a multiple of 16 up to 256, got 72");
  EXPECT_EQ(refusal([](auto& o) { o.keeps = {1, 1.5}; }), "keep must be in (0, 1], got 1.5");
  EXPECT_NE(refusal([](auto& o) { o.implementation = "fastest"; }).find("got fastest"),
            std::string::npos);
}

TEST(Suite, ReportsOfAnotherFormAreRefused) {
  nlohmann::json report = run_suite([] {
    SuiteOptions o = tiny();
    o.tokens = {64};
    o.keeps = {1};
    o.threads = {1};
    return o;
  }());
  check_report(report);
  for (const char* field :
       {"name", "impl", "pass", "shape", "keep", "precision", "layout", "threads", "ms_median",
        "ms_q1", "ms_q3", "effective_tflops", "roofline_share", "speedup_over", "verified"}) {
    nlohmann::json other = report;
    other["rows"][0].erase(field);
    EXPECT_THROW(check_report(other), Error) << field;
    other = report;
    other["rows"][0][field] = nlohmann::json::array({nullptr});
    if (std::string(field) != "shape") {
      EXPECT_THROW(check_report(other), Error) << field;
    }
  }
}

TEST(Verify, AcceptsWhatIsRightOnEveryImplementation) {
  for (const Implementation* one : implementations()) {
    Problem p;
    p.q_tokens = p.k_tokens = 100;
    p.head_dim = p.value_dim = 32;
    p.num_heads = p.num_kv_heads = 2;
    p.implementation = one->name;
    if (one->device != Device::kCpu || !one->refusal(p, Pass::kForward).empty()) continue;
    SerialExecutor serial;
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      p.dtype = dtype;
      EXPECT_NO_THROW(verify(p, serial)) << one->name;
      EXPECT_NO_THROW(verify(p, serial, Layout::kBNHD)) << one->name;
    }
  }
}

TEST(Verify, RefusesWhatIsWrong) {
  EXPECT_NO_THROW(require_close("out", {3, 4.04F}, {3, 4}, 1e-2));
  try {
    require_close("out", {3, 4.1F}, {3, 4}, 1e-2);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kRuntime);
    EXPECT_STREQ(error.what(),
                 "out differs from the reference by 0.020000 (relative L2), allowed 0.010000");
  }
  const float nan = std::nanf("");
  EXPECT_THROW(require_close("out", {nan}, {1}, 1), Error);
}

/// A program that answers as rivals.py does: 2 ms for everything, no FlexAttention. `run`: what its
/// shell does for a run.
class StandIn {
 public:
  explicit StandIn(const std::string& run = "echo '{\"ms\": 2}'")
      : path_(std::filesystem::temp_directory_path() / ("rival-" + std::to_string(getpid()))) {
    std::ofstream file(path_);
    file << "#!/bin/sh\necho '{\"ok\": true, \"torch\": \"0\"}'\nwhile read line; do\n"
            "case \"$line\" in *'\"run\"'*) "
         << run
         << ";;\n"
            "*flex*) echo '{\"reason\": \"not today\"}';; *) echo '{\"ok\": true}';; esac\ndone\n";
    file.close();
    std::filesystem::permissions(path_, std::filesystem::perms::owner_all);
  }
  ~StandIn() { std::filesystem::remove(path_); }
  [[nodiscard]] std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

TEST(Rivals, StopWhileTorchWorks) {
  const StandIn slow("exec sleep 60");
  bool works = false;
  int calls = 0;
  const auto start = std::chrono::steady_clock::now();
  {
    Rivals rivals(slow.path(), "cpu", [&] {
      if (works && ++calls == 3) throw Error(ErrorKind::kRuntime, "stopped");
    });
    EXPECT_EQ(rivals.reason(), "");
    works = true;
    try {
      (void)rivals.run("any");
      FAIL();
    } catch (const Error& error) {
      EXPECT_STREQ(error.what(), "stopped");
    }
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST(Rivals, GiveAReasonWhereThereIsNone) {
  EXPECT_NE(Rivals("/no/such/python").reason().find("/no/such/python is not a program"),
            std::string::npos);
  EXPECT_NE(Rivals("/bin/false").reason().find("ended without an answer"), std::string::npos);
  SuiteOptions o = tiny();
  o.rivals = true;
  o.python = "/no/such/python";
  const nlohmann::json report = run_suite(o);
  ASSERT_EQ(report.at("left_out").size(), 1u);
  EXPECT_EQ(report.at("left_out")[0].at("what"), "torch");
}

TEST(Rivals, AreRowsAndSpeedUps) {
  const StandIn python;
  SuiteOptions o = tiny();
  o.rivals = true;
  o.python = python.path();
  o.threads = {1};
  const nlohmann::json report = run_suite(o);
  check_report(report);
  int rivals = 0;
  for (const auto& row : report.at("rows")) {
    if (row.at("name") == "sla2") {
      EXPECT_DOUBLE_EQ(row.at("speedup_over").at("torch_sdpa_fp32").get<double>(),
                       2 / row.at("ms_median").get<double>());
      continue;
    }
    ++rivals;
    EXPECT_DOUBLE_EQ(row.at("ms_median"), 2);
    EXPECT_FALSE(row.at("verified"));
  }
  EXPECT_EQ(rivals, 2 * 2 * 2);                     // two types, two passes, two numbers of tokens
  EXPECT_EQ(report.at("left_out").size(), 2 * 2u);  // FlexAttention, once a type and pass
  EXPECT_EQ(report.at("left_out")[0].at("reason"), "not today");
}

}  // namespace
}  // namespace sla2::bench

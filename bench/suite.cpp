#include "suite.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bench.h"
#include "io/config_json.h"
#include "peaks.h"
#include "rivals.h"
#include "roofline.h"

namespace sla2::bench {
namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

const char* name_of(Pass pass) { return pass == Pass::kBackward ? "backward" : "forward"; }
std::string name_of(Precision precision) {
  Config config;
  config.precision = precision;
  return io::to_json(config)["precision"];
}

const char* name_of(Layout layout) { return layout == Layout::kBNHD ? "bnhd" : "bhnd"; }

template <typename... Values>
std::string format(const char* form, Values... values) {
  char line[256];
  std::snprintf(line, sizeof line, form, values...);
  return line;
}

/// One row: something to run in turns with the others.
struct Case {
  std::string name, implementation, precision;
  Layout layout = Layout::kBHND;
  Problem problem;
  std::unique_ptr<Operator> own;  // null: a rival
  std::string id;                 // of a rival
  std::vector<double> samples;
  Clock::time_point last;  // end of its last run
  bool is_quick = false;
};

/// One shape, pass and number of threads.
struct Group {
  std::int64_t tokens, head_dim;
  Pass pass;
  std::int64_t threads;
  bool with_rivals;
};

class Suite {
 public:
  explicit Suite(const SuiteOptions& options) : o_(options), start_(Clock::now()) {
    std::vector<std::int64_t> threads = o_.threads;
    const auto all = std::max<std::int64_t>(1, std::thread::hardware_concurrency());
    if (threads.empty()) threads = all > 1 ? std::vector<std::int64_t>{all, 1} : std::vector{all};
    for (const std::int64_t count : threads) {
      for (const std::int64_t d : o_.head_dims) {
        for (const std::int64_t tokens : o_.tokens) {
          for (const Pass pass : o_.passes) {
            groups_.push_back({tokens, d, pass, count, o_.rivals && count == threads.front()});
          }
        }
      }
    }
  }

  Json run() {
    report_["machine"] = describe_machine();
    report_["rows"] = Json::array();
    report_["left_out"] = Json::array();
    report_["peaks"] = Json::array();
    report_["roofline"] =
        "sum of: products of the routed pairs in the row's precision (forward 2, backward 5 in "
        "bf16 "
        "or fp32), the linear branch's products (bf16; fp32 with precision fp32), sums over routed "
        "blocks and router in fp32, each at the peak of the instruction sets that the "
        "implementation "
        "uses; 8 fp32 multiply-adds for an exponential; inputs and outputs once (k twice forward) "
        "at the memory's read rate. Not in it: quantisation, packing, pooling, top-k";
    verify_all();
    if (o_.rivals) {
      rivals_ = std::make_unique<Rivals>(o_.python, "cpu", o_.check_stop);
      if (!rivals_->reason().empty()) leave_out("torch", rivals_->reason());
      report_["machine"]["torch"] = rivals_->torch_version();
    }
    o_.print(format("%-20s %-8s %2s %6s %4s %5s %5s %10s %10s %10s %8s %6s  %s", "name", "pass",
                    "th", "N", "d", "keep", "prec", "ms", "quartile1", "quartile3", "TFLOP/s",
                    "roof", "faster than"));
    for (const Group& group : groups_) run_group(group);
    report_["seconds"] = elapsed();
    return std::move(report_);
  }

 private:
  [[nodiscard]] double elapsed() const {
    return std::chrono::duration<double>(Clock::now() - start_).count();
  }
  [[nodiscard]] Executor& executor(std::int64_t threads) {
    auto& pool = pools_[threads];
    if (!pool) pool = make_thread_pool(threads);
    return *pool;
  }

  void leave_out(const std::string& what, const std::string& reason) {
    report_["left_out"].push_back({{"what", what}, {"reason", reason}});
    o_.print("left out: " + what + ": " + reason);
  }

  [[nodiscard]] bool has_rows_apart() const {
    return std::find(o_.layouts.begin(), o_.layouts.end(), Layout::kBNHD) != o_.layouts.end();
  }

  Peaks peaks(const Group& group) {
    wait_for_rivals();
    Peaks measured = measure_peaks(executor(group.threads));
    const std::int64_t row = group.head_dim * bytes_of(o_.dtype);
    if (has_rows_apart()) {
      measured.row_bytes = measure_row_rate(executor(group.threads), row, o_.heads * row);
    }
    return measured;
  }

  void report_peaks(const Group& group, const Peaks& measured) {
    const bool in_rows = has_rows_apart();
    Json sets = Json::object();
    std::string line =
        format("peaks on %d thread(s), G multiply-adds/s:", static_cast<int>(group.threads));
    for (const InstructionPeaks& set : measured.sets) {
      sets[set.name] = {
          {"int8", set.int8 * 1e-9}, {"bf16", set.bf16 * 1e-9}, {"fp32", set.fp32 * 1e-9}};
      line += format(" %s int8 %.0f bf16 %.0f fp32 %.0f;", set.name.c_str(), set.int8 * 1e-9,
                     set.bf16 * 1e-9, set.fp32 * 1e-9);
    }
    if (peaks_printed_.insert(group.threads).second) {
      line += format(" memory %.1f GB/s", measured.bytes * 1e-9);
      if (in_rows) line += format(", by rows of [B,N,H,D] %.1f", measured.row_bytes * 1e-9);
      o_.print(line);
    }
    report_["peaks"].push_back(
        {{"threads", group.threads},
         {"tokens", group.tokens},
         {"head_dim", group.head_dim},
         {"pass", name_of(group.pass)},
         {"gmac_per_s", sets},
         {"memory_gb_per_s", measured.bytes * 1e-9},
         {"memory_gb_per_s_bnhd", in_rows ? Json(measured.row_bytes * 1e-9) : Json(nullptr)}});
  }

  [[nodiscard]] Problem problem(const Group& group, double keep, Precision precision) const {
    Problem p;
    p.batch = o_.batch;
    p.num_heads = p.num_kv_heads = o_.heads;
    p.q_tokens = p.k_tokens = group.tokens;
    p.head_dim = p.value_dim = group.head_dim;
    p.dtype = o_.dtype;
    p.config = o_.config;
    p.config.keep = keep;
    p.config.precision = precision;
    p.implementation = o_.implementation.empty() ? nullptr : o_.implementation.c_str();
    return p;
  }

  /// Once for all that differs at 512 tokens, before anything is timed.
  void verify_all() {
    std::set<std::string> done;
    for (const Group& group : groups_) {
      for (const double keep : o_.keeps) {
        for (const Precision precision : o_.precisions) {
          const Problem p = problem(group, keep, precision);
          const std::int64_t tokens = std::min<std::int64_t>(512, p.k_tokens);
          const auto kept = num_kept_blocks(p, num_k_blocks(p, tokens));
          const std::string key =
              format("%d %d %d %s", static_cast<int>(tokens), static_cast<int>(p.head_dim),
                     static_cast<int>(kept), name_of(precision).c_str());
          for (const Layout layout : o_.layouts) {
            if (!done.insert(key + name_of(layout)).second) continue;
            o_.check_stop();
            verify(p, executor(groups_.front().threads), layout);
          }
        }
      }
    }
    o_.print(
        format("verified against the reference: %d problems of up to 512 tokens, forward and "
               "backward, in %.1f s",
               static_cast<int>(done.size()), elapsed()));
  }

  /// True if one run will take too long, judged by the same row at another number of tokens.
  bool will_take_too_long(const std::string& row, const Group& group) {
    const auto known = known_.find(row);
    if (known == known_.end()) return false;
    const double ratio =
        static_cast<double>(group.tokens) / static_cast<double>(known->second.first);
    const double seconds = known->second.second * ratio * ratio;
    if (seconds <= o_.longest_seconds) return false;
    leave_out(
        row + format(" N %d", static_cast<int>(group.tokens)),
        format("one run would take %.0f s, the limit is %.0f s", seconds, o_.longest_seconds));
    return true;
  }

  static std::string row_name(const std::string& name, const Group& group, double keep) {
    return format("%s %s d %d keep %g threads %d", name.c_str(), name_of(group.pass),
                  static_cast<int>(group.head_dim), keep, static_cast<int>(group.threads));
  }

  std::vector<Case> cases_of(const Group& group) {
    std::vector<Case> cases;
    for (const Layout layout : o_.layouts) add_own(group, layout, cases);
    if (group.with_rivals && rivals_ && rivals_->reason().empty()) add_rivals(group, cases);
    return cases;
  }

  static std::string own_name(const std::string& precision, Layout layout) {
    return "sla2 " + precision + " " + name_of(layout);
  }

  void add_own(const Group& group, Layout layout, std::vector<Case>& cases) {
    const Problem shape = problem(group, o_.keeps.front(), o_.precisions.front());
    const auto data = make_data(shape, layout);
    for (const double keep : o_.keeps) {
      for (const Precision precision : o_.precisions) {
        const std::string name = own_name(name_of(precision), layout);
        // The backward is never in 8 bits: bf16's is the same.
        if (group.pass == Pass::kBackward && precision == Precision::kInt8 &&
            std::count(o_.precisions.begin(), o_.precisions.end(), Precision::kBf16) > 0) {
          continue;
        }
        if (will_take_too_long(row_name(name, group, keep), group)) continue;
        Case one;
        one.name = "sla2";
        one.precision = name_of(precision);
        one.layout = layout;
        one.problem = problem(group, keep, precision);
        one.own = std::make_unique<Operator>(one.problem, executor(group.threads), data);
        one.implementation = one.own->implementation(group.pass);
        one.own->forward(group.pass == Pass::kBackward);
        cases.push_back(std::move(one));
      }
    }
  }

  void add_rivals(const Group& group, std::vector<Case>& cases) {
    rivals_->clear();
    const auto add = [&](const std::string& name, double keep,
                         const std::vector<std::int32_t>& blocks) {
      const std::string row = row_name(name, group, keep);
      if (refused_.count(name + name_of(group.pass)) > 0 || will_take_too_long(row, group)) return;
      o_.check_stop();
      const Problem p = problem(group, keep, Precision::kFp32);
      const std::string reason = rivals_->prepare(row, name, group.pass, p, group.threads, blocks);
      if (!reason.empty()) {
        leave_out(name + " " + name_of(group.pass), reason);
        refused_.insert(name + name_of(group.pass));
        return;
      }
      Case one;
      one.name = name;
      one.implementation = "torch";
      one.precision = name.substr(name.size() - 4);
      one.problem = p;
      one.id = row;
      cases.push_back(std::move(one));
    };
    for (const char* name : {"torch_sdpa_fp32", "torch_sdpa_bf16"}) add(name, 1, {});
    for (const char* name : {"flex_attention_fp32", "flex_attention_bf16"}) {
      for (const double keep : o_.keeps) {
        if (keep >= 1) continue;  // full attention is SDPA's
        const auto found = std::find_if(cases.begin(), cases.end(), [&](const Case& one) {
          return one.own && one.problem.config.keep == keep;
        });
        if (found != cases.end()) add(name, keep, found->own->blocks());
      }
    }
  }

  /// Torch's threads spin for a while behind their work.
  static void wait_for_rivals() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

  double run_once(const Group& group, Case& one) {
    o_.check_stop();
    if (!one.own) return rivals_->run(one.id);
    if (after_rival_) wait_for_rivals();
    return seconds_of(
        [&] { group.pass == Pass::kBackward ? one.own->backward() : one.own->forward(false); });
  }

  /// One warm-up, then what a row's time allows, all rows in turns. A quick row that waited long
  /// for others runs once untimed before: some systems take back memory that lies idle.
  void measure(const Group& group, std::vector<Case>& cases) {
    constexpr auto kLongWait = std::chrono::seconds(2);
    const auto run_alone = [&](Case& one) {
      const double seconds = run_once(group, one);
      after_rival_ = !one.own;
      one.last = Clock::now();
      return seconds;
    };
    const auto run = [&](Case& one) {
      if (one.is_quick && Clock::now() - one.last > kLongWait) (void)run_alone(one);
      return run_alone(one);
    };
    for (Case& one : cases) {
      const double first = run(one);
      one.is_quick = first < std::chrono::duration<double>(kLongWait).count();
      // The warm-up of something this long is its measurement.
      if (first > 4 * o_.seconds_a_row) one.samples.push_back(first);
    }
    for (std::int64_t round = 0; round < o_.repeats; ++round) {
      for (Case& one : cases) {
        const double spent = std::accumulate(one.samples.begin(), one.samples.end(), 0.0);
        if (one.samples.empty() || spent < o_.seconds_a_row) one.samples.push_back(run(one));
      }
    }
  }

  void run_group(const Group& group) {
    const std::string what = format("N %d d %d %s on %d thread(s)", static_cast<int>(group.tokens),
                                    static_cast<int>(group.head_dim), name_of(group.pass),
                                    static_cast<int>(group.threads));
    if (elapsed() > 60 * o_.minutes) {
      leave_out(what, format("%.0f minutes are over", o_.minutes));
      return;
    }
    std::vector<Case> cases = cases_of(group);
    if (cases.empty()) return;
    // Beside the rows, on both sides: the clock of a shared machine changes within minutes.
    const Peaks before = peaks(group);
    measure(group, cases);
    const Peaks machine = larger_of(before, peaks(group));
    report_peaks(group, machine);
    std::map<std::string, double> medians;  // of rivals, by name and keep
    for (Case& one : cases) {
      const double median = quartiles(one.samples).median;
      const std::string name = one.own ? own_name(one.precision, one.layout) : one.name;
      known_[row_name(name, group, one.problem.config.keep)] = {group.tokens, median};
      if (!one.own) medians[key_of(one.name, one.problem.config.keep)] = median;
    }
    for (Case& one : cases) add_row(group, one, machine, medians);
  }

  static std::string key_of(const std::string& name, double keep) {
    return format("%s %g", name.c_str(), keep);
  }

  void add_row(const Group& group, Case& one, const Peaks& machine,
               const std::map<std::string, double>& medians) {
    const Problem& p = one.problem;
    const Seconds s = quartiles(one.samples);
    const double tflops = full_attention_flops(p, group.pass) / s.median * 1e-12;
    Json row{{"name", one.name},
             {"impl", one.implementation},
             {"pass", name_of(group.pass)},
             {"shape", {p.batch, p.num_heads, p.q_tokens, p.head_dim}},
             {"keep", p.config.keep},
             {"precision", one.precision},
             {"layout", name_of(one.layout)},
             {"threads", group.threads},
             {"ms_median", s.median * 1e3},
             {"ms_q1", s.quartile1 * 1e3},
             {"ms_q3", s.quartile3 * 1e3},
             {"repeats", one.samples.size()},
             {"effective_tflops", tflops},
             {"roofline_share", nullptr},
             {"speedup_over", Json::object()},
             {"verified", one.own != nullptr}};
    std::string share, faster;
    if (one.own) {
      const double bytes = one.layout == Layout::kBNHD ? machine.row_bytes : machine.bytes;
      const double least =
          roofline_seconds(least_work(p, group.pass), peaks_of(machine, one.implementation), bytes);
      row["roofline_share"] = least / s.median;
      share = format("%.0f%%", 100 * least / s.median);
      row["workspace_mib"] = static_cast<double>(one.own->workspace_bytes(group.pass)) / (1 << 20);
      for (const char* name :
           {"torch_sdpa_fp32", "torch_sdpa_bf16", "flex_attention_fp32", "flex_attention_bf16"}) {
        const bool is_flex = name[0] == 'f';
        const auto found = medians.find(key_of(name, is_flex ? p.config.keep : 1));
        if (found == medians.end()) continue;
        row["speedup_over"][name] = found->second / s.median;
        faster += format("%s%s %.1fx", faster.empty() ? "" : ", ", name, found->second / s.median);
      }
      Json stages = Json::object();
      for (const auto& [stage, seconds] : one.own->stages(group.pass))
        stages[stage] = seconds * 1e3;
      if (!stages.empty()) row["stages_ms"] = stages;
    }
    o_.print(format("%-20s %-8s %2d %6d %4d %5g %5s %10.2f %10.2f %10.2f %8.3f %6s  ",
                    one.layout == Layout::kBNHD ? "sla2 bnhd" : one.name.c_str(),
                    name_of(group.pass), static_cast<int>(group.threads),
                    static_cast<int>(p.q_tokens), static_cast<int>(p.head_dim), p.config.keep,
                    one.precision.c_str(), s.median * 1e3, s.quartile1 * 1e3, s.quartile3 * 1e3,
                    tflops, share.c_str()) +
             faster);
    report_["rows"].push_back(std::move(row));
  }

  const SuiteOptions& o_;
  Clock::time_point start_;
  Json report_;
  std::vector<Group> groups_;
  std::map<std::int64_t, std::unique_ptr<Executor>> pools_;
  std::set<std::int64_t> peaks_printed_;  // numbers of threads
  std::unique_ptr<Rivals> rivals_;
  std::set<std::string> refused_;
  std::map<std::string, std::pair<std::int64_t, double>> known_;  // row: tokens, seconds
  bool after_rival_ = false;
};

}  // namespace

Json run_suite(const SuiteOptions& options) {
  validate(options);
  return Suite(options).run();
}

}  // namespace sla2::bench

// What surrounds the rows of the report: the options' rules, the machine, the report's form.
#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <sys/utsname.h>
#include <thread>
#include <unistd.h>

#include "suite.h"

namespace sla2::bench {
namespace {

template <typename Value>
[[noreturn]] void refuse(const char* option, const char* rule, const Value& value) {
  std::ostringstream text;
  text << option << " must be " << rule << ", got " << value;
  throw Error(text.str());
}

template <typename Value>
void require_some(const char* option, const std::vector<Value>& values) {
  if (values.empty()) refuse(option, "a list of at least one value", "none");
}

using Type = nlohmann::json::value_t;
void require_field(const nlohmann::json& object, const char* where, const char* field,
                   bool (nlohmann::json::*is)() const noexcept) {
  if (!object.is_object() || !object.contains(field) || !(object.at(field).*is)()) {
    throw Error(std::string("report: ") + where + "." + field + " is missing or of another type");
  }
}

}  // namespace

void validate(const SuiteOptions& o) {
  require_some("tokens", o.tokens);
  require_some("head sizes", o.head_dims);
  require_some("keep", o.keeps);
  require_some("precision", o.precisions);
  require_some("pass", o.passes);
  require_some("layout", o.layouts);
  for (const std::int64_t threads : o.threads) {
    if (threads < 1 || threads > 1024) refuse("threads", "in [1, 1024]", threads);
  }
  if (o.repeats < 1) refuse("repeats", "at least 1", o.repeats);
  if (!(o.seconds_a_row > 0)) refuse("seconds", "positive", o.seconds_a_row);
  if (!(o.longest_seconds > 0)) refuse("longest", "positive", o.longest_seconds);
  if (!(o.minutes > 0)) refuse("minutes", "positive", o.minutes);
  // Every problem of the grid, before the first of them is timed.
  for (const std::int64_t tokens : o.tokens) {
    for (const std::int64_t d : o.head_dims) {
      for (const double keep : o.keeps) {
        Problem p;
        p.batch = o.batch;
        p.num_heads = p.num_kv_heads = o.heads;
        p.q_tokens = p.k_tokens = tokens;
        p.head_dim = p.value_dim = d;
        p.config = o.config;
        p.config.keep = keep;
        p.implementation = o.implementation.empty() ? nullptr : o.implementation.c_str();
        sla2::validate(p);
        for (const Precision precision : o.precisions) {
          p.config.precision = precision;
          for (const Pass pass : o.passes) (void)select_implementation(p, pass);
        }
      }
    }
  }
}

nlohmann::json describe_machine() {
  std::string processor = "unknown";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) {
      processor = line.substr(std::min(line.size(), line.find(':') + 2));
      break;
    }
  }
  utsname system{};
  uname(&system);
  std::array<double, 1> load{};
  const bool has_load = getloadavg(load.data(), 1) == 1;
  const double bytes =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGE_SIZE));
  return {{"processor", processor},
          {"cores", std::thread::hardware_concurrency()},
          {"memory_gib", bytes / (1 << 30)},
          {"system", std::string(system.sysname) + " " + system.release},
          {"compiler", "g++ " __VERSION__},
          {"load_average", has_load ? load[0] : -1}};
}

void check_report(const nlohmann::json& report) {
  using Json = nlohmann::json;
  require_field(report, "report", "machine", &Json::is_object);
  for (const char* field : {"processor", "system"}) {
    require_field(report.at("machine"), "machine", field, &Json::is_string);
  }
  require_field(report, "report", "peaks", &Json::is_array);
  require_field(report, "report", "rows", &Json::is_array);
  require_field(report, "report", "left_out", &Json::is_array);
  for (const Json& one : report.at("left_out")) {
    require_field(one, "left_out", "what", &Json::is_string);
    require_field(one, "left_out", "reason", &Json::is_string);
  }
  for (const Json& row : report.at("rows")) {
    for (const char* field : {"name", "impl", "pass", "precision", "layout"}) {
      require_field(row, "rows", field, &Json::is_string);
    }
    for (const char* field :
         {"keep", "threads", "ms_median", "ms_q1", "ms_q3", "effective_tflops"}) {
      require_field(row, "rows", field, &Json::is_number);
    }
    require_field(row, "rows", "shape", &Json::is_array);
    require_field(row, "rows", "speedup_over", &Json::is_object);
    require_field(row, "rows", "verified", &Json::is_boolean);
    if (!row.contains("roofline_share") ||
        !(row.at("roofline_share").is_number() || row.at("roofline_share").is_null())) {
      throw Error("report: rows.roofline_share must be a number or null");
    }
  }
}

}  // namespace sla2::bench

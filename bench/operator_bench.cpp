// The benchmark of the CPU without the program: operator_bench --help.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "io/files.h"
#include "suite.h"

namespace {

using namespace sla2;

constexpr const char* kUsage =
    "operator_bench [--shape 1,1,8192,128] [--keep 0.03] [--precision int8,bf16,fp32]\n"
    "               [--pass forward,backward] [--threads N,...] [--dtype fp32|bf16|fp16]\n"
    "               [--layout bhnd (or bnhd, or both)]\n"
    "               [--routing hard|soft] [--block_q 128] [--block_k 64] [--implementation NAME]\n"
    "               [--repeats 9] [--seconds 0.4] [--minutes 13] [--rivals 0] [--json FILE]\n";

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  if (parts.empty()) parts.emplace_back();
  return parts;
}

std::int64_t to_integer(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != 0 || value < 1) {
    throw Error(name + " must be a positive integer, got " + text);
  }
  return value;
}
double to_number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != 0) throw Error(name + " must be a number, got " + text);
  return value;
}

template <typename T>
T one_of(const std::string& name, const std::string& text, const std::map<std::string, T>& values) {
  const auto found = values.find(text);
  if (found != values.end()) return found->second;
  std::string all;
  for (const auto& [key, value] : values) all += (all.empty() ? "" : ", ") + key;
  throw Error(name + " must be one of " + all + "; got " + text);
}

template <typename Read>
auto list_of(const std::string& text, Read read) {
  std::vector<decltype(read(text))> values;
  for (const std::string& part : split(text)) values.push_back(read(part));
  return values;
}

void set_shape(const std::string& text, bench::SuiteOptions& o) {
  const auto sizes = list_of(text, [](const std::string& x) { return to_integer("--shape", x); });
  if (sizes.size() != 4) throw Error("--shape must be B,H,N,D, got " + text);
  o.batch = sizes[0];
  o.heads = sizes[1];
  o.tokens = {sizes[2]};
  o.head_dims = {sizes[3]};
}

bench::SuiteOptions parse(int argc, char** argv, std::string& json) {
  bench::SuiteOptions o;  // one row of each pass, unless more is asked for
  o.tokens = {8192};
  o.head_dims = {128};
  o.keeps = {0.03};
  o.precisions = {Precision::kInt8};
  o.threads = {std::max<std::int64_t>(1, std::thread::hardware_concurrency())};
  o.rivals = false;
  const std::map<std::string, Precision> precisions = {
      {"int8", Precision::kInt8}, {"bf16", Precision::kBf16}, {"fp32", Precision::kFp32}};
  const std::map<std::string, Pass> passes = {{"forward", Pass::kForward},
                                              {"backward", Pass::kBackward}};
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help") {
      std::cout << kUsage;
      std::exit(0);
    }
    if (i + 1 == argc) throw Error(name + " must be an option with a value (--help lists them)");
    const std::string value = argv[++i];
    if (name == "--shape") {
      set_shape(value, o);
    } else if (name == "--keep") {
      o.keeps = list_of(value, [&](const std::string& x) { return to_number(name, x); });
    } else if (name == "--precision") {
      o.precisions =
          list_of(value, [&](const std::string& x) { return one_of(name, x, precisions); });
    } else if (name == "--pass") {
      o.passes = list_of(value, [&](const std::string& x) { return one_of(name, x, passes); });
    } else if (name == "--threads") {
      o.threads = list_of(value, [&](const std::string& x) { return to_integer(name, x); });
    } else if (name == "--routing") {
      o.config.routing = one_of<RoutingMode>(
          name, value, {{"hard", RoutingMode::kHard}, {"soft", RoutingMode::kSoft}});
    } else if (name == "--dtype") {
      o.dtype = one_of<DType>(
          name, value, {{"fp32", DType::kF32}, {"bf16", DType::kBF16}, {"fp16", DType::kF16}});
    } else if (name == "--layout") {
      o.layouts = list_of(value, [&](const std::string& x) {
        return one_of<bench::Layout>(
            name, x, {{"bhnd", bench::Layout::kBHND}, {"bnhd", bench::Layout::kBNHD}});
      });
    } else if (name == "--block_q") {
      o.config.block_q = to_integer(name, value);
    } else if (name == "--block_k") {
      o.config.block_k = to_integer(name, value);
    } else if (name == "--repeats") {
      o.repeats = to_integer(name, value);
    } else if (name == "--seconds") {
      o.seconds_a_row = to_number(name, value);
    } else if (name == "--minutes") {
      o.minutes = to_number(name, value);
    } else if (name == "--rivals") {
      o.rivals = one_of<bool>(name, value, {{"0", false}, {"1", true}});
    } else if (name == "--implementation") {
      o.implementation = value;
    } else if (name == "--json") {
      json = value;
    } else {
      throw Error(name + " is no option (--help lists them)");
    }
  }
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    std::string json;
    bench::SuiteOptions options = parse(argc, argv, json);
    options.print = [](const std::string& line) { std::cout << line << std::endl; };
    const nlohmann::json report = bench::run_suite(options);
    if (!json.empty()) io::write_file(json, report.dump(2) + "\n");
    return 0;
  } catch (const Error& error) {
    std::cerr << "operator_bench: " << error.what() << "\n";
    return error.kind() == ErrorKind::kInvalidArgument ? 2 : 1;
  } catch (const std::exception& error) {
    std::cerr << "operator_bench: " << error.what() << "\n";
    return 1;
  }
}

// Speed of the operator on random tensors: operator_bench --help.
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <thread>

#include "bench.h"

namespace {

using namespace sla2;

constexpr const char* kUsage =
    "operator_bench [--shape B,H,N,D] [--keep 0.03] [--precision int8|bf16|fp32]\n"
    "               [--routing hard|soft] [--dtype fp32|bf16|fp16] [--block_q 128] [--block_k 64]\n"
    "               [--pass forward|both] [--threads N] [--repeats 9] [--implementation NAME] "
    "[--json]\n";

struct Arguments {
  Problem problem;
  std::string implementation;
  std::int64_t threads = static_cast<std::int64_t>(std::thread::hardware_concurrency());
  std::int64_t repeats = 9;
  bool with_backward = true;
  bool json = false;
};

std::int64_t to_integer(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != 0 || value < 1) {
    throw Error(name + " must be a positive integer, got " + text);
  }
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

void set_shape(const std::string& text, Problem& p) {
  std::istringstream parts(text);
  std::string part;
  std::int64_t sizes[4];
  int count = 0;
  while (std::getline(parts, part, ',')) {
    if (count == 4) throw Error("--shape must be B,H,N,D, got " + text);
    sizes[count++] = to_integer("--shape", part);
  }
  if (count != 4) throw Error("--shape must be B,H,N,D, got " + text);
  p.batch = sizes[0];
  p.num_heads = p.num_kv_heads = sizes[1];
  p.q_tokens = p.k_tokens = sizes[2];
  p.head_dim = p.value_dim = sizes[3];
}

Arguments parse(int argc, char** argv) {
  Arguments a;
  set_shape("1,1,8192,128", a.problem);
  Config& config = a.problem.config;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help") {
      std::cout << kUsage;
      std::exit(0);
    }
    if (name == "--json") {
      a.json = true;
      continue;
    }
    if (i + 1 == argc) throw Error(name + " must be an option with a value\n" + kUsage);
    const std::string value = argv[++i];
    if (name == "--shape") {
      set_shape(value, a.problem);
    } else if (name == "--keep") {
      config.keep = std::strtod(value.c_str(), nullptr);
    } else if (name == "--precision") {
      config.precision = one_of<Precision>(
          name, value,
          {{"int8", Precision::kInt8}, {"bf16", Precision::kBf16}, {"fp32", Precision::kFp32}});
    } else if (name == "--routing") {
      config.routing = one_of<RoutingMode>(
          name, value, {{"hard", RoutingMode::kHard}, {"soft", RoutingMode::kSoft}});
    } else if (name == "--dtype") {
      a.problem.dtype = one_of<DType>(
          name, value, {{"fp32", DType::kF32}, {"bf16", DType::kBF16}, {"fp16", DType::kF16}});
    } else if (name == "--pass") {
      a.with_backward = one_of<bool>(name, value, {{"forward", false}, {"both", true}});
    } else if (name == "--block_q") {
      config.block_q = to_integer(name, value);
    } else if (name == "--block_k") {
      config.block_k = to_integer(name, value);
    } else if (name == "--threads") {
      a.threads = to_integer(name, value);
    } else if (name == "--repeats") {
      a.repeats = to_integer(name, value);
    } else if (name == "--implementation") {
      a.implementation = value;
    } else {
      throw Error(name + " is no option\n" + kUsage);
    }
  }
  return a;
}

void print(const Arguments& a, const bench::Result& r) {
  const auto row = [&](Pass pass, const char* name, const char* implementation,
                       const bench::Seconds& s, bool last) {
    const double tflops = bench::effective_tflops(a.problem, pass, s.median);
    if (a.json) {
      std::cout << "  {\"pass\": \"" << name << "\", \"implementation\": \"" << implementation
                << "\", \"median_ms\": " << s.median * 1e3
                << ", \"quartile1_ms\": " << s.quartile1 * 1e3
                << ", \"quartile3_ms\": " << s.quartile3 * 1e3
                << ", \"effective_tflops\": " << tflops << ", \"threads\": " << a.threads
                << ", \"keep\": " << a.problem.config.keep << "}" << (last ? "\n" : ",\n");
    } else {
      std::cout << name << " " << implementation << ": " << s.median * 1e3 << " ms ("
                << s.quartile1 * 1e3 << " to " << s.quartile3 * 1e3 << "), " << tflops
                << " effective TFLOP/s\n";
    }
  };
  if (a.json) std::cout << "[\n";
  row(Pass::kForward, "forward", r.forward_implementation, r.forward, !a.with_backward);
  if (a.with_backward) {
    row(Pass::kBackward, "backward", r.backward_implementation, r.backward, true);
  }
  std::cout << (a.json ? "]\n" : "") << std::flush;
  if (!a.json) std::cout << "workspace " << r.workspace_mib << " MiB\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Arguments arguments = parse(argc, argv);
    if (!arguments.implementation.empty()) {
      arguments.problem.implementation = arguments.implementation.c_str();
    }
    const auto executor = make_thread_pool(arguments.threads);
    print(arguments, bench::measure_operator(arguments.problem, *executor, arguments.repeats,
                                             arguments.with_backward));
    return 0;
  } catch (const Error& error) {
    std::cerr << "operator_bench: " << error.what() << "\n";
    return error.kind() == ErrorKind::kInvalidArgument ? 2 : 1;
  } catch (const std::exception& error) {
    std::cerr << "operator_bench: " << error.what() << "\n";
    return 1;
  }
}

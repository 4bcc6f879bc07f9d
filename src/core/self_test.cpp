#include "sla2/self_test.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <fstream>
#include <ios>
#include <string>
#include <system_error>
#include <vector>

#include "core/message.h"
#include "core/self_test_comparison.h"

namespace sla2 {
namespace {

namespace fs = std::filesystem;

constexpr std::array kCases = {
    Case{"int8, bf16, head size 128",
         Precision::kInt8,
         DType::kBF16,
         RoutingMode::kHard,
         128,
         {0.03, 0.03}},
    Case{"int8, fp16, head size 64",
         Precision::kInt8,
         DType::kF16,
         RoutingMode::kHard,
         64,
         {0.03, 0.03}},
    Case{"fp8, bf16, head size 128",
         Precision::kFp8,
         DType::kBF16,
         RoutingMode::kHard,
         128,
         {0.06, 0.03}},
    Case{"bf16, head size 128",
         Precision::kBf16,
         DType::kBF16,
         RoutingMode::kHard,
         128,
         {0.03, 0.03}},
    Case{"bf16, soft routing, head size 64",
         Precision::kBf16,
         DType::kBF16,
         RoutingMode::kSoft,
         64,
         {0.03, 0.03}},
    Case{"int8, bf16, head size 256",
         Precision::kInt8,
         DType::kBF16,
         RoutingMode::kHard,
         256,
         {0.03, 0.03}},
    Case{"fp32, head size 64", Precision::kFp32, DType::kF32, RoutingMode::kHard, 64, {1e-4, 1e-3}},
    // With what is learned, routed by itself.
    Case{"int8, bf16, own routing, grouped, transposed, key lengths",
         Precision::kInt8,
         DType::kBF16,
         RoutingMode::kHard,
         64,
         {0.04, 0.04},
         Router::kOwn,
         Method::kSla2,
         64,
         1,
         true},
    Case{"bf16, own soft routing, head size 80 and 48",
         Precision::kBf16,
         DType::kBF16,
         RoutingMode::kSoft,
         80,
         {0.04, 0.04},
         Router::kOwn,
         Method::kSla2,
         48},
    Case{"bf16, SLA, head size 128",
         Precision::kBf16,
         DType::kBF16,
         RoutingMode::kHard,
         128,
         {0.04, 0.04},
         Router::kOwn,
         Method::kSla},
};

// ---- Cache -------------------------------------------------------------------------------------

/// A hash of the file of code that this function is linked into, library or program: kernels that
/// were changed or compiled by another compiler are another build, whatever the version says. Empty
/// if the file cannot be read: then nothing is remembered.
std::string build_identity() {
  Dl_info info{};
  const auto self = reinterpret_cast<const void*>(&build_identity);
  if (dladdr(self, &info) == 0 || info.dli_fname == nullptr) return {};
  // The program's own name may be what the shell was given, from another folder.
  std::ifstream file(info.dli_fname, std::ios::binary);
  if (!file) file.open("/proc/self/exe", std::ios::binary);
  if (!file) return {};
  std::uint64_t hash = 14695981039346656037ULL;  // FNV-1a, by words of eight bytes
  std::vector<char> part(1 << 20);
  while (file.read(part.data(), static_cast<std::streamsize>(part.size())) || file.gcount() > 0) {
    const auto size = static_cast<std::size_t>(file.gcount());
    for (std::size_t at = 0; at < size; at += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, part.data() + at, std::min<std::size_t>(8, size - at));
      hash = (hash ^ word) * 1099511628211ULL;
    }
  }
  return message(std::hex, hash);
}

/// The file that says "passed"; empty where the user has no cache folder.
fs::path cache_file(const SelfTest& test) {
  static const std::string build = build_identity();
  if (build.empty()) return {};
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  fs::path folder;
  if (cache != nullptr && *cache != '\0') {
    folder = cache;
  } else if (home != nullptr && *home != '\0') {
    folder = fs::path(home) / ".cache";
  } else {
    return {};
  }
  std::string name = message("self-test-", test.implementation, "-", test.machine, "-", test.driver,
                             "-", SLA2_VERSION, "-", build);
  for (char& c : name) {
    const bool plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                       c == '.' || c == '-';
    if (!plain) c = '_';
  }
  return folder / "sla2" / name;
}

/// A folder that cannot be written means that the next program tests again.
void remember(const fs::path& file) {
  if (file.empty()) return;
  std::error_code error;
  fs::create_directories(file.parent_path(), error);
  if (!error) std::ofstream(file) << "passed\n";
}

}  // namespace

SelfTest self_test(const Implementation& implementation, bool use_cache) {
  require(implementation.machine != nullptr, "implementation must be one with a machine, got ",
          implementation.name);
  SelfTest result{implementation.name, implementation.machine->name(),
                  implementation.machine->driver()};
  const fs::path file = cache_file(result);
  std::error_code error;
  if (use_cache && !file.empty() && fs::exists(file, error)) {
    result.cached = true;
    return result;
  }
  for (const Case& test : kCases) result.checks += Comparison(implementation, test).run();
  remember(file);
  return result;
}

std::vector<SelfTest> self_test(bool use_cache) {
  std::vector<SelfTest> results;
  Problem problem;
  problem.q_tokens = problem.k_tokens = 64;
  for (const Implementation* const one : implementations()) {
    if (one->machine == nullptr) continue;
    problem.device = one->device;
    // bf16 runs wherever the kernels do.
    problem.config.precision = Precision::kBf16;
    if (!one->refusal(problem, Pass::kForward).empty()) continue;
    results.push_back(self_test(*one, use_cache));
  }
  return results;
}

}  // namespace sla2

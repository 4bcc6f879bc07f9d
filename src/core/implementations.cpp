// The ordered list of implementations and the choice among them. Only this file names the backends.
#include <array>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <span>
#include <string>
#include <string_view>

#include "core/message.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "reference/implementation.h"
#include "sla2/implementation.h"

namespace sla2 {
namespace {

// Fastest first; the reference, which takes everything, last.
constexpr std::array kImplementations = {
#if defined(SLA2_WITH_CUDA)
    &cuda::kImplementation,
#endif
    // clang-format off
    &cpu::kAmx,
    &cpu::kAvx512Vnni,
    &cpu::kAvx512,
    &cpu::kAvx2Vnni,
    &cpu::kAvx2,
    &cpu::kBaseline,
    &reference::kReference,
    // clang-format on
};

const char* name_of(Device device) { return device == Device::kCpu ? "cpu" : "cuda"; }

const char* name_of(Pass pass) {
  return pass == Pass::kRoute ? "route" : pass == Pass::kForward ? "forward" : "backward";
}

std::string_view environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? std::string_view{} : value;
}

bool is_verbose() { return environment("SLA2_VERBOSE").find("dispatch") != std::string_view::npos; }

std::string refusal_of(const Implementation& implementation, const Problem& problem, Pass pass) {
  if (implementation.device != problem.device) {
    return message("runs on ", name_of(implementation.device), ", the problem is on ",
                   name_of(problem.device));
  }
  return implementation.refusal(problem, pass);
}

void check_name(std::string_view wanted) {
  std::string names;
  for (const Implementation* implementation : implementations()) {
    if (wanted == implementation->name) return;
    names += message(names.empty() ? "" : ", ", implementation->name);
  }
  throw Error(message("implementation must be one of ", names, "; got ", wanted));
}

/// The reference is right and hundreds of times slower: whoever did not ask for it should know.
void warn_of_the_reference(Pass pass, const std::string& reasons) {
  static std::once_flag once;  // a line a process, not one a call
  std::call_once(once, [&] {
    std::cerr << message("sla2: ", name_of(pass),
                         " runs on the reference, which is very slow: ", reasons, "\n");
  });
}

}  // namespace

std::span<const Implementation* const> implementations() { return kImplementations; }

const Implementation& select_implementation(const Problem& problem, Pass pass) {
  const std::string_view wanted = problem.implementation != nullptr
                                      ? std::string_view(problem.implementation)
                                      : environment("SLA2_IMPLEMENTATION");
  if (!wanted.empty()) check_name(wanted);
  const bool verbose = is_verbose();

  std::string reasons;
  for (const Implementation* implementation : implementations()) {
    const std::string refusal = !wanted.empty() && wanted != implementation->name
                                    ? message("not the one asked for (", wanted, ")")
                                    : refusal_of(*implementation, problem, pass);
    if (refusal.empty()) {
      const bool is_fallback = wanted.empty() && implementation == implementations().back();
      if (is_fallback && !verbose) warn_of_the_reference(pass, reasons);
      if (verbose) {
        std::cerr << message("sla2: ", name_of(pass), " runs on ", implementation->name, "\n");
      }
      return *implementation;
    }
    if (verbose) {
      std::cerr << message("sla2: ", name_of(pass), ": ", implementation->name,
                           " refused: ", refusal, "\n");
    }
    reasons += message(reasons.empty() ? "" : "; ", implementation->name, ": ", refusal);
  }
  throw Error(ErrorKind::kUnsupported,
              message("no implementation can run ", name_of(pass), " here: ", reasons));
}

}  // namespace sla2

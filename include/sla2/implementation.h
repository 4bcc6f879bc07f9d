// The ordered list of implementations. Adding a backend means one room and one line in the list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "sla2/attention.h"

namespace sla2 {

/// The device behind an implementation whose pointers are not host memory, for the self-test.
struct Machine {
  std::string (*name)();
  std::string (*driver)();
  void* (*allocate)(std::size_t bytes);
  void (*release)(void* block);
  void (*upload)(void* to, const void* from, std::size_t bytes);
  void (*download)(void* to, const void* from, std::size_t bytes);  // after what was launched
};

/// One way to compute the operator. core validates before it calls: views fit the problem, the
/// workspace is large enough.
struct Implementation {
  const char* name;  // "cpu_amx", "cpu_avx512_vnni", ..., "cpu_baseline", "cuda", "reference"
  Device device;
  /// Empty if this machine and this code can run `pass` of `problem`, else the reason.
  std::string (*refusal)(const Problem& problem, Pass pass);
  std::size_t (*workspace_bytes)(const Problem& problem, Pass pass, std::int64_t num_threads);
  void (*route)(const Problem&, const Inputs&, const Routing&, const Context&);
  void (*forward)(const Problem&, const Inputs&, const Outputs&, const Context&);
  void (*backward)(const Problem&, const Inputs&, const Saved&, ConstView d_out, const Gradients&,
                   const Context&);
  const Machine* machine = nullptr;  // null: host memory
};

/// Fastest first, the reference last.
[[nodiscard]] std::span<const Implementation* const> implementations();

/// The first implementation that supports the problem, or the one that problem.implementation (or
/// else the environment variable SLA2_IMPLEMENTATION) names. SLA2_VERBOSE=dispatch prints the
/// choice and each refusal to stderr. Throws sla2::Error with every reason if there is none.
[[nodiscard]] const Implementation& select_implementation(const Problem& problem, Pass pass);

}  // namespace sla2

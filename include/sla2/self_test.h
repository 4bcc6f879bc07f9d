// Are an accelerator's kernels right on this very machine? Small problems, forward and backward,
// against the reference on the CPU. Never runs by itself: it waits for the device, which a call of
// the operator must not.
#pragma once

#include <string>
#include <vector>

#include "sla2/implementation.h"

namespace sla2 {

struct SelfTest {
  std::string implementation;
  std::string machine;  // the accelerator's name
  std::string driver;
  int checks = 0;       // passes compared; 0: found in the cache
  bool cached = false;  // this machine, driver and build passed before
};

/// Compares one implementation that has a machine with the reference. `use_cache`: a success is
/// remembered in the user's cache folder by implementation, machine, driver, version and
/// the build itself, and not repeated. Throws sla2::Error (kRuntime) naming pass, problem, machine
/// and driver if a result is wrong, and what the machine itself throws.
[[nodiscard]] SelfTest self_test(const Implementation& implementation, bool use_cache);

/// Every implementation of implementations() that has a machine, and whose machine is there.
[[nodiscard]] std::vector<SelfTest> self_test(bool use_cache);

}  // namespace sla2

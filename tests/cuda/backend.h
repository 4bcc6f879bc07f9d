// What the suite runs on: the kernels on a GPU (cuda_test), or on emulated threads (emulator_test).
#pragma once

#include <cstddef>
#include <string>

#include "sla2/implementation.h"

namespace sla2::test {

/// Memory that the kernels read and write. Blocks are aligned to 256 bytes.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* take(std::size_t bytes) = 0;
  virtual void give_back(void* block) = 0;
  virtual void upload(void* block, const void* host, std::size_t bytes) = 0;
  /// Waits for what was launched before.
  virtual void download(void* host, const void* block, std::size_t bytes) = 0;
};

struct Backend {
  const Implementation& implementation;
  Memory& memory;
  bool is_emulated;
};

const Backend& backend();

/// Why nothing can run here; empty if it can.
std::string machine_lacks();

/// Emulator: the order of threads, warps and blocks of the next launches (0: as they come).
void permute_threads(std::uint64_t seed);
/// Emulator: launches since the last call; -1 on a GPU.
std::int64_t launches_since();
/// Emulator: rows of matrix loads that met on a bank since the last call; -1 on a GPU.
std::int64_t bank_conflicts_since();

#define SLA2_SKIP_WITHOUT_MACHINE()                        \
  do {                                                     \
    const std::string lacks = sla2::test::machine_lacks(); \
    if (!lacks.empty()) GTEST_SKIP() << lacks;             \
  } while (false)

}  // namespace sla2::test

#include <cstdint>
#include <cstring>
#include <new>

#include "cuda/backend.h"
#include "cuda/cuda.h"
#include "cuda/device.cuh"
#include "cuda/integers.h"
#include "cuda/stages.h"

namespace sla2::test {
namespace {

/// Blocks of exactly the size asked for: the address sanitizer sees what lies behind them.
class HostMemory final : public Memory {
 public:
  void* take(std::size_t bytes) override { return ::operator new(bytes, kAlignment); }
  void give_back(void* block) override { ::operator delete(block, kAlignment); }
  void upload(void* block, const void* host, std::size_t bytes) override {
    std::memcpy(block, host, bytes);
  }
  void download(void* host, const void* block, std::size_t bytes) override {
    std::memcpy(host, block, bytes);
  }

 private:
  static constexpr std::align_val_t kAlignment{256};
};

}  // namespace

const Backend& backend() {
  static HostMemory memory;
  static const Backend emulated_backend{emulated::kImplementation, memory, true};
  return emulated_backend;
}

std::string machine_lacks() { return {}; }
void permute_threads(std::uint64_t seed) { emulated::emulator().seed = seed; }

std::int64_t launches_since() {
  static std::int64_t before = 0;
  const std::int64_t now = emulated::statistics().launches;
  const std::int64_t since = now - before;
  before = now;
  return since;
}

std::int64_t bank_conflicts_since() {
  static std::int64_t before = 0;
  const std::int64_t now = emulated::statistics().bank_conflicts;
  const std::int64_t since = now - before;
  before = now;
  return since;
}

IntegersAt integers_at(const Problem& problem, std::byte* workspace) {
  const auto c = emulated::make_forward(problem, {}, {}, workspace);
  return {c.D, c.q_low, c.q_scale, c.k_low, c.k_scale, c.v_low, c.v_scale};
}

}  // namespace sla2::test

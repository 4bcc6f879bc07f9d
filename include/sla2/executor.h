// Who runs the parallel loops. The caller supplies it: this library starts no thread on its own.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace sla2 {

/// Runs task(i, worker) for every i in [0, n) and returns when all are done. `worker` is in
/// [0, num_threads()) and no two tasks run with the same worker at once (it picks the scratch).
/// Any order of the tasks is fine, but one that has begun must go on while others run: a task may
/// wait for what another one that has begun is computing. Kernels own disjoint outputs by i, or add
/// to them in one order, so results do not depend on num_threads().
/// The first exception that a task throws is rethrown in the caller.
class Executor {
 public:
  virtual ~Executor() = default;
  [[nodiscard]] virtual std::int64_t num_threads() const = 0;
  virtual void parallel_for(
      std::int64_t n, const std::function<void(std::int64_t i, std::int64_t worker)>& task) = 0;
};

/// Runs everything in the calling thread.
class SerialExecutor final : public Executor {
 public:
  [[nodiscard]] std::int64_t num_threads() const override { return 1; }
  void parallel_for(std::int64_t n,
                    const std::function<void(std::int64_t, std::int64_t)>& task) override {
    for (std::int64_t i = 0; i < n; ++i) task(i, 0);
  }
};

/// The library's own pool of std::threads (the caller's thread is one of them). Tasks are handed
/// out dynamically. Several callers may use one pool at once; their loops run one after the other.
/// Throws sla2::Error unless 1 <= num_threads <= 1024.
std::unique_ptr<Executor> make_thread_pool(std::int64_t num_threads);

}  // namespace sla2

// The library's loops on torch's own threads, so that one process has one thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>

#include <torch/csrc/stable/ops.h>

#include "sla2/executor.h"

namespace sla2::torch_ops {

/// parallel_for of torch hands out ranges of worker slots, each slot to one thread; a slot then
/// draws tasks until none is left. So no two tasks share a worker at once, whatever torch decides:
/// in a nested call it runs all slots one after the other in the caller, and slot 0 does the work.
class TorchExecutor final : public Executor {
 public:
  TorchExecutor()
      : num_threads_(std::clamp<std::int64_t>(torch::stable::get_num_threads(), 1, 1024)) {}

  [[nodiscard]] std::int64_t num_threads() const override { return num_threads_; }

  void parallel_for(std::int64_t n,
                    const std::function<void(std::int64_t i, std::int64_t worker)>& task) override {
    const std::int64_t slots = std::min(num_threads_, n);
    if (slots <= 1) {
      for (std::int64_t i = 0; i < n; ++i) task(i, 0);
      return;
    }
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure;
    // Exceptions stay inside: torch's C interface would print them and keep only an error code.
    torch::stable::parallel_for(0, slots, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker) {
        try {
          for (std::int64_t i = next.fetch_add(1); i < n && !failed; i = next.fetch_add(1)) {
            task(i, worker);
          }
        } catch (...) {
          if (!failed.exchange(true)) failure = std::current_exception();
        }
      }
    });
    if (failure) std::rethrow_exception(failure);
  }

 private:
  std::int64_t num_threads_;
};

}  // namespace sla2::torch_ops

// The workspace of calls on a CPU.
#pragma once

#include <cstddef>
#include <mutex>
#include <span>
#include <utility>

#include "sla2/workspace.h"

namespace sla2::torch_ops {

/// Takes the process's workspace for one call and gives it back behind it; it grows to the largest
/// call. A call that runs beside another has one of its own. torch's allocator would give every
/// call fresh pages, whose faults take longer than a quarter of the call.
class KeptWorkspace {
 public:
  explicit KeptWorkspace(std::size_t bytes) {
    {
      const std::lock_guard lock(kept().mutex);
      workspace_ = std::move(kept().workspace);
    }
    workspace_.reserve(bytes);
  }
  ~KeptWorkspace() {
    const std::lock_guard lock(kept().mutex);
    if (workspace_.size() > kept().workspace.size()) std::swap(workspace_, kept().workspace);
  }
  KeptWorkspace(const KeptWorkspace&) = delete;
  KeptWorkspace& operator=(const KeptWorkspace&) = delete;

  [[nodiscard]] std::span<std::byte> span() const { return workspace_.span(); }

 private:
  struct Kept {
    std::mutex mutex;
    Workspace workspace;
  };
  static Kept& kept() {
    static Kept one;
    return one;
  }

  Workspace workspace_;
};

}  // namespace sla2::torch_ops

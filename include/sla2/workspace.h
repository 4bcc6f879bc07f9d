// Memory for Context::workspace.
#pragma once

#include <cstddef>
#include <span>

namespace sla2 {

/// Bytes from the system, aligned to 64 or, from 2 MiB on, to huge pages, for which it asks (Linux:
/// MADV_HUGEPAGE; nothing happens where there are none).
/// Contents are undefined. Keep one and use it again: a new one for each call costs page faults,
/// as much time as the call itself.
class Workspace {
 public:
  Workspace() = default;
  /// Throws sla2::Error (kRuntime) when there is not so much memory.
  explicit Workspace(std::size_t bytes);
  ~Workspace();
  Workspace(Workspace&& other) noexcept;
  Workspace& operator=(Workspace&& other) noexcept;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  [[nodiscard]] std::size_t size() const { return bytes_.size(); }
  [[nodiscard]] std::span<std::byte> span() const { return bytes_; }
  /// At least so many bytes from now on; contents are lost where it has to grow.
  void reserve(std::size_t bytes);

 private:
  std::span<std::byte> bytes_;
};

}  // namespace sla2

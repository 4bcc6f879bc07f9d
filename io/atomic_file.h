// A file that is being written under a temporary name beside its place (internal to io).
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

#include "sla2/error.h"

namespace sla2::io {

/// "out/a.mp4: cannot write: No space left on device" (kRuntime).
[[nodiscard]] Error file_error(const std::filesystem::path& path, const std::string& what,
                               int error_number);

/// Creates a temporary in the folder of `target`; commit() syncs it and renames it to `target`.
/// Destroyed without commit(), it removes the temporary and `target` is as it was.
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& target);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Where another program may write the contents instead of write().
  [[nodiscard]] const std::filesystem::path& temporary() const { return temporary_; }
  void write(std::span<const std::byte> bytes);
  void commit();

 private:
  std::filesystem::path shown_;   // as the caller named it
  std::filesystem::path target_;  // links resolved
  std::filesystem::path temporary_;
  int descriptor_ = -1;
};

}  // namespace sla2::io

#include "io/atomic_file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <fcntl.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>
#include <utility>

#include <fmt/format.h>

namespace sla2::io {
namespace fs = std::filesystem;
namespace {

// A link keeps pointing where it did: what it points to is replaced, not the link.
fs::path resolve_links(const fs::path& path) {
  std::error_code error;
  if (!fs::is_symlink(path, error)) return path;
  const fs::path resolved = fs::weakly_canonical(path, error);
  return error ? path : resolved;
}

fs::path folder_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

void sync_folder(const fs::path& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;  // a folder that may be written but not listed: nothing to sync with
  const int result = ::fsync(descriptor);
  const int error_number = errno;
  ::close(descriptor);
  // Some network file systems cannot sync a folder and say so with EINVAL.
  if (result != 0 && error_number != EINVAL) {
    throw file_error(folder, "cannot sync the folder", error_number);
  }
}

}  // namespace

Error file_error(const fs::path& path, const std::string& what, int error_number) {
  return {ErrorKind::kRuntime, fmt::format("{}: {}: {}", path.string(), what,
                                           std::generic_category().message(error_number))};
}

AtomicFile::AtomicFile(const fs::path& target) : shown_(target), target_(resolve_links(target)) {
  if (!target_.has_filename()) {
    throw Error(fmt::format("output file must have a name, got \"{}\"", target.string()));
  }
  std::error_code error;
  const fs::path folder = folder_of(target_);
  fs::create_directories(folder, error);
  if (error && !fs::is_directory(folder)) {
    throw file_error(folder, "cannot create the folder", error.value());
  }
  struct stat status {};
  if (::stat(target_.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
    throw Error(ErrorKind::kRuntime,
                fmt::format("{}: cannot write: exists and is not a regular file", target.string()));
  }
  static std::atomic<unsigned> counter{0};
  // Names may have 255 bytes; the temporary's must fit whatever the target's length.
  const std::string stem = target_.filename().string().substr(0, 200);
  for (int attempt = 0; attempt < 1000; ++attempt) {
    temporary_ = folder / fmt::format(".{}.{}-{}.tmp", stem, ::getpid(), counter++);
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ >= 0 || errno != EEXIST) break;
  }
  if (descriptor_ < 0) throw file_error(target, "cannot write", errno);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  constexpr std::size_t kChunk = std::size_t{1} << 30;  // write() takes less than 2 GiB at once
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), std::min(bytes.size(), kChunk));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw file_error(shown_, "cannot write", errno);
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) throw file_error(shown_, "cannot write", errno);
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    throw file_error(shown_, "cannot write", errno);
  }
  ::close(std::exchange(descriptor_, -1));
  sync_folder(folder_of(target_));
}

}  // namespace sla2::io

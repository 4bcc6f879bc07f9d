#include "io/files.h"

#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

#include <fmt/format.h>

#include "io/atomic_file.h"
#include "sla2/error.h"

namespace sla2::io {
namespace fs = std::filesystem;
namespace {

struct Descriptor {
  int value;
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
};

}  // namespace

std::string read_file(const fs::path& path, std::size_t max_bytes) {
  // O_NONBLOCK: opening a named pipe would wait for a writer that may never come.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.value < 0) throw file_error(path, "cannot read", errno);
  struct stat status {};
  if (::fstat(file.value, &status) != 0) throw file_error(path, "cannot read", errno);
  if (!S_ISREG(status.st_mode)) {
    throw Error(ErrorKind::kRuntime,
                fmt::format("{}: cannot read: not a regular file", path.string()));
  }
  // Files under /proc have size 0 and contents, so the size is only a hint.
  std::string contents;
  std::size_t used = 0;
  contents.resize(std::min(static_cast<std::size_t>(status.st_size), max_bytes) + 1);
  for (;;) {
    const ssize_t got = ::read(file.value, contents.data() + used, contents.size() - used);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw file_error(path, "cannot read", errno);
    if (got == 0) break;
    used += static_cast<std::size_t>(got);
    if (used > max_bytes) {
      throw Error(fmt::format("{}: must have at most {} bytes, got {}", path.string(), max_bytes,
                              std::max(used, static_cast<std::size_t>(status.st_size))));
    }
    if (used == contents.size()) contents.resize(std::min(2 * used, max_bytes) + 1);
  }
  contents.resize(used);
  return contents;
}

void write_file(const fs::path& path, std::string_view contents) {
  const std::span<const std::byte> part = std::as_bytes(std::span(contents));
  write_file(path, std::span(&part, 1));
}

void write_file(const fs::path& path, std::span<const std::span<const std::byte>> parts) {
  AtomicFile file(path);
  for (const auto& part : parts) file.write(part);
  file.commit();
}

void make_output_folder(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) {
    const int reason = error ? error.value() : ENOTDIR;
    throw file_error(path, "cannot create the output folder", reason);
  }
  try {
    // Written to, too: on a full disk the name alone could be created.
    AtomicFile probe(path / "write-test");
    const std::byte byte{};
    probe.write(std::span(&byte, 1));
  } catch (const Error& failure) {
    throw Error(ErrorKind::kRuntime,
                fmt::format("output folder {} is not writable: {}", path.string(), failure.what()));
  }
}

}  // namespace sla2::io

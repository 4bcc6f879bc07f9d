// Workspaces in huge pages.
#include "sla2/workspace.h"

#include <cstddef>
#include <cstdlib>
#include <limits>
#include <span>
#include <utility>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "core/message.h"
#include "sla2/error.h"

namespace sla2 {
namespace {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t rounded_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

/// `memory` is aligned to huge pages and has whole ones. Refused where the kernel has none: nothing
/// is lost.
void advise_huge_pages([[maybe_unused]] std::span<std::byte> memory) {
#ifdef __linux__
  static_cast<void>(madvise(memory.data(), memory.size(), MADV_HUGEPAGE));
#endif
}

}  // namespace

Workspace::Workspace(std::size_t bytes) {
  if (bytes == 0) return;
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  void* memory = bytes > std::numeric_limits<std::size_t>::max() - alignment
                     ? nullptr
                     : std::aligned_alloc(alignment, rounded_up(bytes, alignment));
  if (memory == nullptr) {
    throw Error(ErrorKind::kRuntime, message("no memory for a workspace of ", bytes, " bytes"));
  }
  bytes_ = {static_cast<std::byte*>(memory), bytes};
  if (alignment == kHugePage) advise_huge_pages({bytes_.data(), rounded_up(bytes, alignment)});
}

Workspace::~Workspace() { std::free(bytes_.data()); }

Workspace::Workspace(Workspace&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

Workspace& Workspace::operator=(Workspace&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

void Workspace::reserve(std::size_t bytes) {
  if (bytes <= size()) return;
  *this = Workspace();  // the two need not exist at once
  *this = Workspace(bytes);
}

}  // namespace sla2

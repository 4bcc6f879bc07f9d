// safetensors: u64 little-endian header length, JSON header, one buffer of tensor data.
#include "io/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <fcntl.h>
#include <string_view>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "io/atomic_file.h"
#include "io/config_json.h"
#include "io/files.h"
#include "sla2/error.h"

namespace sla2::io {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little endian");
constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr int kHeaderDepth = 3;  // object > tensor > list
constexpr const char* kMetadata = "__metadata__";

struct TypeInfo {
  const char* name;
  std::size_t bytes;
};
// In the order of ElementType.
constexpr std::array<TypeInfo, 10> kTypes{{{"F64", 8},
                                           {"F32", 4},
                                           {"F16", 2},
                                           {"BF16", 2},
                                           {"I64", 8},
                                           {"I32", 4},
                                           {"I16", 2},
                                           {"I8", 1},
                                           {"U8", 1},
                                           {"BOOL", 1}}};

const TypeInfo& info_of(ElementType type) { return kTypes.at(static_cast<std::size_t>(type)); }

/// Bytes of a tensor; false when the product overflows.
bool tensor_bytes(ElementType type, const std::vector<std::int64_t>& shape, std::uint64_t& bytes) {
  bytes = bytes_of(type);
  for (const std::int64_t size : shape) {
    if (size < 0) return false;
    if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size), &bytes)) return false;
  }
  return true;
}

ElementType type_from_json(const nlohmann::json& json, const std::string& where) {
  std::string name;
  detail::read_value(json, where, name);
  std::string allowed;
  for (std::size_t i = 0; i < kTypes.size(); ++i) {
    if (name == kTypes[i].name) return static_cast<ElementType>(i);
    allowed += fmt::format("{}{}", i == 0 ? "" : ", ", kTypes[i].name);
  }
  detail::refuse(json, where, "one of " + allowed);
}

std::map<std::string, std::string> metadata_from_json(const nlohmann::json& json,
                                                      const std::string& where) {
  if (!json.is_object()) detail::refuse(json, where, "an object of strings");
  std::map<std::string, std::string> metadata;
  for (const auto& [key, value] : json.items()) {
    detail::read_value(value, fmt::format("{}: {}", where, key), metadata[key]);
  }
  return metadata;
}

struct Range {
  std::uint64_t begin;
  std::uint64_t end;
  const std::string* tensor;
};

// Every byte of the buffer belongs to exactly one tensor, so nothing hides in the file and two
// tensors never share memory.
void check_ranges(std::vector<Range> ranges, std::uint64_t buffer_bytes, const std::string& name) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t covered = 0;
  for (const Range& range : ranges) {
    if (range.begin != covered) {
      throw Error(fmt::format("{}: tensor \"{}\" must begin at byte {} of the data ({}), got {}",
                              name, *range.tensor, covered,
                              range.begin < covered ? "overlap" : "gap", range.begin));
    }
    covered = range.end;
  }
  if (covered != buffer_bytes) {
    throw Error(fmt::format("{}: tensors must cover the {} bytes of data, got {}", name,
                            buffer_bytes, covered));
  }
}

// The tensor's own rules; `buffer` is everything behind the header.
TensorEntry tensor_from_json(const nlohmann::json& json, std::span<const std::byte> buffer,
                             const std::string& where, Range& range) {
  nlohmann::json type;
  std::array<std::uint64_t, 2> offsets{};
  TensorEntry entry;
  JsonObject(json, where)
      .required("dtype", type)
      .required("shape", entry.shape)
      .required("data_offsets", offsets)
      .finish();
  entry.type = type_from_json(type, where + ": dtype");
  const auto [begin, end] = offsets;
  if (begin > end || end > buffer.size()) {
    throw Error(
        fmt::format("{}: data_offsets must lie in order in the {} bytes of data, got [{}, {}]",
                    where, buffer.size(), begin, end));
  }
  std::uint64_t bytes = 0;
  if (!tensor_bytes(entry.type, entry.shape, bytes)) {
    detail::refuse(json["shape"], where + ": shape",
                   "sizes from 0 whose product in bytes fits 64 bits");
  }
  if (bytes != end - begin) {
    throw Error(fmt::format("{}: data_offsets must span {} bytes for its shape and dtype, got {}",
                            where, bytes, end - begin));
  }
  entry.data = buffer.subspan(begin, bytes);
  range.begin = begin;
  range.end = end;
  return entry;
}

std::span<const std::byte> map_file(const std::filesystem::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) throw file_error(path, "cannot read", errno);
  struct stat status {};
  int error_number = 0;
  void* mapped = MAP_FAILED;
  if (::fstat(descriptor, &status) != 0) {
    error_number = errno;
  } else if (S_ISREG(status.st_mode) && status.st_size > 0) {
    mapped = ::mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ, MAP_PRIVATE,
                    descriptor, 0);
    if (mapped == MAP_FAILED) error_number = errno;
  }
  ::close(descriptor);
  if (error_number != 0) throw file_error(path, "cannot read", error_number);
  if (!S_ISREG(status.st_mode)) {
    throw Error(ErrorKind::kRuntime,
                fmt::format("{}: cannot read: not a regular file", path.string()));
  }
  if (mapped == MAP_FAILED) return {};  // empty: there is nothing to map
  return {static_cast<const std::byte*>(mapped), static_cast<std::size_t>(status.st_size)};
}

}  // namespace

std::size_t bytes_of(ElementType type) { return info_of(type).bytes; }
const char* name_of(ElementType type) { return info_of(type).name; }

struct SafetensorsFile::State {
  std::span<const std::byte> mapping;  // empty: the bytes are the caller's
  std::map<std::string, TensorEntry> tensors;
  std::map<std::string, std::string> metadata;

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    if (!mapping.empty()) {
      ::munmap(const_cast<std::byte*>(mapping.data()), mapping.size());
    }
  }

  void parse(std::span<const std::byte> bytes, const std::string& name);
};

void SafetensorsFile::State::parse(std::span<const std::byte> bytes, const std::string& name) {
  if (bytes.size() < kLengthBytes) {
    throw Error(fmt::format("{}: a safetensors file must have at least {} bytes, got {}", name,
                            kLengthBytes, bytes.size()));
  }
  std::uint64_t header_bytes = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) {
    header_bytes = header_bytes << 8 | std::to_integer<std::uint64_t>(bytes[i]);
  }
  const std::uint64_t rest = bytes.size() - kLengthBytes;
  if (header_bytes > std::min(rest, kMaxHeaderBytes)) {
    throw Error(fmt::format(
        "{}: header length must be at most {} ({}), got {}", name, std::min(rest, kMaxHeaderBytes),
        rest < kMaxHeaderBytes ? "what the file holds" : "100 MB", header_bytes));
  }
  const auto header = bytes.subspan(kLengthBytes, header_bytes);
  const auto buffer = bytes.subspan(kLengthBytes + header_bytes);
  if (header.empty() || header.front() != std::byte{'{'}) {
    throw Error(fmt::format("{}: header must begin with '{{'", name));
  }
  const nlohmann::json json =
      parse_json({reinterpret_cast<const char*>(header.data()), header.size()}, name + ": header",
                 {.max_bytes = kMaxHeaderBytes, .max_depth = kHeaderDepth});
  std::vector<Range> ranges;
  for (const auto& [key, value] : json.items()) {
    if (key == kMetadata) {
      metadata = metadata_from_json(value, fmt::format("{}: {}", name, kMetadata));
      continue;
    }
    Range range{};
    auto entry =
        tensor_from_json(value, buffer, fmt::format("{}: tensor \"{}\"", name, key), range);
    range.tensor = &tensors.emplace(key, std::move(entry)).first->first;
    ranges.push_back(range);
  }
  check_ranges(std::move(ranges), buffer.size(), name);
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : state_(std::make_unique<State>()) {
  state_->mapping = map_file(path);
  state_->parse(state_->mapping, path.string());
}

SafetensorsFile::SafetensorsFile(std::span<const std::byte> bytes, const std::string& name)
    : state_(std::make_unique<State>()) {
  state_->parse(bytes, name);
}

SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;

const std::map<std::string, TensorEntry>& SafetensorsFile::tensors() const {
  return state_->tensors;
}
const std::map<std::string, std::string>& SafetensorsFile::metadata() const {
  return state_->metadata;
}

void write_safetensors(const std::filesystem::path& path,
                       const std::map<std::string, TensorEntry>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<const std::pair<const std::string, TensorEntry>*> order;
  order.reserve(tensors.size());
  for (const auto& tensor : tensors) order.push_back(&tensor);
  // The map is sorted by name; the largest elements first keep every tensor aligned to its own.
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return bytes_of(a->second.type) > bytes_of(b->second.type);
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  std::string text;
  std::vector<std::span<const std::byte>> parts(2);
  std::uint64_t offset = 0;
  for (const auto* tensor : order) {
    const auto& [name, entry] = *tensor;
    std::uint64_t bytes = 0;
    if (name == kMetadata || !tensor_bytes(entry.type, entry.shape, bytes) ||
        bytes != entry.data.size()) {
      throw Error(
          fmt::format("{}: tensor \"{}\" must have another name than {} and the bytes of its "
                      "shape [{}] and dtype {}, got {} bytes",
                      path.string(), name, kMetadata, fmt::join(entry.shape, ", "),
                      name_of(entry.type), entry.data.size()));
    }
    header[name] = {{"dtype", name_of(entry.type)},
                    {"shape", entry.shape},
                    {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
    parts.push_back(entry.data);
  }
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    throw Error(fmt::format("{}: names and metadata must be UTF-8", path.string()));
  }
  text.resize((text.size() + kLengthBytes - 1) / kLengthBytes * kLengthBytes, ' ');
  if (text.size() > kMaxHeaderBytes) {
    throw Error(fmt::format("{}: header must have at most {} bytes, got {}", path.string(),
                            kMaxHeaderBytes, text.size()));
  }
  const std::uint64_t length = text.size();
  parts[0] = std::as_bytes(std::span(&length, 1));
  parts[1] = std::as_bytes(std::span(text));
  write_file(path, parts);
}

}  // namespace sla2::io

// The safetensors format, torch-free: everything is checked before anything is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace sla2::io {

enum class ElementType : std::uint8_t {
  kF64,
  kF32,
  kF16,
  kBF16,
  kI64,
  kI32,
  kI16,
  kI8,
  kU8,
  kBool
};
[[nodiscard]] std::size_t bytes_of(ElementType type);
[[nodiscard]] const char* name_of(ElementType type);  // "F32", "BF16", ...

/// One tensor: row-major, little endian; `data` points into the file's mapping.
struct TensorEntry {
  ElementType type = ElementType::kF32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

/// A read-only mapped file. Throws sla2::Error naming the file and the rule: header length against
/// file size, header at most 100 MB and strict JSON, known dtypes, shape times dtype equals the
/// byte range, ranges inside the file, in order, without gaps or overlaps.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  /// Parses a file's bytes in memory (tests, fuzzing); `bytes` must outlive the object.
  SafetensorsFile(std::span<const std::byte> bytes, const std::string& name);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  [[nodiscard]] const std::map<std::string, TensorEntry>& tensors() const;
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Writes atomically (io/files.h). Tensors are laid out largest alignment first, then by name.
void write_safetensors(const std::filesystem::path& path,
                       const std::map<std::string, TensorEntry>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace sla2::io

// JSON <-> options, strict: unknown keys, wrong types and values out of range are named.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "sla2/config.h"

namespace sla2::io {

struct JsonLimits {
  std::size_t max_bytes = std::size_t{16} << 20;
  int max_depth = 64;
};

/// Parses a JSON file of at most 16 MB and depth 64 with unique keys; throws sla2::Error naming
/// file, line and column.
nlohmann::json read_json(const std::filesystem::path& path);
/// The same for a text called `name`.
nlohmann::json parse_json(std::string_view text, const std::string& name,
                          const JsonLimits& limits = {});

/// Python's field names and values: {"keep": 0.03, "precision": "int8", ...}. `scale` may be null.
nlohmann::json to_json(const Config& config);
/// Missing keys keep their defaults; the result is validated. Throws sla2::Error.
Config config_from_json(const nlohmann::json& json);

namespace detail {

// Each throws sla2::Error for another type or a number that does not fit; `where` names the value
// in the message. A float is no integer (64.0 is refused for an integer), an integer is a float.
void read_value(const nlohmann::json& json, const std::string& where, bool& value);
void read_value(const nlohmann::json& json, const std::string& where, std::int32_t& value);
void read_value(const nlohmann::json& json, const std::string& where, std::int64_t& value);
void read_value(const nlohmann::json& json, const std::string& where, std::uint64_t& value);
void read_value(const nlohmann::json& json, const std::string& where, float& value);
void read_value(const nlohmann::json& json, const std::string& where, double& value);
void read_value(const nlohmann::json& json, const std::string& where, std::string& value);
void read_value(const nlohmann::json& json, const std::string& where, nlohmann::json& value);
template <typename T>
void read_value(const nlohmann::json& json, const std::string& where, std::optional<T>& value);
template <typename T>
void read_value(const nlohmann::json& json, const std::string& where, std::vector<T>& value);
template <typename T, std::size_t N>
void read_value(const nlohmann::json& json, const std::string& where, std::array<T, N>& value);

/// "{where} must be {rule}, got {json}".
[[noreturn]] void refuse(const nlohmann::json& json, const std::string& where,
                         const std::string& rule);

}  // namespace detail

/// Reads typed members of an object and at finish() refuses the members that nobody read. Types:
/// bool, int32, int64, uint64, float, double, std::string, nlohmann::json, and optional (JSON's
/// null), vector and array of them. The JSON must outlive the reader.
class JsonObject {
 public:
  /// `context` names the object in messages ("config.json"). Throws if `json` is no object.
  JsonObject(const nlohmann::json& json, std::string context);
  JsonObject(nlohmann::json&&, std::string) = delete;

  /// Assigns json[key] to `value` if present; throws if its type differs or a number does not fit.
  template <typename T>
  JsonObject& optional(const char* key, T& value) {
    if (const nlohmann::json* member = find(key)) detail::read_value(*member, name_of(key), value);
    return *this;
  }
  template <typename T>
  JsonObject& required(const char* key, T& value) {
    detail::read_value(require(key), name_of(key), value);
    return *this;
  }
  JsonObject& ignore(const char* key);
  /// Throws for unknown keys, suggesting the nearest known one.
  void finish() const;

 private:
  [[nodiscard]] std::string name_of(const char* key) const;
  const nlohmann::json* find(const char* key);
  const nlohmann::json& require(const char* key);

  const nlohmann::json& json_;
  std::string context_;
  std::vector<std::string> known_;
};

namespace detail {

template <typename T>
void read_value(const nlohmann::json& json, const std::string& where, std::optional<T>& value) {
  if (json.is_null()) {
    value.reset();
    return;
  }
  T read{};
  read_value(json, where, read);
  value = std::move(read);
}

template <typename T>
void read_value(const nlohmann::json& json, const std::string& where, std::vector<T>& value) {
  if (!json.is_array()) refuse(json, where, "a list");
  std::vector<T> read;
  for (const nlohmann::json& element : json) {
    T one{};
    read_value(element, where + "[" + std::to_string(read.size()) + "]", one);
    read.push_back(std::move(one));
  }
  value = std::move(read);
}

template <typename T, std::size_t N>
void read_value(const nlohmann::json& json, const std::string& where, std::array<T, N>& value) {
  if (!json.is_array() || json.size() != N) {
    refuse(json, where, "a list of " + std::to_string(N));
  }
  std::array<T, N> read{};
  for (std::size_t i = 0; i < N; ++i) {
    read_value(json[i], where + "[" + std::to_string(i) + "]", read[i]);
  }
  value = std::move(read);
}

}  // namespace detail
}  // namespace sla2::io

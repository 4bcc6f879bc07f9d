// JSON <-> options, strict: unknown keys, wrong types and values out of range are named.
#pragma once

#include <filesystem>
#include <string>

#include <nlohmann/json.hpp>

#include "sla2/config.h"

namespace sla2::io {

/// Parses a JSON file of at most 16 MB and depth 64; throws sla2::Error naming file, line and column.
nlohmann::json read_json(const std::filesystem::path& path);
nlohmann::json parse_json(std::string_view text, const std::string& name);

/// Python's field names and values: {"keep": 0.03, "precision": "int8", ...}. `scale` may be null.
nlohmann::json to_json(const Config& config);
/// Missing keys keep their defaults; the result is validated. Throws sla2::Error.
Config config_from_json(const nlohmann::json& json);

/// Reads typed members of an object and at finish() refuses the members that nobody read.
class JsonObject {
 public:
  /// `context` names the object in messages ("config.json").
  JsonObject(const nlohmann::json& json, std::string context);
  /// Assigns json[key] to `value` if present; throws if its type differs or a number does not fit.
  template <typename T>
  JsonObject& optional(const char* key, T& value);
  template <typename T>
  JsonObject& required(const char* key, T& value);
  JsonObject& ignore(const char* key);
  /// Throws for unknown keys, suggesting the nearest known one.
  void finish() const;

 private:
  const nlohmann::json& json_;
  std::string context_;
  std::vector<std::string> known_;
};

}  // namespace sla2::io

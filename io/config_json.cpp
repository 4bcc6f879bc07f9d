#include "io/config_json.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <utility>

#include <fmt/format.h>

#include "sla2/error.h"

namespace sla2::io {
namespace {

template <typename Enum>
struct Name {
  Enum value;
  const char* text;
};

constexpr Name<FeatureMap> kFeatureMaps[] = {
    {FeatureMap::kSoftmax, "softmax"}, {FeatureMap::kElu, "elu"}, {FeatureMap::kRelu, "relu"}};
constexpr Name<Precision> kPrecisions[] = {{Precision::kInt8, "int8"},
                                           {Precision::kFp8, "fp8"},
                                           {Precision::kBf16, "bf16"},
                                           {Precision::kFp32, "fp32"}};
constexpr Name<RoutingMode> kRoutings[] = {{RoutingMode::kHard, "hard"},
                                           {RoutingMode::kSoft, "soft"}};
constexpr Name<ScoreNorm> kScoreNorms[] = {{ScoreNorm::kNone, "none"},
                                           {ScoreNorm::kSoftmax, "softmax"}};
constexpr Name<LinearKeys> kLinearKeys[] = {{LinearKeys::kSmoothed, "smoothed"},
                                            {LinearKeys::kRaw, "raw"}};
constexpr Name<LinearScope> kLinearScopes[] = {{LinearScope::kComplement, "complement"},
                                               {LinearScope::kAll, "all"}};
constexpr Name<BackwardMode> kBackwards[] = {{BackwardMode::kPaper, "paper"},
                                             {BackwardMode::kMatched, "matched"}};
constexpr Name<Method> kMethods[] = {{Method::kSla2, "sla2"}, {Method::kSla, "sla"}};

template <typename Enum, std::size_t N>
const char* text_of(const Name<Enum> (&names)[N], Enum value) {
  for (const auto& name : names) {
    if (name.value == value) return name.text;
  }
  throw Error(fmt::format("config holds an unknown enumerator, got {}", static_cast<int>(value)));
}

template <typename Enum, std::size_t N>
void read_name(JsonObject& object, const char* key, const Name<Enum> (&names)[N], Enum& value) {
  nlohmann::json text = text_of(names, value);
  object.optional(key, text);
  std::string allowed;
  for (const auto& name : names) {
    if (text.is_string() && text.get_ref<const std::string&>() == name.text) {
      value = name.value;
      return;
    }
    allowed += fmt::format("{}\"{}\"", allowed.empty() ? "" : ", ", name.text);
  }
  detail::refuse(text, fmt::format("config: {}", key), "one of " + allowed);
}

std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

// A short, one-line, valid UTF-8 rendering of any value.
std::string shown(const nlohmann::json& json) {
  std::string text = json.is_number_float() && !std::isfinite(json.get<double>())
                         ? fmt::format("{}", json.get<double>())
                         : json.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  constexpr std::size_t kLongest = 80;
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

template <typename Int>
void read_integer(const nlohmann::json& json, const std::string& where, Int& value) {
  if (!json.is_number_integer()) detail::refuse(json, where, "an integer");
  const bool fits = json.is_number_unsigned() ? std::in_range<Int>(json.get<std::uint64_t>())
                                              : std::in_range<Int>(json.get<std::int64_t>());
  if (!fits) {
    detail::refuse(json, where,
                   fmt::format("an integer in [{}, {}]", std::numeric_limits<Int>::min(),
                               std::numeric_limits<Int>::max()));
  }
  value = json.get<Int>();
}

}  // namespace

namespace detail {

void refuse(const nlohmann::json& json, const std::string& where, const std::string& rule) {
  throw Error(fmt::format("{} must be {}, got {}", where, rule, shown(json)));
}

void read_value(const nlohmann::json& json, const std::string& where, bool& value) {
  if (!json.is_boolean()) refuse(json, where, "true or false");
  value = json.get<bool>();
}
void read_value(const nlohmann::json& json, const std::string& where, std::int32_t& value) {
  read_integer(json, where, value);
}
void read_value(const nlohmann::json& json, const std::string& where, std::int64_t& value) {
  read_integer(json, where, value);
}
void read_value(const nlohmann::json& json, const std::string& where, std::uint64_t& value) {
  read_integer(json, where, value);
}
void read_value(const nlohmann::json& json, const std::string& where, double& value) {
  if (!json.is_number() || !std::isfinite(json.get<double>())) {
    refuse(json, where, "a finite number");
  }
  value = json.get<double>();
}
void read_value(const nlohmann::json& json, const std::string& where, float& value) {
  double wide = 0;
  read_value(json, where, wide);
  if (std::abs(wide) > static_cast<double>(std::numeric_limits<float>::max())) {
    refuse(json, where, "a number in the range of 32-bit floats");
  }
  value = static_cast<float>(wide);
}
void read_value(const nlohmann::json& json, const std::string& where, std::string& value) {
  if (!json.is_string()) refuse(json, where, "a string");
  value = json.get<std::string>();
}
void read_value(const nlohmann::json& json, const std::string& /*where*/, nlohmann::json& value) {
  value = json;
}

}  // namespace detail

JsonObject::JsonObject(const nlohmann::json& json, std::string context)
    : json_(json), context_(std::move(context)) {
  if (!json.is_object()) detail::refuse(json, context_, "a JSON object");
}

std::string JsonObject::name_of(const char* key) const {
  return fmt::format("{}: {}", context_, key);
}

const nlohmann::json* JsonObject::find(const char* key) {
  known_.emplace_back(key);
  const auto member = json_.find(key);
  return member == json_.end() ? nullptr : &*member;
}

const nlohmann::json& JsonObject::require(const char* key) {
  const nlohmann::json* member = find(key);
  if (member == nullptr) throw Error(fmt::format("{} is missing", name_of(key)));
  return *member;
}

JsonObject& JsonObject::ignore(const char* key) {
  known_.emplace_back(key);
  return *this;
}

void JsonObject::finish() const {
  for (const auto& [key, value] : json_.items()) {
    if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
    constexpr std::size_t kLongest = 80;  // no option is longer; bounds the distance's cost
    std::string message = fmt::format("{}: unknown key {}", context_, shown(nlohmann::json(key)));
    std::size_t nearest = std::max<std::size_t>(2, key.size() / 3) + 1;
    const std::string* suggestion = nullptr;
    for (const std::string& known : known_) {
      if (key.size() > kLongest) break;
      const std::size_t distance = edit_distance(key, known);
      if (distance < nearest) {
        nearest = distance;
        suggestion = &known;
      }
    }
    if (suggestion != nullptr) message += fmt::format(", did you mean \"{}\"?", *suggestion);
    throw Error(message);
  }
}

nlohmann::json to_json(const Config& config) {
  nlohmann::json json;
  json["keep"] = config.keep;
  json["block_q"] = config.block_q;
  json["block_k"] = config.block_k;
  json["scale"] = config.scale ? nlohmann::json(*config.scale) : nlohmann::json(nullptr);
  json["feature_map"] = text_of(kFeatureMaps, config.feature_map);
  json["precision"] = text_of(kPrecisions, config.precision);
  json["routing"] = text_of(kRoutings, config.routing);
  json["tau"] = config.tau;
  json["score_norm"] = text_of(kScoreNorms, config.score_norm);
  json["linear_keys"] = text_of(kLinearKeys, config.linear_keys);
  json["linear_scope"] = text_of(kLinearScopes, config.linear_scope);
  json["backward"] = text_of(kBackwards, config.backward);
  json["method"] = text_of(kMethods, config.method);
  return json;
}

Config config_from_json(const nlohmann::json& json) {
  Config config;
  JsonObject object(json, "config");
  object.optional("keep", config.keep)
      .optional("block_q", config.block_q)
      .optional("block_k", config.block_k)
      .optional("scale", config.scale)
      .optional("tau", config.tau);
  read_name(object, "feature_map", kFeatureMaps, config.feature_map);
  read_name(object, "precision", kPrecisions, config.precision);
  read_name(object, "routing", kRoutings, config.routing);
  read_name(object, "score_norm", kScoreNorms, config.score_norm);
  read_name(object, "linear_keys", kLinearKeys, config.linear_keys);
  read_name(object, "linear_scope", kLinearScopes, config.linear_scope);
  read_name(object, "backward", kBackwards, config.backward);
  read_name(object, "method", kMethods, config.method);
  object.finish();
  validate(config);
  return config;
}

}  // namespace sla2::io

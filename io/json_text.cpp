// Text to JSON: what nlohmann's parser lets through (duplicate keys, any depth) is refused here.
#include <algorithm>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "io/config_json.h"
#include "io/files.h"
#include "sla2/error.h"

namespace sla2::io {
namespace {

// Tells the outside how far the parser has read, for the line and column of our own messages.
struct CountingIterator {
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  const char* position = nullptr;
  const char** furthest = nullptr;

  reference operator*() const { return *position; }
  CountingIterator& operator++() {
    ++position;
    if (furthest != nullptr) *furthest = position;
    return *this;
  }
  CountingIterator operator++(int) {
    CountingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const CountingIterator& other) const { return position == other.position; }
  bool operator!=(const CountingIterator& other) const { return position != other.position; }
};

// "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error ..." -> "syntax
// ..."
std::string reason_of(const nlohmann::json::exception& error) {
  std::string text = error.what();
  if (const auto bracket = text.find("] "); bracket != std::string::npos) {
    text.erase(0, bracket + 2);
  }
  if (text.starts_with("parse error")) {
    if (const auto colon = text.find(": "); colon != std::string::npos) text.erase(0, colon + 2);
  }
  constexpr std::size_t kLongest = 200;  // the parser quotes the whole last token
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& name,
                          const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    throw Error(fmt::format("{}: JSON must have at most {} bytes, got {}", name, limits.max_bytes,
                            text.size()));
  }
  const char* furthest = text.data();
  const auto fail = [&](const std::string& reason) -> Error {
    const std::string_view read(text.data(), static_cast<std::size_t>(furthest - text.data()));
    const auto line = 1 + std::count(read.begin(), read.end(), '\n');
    const auto newline = read.rfind('\n');
    const auto column = newline == std::string_view::npos ? read.size() : read.size() - newline - 1;
    return Error(fmt::format("{}: line {}, column {}: {}", name, line, column, reason));
  };

  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> open_objects;  // keys seen so far, innermost last
  const auto watch = [&](int depth, Event event, nlohmann::json& parsed) {
    if ((event == Event::object_start || event == Event::array_start) &&
        depth >= limits.max_depth) {
      throw fail(fmt::format("JSON must be nested at most {} deep", limits.max_depth));
    }
    if (event == Event::object_start) {
      open_objects.emplace_back();
    } else if (event == Event::object_end) {
      open_objects.pop_back();
    } else if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!open_objects.back().insert(key).second) {
        throw fail(fmt::format("keys must be unique, got \"{}\" twice", key.substr(0, 80)));
      }
    }
    return true;
  };
  try {
    return nlohmann::json::parse(CountingIterator{text.data(), &furthest},
                                 CountingIterator{text.data() + text.size(), nullptr}, watch);
  } catch (const nlohmann::json::exception& error) {
    throw fail(reason_of(error));
  }
}

nlohmann::json read_json(const std::filesystem::path& path) {
  return parse_json(read_file(path, JsonLimits{}.max_bytes), path.string());
}

}  // namespace sla2::io

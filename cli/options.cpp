#include "cli/options.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <type_traits>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "io/config_json.h"
#include "sla2/error.h"

namespace sla2::cli {

namespace {

template <typename T>
struct IsList : std::false_type {};
template <typename T>
struct IsList<std::vector<T>> : std::true_type {};

template <typename T>
struct IsOptional : std::false_type {};
template <typename T>
struct IsOptional<std::optional<T>> : std::true_type {};

template <typename T>
nlohmann::json to_value(const T& value) {
  if constexpr (IsList<T>::value) {
    nlohmann::json list = nlohmann::json::array();
    for (const auto& element : value) list.push_back(to_value(element));
    return list;
  } else if constexpr (IsOptional<T>::value) {
    return value ? nlohmann::json(*value) : nlohmann::json();
  } else if constexpr (std::is_same_v<T, std::filesystem::path>) {
    return value.string();
  } else {
    return value;
  }
}

template <typename T>
const char* type_name() {
  if constexpr (IsList<T>::value) return "a list";
  if constexpr (std::is_same_v<T, bool>) return "true or false";
  if constexpr (std::is_same_v<T, std::int64_t>) return "a whole number";
  if constexpr (std::is_same_v<T, double>) return "a number";
  return "a string";
}

template <typename T>
void from_value(const nlohmann::json& json, const std::string& key, T& value) {
  const auto refuse = [&]() {
    throw UsageError(fmt::format("{} must be {}, got {}", key, type_name<T>(), json.dump()));
  };
  if constexpr (IsList<T>::value) {
    if (!json.is_array()) refuse();
    T list;
    for (const auto& element : json) from_value(element, key, list.emplace_back());
    value = std::move(list);
  } else if constexpr (IsOptional<T>::value) {
    typename T::value_type read{};
    from_value(json, key, read);
    value = read;
  } else if constexpr (std::is_same_v<T, std::int64_t>) {
    if (!json.is_number_integer() ||
        (json.is_number_unsigned() &&
         json.get<std::uint64_t>() > std::uint64_t{std::numeric_limits<std::int64_t>::max()})) {
      refuse();
    }
    value = json.get<std::int64_t>();
  } else if constexpr (std::is_same_v<T, bool>) {
    if (!json.is_boolean()) refuse();
    value = json.get<bool>();
  } else if constexpr (std::is_same_v<T, double>) {
    if (!json.is_number()) refuse();
    value = json.get<double>();
  } else {
    if (!json.is_string()) refuse();
    value = json.get<std::string>();
  }
}

/// CLI11 takes 99999999999999999999 for the largest integer and 010 for 8. Empty if it is good.
std::string whole_number_error(const std::string& text) {
  std::int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error == std::errc() && stop == end) return {};
  return fmt::format("must be a whole number of 64 bits, got {}", text);
}

std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0U : 1U)});
      diagonal = above;
    }
  }
  return row.back();
}

}  // namespace

Option& Option::range(double from, double to) {
  low = from;
  high = to;
  has_range = true;
  return *this;
}

Option& Option::above(double from, double to) {
  low_open = true;
  return range(from, to);
}

Option& Option::one_of(std::vector<std::string> values) {
  choices = std::move(values);
  return *this;
}

Option& Option::one_of_numbers(std::vector<std::int64_t> values) {
  numbers = std::move(values);
  return *this;
}

Option& Option::required() {
  is_required = true;
  return *this;
}

Option& Option::no_effect() {
  affects_results = false;
  return *this;
}

Option& Option::action() {
  is_action = true;
  return no_effect();
}

Option& Option::compared_by(std::function<std::string()> of_contents) {
  identity = std::move(of_contents);
  return *this;
}

Options::Options(CLI::App& app) : app_(app) {
  app_.add_option("--config", config_file_, "JSON file with any of these options");
}

Options::~Options() = default;

template <typename T>
Option& Options::add(const std::string& flag, T& value, const std::string& help) {
  Option& option = *options_.emplace_back(std::make_unique<Option>());
  option.flag = flag;
  option.key = flag.substr(2);
  std::replace(option.key.begin(), option.key.end(), '-', '_');
  if constexpr (std::is_same_v<T, bool>) {
    option.cli = app_.add_flag(flag, value, help);
  } else {
    option.cli = app_.add_option(flag, value, help);
    if constexpr (std::is_same_v<T, std::int64_t> || std::is_same_v<T, std::vector<std::int64_t>> ||
                  std::is_same_v<T, std::optional<std::int64_t>>) {
      option.cli->check(whole_number_error, "");
    }
    const nlohmann::json start = to_value(value);
    if (start.is_number() || (start.is_string() && start != "")) {
      option.cli->default_str(start.is_string() ? start.get<std::string>() : start.dump());
    }
    if constexpr (IsList<T>::value) {
      option.cli->delimiter(',');
    } else {
      option.cli->take_last();  // a script's default can be overridden behind it
    }
  }
  option.read = [&value, key = option.key](const nlohmann::json& json) {
    from_value(json, key, value);
  };
  option.write = [&value] { return to_value(value); };
  return option;
}

template Option& Options::add(const std::string&, bool&, const std::string&);
template Option& Options::add(const std::string&, std::int64_t&, const std::string&);
template Option& Options::add(const std::string&, double&, const std::string&);
template Option& Options::add(const std::string&, std::optional<std::int64_t>&, const std::string&);
template Option& Options::add(const std::string&, std::optional<double>&, const std::string&);
template Option& Options::add(const std::string&, std::string&, const std::string&);
template Option& Options::add(const std::string&, std::filesystem::path&, const std::string&);
template Option& Options::add(const std::string&, std::vector<std::int64_t>&, const std::string&);
template Option& Options::add(const std::string&, std::vector<double>&, const std::string&);
template Option& Options::add(const std::string&, std::vector<std::string>&, const std::string&);
template Option& Options::add(const std::string&, std::vector<std::filesystem::path>&,
                              const std::string&);

void Options::positional(const std::string& name, std::string& value, const std::string& help) {
  app_.add_option(name, value, help);
}

void Options::read_config() {
  if (config_file_.empty()) return;
  nlohmann::json json;
  try {
    json = io::read_json(config_file_);
  } catch (const Error& error) {
    throw UsageError(fmt::format("--config: {}", error.what()));
  }
  if (!json.is_object()) throw UsageError(config_file_ + ": must be a JSON object");
  for (const auto& [key, value] : json.items()) {
    const auto found = std::find_if(options_.begin(), options_.end(),
                                    [&](const auto& option) { return option->key == key; });
    if (found == options_.end()) {
      const auto nearest =
          std::min_element(options_.begin(), options_.end(), [&](const auto& a, const auto& b) {
            return edit_distance(a->key, key) < edit_distance(b->key, key);
          });
      throw UsageError(fmt::format("{}: unknown key \"{}\", did you mean \"{}\"?", config_file_,
                                   key, (*nearest)->key));
    }
    if ((*found)->given || value.is_null()) continue;  // the command line wins
    (*found)->read(value);
    (*found)->given = true;
  }
}

void Options::check(const Option& option) {
  if (option.is_required && !option.given) {
    throw UsageError(option.flag + " is required");
  }
  const nlohmann::json value = option.write();
  const auto check_one = [&](const nlohmann::json& one) {
    if (one.is_number() && option.has_range) {
      const double number = one.get<double>();
      const bool low_good = option.low_open ? number > option.low : number >= option.low;
      if (!(low_good && number <= option.high)) {  // negated, so that NaN is refused
        throw UsageError(fmt::format("{} must be in {}{}, {}], got {}", option.flag,
                                     option.low_open ? '(' : '[', option.low, option.high, number));
      }
    }
    if (!option.choices.empty() && one.is_string() &&
        std::find(option.choices.begin(), option.choices.end(), one.get<std::string>()) ==
            option.choices.end()) {
      throw UsageError(fmt::format("{} must be one of {}, got {}", option.flag,
                                   fmt::join(option.choices, ", "), one.dump()));
    }
    if (!option.numbers.empty() && one.is_number_integer() &&
        std::find(option.numbers.begin(), option.numbers.end(), one.get<std::int64_t>()) ==
            option.numbers.end()) {
      throw UsageError(fmt::format("{} must be one of {}, got {}", option.flag,
                                   fmt::join(option.numbers, ", "), one.dump()));
    }
  };
  if (value.is_array()) {
    for (const auto& one : value) check_one(one);
  } else {
    check_one(value);
  }
}

void Options::finish() {
  for (const auto& option : options_) option->given = option->cli->count() > 0;
  read_config();
  for (const auto& option : options_) check(*option);
}

nlohmann::json Options::effective() const {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& option : options_) {
    if (!option->is_action) json[option->key] = option->write();
  }
  return json;
}

nlohmann::json Options::identity() const {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& option : options_) {
    if (!option->affects_results) continue;
    json[option->key] = option->identity ? nlohmann::json(option->identity()) : option->write();
  }
  return json;
}

}  // namespace sla2::cli

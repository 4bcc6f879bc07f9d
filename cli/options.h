// Options of a command, declared once: on the command line (--batch), in the JSON file of --config
// ("batch"), and in the effective configuration saved beside the output.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

namespace sla2::cli {

/// Something about how the program was called: exit code 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// One declared option; the setters return it for chaining.
class Option {
 public:
  /// Inclusive; applies to each element of a list. Numbers only.
  Option& range(double low, double high);
  /// The same without `low` itself.
  Option& above(double low, double high);
  Option& one_of(std::vector<std::string> values);
  /// Must be given, on the command line or in the file.
  Option& required();
  Option& one_of_numbers(std::vector<std::int64_t> values);
  /// Does not change results: left out of what --resume compares.
  Option& no_effect();
  /// What to do, no setting (--resume): not saved, so that a saved configuration can be repeated.
  Option& action();
  /// Files or folders that are read: --resume compares what `identity` says of their contents
  /// instead of their names.
  Option& compared_by(std::function<std::string()> identity);

 private:
  friend class Options;
  std::string flag, key;  // "--batch", "batch"
  CLI::Option* cli = nullptr;
  std::function<void(const nlohmann::json&)> read;  // from the config file
  std::function<nlohmann::json()> write;
  std::function<std::string()> identity;
  bool is_required = false, given = false, affects_results = true, is_action = false;
  double low = 0, high = 0;
  bool has_range = false, low_open = false;
  std::vector<std::string> choices;
  std::vector<std::int64_t> numbers;
};

class Options {
 public:
  explicit Options(CLI::App& app);
  ~Options();

  /// T: bool (a switch), std::int64_t, double, std::string, std::filesystem::path, vectors of the
  /// last four, and optional std::int64_t and double, whose default the command fills in before it
  /// saves the options (null: does not apply). `value` holds the default and must outlive this
  /// object.
  template <typename T>
  Option& add(const std::string& flag, T& value, const std::string& help);

  /// An argument without a name, not in the JSON file.
  void positional(const std::string& name, std::string& value, const std::string& help);

  /// After CLI11 has parsed: reads --config for what the command line left open, then checks
  /// ranges, choices and required options. Throws UsageError or sla2::Error (an unreadable file).
  void finish();

  /// Every option with its value in effect: what --config repeats the run with.
  [[nodiscard]] nlohmann::json effective() const;
  /// What a resumed run must agree in: without options marked no_effect(), and with the contents of
  /// files in the place of their names.
  [[nodiscard]] nlohmann::json identity() const;

 private:
  void read_config();
  static void check(const Option& option);

  CLI::App& app_;
  std::string config_file_;
  std::vector<std::unique_ptr<Option>> options_;
};

}  // namespace sla2::cli

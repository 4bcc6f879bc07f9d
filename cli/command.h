// The pattern of a command: declare options, run. main.cpp does the rest (parsing, --config,
// device, seed, threads, Ctrl-C, errors, exit codes).
#pragma once

#include <memory>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli/options.h"
#include "video/run.h"

namespace sla2::cli {

/// Handed to a running command.
struct Session {
  video::Run& run;         // device, seed, progress, stop flag
  const Options& options;  // effective(), identity()
  /// Saves the effective configuration in the folder as {command}.json: behind the work, so that a
  /// run that is refused leaves that of an earlier one beside its results.
  void save_options(const std::filesystem::path& folder) const;
  std::string command;       // "pretrain"
  std::string command_line;  // as typed, for reports
  std::int64_t threads = 0;  // as asked for by --threads, 0: not
};

class Command {
 public:
  virtual ~Command() = default;
  [[nodiscard]] virtual const char* name() const = 0;
  [[nodiscard]] virtual const char* summary() const = 0;
  /// --config, --device, --seed and --threads are declared for every command that needs_device().
  virtual void declare(Options& options) = 0;
  [[nodiscard]] virtual bool needs_device() const { return true; }
  virtual void run(Session& session) = 0;
};

// One per file cli/command_{name}.cpp.
std::unique_ptr<Command> make_pretrain();
std::unique_ptr<Command> make_calibrate();
std::unique_ptr<Command> make_tune();
std::unique_ptr<Command> make_generate();
std::unique_ptr<Command> make_evaluate();
std::unique_ptr<Command> make_demo();
std::unique_ptr<Command> make_bench();
std::unique_ptr<Command> make_info();

}  // namespace sla2::cli

// The program: parses, opens the device, runs one command, turns errors into one line and a code.
#include <atomic>
#include <csignal>
#include <cstdio>
#include <exception>
#include <string>
#include <thread>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <torch/torch.h>

#include "cli/command.h"
#include "cli/progress.h"
#include "io/files.h"
#include "sla2/error.h"
#include "sla2/self_test.h"
#include "video/device.h"

namespace sla2::cli {

namespace {

constexpr int kRuntimeFailure = 1;
constexpr int kUsage = 2;
constexpr int kInterrupted = 130;

std::atomic<bool> stop_flag{false};

extern "C" void on_signal(int signal) {
  stop_flag.store(true);
  std::signal(signal, SIG_DFL);  // a second Ctrl-C stops at once
}

// One command with what main declares for it.
struct Entry {
  std::unique_ptr<Command> command;
  std::unique_ptr<Options> options;
  CLI::App* app = nullptr;
  std::string device = "auto";
  std::int64_t seed = 0;
  std::int64_t threads = 0;
};

std::vector<std::unique_ptr<Entry>> make_entries(CLI::App& app) {
  std::vector<std::unique_ptr<Entry>> entries;
  const auto add = [&](std::unique_ptr<Command> command) {
    Entry& entry = *entries.emplace_back(std::make_unique<Entry>());
    entry.command = std::move(command);
    entry.app = app.add_subcommand(entry.command->name(), entry.command->summary());
    entry.options = std::make_unique<Options>(*entry.app);
    entry.command->declare(*entry.options);
    if (!entry.command->needs_device()) return;
    entry.options->add("--device", entry.device, "auto, cpu, cuda or cuda:N").no_effect();
    entry.options->add("--seed", entry.seed, "seed of everything random");
    entry.options->add("--threads", entry.threads, "CPU threads, 0: torch's choice")
        .range(0, 1024)
        .no_effect();
  };
#define SLA2_COMMAND(name) add(make_##name());
#include "cli/command_list.inc"
#undef SLA2_COMMAND
  return entries;
}

std::string one_line(std::string text) {
  // c10's errors append a C++ stack trace, some of them without its first line.
  for (const char* trace : {"\nException raised from", "\nframe #0: "}) {
    text = text.substr(0, text.find(trace));
  }
  for (char& c : text) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

int fail(int code, const std::string& message) {
  std::fprintf(stderr, "sla2: error: %s\n", one_line(message).c_str());
  return code;
}

/// As a shell takes it for one word.
std::string quoted(const std::string& word) {
  constexpr const char* kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-";
  if (!word.empty() && word.find_first_not_of(kPlain) == std::string::npos) return word;
  std::string result = "'";
  for (const char c : word) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return result + "'";
}

torch::Device device_of(const std::string& name) {
  try {
    return video::open_device(name);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kInvalidArgument) throw;
    throw UsageError(std::string("--") + error.what());
  }
}

void run_entry(Entry& entry, const std::string& command_line) {
  entry.options->finish();
  ProgressBar progress;
  // Asked for even where no GPU is wanted: it must come before torch's first answer about CUDA.
  const torch::Device device =
      entry.command->needs_device() ? device_of(entry.device) : torch::Device(torch::kCPU);
  if (!entry.command->needs_device()) static_cast<void>(video::find_gpu());  // info tells of it
  if (device.is_cuda()) {
    const c10::DeviceGuard guard(device);
    static_cast<void>(self_test(true));  // a wrong kernel is an error, before any work
  }
  // Everything random has a generator of its own; this one fills fresh modules before their weights
  // are read, and its state is part of a checkpoint.
  torch::manual_seed(static_cast<std::uint64_t>(entry.seed));
  // Before torch starts its threads, which inherit it: the probabilities of a sharp attention end
  // in denormals, and arithmetic on them made the backward of stage 1 five times as slow.
  at::globalContext().setFlushDenormal(true);
  if (entry.threads > 0) torch::set_num_threads(static_cast<int>(entry.threads));
  // What is saved says what ran, not "auto".
  entry.device = device.str();
  const std::int64_t asked_threads = entry.threads;
  entry.threads = torch::get_num_threads();
  video::Run run{.device = device, .seed = entry.seed, .progress = progress, .stop = &stop_flag};
  Session session{.run = run,
                  .options = *entry.options,
                  .command = entry.command->name(),
                  .command_line = command_line,
                  .threads = asked_threads};
  entry.command->run(session);
}

int run_program(int argc, char** argv) {
  CLI::App app{"Sparse-linear attention (SLA2) for video diffusion", "sla2"};
  app.set_version_flag("--version", SLA2_VERSION);
  app.require_subcommand(1);
  auto entries = make_entries(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);
    return fail(kUsage, fmt::format("{} (see sla2 --help)", error.what()));
  }
  std::string command_line = quoted(argv[0]);
  for (int i = 1; i < argc; ++i) command_line += " " + quoted(argv[i]);
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a write past the limit of file sizes fails like a full disk's
  for (const auto& entry : entries) {
    if (entry->app->parsed()) run_entry(*entry, command_line);
  }
  return 0;
}

}  // namespace

void Session::save_options(const std::filesystem::path& folder) const {
  io::write_file(folder / (command + ".json"), options.effective().dump(2) + "\n");
}

}  // namespace sla2::cli

int main(int argc, char** argv) {
  using namespace sla2;
  try {
    return cli::run_program(argc, argv);
  } catch (const cli::UsageError& error) {
    return cli::fail(cli::kUsage, error.what());
  } catch (const video::Interrupted& error) {
    std::fprintf(stderr, "sla2: %s\n", error.what());
    return cli::kInterrupted;
  } catch (const std::bad_alloc&) {
    return cli::fail(cli::kRuntimeFailure, "out of memory");
  } catch (const std::exception& error) {
    return cli::fail(cli::kRuntimeFailure, error.what());
  }
}

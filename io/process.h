// One child process with pipes on its three streams; it never outlives the call (internal to io).
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace sla2::io {

struct ProcessOptions {
  std::vector<std::string> arguments;  // [0] is the program's path; no shell sees them
  std::span<const std::byte> input;    // of the standard input
  /// Sees the standard output piece by piece; false ends the process. Empty: output is dropped.
  std::function<bool(std::span<const std::byte>)> on_output;
  /// Without a byte in or out for this long the process is killed.
  std::chrono::milliseconds stall_limit = std::chrono::seconds(120);
};

enum class ProcessEnd { kExited, kSignalled, kStalled, kStopped };  // kStopped: by on_output

struct ProcessResult {
  ProcessEnd end = ProcessEnd::kExited;
  int code = 0;            // exit status or signal
  std::string error_text;  // the last 64 KB of its standard error
};

/// Runs the program to its end. Throws sla2::Error (kRuntime) if it cannot be started; an exception
/// from on_output kills it and passes through.
ProcessResult run_process(const ProcessOptions& options);

}  // namespace sla2::io

#include "io/process.h"

#include <stdexcept>

#include "tests/io/helpers.h"

namespace sla2::io {
namespace {

TEST(IoProcess, CarriesInputOutputErrorAndStatus) {
  const std::string input(3'000'000, 'x');
  std::size_t received = 0;
  ProcessOptions options;
  options.arguments = {"/bin/sh", "-c", "cat; echo trouble >&2; exit 7"};
  options.input = std::as_bytes(std::span(input));
  options.on_output = [&](std::span<const std::byte> bytes) {
    received += bytes.size();
    return true;
  };
  const ProcessResult result = run_process(options);
  EXPECT_EQ(result.end, ProcessEnd::kExited);
  EXPECT_EQ(result.code, 7);
  EXPECT_EQ(received, input.size());
  EXPECT_EQ(result.error_text, "trouble\n");
}

TEST(IoProcess, ChildThatReadsNothingIsNoSignalForUs) {
  const std::string input(10'000'000, 'x');
  ProcessOptions options;
  options.arguments = {"/bin/sh", "-c", "exit 3"};
  options.input = std::as_bytes(std::span(input));
  EXPECT_EQ(run_process(options).code, 3);
}

TEST(IoProcess, StalledChildIsKilled) {
  for (const char* script : {"sleep 100", "exec >&- 2>&-; sleep 100"}) {
    ProcessOptions options;
    options.arguments = {"/bin/sh", "-c", std::string("exec 2>&1; ") + script};
    options.stall_limit = std::chrono::milliseconds(200);
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_EQ(run_process(options).end, ProcessEnd::kStalled) << script;
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10)) << script;
  }
}

TEST(IoProcess, OutputCanStopAndThrow) {
  ProcessOptions options;
  options.arguments = {"/bin/sh", "-c", "while :; do echo yes; done"};
  options.on_output = [](std::span<const std::byte>) { return false; };
  EXPECT_EQ(run_process(options).end, ProcessEnd::kStopped);
  options.on_output = [](std::span<const std::byte>) -> bool { throw std::length_error("full"); };
  EXPECT_THROW(run_process(options), std::length_error);
}

TEST(IoProcess, SignalledAndMissing) {
  ProcessOptions options;
  options.arguments = {"/bin/sh", "-c", "kill -9 $$"};
  const ProcessResult result = run_process(options);
  EXPECT_EQ(result.end, ProcessEnd::kSignalled);
  EXPECT_EQ(result.code, 9);
  options.arguments = {"/nonexistent/program"};
  test::expect_error([&] { run_process(options); }, "/nonexistent/program: cannot be started");
}

}  // namespace
}  // namespace sla2::io

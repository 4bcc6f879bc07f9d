// What every long job needs: where it runs, its seed, who watches it, and whether to stop.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include <torch/torch.h>

namespace sla2::video {

/// Thrown after the user asked to stop and the work done so far was saved.
class Interrupted : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Watches a job. The program draws bars (cli/progress.h); the base class is silent.
class Progress {
 public:
  virtual ~Progress() = default;
  /// A task of `total` steps starts; `first` of them were done in an earlier run.
  virtual void begin(const std::string& /*task*/, std::int64_t /*total*/,
                     std::int64_t /*first*/ = 0) {}
  /// The same for what large inputs make last and small ones do not: shown after a second.
  virtual void begin_if_long(const std::string& /*task*/, std::int64_t /*total*/) {}
  /// `done` steps are done; cheap, may be called after every step.
  virtual void update(std::int64_t /*done*/, std::optional<double> /*loss*/ = std::nullopt) {}
  virtual void end() {}
  /// One line that must be seen: a clip that was skipped, a file that was written.
  virtual void note(const std::string& /*line*/) {}
};

/// Passed by reference to every job; owns nothing.
struct Run {
  torch::Device device = torch::kCPU;
  std::int64_t seed = 0;
  Progress& progress;
  const std::atomic<bool>* stop = nullptr;  // set by Ctrl-C

  [[nodiscard]] bool stop_requested() const { return stop != nullptr && stop->load(); }
  /// Throws Interrupted naming `what` ("generating") if a stop was asked for.
  void check_stop(const std::string& what) const;
};

/// A well mixed 64-bit number from (seed, a, b, c): the same on every machine.
[[nodiscard]] std::uint64_t mix(std::int64_t seed, std::int64_t a, std::int64_t b = 0,
                                std::int64_t c = 0);

/// A generator of its own on `device`, seeded by mix(seed, stream, step): drawing from it disturbs
/// nothing else, and a resumed job draws the same numbers.
[[nodiscard]] at::Generator make_generator(const torch::Device& device, std::int64_t seed,
                                           std::int64_t stream, std::int64_t step = 0);

/// What make_generator's `stream` means; every user has its own.
enum Stream : std::int64_t {
  kStreamInit = 1,
  kStreamWindows = 2,
  kStreamNoise = 3,
  kStreamTimesteps = 4,
  kStreamCaptions = 5,
  kStreamSampler = 6,
  kStreamCalibrate = 7,
  kStreamEvaluate = 8,
};

}  // namespace sla2::video

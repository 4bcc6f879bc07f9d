// Progress on stderr: a bar with rate, loss and time left on a terminal, else a line now and then.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "video/run.h"

namespace sla2::cli {

class ProgressBar final : public video::Progress {
 public:
  ProgressBar();  // looks whether stderr is a terminal
  ~ProgressBar() override;
  void begin(const std::string& task, std::int64_t total, std::int64_t first = 0) override;
  void begin_if_long(const std::string& task, std::int64_t total) override;
  void update(std::int64_t done, std::optional<double> loss = std::nullopt) override;
  void end() override;
  void note(const std::string& line) override;

 private:
  using Clock = std::chrono::steady_clock;
  void start(const std::string& task, std::int64_t total, std::int64_t first);
  [[nodiscard]] bool hidden() const;  // a task that may be short, and still is
  void draw(bool final);
  void erase();

  bool terminal_ = false;
  bool active_ = false;
  bool if_long_ = false;
  bool drawn_ = false;
  std::string task_;
  std::int64_t total_ = 0, first_ = 0, done_ = 0;
  std::optional<double> loss_;
  Clock::time_point start_, last_;
};

}  // namespace sla2::cli

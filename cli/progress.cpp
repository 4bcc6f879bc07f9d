#include "cli/progress.h"

#include <algorithm>
#include <cstdio>
#include <sys/ioctl.h>
#include <unistd.h>

#include <fmt/format.h>

namespace sla2::cli {

namespace {

std::string duration(double seconds) {
  const auto total = static_cast<std::int64_t>(seconds + 0.5);
  if (total >= 3600) return fmt::format("{}h{:02}m", total / 3600, total / 60 % 60);
  return fmt::format("{}:{:02}", total / 60, total % 60);
}

std::int64_t columns() {
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

}  // namespace

ProgressBar::ProgressBar() : terminal_(isatty(STDERR_FILENO) == 1) {}

ProgressBar::~ProgressBar() { erase(); }

void ProgressBar::begin(const std::string& task, std::int64_t total, std::int64_t first) {
  if_long_ = false;
  start(task, total, first);
  if (terminal_) draw(false);  // the first step may take long
}

void ProgressBar::begin_if_long(const std::string& task, std::int64_t total) {
  if_long_ = true;
  start(task, total, 0);
}

bool ProgressBar::hidden() const {
  return if_long_ && Clock::now() - start_ < std::chrono::seconds(1);
}

void ProgressBar::start(const std::string& task, std::int64_t total, std::int64_t first) {
  task_ = task;
  total_ = std::max<std::int64_t>(total, 1);
  first_ = done_ = first;
  loss_.reset();
  start_ = last_ = Clock::now();
  active_ = true;
}

void ProgressBar::update(std::int64_t done, std::optional<double> loss) {
  if (!active_) return;
  done_ = done;
  if (loss) loss_ = loss;
  const auto interval = terminal_ ? std::chrono::milliseconds(100) : std::chrono::seconds(5);
  const auto now = Clock::now();
  if (now - last_ < interval || hidden()) return;
  last_ = now;
  draw(false);
}

void ProgressBar::end() {
  if (!active_) return;
  if (!hidden()) draw(true);
  active_ = false;
}

void ProgressBar::note(const std::string& line) {
  erase();
  std::fprintf(stderr, "%s\n", line.c_str());
}

void ProgressBar::erase() {
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

void ProgressBar::draw(bool final) {
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  const auto steps = static_cast<double>(done_ - first_);
  std::string tail = fmt::format(" {}/{}", done_, total_);
  if (loss_) tail += fmt::format("  loss {:.4f}", *loss_);
  if (steps > 0 && seconds > 0) {
    const double rate = steps / seconds;
    tail += rate >= 1 ? fmt::format("  {:.1f}/s", rate) : fmt::format("  {:.1f} s each", 1 / rate);
    tail += final ? "  took " + duration(seconds)
                  : "  left " + duration(static_cast<double>(total_ - done_) / rate);
  }
  if (!terminal_) {
    std::fprintf(stderr, "%s%s\n", task_.c_str(), tail.c_str());
    return;
  }
  const auto used = static_cast<std::int64_t>(task_.size() + tail.size()) + 4;
  const std::int64_t width = std::clamp<std::int64_t>(columns() - used, 0, 40);
  const std::int64_t filled = std::min(width, width * done_ / total_);
  std::string bar;
  for (std::int64_t i = 0; i < width; ++i) bar += i < filled ? "\u2588" : "\u2591";
  std::fprintf(stderr, "\r\033[K%s %s%s", task_.c_str(), bar.c_str(), tail.c_str());
  if (final) std::fputc('\n', stderr);
  std::fflush(stderr);
  drawn_ = !final;
}

}  // namespace sla2::cli

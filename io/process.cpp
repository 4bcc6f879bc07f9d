#include "io/process.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>

#include "io/atomic_file.h"

namespace sla2::io {
namespace {

using Clock = std::chrono::steady_clock;

class Descriptor {
 public:
  explicit Descriptor(int value = -1) : value_(value) {}
  Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~Descriptor() { close(); }
  void close() {
    if (value_ >= 0) ::close(std::exchange(value_, -1));
  }
  [[nodiscard]] int get() const { return value_; }
  [[nodiscard]] bool open() const { return value_ >= 0; }

 private:
  int value_;
};

struct Ends {
  Descriptor ours, theirs;
};

// Every descriptor is closed on exec: a child started by another thread at the same time would
// otherwise hold our pipes open.
Ends make_pipe(const std::string& program) {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw file_error(program, "cannot make a pipe", errno);
  Ends result{Descriptor(ends[0]), Descriptor(ends[1])};
  ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
  return result;
}

// A socket, not a pipe: MSG_NOSIGNAL then keeps SIGPIPE from ending us when the child dies early.
Ends make_input(const std::string& program, bool wanted) {
  if (!wanted) {
    Ends result{Descriptor(), Descriptor(::open("/dev/null", O_RDONLY | O_CLOEXEC))};
    if (!result.theirs.open()) throw file_error("/dev/null", "cannot read", errno);
    return result;
  }
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) {
    throw file_error(program, "cannot make a socket", errno);
  }
  return {Descriptor(ends[0]), Descriptor(ends[1])};
}

class Child {
 public:
  explicit Child(const ProcessOptions& options);
  ~Child() {
    if (id_ > 0) kill_and_wait();
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  ProcessResult run(const ProcessOptions& options);

 private:
  void start(const std::vector<std::string>& arguments, const Descriptor& input,
             const Descriptor& output, const Descriptor& error);
  void send(std::span<const std::byte>& rest);
  bool receive(Descriptor& from, const std::function<bool(std::span<const std::byte>)>& sink);
  void keep_error(std::span<const std::byte> bytes);
  bool wait_until(Clock::time_point deadline);
  void kill_and_wait();

  pid_t id_ = -1;
  int status_ = 0;
  Descriptor input_, output_, error_;
  std::string error_text_;
  std::vector<std::byte> buffer_;
};

Child::Child(const ProcessOptions& options) : buffer_(std::size_t{1} << 16) {
  const std::string& program = options.arguments.front();
  Ends input = make_input(program, !options.input.empty());
  Ends output = make_pipe(program);
  Ends error = make_pipe(program);
  start(options.arguments, input.theirs, output.theirs, error.theirs);
  input_ = std::move(input.ours);
  output_ = std::move(output.ours);
  error_ = std::move(error.ours);
}

void Child::start(const std::vector<std::string>& arguments, const Descriptor& input,
                  const Descriptor& output, const Descriptor& error) {
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawnattr_init(&attributes);
  ::posix_spawn_file_actions_adddup2(&actions, input.get(), STDIN_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, output.get(), STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, error.get(), STDERR_FILENO);
  // Its own group: Ctrl-C is ours to handle. Default signals: what we ignore it must not inherit.
  sigset_t none, all;
  ::sigemptyset(&none);
  ::sigfillset(&all);
  ::posix_spawnattr_setpgroup(&attributes, 0);
  ::posix_spawnattr_setsigmask(&attributes, &none);
  ::posix_spawnattr_setsigdefault(&attributes, &all);
  ::posix_spawnattr_setflags(
      &attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  const int failed = ::posix_spawn(&id_, argv[0], &actions, &attributes, argv.data(), environ);
  ::posix_spawnattr_destroy(&attributes);
  ::posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) {
    id_ = -1;
    throw file_error(arguments.front(), "cannot be started", failed);
  }
}

void Child::send(std::span<const std::byte>& rest) {
  const ssize_t sent =
      ::send(input_.get(), rest.data(), std::min(rest.size(), std::size_t{1} << 20),
             MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent >= 0) {
    rest = rest.subspan(static_cast<std::size_t>(sent));
  } else if (errno != EINTR && errno != EAGAIN) {
    rest = {};  // it reads no more; its exit status says why
  }
  if (rest.empty()) input_.close();
}

bool Child::receive(Descriptor& from, const std::function<bool(std::span<const std::byte>)>& sink) {
  const ssize_t got = ::read(from.get(), buffer_.data(), buffer_.size());
  if (got > 0) return sink(std::span(buffer_).first(static_cast<std::size_t>(got)));
  if (got == 0 || (errno != EINTR && errno != EAGAIN)) from.close();
  return true;
}

void Child::keep_error(std::span<const std::byte> bytes) {
  constexpr std::size_t kKept = std::size_t{1} << 16;
  error_text_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (error_text_.size() > 2 * kKept) error_text_.erase(0, error_text_.size() - kKept);
}

bool Child::wait_until(Clock::time_point deadline) {
  for (;;) {
    const pid_t ended = ::waitpid(id_, &status_, WNOHANG);
    if (ended == id_ || (ended < 0 && errno != EINTR)) {
      id_ = -1;
      return true;
    }
    if (Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void Child::kill_and_wait() {
  ::kill(id_, SIGKILL);
  while (::waitpid(id_, &status_, 0) < 0 && errno == EINTR) {
  }
  id_ = -1;
}

ProcessResult Child::run(const ProcessOptions& options) {
  std::span<const std::byte> rest = options.input;
  const auto on_output = [&](std::span<const std::byte> bytes) {
    return !options.on_output || options.on_output(bytes);
  };
  const auto on_error = [&](std::span<const std::byte> bytes) {
    keep_error(bytes);
    return true;
  };
  ProcessResult result;
  bool running = true;
  while (running && (output_.open() || error_.open())) {
    // poll() skips negative descriptors.
    std::array<pollfd, 3> watched{
        {{input_.get(), POLLOUT, 0}, {output_.get(), POLLIN, 0}, {error_.get(), POLLIN, 0}}};
    const int ready =
        ::poll(watched.data(), watched.size(), static_cast<int>(options.stall_limit.count()));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) {
      result.end = ProcessEnd::kStalled;
      running = false;
      break;
    }
    if (watched[0].revents != 0) send(rest);
    if (watched[1].revents != 0 && !receive(output_, on_output)) {
      result.end = ProcessEnd::kStopped;
      running = false;
    }
    if (watched[2].revents != 0) receive(error_, on_error);
  }
  input_.close();
  if (running && !wait_until(Clock::now() + options.stall_limit)) {
    result.end = ProcessEnd::kStalled;
    running = false;
  }
  if (running) {
    const bool exited = WIFEXITED(status_);
    result.end = exited ? ProcessEnd::kExited : ProcessEnd::kSignalled;
    result.code = exited ? WEXITSTATUS(status_) : WTERMSIG(status_);
  } else {
    kill_and_wait();
  }
  result.error_text = std::move(error_text_);
  return result;
}

}  // namespace

ProcessResult run_process(const ProcessOptions& options) { return Child(options).run(options); }

}  // namespace sla2::io

#include "rivals.h"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <functional>
#include <poll.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "io/environment.h"
#include "rivals_script.h"

namespace sla2::bench {
namespace {

namespace fs = std::filesystem;

std::string find_python() {
  if (const char* given = std::getenv("SLA2_PYTHON")) return given;
  for (const fs::path& packages : io::site_packages()) {
    // <environment>/lib/python3.x/site-packages
    const fs::path python = packages.parent_path().parent_path().parent_path() / "bin/python";
    std::error_code missing;
    if (fs::exists(packages / "torch", missing) && fs::exists(python, missing)) return python;
  }
  return {};
}

}  // namespace

struct Rivals::Process {
  pid_t id = -1;
  std::FILE* in = nullptr;   // its standard input
  std::FILE* out = nullptr;  // its standard output

  explicit Process(const std::string& python) {
    int to[2], from[2];
    if (pipe2(to, O_CLOEXEC) != 0) throw Error(ErrorKind::kRuntime, "no pipe for Python");
    if (pipe2(from, O_CLOEXEC) != 0) throw Error(ErrorKind::kRuntime, "no pipe for Python");
    id = fork();
    if (id == 0) {
      dup2(to[0], 0);
      dup2(from[1], 1);
      // Torch's compiler writes pages of hints there; what fails is told on the standard output.
      const int nothing = open("/dev/null", O_WRONLY);
      dup2(nothing, 2);
      execl(python.c_str(), python.c_str(), "-c", kRivalsScript, static_cast<char*>(nullptr));
      _exit(127);
    }
    close(to[0]);
    close(from[1]);
    in = fdopen(to[1], "w");
    out = fdopen(from[0], "r");
    if (id < 0) throw Error(ErrorKind::kRuntime, "Python cannot be started");
  }
  ~Process() {
    if (in != nullptr) std::fclose(in);  // the end of its input ends it
    if (out != nullptr) std::fclose(out);
    if (id > 0) {
      kill(id, SIGTERM);
      waitpid(id, nullptr, 0);
    }
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
};

Rivals::Rivals(std::string python, std::string device, std::function<void()> check_stop)
    : check_stop_(std::move(check_stop)), device_(std::move(device)) {
  if (python.empty()) python = find_python();
  if (python.empty()) {
    reason_ = "no Python with torch found (SLA2_PYTHON names one)";
    return;
  }
  if (access(python.c_str(), X_OK) != 0) {
    reason_ = python + " is not a program: " + std::strerror(errno);
    return;
  }
  std::signal(SIGPIPE, SIG_IGN);  // a dead Python is an error of the write
  process_ = std::make_unique<Process>(python);
  try {
    const auto hello = nlohmann::json::parse(exchange({}));
    reason_ = hello.value("reason", "");
    torch_version_ = hello.value("torch", "");
  } catch (const std::exception& error) {
    reason_ = python + ": " + error.what();
  }
}

Rivals::~Rivals() = default;

std::string Rivals::exchange(const std::string& line) {
  if (!line.empty()) {
    std::fputs((line + "\n").c_str(), process_->in);
    std::fflush(process_->in);
  }
  pollfd waiting{fileno(process_->out), POLLIN, 0};
  do {
    check_stop_();
  } while (poll(&waiting, 1, 100) <= 0);
  std::string answer;
  for (int c = std::fgetc(process_->out); c != '\n'; c = std::fgetc(process_->out)) {
    if (c == EOF) check_stop_();  // what stops us may have ended it, too
    if (c == EOF) throw Error(ErrorKind::kRuntime, "Python ended without an answer");
    answer += static_cast<char>(c);
  }
  return answer;
}

std::string Rivals::prepare(const std::string& id, const std::string& name, Pass pass,
                            const Problem& p, std::int64_t threads,
                            const std::vector<std::int32_t>& blocks) {
  if (!reason_.empty()) return reason_;
  const nlohmann::json request{{"do", "prepare"},
                               {"id", id},
                               {"name", name},
                               {"pass", pass == Pass::kBackward ? "backward" : "forward"},
                               {"shape", {p.batch, p.num_heads, p.q_tokens, p.head_dim}},
                               {"device", device_},
                               {"threads", threads},
                               {"blocks", blocks},
                               {"block_q", p.config.block_q},
                               {"block_k", p.config.block_k}};
  return nlohmann::json::parse(exchange(request.dump())).value("reason", "");
}

double Rivals::run(const std::string& id) {
  const nlohmann::json request{{"do", "run"}, {"id", id}};
  const auto answer = nlohmann::json::parse(exchange(request.dump()));
  if (!answer.contains("ms")) throw Error(ErrorKind::kRuntime, answer.value("reason", "no time"));
  return answer.at("ms").get<double>() * 1e-3;
}

void Rivals::clear() {
  if (reason_.empty()) exchange(R"({"do": "clear"})");
}

}  // namespace sla2::bench

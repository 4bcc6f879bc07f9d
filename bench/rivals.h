// PyTorch's attention, timed in a process of its own: bench/rivals.py on the environment's Python.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "sla2/sla2.h"

namespace sla2::bench {

class Rivals {
 public:
  /// `python`: a Python with torch; empty: SLA2_PYTHON, else the one of the environment that this
  /// program belongs to. Never throws for its absence: reason() says why nothing can be timed.
  /// `device`: torch's name of it, "cpu" or "cuda:0". `check_stop` throws to stop: it is called
  /// several times a second while torch works, which may take minutes.
  explicit Rivals(
      std::string python, std::string device = "cpu", std::function<void()> check_stop = [] {});
  ~Rivals();
  Rivals(const Rivals&) = delete;
  Rivals& operator=(const Rivals&) = delete;

  [[nodiscard]] const std::string& reason() const { return reason_; }  // empty: ready
  [[nodiscard]] const std::string& torch_version() const { return torch_version_; }

  /// "torch_sdpa_fp32", "torch_sdpa_bf16", "flex_attention_fp32", "flex_attention_bf16"; `blocks`:
  /// the block table of FlexAttention. Empty, or why it cannot run.
  [[nodiscard]] std::string prepare(const std::string& id, const std::string& name, Pass pass,
                                    const Problem& problem, std::int64_t threads,
                                    const std::vector<std::int32_t>& blocks);
  /// Runs what was prepared under this id, once. Seconds. Throws sla2::Error (kRuntime) with
  /// torch's message.
  [[nodiscard]] double run(const std::string& id);
  /// Frees everything prepared.
  void clear();

 private:
  struct Process;
  std::string exchange(const std::string& line);  // the answer's line
  std::unique_ptr<Process> process_;
  std::function<void()> check_stop_;
  std::string device_, reason_, torch_version_;
};

}  // namespace sla2::bench

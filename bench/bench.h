// Measuring the operator on random tensors of the CPU. Links sla2 alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sla2/sla2.h"

namespace sla2::bench {

struct Seconds {
  double median = 0, quartile1 = 0, quartile3 = 0;
};

/// Of at least one sample; between two samples the nearer one, no interpolation.
Seconds quartiles(std::vector<double> samples);

/// Wall time of one run.
double seconds_of(const std::function<void()>& run);

/// How tensors [B, H, N, D] lie in memory: head by head, or token by token.
enum class Layout : std::uint8_t { kBHND, kBNHD };

/// The tensors that all cases of one shape share, random normal, and one workspace.
struct Data;
std::shared_ptr<Data> make_data(const Problem& p, Layout layout = Layout::kBHND);

/// One problem on shared data: the router is the identity, alpha 1/2.
class Operator {
 public:
  /// Throws sla2::Error if the problem is invalid or nothing can run it.
  Operator(const Problem& problem, Executor& executor, std::shared_ptr<Data> data);
  ~Operator();
  Operator(Operator&&) noexcept;
  Operator& operator=(Operator&&) = delete;

  /// `for_backward`: with everything that the backward needs, else the output alone (inference).
  void forward(bool for_backward);
  void backward();  // behind forward(true)
  /// Seconds of each stage of one run, summed over heads, in the order of their first end.
  /// Empty if the implementation does not tell.
  std::vector<std::pair<std::string, double>> stages(Pass pass);

  [[nodiscard]] const Problem& problem() const { return problem_; }
  [[nodiscard]] std::string implementation(Pass pass) const;
  [[nodiscard]] std::size_t workspace_bytes(Pass pass) const;
  [[nodiscard]] const std::vector<std::int32_t>& blocks() const { return blocks_; }
  /// What the last forward wrote.
  [[nodiscard]] ConstView out() const;

 private:
  void run(Pass pass, bool for_backward, const std::function<void(const char*)>* after_stage);
  [[nodiscard]] bool is_soft() const { return problem_.config.routing == RoutingMode::kSoft; }

  Problem problem_;
  Executor& executor_;
  std::shared_ptr<Data> data_;
  struct Own;
  std::unique_ptr<Own> own_;
  std::vector<std::int32_t> blocks_;
};

/// Forward and backward of the problem, at most 512 tokens in two heads, against the reference
/// under one routing. Throws sla2::Error (kRuntime) if the result is wrong.
void verify(const Problem& problem, Executor& executor, Layout layout = Layout::kBHND);

/// Throws sla2::Error (kRuntime) unless |got - want| <= bound |want| in the Euclidean norm.
void require_close(const std::string& name, const std::vector<float>& got,
                   const std::vector<float>& want, double bound);

}  // namespace sla2::bench

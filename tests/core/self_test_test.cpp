// The self-test of an accelerator's kernels, tried on kernels that run everywhere: the CPU backend
// behind a machine whose memory is the host's. Each stage is broken in turn, and must be noticed.
#include "sla2/self_test.h"

#include <cstring>
#include <filesystem>
#include <functional>
#include <new>
#include <string>
#include <string_view>

#include <gtest/gtest.h>

#include "sla2/error.h"
#include "temporary_folder.h"

namespace sla2::test {
namespace {

constexpr std::align_val_t kAlignment{256};

constexpr Machine kHostMachine = {
    [] { return std::string("host memory"); },
    [] { return std::string("none"); },
    [](std::size_t bytes) { return ::operator new(bytes, kAlignment); },
    [](void* block) { ::operator delete(block, kAlignment); },
    [](void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); },
    [](void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); },
};

/// The fastest implementation of this processor.
const Implementation& fastest() {
  Problem problem;
  problem.q_tokens = problem.k_tokens = 64;
  return select_implementation(problem, Pass::kForward);
}

using Break = std::function<void(const Problem&, const Outputs&)>;
using BreakBackward = std::function<void(const Problem&, const Gradients&)>;
Break break_forward;  // of what the forward wrote; functions of an Implementation hold no state
BreakBackward break_backward;

Implementation on_host_machine() {
  Implementation result = fastest();
  result.machine = &kHostMachine;
  result.forward = [](const Problem& problem, const Inputs& inputs, const Outputs& outputs,
                      const Context& context) {
    fastest().forward(problem, inputs, outputs, context);
    if (break_forward) break_forward(problem, outputs);
  };
  result.backward = [](const Problem& problem, const Inputs& inputs, const Saved& saved,
                       ConstView d_out, const Gradients& gradients, const Context& context) {
    fastest().backward(problem, inputs, saved, d_out, gradients, context);
    if (break_backward) break_backward(problem, gradients);
  };
  return result;
}

/// What the self-test says of it; empty: passed.
std::string complaint() {
  try {
    static_cast<void>(self_test(on_host_machine(), false));
  } catch (const sla2::Error& error) {
    return error.what();
  }
  return {};
}

class SelfTestOnHost : public testing::Test {
 protected:
  void TearDown() override {
    break_forward = {};
    break_backward = {};
  }
  TemporaryCache cache_;
};

TEST_F(SelfTestOnHost, PassesWhereTheKernelsAreRight) {
  const SelfTest first = self_test(on_host_machine(), true);
  EXPECT_EQ(first.checks, 19);  // ten problems, forward and backward, but for the forward of fp8
  EXPECT_FALSE(first.cached);
  EXPECT_TRUE(self_test(on_host_machine(), true).cached);
  EXPECT_EQ(complaint(), "");
}

/// The cache's name says which build passed: by the file of code, not by the version alone.
TEST_F(SelfTestOnHost, AnotherBuildIsTestedAgain) {
  static_cast<void>(self_test(on_host_machine(), true));
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(cache_.path() / "sla2")) {
    const std::string name = entry.path().filename().string();
    const std::string build = name.substr(name.rfind('-') + 1);
    EXPECT_GE(build.size(), 12U) << name;
    EXPECT_EQ(build.find_first_not_of("0123456789abcdef"), std::string::npos) << name;
    const std::string other = name.substr(0, name.rfind('-') + 1) + std::string(16, '0');
    std::filesystem::rename(entry.path(), cache_.path() / "sla2" / other);
    ++files;
    break;
  }
  EXPECT_EQ(files, 1);
  EXPECT_FALSE(self_test(on_host_machine(), true).cached);
}

/// The first row reads another block than it should.
void swap_blocks(const Problem& problem, const Outputs& outputs) {
  if (outputs.routing.blocks == nullptr || problem.config.routing == RoutingMode::kSoft) return;
  outputs.routing.blocks[0] = outputs.routing.blocks[0] == 0 ? 1 : 0;
}

TEST_F(SelfTestOnHost, EveryStageOfTheForwardIsLookedAt) {
  const auto scaled = [](float* values, std::int64_t count) {
    for (std::int64_t i = 0; values != nullptr && i < count; ++i) values[i] *= 1.3F;
  };
  const std::pair<const char*, Break> breaks[] = {
      {"routing.blocks", swap_blocks},
      {"routing.logits",
       [&](const Problem& p, const Outputs& o) {
         if (o.routing.logits != nullptr) {
           scaled(o.routing.logits, p.num_heads * num_q_blocks(p) * num_k_blocks(p, p.k_tokens));
         }
       }},
      {"lse", [&](const Problem& p,
                  const Outputs& o) { scaled(o.lse, p.batch * p.num_heads * p.q_tokens); }},
      {"k_mean",
       [&](const Problem& p, const Outputs& o) {
         scaled(o.k_mean, p.batch * p.num_kv_heads * p.head_dim);
       }},
      // Two outputs exchanged: row for row as large as the right ones.
      {"out_linear",
       [](const Problem& p, const Outputs& o) {
         const auto row = static_cast<std::size_t>(p.value_dim * bytes_of(p.dtype));
         std::memcpy(o.out_linear.data, o.out_sparse.data, row * 64);
       }},
  };
  for (const auto& [name, change] : breaks) {
    break_forward = change;
    EXPECT_NE(complaint().find(std::string("gives a wrong ") + name + " on host memory"),
              std::string::npos)
        << name << ": " << complaint();
  }
}

TEST_F(SelfTestOnHost, EveryGradientIsLookedAt) {
  const auto negated = [](float* values, std::int64_t count) {
    for (std::int64_t i = 0; values != nullptr && i < count; ++i) values[i] = -values[i];
  };
  const std::pair<const char*, BreakBackward> breaks[] = {
      {"d_alpha_logit",
       [&](const Problem& p, const Gradients& g) {
         negated(g.d_alpha_logit, p.num_heads * p.alpha_blocks);
       }},
      {"d_proj_q",
       [&](const Problem& p, const Gradients& g) {
         negated(g.d_proj_q, p.num_routers * p.head_dim * p.head_dim);
       }},
      {"d_proj_k",
       [&](const Problem& p, const Gradients& g) {
         negated(g.d_proj_k, p.num_routers * p.head_dim * p.head_dim);
       }},
      {"d_proj_out", [&](const Problem& p,
                         const Gradients& g) { negated(g.d_proj_out, p.value_dim * p.value_dim); }},
      {"d_v",
       [](const Problem& p, const Gradients& g) {
         std::memset(g.d_v.data, 0, static_cast<std::size_t>(64 * p.value_dim * bytes_of(p.dtype)));
       }},
  };
  for (const auto& [name, change] : breaks) {
    break_backward = change;
    EXPECT_NE(complaint().find(std::string("gives a wrong ") + name + " on host memory"),
              std::string::npos)
        << name << ": " << complaint();
  }
}

}  // namespace
}  // namespace sla2::test

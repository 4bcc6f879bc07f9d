// The threaded paths: one pool for one caller and for several at once, on every implementation of
// this machine, with the bits of a serial run. The thread sanitizer runs these (preset tsan).
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"
#include "sla2/sla2.h"

namespace sla2::test {
namespace {

std::vector<std::string> names_here() {
  std::vector<std::string> names;
  const Problem p = small_problem(64, 64, 32, 32);
  for (const Implementation* one : implementations()) {
    if (one->device == Device::kCpu && one->refusal(p, Pass::kForward).empty()) {
      names.emplace_back(one->name);
    }
  }
  return names;
}

Problem problem_of(const std::string& implementation, RoutingMode mode, Precision precision) {
  Problem p = small_problem(150, 200, 64, 48);
  p.num_heads = 2;
  p.num_kv_heads = 1;
  p.config.routing = mode;
  p.config.precision = precision;
  p.implementation = implementation.c_str();
  return p;
}

std::vector<std::vector<double>> results(const Problem& p, Executor& executor) {
  Call call(p, 31);
  call.run_forward(executor);
  call.run_backward(executor);
  EXPECT_TRUE(call.guards_intact());
  return {call.out.values(),      call.lse.values(),           call.blocks.values(),
          call.d_q.values(),      call.d_k.values(),           call.d_v.values(),
          call.d_proj_q.values(), call.d_alpha_logit.values(), call.k_mean.values()};
}

class Threads : public testing::TestWithParam<std::string> {};

TEST_P(Threads, OneCallerOnAPool) {
  SerialExecutor serial;
  const auto pool = make_thread_pool(4);
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    for (const Precision precision : {Precision::kInt8, Precision::kFp32}) {
      const Problem p = problem_of(GetParam(), mode, precision);
      EXPECT_EQ(results(p, *pool), results(p, serial));
    }
  }
}

TEST_P(Threads, SeveralCallersOnOnePool) {
  SerialExecutor serial;
  const auto pool = make_thread_pool(3);
  const Problem p = problem_of(GetParam(), RoutingMode::kHard, Precision::kInt8);
  const auto wanted = results(p, serial);
  std::vector<std::vector<std::vector<double>>> got(3);
  std::vector<std::thread> callers;
  for (auto& mine : got) {
    callers.emplace_back([&p, &pool, &mine] {
      for (int round = 0; round < 2; ++round) mine = results(p, *pool);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& mine : got) EXPECT_EQ(mine, wanted);
}

INSTANTIATE_TEST_SUITE_P(All, Threads, testing::ValuesIn(names_here()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace sla2::test

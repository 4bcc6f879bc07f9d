// The kernels against the reference in double, forward and backward, under one routing.
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/device_call.h"
#include "cuda/judge.h"

namespace sla2::test {
namespace {

class CudaParity : public testing::TestWithParam<Case> {
 protected:
  static Problem on_device(Problem problem) {
    problem.device = Device::kCuda;
    return problem;
  }
};

TEST_P(CudaParity, Forward) {
  SLA2_SKIP_WITHOUT_MACHINE();
  const Case& c = GetParam();
  const Problem problem = on_device(c.problem);
  const std::string refusal = backend().implementation.refusal(problem, Pass::kForward);
  if (!refusal.empty()) GTEST_SKIP() << refusal;
  Call call(problem, 7, c.layout, c.key_lengths);
  launches_since();
  DeviceCall(call).forward();
  if (backend().is_emulated) {  // a GPU: by graphs, cuda_test.cpp
    EXPECT_LE(launches_since(), 8);
  }
  judge_forward(call);
  EXPECT_TRUE(call.guards_intact());
}

/// What the forward saves comes from the CPU, so that this test is about the backward alone.
TEST_P(CudaParity, Backward) {
  SLA2_SKIP_WITHOUT_MACHINE();
  const Case& c = GetParam();
  const Problem problem = on_device(c.problem);
  const std::string refusal = backend().implementation.refusal(problem, Pass::kBackward);
  if (!refusal.empty()) GTEST_SKIP() << refusal;
  Call call(c.problem, 7, c.layout, c.key_lengths);
  SerialExecutor serial;
  call.run_forward(serial);
  call.problem.device = Device::kCuda;
  launches_since();
  bank_conflicts_since();
  DeviceCall(call).backward();
  if (backend().is_emulated) {
    EXPECT_LE(launches_since(), 12);
    EXPECT_EQ(bank_conflicts_since(), 0);
  }
  judge_backward(call);
}

const auto kName = [](const testing::TestParamInfo<Case>& info) { return info.param.name; };

INSTANTIATE_TEST_SUITE_P(Sizes, CudaParity, testing::ValuesIn(size_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Options, CudaParity, testing::ValuesIn(option_cases()), kName);

}  // namespace
}  // namespace sla2::test

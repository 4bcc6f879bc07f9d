// The integers of int8 are one specification: q, ks and v bit for bit as the reference has them,
// and the mean of the keys that they rest on.
#include "cuda/integers.h"

#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/cases.h"
#include "cuda/device_call.h"
#include "reference/stages.h"

namespace sla2::test {
namespace {

template <typename T>
std::vector<T> download(const void* from, std::int64_t count) {
  std::vector<T> result(static_cast<std::size_t>(count));
  backend().memory.download(result.data(), from, result.size() * sizeof(T));
  return result;
}

/// Where v's key n of 32 lies: within 16, position 4t + r is key 2t + r, or 8 + 2t + r - 2 (r >=
/// 2).
std::int64_t position_of(std::int64_t n) {
  const std::int64_t t = n % 8 / 2;
  return n / 16 * 16 + 4 * t + n % 2 + (n % 16 < 8 ? 0 : 2);
}

void expect_integers(const Case& c) {
  SCOPED_TRACE(c.name);
  Call call(c.problem, 23, c.layout, c.key_lengths);
  const Problem& p = call.problem;
  DeviceCall on_device(call);
  const Scratch scratch(backend().memory,
                        backend().implementation.workspace_bytes(p, Pass::kForward, 1));
  SerialExecutor serial;
  backend().implementation.forward(p, on_device.inputs(), on_device.outputs(),
                                   {serial, scratch.span(), nullptr});
  on_device.mirror().download();
  const auto exact = reference::quantize(p, call.operands<float>());
  const IntegersAt at = integers_at(p, scratch.span().data());
  const std::int64_t kv_heads = p.batch * p.num_kv_heads;
  const std::int64_t T = num_k_blocks(p, p.k_tokens);
  const std::int64_t rows = T * p.config.block_k;
  const auto length_of = [&](std::int64_t head) {
    return call.key_lengths.empty() ? p.k_tokens : call.key_lengths[head / p.num_kv_heads];
  };

  EXPECT_EQ(download<float>(at.q_scale, p.batch * p.num_heads * p.q_tokens), exact.q_scale);
  EXPECT_EQ(download<float>(at.v_scale, kv_heads * p.value_dim), exact.v_scale);
  const auto q = download<std::int8_t>(at.q, p.batch * p.num_heads * p.q_tokens * at.D);
  for (std::int64_t n = 0; n < p.batch * p.num_heads * p.q_tokens; ++n) {
    for (std::int64_t a = 0; a < at.D; ++a) {
      ASSERT_EQ(q[n * at.D + a], a < p.head_dim ? exact.q[n * p.head_dim + a] : 0);
    }
  }
  const auto k_scale = download<float>(at.k_scale, kv_heads * T);
  const auto k = download<std::int8_t>(at.k, kv_heads * rows * at.D);
  const auto v = download<std::int8_t>(at.v, kv_heads * rows * at.D);
  for (std::int64_t head = 0; head < kv_heads; ++head) {
    const std::int64_t blocks = num_k_blocks(p, length_of(head));
    for (std::int64_t j = 0; j < blocks; ++j) {
      ASSERT_EQ(k_scale[head * T + j], exact.k_scale[head * T + j]);
    }
    for (std::int64_t n = 0; n < length_of(head); ++n) {
      const std::int64_t row = head * rows + n;
      for (std::int64_t a = 0; a < p.head_dim; ++a) {
        ASSERT_EQ(k[row * at.D + a], exact.k[(head * p.k_tokens + n) * p.head_dim + a]);
      }
      for (std::int64_t a = 0; a < p.value_dim; ++a) {
        ASSERT_EQ(v[(row / 32 * at.D + a) * 32 + position_of(row % 32)],
                  exact.v[(head * p.k_tokens + n) * p.value_dim + a]);
      }
    }
    // Behind a key length: zero up to the end of its block.
    for (std::int64_t n = length_of(head); n < blocks * p.config.block_k; ++n) {
      for (std::int64_t a = 0; a < at.D; ++a) ASSERT_EQ(k[(head * rows + n) * at.D + a], 0);
    }
  }
}

TEST(CudaIntegers, AreThoseOfTheReferenceBitForBit) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const DType dtype : kTypes) {
    for (const std::int64_t d : {16, 64, 128, 256}) {
      if (dtype != DType::kF32 && d % 128 != 0) continue;
      Case c;
      c.name = std::string(name_of(dtype)) + " d " + std::to_string(d);
      c.problem = small_problem(100, 203, d, d == 16 ? 64 : d);
      c.problem.batch = 2;
      c.problem.num_heads = 2;
      c.problem.dtype = dtype;
      c.problem.device = Device::kCuda;
      c.problem.config.precision = Precision::kInt8;
      c.problem.config.block_k = d == 64 ? 128 : 32;
      c.layout = d == 128 ? Layout::kPadded : Layout::kTransposed;
      c.key_lengths = {203, 77};
      expect_integers(c);
    }
  }
}

TEST(CudaIntegers, MeanOfTheKeysBitForBit) {
  SLA2_SKIP_WITHOUT_MACHINE();
  for (const DType dtype : kTypes) {
    Problem p = small_problem(40, 3001, 64, 64);
    p.num_heads = p.num_kv_heads = 2;
    p.dtype = dtype;
    p.device = Device::kCuda;
    p.config.block_k = 64;
    p.config.precision = Precision::kInt8;
    Call call(p, 29);
    DeviceCall(call).forward();
    const auto exact = reference::smooth(p, call.operands<float>());
    for (std::int64_t i = 0; i < call.k_mean.size(); ++i)
      EXPECT_EQ(call.k_mean[i], exact.k_mean[i]) << i;
  }
}

}  // namespace
}  // namespace sla2::test

// The emulator itself: its primitives, and that it notices what a GPU would leave undefined.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/float16.h"
#include "cuda/device.cuh"

namespace sla2::emulated {
namespace {

/// Restores the settings of the emulator.
class EmulatorTest : public testing::Test {
 protected:
  void TearDown() override { emulator() = Emulator{}; }
};

constexpr int kPitch = 24;

struct Matrices {
  const std::uint16_t* a;  // [64, k] bf16
  const std::uint16_t* b;  // [16, k]
  float* c;                // [64, 16] = a b^T
  int k;
  bool waits;  // for the readers of a tile before the next one is copied over it
};

void multiply_kernel(Matrices x) {
  const int thread = thread_index();
  const int lane = lane_index();
  auto* a = shared_memory<std::uint16_t>(0);
  std::uint16_t* b = a + 64 * kPitch;
  float c[2][4] = {};
  for (int k = 0; k < x.k; k += 16) {
    const int row = thread / 2;
    const int column = thread % 2 * 8;
    copy_async_16(a + row * kPitch + column, x.a + row * x.k + k + column, true);
    if (thread < 32) {
      copy_async_16(b + row * kPitch + column, x.b + row * x.k + k + column, true);
    }
    copy_async_commit();
    copy_async_wait<0>();
    block_barrier();
    std::uint32_t left[4];
    std::uint32_t right[4];
    ldmatrix_x4(left, a + (warp_index() * 16 + lane % 16) * kPitch + lane / 16 * 8);
    ldmatrix_x4(right, b + (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8);
    mma_bf16(c[0], left, right[0], right[1]);
    mma_bf16(c[1], left, right[2], right[3]);
    if (x.waits) block_barrier();
  }
  for (int n = 0; n < 2; ++n) {
    for (int e = 0; e < 4; ++e) {
      const int row = warp_index() * 16 + lane / 4 + e / 2 * 8;
      x.c[row * 16 + n * 8 + lane % 4 * 2 + e % 2] = c[n][e];
    }
  }
}

/// How many results of a product of small integers are wrong.
int wrong_products(bool waits) {
  constexpr int kDepth = 128;
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> integer(-6, 6);
  std::vector<std::uint16_t> a(64 * kDepth);
  std::vector<std::uint16_t> b(16 * kDepth);
  for (std::uint16_t& x : a) x = to_bf16(static_cast<float>(integer(generator)));
  for (std::uint16_t& x : b) x = to_bf16(static_cast<float>(integer(generator)));
  std::vector<float> c(64 * 16);
  launch(nullptr, multiply_kernel, {}, 128, (64 + 16) * kPitch * 2,
         Matrices{a.data(), b.data(), c.data(), kDepth, waits});
  int wrong = 0;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        sum += from_bf16(a[m * kDepth + k]) * from_bf16(b[n * kDepth + k]);
      }
      if (c[m * 16 + n] != sum) ++wrong;
    }
  }
  return wrong;
}

TEST_F(EmulatorTest, ProductsAreRightInEveryOrderOfThreads) {
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    emulator().seed = seed;
    EXPECT_EQ(wrong_products(true), 0) << "seed " << seed;
  }
}

TEST_F(EmulatorTest, AMissingBarrierShows) {
  int seeds = 0;
  for (std::uint64_t seed = 1; seed < 8; ++seed) {
    emulator().seed = seed;
    if (wrong_products(false) > 0) ++seeds;
  }
  EXPECT_GE(seeds, 1);
}

template <typename Body>
std::string failure_of(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

struct Nothing {};

void half_a_warp_waits(Nothing) {
  if (lane_index() < 16) {
    warp_barrier();
  } else {
    block_barrier();
  }
}
void two_collectives(Nothing) {
  if (lane_index() < 16) {
    warp_barrier();
  } else {
    ballot(true);
  }
}
void misaligned_load(Nothing) {
  const auto* bytes = shared_memory<unsigned char>(0);
  load_16(bytes + 8);
}
void copy_not_waited_for(Nothing) {
  alignas(16) static const std::uint32_t source[4] = {};
  copy_async_16(shared_memory<unsigned char>(0), source, true);
  copy_async_commit();
}

TEST_F(EmulatorTest, WrongKernelsThrow) {
  const auto run = [](void (*kernel)(Nothing)) {
    return failure_of([&] { launch(nullptr, kernel, {}, 64, 256, Nothing{}); });
  };
  EXPECT_NE(run(half_a_warp_waits).find("must reach the barrier, got 32 waiting"),
            std::string::npos);
  EXPECT_NE(run(two_collectives).find("must meet in one collective"), std::string::npos);
  EXPECT_NE(run(misaligned_load).find("vector load must be aligned"), std::string::npos);
  EXPECT_NE(run(copy_not_waited_for).find("wait for its asynchronous copies"), std::string::npos);
  EXPECT_EQ(wrong_products(true), 0);  // and the next launch is as it should be
}

TEST_F(EmulatorTest, LaunchesAreChecked) {
  emulator().device.shared_bytes = 99 * 1024;
  const auto run = [](int threads, std::size_t bytes) {
    return failure_of([&] {
      launch(
          nullptr, +[](Nothing) {}, {}, threads, bytes, Nothing{});
    });
  };
  EXPECT_EQ(run(64, 99 * 1024), "no error");
  EXPECT_NE(run(64, 99 * 1024 + 1).find("at most 101376 bytes, got 101377"), std::string::npos);
  EXPECT_NE(run(65, 0).find("multiple of 32 up to 1024, got 65"), std::string::npos);
}

struct Poison {
  std::uint32_t* words;  // [2]
};
void read_too_early(Poison x) {
  alignas(16) static const std::uint32_t source[4] = {7, 7, 7, 7};
  auto* words = shared_memory<std::uint32_t>(0);
  if (thread_index() == 0) x.words[0] = words[0];
  copy_async_16(words + 4 * thread_index(), source, true);
  copy_async_commit();
  if (thread_index() == 0) x.words[1] = words[0];
  copy_async_wait<0>();
}

TEST_F(EmulatorTest, WhatIsNotThereYetIsNaN) {
  std::uint32_t words[2] = {};
  launch(nullptr, read_too_early, {}, 32, 32 * 16, Poison{words});
  EXPECT_EQ(words[0], 0xffffffffU);
  EXPECT_EQ(words[1], 0xffffffffU);
}

TEST_F(EmulatorTest, EightBitFloatsRoundToNearest) {
  for (std::uint32_t bits = 0; bits < 256; ++bits) {
    const float x = e4m3_to_float(bits);
    if (std::isnan(x)) continue;
    EXPECT_EQ(to_e4m3(x), bits);
    if ((bits & 0x7f) >= 0x7e) continue;
    const float next = e4m3_to_float(bits + 1);
    // A tie goes to the even neighbour.
    EXPECT_EQ(to_e4m3((x + next) / 2), bits % 2 == 0 ? bits : bits + 1) << x;
    EXPECT_EQ(to_e4m3(x + (next - x) * 0.499F), bits);
    EXPECT_EQ(to_e4m3(x + (next - x) * 0.501F), bits + 1);
  }
  EXPECT_EQ(e4m3_to_float(to_e4m3(1e9F)), 448.0F);
  EXPECT_EQ(e4m3_to_float(to_e4m3(-std::numeric_limits<float>::infinity())), -448.0F);
  EXPECT_TRUE(std::isnan(e4m3_to_float(to_e4m3(std::numeric_limits<float>::quiet_NaN()))));
}

struct Collectives {
  int* out;  // [64, 5]
};
void collect(Collectives x) {
  const int t = thread_index();
  int* out = x.out + t * 5;
  out[0] = shuffle_xor(t, 5);
  out[1] = shuffle(t * 2, 3);
  out[2] = static_cast<int>(ballot(t % 3 == 0));
  out[3] = block_count(t % 3 == 0);
  out[4] = block_any(t == 40) ? 1 : 0;
}

TEST_F(EmulatorTest, CollectivesSeeTheirWarpOrBlock) {
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    emulator().seed = seed;
    std::vector<int> out(64 * 5);
    launch(nullptr, collect, {}, 64, 0, Collectives{out.data()});
    for (int t = 0; t < 64; ++t) {
      std::uint32_t bits = 0;
      for (int lane = 0; lane < 32; ++lane) {
        if ((t / 32 * 32 + lane) % 3 == 0) bits |= 1U << lane;
      }
      EXPECT_EQ(out[t * 5], t ^ 5);
      EXPECT_EQ(out[t * 5 + 1], (t / 32 * 32 + 3) * 2);
      EXPECT_EQ(static_cast<std::uint32_t>(out[t * 5 + 2]), bits);
      EXPECT_EQ(out[t * 5 + 3], 22);
      EXPECT_EQ(out[t * 5 + 4], 1);
    }
  }
}

}  // namespace
}  // namespace sla2::emulated

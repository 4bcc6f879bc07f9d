// The primitives of device.cuh on a CPU: every thread of a block is a fiber, blocks run one after
// the other. What a GPU leaves undefined shows: shared memory starts as NaN, an asynchronous copy
// writes NaN when it is issued and the data when it is waited for, collectives that not all 32
// lanes reach and misaligned vectors throw, and the order of threads, warps and blocks is a
// permutation that a test chooses. Included by device.cuh alone.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/float16.h"
#include "sla2/error.h"

#define SLA2_KERNEL(threads, blocks)
#define SLA2_DEVICE inline
#define SLA2_HOST_DEVICE inline
#define SLA2_UNROLL
#define SLA2_NO_UNROLL

namespace sla2::emulated {

/// How the next launches run, and what they run on.
struct Emulator {
  std::uint64_t seed = 0;  // 0: threads, warps and blocks in order; else a permutation, anew at
                           // every rendezvous
  // What the smallest of the supported GPUs (8.6, 8.9, 12.0) has for a block, and fp8.
  DeviceInfo device{8, 9, 132, std::size_t{99} * 1024};
};
/// Of the calling OS thread.
Emulator& emulator();

/// What the launches of the calling OS thread did since the last reset.
struct Statistics {
  std::int64_t launches = 0;
  std::int64_t matrix_products = 0;  // per warp
  std::int64_t matrix_loads = 0;     // ldmatrix, per warp
  std::int64_t bank_conflicts = 0;   // 8-row phases of ldmatrix that need more than one pass
};
Statistics& statistics();

/// Where the running fiber is.
struct Place {
  int thread = 0;
  int block[3] = {};
  Grid grid;
  int threads = 0;
};
extern constinit thread_local const Place* here;  // constinit: read without a wrapper
inline const Place& place() { return *here; }

/// Called by all 32 lanes of the running warp with an operand each; the last one to arrive runs
/// `combine` over the 32 operands. `what` must be the same in all lanes.
using Combine = void (*)(void* const* operands);
void rendezvous(const char* what, void* operand, Combine combine);
/// All threads of the block; returns the sum of `value` over them.
int block_rendezvous(int value);

[[noreturn]] void fail(const char* rule, const void* address);
unsigned char* shared_bytes(std::size_t offset, std::size_t alignment);
/// Throws unless [pointer, pointer + bytes) lies in the block's shared memory.
void check_shared(const void* pointer, std::size_t bytes);
void issue_copy(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(int pending);

struct Launch {
  void (*run)(const Launch&);
  void (*kernel)();
  const void* args;
};
void run_grid(const Launch& launch, Grid grid, int threads, std::size_t shared);

SLA2_DEVICE int thread_index() { return place().thread; }
SLA2_DEVICE int fresh_thread_index() { return place().thread; }
SLA2_DEVICE int lane_index() { return place().thread & 31; }
SLA2_DEVICE int warp_index() { return place().thread >> 5; }
SLA2_DEVICE int block_threads() { return place().threads; }
SLA2_DEVICE int block_x() { return place().block[0]; }
SLA2_DEVICE int block_y() { return place().block[1]; }
SLA2_DEVICE int block_z() { return place().block[2]; }
SLA2_DEVICE int grid_x() { return static_cast<int>(place().grid.x); }
SLA2_DEVICE int grid_y() { return static_cast<int>(place().grid.y); }

SLA2_DEVICE void block_barrier() { block_rendezvous(0); }
SLA2_DEVICE void warp_barrier() {
  rendezvous("warp_barrier", nullptr, [](void* const*) {});
}
SLA2_DEVICE bool block_any(bool value) { return block_rendezvous(value ? 1 : 0) != 0; }
SLA2_DEVICE int block_count(bool value) { return block_rendezvous(value ? 1 : 0); }

namespace detail {
template <typename T>
struct Exchange {
  T value;
  T result;
  int lane;
};
}  // namespace detail

template <typename T>
SLA2_DEVICE T shuffle(T value, int lane) {
  using Exchange = detail::Exchange<T>;
  Exchange mine{value, value, lane & 31};
  rendezvous("shuffle", &mine, [](void* const* all) {
    for (int i = 0; i < 32; ++i) {
      auto* one = static_cast<Exchange*>(all[i]);
      one->result = static_cast<const Exchange*>(all[one->lane])->value;
    }
  });
  return mine.result;
}
template <typename T>
SLA2_DEVICE T shuffle_xor(T value, int lane_mask) {
  return shuffle(value, lane_index() ^ lane_mask);
}
SLA2_DEVICE std::uint32_t ballot(bool value) {
  std::uint32_t mine = value ? 1 : 0;
  rendezvous("ballot", &mine, [](void* const* all) {
    std::uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= *static_cast<const std::uint32_t*>(all[i]) << i;
    for (int i = 0; i < 32; ++i) *static_cast<std::uint32_t*>(all[i]) = bits;
  });
  return mine;
}
SLA2_DEVICE int count_bits(std::uint32_t value) { return std::popcount(value); }

template <typename T>
SLA2_DEVICE T* shared_memory(std::size_t byte_offset) {
  return reinterpret_cast<T*>(shared_bytes(byte_offset, alignof(T)));
}

namespace detail {
template <typename T>
T load_vector(const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(T) != 0) {
    fail("a vector load must be aligned to its size", from);
  }
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
template <typename T>
void store_vector(void* to, const T& value) {
  if (reinterpret_cast<std::uintptr_t>(to) % sizeof(T) != 0) {
    fail("a vector store must be aligned to its size", to);
  }
  std::memcpy(to, &value, sizeof(T));
}
}  // namespace detail

SLA2_DEVICE Words4 load_16(const void* from) { return detail::load_vector<Words4>(from); }
SLA2_DEVICE Words2 load_8(const void* from) { return detail::load_vector<Words2>(from); }
SLA2_DEVICE std::uint32_t load_4(const void* from) {
  return detail::load_vector<std::uint32_t>(from);
}
SLA2_DEVICE void store_16(void* to, const Words4& v) { detail::store_vector(to, v); }
SLA2_DEVICE void store_8(void* to, const Words2& v) { detail::store_vector(to, v); }
SLA2_DEVICE void store_4(void* to, std::uint32_t v) { detail::store_vector(to, v); }

SLA2_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  issue_copy(shared, global, valid);
}
SLA2_DEVICE void copy_async_commit() { commit_copies(); }
template <int kPending>
SLA2_DEVICE void copy_async_wait() {
  wait_copies(kPending);
}

// Matrices, in emulator_matrix.cpp.
void ldmatrix_x4(std::uint32_t (&r)[4], const void* row);
void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* row);
void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
void mma_f16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
void mma_s8_s8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
               std::uint32_t b1);
void mma_u8_s8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
               std::uint32_t b1);
void mma_e4m3(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);

std::uint8_t to_e4m3(float x);  // saturating; NaN stays NaN
float e4m3_to_float(std::uint32_t bits);

SLA2_DEVICE std::uint32_t pack_bf16(float low, float high) {
  return to_bf16(low) | static_cast<std::uint32_t>(to_bf16(high)) << 16;
}
SLA2_DEVICE std::uint32_t pack_f16(float low, float high) {
  return to_fp16(low) | static_cast<std::uint32_t>(to_fp16(high)) << 16;
}
SLA2_DEVICE std::uint32_t pack_e4m3(float low, float high) {
  return to_e4m3(low) | static_cast<std::uint32_t>(to_e4m3(high)) << 8;
}
SLA2_DEVICE float to_float(float x) { return x; }
SLA2_DEVICE float to_float(Bf16 x) { return from_bf16(x.bits); }
SLA2_DEVICE float to_float(F16 x) { return from_fp16(x.bits); }
template <typename T>
SLA2_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return {to_bf16(x)};
  } else {
    return {to_fp16(x)};
  }
}
SLA2_DEVICE float bits_to_float(std::uint32_t bits) { return std::bit_cast<float>(bits); }
SLA2_DEVICE std::uint32_t float_to_bits(float x) { return std::bit_cast<std::uint32_t>(x); }
SLA2_DEVICE std::uint32_t pack_low_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                         std::uint32_t d) {
  return (a & 0xffU) | (b & 0xffU) << 8 | (c & 0xffU) << 16 | d << 24;
}
/// Saturates as the GPU does; NaN is 0.
SLA2_DEVICE int round_to_int(float x) {
  if (std::isnan(x)) return 0;
  if (x >= 0x1p31F) return std::numeric_limits<int>::max();
  if (x <= -0x1p31F) return std::numeric_limits<int>::min();
  return static_cast<int>(std::nearbyint(x));
}

SLA2_DEVICE float fast_exp2(float x) {
  const float r = std::exp2(x);
  return r < 0x1p-126F ? 0.0F : r;
}
SLA2_DEVICE float exact_exp(float x) { return std::exp(x); }
SLA2_DEVICE float exact_log(float x) { return std::log(x); }
SLA2_DEVICE float exact_log1p(float x) { return std::log1p(x); }
SLA2_DEVICE double exact_exp(double x) { return std::exp(x); }
SLA2_DEVICE double exact_log(double x) { return std::log(x); }
SLA2_DEVICE float exact_expm1(float x) { return std::expm1(x); }
SLA2_DEVICE float fused(float x, float y, float z) { return std::fma(x, y, z); }
SLA2_DEVICE float mul_rounded(float x, float y) { return x * y; }
SLA2_DEVICE float add_rounded(float x, float y) { return x + y; }
/// As on the GPU, NaN loses against a number.
SLA2_DEVICE float max_of(float x, float y) { return std::fmax(x, y); }
SLA2_DEVICE float min_of(float x, float y) { return std::fmin(x, y); }
SLA2_DEVICE float abs_of(float x) { return std::fabs(x); }
SLA2_DEVICE float max_or_nan(float x, float y) { return x != x || x > y ? x : y; }
SLA2_DEVICE float min_or_nan(float x, float y) { return x != x || x < y ? x : y; }
SLA2_DEVICE bool is_nan(float x) { return x != x; }

/// Runs the whole grid before it returns.
template <typename Args>
void launch(void*, void (*kernel)(Args), Grid grid, int threads, std::size_t shared_bytes,
            const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args>);
  static_assert(sizeof(Args) <= 4096, "kernel arguments must fit 4 KiB");
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  const auto run = [](const Launch& of) {
    reinterpret_cast<void (*)(Args)>(of.kernel)(*static_cast<const Args*>(of.args));
  };
  run_grid({run, reinterpret_cast<void (*)()>(kernel), &args}, grid, threads, shared_bytes);
}

inline DeviceInfo device_info() { return emulator().device; }

}  // namespace sla2::emulated

// The few primitives that the kernels are written in. Kernels use nothing else of CUDA, so the same
// sources also compile with a plain C++ compiler against emulator.h, which gives the same names and
// runs every thread of a block as a fiber.
//
// A kernel is `SLA2_KERNEL(threads, blocks_per_multiprocessor) void name(Args args)`, Args
// trivially copyable; blocks are one-dimensional, a multiple of 32 threads. Warp collectives
// (shuffles, ballot, ldmatrix, mma, warp_barrier) are called by all 32 lanes. Shared memory comes
// from shared_memory<T>(byte offset) alone. Fragment layouts are PTX's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(SLA2_EMULATE)
#define SLA2_CUDA_ROOM emulated
#else
#define SLA2_CUDA_ROOM cuda
#endif

namespace sla2::SLA2_CUDA_ROOM {

/// Blocks of a launch. y and z at most 65535.
struct Grid {
  std::int64_t x = 1;
  std::int64_t y = 1;
  std::int64_t z = 1;
};

/// 16 and 8 bytes, moved at once.
struct alignas(16) Words4 {
  std::uint32_t x[4];
};
struct alignas(8) Words2 {
  std::uint32_t x[2];
};

/// 16-bit floats, as bits.
struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

/// What the host asks about the current device.
struct DeviceInfo {
  int major = 0;  // compute capability
  int minor = 0;
  int multiprocessors = 0;
  std::size_t shared_bytes = 0;  // the most that one block may use
};

}  // namespace sla2::SLA2_CUDA_ROOM

#if defined(SLA2_EMULATE)
#include "emulator.h"
#else

#include <cstring>
#include <cuda_runtime.h>
#include <string>

#include "sla2/error.h"

#define SLA2_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define SLA2_DEVICE __device__ __forceinline__
#define SLA2_HOST_DEVICE __host__ __device__ __forceinline__
#define SLA2_UNROLL _Pragma("unroll")
#define SLA2_NO_UNROLL _Pragma("unroll 1")

namespace sla2::cuda {

// Where a thread is.
SLA2_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
/// The same, read anew: what is computed from it is computed again, not kept in a register.
SLA2_DEVICE int fresh_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
SLA2_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31u); }
SLA2_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
SLA2_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
SLA2_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
SLA2_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
SLA2_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
SLA2_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
SLA2_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }

SLA2_DEVICE void block_barrier() { __syncthreads(); }
SLA2_DEVICE void warp_barrier() { __syncwarp(); }

/// True in every thread of the block if `value` is in any; a barrier too.
SLA2_DEVICE bool block_any(bool value) { return __syncthreads_or(value ? 1 : 0) != 0; }
/// In how many threads of the block `value` is true; a barrier too.
SLA2_DEVICE int block_count(bool value) { return __syncthreads_count(value ? 1 : 0); }

/// T: float, double, int or unsigned.
template <typename T>
SLA2_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
template <typename T>
SLA2_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
SLA2_DEVICE std::uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
SLA2_DEVICE int count_bits(std::uint32_t value) { return __popc(value); }

template <typename T>
SLA2_DEVICE T* shared_memory(std::size_t byte_offset) {
  extern __shared__ __align__(128) unsigned char sla2_shared_bytes[];
  return reinterpret_cast<T*>(sla2_shared_bytes + byte_offset);
}

// Vector loads and stores, global or shared; the address is aligned to the size moved.
SLA2_DEVICE Words4 load_16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
SLA2_DEVICE Words2 load_8(const void* from) {
  const uint2 v = *static_cast<const uint2*>(from);
  return {{v.x, v.y}};
}
SLA2_DEVICE std::uint32_t load_4(const void* from) {
  return *static_cast<const std::uint32_t*>(from);
}
SLA2_DEVICE void store_16(void* to, const Words4& v) {
  *static_cast<uint4*>(to) = make_uint4(v.x[0], v.x[1], v.x[2], v.x[3]);
}
SLA2_DEVICE void store_8(void* to, const Words2& v) {
  *static_cast<uint2*>(to) = make_uint2(v.x[0], v.x[1]);
}
SLA2_DEVICE void store_4(void* to, std::uint32_t v) { *static_cast<std::uint32_t*>(to) = v; }

SLA2_DEVICE std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// 16 bytes global -> shared, both aligned to 16; zeros are written, and nothing is read, unless
/// `valid`. Complete after copy_async_wait and a barrier.
SLA2_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}
SLA2_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
SLA2_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

/// Four 8x8 matrices of 16 bits; lane l gives the address of row l % 8 of matrix l / 8.
SLA2_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
SLA2_DEVICE void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a * b. a: 16 x k row-major fragments, b: k x 8 column-major fragments.
/// m16n8k16 in bf16.
SLA2_DEVICE void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                          std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// m16n8k16 in fp16.
SLA2_DEVICE void mma_f16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                         std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// m16n8k32, s8 x s8 -> s32.
SLA2_DEVICE void mma_s8_s8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                           std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// m16n8k32, u8 x s8 -> s32.
SLA2_DEVICE void mma_u8_s8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                           std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// e4m3 exists from compute capability 8.9 on; the host refuses fp8 below it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define SLA2_HAS_E4M3 1
#else
#define SLA2_HAS_E4M3 0
#endif

/// m16n8k32, e4m3 x e4m3 -> fp32.
SLA2_DEVICE void mma_e4m3(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                          std::uint32_t b1) {
#if SLA2_HAS_E4M3
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  (void)c, (void)a, (void)b0, (void)b1;
  __trap();
#endif
}

// Conversions: round half to even; e4m3 saturates at +-448. The low half holds `low`.
SLA2_DEVICE std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
SLA2_DEVICE std::uint32_t pack_f16(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
/// Two e4m3 in the low 16 bits.
SLA2_DEVICE std::uint32_t pack_e4m3(float low, float high) {
#if SLA2_HAS_E4M3
  std::uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(r) : "f"(high), "f"(low));
  return r;
#else
  (void)low, (void)high;
  __trap();
  return 0;
#endif
}
/// The value of the e4m3 in the low 8 bits.
SLA2_DEVICE float e4m3_to_float(std::uint32_t bits) {
#if SLA2_HAS_E4M3
  std::uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(halves) : "h"(static_cast<std::uint16_t>(bits)));
  float r;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(r) : "h"(static_cast<std::uint16_t>(halves & 0xffffu)));
  return r;
#else
  (void)bits;
  __trap();
  return 0.0f;
#endif
}
SLA2_DEVICE float to_float(float x) { return x; }
SLA2_DEVICE float to_float(Bf16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
SLA2_DEVICE float to_float(F16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(r) : "h"(x.bits));
  return r;
}
template <typename T>
SLA2_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return {static_cast<std::uint16_t>(pack_bf16(x, 0.0f) & 0xffffu)};
  } else {
    return {static_cast<std::uint16_t>(pack_f16(x, 0.0f) & 0xffffu)};
  }
}
SLA2_DEVICE float bits_to_float(std::uint32_t bits) { return __uint_as_float(bits); }
SLA2_DEVICE std::uint32_t float_to_bits(float x) { return __float_as_uint(x); }
/// The low bytes of four words, a's lowest.
SLA2_DEVICE std::uint32_t pack_low_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                         std::uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
/// Nearest integer, half to even.
SLA2_DEVICE int round_to_int(float x) { return __float2int_rn(x); }

// Elementary functions. fast_exp2: relative error about 2^-22, results under 2^-126 are 0.
SLA2_DEVICE float fast_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
  return r;
}
SLA2_DEVICE float exact_exp(float x) { return expf(x); }
SLA2_DEVICE float exact_log(float x) { return logf(x); }
SLA2_DEVICE float exact_log1p(float x) { return log1pf(x); }
SLA2_DEVICE double exact_exp(double x) { return exp(x); }
SLA2_DEVICE double exact_log(double x) { return log(x); }
SLA2_DEVICE float exact_expm1(float x) { return expm1f(x); }
/// x * y + z in one rounding.
SLA2_DEVICE float fused(float x, float y, float z) { return __fmaf_rn(x, y, z); }
/// x * y and x + y rounded on their own, never fused (the integers of quantisation need it).
SLA2_DEVICE float mul_rounded(float x, float y) { return __fmul_rn(x, y); }
SLA2_DEVICE float add_rounded(float x, float y) { return __fadd_rn(x, y); }
SLA2_DEVICE float max_of(float x, float y) { return fmaxf(x, y); }
SLA2_DEVICE float min_of(float x, float y) { return fminf(x, y); }
SLA2_DEVICE float abs_of(float x) { return fabsf(x); }
/// The larger or the smaller one, NaN if either is.
SLA2_DEVICE float max_or_nan(float x, float y) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(r) : "f"(x), "f"(y));
  return r;
}
SLA2_DEVICE float min_or_nan(float x, float y) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;\n" : "=f"(r) : "f"(x), "f"(y));
  return r;
}
SLA2_DEVICE bool is_nan(float x) { return x != x; }

/// Throws sla2::Error naming `what` and CUDA's own message.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorKind::kRuntime, std::string("CUDA: ") + what + ": " + cudaGetErrorName(status) +
                                       " (" + cudaGetErrorString(status) + ")");
}

/// Starts `kernel` on `stream` (a cudaStream_t). Asynchronous; may be captured in a graph.
template <typename Args>
void launch(void* stream, void (*kernel)(Args), Grid grid, int threads, std::size_t shared_bytes,
            const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args>);
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "shared memory of a kernel");
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
  // clang-format off
  kernel<<<blocks, static_cast<unsigned>(threads), shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(args);
  // clang-format on
  check(cudaGetLastError(), "launch of a kernel");
}

/// The current device; throws sla2::Error where there is none.
inline DeviceInfo device_info() {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
    return value;
  };
  DeviceInfo info;
  info.major = attribute(cudaDevAttrComputeCapabilityMajor);
  info.minor = attribute(cudaDevAttrComputeCapabilityMinor);
  info.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  info.shared_bytes = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  return info;
}

}  // namespace sla2::cuda

#endif

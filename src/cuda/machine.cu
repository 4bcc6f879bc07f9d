// The GPU as the self-test sees it; emulated, the memory is the host's.
#include <cstddef>
#include <cstring>
#include <new>
#include <string>

#include "cuda/device.cuh"
#include "cuda/machine.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

#if defined(SLA2_EMULATE)

constexpr std::align_val_t kAlignment{256};

std::string name() { return "emulated threads"; }
std::string driver() { return "none"; }
void* allocate(std::size_t bytes) { return ::operator new(bytes, kAlignment); }
void release(void* block) { ::operator delete(block, kAlignment); }
void upload(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
void download(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

#else

std::string name() {
  int device = 0;
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "current device");
  check(cudaGetDeviceProperties(&properties, device), "properties of the device");
  return std::string(properties.name) + " (compute capability " + std::to_string(properties.major) +
         "." + std::to_string(properties.minor) + ")";
}
/// CUDA versions of the driver and of this build's runtime.
std::string driver() {
  int driver = 0;
  int runtime = 0;
  check(cudaDriverGetVersion(&driver), "version of the driver");
  check(cudaRuntimeGetVersion(&runtime), "version of the runtime");
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  return "CUDA " + text(driver) + ", runtime " + text(runtime);
}
void* allocate(std::size_t bytes) {
  void* block = nullptr;
  check(cudaMalloc(&block, bytes), "memory of the self-test");
  return block;
}
void release(void* block) { static_cast<void>(cudaFree(block)); }
void upload(void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the GPU");
}
void download(void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the GPU");
}

#endif

}  // namespace

const Machine kMachine = {name, driver, allocate, release, upload, download};

}  // namespace sla2::SLA2_CUDA_ROOM

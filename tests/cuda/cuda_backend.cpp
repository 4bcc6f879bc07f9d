#include <cstdint>
#include <cuda_runtime_api.h>
#include <string>

#include "core/message.h"
#include "cuda/backend.h"
#include "cuda/cuda.h"

namespace sla2::test {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw Error(ErrorKind::kRuntime, message(what, ": ", cudaGetErrorString(status)));
  }
}

class DeviceMemory final : public Memory {
 public:
  void* take(std::size_t bytes) override {
    void* block = nullptr;
    check(cudaMalloc(&block, bytes), "cudaMalloc");
    return block;
  }
  void give_back(void* block) override { static_cast<void>(cudaFree(block)); }
  void upload(void* block, const void* host, std::size_t bytes) override {
    check(cudaMemcpy(block, host, bytes, cudaMemcpyHostToDevice), "copy to the GPU");
  }
  void download(void* host, const void* block, std::size_t bytes) override {
    check(cudaMemcpy(host, block, bytes, cudaMemcpyDeviceToHost), "copy from the GPU");
  }
};

}  // namespace

const Backend& backend() {
  static DeviceMemory memory;
  static const Backend cuda_backend{cuda::kImplementation, memory, false};
  return cuda_backend;
}

std::string machine_lacks() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return {};
  return message("no GPU: ", cudaGetErrorString(status));
}

void permute_threads(std::uint64_t) {}
std::int64_t launches_since() { return -1; }
std::int64_t bank_conflicts_since() { return -1; }

}  // namespace sla2::test

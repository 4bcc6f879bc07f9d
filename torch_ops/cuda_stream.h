// The stream that torch's caller is on. The stable ABI names streams by id alone; the call that
// gives the CUDA handle lives in libtorch_cuda, which is not linked: CPU users never load it.
#pragma once

#include <cstdint>
#include <dlfcn.h>

#include "sla2/error.h"

namespace sla2::torch_ops {

/// The current cudaStream_t of a device. Called with a CUDA tensor at hand, so torch has its CUDA
/// library in the process.
inline void* current_cuda_stream(std::int32_t device) {
  using Get = std::int32_t (*)(std::int32_t, void**);
  static const Get get = []() -> Get {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0) {
    throw Error(ErrorKind::kRuntime,
                "torch's current CUDA stream is not to be had: libtorch_cuda.so "
                "is not loaded, or lacks aoti_torch_get_current_cuda_stream");
  }
  return stream;
}

}  // namespace sla2::torch_ops

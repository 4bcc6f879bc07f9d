#include "video/device.h"

#include <dlfcn.h>
#include <filesystem>
#include <mutex>

#include <ATen/autocast_mode.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "sla2/error.h"

namespace sla2::video {

namespace {

// Must run before anything asks torch about CUDA: torch remembers the first answer. Returns why
// not.
const std::string& open_cuda_library() {
  static std::once_flag once;
  static std::string reason;
  std::call_once(once, [] {
    Dl_info info{};
    std::filesystem::path library = "libtorch_cuda.so";
    // The library beside the libtorch_cpu that this program runs with.
    void* symbol = dlsym(RTLD_DEFAULT, "aoti_torch_device_type_cpu");
    if (symbol != nullptr && dladdr(symbol, &info) != 0 && info.dli_fname != nullptr) {
      library = std::filesystem::path(info.dli_fname).parent_path() / library;
    }
    if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      const char* error = dlerror();
      reason = error != nullptr ? error : "libtorch_cuda.so cannot be opened";
    }
  });
  return reason;
}

std::string why_no_gpu() {
  const std::string& reason = open_cuda_library();
  if (!reason.empty()) return reason;
  if (torch::cuda::device_count() == 0) return "torch finds no NVIDIA GPU or driver";
  return {};
}

}  // namespace

std::optional<GpuInfo> find_gpu() {
  if (!why_no_gpu().empty()) return std::nullopt;
  GpuInfo info;
  info.count = static_cast<std::int64_t>(torch::cuda::device_count());
  // The driver's own library answers by C functions; torch's C++ headers for this need a toolkit.
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr) return info;
  using GetName = int (*)(char*, int, int);
  using GetMemory = int (*)(std::size_t*, int);
  char name[256] = {};
  std::size_t bytes = 0;
  if (auto get = reinterpret_cast<GetName>(dlsym(driver, "cuDeviceGetName"))) {
    if (get(name, sizeof name, 0) == 0) info.name = name;
  }
  if (auto get = reinterpret_cast<GetMemory>(dlsym(driver, "cuDeviceTotalMem_v2"))) {
    if (get(&bytes, 0) == 0) info.memory_bytes = static_cast<std::int64_t>(bytes);
  }
  return info;
}

torch::Device open_device(const std::string& name) {
  if (name == "cpu") return torch::kCPU;
  torch::Device device(torch::kCUDA, 0);
  if (name != "auto" && name != "cuda") {
    try {
      device = torch::Device(name);
    } catch (const c10::Error&) {
      device = torch::kCPU;
    }
    if (!device.is_cuda()) {
      throw Error("device must be auto, cpu, cuda or cuda:N, got \"" + name + "\"");
    }
  }
  const std::string reason = why_no_gpu();
  if (!reason.empty()) {
    if (name == "auto") return torch::kCPU;
    throw Error(ErrorKind::kUnsupported, "device " + name + " is not usable: " + reason);
  }
  const auto count = static_cast<std::int64_t>(torch::cuda::device_count());
  if (device.index() >= count) {
    throw Error("device must name one of " + std::to_string(count) + " GPU(s), got \"" + name +
                "\"");
  }
  at::globalContext().setAllowTF32CuBLAS(true);
  at::globalContext().setAllowTF32CuDNN(true);
  return device;
}

void synchronize(const torch::Device& device) {
  if (device.is_cuda()) torch::cuda::synchronize(device.index());
}

Autocast::Autocast(const torch::Device& device, bool on) : active_(on && device.is_cuda()) {
  if (!active_) return;
  previous_enabled_ = at::autocast::is_autocast_enabled(at::kCUDA);
  previous_dtype_ = at::autocast::get_autocast_dtype(at::kCUDA);
  at::autocast::set_autocast_enabled(at::kCUDA, true);
  at::autocast::set_autocast_dtype(at::kCUDA, at::kBFloat16);
  at::autocast::increment_nesting();
}

Autocast::~Autocast() {
  if (!active_) return;
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCUDA, previous_enabled_);
  at::autocast::set_autocast_dtype(at::kCUDA, previous_dtype_);
}

}  // namespace sla2::video

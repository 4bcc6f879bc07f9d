// Which device a job runs on. libtorch_cuda is opened here, and only when a GPU is asked for.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <torch/torch.h>

namespace sla2::video {

struct GpuInfo {
  std::string name;
  std::int64_t memory_bytes = 0;
  std::int64_t count = 0;
};

/// The first GPU, or nothing: no driver, no CUDA build of torch. Opens libtorch_cuda.
std::optional<GpuInfo> find_gpu();

/// "cpu", "cuda", "cuda:1", or "auto": cuda where there is one. TF32 products are switched on for a
/// GPU. Throws sla2::Error (kUnsupported) if the device is not there.
torch::Device open_device(const std::string& name);

/// Waits until the device has done everything queued (nothing to do on the CPU).
void synchronize(const torch::Device& device);

/// bf16 autocast on a GPU while it lives; does nothing on the CPU or when `on` is false.
class Autocast {
 public:
  Autocast(const torch::Device& device, bool on);
  ~Autocast();
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  bool active_ = false;
  bool previous_enabled_ = false;
  at::ScalarType previous_dtype_ = at::kBFloat16;
};

}  // namespace sla2::video

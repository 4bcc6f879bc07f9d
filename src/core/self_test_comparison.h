// One case of the self-test: its arrays on the host and on the machine, the reference's results in
// the first, the machine's compared with those.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "sla2/implementation.h"

namespace sla2 {

/// Relative L2 errors that no right kernel comes near; a wrong one is off by tens of percent.
struct Bounds {
  double forward, backward;
  double parameters = 0.15;  // gradients that are small differences of large sums
};

enum class Router : std::uint8_t {
  kGiven,  // the reference's routing is given; parameters are at their start: the other stages
           // alone
  kOwn,    // learned parameters, and scores far from ties: every stage and every gradient
};

struct Case {
  const char* name;
  Precision precision;
  DType dtype;
  RoutingMode routing;
  std::int64_t head_dim;
  Bounds bounds;
  Router router = Router::kGiven;
  Method method = Method::kSla2;
  std::int64_t value_dim = 0;     // 0: head_dim
  std::int64_t num_kv_heads = 2;  // of 2; 1: grouped
  bool transposed = false;        // memory [B, N, H, D], and a batch of two with key lengths
};

/// Bytes on the host and, once asked for, a copy on the machine.
class Buffer {
 public:
  Buffer(const Machine& machine, std::size_t bytes) : machine_(machine), host_(bytes) {}
  ~Buffer() {
    if (device_ != nullptr) machine_.release(device_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  /// Null if it is empty: not part of the case.
  template <typename T>
  [[nodiscard]] T* host() {
    return host_.empty() ? nullptr : reinterpret_cast<T*>(host_.data());
  }
  template <typename T>
  [[nodiscard]] T* device() {
    if (host_.empty()) return nullptr;
    if (device_ == nullptr) {
      device_ = machine_.allocate(host_.size());
      machine_.upload(device_, host_.data(), host_.size());
    }
    return static_cast<T*>(device_);
  }
  template <typename T>
  [[nodiscard]] T* at(bool on_device) {
    return on_device ? device<T>() : host<T>();
  }
  /// Makes the copy on the machine NaN: what is not written shows.
  void poison();
  [[nodiscard]] std::vector<std::byte> download();
  [[nodiscard]] const std::vector<std::byte>& bytes() const { return host_; }

 private:
  const Machine& machine_;
  std::vector<std::byte> host_;
  void* device_ = nullptr;
};

/// A buffer that is seen as a tensor.
struct TensorBuffer : Buffer {
  TensorBuffer(const Machine& machine, DType type, std::array<std::int64_t, 4> sizes,
               bool transposed);
  [[nodiscard]] View view(bool on_device);

  DType dtype;
  std::array<std::int64_t, 4> shape;    // [B, H, N, D]
  std::array<std::int64_t, 4> strides;  // of memory [B, H, N, D], or [B, N, H, D] if transposed
};

class Comparison {
 public:
  Comparison(const Implementation& implementation, const Case& test);
  /// How many passes ran. Throws sla2::Error (kRuntime) naming pass, case and result if one is
  /// wrong.
  int run();

 private:
  void fill();
  void set(TensorBuffer& tensor, double shared, const std::vector<double>& by_block);
  [[nodiscard]] Inputs inputs(bool on_device);
  [[nodiscard]] Outputs outputs(bool on_device);
  [[nodiscard]] Saved saved(bool on_device);
  [[nodiscard]] Gradients gradients(bool on_device);
  void run_forward(const Problem& problem, const Context& context);
  void run_backward(const Problem& problem, const Context& context);
  void compare(const char* pass, const char* what, Buffer& buffer, DType dtype, double bound);
  void compare_blocks();
  [[noreturn]] void fail(const char* pass, const char* what, double bound, double error) const;

  const Implementation& implementation_;
  const Machine& machine_;
  const Case& test_;
  Problem problem_;
  std::mt19937_64 generator_{1};
  TensorBuffer q_, k_, v_, d_out_, out_, out_sparse_, out_linear_, d_q_, d_k_, d_v_;
  Buffer lengths_, lse_, k_mean_, blocks_, logits_;
  Buffer proj_q_, proj_k_, alpha_logit_, proj_out_;
  Buffer d_proj_q_, d_proj_k_, d_alpha_logit_, d_proj_out_;
};

}  // namespace sla2

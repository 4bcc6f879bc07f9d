// One call of problems.h on a backend: every array is copied, sentinels included, to memory of the
// backend, the kernels run there in a workspace full of NaN, and everything is copied back.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"
#include "cuda/backend.h"

namespace sla2::test {

/// Copies of host arrays on a backend, for as long as it lives.
class Mirror {
 public:
  explicit Mirror(Memory& memory) : memory_(memory) {}
  ~Mirror() {
    for (const Block& block : blocks_) memory_.give_back(block.device);
  }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  /// The place of `pointer`, which points into `storage` or is null.
  template <typename T>
  T* map(T* pointer, std::span<std::byte> storage) {
    if (pointer == nullptr) return nullptr;
    const auto found = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& block) {
      return block.host.data() == storage.data();
    });
    std::byte* device = found == blocks_.end() ? nullptr : found->device;
    if (device == nullptr) {
      device = static_cast<std::byte*>(memory_.take(storage.size()));
      blocks_.push_back({storage, device});
      memory_.upload(device, storage.data(), storage.size());
    }
    const auto offset = reinterpret_cast<const std::byte*>(pointer) - storage.data();
    return reinterpret_cast<T*>(device + offset);
  }
  template <typename T>
  const T* map(const std::vector<T>& values) {
    if (values.empty()) return nullptr;
    auto* data = const_cast<T*>(values.data());
    return map(data, std::as_writable_bytes(std::span(data, values.size())));
  }
  View map(Tensor& tensor) {
    View view = tensor.view();
    view.data = map(view.data, tensor.storage());
    return view;
  }
  template <typename T>
  T* map(Array<T>& array) {
    return map(array.data(), array.storage());
  }
  void download() {
    for (const Block& block : blocks_) {
      memory_.download(block.host.data(), block.device, block.host.size());
    }
  }

 private:
  struct Block {
    std::span<std::byte> host;
    std::byte* device;
  };
  Memory& memory_;
  std::vector<Block> blocks_;
};

/// A workspace of NaN with sentinels on either side.
class Scratch {
 public:
  Scratch(Memory& memory, std::size_t bytes) : memory_(memory), bytes_(bytes) {
    const std::vector<std::byte> poison(bytes + 2 * kGuard, std::byte{0xFF});
    data_ = static_cast<std::byte*>(memory.take(poison.size()));
    memory.upload(data_, poison.data(), poison.size());
  }
  ~Scratch() { memory_.give_back(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  [[nodiscard]] std::span<std::byte> span() const { return {data_ + kGuard, bytes_}; }
  void expect_intact() const {
    for (const std::byte* const guard : {data_, data_ + kGuard + bytes_}) {
      std::vector<std::byte> copy(kGuard);
      memory_.download(copy.data(), guard, kGuard);
      EXPECT_TRUE(
          std::all_of(copy.begin(), copy.end(), [](std::byte x) { return x == std::byte{0xFF}; }))
          << "written " << (guard == data_ ? "before" : "behind") << " the workspace";
    }
  }

 private:
  static constexpr std::size_t kGuard = 256;
  Memory& memory_;
  std::size_t bytes_;
  std::byte* data_;
};

class DeviceCall {
 public:
  explicit DeviceCall(Call& call) : call_(call), mirror_(backend().memory) {}

  /// `given`: route by what the call's blocks or logits hold, and leave them.
  void forward(bool given = false) {
    Inputs in = inputs();
    Outputs to = outputs();
    if (given) {
      in.routing = saved().routing;
      to.routing = {};
    }
    run(Pass::kForward, [&](const Context& context) {
      backend().implementation.forward(call_.problem, in, to, context);
    });
  }
  void route() {
    const Inputs in = inputs();
    run(Pass::kRoute, [&](const Context& context) {
      backend().implementation.route(call_.problem, in, outputs().routing, context);
    });
  }
  void backward(bool given = false) {
    Inputs in = inputs();
    if (given) in.routing = saved().routing;
    run(Pass::kBackward, [&](const Context& context) {
      backend().implementation.backward(call_.problem, in, saved(), d_out(), gradients(), context);
    });
  }

  [[nodiscard]] Outputs outputs() {
    return {mirror_.map(call_.out),        mirror_.map(call_.out_sparse),
            mirror_.map(call_.out_linear), mirror_.map(call_.lse),
            mirror_.map(call_.k_mean),     {mirror_.map(call_.blocks), mirror_.map(call_.logits)}};
  }
  [[nodiscard]] Saved saved() {
    return {as_const(mirror_.map(call_.out_sparse)),
            as_const(mirror_.map(call_.out_linear)),
            mirror_.map(call_.lse),
            mirror_.map(call_.k_mean),
            {mirror_.map(call_.blocks), mirror_.map(call_.logits)}};
  }
  [[nodiscard]] ConstView d_out() { return as_const(mirror_.map(call_.d_out)); }
  [[nodiscard]] Gradients gradients() {
    return {mirror_.map(call_.d_q),       mirror_.map(call_.d_k),
            mirror_.map(call_.d_v),       mirror_.map(call_.d_alpha_logit),
            mirror_.map(call_.d_proj_q),  mirror_.map(call_.d_proj_k),
            mirror_.map(call_.d_proj_out)};
  }
  [[nodiscard]] Mirror& mirror() { return mirror_; }
  /// Context::after_stage of the calls that follow.
  const std::function<void(const char*)>* after_stage = nullptr;
  [[nodiscard]] Inputs inputs() {
    Inputs in;
    in.q = as_const(mirror_.map(call_.q));
    in.k = as_const(mirror_.map(call_.k));
    in.v = as_const(mirror_.map(call_.v));
    in.parameters = {mirror_.map(call_.proj_q), mirror_.map(call_.proj_k),
                     mirror_.map(call_.alpha_logit), mirror_.map(call_.proj_out)};
    in.key_lengths = mirror_.map(call_.key_lengths);
    return in;
  }

 private:
  template <typename Body>
  void run(Pass pass, Body body) {
    SerialExecutor serial;
    const std::size_t bytes =
        backend().implementation.workspace_bytes(call_.problem, pass, serial.num_threads());
    const Scratch scratch(backend().memory, bytes);
    body(Context{serial, scratch.span(), nullptr, after_stage});
    mirror_.download();
    scratch.expect_intact();
  }

  Call& call_;
  Mirror mirror_;
};

}  // namespace sla2::test

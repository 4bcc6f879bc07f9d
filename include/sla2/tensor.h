// Views of tensors that somebody else owns. No allocation, no ownership, no torch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace sla2 {

enum class DType : std::uint8_t { kF32, kBF16, kF16 };
enum class Device : std::uint8_t { kCpu, kCuda };

[[nodiscard]] constexpr std::int64_t bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

/// A rank-4 view [batch, heads, tokens, features]. Strides count elements; the last one is 1,
/// the others are free, so [B, N, H, D].transpose(1, 2) is described without a copy.
template <typename Pointer>
struct BasicView {
  Pointer data = nullptr;
  DType dtype = DType::kF32;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> strides{};

  [[nodiscard]] constexpr bool empty() const { return data == nullptr; }
};

using View = BasicView<void*>;
using ConstView = BasicView<const void*>;

/// A dense row-major view over `data`.
template <typename Pointer>
[[nodiscard]] constexpr BasicView<Pointer> dense_view(Pointer data, DType dtype,
                                                      std::array<std::int64_t, 4> shape) {
  return {data, dtype, shape, {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1}};
}

[[nodiscard]] constexpr ConstView as_const(const View& view) {
  return {view.data, view.dtype, view.shape, view.strides};
}

}  // namespace sla2

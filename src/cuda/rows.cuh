// Elements of strided rows as floats, sums of bf16 terms, lengths: what most kernels share.
#pragma once

#include "cuda/plan.h"

namespace sla2::SLA2_CUDA_ROOM {

inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

SLA2_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
SLA2_DEVICE int max_int(int a, int b) { return a > b ? a : b; }
SLA2_HOST_DEVICE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Keys of batch element b, whatever the caller's table holds.
SLA2_DEVICE int key_length(const Call& c, int b) {
  if (c.key_lengths == nullptr) return c.Nk;
  const std::int64_t length = c.key_lengths[b];
  return length < 1 ? 1 : length > c.Nk ? c.Nk : static_cast<int>(length);
}
SLA2_DEVICE int blocks_of(const Call& c, int length) { return (length + c.bk - 1) / c.bk; }

/// A row of one tensor.
struct Row {
  const void* data;
  std::int64_t at;  // element
  DType dtype;
  bool vectors;
};
SLA2_DEVICE Row row_of(const Rows& r, int b, int h, int n) {
  return {r.data, b * r.batch + h * r.head + n * r.token, r.dtype, r.vectors};
}

SLA2_DEVICE float load_one(const Row& row, int c) {
  const std::int64_t at = row.at + c;
  switch (row.dtype) {
    case DType::kF32:
      return static_cast<const float*>(row.data)[at];
    case DType::kBF16:
      return to_float(static_cast<const Bf16*>(row.data)[at]);
    default:
      return to_float(static_cast<const F16*>(row.data)[at]);
  }
}

/// Both 16-bit numbers of a word.
SLA2_DEVICE void unpack_16(std::uint32_t word, DType dtype, float& low, float& high) {
  if (dtype == DType::kBF16) {
    low = bits_to_float(word << 16);
    high = bits_to_float(word & 0xffff0000u);
  } else {
    low = to_float(F16{static_cast<std::uint16_t>(word & 0xffffu)});
    high = to_float(F16{static_cast<std::uint16_t>(word >> 16)});
  }
}

/// kCount (2 or 4) neighbours; c is a multiple of kCount.
template <int kCount>
SLA2_DEVICE void load_some(const Row& row, int c, float (&x)[kCount]) {
  static_assert(kCount == 2 || kCount == 4);
  const std::int64_t at = row.at + c;
  if (!row.vectors) {
    SLA2_UNROLL for (int i = 0; i < kCount; ++i) x[i] = load_one(row, c + i);
  } else if (row.dtype == DType::kF32) {
    const float* from = static_cast<const float*>(row.data) + at;
    if constexpr (kCount == 4) {
      const Words4 w = load_16(from);
      SLA2_UNROLL for (int i = 0; i < 4; ++i) x[i] = bits_to_float(w.x[i]);
    } else {
      const Words2 w = load_8(from);
      SLA2_UNROLL for (int i = 0; i < 2; ++i) x[i] = bits_to_float(w.x[i]);
    }
  } else {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(row.data) + at;
    if constexpr (kCount == 4) {
      const Words2 w = load_8(from);
      unpack_16(w.x[0], row.dtype, x[0], x[1]);
      unpack_16(w.x[1], row.dtype, x[2], x[3]);
    } else {
      unpack_16(load_4(from), row.dtype, x[0], x[1]);
    }
  }
}

SLA2_DEVICE std::uint32_t pack_16(DType dtype, float low, float high) {
  return dtype == DType::kBF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

/// Writes x0, x1 to the row at c, an even number.
SLA2_DEVICE void store_pair(const Row& row, int c, float x0, float x1) {
  const std::int64_t at = row.at + c;
  void* const data = const_cast<void*>(row.data);
  if (row.dtype == DType::kF32) {
    float* to = static_cast<float*>(data) + at;
    if (row.vectors) {
      store_8(to, {{float_to_bits(x0), float_to_bits(x1)}});
    } else {
      to[0] = x0;
      to[1] = x1;
    }
    return;
  }
  std::uint16_t* to = static_cast<std::uint16_t*>(data) + at;
  const std::uint32_t word = pack_16(row.dtype, x0, x1);
  if (row.vectors) {
    store_4(to, word);
  } else {
    to[0] = static_cast<std::uint16_t>(word & 0xffffu);
    to[1] = static_cast<std::uint16_t>(word >> 16);
  }
}

/// Writes x to the row from c on, a multiple of 4.
SLA2_DEVICE void store_four(const Row& row, int c, const float (&x)[4]) {
  void* const data = const_cast<void*>(row.data);
  const std::int64_t at = row.at + c;
  if (!row.vectors) {
    store_pair(row, c, x[0], x[1]);
    store_pair(row, c + 2, x[2], x[3]);
  } else if (row.dtype == DType::kF32) {
    store_16(static_cast<float*>(data) + at, {{float_to_bits(x[0]), float_to_bits(x[1]),
                                               float_to_bits(x[2]), float_to_bits(x[3])}});
  } else {
    store_8(static_cast<std::uint16_t*>(data) + at,
            {{pack_16(row.dtype, x[0], x[1]), pack_16(row.dtype, x[2], x[3])}});
  }
}

/// A weighted mean of rows of v for a tensor of `dtype`: it fits, its roundings may not. Near
/// fp16's largest a finite mean is held at it; NaN, and Inf from the inputs, stay.
SLA2_DEVICE float held_in_range(DType dtype, float mean) {
  constexpr float kLargest = 65504.0f;
  const float size = abs_of(mean);
  if (dtype != DType::kF16 || !(size > kLargest) || size == kInfinity) return mean;
  return mean > 0 ? kLargest : -kLargest;
}

/// Splits off the next bf16 term of both numbers; they keep the remainder.
SLA2_DEVICE std::uint32_t next_term(float& low, float& high) {
  const std::uint32_t word = pack_bf16(low, high);
  low -= bits_to_float(word << 16);
  high -= bits_to_float(word & 0xffff0000u);
  return word;
}

SLA2_DEVICE float sum_over_warp(float x) {
  SLA2_UNROLL for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
SLA2_DEVICE float max_over_warp(float x) {
  SLA2_UNROLL for (int mask = 16; mask > 0; mask /= 2) x = max_of(x, shuffle_xor(x, mask));
  return x;
}

/// amax -> scale and factor of a group (spec: quantisation). A scale that is not finite is NaN and
/// its integers 0.
SLA2_DEVICE void quantiser(float amax, float limit, float& scale, float& factor) {
  const bool finite = amax < kInfinity;  // false for NaN
  const bool zero = !finite || amax < 1e-30f;
  factor = zero ? 0.0f : limit / amax;
  scale = !finite ? bits_to_float(0x7fc00000u) : zero ? 0.0f : amax / limit;
}
/// phi without a row's normalisation (softmax: exp(x - max), else phi itself).
SLA2_DEVICE float phi_of(FeatureMap map, float x, float max) {
  if (map == FeatureMap::kSoftmax) return exact_exp(x - max);
  if (map == FeatureMap::kElu) return x < 0 ? exact_exp(x) : x + 1;
  return x < 0 ? 0.0f : x;
}

}  // namespace sla2::SLA2_CUDA_ROOM

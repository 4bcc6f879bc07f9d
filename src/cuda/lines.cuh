// A row of features held by one warp: lane l has the four neighbours from channel 4l on, and with
// head size 256 those from 128 + 4l on. phi and the formats of the workspace.
#pragma once

#include "cuda/rows.cuh"

namespace sla2::SLA2_CUDA_ROOM {

SLA2_DEVICE int line_channel(int group) { return group * 128 + lane_index() * 4; }

/// x becomes phi(x), normalised (softmax); 0 behind the features and in rows that do not exist.
template <int kGroups>
SLA2_DEVICE void apply_phi(const Call& c, bool valid, float (&x)[kGroups][4]) {
  const bool softmax = c.feature_map == FeatureMap::kSoftmax;
  float max = 0;
  if (softmax) {
    max = -kInfinity;
    SLA2_UNROLL for (int g = 0; g < kGroups; ++g) {
      if (line_channel(g) >= c.d) continue;
      SLA2_UNROLL for (int e = 0; e < 4; ++e) max = max_of(max, x[g][e]);
    }
    max = max_over_warp(max);
  }
  float sum = 0;
  SLA2_UNROLL for (int g = 0; g < kGroups; ++g) {
    const bool inside = valid && line_channel(g) < c.d;
    SLA2_UNROLL for (int e = 0; e < 4; ++e) {
      x[g][e] = inside ? phi_of(c.feature_map, x[g][e], max) : 0.0f;
      sum += x[g][e];
    }
  }
  if (!softmax) return;
  const float norm = valid ? 1 / sum_over_warp(sum) : (sum_over_warp(sum), 0.0f);
  SLA2_UNROLL for (int g = 0; g < kGroups; ++g) {
    SLA2_UNROLL for (int e = 0; e < 4; ++e) x[g][e] *= norm;
  }
}

/// Four neighbours as `count` bf16 terms, `plane` elements apart.
SLA2_DEVICE void store_line_terms(Bf16* to, std::int64_t plane, int count, const float (&x)[4]) {
  float rest[4] = {x[0], x[1], x[2], x[3]};
  for (int term = 0; term < count; ++term) {
    const std::uint32_t low = next_term(rest[0], rest[1]);
    store_8(to + term * plane, {{low, next_term(rest[2], rest[3])}});
  }
}

/// Four neighbours in a format that is not 8-bit, at element `at`; kF16: times `factor`.
SLA2_DEVICE void store_line(Format format, void* low, std::int64_t plane, std::int64_t at,
                            const float (&x)[4], float factor) {
  if (format == Format::kFp32) {
    store_line_terms(static_cast<Bf16*>(low) + at, plane, 3, x);
  } else if (format == Format::kBf16) {
    store_8(static_cast<Bf16*>(low) + at, {{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])}});
  } else {
    store_8(static_cast<F16*>(low) + at,
            {{pack_f16(x[0] * factor, x[1] * factor), pack_f16(x[2] * factor, x[3] * factor)}});
  }
}

SLA2_DEVICE std::uint32_t quantise_line(const float (&x)[4], float factor) {
  return pack_s8(to_s8(x[0], factor), to_s8(x[1], factor), to_s8(x[2], factor),
                 to_s8(x[3], factor));
}

SLA2_DEVICE bool is_low_bit(const Call& c) {
  return c.format == Format::kInt8 || c.format == Format::kFp8;
}

/// NaN if any lane's is.
SLA2_DEVICE float amax_over_warp(float amax) {
  SLA2_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    amax = larger_or_nan(amax, shuffle_xor(amax, mask));
  }
  return amax;
}

}  // namespace sla2::SLA2_CUDA_ROOM

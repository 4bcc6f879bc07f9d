// Rows of features in the registers of a warp: a lane has eight neighbouring channels, D / 8 lanes
// a row, so that 16-bit rows move 16 bytes a lane. phi, the formats of the workspace, quantisation.
#pragma once

#include "cuda/rows.cuh"

namespace sla2::SLA2_CUDA_ROOM {

inline constexpr int kLine = 8;  // channels of a lane

/// bf16 terms of the linear branch for inputs of type T.
template <typename T>
inline constexpr int kTermsOf = std::is_same_v<T, Bf16>  ? 1
                                : std::is_same_v<T, F16> ? 2
                                                         : 3;

/// Eight channels as they lie in memory.
template <typename T>
struct RawLine {
  Words4 words[sizeof(T) / 2];
};

/// Channels [channel, channel + 8) of a row that starts at `from`; zero unless `valid`.
template <typename T>
SLA2_DEVICE RawLine<T> load_raw(const T* from, bool vectors, bool valid) {
  RawLine<T> raw{};
  if (!valid) return raw;
  if (vectors) {
    SLA2_UNROLL for (unsigned w = 0; w < sizeof(T) / 2; ++w) raw.words[w] = load_16(from + w * 4);
    return raw;
  }
  SLA2_UNROLL for (int i = 0; i < kLine; i += 2) {
    if constexpr (sizeof(T) == 4) {
      raw.words[i / 4].x[i % 4] = float_to_bits(from[i]);
      raw.words[i / 4].x[i % 4 + 1] = float_to_bits(from[i + 1]);
    } else {
      raw.words[0].x[i / 2] = from[i].bits | static_cast<std::uint32_t>(from[i + 1].bits) << 16;
    }
  }
  return raw;
}

template <typename T>
SLA2_DEVICE void unpack_line(const RawLine<T>& raw, float (&x)[kLine]) {
  SLA2_UNROLL for (int i = 0; i < kLine; i += 2) {
    if constexpr (sizeof(T) == 4) {
      x[i] = bits_to_float(raw.words[i / 4].x[i % 4]);
      x[i + 1] = bits_to_float(raw.words[i / 4].x[i % 4 + 1]);
    } else {
      const DType dtype = std::is_same_v<T, Bf16> ? DType::kBF16 : DType::kF16;
      unpack_16(raw.words[0].x[i / 2], dtype, x[i], x[i + 1]);
    }
  }
}

/// kLanes neighbouring lanes share a row.
template <int kLanes>
SLA2_DEVICE float max_over_row(float x) {
  SLA2_UNROLL for (int mask = kLanes / 2; mask > 0; mask /= 2) x = max_of(x, shuffle_xor(x, mask));
  return x;
}
template <int kLanes>
SLA2_DEVICE float sum_over_row(float x) {
  SLA2_UNROLL for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
/// NaN if any lane's is.
template <int kLanes>
SLA2_DEVICE float amax_over_row(float x) {
  SLA2_UNROLL for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    x = max_or_nan(x, shuffle_xor(x, mask));
  }
  return x;
}
SLA2_DEVICE float amax_of_line(float amax, const float (&x)[kLine]) {
  SLA2_UNROLL for (int i = 0; i < kLine; ++i) amax = max_or_nan(amax, abs_of(x[i]));
  return amax;
}

/// x becomes phi(x), of softmax not normalised, or 0 where not `inside`. Returns what a row's
/// phi is to be divided by. kFast: for results that are rounded to bf16, the hardware's
/// exponential.
template <int kLanes, bool kFast>
SLA2_DEVICE float apply_phi_raw(FeatureMap map, bool inside, float (&x)[kLine]) {
  if (map != FeatureMap::kSoftmax) {
    SLA2_UNROLL for (int i = 0; i < kLine; ++i) {
      const float low = min_of(x[i], 0.0f);
      const float e = kFast ? fast_exp2(low * kLog2E) : exact_exp(low);
      const float high = map == FeatureMap::kElu ? x[i] + 1 : x[i];
      const float phi = x[i] < 0 ? (map == FeatureMap::kElu ? e : 0.0f) : high;
      x[i] = inside ? phi : 0.0f;
    }
    return 1;
  }
  float max = -kInfinity;
  SLA2_UNROLL for (int i = 0; i < kLine; ++i) max = max_of(max, x[i]);
  max = max_over_row<kLanes>(inside ? max : -kInfinity);
  float sum = 0;
  SLA2_UNROLL for (int i = 0; i < kLine; ++i) {
    const float e = kFast ? fast_exp2((x[i] - max) * kLog2E) : exact_exp(x[i] - max);
    x[i] = inside ? e : 0.0f;
    sum += x[i];
  }
  return sum_over_row<kLanes>(sum);
}
/// Normalised.
template <int kLanes, bool kFast>
SLA2_DEVICE void apply_phi(FeatureMap map, bool inside, float (&x)[kLine]) {
  const float sum = apply_phi_raw<kLanes, kFast>(map, inside, x);
  if (map != FeatureMap::kSoftmax) return;
  const float norm = inside ? 1 / sum : 0.0f;
  SLA2_UNROLL for (int i = 0; i < kLine; ++i) x[i] *= norm;
}

/// Eight neighbours as kTerms bf16 terms, `plane` elements apart; x is used up.
template <int kTerms>
SLA2_DEVICE void store_line_terms(Bf16* to, std::int64_t plane, float (&x)[kLine]) {
  SLA2_UNROLL for (int term = 0; term < kTerms; ++term) {
    Words4 words;
    SLA2_UNROLL for (int i = 0; i < kLine; i += 2) {
      words.x[i / 2] = term + 1 < kTerms ? next_term(x[i], x[i + 1]) : pack_bf16(x[i], x[i + 1]);
    }
    store_16(to + term * plane, words);
  }
}

/// Eight neighbours in a format that is not 8-bit, at element `at`; kF16: times `factor`.
SLA2_DEVICE void store_line(Format format, void* low, std::int64_t plane, std::int64_t at,
                            const float (&x)[kLine], float factor) {
  if (format == Format::kFp32) {
    float rest[kLine];
    SLA2_UNROLL for (int i = 0; i < kLine; ++i) rest[i] = x[i];
    store_line_terms<3>(static_cast<Bf16*>(low) + at, plane, rest);
    return;
  }
  Words4 words;
  SLA2_UNROLL for (int i = 0; i < kLine; i += 2) {
    words.x[i / 2] = format == Format::kBf16 ? pack_bf16(x[i], x[i + 1])
                                             : pack_f16(x[i] * factor, x[i + 1] * factor);
  }
  store_16(static_cast<Bf16*>(low) + at, words);
}

/// The integers of eight numbers, |x| at most the group's amax, so that 127 is never passed: round
/// half to even of x * factor. Bytes of `mask` that are 0 make 0, whatever x is (factor 0).
SLA2_DEVICE Words2 quantise_line(const float (&x)[kLine], const float (&factor)[kLine],
                                 const Words2& mask) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the low byte of x + kMagic is the integer's
  Words2 words;
  SLA2_UNROLL for (int w = 0; w < 2; ++w) {
    std::uint32_t bits[4];
    SLA2_UNROLL for (int e = 0; e < 4; ++e) {
      const int i = w * 4 + e;
      bits[e] = float_to_bits(add_rounded(mul_rounded(x[i], factor[i]), kMagic));
    }
    words.x[w] = pack_low_bytes(bits[0], bits[1], bits[2], bits[3]) & mask.x[w];
  }
  return words;
}
/// One factor for all.
SLA2_DEVICE Words2 quantise_line(const float (&x)[kLine], float factor) {
  const std::uint32_t mask = factor == 0.0f ? 0u : 0xffffffffu;
  const float factors[kLine] = {factor, factor, factor, factor, factor, factor, factor, factor};
  return quantise_line(x, factors, {{mask, mask}});
}

SLA2_DEVICE bool is_low_bit(const Call& c) {
  return c.format == Format::kInt8 || c.format == Format::kFp8;
}

/// Runs `run` with a value of the type of the inputs and the compiled head size.
template <typename T, typename Run>
void with_head_size(const Call& c, const Run& run) {
  if (c.D == 64) {
    run(T{}, std::integral_constant<int, 64>{});
  } else if (c.D == 128) {
    run(T{}, std::integral_constant<int, 128>{});
  } else {
    run(T{}, std::integral_constant<int, 256>{});
  }
}
template <typename Run>
void with_type_and_size(const Call& c, const Run& run) {
  if (c.dtype == DType::kBF16) {
    with_head_size<Bf16>(c, run);
  } else if (c.dtype == DType::kF16) {
    with_head_size<F16>(c, run);
  } else {
    with_head_size<float>(c, run);
  }
}

}  // namespace sla2::SLA2_CUDA_ROOM

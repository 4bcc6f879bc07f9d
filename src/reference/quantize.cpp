// Section 5: the low-bit formats of q, ks and v, and the roundings of the others.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/stages.h"

namespace sla2::reference {

template <typename Real>
Real round_significand(Real x, int bits) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent = 0;
  const Real fraction = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits);
}
template float round_significand(float, int);
template double round_significand(double, int);

double round_e4m3(double x) {
  if (std::isnan(x)) return x;
  const double magnitude = std::min(std::abs(x), 448.0);
  // Three bits behind the leading one; below 2^-6 the step stays 2^-9.
  const int exponent = magnitude < 0x1p-6 ? -6 : std::ilogb(magnitude);
  const double step = std::ldexp(1.0, exponent - 3);
  return std::copysign(std::nearbyint(magnitude / step) * step, x);
}

int bits_of_16(DType dtype) { return dtype == DType::kF16 ? 11 : 8; }

namespace {

/// One group of values that share a scale, `count` rows of `width` values, `stride` apart.
struct Group {
  std::int64_t count, width, stride;
};

/// Writes value * (limit / amax), rounded by `round`, and returns the scale amax / limit.
template <typename Real, typename Round>
float quantize_group(const Real* x, Group group, float limit, Round round, float* out) {
  float amax = 0;
  for (std::int64_t r = 0; r < group.count; ++r) {
    for (std::int64_t c = 0; c < group.width; ++c) {
      const float magnitude = std::abs(static_cast<float>(x[r * group.stride + c]));
      if (!(magnitude <= amax)) amax = magnitude;  // also takes NaN
      if (std::isnan(amax)) break;
    }
    if (std::isnan(amax)) break;
  }
  const bool finite = std::isfinite(amax);
  const bool zero = !finite || amax < 1e-30F;
  const float factor = zero ? 0.0F : limit / amax;
  for (std::int64_t r = 0; r < group.count; ++r) {
    for (std::int64_t c = 0; c < group.width; ++c) {
      const std::int64_t at = r * group.stride + c;
      out[at] = zero ? 0.0F : round(static_cast<float>(x[at]) * factor);
    }
  }
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  return zero ? 0.0F : amax / limit;
}

float to_s8(float x) { return std::clamp(std::nearbyint(x), -127.0F, 127.0F); }
float to_e4m3(float x) { return static_cast<float>(round_e4m3(x)); }

}  // namespace

template <typename Real>
LowBit low_bit(const Problem& problem, const Operands<Real>& operands,
               const Smoothed<Real>& smoothed, Arithmetic arithmetic) {
  const Sizes sizes(problem);
  const auto [B, H, Hkv, Nq, Nk, d, dv, bq, bk, M, T, L] = sizes;
  LowBit result;
  result.q.resize(B * H * Nq * d);
  result.q_scale.resize(B * H * Nq);
  result.k.resize(B * Hkv * Nk * d);
  result.k_scale.resize(B * Hkv * T);
  result.v.resize(B * Hkv * Nk * dv);
  result.v_scale.resize(B * Hkv * dv);

  for (std::int64_t row = 0; row < B * H * Nq; ++row) {  // one scale per token
    result.q_scale[row] = quantize_group(operands.q.data() + row * d, {1, d, d}, 127.0F, to_s8,
                                         result.q.data() + row * d);
  }
  for (std::int64_t head = 0; head < B * Hkv; ++head) {
    const std::int64_t length = key_length(sizes, operands, head / Hkv);
    for (std::int64_t n = 0; n < length; n += bk) {  // one scale per key block
      const std::int64_t at = (head * Nk + n) * d;
      result.k_scale[head * T + n / bk] =
          quantize_group(smoothed.ks.data() + at, {std::min(bk, length - n), d, d}, 127.0F, to_s8,
                         result.k.data() + at);
    }
    for (std::int64_t c = 0; c < dv; ++c) {  // one scale per channel
      const std::int64_t at = head * Nk * dv + c;
      const Real* v = operands.v.data() + at;
      result.v_scale[head * dv + c] =
          arithmetic == Arithmetic::kFp8
              ? quantize_group(v, {length, 1, dv}, 448.0F, to_e4m3, result.v.data() + at)
              : quantize_group(v, {length, 1, dv}, 127.0F, to_s8, result.v.data() + at);
    }
  }
  return result;
}

template <typename Real>
QuantizedOperands quantize(const Problem& problem, const Operands<Real>& operands) {
  Problem int8 = problem;
  int8.config.precision = Precision::kInt8;
  int8.config.routing = RoutingMode::kHard;
  const LowBit values = low_bit(int8, operands, smooth(int8, operands), Arithmetic::kInt8);
  const auto integers = [](const std::vector<float>& x) {
    std::vector<std::int8_t> out;
    out.reserve(x.size());
    for (const float value : x) out.push_back(static_cast<std::int8_t>(value));
    return out;
  };
  return {integers(values.q), integers(values.k), integers(values.v),
          values.q_scale,     values.k_scale,     values.v_scale};
}

#define SLA2_INSTANTIATE(Real)                                                          \
  template LowBit low_bit(const Problem&, const Operands<Real>&, const Smoothed<Real>&, \
                          Arithmetic);                                                  \
  template QuantizedOperands quantize(const Problem&, const Operands<Real>&);
SLA2_INSTANTIATE(float)
SLA2_INSTANTIATE(double)
#undef SLA2_INSTANTIATE

}  // namespace sla2::reference

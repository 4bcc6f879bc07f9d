// Warp-wide matrix loads and products, in the fragment layouts of PTX: lane 4g + t holds row g.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/device.cuh"

namespace sla2::emulated {
namespace {

struct MatrixRow {
  std::uint32_t* out;
  const void* row;
};

void check_row(const void* row) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
    fail("a matrix row must be aligned to 16", row);
  }
  check_shared(row, 16);
}

template <bool kTransposed>
void load_matrices(void* const* operands) {
  std::uint16_t matrix[4][8][8];
  for (int m = 0; m < 4; ++m) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      const void* row = static_cast<const MatrixRow*>(operands[m * 8 + r])->row;
      std::memcpy(matrix[m][r], row, 16);
      banks |= 1U << reinterpret_cast<std::uintptr_t>(row) / 16 % 8;
    }
    if (banks != 0xff) ++statistics().bank_conflicts;
  }
  ++statistics().matrix_loads;
  for (int lane = 0; lane < 32; ++lane) {
    std::uint32_t* out = static_cast<const MatrixRow*>(operands[lane])->out;
    const int g = lane / 4;
    const int t = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const std::uint32_t low = kTransposed ? matrix[m][t][g] : matrix[m][g][t];
      const std::uint32_t high = kTransposed ? matrix[m][t + 1][g] : matrix[m][g][t + 1];
      out[m] = low | high << 16;
    }
  }
}

template <typename Sum>
struct Product {
  Sum* c;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

using Row = float[8];

/// c plus kCount rows of products as tensor cores add them: aligned to the largest one's exponent,
/// what is more than kBits bits under its leading one cut off, and so is what fp32 does not hold of
/// the sum. Loops over the 8 columns are the inner ones, for the compiler's vectors.
template <int kCount, int kBits>
void add_truncated(Row& c, const Row* products) {
  static_assert(kBits < 31 && kCount < 1 << (30 - kBits));
  constexpr std::uint32_t kField = 0x7f800000;  // of the exponent
  Row largest;
  Row plain;
  for (int n = 0; n < 8; ++n) largest[n] = std::fabs(plain[n] = c[n]);
  for (int k = 0; k < kCount; ++k) {
    for (int n = 0; n < 8; ++n) {
      const float magnitude = std::fabs(products[k][n]);
      largest[n] = largest[n] < magnitude ? magnitude : largest[n];
      plain[n] += products[k][n];
    }
  }
  Row to_units;
  Row unit;
  std::uint32_t usual = 1;  // the scales are floats, and nothing is NaN
  for (int n = 0; n < 8; ++n) {
    const std::uint32_t field = std::bit_cast<std::uint32_t>(largest[n]) & kField;
    usual &= field > 27U << 23 && field < 247U << 23 && plain[n] == plain[n] ? 1U : 0U;
    to_units[n] = std::bit_cast<float>(((254U + kBits) << 23) - field);
    unit[n] = std::bit_cast<float>(field - (static_cast<std::uint32_t>(kBits) << 23));
  }
  if (usual == 0) {
    for (int n = 0; n < 8; ++n) {
      const float x = largest[n];
      if (!(x > 0x1p-99F && x < 0x1p119F && plain[n] == plain[n])) to_units[n] = unit[n] = 0;
    }
  }
  std::int32_t units[8];
  for (int n = 0; n < 8; ++n) units[n] = static_cast<std::int32_t>(c[n] * to_units[n]);
  for (int k = 0; k < kCount; ++k) {
    for (int n = 0; n < 8; ++n) {
      // Unsigned: where something is NaN the sums mean nothing, and may wrap.
      units[n] = static_cast<std::int32_t>(
          static_cast<std::uint32_t>(units[n]) +
          static_cast<std::uint32_t>(static_cast<std::int32_t>(products[k][n] * to_units[n])));
    }
  }
  for (int n = 0; n < 8; ++n) {
    const auto bits = static_cast<std::uint32_t>(units[n]);
    const auto magnitude = static_cast<std::int32_t>(units[n] < 0 ? 0U - bits : bits);
    const auto nearest = static_cast<float>(magnitude);
    const std::uint32_t excess = static_cast<std::int32_t>(nearest) > magnitude ? 1 : 0;
    const float cut = std::bit_cast<float>(std::bit_cast<std::uint32_t>(nearest) - excess);
    c[n] = (units[n] < 0 ? -cut : cut) * unit[n];
  }
  if (usual == 0) {
    for (int n = 0; n < 8; ++n) c[n] = unit[n] == 0 ? plain[n] : c[n];
  }
}

/// c [16, 8] += a [16, K] b [K, 8]; `a_value(word, k)` reads the k-th number in a 32-bit word.
template <typename Sum, int kPerWord, typename ReadA, typename ReadB>
void multiply(void* const* operands, ReadA read_a, ReadB read_b) {
  constexpr int kDepth = 8 * kPerWord;
  Sum a[16][kDepth];
  Sum b[kDepth][8];
  ++statistics().matrix_products;
  for (int lane = 0; lane < 32; ++lane) {
    const auto* one = static_cast<const Product<Sum>*>(operands[lane]);
    const int g = lane / 4;
    const int t = lane % 4 * kPerWord;
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < kPerWord; ++k) {
        const int column = half * 4 * kPerWord + t + k;
        a[g][column] = read_a(one->a[2 * half], k);
        a[g + 8][column] = read_a(one->a[2 * half + 1], k);
        b[column][g] = read_b(one->b[half], k);
      }
    }
  }
  Sum c[16][8];
  const auto each = [&](auto body) {
    for (int lane = 0; lane < 32; ++lane) {
      Sum* out = static_cast<const Product<Sum>*>(operands[lane])->c;
      for (int e = 0; e < 4; ++e) body(out[e], c[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2]);
    }
  };
  each([](const Sum& mine, Sum& all) { all = mine; });
  for (int r = 0; r < 16; ++r) {
    Sum products[kDepth][8];
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < 8; ++n) products[k][n] = a[r][k] * b[k][n];
    }
    if constexpr (std::is_integral_v<Sum>) {
      for (int k = 0; k < kDepth; ++k) {
        for (int n = 0; n < 8; ++n) c[r][n] += products[k][n];
      }
    } else {
      // 8 numbers of 16 bits at a time as on sm_80 (later GPUs round less often), 8 bits at once.
      constexpr int kAtOnce = kPerWord == 2 ? 8 : kDepth;
      for (int k = 0; k < kDepth; k += kAtOnce) {
        add_truncated<kAtOnce, kPerWord == 2 ? 24 : 13>(c[r], products + k);
      }
    }
  }
  each([](Sum& mine, const Sum& all) { mine = all; });
}

float half_of(std::uint32_t word, int k) {
  return from_fp16(static_cast<std::uint16_t>(word >> (16 * k)));
}
float bf16_of(std::uint32_t word, int k) {
  return from_bf16(static_cast<std::uint16_t>(word >> (16 * k)));
}
std::int32_t s8_of(std::uint32_t word, int k) { return static_cast<std::int8_t>(word >> (8 * k)); }
std::int32_t u8_of(std::uint32_t word, int k) { return static_cast<std::uint8_t>(word >> (8 * k)); }
float e4m3_of(std::uint32_t word, int k) { return e4m3_to_float(word >> (8 * k)); }

}  // namespace

void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  check_row(row);
  MatrixRow mine{r, row};
  rendezvous("ldmatrix_x4", &mine, load_matrices<false>);
}
void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* row) {
  check_row(row);
  MatrixRow mine{r, row};
  rendezvous("ldmatrix_x4_transposed", &mine, load_matrices<true>);
}

void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  Product<float> mine{c, a, {b0, b1}};
  rendezvous("mma_bf16", &mine,
             [](void* const* all) { multiply<float, 2>(all, bf16_of, bf16_of); });
}
void mma_f16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  Product<float> mine{c, a, {b0, b1}};
  rendezvous("mma_f16", &mine, [](void* const* all) { multiply<float, 2>(all, half_of, half_of); });
}
void mma_s8_s8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
               std::uint32_t b1) {
  Product<std::int32_t> mine{c, a, {b0, b1}};
  rendezvous("mma_s8_s8", &mine,
             [](void* const* all) { multiply<std::int32_t, 4>(all, s8_of, s8_of); });
}
void mma_u8_s8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
               std::uint32_t b1) {
  Product<std::int32_t> mine{c, a, {b0, b1}};
  rendezvous("mma_u8_s8", &mine,
             [](void* const* all) { multiply<std::int32_t, 4>(all, u8_of, s8_of); });
}
void mma_e4m3(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  Product<float> mine{c, a, {b0, b1}};
  rendezvous("mma_e4m3", &mine,
             [](void* const* all) { multiply<float, 4>(all, e4m3_of, e4m3_of); });
}

std::uint8_t to_e4m3(float x) {
  const auto sign = static_cast<std::uint8_t>(std::signbit(x) ? 0x80 : 0);
  if (std::isnan(x)) return sign | 0x7f;
  const float magnitude = std::min(std::fabs(x), 448.0F);
  // Under 2^-6 numbers are multiples of 2^-9; above, three bits follow the leading one.
  const int exponent = magnitude < 0x1p-6F ? -6 : std::ilogb(magnitude);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  // steps is 8..16 behind a leading one: 16 carries into the exponent by itself.
  return static_cast<std::uint8_t>(sign | (((exponent + 6) << 3) + steps));
}

float e4m3_to_float(std::uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 3 & 0xf);
  const int mantissa = static_cast<int>(bits & 7);
  float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if (exponent == 15 && mantissa == 7) magnitude = std::numeric_limits<float>::quiet_NaN();
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

}  // namespace sla2::emulated

// The products and packings of every instruction set against plain loops: integers exactly, bf16
// and fp32 within the rounding of their sums.
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/float16.h"
#include "cpu/parity.h"

namespace sla2::test {
namespace {

using Index = std::int64_t;
using cpu::Rows;
using cpu::Type;

struct Size {
  Index m, n, k, count;  // `count` parts of k
};
/// Every remainder of the tiles: rows of 4 and 16, columns of 16, 32 and 64, steps of 16.
std::vector<Size> sizes() {
  std::vector<Size> all;
  for (const Index m : {1, 3, 4, 16, 18, 64, 77}) {
    for (const Index n : {16, 32, 48, 64, 80, 128, 144}) {
      for (const Index k : {16, 48, 64, 80, 128, 176, 256}) all.push_back({m, n, k, 1 + m % 3});
    }
  }
  return all;
}

template <typename B>
struct Operands {
  Size size;
  Index lda, ldc;
  std::vector<B> packed;
  std::vector<const B*> parts;

  explicit Operands(const Size& s)
      : size(s), lda(s.count * s.k + 8), ldc(s.n + 5), packed(s.count * s.k * s.n) {
    for (Index i = 0; i < s.count; ++i) parts.push_back(packed.data() + i * s.k * s.n);
  }
  B* part(Index i) { return packed.data() + i * size.k * size.n; }
};

/// C of a first call that overwrites, a second that adds, beside sentinels behind each row.
template <typename C, typename Multiply>
std::vector<C> run_twice(const Size& s, Index ldc, const Multiply& multiply) {
  std::vector<C> c(s.m * ldc, static_cast<C>(-77));
  multiply(c.data(), false);
  multiply(c.data(), true);
  for (Index i = 0; i < s.m; ++i) {
    for (Index at = s.n; at < ldc; ++at) EXPECT_EQ(c[i * ldc + at], static_cast<C>(-77));
  }
  return c;
}

class Product : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    Problem probe = small_problem(32, 32, 16, 16);
    probe.implementation = GetParam();
    SLA2_SKIP_IF_REFUSED(probe, Pass::kForward);
    products_ = &kernels_of(GetParam()).products;
  }
  std::vector<float> normal(Index count) {
    const std::vector<double> values = random_normal(generator_, count);
    return {values.begin(), values.end()};
  }

  std::mt19937_64 generator_{11};
  const cpu::Products* products_ = nullptr;
};

TEST_P(Product, IntegersAreExact) {
  for (const Size& s : sizes()) {
    Operands<std::int8_t> x(s);
    std::vector<std::uint8_t> a(s.m * x.lda);
    std::vector<std::int8_t> b(s.count * s.n * s.k + 64);  // [count, n, k]
    // The extremes often: where s16 sums would saturate.
    for (auto& value : a) {
      value = static_cast<std::uint8_t>(generator_() % 3 == 0 ? 255 : generator_());
    }
    for (auto& value : b) {
      value = static_cast<std::int8_t>(generator_() % 3 == 0 ? -128 : generator_());
    }
    for (Index i = 0; i < s.count; ++i) {
      products_->pack_transposed_int8(b.data() + i * s.n * s.k, s.k, s.n, s.k, x.part(i));
    }
    const auto c = run_twice<std::int32_t>(s, x.ldc, [&](std::int32_t* to, bool accumulate) {
      products_->int8(s.m, s.n, s.k, a.data(), x.lda, x.parts.data(), s.count, to, x.ldc,
                      accumulate);
    });
    for (Index i = 0; i < s.m; ++i) {
      for (Index j = 0; j < s.n; ++j) {
        std::int32_t sum = 0;
        for (Index t = 0; t < s.count * s.k; ++t) {
          sum += a[i * x.lda + t] * b[(t / s.k * s.n + j) * s.k + t % s.k];
        }
        ASSERT_EQ(c[i * x.ldc + j], 2 * sum)
            << s.m << " " << s.n << " " << s.k << " at " << i << ", " << j;
      }
    }
  }
}

/// a [m, count * k] with stride lda, b [count * k, n]; `rounding` is that of one addition. A chain
/// of 2 K products and additions errs by at most 2 K roundings of sum |a b|, twice for two calls.
void expect_product(const Size& s, Index lda, Index ldc, const std::vector<float>& a,
                    const std::vector<float>& b, const std::vector<float>& c) {
  const Index all = s.count * s.k;
  for (Index i = 0; i < s.m; ++i) {
    for (Index j = 0; j < s.n; ++j) {
      double sum = 0;
      double size = 0;
      for (Index t = 0; t < all; ++t) {
        const double term = static_cast<double>(a[i * lda + t]) * b[t * s.n + j];
        sum += term;
        size += std::abs(term);
      }
      const double bound = 4 * static_cast<double>(2 * all) * 0x1p-24 * size;
      ASSERT_NEAR(c[i * ldc + j], 2 * sum, bound)
          << s.m << " " << s.n << " " << s.k << " at " << i << ", " << j;
    }
  }
}

TEST_P(Product, Fp32WithinItsRounding) {
  for (const Size& s : sizes()) {
    Operands<float> x(s);
    const std::vector<float> a = normal(s.m * x.lda);
    const std::vector<float> b = normal(s.count * s.k * s.n);
    for (Index i = 0; i < s.count; ++i) {
      products_->pack_rows_fp32(Type::kF32, Rows{b.data() + i * s.k * s.n, s.n}, s.k, s.n,
                                x.part(i));
    }
    const auto c = run_twice<float>(s, x.ldc, [&](float* to, bool accumulate) {
      products_->fp32(s.m, s.n, s.k, a.data(), x.lda, x.parts.data(), s.count, to, x.ldc,
                      accumulate);
    });
    expect_product(s, x.lda, x.ldc, a, b, c);
  }
}

std::vector<float> rounded(std::vector<float> x) {
  for (float& value : x) value = from_bf16(to_bf16(value));
  return x;
}

TEST_P(Product, Bf16WithinTheRoundingOfItsSums) {
  for (const Size& s : sizes()) {
    Operands<std::uint16_t> x(s);
    const std::vector<float> a = normal(s.m * x.lda);
    const std::vector<float> b = normal(s.count * s.k * s.n);
    std::vector<std::uint16_t> narrow(s.m * x.lda);
    products_->convert_rows(Type::kF32, Rows{a.data(), x.lda}, s.m, s.count * s.k, narrow.data(),
                            x.lda);
    for (Index i = 0; i < s.count; ++i) {
      products_->pack_rows_bf16(Type::kF32, Rows{b.data() + i * s.k * s.n, s.n}, s.k, s.n,
                                x.part(i));
    }
    const auto c = run_twice<float>(s, x.ldc, [&](float* to, bool accumulate) {
      products_->bf16(s.m, s.n, s.k, narrow.data(), x.lda, x.parts.data(), s.count, to, x.ldc,
                      accumulate);
    });
    expect_product(s, x.lda, x.ldc, rounded(a), rounded(b), c);
  }
}

/// Word of step `step` and column `column` in a packed B.
Index packed_word(Index step, Index column, Index n, Index steps) {
  const Index panel = column / 64 * 64;
  return panel * steps + step * std::min<Index>(64, n - panel) + column - panel;
}

TEST_P(Product, PackingOfEveryTypeFromRowsAndColumns) {
  for (const Type type : {Type::kF32, Type::kBF16, Type::kF16}) {
    for (const Index n : {16, 48, 64, 80, 128}) {
      for (const Index k : {1, 7, 16, 48, 63, 64, 80}) {
        const Index stride = std::max(n, k) + 3;
        const std::vector<float> values = normal(std::max(n, k) * stride);
        std::vector<float> exact = values;
        std::vector<std::uint16_t> narrow;
        for (float& value : exact) {
          narrow.push_back(type == Type::kBF16 ? to_bf16(value) : to_fp16(value));
          if (type == Type::kBF16) value = from_bf16(narrow.back());
          if (type == Type::kF16) value = from_fp16(narrow.back());
        }
        const void* data = type == Type::kF32 ? static_cast<const void*>(values.data())
                                              : static_cast<const void*>(narrow.data());
        const Rows rows{data, stride};
        const Index columns = n - n / 3;  // the others are zeros
        for (const bool transposed : {false, true}) {
          const auto expected = [&](Index t, Index c) {
            if (!transposed) return t < k ? exact[t * stride + c] : 0.0F;
            return t < k && c < columns ? exact[c * stride + t] : 0.0F;
          };
          std::vector<float> wide(n * k, -77);
          std::vector<std::uint16_t> half(n * (k + k % 2), 77);
          if (transposed) {
            products_->pack_transposed_fp32(type, rows, columns, n, k, wide.data());
            products_->pack_transposed_bf16(type, rows, columns, n, k, half.data());
          } else {
            products_->pack_rows_fp32(type, rows, k, n, wide.data());
            products_->pack_rows_bf16(type, rows, k, n, half.data());
          }
          for (Index c = 0; c < n; ++c) {
            for (Index t = 0; t < k + k % 2; ++t) {
              if (t < k) {
                ASSERT_EQ(wide[packed_word(t, c, n, k)], expected(t, c));
              }
              ASSERT_EQ(half[2 * packed_word(t / 2, c, n, (k + 1) / 2) + t % 2],
                        to_bf16(expected(t, c)));
            }
          }
        }
      }
    }
  }
}

TEST_P(Product, TransposedLeftOperand) {
  for (const Index n : {16, 48, 64}) {
    for (const Index k : {1, 15, 32, 63, 64, 70}) {
      const std::vector<float> x = normal(k * (n + 3));
      const Index lda = k + k % 2 + 2;
      std::vector<std::uint16_t> a(n * lda, 77);
      products_->transpose_to_bf16(x.data(), n + 3, k, n, a.data(), lda);
      for (Index c = 0; c < n; ++c) {
        for (Index t = 0; t < lda; ++t) {
          const std::uint16_t expected = t < k           ? to_bf16(x[t * (n + 3) + c])
                                         : t < k + k % 2 ? std::uint16_t{0}
                                                         : std::uint16_t{77};
          ASSERT_EQ(a[c * lda + t], expected) << n << " " << k << " at " << c << ", " << t;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Product, testing::ValuesIn(kCpuImplementations),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace sla2::test

// What the operator must equal, forward and backward, on every CPU implementation: full attention,
// block-sparse attention and linear attention, each written here densely in double; and what must
// not change it: a constant in the keys, the order of the key blocks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"
#include "cpu/parity.h"

namespace sla2::test {
namespace {

using Vector = std::vector<double>;

struct Dense {
  Vector out, d_q, d_k, d_v;
};

double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

/// Rows minus their mean.
Vector centred(Vector x, std::int64_t d) {
  const std::int64_t rows = std::ssize(x) / d;
  for (std::int64_t c = 0; c < d; ++c) {
    double mean = 0;
    for (std::int64_t n = 0; n < rows; ++n) mean += x[n * d + c] / static_cast<double>(rows);
    for (std::int64_t n = 0; n < rows; ++n) x[n * d + c] -= mean;
  }
  return x;
}

Vector softmax_rows(Vector x, std::int64_t d) {
  for (std::size_t row = 0; row < x.size(); row += d) {
    double sum = 0;
    for (std::int64_t c = 0; c < d; ++c) sum += x[row + c] = std::exp(x[row + c]);
    for (std::int64_t c = 0; c < d; ++c) x[row + c] /= sum;
  }
  return x;
}

Vector softmax_rows_backward(const Vector& y, Vector d_y, std::int64_t d) {
  for (std::size_t row = 0; row < y.size(); row += d) {
    const double mean = dot(&y[row], &d_y[row], d);
    for (std::int64_t c = 0; c < d; ++c) d_y[row + c] = y[row + c] * (d_y[row + c] - mean);
  }
  return d_y;
}

/// One head. is_linear: weights phi(q).phi(ks) over the blocks that `routed` leaves out, else
/// softmax over those it has. routed: [M, T].
Dense dense_attention(const Problem& p, const reference::Operands<double>& x, const Vector& d_out,
                      const std::vector<bool>& routed, bool is_linear) {
  const std::int64_t d = p.head_dim;
  const std::int64_t dv = p.value_dim;
  const std::int64_t T = num_k_blocks(p, p.k_tokens);
  const Vector ks = centred(x.k, d);
  const Vector a = is_linear ? softmax_rows(x.q, d) : x.q;
  const Vector b = is_linear ? softmax_rows(ks, d) : ks;
  const double scale = is_linear ? 1 : softmax_scale(p);
  Dense r{Vector(p.q_tokens * dv), Vector(a.size()), Vector(b.size()), Vector(x.v.size())};
  for (std::int64_t row = 0; row < p.q_tokens; ++row) {
    Vector w(p.k_tokens);
    double sum = 0;
    for (std::int64_t n = 0; n < p.k_tokens; ++n) {
      if (routed[row / p.config.block_q * T + n / p.config.block_k] == is_linear) continue;
      const double product = scale * dot(&a[row * d], &b[n * d], d);
      sum += w[n] = is_linear ? product : std::exp(product);
    }
    double* o = &r.out[row * dv];
    const double* d_o = &d_out[row * dv];
    for (std::int64_t n = 0; n < p.k_tokens; ++n) {
      for (std::int64_t c = 0; c < dv; ++c) o[c] += w[n] / sum * x.v[n * dv + c];
    }
    const double delta = dot(d_o, o, dv);
    for (std::int64_t n = 0; n < p.k_tokens; ++n) {
      if (w[n] == 0) continue;
      const double d_w = (dot(d_o, &x.v[n * dv], dv) - delta) / sum;
      const double d_product = scale * (is_linear ? d_w : w[n] * d_w);
      for (std::int64_t c = 0; c < dv; ++c) r.d_v[n * dv + c] += w[n] / sum * d_o[c];
      for (std::int64_t c = 0; c < d; ++c) {
        r.d_q[row * d + c] += d_product * b[n * d + c];
        r.d_k[n * d + c] += d_product * a[row * d + c];
      }
    }
  }
  if (is_linear) {
    r.d_q = softmax_rows_backward(a, r.d_q, d);
    r.d_k = softmax_rows_backward(b, r.d_k, d);
  }
  r.d_k = centred(r.d_k, d);  // through the mean; in the softmax branch the sum is zero anyway
  return r;
}

std::vector<bool> routed_blocks(const Call& call) {
  const Problem& p = call.problem;
  const std::int64_t T = num_k_blocks(p, p.k_tokens);
  const std::int64_t L = max_routed_blocks(p);
  std::vector<bool> routed(num_q_blocks(p) * T);
  const Vector blocks = call.blocks.values();
  for (std::size_t at = 0; at < blocks.size(); ++at) {
    if (blocks[at] >= 0) routed[at / L * T + static_cast<std::int64_t>(blocks[at])] = true;
  }
  return routed;
}

class Identity : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    problem_ = small_problem(75, 160, 32, 48);
    problem_.implementation = GetParam();
    SLA2_SKIP_IF_REFUSED(problem_, Pass::kForward);
  }

  static void run(Call& call) {
    const auto executor = make_thread_pool(2);
    call.run_forward(*executor);
    call.run_backward(*executor);
  }

  /// The rounding of fp32 sums, on gradients that are differences of terms about ten times as
  /// large.
  static void expect_equal(Call& call, const Dense& expected) {
    EXPECT_LT(relative_error(call.out.values(), expected.out), kSumError);
    EXPECT_LT(relative_error(call.d_q.values(), expected.d_q), 10 * kSumError);
    EXPECT_LT(relative_error(call.d_k.values(), expected.d_k), 10 * kSumError);
    EXPECT_LT(relative_error(call.d_v.values(), expected.d_v), kSumError);
  }

  Problem problem_;
};

TEST_P(Identity, KeepOneIsFullAttention) {
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    for (const LinearScope scope : {LinearScope::kComplement, LinearScope::kAll}) {
      problem_.config.keep = 1;
      problem_.config.routing = mode;
      problem_.config.linear_scope = scope;
      Call call(problem_, 31);
      run(call);
      const std::vector<bool> all(num_q_blocks(problem_) * num_k_blocks(problem_, 160), true);
      expect_equal(call, dense_attention(problem_, call.operands<double>(), call.d_out.values(),
                                         all, false));
      for (const double g : call.d_alpha_logit.values()) EXPECT_EQ(g, 0);
    }
  }
}

TEST_P(Identity, AlphaOneIsBlockSparseAttention) {
  Call call(problem_, 37);
  call.alpha_logit.assign(call.alpha_logit.size(), 120);
  run(call);
  expect_equal(call, dense_attention(problem_, call.operands<double>(), call.d_out.values(),
                                     routed_blocks(call), false));
}

TEST_P(Identity, AlphaZeroIsLinearAttentionOverTheComplement) {
  Call call(problem_, 41);
  call.alpha_logit.assign(call.alpha_logit.size(), -120);
  run(call);
  expect_equal(call, dense_attention(problem_, call.operands<double>(), call.d_out.values(),
                                     routed_blocks(call), true));
}

TEST_P(Identity, AConstantInKeysChangesNothing) {
  Call before(problem_, 43);
  Vector keys = before.k.values();
  for (double& x : keys) x = std::round(x * 256) / 256;  // so that x + 4 is exact
  before.k.set(keys);
  Call after(problem_, 43);
  for (double& x : keys) x += 4;
  after.k.set(keys);
  run(before);
  run(after);
  EXPECT_EQ(after.blocks.values(), before.blocks.values());
  // The mean sums numbers five times as large, and everything follows from it.
  const double bound = 5 * kSumError;
  EXPECT_LT(relative_error(after.out_sparse.values(), before.out_sparse.values()), bound);
  EXPECT_LT(relative_error(after.out.values(), before.out.values()), bound);
  EXPECT_LT(relative_error(after.d_q.values(), before.d_q.values()), 10 * bound);
  EXPECT_LT(relative_error(after.d_k.values(), before.d_k.values()), 10 * bound);
  EXPECT_LT(relative_error(after.d_v.values(), before.d_v.values()), bound);
}

TEST_P(Identity, TheOrderOfKeyBlocksDoesNotMatter) {
  const auto rotated = [](Vector x, std::int64_t rows, std::int64_t width) {
    std::rotate(x.begin(), x.begin() + rows * width, x.end());
    return x;
  };
  for (const RoutingMode mode : {RoutingMode::kHard, RoutingMode::kSoft}) {
    problem_.config.routing = mode;
    Call before(problem_, 47);
    Call after(problem_, 47);
    after.k.set(rotated(before.k.values(), 64, 32));
    after.v.set(rotated(before.v.values(), 64, 48));
    run(before);
    run(after);
    EXPECT_LT(relative_error(after.out.values(), before.out.values()), kSumError);
    EXPECT_LT(relative_error(after.d_q.values(), before.d_q.values()), 10 * kSumError);
    EXPECT_LT(relative_error(after.d_k.values(), rotated(before.d_k.values(), 64, 32)),
              10 * kSumError);
    EXPECT_LT(relative_error(after.d_v.values(), rotated(before.d_v.values(), 64, 48)), kSumError);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Identity, testing::ValuesIn(kCpuImplementations),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace sla2::test

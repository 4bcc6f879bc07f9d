// The reference's gradients against central finite differences, in double.
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/problems.h"

namespace sla2::test {
namespace {

using reference::ForwardResult;
using reference::Operands;
using reference::RoutingResult;
using Vector = std::vector<double>;

struct GradientCase {
  std::string name;
  std::function<void(Problem&)> change;
  std::vector<std::int64_t> key_lengths;
};

void PrintTo(const GradientCase& value, std::ostream* out) { *out << value.name; }

double loss(const Problem& problem, const Operands<double>& operands, const Vector& d_out,
            const RoutingResult<double>* given) {
  const Vector out = reference::forward(problem, operands, given).out;
  double sum = 0;
  for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * d_out[i];
  return sum;
}

class GradientTest : public testing::TestWithParam<GradientCase> {
 protected:
  GradientTest() {
    Problem problem = small_problem(70, 150, 16, 32);
    problem.batch = 2;
    problem.num_heads = 2;
    problem.num_kv_heads = 1;
    GetParam().change(problem);
    Call call(problem, 7, Layout::kDense, GetParam().key_lengths);
    problem_ = problem;
    operands_ = call.operands<double>();
    d_out_ = call.d_out.values();
    saved_ = reference::forward(problem_, operands_);
    gradient_ = reference::backward(problem_, operands_, saved_, d_out_);
  }

  /// Compares directional derivatives of a few entries. The error of a central difference is about
  /// h^2 plus 1e-16 / h times the loss (some tens): 1e-6 of the largest gradient covers both.
  void check(const char* name, Vector Operands<double>::*member, const Vector& gradient,
             bool fixed_routing) {
    Operands<double> moved = operands_;
    Vector& values = moved.*member;
    ASSERT_EQ(values.size(), gradient.size()) << name;
    double largest = 1e-3;
    for (const double g : gradient) largest = std::max(largest, std::abs(g));
    const double h = 1e-5;
    const std::size_t step = values.size() / 23 + 1;
    for (std::size_t i = 0; i < values.size(); i += step) {
      const double at = values[i];
      const RoutingResult<double>* given = fixed_routing ? &saved_.routing : nullptr;
      values[i] = at + h;
      const double up = loss(problem_, moved, d_out_, given);
      values[i] = at - h;
      const double down = loss(problem_, moved, d_out_, given);
      values[i] = at;
      EXPECT_NEAR(gradient[i], (up - down) / (2 * h), 1e-6 * largest) << name << "[" << i << "]";
    }
  }

  Problem problem_;
  Operands<double> operands_;
  Vector d_out_;
  ForwardResult<double> saved_;
  reference::GradientResult<double> gradient_;
};

TEST_P(GradientTest, MatchesFiniteDifferences) {
  check("q", &Operands<double>::q, gradient_.d_q, true);
  check("k", &Operands<double>::k, gradient_.d_k, true);
  check("v", &Operands<double>::v, gradient_.d_v, true);
  if (problem_.config.method == Method::kSla) {
    check("proj_out", &Operands<double>::proj_out, gradient_.d_proj_out, true);
    return;
  }
  check("alpha_logit", &Operands<double>::alpha_logit, gradient_.d_alpha_logit, true);
  if (problem_.config.routing == RoutingMode::kSoft) {
    check("proj_q", &Operands<double>::proj_q, gradient_.d_proj_q, false);
    check("proj_k", &Operands<double>::proj_k, gradient_.d_proj_k, false);
  }
}

/// The same code in float. Sums of up to some thousand terms, one rounding of 2^-24 each at the
/// worst.
TEST_P(GradientTest, IsTheSameInFloat) {
  const auto narrow = [](const Vector& x) { return std::vector<float>(x.begin(), x.end()); };
  Operands<float> operands{narrow(operands_.q),        narrow(operands_.k),
                           narrow(operands_.v),        narrow(operands_.proj_q),
                           narrow(operands_.proj_k),   narrow(operands_.alpha_logit),
                           narrow(operands_.proj_out), operands_.key_lengths};
  ForwardResult<float> saved{
      narrow(saved_.out),
      narrow(saved_.out_sparse),
      narrow(saved_.out_linear),
      narrow(saved_.lse),
      narrow(saved_.k_mean),
      {narrow(saved_.routing.scores), saved_.routing.blocks, narrow(saved_.routing.logits)}};
  const auto gradient = reference::backward(problem_, operands, saved, narrow(d_out_));
  const auto compare = [](const char* name, const std::vector<float>& ours, const Vector& exact) {
    ASSERT_EQ(ours.size(), exact.size()) << name;
    double norm = 0;
    for (const double x : exact) norm += x * x;
    if (norm == 0) {
      for (const float x : ours) EXPECT_EQ(x, 0) << name;
    } else {
      EXPECT_LE(relative_error(ours, exact), 4096 * 0x1p-24) << name;
    }
  };
  compare("d_q", gradient.d_q, gradient_.d_q);
  compare("d_k", gradient.d_k, gradient_.d_k);
  compare("d_v", gradient.d_v, gradient_.d_v);
  compare("d_alpha_logit", gradient.d_alpha_logit, gradient_.d_alpha_logit);
  compare("d_proj_q", gradient.d_proj_q, gradient_.d_proj_q);
  compare("d_proj_k", gradient.d_proj_k, gradient_.d_proj_k);
  compare("d_proj_out", gradient.d_proj_out, gradient_.d_proj_out);
}

void soft(Problem& p) {
  p.config.routing = RoutingMode::kSoft;
  p.config.tau = 0.5;
}

INSTANTIATE_TEST_SUITE_P(
    Options, GradientTest,
    testing::Values(
        GradientCase{"hard", [](Problem&) {}, {}},
        GradientCase{"hard_lengths", [](Problem&) {}, {150, 75}},
        GradientCase{
            "hard_matched", [](Problem& p) { p.config.backward = BackwardMode::kMatched; }, {}},
        GradientCase{"hard_elu", [](Problem& p) { p.config.feature_map = FeatureMap::kElu; }, {}},
        GradientCase{"hard_relu", [](Problem& p) { p.config.feature_map = FeatureMap::kRelu; }, {}},
        GradientCase{"hard_raw", [](Problem& p) { p.config.linear_keys = LinearKeys::kRaw; }, {}},
        GradientCase{"hard_all", [](Problem& p) { p.config.linear_scope = LinearScope::kAll; }, {}},
        GradientCase{"hard_keep_1", [](Problem& p) { p.config.keep = 1; }, {}},
        GradientCase{"hard_protected",
                     [](Problem& p) {
                       p.protected_keys = {30, 40};
                     },
                     {}},
        GradientCase{"hard_alpha_block", [](Problem& p) { p.alpha_blocks = 3; }, {}},
        GradientCase{"hard_scale", [](Problem& p) { p.config.scale = 0.7; }, {}},
        GradientCase{"sla", [](Problem& p) { p.config.method = Method::kSla; }, {}},
        GradientCase{"soft", soft, {}}, GradientCase{"soft_lengths", soft, {150, 75}},
        GradientCase{"soft_softmax",
                     [](Problem& p) {
                       soft(p);
                       p.config.score_norm = ScoreNorm::kSoftmax;
                     },
                     {}},
        GradientCase{"soft_protected",
                     [](Problem& p) {
                       soft(p);
                       p.config.score_norm = ScoreNorm::kSoftmax;
                       p.protected_keys = {30, 40};
                     },
                     {}},
        GradientCase{"soft_all",
                     [](Problem& p) {
                       soft(p);
                       p.config.linear_scope = LinearScope::kAll;
                     },
                     {}},
        GradientCase{"soft_per_head",
                     [](Problem& p) {
                       soft(p);
                       p.num_routers = 2;
                       p.num_kv_heads = 2;
                       p.alpha_blocks = 3;
                     },
                     {}},
        GradientCase{"soft_keep_1",
                     [](Problem& p) {
                       soft(p);
                       p.config.keep = 1;
                     },
                     {}},
        GradientCase{"sla_soft",
                     [](Problem& p) {
                       soft(p);
                       p.config.method = Method::kSla;
                     },
                     {}},
        // The blocks beside the protected ones are no more than the target: all have m = 1.
        GradientCase{"soft_all_protected",
                     [](Problem& p) {
                       soft(p);
                       p.protected_keys = {0, 118};
                     },
                     {}},
        GradientCase{"soft_lengths_protected_per_head",
                     [](Problem& p) {
                       soft(p);
                       p.num_routers = 2;
                       p.num_kv_heads = 2;
                       p.alpha_blocks = 3;
                       p.config.score_norm = ScoreNorm::kSoftmax;
                       p.protected_keys = {30, 40};
                     },
                     {150, 75}},
        GradientCase{"soft_elu_raw",
                     [](Problem& p) {
                       soft(p);
                       p.config.feature_map = FeatureMap::kElu;
                       p.config.linear_keys = LinearKeys::kRaw;
                     },
                     {}}),
    [](const auto& info) { return info.param.name; });

TEST(GivenLogits, LeaveTheRouterWithoutGradient) {
  Problem problem = small_problem(64, 128, 16, 16);
  soft(problem);
  Call call(problem);
  SerialExecutor serial;
  call.run_forward(serial);
  call.run_backward(serial);
  EXPECT_GT(std::abs(call.d_proj_q.values()[0]), 0);
  call.run_forward(serial, true);
  call.run_backward(serial, true);
  for (const double g : call.d_proj_q.values()) EXPECT_EQ(g, 0);
  for (const double g : call.d_proj_k.values()) EXPECT_EQ(g, 0);
  EXPECT_TRUE(call.guards_intact());
}

}  // namespace
}  // namespace sla2::test

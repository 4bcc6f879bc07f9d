// nn::attention against a dense computation in double with libtorch's own autograd, and the module.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sla2/error.h"
#include "video/attention.h"

namespace sla2::nn {
namespace {

using torch::Tensor;

Config small_config() {
  Config config;
  config.keep = 0.3;
  config.block_q = 64;
  config.block_k = 32;
  config.precision = Precision::kFp32;
  return config;
}

struct Sample {
  Tensor q, k, v, proj_q, proj_k, alpha_logit;
};

/// Grouped heads, ragged blocks: 3 query blocks, 6 key blocks.
Sample make_sample() {
  torch::manual_seed(20260212);
  Sample s;
  s.q = torch::randn({2, 4, 150, 32}).requires_grad_();
  s.k = torch::randn({2, 2, 170, 32}).requires_grad_();
  s.v = torch::randn({2, 2, 170, 48}).requires_grad_();
  s.proj_q = (torch::eye(32) + 0.2 * torch::randn({32, 32})).requires_grad_();
  s.proj_k = (torch::eye(32) + 0.2 * torch::randn({32, 32})).requires_grad_();
  s.alpha_logit = torch::randn({4, 3}).requires_grad_();
  return s;
}

AttentionArguments arguments_of(const Sample& s) {
  AttentionArguments arguments;
  arguments.proj_q = s.proj_q;
  arguments.proj_k = s.proj_k;
  arguments.alpha_logit = s.alpha_logit;
  return arguments;
}

Tensor block_of_token(std::int64_t tokens, std::int64_t block) {
  return torch::arange(tokens).div(block, "floor");
}

/// Steps 0 and 2 to 4 in double under weights m [B, H, M, T].
Tensor dense_attention(const Sample& s, const Tensor& m, const Config& config) {
  const auto to_double = [](const Tensor& t) { return t.to(torch::kFloat64); };
  const Tensor q = to_double(s.q);
  const Tensor k = to_double(s.k).repeat_interleave(2, 1);
  const Tensor v = to_double(s.v).repeat_interleave(2, 1);
  const Tensor ks = k - k.mean(2, /*keepdim=*/true);
  const Tensor rows = block_of_token(q.size(2), config.block_q);
  const Tensor columns = block_of_token(k.size(2), config.block_k);
  const Tensor weight = to_double(m).index_select(2, rows).index_select(3, columns);
  const Tensor scores = torch::matmul(q, ks.transpose(2, 3)) / std::sqrt(32.0) + weight.log();
  const Tensor sparse = torch::matmul(scores.softmax(-1), v);
  const Tensor mass = torch::matmul(q.softmax(-1), ks.softmax(-1).transpose(2, 3)) * (1 - weight);
  const Tensor linear = torch::matmul(mass, v) / mass.sum(-1, true);
  const Tensor alpha =
      torch::sigmoid(to_double(s.alpha_logit)).index_select(1, rows).unsqueeze(0).unsqueeze(-1);
  return alpha * sparse + (1 - alpha) * linear;
}

Tensor weights_of_blocks(const Tensor& blocks, std::int64_t k_blocks) {
  std::vector<std::int64_t> shape = blocks.sizes().vec();
  shape.back() = k_blocks + 1;
  const Tensor index = torch::where(blocks < 0, k_blocks, blocks).to(torch::kInt64);
  return torch::zeros(shape, torch::kFloat64).scatter(-1, index, 1.0).narrow(-1, 0, k_blocks);
}

double relative_error(const Tensor& value, const Tensor& expected) {
  return ((value.to(torch::kFloat64) - expected.to(torch::kFloat64)).norm() /
          expected.to(torch::kFloat64).norm())
      .item<double>();
}

// Four fp32 sums over the keys in a row (mean, scores, branch, mix), forward; backward as many
// again on differences 4 times as large: sqrt(170) * 2^-24 each.
const double kForwardBound = 4 * std::sqrt(170.0) * std::ldexp(1.0, -24);
const double kBackwardBound = 8 * kForwardBound;

void compare(const Sample& s, const Tensor& m, const Tensor& out, const Config& config) {
  const Tensor expected = dense_attention(s, m, config);
  EXPECT_LE(relative_error(out, expected), kForwardBound);
  const Tensor cotangent = torch::randn(out.sizes());
  const std::vector<Tensor> inputs = {s.q, s.k, s.v, s.alpha_logit};
  const char* names[] = {"q", "k", "v", "alpha_logit"};
  const auto ours = torch::autograd::grad({out}, inputs, {cotangent}, /*retain_graph=*/true);
  const auto theirs = torch::autograd::grad({expected}, inputs, {cotangent.to(torch::kFloat64)});
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_LE(relative_error(ours[i], theirs[i]), kBackwardBound) << names[i];
  }
}

TEST(NnAttention, HardMatchesDense) {
  const Sample s = make_sample();
  const Config config = small_config();
  const RoutingTensors routing = route(s.q, s.k, arguments_of(s), config);
  EXPECT_FALSE(routing.weights.defined());
  const Tensor out = attention(s.q, s.k, s.v, arguments_of(s), config);
  compare(s, weights_of_blocks(routing.blocks, 6), out, config);
}

TEST(NnAttention, SoftMatchesDenseUnderItsWeights) {
  const Sample s = make_sample();
  Config config = small_config();
  config.routing = RoutingMode::kSoft;
  const RoutingTensors routing = route(s.q, s.k, arguments_of(s), config);
  const Tensor out = attention(s.q, s.k, s.v, arguments_of(s), config);
  compare(s, routing.weights, out, config);
}

TEST(NnAttention, SoftTrainsTheRouter) {
  const Sample s = make_sample();
  Config config = small_config();
  config.routing = RoutingMode::kSoft;
  const Tensor cotangent = torch::randn({2, 4, 150, 48});
  const auto value = [&](const AttentionArguments& arguments) {
    return (attention(s.q, s.k, s.v, arguments, config) * cotangent).to(torch::kFloat64).sum();
  };
  const auto grads = torch::autograd::grad({value(arguments_of(s))}, {s.proj_q, s.proj_k});
  const torch::NoGradGuard no_grad;
  const double step = 1e-3;  // truncation and rounding are then both under 1e-3 of the derivative
  for (std::size_t i = 0; i < 2; ++i) {
    const Tensor direction = grads[i] / grads[i].norm() * 32;
    double sides[2];
    for (const int side : {0, 1}) {
      AttentionArguments moved = arguments_of(s);
      Tensor& target = i == 0 ? moved.proj_q : moved.proj_k;
      target = target + (side == 0 ? step : -step) * direction;
      sides[side] = value(moved).item<double>();
    }
    const double analytic = (grads[i] * direction).sum().item<double>();
    EXPECT_NEAR((sides[0] - sides[1]) / (2 * step), analytic, 2e-3 * std::abs(analytic) + 1e-2);
  }
}

TEST(NnAttention, GivenRoutingProtectedRangeAndKeyLengths) {
  const Sample s = make_sample();
  const Config config = small_config();
  AttentionArguments arguments = arguments_of(s);
  arguments.protected_keys = {{100, 130}};
  arguments.key_lengths = torch::tensor({170, 70}, torch::kInt64);
  const Tensor blocks = route(s.q, s.k, arguments, config).blocks;
  EXPECT_EQ(blocks.size(3), 1 + 2);
  EXPECT_TRUE((blocks[0] == 3).any(-1).all().item<bool>());  // blocks 3 and 4 are protected
  EXPECT_TRUE((blocks[1] < 3).all().item<bool>());           // the short sequence has blocks 0 to 2
  const Tensor out = attention(s.q, s.k, s.v, arguments, config);
  AttentionArguments given = arguments;
  given.given_blocks = blocks;
  EXPECT_TRUE(torch::equal(attention(s.q, s.k, s.v, given, config), out));
  const AttentionParts parts = attention_parts(s.q, s.k, s.v, arguments, config);
  EXPECT_TRUE(torch::equal(parts.out, out));
  EXPECT_TRUE(torch::equal(parts.blocks, blocks));
  EXPECT_FALSE(parts.out.requires_grad());
}

TEST(NnAttention, InferenceGivesTheSameBits) {
  const Sample s = make_sample();
  const Tensor out = attention(s.q, s.k, s.v, arguments_of(s), small_config());
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(torch::equal(attention(s.q, s.k, s.v, arguments_of(s), small_config()), out));
}

std::string message_of(const AttentionArguments& arguments, const Sample& s) {
  try {
    attention(s.q, s.k, s.v, arguments, small_config());
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument);
    return error.what();
  }
  return "no error";
}

TEST(NnAttention, ErrorsKeepTheirTypeAndText) {
  const Sample s = make_sample();
  AttentionArguments arguments;
  arguments.key_lengths = torch::tensor({170, 171}, torch::kInt64);
  EXPECT_NE(message_of(arguments, s).find("key_lengths must be in [1, 170], got 171"),
            std::string::npos);
  arguments = {};
  arguments.proj_q = torch::eye(16);
  EXPECT_EQ(message_of(arguments, s),
            "proj_q must have shape [head_dim, head_dim] or [num_heads, head_dim, head_dim], both "
            "of one form, got [16, 16]");
  Sample mixed = s;
  mixed.k = s.k.to(torch::kHalf);
  EXPECT_EQ(message_of({}, mixed), "k must have q's type float32, got float16");
}

TEST(NnAttentionModule, OwnsTheParametersOfItsMethod) {
  AttentionOptions options{
      .num_heads = 4, .head_dim = 32, .seq_len = 150, .config = small_config()};
  options.router = RouterShape::kHead;
  Attention module(options);
  const auto parameters = module->named_parameters();
  ASSERT_EQ(parameters.size(), 3u);
  EXPECT_EQ(parameters["proj_q"].sizes(), (std::vector<std::int64_t>{4, 32, 32}));
  EXPECT_EQ(parameters["alpha_logit"].sizes(), (std::vector<std::int64_t>{4, 3}));

  const Sample s = make_sample();
  const Tensor v = torch::randn({2, 2, 170, 32});
  EXPECT_TRUE(torch::equal(module(s.q, s.k, v), attention(s.q, s.k, v, {}, small_config())));

  options.config.method = Method::kSla;
  Attention sla(options);
  ASSERT_EQ(sla->named_parameters().size(), 1u);
  sla(s.q, s.k, v).square().sum().backward();
  EXPECT_TRUE(sla->proj_out.grad().any().item<bool>());

  options.head_dim = 72;
  EXPECT_THROW(Attention{options}, Error);
}

TEST(NnAttention, AutocastCastsTheActivationsAlone) {
  const Sample s = make_sample();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const Tensor out = attention(s.q, s.k, s.v, arguments_of(s), small_config());
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(out.scalar_type(), torch::kBFloat16);
  out.sum().backward();
  EXPECT_EQ(s.q.grad().scalar_type(), torch::kFloat32);
  EXPECT_EQ(s.alpha_logit.grad().scalar_type(), torch::kFloat32);
}

TEST(NnAttention, AlphaOfAnotherLengthIsResampled) {
  Sample s = make_sample();
  s.alpha_logit = torch::tensor({{0.f, 1.f, 2.f, 3.f, 4.f, 5.f}}).repeat({4, 1});
  const Tensor out = attention(s.q, s.k, s.v, arguments_of(s), small_config());
  s.alpha_logit = torch::tensor({{0.5f, 2.5f, 4.5f}}).repeat({4, 1});  // half-pixel centres
  EXPECT_TRUE(
      torch::allclose(out, attention(s.q, s.k, s.v, arguments_of(s), small_config()), 1e-5, 1e-6));
}

}  // namespace
}  // namespace sla2::nn

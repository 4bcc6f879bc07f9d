// Flow matching and its sampler against closed forms.
#include <cmath>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sla2/error.h"
#include "video/flow.h"
#include "video/run.h"

namespace sla2::video {
namespace {

torch::Tensor normal(at::IntArrayRef shape, std::int64_t stream) {
  return torch::randn(shape, make_generator(torch::kCPU, 7, stream), torch::kFloat64);
}

TEST(Flow, NoiseInterpolates) {
  const torch::Tensor x = normal({3, 2, 4}, 1).to(torch::kFloat32);
  const torch::Tensor noise = normal({3, 2, 4}, 2).to(torch::kFloat32);
  const torch::Tensor x_t = add_noise(x, noise, torch::tensor({0.0F, 1.0F, 0.25F}));
  EXPECT_TRUE(x_t[0].equal(x[0]));
  EXPECT_TRUE(x_t[1].equal(noise[1]));
  EXPECT_TRUE(torch::allclose(x_t[2], 0.75 * x[2] + 0.25 * noise[2]));
}

TEST(Flow, ThePerfectModelHasZeroLossAndTheRightVelocity) {
  const torch::Tensor x = normal({4, 3, 5}, 1).to(torch::kFloat32);
  const torch::Tensor noise = normal({4, 3, 5}, 2).to(torch::kFloat32);
  const torch::Tensor t = torch::tensor({0.1F, 0.3F, 0.6F, 0.9F});
  const torch::Tensor x_t = add_noise(x, noise, t);
  EXPECT_EQ(flow_loss(x, x, noise, t, {.prediction = Prediction::kX}).item<double>(), 0);
  EXPECT_EQ(flow_loss(noise - x, x, noise, t, {.prediction = Prediction::kVelocity}).item<double>(),
            0);
  // x_t - x is rounded at 2^-24 of values up to 4, then divided by t >= 0.1.
  EXPECT_TRUE(torch::allclose(to_velocity(x, x_t, t, Prediction::kX, 0.05), noise - x, 0, 2e-5));
}

TEST(Flow, XLossIsTheVelocityLoss) {
  const torch::Tensor x = normal({4, 3, 5}, 1).to(torch::kFloat32);
  const torch::Tensor noise = normal({4, 3, 5}, 2).to(torch::kFloat32);
  const torch::Tensor output = normal({4, 3, 5}, 3).to(torch::kFloat32);
  const torch::Tensor t = torch::tensor({0.06F, 0.3F, 0.6F, 0.9F});
  const torch::Tensor x_t = add_noise(x, noise, t);
  const torch::Tensor velocity = to_velocity(output, x_t, t, Prediction::kX, 0.05);
  const double want = (velocity - (noise - x)).square().mean().item<double>();
  const double got = flow_loss(output, x, noise, t, {.t_min = 0.05}).item<double>();
  EXPECT_NEAR(got, want, 1e-4 * want);
}

TEST(Flow, TimestepsFollowTheirLaw) {
  for (const TimestepLaw law : {TimestepLaw::kUniform, TimestepLaw::kLogitNormal}) {
    const FlowOptions options{.timesteps = law};
    const torch::Tensor t =
        sample_timesteps(20000, options, make_generator(torch::kCPU, 1, kStreamTimesteps));
    EXPECT_GT(t.min().item<double>(), 0);
    EXPECT_LT(t.max().item<double>(), 1);
    // Mean 1/2 by symmetry; the deviation of 20,000 draws is under 0.3 / 141 = 0.0021.
    EXPECT_NEAR(t.mean().item<double>(), 0.5, 0.01);
    EXPECT_NEAR(t.std().item<double>(), law == TimestepLaw::kUniform ? 0.2887 : 0.2083, 0.01);
    const torch::Tensor again =
        sample_timesteps(20000, options, make_generator(torch::kCPU, 1, kStreamTimesteps));
    EXPECT_TRUE(t.equal(again));
  }
}

TEST(Sampler, TimestepsAndShift) {
  const auto plain = sampler_timesteps({.steps = 4});
  EXPECT_EQ(plain, (std::vector<double>{1, 0.75, 0.5, 0.25, 0}));
  const auto shifted = sampler_timesteps({.steps = 4, .shift = 3});
  for (std::size_t i = 0; i < plain.size(); ++i) {
    EXPECT_NEAR(shifted[i], 3 * plain[i] / (1 + 2 * plain[i]), 1e-15);
  }
  const auto from = sampler_timesteps({.steps = 8, .shift = 3, .from_t = 0.6});
  EXPECT_EQ(from.front(), 0.6);
  EXPECT_EQ(from.back(), 0);
  for (std::size_t i = 1; i < from.size(); ++i) EXPECT_LT(from[i], from[i - 1]);
}

// dx/dt = a constant: Euler is exact for any number of steps.
TEST(Sampler, ExactForAConstantField) {
  const torch::Tensor x = normal({1, 2, 3}, 1);
  const torch::Tensor noise = normal({1, 2, 3}, 2);
  for (const std::int64_t steps : {1, 3, 16}) {
    for (const double shift : {1.0, 3.0}) {
      const torch::Tensor got = sample([&](const torch::Tensor&, double) { return noise - x; },
                                       noise, {.steps = steps, .shift = shift});
      EXPECT_TRUE(torch::allclose(got, x, 0, 1e-14));
    }
  }
}

// dx/dt = A x: each Euler step multiplies by (I + dt A), so the result is their product.
TEST(Sampler, LinearFieldIsTheProductOfItsSteps) {
  const torch::Tensor a = normal({4, 4}, 1);
  const torch::Tensor start = normal({1, 4}, 2);
  const SamplerOptions options{.steps = 6, .shift = 2, .from_t = 0.6};
  std::vector<std::int64_t> seen;
  const torch::Tensor got = sample([&](const torch::Tensor& x, double) { return x.matmul(a); },
                                   start, options, [&](std::int64_t i) { seen.push_back(i); });
  torch::Tensor want = start;
  const auto t = sampler_timesteps(options);
  for (std::size_t i = 0; i + 1 < t.size(); ++i) {
    want = want.matmul(torch::eye(4, torch::kFloat64) + (t[i + 1] - t[i]) * a);
  }
  EXPECT_TRUE(torch::allclose(got, want, 1e-12, 1e-12));
  EXPECT_EQ(seen, (std::vector<std::int64_t>{1, 2, 3, 4, 5, 6}));
}

// A model that always predicts the same x ends at that x, whatever the noise was.
TEST(Sampler, AnXPredictionEndsAtThePrediction) {
  const torch::Tensor x_hat = normal({1, 8}, 1);
  const torch::Tensor got = sample(
      [&](const torch::Tensor& x_t, double t) {
        return to_velocity(x_hat, x_t, torch::full({1}, t), Prediction::kX, 1e-4);
      },
      normal({1, 8}, 2), {.steps = 16});
  // t passes through fp32: relative 2^-24 in each of 16 steps.
  EXPECT_TRUE(torch::allclose(got, x_hat, 0, 1e-5));
}

TEST(Sampler, NoiseDependsOnTheSeedAlone) {
  EXPECT_TRUE(seeded_noise({2, 3}, 5, torch::kCPU).equal(seeded_noise({2, 3}, 5, torch::kCPU)));
  EXPECT_FALSE(seeded_noise({2, 3}, 5, torch::kCPU).equal(seeded_noise({2, 3}, 6, torch::kCPU)));
  const torch::Tensor before =
      torch::get_num_threads() > 0 ? seeded_noise({9}, 1, torch::kCPU) : torch::Tensor();
  torch::manual_seed(99);
  EXPECT_TRUE(before.equal(seeded_noise({9}, 1, torch::kCPU)));
}

TEST(Sampler, RefusesBadOptions) {
  const auto message = [](const SamplerOptions& options) -> std::string {
    try {
      validate(options);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message({}), "");
  EXPECT_EQ(message({.steps = 0}), "steps must be in [1, 1000], got 0");
  EXPECT_EQ(message({.shift = 0}), "shift must be in (0, 100], got 0");
  EXPECT_EQ(message({.guidance = -1}), "guidance must be in [0, 100], got -1");
  EXPECT_EQ(message({.from_t = 1.5}), "from_t must be in (0, 1], got 1.5");
  EXPECT_EQ(message({.from_t = std::nan("")}), "from_t must be in (0, 1], got nan");
  EXPECT_THROW(prediction_from("noise"), Error);
  EXPECT_THROW(timestep_law_from("normal"), Error);
}

}  // namespace
}  // namespace sla2::video

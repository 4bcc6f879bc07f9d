// Stage 1 lowers the attention error and resumes to the same bits; stage 2 leaves the router alone.
#include <iostream>

#include <gtest/gtest.h>

#include "demo_fixture.h"
#include "sla2/error.h"
#include "video/tune.h"

namespace sla2::video::test {
namespace {

CalibrateOptions few_steps(std::int64_t steps) {
  CalibrateOptions options;
  options.keeps = {0.25, 0.125};
  options.steps = steps;
  options.checkpoint_every = 2;
  return options;
}

CalibrateResult run_stage1(const CalibrateOptions& options, const std::filesystem::path& folder,
                           bool resume, SilentRun& silent) {
  Denoiser denoiser = small_denoiser();
  const StripeDataset data;
  const Sla2Weights start = start_weights(denoiser, small_attention(), TokenOrder{});
  return calibrate(denoiser, data, start, options, silent.run, folder, resume);
}

/// A bright spot that drifts over soft stripes, another one in every window: 8 frames of 64 x 64.
class SpotDataset final : public Dataset {
 public:
  const std::vector<std::string>& names() const override { return names_; }
  bool has_latents() const override { return false; }
  Batch batch(std::int64_t seed, std::int64_t step, std::int64_t count,
              std::int64_t first_index) const override {
    Batch batch;
    std::vector<torch::Tensor> windows;
    for (std::int64_t i = 0; i < count; ++i) {
      windows.push_back(window(static_cast<std::int64_t>(mix(seed, step, first_index + i) >> 1)));
    }
    batch.pixels = torch::stack(windows);
    batch.clip.resize(windows.size());
    return batch;
  }
  Batch first_window(std::int64_t) const override { return batch(0, 0, 1, 0); }

 private:
  static torch::Tensor window(std::int64_t seed) {
    const auto draw = [&](std::int64_t at) {
      return static_cast<double>(mix(seed, at) % 1000) / 1000;
    };
    const torch::Tensor f = torch::arange(8).view({8, 1, 1, 1}),
                        y = torch::arange(64).view({64, 1, 1}) / 64,
                        x = torch::arange(64).view({64, 1}) / 64, c = torch::arange(3);
    const torch::Tensor dx = x - draw(0) - (draw(1) - 0.5) * 0.1 * f;
    const torch::Tensor dy = y - draw(2) - (draw(3) - 0.5) * 0.1 * f;
    const torch::Tensor spot = torch::exp(-20 * (dx * dx + dy * dy)) * 160;
    const torch::Tensor stripes = torch::sin(6 * x * draw(4) + 6 * y + c) * 40;
    const torch::Tensor pixels = (spot + stripes + 70).clamp(0, 255).to(torch::kUInt8);
    return pixels.expand({8, 64, 64, 3}).clone();
  }
  std::vector<std::string> names_{"spot"};
};

/// Mean hard-routed attention error over the layers, on samples that stage 1 does not train on.
struct MeanError {
  double before = 0, after = 0;
};
MeanError error_of_stage1(double router_lr, double alpha_lr) {
  const TemporaryFolder folder;
  SilentRun silent;
  CalibrateOptions options = few_steps(40);
  options.keeps = {0.125};
  options.checkpoint_every = 40;
  options.router_lr = router_lr;
  options.alpha_lr = alpha_lr;
  // A trained model: in a random one attention follows the noise, and there is nothing to learn.
  Denoiser denoiser =
      load_denoiser(std::filesystem::path(SLA2_SOURCE_DIR) / "models/pixel-video-7m", torch::kCPU);
  denoiser.card.frames = 8;
  denoiser.card.height = denoiser.card.width = 64;
  options.flow.prediction = denoiser.prediction();
  const SpotDataset data;
  const Sla2Weights start = start_weights(denoiser, small_attention(), TokenOrder{});
  const CalibrateResult result =
      calibrate(denoiser, data, start, options, silent.run, folder.path(), false);
  MeanError mean;
  for (const LayerError& error : result.errors) {
    mean.before += error.before / static_cast<double>(result.errors.size());
    mean.after += error.after / static_cast<double>(result.errors.size());
  }
  std::cout << "router_lr " << router_lr << ", alpha_lr " << alpha_lr << ": error " << mean.before
            << " -> " << mean.after << std::endl;
  return mean;
}

TEST(Stage1, LowersTheHeldOutErrorByRouterAndAlpha) {
  const double kRouter = CalibrateOptions{}.router_lr, kAlpha = CalibrateOptions{}.alpha_lr;
  constexpr double kNone = 1e-12;
  const MeanError both = error_of_stage1(kRouter, kAlpha);
  const MeanError alpha = error_of_stage1(kNone, kAlpha), router = error_of_stage1(kRouter, kNone);
  // 0.310 before; 0.216 with both trained, 0.233 with alpha alone, 0.253 with the routers alone.
  EXPECT_LT(both.after, 0.75 * both.before);
  EXPECT_LT(both.after, 0.96 * alpha.after);
  EXPECT_LT(both.after, 0.90 * router.after);
}

TEST(Stage1, ResumesToTheSameBits) {
  const TemporaryFolder whole, parts;
  SilentRun silent;
  const CalibrateResult once = run_stage1(few_steps(5), whole.path(), false, silent);

  class StopAfter final : public Progress {
   public:
    explicit StopAfter(std::atomic<bool>& stop) : stop_(stop) {}
    void begin(const std::string& task, std::int64_t, std::int64_t) override {
      training_ = task.find("stage 1") != std::string::npos;
    }
    void update(std::int64_t done, std::optional<double>) override {
      if (training_ && done == 3) stop_ = true;
    }

   private:
    std::atomic<bool>& stop_;
    bool training_ = false;
  };
  std::atomic<bool> stop{false};
  StopAfter watcher(stop);
  {
    video::Run run{.device = torch::kCPU, .seed = 5, .progress = watcher, .stop = &stop};
    Denoiser denoiser = small_denoiser();
    const StripeDataset data;
    const Sla2Weights start = start_weights(denoiser, small_attention(), TokenOrder{});
    EXPECT_THROW(calibrate(denoiser, data, start, few_steps(5), run, parts.path(), false),
                 Interrupted);
  }
  const CalibrateResult resumed = run_stage1(few_steps(5), parts.path(), true, silent);
  EXPECT_EQ(once.losses, resumed.losses);
  for (const auto& [name, tensor] : once.weights.tensors) {
    EXPECT_TRUE(tensor.equal(resumed.weights.tensors.at(name))) << name;
  }
}

TEST(Stage1, RefusesACheckpointOfOtherOptions) {
  const TemporaryFolder folder;
  SilentRun silent;
  run_stage1(few_steps(2), folder.path(), false, silent);
  CalibrateOptions other = few_steps(2);
  other.router_lr = 0.5;
  EXPECT_THROW(run_stage1(other, folder.path(), true, silent), Error);
}

TEST(Stage1, AlphaStartsAtTheMassOfTheRoutedBlocks) {
  torch::manual_seed(1);
  const torch::Tensor q = torch::randn({1, 2, 80, 32}), k = torch::randn({1, 2, 80, 32});
  const torch::Tensor mass = block_attention_mass(q, k, 32, 32);
  ASSERT_EQ(mass.sizes(), (std::vector<std::int64_t>{1, 2, 3, 3}));
  EXPECT_TRUE(torch::allclose(mass.sum(-1), torch::ones({1, 2, 3})));
  const torch::Tensor dense = torch::softmax(q.matmul(k.transpose(2, 3)) / std::sqrt(32.0), -1);
  const double expected =
      dense.slice(2, 64, 80).slice(3, 64, 80).sum(-1).mean(2)[0][1].item<double>();
  EXPECT_NEAR(mass[0][1][2][2].item<double>(), expected, 1e-6);
  const torch::Tensor blocks =
      torch::tensor({2, -1}, torch::kInt32).view({1, 1, 1, 2}).expand({1, 2, 3, 2});
  EXPECT_TRUE(torch::allclose(routed_mass(mass, blocks), mass.select(3, 2)));
}

TEST(Stage1, OfSlaChangesNothing) {
  const TemporaryFolder folder;
  SilentRun silent;
  Denoiser denoiser = small_denoiser();
  const StripeDataset data;
  const Sla2Weights start = start_weights(denoiser, small_attention(Method::kSla), TokenOrder{});
  const CalibrateResult result =
      calibrate(denoiser, data, start, few_steps(3), silent.run, folder.path(), false);
  EXPECT_TRUE(result.losses.empty());
  for (const LayerError& error : result.errors) EXPECT_EQ(error.before, error.after);
}

TEST(Stage1, NamesAnOptionOutOfRange) {
  CalibrateOptions options;
  options.keeps = {0.5, 1.5};
  try {
    validate(options);
    FAIL() << "keeps of 1.5 accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "keeps must be in (0, 1], got 1.5");
  }
}

class Stage2 : public testing::TestWithParam<Method> {};

TEST_P(Stage2, TrainsTheModelAndNotTheRouter) {
  const TemporaryFolder folder;
  SilentRun silent;
  Denoiser denoiser = small_denoiser();
  const torch::Tensor weight =
      denoiser.transformer->named_parameters()["blocks.0.attn1.to_q.weight"].detach().clone();
  const StripeDataset data;
  Sla2Weights start = start_weights(denoiser, small_attention(GetParam()), TokenOrder{});
  const bool sla2 = GetParam() == Method::kSla2;
  if (sla2) start = run_stage1(few_steps(2), folder.path() / "one", false, silent).weights;
  TuneOptions options;
  options.train.steps = 3;
  options.train.lr = 1e-3;
  options.train.warmup = 0;
  options.train.ema_decay = 0;
  const TuneResult result =
      tune(denoiser, data, start, options, silent.run, folder.path() / "two", {{"a", 1}}, false);
  EXPECT_EQ(result.losses.size(), 3U);
  EXPECT_FALSE(
      denoiser.transformer->named_parameters()["blocks.0.attn1.to_q.weight"].equal(weight));
  const Sla2Weights saved = load_sla2(folder.path() / "two");
  if (sla2) {
    const std::string router = "blocks.1.attn1.proj_k", alpha = "blocks.1.attn1.alpha_logit";
    EXPECT_TRUE(saved.tensors.at(router).equal(start.tensors.at(router)));
    EXPECT_FALSE(saved.tensors.at(alpha).equal(start.tensors.at(alpha)));
  } else {
    EXPECT_GT(saved.tensors.at("blocks.1.attn1.proj_out").abs().max().item<double>(), 0);
  }
  EXPECT_TRUE(std::filesystem::exists(folder.path() / "two" / "transformer" / "config.json"));
  const Denoiser again = load_denoiser("unused", torch::kCPU, folder.path() / "two");
  EXPECT_EQ(again.card.captions, denoiser.card.captions);
}
INSTANTIATE_TEST_SUITE_P(Methods, Stage2, testing::Values(Method::kSla2, Method::kSla),
                         [](const auto& method) {
                           return method.param == Method::kSla ? "sla" : "sla2";
                         });

}  // namespace
}  // namespace sla2::video::test

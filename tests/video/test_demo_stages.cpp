// Stage 1 lowers the attention error and resumes to the same bits; stage 2 leaves the router alone.
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

double mean_of(const std::vector<double>& values, std::size_t begin, std::size_t end) {
  double sum = 0;
  for (std::size_t i = begin; i < end; ++i) sum += values[i];
  return sum / static_cast<double>(end - begin);
}

TEST(Stage1, LowersItsLossAndMeasuresTheError) {
  const TemporaryFolder folder;
  SilentRun silent;
  CalibrateOptions options = few_steps(60);
  options.keeps = {0.125};
  const CalibrateResult result = run_stage1(options, folder.path(), false, silent);
  ASSERT_EQ(result.errors.size(), 3U);
  ASSERT_EQ(result.losses.size(), 60U);
  EXPECT_LT(mean_of(result.losses, 50, 60), 0.7 * mean_of(result.losses, 0, 10));
  // Of the hard-routed error only that it was measured: a random model's pooled scores lie far
  // within tau of each other, so soft routing there is far from any hard choice.
  for (const LayerError& error : result.errors) {
    EXPECT_GT(error.before, 0);
    EXPECT_GT(error.after, 0);
    EXPECT_NE(error.after, error.before);
  }
  EXPECT_FALSE(result.weights.tensors.at("blocks.0.attn1.proj_q").equal(torch::eye(32)));
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

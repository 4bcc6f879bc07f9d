// The training loop on problems whose answer is known.
#include <atomic>
#include <cmath>
#include <filesystem>
#include <limits>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sla2/error.h"
#include "video/optimizer.h"
#include "video/trainer.h"

namespace sla2::video {
namespace {

namespace fs = std::filesystem;

class TrainerTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::path(testing::TempDir()) / (std::string("sla2_trainer_") + test->name());
    fs::remove_all(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  static torch::Tensor leaf() { return torch::full({2, 2}, 4.0).requires_grad_(true); }

  fs::path folder_;
  Progress silent_;
  std::atomic<bool> stop_{false};
  video::Run run_{.progress = silent_, .stop = &stop_};
};

TEST_F(TrainerTest, AgreesWithTorchsAdamW) {
  torch::Tensor ours = leaf();
  torch::Tensor theirs = leaf();
  const torch::Tensor target = torch::tensor({{1.0F, -2.0F}, {3.0F, 0.5F}});
  const auto loss_of = [&](const torch::Tensor& w) { return (w - target).pow(4).sum(); };
  const double clip = 5;
  Trainer trainer({{"w", ours, 1.0, /*decays=*/true}},
                  {.steps = 50, .lr = 0.05, .warmup = 0, .clip_norm = clip, .ema_decay = 0},
                  folder_, {});
  trainer.train([&](std::int64_t, std::int64_t) { return loss_of(ours); }, run_);
  torch::optim::AdamW reference(
      {theirs}, torch::optim::AdamWOptions(0.05).betas({0.9, 0.99}).weight_decay(0.01));
  for (int i = 0; i < 50; ++i) {
    reference.zero_grad();
    loss_of(theirs).backward();
    torch::nn::utils::clip_grad_norm_({theirs}, clip);
    reference.step();
  }
  EXPECT_TRUE(torch::allclose(ours, theirs, 1e-4, 1e-5)) << ours << theirs;
  EXPECT_EQ(trainer.losses().size(), 50U);
  EXPECT_LT(trainer.losses().back(), trainer.losses().front());
}

TEST_F(TrainerTest, DecaysMatricesAlone) {
  torch::nn::Linear module(2, 2);
  module->register_parameter("scale_shift_table", torch::ones({2, 2}));
  for (const TrainedParameter& parameter : trained_parameters(*module)) {
    EXPECT_EQ(parameter.decays, parameter.name == "weight") << parameter.name;
  }
  torch::Tensor matrix = leaf(), table = leaf();
  Trainer trainer({{"matrix", matrix, 1.0, /*decays=*/true}, {"table", table}},
                  {.steps = 2, .lr = 0.1, .warmup = 0, .weight_decay = 0.5, .ema_decay = 0},
                  folder_, {});
  const auto loss = [&](std::int64_t, std::int64_t) { return 0 * (matrix + table).sum(); };
  trainer.train(loss, run_);
  EXPECT_TRUE(table.equal(leaf()));
  EXPECT_TRUE(torch::allclose(matrix, leaf() * (1 - 0.1 * 0.5) * (1 - 0.1 * 0.5)));
}

TEST_F(TrainerTest, AccumulationAverages) {
  torch::Tensor one = leaf();
  torch::Tensor two = leaf();
  Trainer whole({{"w", one}}, {.steps = 5, .lr = 0.1}, folder_ / "1", {});
  whole.train([&](std::int64_t, std::int64_t) { return (one * 3).square().mean(); }, run_);
  Trainer halves({{"w", two}}, {.steps = 5, .lr = 0.1, .accumulation = 2}, folder_ / "2", {});
  halves.train(
      [&](std::int64_t, std::int64_t micro) {
        return (two * 3).square().mean() * (micro == 0 ? 0.5 : 1.5);
      },
      run_);
  EXPECT_TRUE(torch::allclose(one, two, 1e-5, 1e-6));
}

TEST_F(TrainerTest, LearningRateWarmsUpAndDecays) {
  const Optimizer optimizer({{"w", leaf()}},
                            {.steps = 110, .lr = 1, .warmup = 10, .final_lr = 0.1});
  EXPECT_NEAR(optimizer.learning_rate(0), 0.1, 1e-12);
  EXPECT_NEAR(optimizer.learning_rate(9), 1, 1e-12);
  EXPECT_NEAR(optimizer.learning_rate(60), 0.55, 1e-12);
  EXPECT_NEAR(optimizer.learning_rate(110), 0.1, 1e-12);
}

TEST_F(TrainerTest, AverageFollowsItsRecurrence) {
  torch::Tensor w = leaf();
  Trainer trainer({{"w", w}}, {.steps = 3, .lr = 0.1, .warmup = 0, .ema_decay = 0.9}, folder_, {});
  std::vector<torch::Tensor> seen;
  trainer.train(
      [&](std::int64_t, std::int64_t) {
        seen.push_back(w.detach().clone());
        return w.square().sum();
      },
      run_);
  seen.push_back(w.detach().clone());
  torch::Tensor average = seen[0];
  for (int step = 0; step < 3; ++step) {
    const double decay = std::min(0.9, (1.0 + step) / (10.0 + step));
    average = decay * average + (1 - decay) * seen[static_cast<std::size_t>(step) + 1];
  }
  trainer.use_average();
  trainer.use_average();
  EXPECT_TRUE(torch::allclose(w, average, 1e-5, 1e-6));
  trainer.use_raw();
  EXPECT_TRUE(w.equal(seen.back()));
}

TEST_F(TrainerTest, StopSavesAndResumeGivesTheSameBits) {
  const TrainOptions options{.steps = 20, .lr = 0.05, .ema_decay = 0.9};
  const auto loss_of = [](const torch::Tensor& w, std::int64_t step) {
    // Draws from torch's own generator, which the checkpoint must restore.
    return (w * torch::rand({2, 2})).square().sum() + w.sum() * static_cast<double>(step % 3);
  };
  torch::Tensor whole = leaf();
  torch::manual_seed(5);
  Trainer first({{"w", whole}}, options, folder_ / "1", {{"lr", 0.05}});
  first.train([&](std::int64_t step, std::int64_t) { return loss_of(whole, step); }, run_);

  torch::Tensor broken = leaf();
  torch::manual_seed(5);
  {
    Trainer trainer({{"w", broken}}, options, folder_ / "2", {{"lr", 0.05}});
    EXPECT_THROW(trainer.train(
                     [&](std::int64_t step, std::int64_t) {
                       if (step == 7) stop_ = true;
                       return loss_of(broken, step);
                     },
                     run_),
                 Interrupted);
  }
  stop_ = false;
  torch::manual_seed(1234);
  torch::Tensor resumed = leaf();
  Trainer second({{"w", resumed}}, options, folder_ / "2", {{"lr", 0.05}});
  EXPECT_EQ(second.resume(), 8);
  second.train([&](std::int64_t step, std::int64_t) { return loss_of(resumed, step); }, run_);
  EXPECT_TRUE(resumed.equal(whole));
  EXPECT_EQ(second.losses(), first.losses());
  second.use_average();
  first.use_average();
  EXPECT_TRUE(resumed.equal(whole));
}

TEST_F(TrainerTest, ResumeRefusesWhatDoesNotFit) {
  torch::Tensor w = leaf();
  const auto loss = [](const torch::Tensor& value) {
    return [&value](std::int64_t, std::int64_t) { return value.square().sum(); };
  };
  Trainer trainer({{"w", w}}, {.steps = 2}, folder_, {{"lr", 0.1}});
  EXPECT_THROW(trainer.resume(), Error);
  trainer.train(loss(w), run_);
  Trainer other_option({{"w", w}}, {.steps = 2}, folder_, {{"lr", 0.2}});
  EXPECT_THROW(other_option.resume(), Error);
  torch::Tensor wide = torch::zeros({3, 2}).requires_grad_(true);
  Trainer other_shape({{"w", wide}}, {.steps = 2}, folder_, {{"lr", 0.1}});
  EXPECT_THROW(other_shape.resume(), Error);
  Trainer other_name({{"x", w}}, {.steps = 2}, folder_, {{"lr", 0.1}});
  EXPECT_THROW(other_name.resume(), Error);
}

TEST_F(TrainerTest, NonFiniteLossOrGradientStopsWithTheWeightsUntouched) {
  for (const bool in_loss : {true, false}) {
    torch::Tensor v = leaf();
    torch::Tensor w = leaf();
    torch::Tensor before;
    Trainer trainer({{"first", v}, {"second", w}}, {.steps = 9, .checkpoint_every = 2},
                    folder_ / (in_loss ? "loss" : "gradient"), {});
    std::string message;
    try {
      trainer.train(
          [&](std::int64_t step, std::int64_t) {
            const torch::Tensor loss = v.square().sum() + w.square().sum();
            if (step < 5) return loss;
            if (!before.defined()) before = w.detach().clone();
            if (in_loss) return loss * std::numeric_limits<double>::infinity();
            // sqrt at 0: the value is finite, its gradient 0 * inf.
            return loss + ((w - w).sqrt() * 0).sum();
          },
          run_);
    } catch (const Error& error) {
      message = error.what();
    }
    EXPECT_NE(message.find(in_loss ? "in the loss of step 5" : "in the gradient of step 5"),
              std::string::npos)
        << message;
    EXPECT_NE(message.find("layer second"), std::string::npos) << message;
    EXPECT_NE(message.find(trainer.checkpoint_path().string()), std::string::npos) << message;
    EXPECT_TRUE(w.equal(before));
    EXPECT_EQ(trainer.losses().size(), 5U);
  }
}

TEST_F(TrainerTest, RefusesBadOptions) {
  const auto refused = [](const TrainOptions& options) {
    try {
      validate(options);
    } catch (const Error&) {
      return true;
    }
    return false;
  };
  EXPECT_FALSE(refused({}));
  EXPECT_TRUE(refused({.steps = 0}));
  EXPECT_TRUE(refused({.lr = 0}));
  EXPECT_TRUE(refused({.lr = std::nan("")}));
  EXPECT_TRUE(refused({.final_lr = 2}));
  EXPECT_TRUE(refused({.beta1 = 1}));
  EXPECT_TRUE(refused({.clip_norm = -1}));
  EXPECT_TRUE(refused({.ema_decay = 1}));
  EXPECT_TRUE(refused({.accumulation = 0}));
  EXPECT_THROW(Trainer({}, {}, folder_, {}), Error);
}

}  // namespace
}  // namespace sla2::video

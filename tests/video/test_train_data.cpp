// Windows are a pure function of (seed, step, index); the loader hands them out in order.
#include <filesystem>
#include <fstream>
#include <set>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sla2/error.h"
#include "video/data.h"
#include "video/weights.h"

namespace sla2::video {
namespace {

namespace fs = std::filesystem;

class Notes final : public Progress {
 public:
  void note(const std::string& line) override { lines.push_back(line); }
  void begin_if_long(const std::string& task, std::int64_t total) override {
    tasks.push_back(task + " of " + std::to_string(total));
  }
  void update(std::int64_t done, std::optional<double>) override { reached = done; }
  void end() override { tasks.push_back("end"); }
  std::vector<std::string> lines, tasks;
  std::int64_t reached = 0;
};

class Latents : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::path(testing::TempDir()) / (std::string("sla2_latents_") + test->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    for (int i = 0; i < 5; ++i) save(std::to_string(i), static_cast<double>(i));
  }
  void TearDown() override { fs::remove_all(folder_); }

  void save(const std::string& name, double value, std::int64_t frames = 3) {
    save_tensors(folder_ / (name + ".safetensors"),
                 {{"latents", torch::full({2, frames, 4, 4}, value)},
                  {"text", torch::full({6, 8}, -value)}});
  }
  std::unique_ptr<Dataset> open() {
    return open_dataset({.inputs = {folder_}, .exclude = {}}, run_);
  }

  fs::path folder_;
  Notes notes_;
  video::Run run_{.progress = notes_};
};

TEST_F(Latents, ReadingIsWatched) {
  open();
  EXPECT_EQ(notes_.tasks, (std::vector<std::string>{"reading latents of 5", "end"}));
  EXPECT_EQ(notes_.reached, 5);
}

TEST_F(Latents, BatchIsAFunctionOfSeedStepAndIndex) {
  const auto data = open();
  EXPECT_TRUE(data->has_latents());
  EXPECT_EQ(data->names().size(), 5U);
  const Batch whole = data->batch(3, 10, 8);
  EXPECT_EQ(whole.latents.sizes().vec(), (std::vector<std::int64_t>{8, 2, 3, 4, 4}));
  EXPECT_TRUE(whole.latents.equal(data->batch(3, 10, 8).latents));
  EXPECT_TRUE(whole.latents.slice(0, 5, 8).equal(data->batch(3, 10, 3, 5).latents));
  EXPECT_FALSE(whole.latents.equal(data->batch(3, 11, 8).latents));
  EXPECT_FALSE(whole.latents.equal(data->batch(4, 10, 8).latents));
  EXPECT_TRUE((whole.latents.amax({1, 2, 3, 4}) == -whole.text.amax({1, 2})).all().item<bool>());
}

TEST_F(Latents, LoaderKeepsTheOrderOnAnyNumberOfThreads) {
  const auto data = open();
  for (const std::int64_t threads : {1, 4}) {
    BatchLoader loader(
        *data, {.seed = 3, .batch = 2, .micro_batches = 2, .first_step = 7, .threads = threads});
    for (std::int64_t step = 7; step < 17; ++step) {
      EXPECT_TRUE(loader.at(3, 1).latents.equal(data->batch(3, 3, 2, 2).latents));
      for (std::int64_t micro = 0; micro < 2; ++micro) {
        EXPECT_TRUE(loader.next().latents.equal(data->batch(3, step, 2, 2 * micro).latents));
      }
    }
  }
}

TEST_F(Latents, LoaderRethrows) {
  const auto data = open();
  for (int i = 0; i < 5; ++i) fs::remove(folder_ / (std::to_string(i) + ".safetensors"));
  BatchLoader loader(*data, {.batch = 2, .threads = 2});
  EXPECT_THROW(loader.next(), Error);
}

TEST_F(Latents, BadFilesAreNamedAndSkipped) {
  save("5_longer", 1, 4);
  save("6_infinite", std::numeric_limits<double>::infinity());
  save_tensors(folder_ / "7_no_text.safetensors", {{"latents", torch::zeros({2, 3, 4, 4})}});
  std::ofstream(folder_ / "8_wrong.safetensors") << "not safetensors";
  EXPECT_EQ(open()->names().size(), 5U);
  ASSERT_EQ(notes_.lines.size(), 4U);
  for (std::size_t i = 0; i < 4; ++i) {
    const std::string start = std::to_string(i + 5) + "_";
    EXPECT_NE(notes_.lines[i].find("skipped "), std::string::npos);
    EXPECT_NE(notes_.lines[i].find(start), std::string::npos) << notes_.lines[i];
  }
  for (int i = 0; i < 5; ++i) fs::remove(folder_ / (std::to_string(i) + ".safetensors"));
  fs::remove(folder_ / "5_longer.safetensors");
  EXPECT_THROW(open(), Error);
}

TEST(PixelInput, ScalesAndPermutes) {
  Batch batch;
  batch.pixels = torch::zeros({1, 2, 3, 4, 3}, torch::kUInt8);
  batch.pixels[0][1][2][3][0] = 255;
  const torch::Tensor x = to_model_input(batch, torch::kCPU);
  EXPECT_EQ(x.sizes().vec(), (std::vector<std::int64_t>{1, 3, 2, 3, 4}));
  EXPECT_TRUE(x.is_contiguous());
  EXPECT_EQ(x[0][0][1][2][3].item<float>(), 1.0F);
  EXPECT_EQ(x.sum().item<float>(), -70.0F);
}

TEST(Mix, IsSpread) {
  std::set<std::uint64_t> seen;
  for (std::int64_t seed = 0; seed < 10; ++seed) {
    for (std::int64_t step = 0; step < 100; ++step) seen.insert(mix(seed, kStreamNoise, step));
  }
  EXPECT_EQ(seen.size(), 1000U);
}

}  // namespace
}  // namespace sla2::video

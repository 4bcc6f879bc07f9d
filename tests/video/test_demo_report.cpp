// The page and report.json; the whole demo on a tiny model.
#include <gtest/gtest.h>

#include "demo_fixture.h"
#include "io/config_json.h"
#include "io/files.h"
#include "io/video_file.h"
#include "sla2/error.h"
#include "video/demo.h"
#include "video/evaluate.h"
#include "video/generate.h"
#include "video/report/report.h"

namespace sla2::video::test {
namespace {

using nlohmann::json;

json small_report() {
  json report = {{"command", "sla2 demo </script>"}};
  for (const char* key : {"machine", "versions", "model", "settings", "timing", "losses"}) {
    report[key] = json::object();
  }
  report["methods"] = {{{"method", "full"},
                        {"keep", 1},
                        {"stage", "before"},
                        {"val_loss", 0.1},
                        {"psnr_to_full_db", nullptr},
                        {"step_ms", 5}}};
  report["layers"] = {{{"layer", 0}, {"keep", 0.1}, {"error_before", 0.4}, {"error_after", 0.1}}};
  report["clips"] = {{{"name", "a"}, {"videos", {{{"file", "a.mp4"}, {"cell", 0}}}}}};
  report["sheet"] = {{"file", "sheet.mp4"}, {"columns", 1}, {"rows", 1}};
  return report;
}

TEST(Report, Base64) {
  const auto encode = [](std::string_view text) {
    return base64(std::as_bytes(std::span(text.data(), text.size())));
  };
  EXPECT_EQ(encode(""), "");
  EXPECT_EQ(encode("f"), "Zg==");
  EXPECT_EQ(encode("fo"), "Zm8=");
  EXPECT_EQ(encode("foo"), "Zm9v");
  EXPECT_EQ(encode("foob"), "Zm9vYg==");
}

TEST(Report, PageHoldsEverythingAndNeedsNoNetwork) {
  const TemporaryFolder folder;
  io::write_file(folder.path() / "sheet.mp4", "movie");
  write_report(small_report(), nullptr, folder.path());
  const std::string page = io::read_file(folder.path() / "report.html", 1 << 20);
  for (const char* section : {"videos", "routing", "speed", "training", "error", "table", "length",
                              "repeat", "credits"}) {
    EXPECT_NE(page.find(std::string("<section id=\"") + section + '"'), std::string::npos)
        << section;
  }
  EXPECT_NE(page.find("bW92aWU="), std::string::npos) << "the video is not in the page";
  EXPECT_EQ(page.find("@SLA2_REPORT"), std::string::npos);
  EXPECT_NE(page.find("<td>full before</td><td>1.00</td><td>0.1000</td><td>-</td><td>5.0</td>"),
            std::string::npos)
      << "no table for a browser without scripts";
  EXPECT_EQ(page.find("demo </script>"), std::string::npos) << "data can end its element";
  for (const char* outside : {"http://", "https://", "src=\"//", "@import", "<link"}) {
    EXPECT_EQ(page.find(outside), std::string::npos) << outside;
  }
  EXPECT_EQ(io::read_json(folder.path() / "report.json"), small_report());
}

TEST(Report, NamesWhatIsMissing) {
  json report = small_report();
  report["methods"][0].erase("val_loss");
  try {
    check_report(report);
    FAIL() << "a report without val_loss accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("methods[0]"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("val_loss"), std::string::npos) << error.what();
  }
  report = small_report();
  report["methods"][0]["stage"] = "later";
  EXPECT_THROW(check_report(report), Error);
  EXPECT_THROW(write_report(small_report(), nullptr, "/nonexistent"), Error);
}

TEST(Evaluate, Psnr) {
  const torch::Tensor zeros = torch::zeros({3, 2, 4, 4});
  EXPECT_EQ(psnr(zeros, zeros), 99);
  EXPECT_NEAR(psnr(zeros, torch::full_like(zeros, 0.2)), 20, 1e-5);
}

TEST(Demo, PresetsAndModels) {
  EXPECT_EQ(demo_preset("small").keeps.front(), 0.10);
  EXPECT_GT(demo_preset("large").stage2_steps, demo_preset("small").stage2_steps);
  EXPECT_THROW(demo_preset("huge"), Error);
}

/// Writes the model and two clips, and fills the options.
DemoOptions tiny_demo(const std::filesystem::path& folder) {
  Denoiser denoiser = small_denoiser();
  save_transformer(folder / "model", denoiser.transformer);
  save_model_card(folder / "model", denoiser.card);
  const StripeDataset data;
  for (std::int64_t i = 0; i < 2; ++i) {
    const torch::Tensor x =
        to_model_input(data.first_window(i), torch::kCPU)[0].repeat({1, 2, 2, 2});
    io::write_mp4(folder / (data.names()[static_cast<std::size_t>(i)] + ".mp4"), to_frames(x, 8));
  }
  DemoOptions options;
  options.out = folder / "out";
  options.model = folder / "model";
  options.train_inputs = {folder / "stripes.mp4", folder / "bars.mp4"};
  options.keeps = {0.25, 0.125};
  options.block_q = options.block_k = 32;
  options.stage1_steps = 2;
  options.stage2_steps = 2;
  options.sampling_steps = 2;
  options.validation_samples = 1;
  options.repeats = 1;
  return options;
}

TEST(Demo, WholeStoryAndReuse) {
  const TemporaryFolder folder;
  SilentRun silent;
  DemoOptions options = tiny_demo(folder.path());
  const json report = run_demo(options, silent.run);
  check_report(report);
  EXPECT_EQ(report["mode"], "clips");
  EXPECT_EQ(report["clips"].size(), 2U);
  EXPECT_EQ(report["methods"].size(), 7U);
  for (const json& row : report["methods"]) {
    EXPECT_TRUE(row["val_loss"].is_number()) << row;
    const bool full = row["method"] == "full", trained = row["stage"] != "before";
    EXPECT_EQ(row["psnr_denoised_db"].is_number(), !full) << row;
    EXPECT_EQ(row["psnr_to_full_db"].is_number(), trained) << row;
    EXPECT_EQ(row["videos"], full || row["stage"] == "tuned" ? 4 : trained ? 2 : 0) << row;
    EXPECT_GT(row["step_ms"].get<double>(), 0) << row;
  }
  EXPECT_GT(report["machine"]["peak_rss_mb"].get<double>(), 50);
  EXPECT_GT(report["timing"]["total_s"].get<double>(), 0);
  EXPECT_FALSE(report["timing"]["resumed"].get<bool>());
  EXPECT_EQ(report["layers"].size(), 6U);
  EXPECT_EQ(report["losses"]["stage2"][1]["points"].size(), 4U) << "SLA gets the steps of both";
  EXPECT_TRUE(std::filesystem::exists(options.out / "report.html"));

  // The second run trains and samples nothing: same losses and times of the stages.
  const json again = run_demo(options, silent.run);
  EXPECT_EQ(again["losses"], report["losses"]);
  EXPECT_EQ(again["timing"]["stages"][0], report["timing"]["stages"][0]);
  EXPECT_EQ(again["clips"], report["clips"]);
  EXPECT_TRUE(again["timing"]["resumed"].get<bool>());

  options.stage2_steps = 3;
  const json longer = run_demo(options, silent.run);
  EXPECT_EQ(longer["losses"]["stage1"], report["losses"]["stage1"]);
  EXPECT_EQ(longer["losses"]["stage2"][0]["points"].size(), 3U);

  // Another clip under the same name: everything again.
  std::filesystem::copy_file(folder.path() / "bars.mp4", folder.path() / "stripes.mp4",
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_NE(run_demo(options, silent.run)["losses"]["stage1"], report["losses"]["stage1"]);
}

TEST(Demo, AnotherSizeTrainsTheModelFirst) {
  const TemporaryFolder folder;
  SilentRun silent;
  DemoOptions options = tiny_demo(folder.path());
  options.size = {6, 24, 24};
  options.model_steps = 2;
  options.model_batch = 1;
  const json report = run_demo(options, silent.run);
  check_report(report);
  EXPECT_EQ(report["model"]["tokens"], 6 * 12 * 12);
  EXPECT_EQ(report["timing"]["stages"][0]["name"], "model at this size");
  const Denoiser given = load_denoiser(options.model, torch::kCPU);
  const Denoiser trained = load_denoiser(options.out / "model", torch::kCPU);
  EXPECT_EQ(trained.card.captions, given.card.captions);
  EXPECT_EQ(trained.card.width, 24);
  for (const auto& item : given.transformer->named_parameters()) {
    // Two steps of 5e-4, and bf16's rounding: still that model, and no longer quite.
    const torch::Tensor moved =
        (trained.transformer->named_parameters()[item.key()] - item.value()).abs();
    EXPECT_LE(moved.max().item<double>(), 2e-3 + item.value().abs().max().item<double>() / 128)
        << item.key();
  }
  EXPECT_FALSE(trained.card.caption_table.equal(given.card.caption_table));

  const json again = run_demo(options, silent.run);
  EXPECT_EQ(again["timing"]["stages"][0], report["timing"]["stages"][0]);
  EXPECT_EQ(again["losses"], report["losses"]);
}

TEST(Demo, OwnFileGoesVideoToVideo) {
  const TemporaryFolder folder;
  SilentRun silent;
  DemoOptions options = tiny_demo(folder.path());
  options.own_inputs = {folder.path() / "bars.mp4"};
  const json report = run_demo(options, silent.run);
  EXPECT_EQ(report["mode"], "video_to_video");
  EXPECT_EQ(report["clips"].size(), 1U);
  io::write_file(folder.path() / "broken.mp4", "no video");
  options.own_inputs = {folder.path() / "broken.mp4"};
  EXPECT_THROW(run_demo(options, silent.run), Error);
}

}  // namespace
}  // namespace sla2::video::test

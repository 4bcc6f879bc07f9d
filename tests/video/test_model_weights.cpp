// Folders of weights: what is saved is loaded, what does not fit is named.
#include <fstream>

#include <gtest/gtest.h>

#include "io/files.h"
#include "model_fixture.h"
#include "sla2/error.h"

namespace sla2::video::test {
namespace {

namespace fs = std::filesystem;
constexpr const char* kFile = "diffusion_pytorch_model.safetensors";

/// The message of the Error that `call` throws.
template <typename Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void replace_in_file(const fs::path& path, const std::string& from, const std::string& to) {
  std::string text = io::read_file(path, 1 << 20);
  const std::size_t at = text.find(from);
  ASSERT_NE(at, std::string::npos) << from;
  io::write_file(path, text.replace(at, from.size(), to));
}

TEST(Weights, ComeBackWholeAndSharded) {
  const torch::NoGradGuard no_grad;
  WanTransformer model = small_model();
  const SmallInputs in;
  const torch::Tensor out = model->forward(in.x, in.timestep, in.text);
  const TemporaryFolder folder;
  for (const std::int64_t shard :
       {std::int64_t{1} << 30, std::int64_t{100000}, std::int64_t{1} << 30}) {
    save_transformer(folder.path(), model, torch::kFloat32, shard);
    EXPECT_EQ(fs::exists(folder.path() / kFile), shard > 100000);
    EXPECT_EQ(fs::exists(folder.path() / (std::string(kFile) + ".index.json")), shard == 100000);
    WanTransformer loaded = load_transformer(folder.path());
    EXPECT_TRUE(torch::equal(loaded->forward(in.x, in.timestep, in.text), out));
  }
}

TEST(Weights, LoadingIsWatched) {
  class Watch final : public Progress {
   public:
    void begin_if_long(const std::string&, std::int64_t tensors) override { total = tensors; }
    void update(std::int64_t done, std::optional<double>) override { reached.push_back(done); }
    void end() override { ended = true; }
    std::int64_t total = 0;
    std::vector<std::int64_t> reached;
    bool ended = false;
  } watch;
  WanTransformer model = small_model();
  const TemporaryFolder folder;
  save_transformer(folder.path(), model, torch::kFloat32, 100000);
  load_transformer(folder.path(), torch::kFloat32, &watch);
  EXPECT_EQ(watch.total, static_cast<std::int64_t>(model->parameters().size()));
  EXPECT_EQ(std::ssize(watch.reached), watch.total);
  EXPECT_EQ(watch.reached.back(), watch.total);
  EXPECT_TRUE(watch.ended);
}

TEST(Weights, LoadingFillsNothingFirst) {
  WanTransformer model = small_model();
  const TemporaryFolder folder;
  save_transformer(folder.path(), model, torch::kFloat32);
  const auto generator = at::globalContext().defaultGenerator(torch::kCPU);
  const torch::Tensor before = generator.get_state();
  WanTransformer loaded = load_transformer(folder.path());
  EXPECT_TRUE(torch::equal(generator.get_state(), before));
  const auto saved = model->named_parameters();
  for (const auto& parameter : loaded->named_parameters()) {
    EXPECT_TRUE(torch::equal(parameter.value(), saved[parameter.key()])) << parameter.key();
    EXPECT_TRUE(parameter.value().is_contiguous() && parameter.value().requires_grad());
    EXPECT_EQ(parameter.value().storage().nbytes(), parameter.value().nbytes());
  }
  // Until then the maps, which are nearly all of a model, have a shape and no memory.
  WanTransformer hollow(small_config(), Fill::kNone);
  std::size_t held = 0, named = 0;
  for (const torch::Tensor& parameter : hollow->parameters()) {
    if (parameter.dim() > 1) held += parameter.storage().nbytes();
    if (parameter.dim() > 1) named += parameter.nbytes();
  }
  EXPECT_LT(1000 * held, named);
  EXPECT_TRUE(torch::equal(generator.get_state(), before));
}

TEST(Affine, StartsAsTorchStartsItsOwn) {
  torch::manual_seed(3);
  const Affine map(std::vector<std::int64_t>{5, 7}, Fill::kRandom);
  const Affine windows(std::vector<std::int64_t>{5, 3, 1, 2, 2}, Fill::kRandom);
  torch::manual_seed(3);
  const torch::nn::Linear linear(7, 5);
  const torch::nn::Conv3d convolution(torch::nn::Conv3dOptions(3, 5, {1, 2, 2}).stride({1, 2, 2}));
  EXPECT_TRUE(torch::equal(map->weight(), linear->weight));
  EXPECT_TRUE(torch::equal(map->named_parameters()["bias"], linear->bias));
  EXPECT_TRUE(torch::equal(windows->weight(), convolution->weight));
  EXPECT_TRUE(torch::equal(windows->named_parameters()["bias"], convolution->bias));
}

TEST(Weights, SixteenBits) {
  const torch::NoGradGuard no_grad;
  WanTransformer model = small_model();
  const SmallInputs in;
  const torch::Tensor out = model->forward(in.x, in.timestep, in.text);
  for (const torch::Dtype dtype : {torch::kBFloat16, torch::kFloat16}) {
    const TemporaryFolder folder;
    save_transformer(folder.path(), model, dtype);
    EXPECT_EQ(load_tensors(folder.path() / kFile).at("proj_out.weight").scalar_type(), dtype);
    const double bound = dtype == torch::kBFloat16 ? 3e-2 : 4e-3;
    WanTransformer wide = load_transformer(folder.path());
    EXPECT_LT(relative_error(wide->forward(in.x, in.timestep, in.text), out), bound);
    WanTransformer narrow = load_transformer(folder.path(), dtype);
    const torch::Tensor result = narrow->forward(in.x, in.timestep, in.text);
    EXPECT_EQ(result.scalar_type(), dtype);
    EXPECT_LT(relative_error(result, out), bound);
  }
}

TEST(Weights, NamesEverythingThatDoesNotFit) {
  WanTransformer model = small_model();
  const TemporaryFolder folder;
  save_transformer(folder.path(), model);
  auto tensors = load_tensors(folder.path() / kFile);
  tensors.erase("blocks.0.attn1.to_q.weight");
  tensors.erase("proj_out.bias");
  tensors["blocks.9.surprise"] = torch::zeros({2});
  tensors["patch_embedding.bias"] = torch::zeros({3});
  save_tensors(folder.path() / kFile, tensors);
  const std::string message = message_of([&] { load_transformer(folder.path()); });
  for (const char* part : {"2 missing", "blocks.0.attn1.to_q.weight", "proj_out.bias", "1 extra",
                           "blocks.9.surprise", "patch_embedding.bias", "[3]", "[64]"}) {
    EXPECT_TRUE(contains(message, part)) << part << " in: " << message;
  }
}

TEST(Weights, RefusesBrokenFolders) {
  WanTransformer model = small_model();
  const TemporaryFolder folder;
  EXPECT_THROW(load_transformer(folder.path()), Error);
  save_transformer(folder.path(), model);
  const fs::path config = folder.path() / "config.json";
  replace_in_file(config, "\"image_dim\": null", "\"image_dim\": 1280");
  EXPECT_TRUE(contains(message_of([&] { load_transformer(folder.path()); }), "image_dim"));
  replace_in_file(config, "\"image_dim\": 1280", "\"image_dmi\": null");
  EXPECT_TRUE(contains(message_of([&] { load_transformer(folder.path()); }), "image_dmi"));
  replace_in_file(config, "image_dmi", "image_dim");
  replace_in_file(config, "WanTransformer3DModel", "UNet2DModel");
  EXPECT_TRUE(contains(message_of([&] { load_transformer(folder.path()); }), "UNet2DModel"));
  replace_in_file(config, "UNet2DModel", "WanTransformer3DModel");
  fs::resize_file(folder.path() / kFile, fs::file_size(folder.path() / kFile) - 5);
  EXPECT_TRUE(contains(message_of([&] { load_transformer(folder.path()); }), kFile));
  fs::remove(folder.path() / kFile);
  EXPECT_TRUE(contains(message_of([&] { load_transformer(folder.path()); }), kFile));
}

TEST(Weights, IndexStaysInItsFolder) {
  WanTransformer model = small_model();
  const TemporaryFolder folder;
  save_transformer(folder.path(), model, torch::kFloat32, 100000);
  const fs::path index = folder.path() / (std::string(kFile) + ".index.json");
  replace_in_file(index, "\"diffusion_pytorch_model-", "\"../diffusion_pytorch_model-");
  EXPECT_TRUE(contains(message_of([&] { load_transformer(folder.path()); }), "without folders"));
}

Sla2Weights small_sla2(Method method) {
  Sla2Weights weights;
  weights.config.keep = 0.1;
  weights.config.block_q = weights.config.block_k = 32;
  weights.config.method = method;
  weights.order = {TokenOrderKind::kTiles, {2, 3, 4}};
  weights.grid = {5, 6, 7};
  weights.router = nn::RouterShape::kHead;
  weights.keeps = {0.1, 0.05};
  weights.layers = {"blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1"};
  return weights;
}

TEST(Sla2Weights, ComeBack) {
  for (const Method method : {Method::kSla2, Method::kSla}) {
    WanTransformer model = small_model();
    const Sla2Weights start = small_sla2(method);
    apply_sla2(model, start);
    {
      const torch::NoGradGuard no_grad;
      for (auto& entry : model->named_parameters()) {
        if (contains(entry.key(), ".sla2.")) entry.value().normal_();
      }
    }
    const TemporaryFolder folder;
    const Sla2Weights saved = collect_sla2(model, start);
    save_sla2(folder.path(), saved);
    const Sla2Weights loaded = load_sla2(folder.path());
    EXPECT_EQ(loaded.config.keep, 0.1);
    EXPECT_EQ(loaded.config.method, method);
    EXPECT_EQ(loaded.order.kind, TokenOrderKind::kTiles);
    EXPECT_EQ(loaded.order.tile, start.order.tile);
    EXPECT_EQ(loaded.grid, start.grid);
    EXPECT_EQ(loaded.router, nn::RouterShape::kHead);
    EXPECT_EQ(loaded.alpha, nn::AlphaShape::kBlock);
    EXPECT_EQ(loaded.keeps, start.keeps);
    EXPECT_EQ(loaded.layers, start.layers);
    ASSERT_EQ(loaded.tensors.size(), method == Method::kSla ? 3U : 9U);
    WanTransformer other = small_model();
    apply_sla2(other, loaded);
    for (const auto& [name, tensor] : collect_sla2(other, loaded).tensors) {
      EXPECT_TRUE(torch::equal(tensor, saved.tensors.at(name))) << name;
    }
    // The transformer's own files know nothing of it.
    const TemporaryFolder own;
    save_transformer(own.path(), model);
    EXPECT_NO_THROW(load_transformer(own.path()));
  }
}

TEST(Sla2Weights, NamesWhatDoesNotFit) {
  WanTransformer model = small_model();
  const Sla2Weights start = small_sla2(Method::kSla2);
  apply_sla2(model, start);
  const Sla2Weights good = collect_sla2(model, start);
  const TemporaryFolder folder;
  save_sla2(folder.path(), good);
  const fs::path json = folder.path() / "sla2.json";
  replace_in_file(json, "\"token_order\"", "\"token_odrer\"");
  EXPECT_TRUE(contains(message_of([&] { load_sla2(folder.path()); }), "token_odrer"));
  save_sla2(folder.path(), good);
  replace_in_file(json, "\"tiles\"", "\"spiral\"");
  EXPECT_TRUE(contains(message_of([&] { load_sla2(folder.path()); }), "spiral"));
  save_sla2(folder.path(), good);
  auto tensors = load_tensors(folder.path() / "sla2.safetensors");
  tensors.erase("blocks.1.attn1.proj_k");
  tensors["blocks.1.attn1.proj_out"] = torch::zeros({32, 32});
  save_tensors(folder.path() / "sla2.safetensors", tensors);
  const std::string message = message_of([&] { load_sla2(folder.path()); });
  EXPECT_TRUE(contains(message, "blocks.1.attn1.proj_k")) << message;
  EXPECT_TRUE(contains(message, "blocks.1.attn1.proj_out")) << message;

  Sla2Weights bad = good;
  bad.tensors["blocks.2.attn1.alpha_logit"] = torch::zeros({2, 3});
  EXPECT_TRUE(contains(message_of([&] { apply_sla2(model, bad); }), "blocks.2.attn1.alpha_logit"));
  bad = start;
  bad.layers = {"blocks.3.attn1"};
  EXPECT_TRUE(contains(message_of([&] { apply_sla2(model, bad); }), "blocks.3.attn1"));
  bad.layers = {"blocks.0.attn2"};
  EXPECT_TRUE(contains(message_of([&] { apply_sla2(model, bad); }), "blocks.0.attn2"));
}

TEST(ModelCard, ComesBack) {
  const TemporaryFolder folder;
  EXPECT_FALSE(has_model_card(folder.path()));
  ModelCard card;
  card.frames = 4;
  card.fps = 7.5;
  card.captions = {"a", "b"};
  card.caption_table = torch::randn({3, 4, 12});
  save_model_card(folder.path(), card);
  ASSERT_TRUE(has_model_card(folder.path()));
  const ModelCard loaded = load_model_card(folder.path());
  EXPECT_EQ(loaded.frames, 4);
  EXPECT_EQ(loaded.fps, 7.5);
  EXPECT_EQ(loaded.captions, card.captions);
  EXPECT_TRUE(torch::equal(loaded.caption_table, card.caption_table));
  card.caption_table = torch::randn({2, 4, 12});
  EXPECT_THROW(save_model_card(folder.path(), card), Error);
  card.caption_table = torch::randn({3, 4, 12});
  card.prediction = "noise";
  EXPECT_THROW(save_model_card(folder.path(), card), Error);
}

}  // namespace
}  // namespace sla2::video::test

// Token order, checkpointing, observers and SLA2 inside the transformer.
#include <algorithm>
#include <limits>
#include <numeric>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>

#include "model_fixture.h"
#include "sla2/error.h"
#include "video/recompute.h"

namespace sla2::video::test {
namespace {

using Grid = std::array<std::int64_t, 3>;

class Permutation : public testing::TestWithParam<std::pair<Grid, Grid>> {};

TEST_P(Permutation, IsABijectionOfContiguousTiles) {
  const auto [grid, tile] = GetParam();
  const TokenOrder order{TokenOrderKind::kTiles, tile};
  const auto permutation = token_permutation(order, grid);
  std::vector<std::int64_t> sorted = permutation;
  std::ranges::sort(sorted);
  std::vector<std::int64_t> all(static_cast<std::size_t>(grid[0] * grid[1] * grid[2]));
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(sorted, all);
  const auto inverse = inverse_permutation(permutation);
  for (std::size_t i = 0; i < permutation.size(); ++i) {
    EXPECT_EQ(inverse[static_cast<std::size_t>(permutation[i])], static_cast<std::int64_t>(i));
  }
  // A tile's tokens follow one another, and tiles come in raster order.
  const auto tile_of = [&](std::int64_t token) {
    const std::int64_t w = token % grid[2], h = token / grid[2] % grid[1],
                       f = token / (grid[2] * grid[1]);
    return Grid{f / tile[0], h / tile[1], w / tile[2]};
  };
  EXPECT_TRUE(std::ranges::is_sorted(permutation, {}, tile_of));
  // Raster order inside a tile.
  for (std::size_t i = 1; i < permutation.size(); ++i) {
    if (tile_of(permutation[i]) == tile_of(permutation[i - 1])) {
      EXPECT_LT(permutation[i - 1], permutation[i]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Grids, Permutation,
                         testing::Values(std::pair{Grid{4, 4, 4}, Grid{2, 2, 2}},
                                         std::pair{Grid{5, 6, 7}, Grid{4, 4, 4}},
                                         std::pair{Grid{1, 3, 9}, Grid{4, 2, 4}},
                                         std::pair{Grid{3, 1, 1}, Grid{1, 1, 1}},
                                         std::pair{Grid{2, 5, 3}, Grid{9, 9, 9}}));

TEST(TokenOrder, KnownSmallCase) {
  EXPECT_EQ(token_permutation({TokenOrderKind::kTiles, {1, 2, 2}}, {1, 2, 3}),
            (std::vector<std::int64_t>{0, 1, 3, 4, 2, 5}));
  EXPECT_EQ(token_permutation({TokenOrderKind::kRaster, {1, 2, 2}}, {1, 2, 3}),
            (std::vector<std::int64_t>{0, 1, 2, 3, 4, 5}));
}

TEST(TokenOrder, RefusesNonsense) {
  EXPECT_THROW(token_permutation({TokenOrderKind::kTiles, {0, 1, 1}}, {1, 2, 3}), Error);
  EXPECT_THROW(token_permutation({}, {1, -2, 3}), Error);
  EXPECT_THROW(token_permutation({}, {1 << 20, 1 << 20, 1 << 20}), Error);
  EXPECT_THROW(inverse_permutation({0, 0}), Error);
  EXPECT_THROW(inverse_permutation({0, 2}), Error);
}

TEST(Transformer, TilesWithFullAttentionEqualRaster) {
  const torch::NoGradGuard no_grad;
  WanTransformer model = small_model();
  const SmallInputs in;
  const torch::Tensor raster = model->forward(in.x, in.timestep, in.text);
  ASSERT_EQ(raster.sizes(), in.x.sizes());
  model->set_token_order({TokenOrderKind::kTiles, {2, 4, 3}});
  // Sums run in another order: a few roundings of fp32.
  EXPECT_LT(relative_error(model->forward(in.x, in.timestep, in.text), raster), 2e-6);
  model->set_token_order({TokenOrderKind::kRaster});
  EXPECT_TRUE(torch::equal(model->forward(in.x, in.timestep, in.text), raster));
}

TEST(Transformer, Sla2ThatKeepsAllEqualsFull) {
  const torch::NoGradGuard no_grad;
  WanTransformer model = small_model();
  const SmallInputs in;
  const torch::Tensor full = model->forward(in.x, in.timestep, in.text);
  Sla2Weights weights;
  weights.config.keep = 1;
  weights.config.precision = Precision::kFp32;
  weights.config.block_q = weights.config.block_k = 32;
  weights.order = {TokenOrderKind::kTiles, {4, 4, 4}};
  weights.grid = {5, 6, 7};
  weights.layers = {"blocks.0.attn1", "blocks.2.attn1"};
  apply_sla2(model, weights);
  EXPECT_TRUE(model->attention(1).is_empty());
  EXPECT_LT(relative_error(model->forward(in.x, in.timestep, in.text), full), 5e-6);
  // It is the operator that runs: with few keys kept the result is another.
  for (const std::int64_t layer : {0, 2}) model->attention(layer)->options.config.keep = 0.2;
  EXPECT_GT(relative_error(model->forward(in.x, in.timestep, in.text), full), 1e-4);
  remove_sla2(model);
  EXPECT_TRUE(torch::equal(model->forward(in.x, in.timestep, in.text), full));
}

std::vector<torch::Tensor> gradients(WanTransformer& model, const SmallInputs& in, bool recompute,
                                     bool bf16) {
  model->zero_grad();
  model->set_activation_checkpointing(recompute);
  at::autocast::set_autocast_enabled(at::kCPU, bf16);
  const torch::Tensor text = in.text.detach().clone().requires_grad_();
  const torch::Tensor out = model->forward(in.x, in.timestep, text);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  (out.to(torch::kFloat32) * torch::linspace(-1, 1, out.numel()).view(out.sizes()))
      .sum()
      .backward();
  std::vector<torch::Tensor> result{out.detach(), text.grad()};
  for (const auto& entry : model->named_parameters()) {
    EXPECT_TRUE(entry.value().grad().defined()) << entry.key();
    if (!entry.value().grad().defined()) continue;
    result.push_back(entry.value().grad().clone());
  }
  return result;
}

TEST(Transformer, CheckpointingGivesTheSameGradients) {
  for (const bool bf16 : {false, true}) {
    WanTransformer model = small_model();
    const SmallInputs in;
    const auto plain = gradients(model, in, false, bf16);
    const auto recomputed = gradients(model, in, true, bf16);
    ASSERT_EQ(plain.size(), recomputed.size());
    for (std::size_t i = 0; i < plain.size(); ++i) {
      // What several blocks share is summed in another order.
      EXPECT_LE(relative_error(recomputed[i], plain[i]), bf16 ? 2e-2 : 1e-5) << i << " " << bf16;
    }
    EXPECT_TRUE(torch::equal(recomputed[0], plain[0]));
  }
}

TEST(Transformer, CheckpointingWorksUnderAutogradGrad) {
  WanTransformer model = small_model();
  const SmallInputs in;
  const auto parameters = model->parameters();
  const auto take = [&](bool on) {
    model->set_activation_checkpointing(on);
    return torch::autograd::grad({model->forward(in.x, in.timestep, in.text).square().sum()},
                                 parameters);
  };
  const auto plain = take(false), recomputed = take(true);
  for (std::size_t i = 0; i < plain.size(); ++i) {
    EXPECT_LE(relative_error(recomputed[i], plain[i]), 1e-5) << i;
    EXPECT_FALSE(parameters[i].grad().defined());
  }
}

TEST(Transformer, FrozenParametersGetNoGradient) {
  WanTransformer model = small_model();
  const SmallInputs in;
  model->set_activation_checkpointing(true);
  for (auto& entry : model->named_parameters()) {
    entry.value().set_requires_grad(entry.key().find("to_q") != std::string::npos);
  }
  model->forward(in.x, in.timestep, in.text).square().sum().backward();
  for (const auto& entry : model->named_parameters()) {
    EXPECT_EQ(entry.value().grad().defined(), entry.value().requires_grad()) << entry.key();
  }
}

TEST(Transformer, ObserverSeesEveryLayerOnce) {
  for (const bool recompute : {false, true}) {
    WanTransformer model = small_model();
    const SmallInputs in;
    std::vector<std::int64_t> layers;
    model->set_observer([&](std::int64_t layer, const torch::Tensor& q, const torch::Tensor& k,
                            const torch::Tensor& v) {
      layers.push_back(layer);
      for (const torch::Tensor& t : {q, k, v}) {
        EXPECT_EQ(t.sizes(), (std::vector<std::int64_t>{2, 2, 210, 32}));
        EXPECT_EQ(t.stride(3), 1);
      }
      return torch::Tensor();
    });
    model->set_activation_checkpointing(recompute);
    model->forward(in.x, in.timestep, in.text).sum().backward();
    EXPECT_EQ(layers, (std::vector<std::int64_t>{0, 1, 2}));
  }
}

TEST(Transformer, TakesAnObserversAttention) {
  const torch::NoGradGuard no_grad;
  WanTransformer model = small_model();
  const SmallInputs in;
  const torch::Tensor plain = model->forward(in.x, in.timestep, in.text);
  const auto forward = [&](double factor) {
    model->set_observer([=](std::int64_t layer, const torch::Tensor& q, const torch::Tensor& k,
                            const torch::Tensor& v) {
      return layer == 1 ? factor * at::scaled_dot_product_attention(q, k, v) : torch::Tensor();
    });
    return model->forward(in.x, in.timestep, in.text);
  };
  EXPECT_TRUE(forward(1).equal(plain));
  EXPECT_FALSE(forward(2).allclose(plain));
}

TEST(Transformer, NamesTheFirstLayerThatIsNotFinite) {
  const torch::NoGradGuard no_grad;
  WanTransformer model = small_model();
  const SmallInputs in;
  model->set_check_finite(true);
  model->forward(in.x, in.timestep, in.text);
  EXPECT_EQ(model->first_non_finite_layer(), std::nullopt);
  model->named_parameters()["blocks.1.attn2.to_out.0.bias"].fill_(
      std::numeric_limits<float>::quiet_NaN());
  model->forward(in.x, in.timestep, in.text);
  EXPECT_EQ(model->first_non_finite_layer(), "blocks.1.attn2");
  model->forward(in.x / 0, in.timestep, in.text);
  EXPECT_EQ(model->first_non_finite_layer(), "patch_embedding");
}

TEST(Transformer, RefusesInputsThatDoNotFit) {
  const torch::NoGradGuard no_grad;
  WanTransformer model = small_model();
  const SmallInputs in;
  EXPECT_THROW(model->forward(in.x.squeeze(0)[0], in.timestep, in.text), Error);
  EXPECT_THROW(model->forward(in.x.narrow(3, 0, 11), in.timestep, in.text), Error);
  EXPECT_THROW(model->forward(in.x, in.timestep.narrow(0, 0, 1), in.text), Error);
  EXPECT_THROW(model->forward(in.x, in.timestep, in.text.narrow(2, 0, 3)), Error);
  EXPECT_THROW(static_cast<void>(model->grid(65, 4, 4)), Error);
  EXPECT_THROW(static_cast<void>(model->attention(3)), Error);
  WanConfig odd = small_config();
  odd.attention_head_dim = 33;
  EXPECT_THROW(WanTransformer{odd}, Error);
}

}  // namespace
}  // namespace sla2::video::test

#include "video/wan_transformer.h"

#include <cmath>
#include <utility>

#include <ATen/autocast_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "sla2/error.h"
#include "video/recompute.h"
#include "video/rotary.h"
#include "video/wan_blocks.h"

namespace sla2::video {
namespace {

using Grid = std::array<std::int64_t, 3>;

std::string text_of(at::IntArrayRef sizes) { return fmt::format("[{}]", fmt::join(sizes, ", ")); }

/// x [B, C, F, H, W] -> [B, N, C * pt * ph * pw], tokens in raster order.
torch::Tensor patchify(const torch::Tensor& x, const Grid& grid, const Grid& patch) {
  return x.reshape({x.size(0), x.size(1), grid[0], patch[0], grid[1], patch[1], grid[2], patch[2]})
      .permute({0, 2, 4, 6, 1, 3, 5, 7})
      .reshape({x.size(0), grid[0] * grid[1] * grid[2], -1});
}

/// [B, N, pt * ph * pw * C] -> [B, C, F, H, W].
torch::Tensor unpatchify(const torch::Tensor& tokens, const Grid& grid, const Grid& patch) {
  return tokens
      .reshape({tokens.size(0), grid[0], grid[1], grid[2], patch[0], patch[1], patch[2], -1})
      .permute({0, 7, 1, 4, 2, 5, 3, 6})
      .reshape({tokens.size(0), -1, grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2]});
}

}  // namespace

struct WanTransformerImpl::State {
  /// What depends on the grid, the token order and the device alone.
  struct Layout {
    Grid grid{};
    torch::Device device = torch::kCPU;
    torch::Tensor rotary;       // [N, 1, D / 2] complex64, in token order
    torch::Tensor permutation;  // [N] int64; undefined: raster
    torch::Tensor inverse;      // [N] int64; undefined: raster
  };

  WanConfig config;
  Affine patch_embedding{nullptr};  // of a convolution whose windows do not overlap
  ConditionEmbedder condition_embedder{nullptr};
  torch::nn::ModuleList blocks;
  Affine proj_out{nullptr};
  torch::Tensor scale_shift_table;  // [1, 2, dim]

  TokenOrder order{.kind = TokenOrderKind::kRaster};
  std::optional<Layout> layout;  // of the last forward
  SelfAttentionObserver observer;
  bool checkpointing = false;
  bool check_finite = false;
  FiniteLog finite;

  WanBlock block(std::int64_t layer) const {
    if (layer < 0 || layer >= config.num_layers) {
      throw Error(fmt::format("layer must be from 0 to {}, got {}", config.num_layers - 1, layer));
    }
    return std::dynamic_pointer_cast<WanBlockImpl>(blocks->ptr(static_cast<std::size_t>(layer)));
  }
  const Layout& layout_for(const Grid& grid, const torch::Device& device);
  void check_inputs(const torch::Tensor& x, const torch::Tensor& timestep,
                    const torch::Tensor& text) const;
  void check(const char* layer, const torch::Tensor& out) {
    if (check_finite) finite.emplace_back(layer, torch::isfinite(out.detach()).all());
  }
};

const WanTransformerImpl::State::Layout& WanTransformerImpl::State::layout_for(
    const Grid& grid, const torch::Device& device) {
  if (layout && layout->grid == grid && layout->device == device) return *layout;
  // The cache outlives this forward: it must be usable by one that records gradients.
  const c10::InferenceMode outside_inference_mode(false);
  const torch::NoGradGuard no_grad;
  Layout fresh{.grid = grid, .device = device, .rotary = {}, .permutation = {}, .inverse = {}};
  torch::Tensor rotary = rotary_table(config.attention_head_dim, grid);
  if (order.kind != TokenOrderKind::kRaster) {
    const std::vector<std::int64_t> permutation = token_permutation(order, grid);
    fresh.permutation = torch::tensor(permutation, torch::kInt64);
    rotary = rotary.index_select(0, fresh.permutation);
    fresh.permutation = fresh.permutation.to(device);
    fresh.inverse = torch::tensor(inverse_permutation(permutation), torch::kInt64).to(device);
  }
  fresh.rotary = rotary.to(device);
  layout = std::move(fresh);
  return *layout;
}

void WanTransformerImpl::State::check_inputs(const torch::Tensor& x, const torch::Tensor& timestep,
                                             const torch::Tensor& text) const {
  if (x.dim() != 5 || x.size(0) < 1 || x.size(1) != config.in_channels) {
    throw Error(fmt::format("x must be [batch, {}, frames, height, width], got {}",
                            config.in_channels, text_of(x.sizes())));
  }
  if (timestep.dim() != 1 || timestep.size(0) != x.size(0)) {
    throw Error(fmt::format("timestep must be [batch] with batch {}, got {}", x.size(0),
                            text_of(timestep.sizes())));
  }
  if (text.dim() != 3 || text.size(0) != x.size(0) || text.size(1) < 1 ||
      text.size(2) != config.text_dim) {
    throw Error(fmt::format("text must be [batch, length, {}] with batch {}, got {}",
                            config.text_dim, x.size(0), text_of(text.sizes())));
  }
}

WanTransformerImpl::WanTransformerImpl(const WanConfig& config, Fill fill)
    : state_(std::make_shared<State>()) {
  io::validate(config);
  State& state = *state_;
  const std::int64_t dim = config.dim();
  const auto& patch = config.patch_size;
  state.config = config;
  state.patch_embedding = register_module(
      "patch_embedding",
      Affine(std::vector{dim, config.in_channels, patch[0], patch[1], patch[2]}, fill));
  state.condition_embedder = register_module("condition_embedder", ConditionEmbedder(config, fill));
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    state.blocks->push_back(WanBlock(config, fill));
  }
  register_module("blocks", state.blocks);
  state.proj_out = register_module(
      "proj_out",
      Affine(std::vector{config.out_channels * patch[0] * patch[1] * patch[2], dim}, fill));
  state.scale_shift_table = register_parameter("scale_shift_table", new_table(2, dim, fill));
}

torch::Tensor WanTransformerImpl::forward(const torch::Tensor& x, const torch::Tensor& timestep,
                                          const torch::Tensor& text) {
  State& state = *state_;
  state.check_inputs(x, timestep, text);
  state.finite.clear();
  const Grid tokens_grid = grid(x.size(2), x.size(3), x.size(4));
  const State::Layout& layout = state.layout_for(tokens_grid, x.device());
  const bool autocast = at::autocast::is_autocast_enabled(x.device().type());
  const auto typed = [&](const torch::Tensor& t, const torch::Tensor& weight) {
    return autocast ? t : t.to(weight.scalar_type());
  };

  torch::Tensor patches = patchify(x, tokens_grid, state.config.patch_size);
  if (layout.permutation.defined()) patches = patches.index_select(1, layout.permutation);
  const torch::Tensor& weight = state.patch_embedding->weight();
  torch::Tensor hidden = state.patch_embedding(typed(patches, weight));
  state.check("patch_embedding", hidden);

  const auto [embedding, modulation] = state.condition_embedder->embed_time(timestep);
  const torch::Tensor words = state.condition_embedder->embed_text(typed(text, weight));
  state.check("condition_embedder.time_proj", modulation);
  state.check("condition_embedder.text_embedder", words);

  const bool recompute = state.checkpointing && torch::GradMode::is_enabled();
  for (std::int64_t layer = 0; layer < state.config.num_layers; ++layer) {
    WanBlock block = state.block(layer);
    const BlockWatch watch{.layer = layer,
                           .observer = state.observer ? &state.observer : nullptr,
                           .finite = state.check_finite ? &state.finite : nullptr};
    if (recompute) {
      const auto body = [block, watch, rotary = layout.rotary](
                            const std::vector<torch::Tensor>& inputs, bool again) mutable {
        return block->forward(inputs[0], inputs[1], inputs[2], rotary,
                              again ? BlockWatch{} : watch);
      };
      hidden = recompute_in_backward(body, {hidden, words, modulation}, block->parameters());
    } else {
      hidden = block->forward(hidden, words, modulation, layout.rotary, watch);
    }
  }

  const auto table =
      (state.scale_shift_table.to(torch::kFloat32) + embedding.to(torch::kFloat32).unsqueeze(1))
          .split(1, 1);
  torch::Tensor out = state.proj_out(modulated_norm(hidden, table[1], table[0], state.config.eps));
  state.check("proj_out", out);
  if (layout.inverse.defined()) out = out.index_select(1, layout.inverse);
  return unpatchify(out, tokens_grid, state.config.patch_size);
}

const WanConfig& WanTransformerImpl::config() const { return state_->config; }

std::array<std::int64_t, 3> WanTransformerImpl::grid(std::int64_t frames, std::int64_t height,
                                                     std::int64_t width) const {
  const std::array<std::int64_t, 3> size{frames, height, width};
  static constexpr std::array kNames{"frames", "height", "width"};
  const WanConfig& config = state_->config;
  Grid result{};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const std::int64_t patch = config.patch_size[axis];
    if (size[axis] < 1 || size[axis] % patch != 0 || size[axis] / patch > config.rope_max_seq_len) {
      throw Error(fmt::format("{} must be a multiple of {} from {} to {}, got {}", kNames[axis],
                              patch, patch, patch * config.rope_max_seq_len, size[axis]));
    }
    result[axis] = size[axis] / patch;
  }
  return result;
}

void WanTransformerImpl::set_attention(std::int64_t layer, sla2::nn::Attention attention) {
  const WanConfig& config = state_->config;
  if (!attention.is_empty() && (attention->options.num_heads != config.num_attention_heads ||
                                attention->options.head_dim != config.attention_head_dim)) {
    throw Error(fmt::format("attention must have {} heads of {}, got {} heads of {}",
                            config.num_attention_heads, config.attention_head_dim,
                            attention->options.num_heads, attention->options.head_dim));
  }
  state_->block(layer)->attn1->set_sparse(attention);
}

sla2::nn::Attention WanTransformerImpl::attention(std::int64_t layer) const {
  return state_->block(layer)->attn1->sparse();
}

void WanTransformerImpl::set_token_order(const TokenOrder& order) {
  token_permutation(order, {1, 1, 1});  // refuses a tile that is not one
  state_->order = order;
  state_->layout.reset();
}

void WanTransformerImpl::set_observer(SelfAttentionObserver observer) {
  state_->observer = std::move(observer);
}

void WanTransformerImpl::set_activation_checkpointing(bool on) { state_->checkpointing = on; }

void WanTransformerImpl::set_check_finite(bool on) {
  state_->check_finite = on;
  state_->finite.clear();
}

std::optional<std::string> WanTransformerImpl::first_non_finite_layer() const {
  if (state_->finite.empty()) return std::nullopt;
  std::vector<torch::Tensor> flags;
  for (const auto& [layer, finite] : state_->finite) flags.push_back(finite);
  const torch::Tensor all = torch::stack(flags).cpu();
  for (std::size_t i = 0; i < state_->finite.size(); ++i) {
    if (!all[static_cast<std::int64_t>(i)].item<bool>()) return state_->finite[i].first;
  }
  return std::nullopt;
}

}  // namespace sla2::video

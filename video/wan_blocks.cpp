#include "video/wan_blocks.h"

#include <cmath>

#include <ATen/autocast_mode.h>
#include <fmt/format.h>

#include "video/rotary.h"

namespace sla2::video {
namespace {

/// A module that only gives its children a place in the path of names.
class GroupImpl : public torch::nn::Module {
 public:
  Affine add_linear(const std::string& name, std::int64_t in, std::int64_t out, Fill fill) {
    return register_module(name, Affine(std::vector{out, in}, fill));
  }
};
TORCH_MODULE(Group);

torch::Tensor gelu_tanh(const torch::Tensor& x) { return torch::gelu(x, "tanh"); }

/// Autocast switched off for one device while it lives.
class WithoutAutocast {
 public:
  explicit WithoutAutocast(at::DeviceType device)
      : device_(device), enabled_(at::autocast::is_autocast_enabled(device)) {
    at::autocast::set_autocast_enabled(device_, false);
  }
  ~WithoutAutocast() { at::autocast::set_autocast_enabled(device_, enabled_); }
  WithoutAutocast(const WithoutAutocast&) = delete;
  WithoutAutocast& operator=(const WithoutAutocast&) = delete;

 private:
  at::DeviceType device_;
  bool enabled_;
};

/// Cosines, then sines of timestep * 10000^(-j / half), fp32 [B, features].
torch::Tensor timestep_features(const torch::Tensor& timestep, std::int64_t features) {
  const std::int64_t half = features / 2;
  const torch::Tensor frequencies =
      (torch::arange(half, timestep.options().dtype(torch::kFloat32)) * -std::log(10000.0) /
       static_cast<double>(half))
          .exp();
  const torch::Tensor angles = timestep.to(torch::kFloat32).unsqueeze(1) * frequencies.unsqueeze(0);
  const torch::Tensor out = torch::cat({angles.cos(), angles.sin()}, 1);
  return features % 2 == 0 ? out : torch::constant_pad_nd(out, {0, 1});
}

}  // namespace

void BlockWatch::check(const char* part, const torch::Tensor& out) const {
  if (finite == nullptr) return;
  finite->emplace_back(fmt::format("blocks.{}.{}", layer, part),
                       torch::isfinite(out.detach()).all());
}

torch::Tensor layer_norm_fp32(const torch::Tensor& x, double eps, const torch::Tensor& weight,
                              const torch::Tensor& bias) {
  const auto fp32 = [](const torch::Tensor& t) { return t.defined() ? t.to(torch::kFloat32) : t; };
  return torch::layer_norm(fp32(x), {x.size(-1)}, fp32(weight), fp32(bias), eps);
}

torch::Tensor modulated_norm(const torch::Tensor& x, const torch::Tensor& scale,
                             const torch::Tensor& shift, double eps) {
  return torch::addcmul(shift, layer_norm_fp32(x, eps), scale + 1).to(x.scalar_type());
}

RmsNormImpl::RmsNormImpl(std::int64_t dim, double eps) : eps_(eps) {
  weight_ = register_parameter("weight", torch::ones({dim}));
}

torch::Tensor RmsNormImpl::forward(const torch::Tensor& x) {
  return torch::rms_norm(x.to(torch::kFloat32), {x.size(-1)}, weight_.to(torch::kFloat32), eps_);
}

WanAttentionImpl::WanAttentionImpl(const WanConfig& config, Fill fill)
    : num_heads_(config.num_attention_heads) {
  const std::int64_t dim = config.dim();
  const std::vector square{dim, dim};
  to_q_ = register_module("to_q", Affine(square, fill));
  to_k_ = register_module("to_k", Affine(square, fill));
  to_v_ = register_module("to_v", Affine(square, fill));
  to_out_ = register_module("to_out", torch::nn::ModuleList(Affine(square, fill)));
  norm_q_ = register_module("norm_q", RmsNorm(dim, config.eps));
  norm_k_ = register_module("norm_k", RmsNorm(dim, config.eps));
}

void WanAttentionImpl::set_sparse(const sla2::nn::Attention& attention) {
  if (!sparse_.is_empty()) unregister_module("sla2");
  sparse_ = attention;
  if (!sparse_.is_empty()) {
    register_module("sla2", sparse_);
    sparse_->to(to_q_->weight().device());
  }
}

torch::Tensor WanAttentionImpl::split_heads(const torch::Tensor& x) const {
  return x.unflatten(2, {num_heads_, x.size(2) / num_heads_});
}

torch::Tensor WanAttentionImpl::project_out(const torch::Tensor& heads) {
  return to_out_->at<AffineImpl>(0).forward(heads.transpose(1, 2).flatten(2));
}

torch::Tensor WanAttentionImpl::self_attention(const torch::Tensor& x, const torch::Tensor& rotary,
                                               const BlockWatch& watch) {
  const torch::Tensor v = split_heads(to_v_(x)).transpose(1, 2);
  const auto rotated = [&](const torch::Tensor& normed) {
    return rotate(split_heads(normed), rotary).to(v.scalar_type()).transpose(1, 2);
  };
  const torch::Tensor q = rotated(norm_q_(to_q_(x)));
  const torch::Tensor k = rotated(norm_k_(to_k_(x)));
  torch::Tensor heads;
  if (watch.observer != nullptr && *watch.observer) {
    heads = (*watch.observer)(watch.layer, q, k, v);
  }
  if (!heads.defined()) {
    heads =
        sparse_.is_empty() ? at::scaled_dot_product_attention(q, k, v) : sparse_->forward(q, k, v);
  }
  return project_out(heads);
}

torch::Tensor WanAttentionImpl::cross_attention(const torch::Tensor& x, const torch::Tensor& text) {
  const torch::Tensor v = split_heads(to_v_(text)).transpose(1, 2);
  const auto heads = [&](const torch::Tensor& normed) {
    return split_heads(normed.to(v.scalar_type())).transpose(1, 2);
  };
  return project_out(
      at::scaled_dot_product_attention(heads(norm_q_(to_q_(x))), heads(norm_k_(to_k_(text))), v));
}

WanBlockImpl::WanBlockImpl(const WanConfig& config, Fill fill) : eps_(config.eps) {
  const std::int64_t dim = config.dim();
  attn1 = register_module("attn1", WanAttention(config, fill));
  attn2_ = register_module("attn2", WanAttention(config, fill));
  if (config.cross_attn_norm) {
    norm2_ = register_module(
        "norm2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({dim}).eps(config.eps)));
  }
  Group first;
  ffn_in_ = first->add_linear("proj", dim, config.ffn_dim, fill);
  ffn_out_ = Affine(std::vector{dim, config.ffn_dim}, fill);
  torch::nn::ModuleList net;
  net->push_back(first);
  net->push_back(torch::nn::Identity());  // diffusers counts a dropout here
  net->push_back(ffn_out_);
  register_module("ffn", Group())->register_module("net", net);
  scale_shift_table_ = register_parameter("scale_shift_table", new_table(6, dim, fill));
}

torch::Tensor WanBlockImpl::forward(const torch::Tensor& x, const torch::Tensor& text,
                                    const torch::Tensor& modulation, const torch::Tensor& rotary,
                                    const BlockWatch& watch) {
  const at::ScalarType type = x.scalar_type();
  const auto table =
      (scale_shift_table_.to(torch::kFloat32) + modulation.to(torch::kFloat32)).split(1, 1);
  const torch::Tensor &shift1 = table[0], &scale1 = table[1], &gate1 = table[2];
  const torch::Tensor &shift3 = table[3], &scale3 = table[4], &gate3 = table[5];
  const auto add_gated = [type](const torch::Tensor& to, const torch::Tensor& what,
                                const torch::Tensor& gate) {
    return torch::addcmul(to.to(torch::kFloat32), what.to(torch::kFloat32), gate).to(type);
  };

  const torch::Tensor from_self =
      attn1->self_attention(modulated_norm(x, scale1, shift1, eps_), rotary, watch);
  watch.check("attn1", from_self);
  torch::Tensor hidden = add_gated(x, from_self, gate1);

  const torch::Tensor normed =
      norm2_.is_empty() ? hidden
                        : layer_norm_fp32(hidden, eps_, norm2_->weight, norm2_->bias).to(type);
  const torch::Tensor from_text = attn2_->cross_attention(normed, text);
  watch.check("attn2", from_text);
  hidden = hidden + from_text;

  const torch::Tensor from_ffn =
      ffn_out_(gelu_tanh(ffn_in_(modulated_norm(hidden, scale3, shift3, eps_))));
  watch.check("ffn", from_ffn);
  return add_gated(hidden, from_ffn, gate3);
}

ConditionEmbedderImpl::ConditionEmbedderImpl(const WanConfig& config, Fill fill)
    : freq_dim_(config.freq_dim) {
  const std::int64_t dim = config.dim();
  Group time = register_module("time_embedder", Group());
  time_in_ = time->add_linear("linear_1", freq_dim_, dim, fill);
  time_out_ = time->add_linear("linear_2", dim, dim, fill);
  time_proj_ = register_module("time_proj", Affine(std::vector{6 * dim, dim}, fill));
  Group text = register_module("text_embedder", Group());
  text_in_ = text->add_linear("linear_1", config.text_dim, dim, fill);
  text_out_ = text->add_linear("linear_2", dim, dim, fill);
}

std::pair<torch::Tensor, torch::Tensor> ConditionEmbedderImpl::embed_time(
    const torch::Tensor& timestep) {
  const WithoutAutocast exact(timestep.device().type());
  const torch::Tensor features =
      timestep_features(timestep, freq_dim_).to(time_in_->weight().scalar_type());
  const torch::Tensor embedding =
      time_out_(torch::silu(time_in_(features))).to(time_proj_->weight().scalar_type());
  return {embedding, time_proj_(torch::silu(embedding)).unflatten(1, {6, embedding.size(1)})};
}

torch::Tensor ConditionEmbedderImpl::embed_text(const torch::Tensor& text) {
  return text_out_(gelu_tanh(text_in_(text)));
}

}  // namespace sla2::video

// The operator in libtorch: autograd over the sla2:: operators of torch_ops, and a module.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include <torch/torch.h>

#include "sla2/config.h"

namespace sla2::nn {

/// Optional tensors and ranges of one call; shapes as in sla2/attention.h, any float dtype for
/// parameters, requires_grad respected.
struct AttentionArguments {
  torch::Tensor proj_q;       // [d, d] or [H, d, d]; undefined: identity
  torch::Tensor proj_k;       // likewise
  torch::Tensor alpha_logit;  // [H, M] or [H, 1]; undefined: zeros. Another M is resampled linearly
  torch::Tensor proj_out;     // [dv, dv], method sla; undefined: zeros
  torch::Tensor key_lengths;  // [B] int64; undefined: Nk
  std::optional<std::array<std::int64_t, 2>> protected_keys;
  torch::Tensor given_blocks;   // int32 [B, H, M, L] to use instead of routing (hard)
  torch::Tensor given_weights;  // fp32 [B, H, M, T] to use instead of routing (soft)
};

struct AttentionParts {
  torch::Tensor out, out_sparse, out_linear;  // [B, H, Nq, dv]
  torch::Tensor lse;                          // [B, H, Nq] fp32
  torch::Tensor blocks;                       // [B, H, M, L] int32
};

struct RoutingTensors {
  torch::Tensor blocks;   // int32 [B, H, M, L]
  torch::Tensor weights;  // fp32 [B, H, M, T] with soft routing, else undefined
};

/// q [B, H, Nq, d], k [B, Hkv, Nk, d], v [B, Hkv, Nk, dv], unit last stride. Differentiable in q,
/// k, v, alpha_logit, proj_out and, with soft routing, proj_q and proj_k. Throws sla2::Error.
torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                        const AttentionArguments& arguments, const Config& config);
AttentionParts attention_parts(const torch::Tensor& q, const torch::Tensor& k,
                               const torch::Tensor& v, const AttentionArguments& arguments,
                               const Config& config);
RoutingTensors route(const torch::Tensor& q, const torch::Tensor& k,
                     const AttentionArguments& arguments, const Config& config);

enum class RouterShape : std::uint8_t { kLayer, kHead };  // proj_q, proj_k: [D, D] or [H, D, D]
enum class AlphaShape : std::uint8_t { kBlock, kHead };   // alpha_logit: [H, M] or [H, 1]

struct AttentionOptions {
  std::int64_t num_heads = 1;
  std::int64_t head_dim = 64;
  std::int64_t seq_len = 0;
  Config config;
  RouterShape router = RouterShape::kLayer;
  AlphaShape alpha = AlphaShape::kBlock;
};

/// Owns proj_q, proj_k, alpha_logit (method sla2) or proj_out (method sla), fp32, as the Python
/// module of the same name does. Start: identity, zeros.
class AttentionImpl : public torch::nn::Module {
 public:
  explicit AttentionImpl(const AttentionOptions& options);
  torch::Tensor forward(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v);

  AttentionOptions options;  // options.config may be changed between calls (routing, keep)
  torch::Tensor proj_q, proj_k, alpha_logit, proj_out;
};
TORCH_MODULE(Attention);

}  // namespace sla2::nn

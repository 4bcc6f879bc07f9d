// Activation checkpointing: a part of the network keeps only its inputs and is computed once more
// in the backward. libtorch has no counterpart of Python's torch.utils.checkpoint.
#pragma once

#include <functional>
#include <vector>

#include <torch/torch.h>

namespace sla2::video {

/// A pure function of `inputs` and of the parameters it reads; `again` is true in the backward.
using RecomputedBody =
    std::function<torch::Tensor(const std::vector<torch::Tensor>& inputs, bool again)>;

/// body(inputs, false), saving nothing but `inputs`. `parameters` are the leaves that the body
/// reads: they get gradients from backward() and from autograd::grad() alike. Autocast is in the
/// backward what it was in the forward. Random numbers are not replayed: the body must draw none.
torch::Tensor recompute_in_backward(RecomputedBody body, std::vector<torch::Tensor> inputs,
                                    std::vector<torch::Tensor> parameters);

}  // namespace sla2::video

"""The library's operators in torch: loading, fake functions (torch.compile), autograd."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path

import torch

from .config import NUMBER_NAMES, OPTION_NAMES

_LIBRARY = Path(__file__).parent / "lib" / "libsla2_torch.so"
_SOFT = 1  # options[4]: routing
# Bits of backward's `wanted`, in the order of its results (torch_ops/packing.h).
_DIFFERENTIABLE = ("q", "k", "v", "proj_q", "proj_k", "alpha_logit", "proj_out")  # forward's first
_RESULTS = ("q", "k", "v", "alpha_logit", "proj_q", "proj_k", "proj_out")


def _load() -> dict:
    if not hasattr(torch.ops.sla2, "forward"):
        if not _LIBRARY.exists():
            raise ImportError(f"{_LIBRARY} does not exist: build it with `make setup`")
        torch.ops.load_library(str(_LIBRARY))
    found = json.loads(torch.ops.sla2.info())
    expected = (list(OPTION_NAMES), list(NUMBER_NAMES))
    if (found["options"], found["numbers"]) != expected:
        raise ImportError(
            f"{_LIBRARY} (version {found['version']}) takes other options than this package: "
            "build it again with `make setup`"
        )
    return found


_FOUND = _load()
VERSION = _FOUND["version"]  # CMakeLists.txt's
HAS_CUDA = any(one["device"] == "cuda" for one in _FOUND["implementations"])  # has GPU kernels


@contextmanager
def value_errors():
    """Turns an operator's "invalid argument" (torch_ops/operators.h) into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        kind, marker, text = str(error).partition("sla2: invalid argument: ")
        if not marker:
            raise
        raise ValueError(text.splitlines()[0]) from None


def _call(op, *args):
    # Dynamo traces the plain call; while it traces, the fake functions run and cannot raise this.
    if torch.compiler.is_compiling():
        return op(*args)
    with value_errors():
        return op(*args)


def route(*args):
    return _call(torch.ops.sla2.route, *args)


def forward(*args):
    return _call(torch.ops.sla2.forward, *args)


def backward(*args):
    return _call(torch.ops.sla2.backward, *args)


def routing_shape(q_tokens, k_tokens, options, numbers):
    """(M, L, T): query blocks, width of the block table, key blocks."""
    block_q, block_k, (begin, end) = options[0], options[1], options[10:12]
    q_blocks = (q_tokens + block_q - 1) // block_q
    k_blocks = (k_tokens + block_k - 1) // block_k
    fixed = (end + block_k - 1) // block_k - begin // block_k if end > begin else 0
    kept = max(math.floor(numbers[0] * k_blocks + 1e-6), 1)
    return q_blocks, min(kept + fixed, k_blocks), k_blocks


def _empty_like_layout(like, features):
    """As empty_in_layout_of in torch_ops/arguments.cpp."""
    batch, heads, tokens, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, tokens, heads, features).transpose(1, 2)
    return like.new_empty(batch, heads, tokens, features)


def _fake_routing(q, k, options, numbers):
    q_blocks, width, k_blocks = routing_shape(q.shape[2], k.shape[2], options, numbers)
    blocks = q.new_empty(q.shape[0], q.shape[1], q_blocks, width, dtype=torch.int32)
    if options[4] != _SOFT:
        return blocks, q.new_empty(0, dtype=torch.float32)
    return blocks, q.new_empty(q.shape[0], q.shape[1], q_blocks, k_blocks, dtype=torch.float32)


@torch.library.register_fake("sla2::route")
def _(q, k, proj_q, proj_k, key_lengths, options, numbers):
    return _fake_routing(q, k, options, numbers)


@torch.library.register_fake("sla2::forward")
def _(
    q,
    k,
    v,
    proj_q,
    proj_k,
    alpha_logit,
    proj_out,
    key_lengths,
    blocks,
    logits,
    options,
    numbers,
    save,
):
    features = v.shape[3]
    out = _empty_like_layout(q, features)
    used = q.new_empty(0, dtype=torch.int32), q.new_empty(0, dtype=torch.float32)
    if not save:
        return (
            out,
            q.new_empty(0),
            q.new_empty(0),
            q.new_empty(0, dtype=torch.float32),
            q.new_empty(0, dtype=torch.float32),
            *used,
        )
    if blocks is None and logits is None:
        used = _fake_routing(q, k, options, numbers)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    k_mean = q.new_empty(k.shape[0], k.shape[1], k.shape[3], dtype=torch.float32)
    return (
        out,
        _empty_like_layout(q, features),
        _empty_like_layout(q, features),
        lse,
        k_mean,
        *used,
    )


@torch.library.register_fake("sla2::backward")
def _(
    d_out,
    q,
    k,
    v,
    proj_q,
    proj_k,
    alpha_logit,
    proj_out,
    key_lengths,
    out_sparse,
    out_linear,
    lse,
    k_mean,
    blocks,
    logits,
    options,
    numbers,
    wanted,
):
    inputs = (q, k, v, alpha_logit, proj_q, proj_k, proj_out)
    results = []
    for bit, tensor in enumerate(inputs):
        activation = bit < 3
        dtype = q.dtype if activation else torch.float32
        if not wanted & (1 << bit):
            results.append(q.new_empty(0, dtype=dtype))
        elif activation:
            results.append(_empty_like_layout(tensor, tensor.shape[3]))
        else:
            results.append(q.new_empty(tensor.shape, dtype=dtype))
    return tuple(results)


# Forward saves the inputs, o_s, o_l, lse, the mean, and the routing: blocks, or logits when soft.
def _setup_context(ctx, inputs, output):
    *tensors, blocks, logits, options, numbers, save = inputs
    out, out_sparse, out_linear, lse, k_mean, used_blocks, used_logits = output
    ctx.soft = options[4] == _SOFT
    # A given routing is data: no gradient leads to the router.
    ctx.learns_router = ctx.soft and logits is None
    ctx.options, ctx.numbers, ctx.saved_parts = options, numbers, save
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if save:
        routing = (
            (None, used_logits if logits is None else logits)
            if ctx.soft
            else (used_blocks if blocks is None else blocks, None)
        )
        ctx.save_for_backward(*tensors, out_sparse, out_linear, lse, k_mean, *routing)


def _backward(ctx, d_out, *_):
    if d_out is None:
        return (None,) * 13
    if not ctx.saved_parts:
        raise RuntimeError("sla2::forward was called with save=False and has no gradient")
    saved = ctx.saved_tensors
    inputs = dict(zip(_DIFFERENTIABLE, saved[:7], strict=True))
    needed = dict(zip(_DIFFERENTIABLE, ctx.needs_input_grad[:7], strict=True))
    for name in ("proj_q", "proj_k"):
        needed[name] = needed[name] and ctx.learns_router
    wanted = sum(
        1 << bit for bit, name in enumerate(_RESULTS) if inputs[name] is not None and needed[name]
    )
    results = backward(d_out, *saved, ctx.options, ctx.numbers, wanted)
    gradients = dict(zip(_RESULTS, results, strict=True))
    result = [
        gradients[name].to(tensor.dtype) if tensor is not None and needed[name] else None
        for name, tensor in inputs.items()
    ]
    return (*result, *(None,) * 6)


def _no_second_derivative(ctx, *_):
    raise RuntimeError("sla2: second derivatives of the attention are not implemented")


torch.library.register_autograd("sla2::forward", _backward, setup_context=_setup_context)
torch.library.register_autograd("sla2::backward", _no_second_derivative)

"""SLA2 attention as functions of tensors."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .config import Config, pack

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Routing(NamedTuple):
    """Which key blocks each query block reads exactly."""

    blocks: Tensor  # int32 [B, H, M, L], ascending, -1 behind the last
    weights: Tensor | None  # fp32 [B, H, M, T] with soft routing (Eq. 17), else None


class AttentionParts(NamedTuple):
    """The two branches and what joins them (Eq. 13), without gradient."""

    out: Tensor  # [B, H, Nq, Dv]
    out_sparse: Tensor  # [B, H, Nq, Dv], o_s
    out_linear: Tensor  # [B, H, Nq, Dv], o_l, before proj_out
    lse: Tensor  # fp32 [B, H, Nq], natural log, over the smoothed keys
    blocks: Tensor  # int32 [B, H, M, L]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_q: Tensor | None = None,
    proj_k: Tensor | None = None,
    alpha_logit: Tensor | None = None,
    *,
    proj_out: Tensor | None = None,
    config: Config = Config(),
    protected: tuple[int, int] | None = None,
    key_lengths: Tensor | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Sparse-linear attention (Alg. 2), differentiable (Alg. 3).

    q [B, H, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv]: one of fp32, bf16, fp16; Hkv divides H.
    Any strides; only a last stride other than 1 costs a copy.
    proj_q, proj_k [D, D] or [H, D, D]: the router, applied as x @ W; None: identity.
    alpha_logit [H, M] or [H, 1]: logit of the mix (Eq. 13); None: zeros; another M is resampled
    linearly. proj_out [Dv, Dv]: method "sla" only; None: zeros.
    protected: half-open range of key tokens whose blocks are always read exactly.
    key_lengths [B] int64: keys behind that prefix do not exist; None: Nk each.
    routing: used instead of computing one: blocks (hard) or weights (soft).
    Values of key_lengths and routing on a GPU are not read before the call: a length outside
    [1, Nk] is brought into it and blocks that do not exist are left out, where on the CPU both are
    a ValueError.

    Returns [B, H, Nq, Dv] of q's type, in q's memory layout. Gradients reach q, k, v, alpha_logit,
    proj_out and, with soft routing, proj_q and proj_k. Under autocast q, k, v are cast as torch's
    own attention does. Raises ValueError naming the argument, its rule and the value.
    """
    call = _prepare(
        q, k, v, proj_q, proj_k, alpha_logit, proj_out, config, protected, key_lengths, routing
    )
    return _run(call)


def _run(call: tuple) -> Tensor:
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:7])
    return ops.forward(*call, save)[0]


def attention_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_q: Tensor | None = None,
    proj_k: Tensor | None = None,
    alpha_logit: Tensor | None = None,
    *,
    proj_out: Tensor | None = None,
    config: Config = Config(),
    protected: tuple[int, int] | None = None,
    key_lengths: Tensor | None = None,
    routing: Routing | None = None,
) -> AttentionParts:
    """What attention() computes with the same arguments, part by part, without gradient."""
    with torch.no_grad():
        call = _prepare(
            q, k, v, proj_q, proj_k, alpha_logit, proj_out, config, protected, key_lengths, routing
        )
        out, out_sparse, out_linear, lse, _, blocks, _ = ops.forward(*call, True)
    return AttentionParts(
        out, out_sparse, out_linear, lse, blocks if routing is None else routing.blocks
    )


def route(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor | None = None,
    proj_k: Tensor | None = None,
    *,
    config: Config = Config(),
    protected: tuple[int, int] | None = None,
    key_lengths: Tensor | None = None,
) -> Routing:
    """The routing that attention() computes (Eq. 15-17), without gradient. Arguments as there."""
    with torch.no_grad():
        call = _prepare(
            q, k, None, proj_q, proj_k, None, None, config, protected, key_lengths, None
        )
        q, k, _, proj_q, proj_k, _, _, key_lengths, _, _, options, numbers = call
        blocks, logits = ops.route(q, k, proj_q, proj_k, key_lengths, options, numbers)
        return Routing(blocks, torch.sigmoid(logits) if config.routing == "soft" else None)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    config: Config = Config(),
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention's signature over attention().

    query [B, H, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv]; Hkv < H needs enable_gqa. A
    `scale` overrides config.scale. Raises ValueError for what SLA2 has not: a mask, dropout,
    causal.
    """
    if attn_mask is not None:
        raise ValueError(
            f"attn_mask must be None: SLA2 has no mask, got a tensor of shape "
            f"{list(attn_mask.shape)}"
        )
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p must be 0: SLA2 has no dropout, got {dropout_p}")
    if is_causal:
        raise ValueError("is_causal must be False: SLA2 has no causal mask, got True")
    _check_rank4("query", query)
    _check_rank4("key", key)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"key must have query's {query.shape[1]} heads unless enable_gqa is True, "
            f"got {key.shape[1]}"
        )
    if not isinstance(config, Config):
        raise ValueError(f"config must be a sla2.Config, got {type(config).__name__}")
    if scale is not None:
        config = Config(**{**vars(config), "scale": scale})
    call = _prepare(
        query,
        key,
        value,
        *(None,) * 4,
        config,
        *(None,) * 3,
        names=("query", "key", "value"),
    )
    return _run(call)


def info() -> dict:
    """Version, threads and implementations: each with the reason why it is not used, or ""."""
    found = json.loads(torch.ops.sla2.info())
    return {
        "version": found["version"],
        "torch": torch.__version__,
        "threads": found["threads"],
        "implementations": found["implementations"],
    }


def self_test(use_cache: bool = True) -> list[dict]:
    """Compares the CUDA kernels with the reference on this machine, if it has a GPU; forward and
    backward of small problems. A success is remembered for this GPU, driver and version. Raises
    RuntimeError naming kernel, GPU and driver if a result is wrong."""
    return json.loads(torch.ops.sla2.self_test(use_cache))


def _check_rank4(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dim() != 4:
        got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must have shape [batch, heads, tokens, features], got {got}")


def _check_shape(name: str, tensor: Tensor, rule: str, *allowed) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {rule}, got {type(tensor).__name__}")
    if tuple(tensor.shape) not in allowed:
        raise ValueError(f"{name} must have shape {rule}, got {list(tensor.shape)}")


def _autocast(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.dtype not in _DTYPES:
        return tensor
    device = tensor.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _check_activations(q: Tensor, k: Tensor, v: Tensor | None, names) -> None:
    q_name, k_name, v_name = names  # as the caller's signature calls them
    for name, tensor in zip(names, (q, k, v), strict=True):
        if tensor is None and name == v_name:
            continue
        _check_rank4(name, tensor)
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have {q_name}'s type {q.dtype}, got {tensor.dtype}")
        if tensor.device.type == "cuda" and not ops.HAS_CUDA:
            raise ValueError(
                f"{name} must be on the CPU: this build has no CUDA backend, got {tensor.device}"
            )
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"{name} must be on the CPU or a CUDA device, got {tensor.device}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q_name}'s device {q.device}, got {tensor.device}")
        if min(tensor.shape[:3]) < 1:
            raise ValueError(f"{name} must have no empty axis, got shape {list(tensor.shape)}")
        size = tensor.shape[3]
        if size % 16 != 0 or not 16 <= size <= 256:
            what = "value_dim" if name == v_name else "head_dim"
            raise ValueError(f"{what} must be a multiple of 16 up to 256, got {size} in {name}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{k_name} must have shape [{q.shape[0]}, Hkv, Nk, {q.shape[3]}] to go with {q_name}, "
            f"got {list(k.shape)}"
        )
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"{k_name} must have a number of heads that divides {q_name}'s {q.shape[1]}, "
            f"got {k.shape[1]}"
        )
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{v_name} must have shape {list(k.shape[:3])} + [Dv] to go with {k_name}, "
            f"got {list(v.shape)}"
        )


def _check_parameter(name: str, tensor: Tensor, rule: str) -> None:
    """A float tensor; its shape is checked apart."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {rule}, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must be of a float type, got {tensor.dtype}")


def _prepare_alpha(alpha_logit: Tensor, heads: int, q_blocks: int) -> Tensor:
    _check_parameter("alpha_logit", alpha_logit, f"[{heads}, M] or [{heads}, 1]")
    if alpha_logit.dim() != 2 or alpha_logit.shape[0] != heads or alpha_logit.shape[1] < 1:
        raise ValueError(
            f"alpha_logit must have shape [{heads}, M] or [{heads}, 1], "
            f"got {list(alpha_logit.shape)}"
        )
    if alpha_logit.shape[1] in (1, q_blocks):
        return alpha_logit
    return F.interpolate(
        alpha_logit.float()[None], size=q_blocks, mode="linear", align_corners=False
    )[0]


def _check_range(protected, k_tokens) -> tuple[int, int] | None:
    if protected is None:
        return None
    good = (
        isinstance(protected, (tuple, list))
        and len(protected) == 2
        and all(isinstance(x, int) and not isinstance(x, bool) for x in protected)
    )
    if not good or not 0 <= protected[0] <= protected[1] <= k_tokens:
        raise ValueError(
            f"protected must be (start, end) with 0 <= start <= end <= {k_tokens}, "
            f"got {protected!r}"
        )
    return tuple(protected)


def _check_method(config: Config, given: dict[str, Tensor | None]) -> None:
    refused = ("proj_q", "proj_k", "alpha_logit") if config.method == "sla" else ("proj_out",)
    for name in refused:
        if given[name] is not None:
            raise ValueError(f"{name} must be None with method {config.method!r}, got a tensor")


def _prepare_routing(routing, config, shape) -> tuple[Tensor | None, Tensor | None]:
    """(blocks, logits) of a given routing; `shape` is [B, H, M, L, T]."""
    if routing is None:
        return None, None
    if not isinstance(routing, Routing):
        raise ValueError(f"routing must be a sla2.Routing, got {type(routing).__name__}")
    if config.routing == "hard":
        expected = tuple(shape[:4])
        _check_shape("routing.blocks", routing.blocks, str(list(expected)), expected)
        if routing.blocks.dtype != torch.int32:
            raise ValueError(f"routing.blocks must be int32, got {routing.blocks.dtype}")
        return routing.blocks, None
    expected = (*shape[:3], shape[4])
    _check_shape("routing.weights", routing.weights, str(list(expected)), expected)
    _check_parameter("routing.weights", routing.weights, str(list(expected)))
    weights = routing.weights.detach().float()
    _check_weights(weights)
    return None, torch.logit(weights)


def _check_weights(weights: Tensor) -> None:
    """In [0, 1]: the logit of anything else is NaN. Not for a GPU, which would have to be waited
    for, nor while compiling."""
    if weights.device.type != "cpu" or torch.compiler.is_compiling() or _is_fake(weights):
        return
    wrong = weights[~((weights >= 0) & (weights <= 1))]
    if wrong.numel() > 0:
        raise ValueError(f"routing.weights must be in [0, 1], got {float(wrong[0]):g}")


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _prepare(
    q,
    k,
    v,
    proj_q,
    proj_k,
    alpha_logit,
    proj_out,
    config,
    protected,
    key_lengths,
    routing,
    names=("q", "k", "v"),
):
    """Checks, and the arguments of sla2::forward but for `save`; `names` of q, k, v in errors."""
    if not isinstance(config, Config):
        raise ValueError(f"config must be a sla2.Config, got {type(config).__name__}")
    # Types are compared after autocast, as torch's own attention does.
    for name, tensor, is_needed in zip(names, (q, k, v), (True, True, v is not None), strict=True):
        if is_needed:
            _check_rank4(name, tensor)
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    _check_activations(q, k, v, names)
    heads, d = q.shape[1], q.shape[3]
    _check_method(
        config,
        {"proj_q": proj_q, "proj_k": proj_k, "alpha_logit": alpha_logit, "proj_out": proj_out},
    )
    for name, projection in (("proj_q", proj_q), ("proj_k", proj_k)):
        if projection is not None:
            rule = f"[{d}, {d}] or [{heads}, {d}, {d}]"
            _check_shape(name, projection, rule, (d, d), (heads, d, d))
            _check_parameter(name, projection, rule)
    if proj_q is not None and proj_k is not None and proj_q.dim() != proj_k.dim():
        proj_q, proj_k = proj_q.expand(heads, d, d), proj_k.expand(heads, d, d)
    if proj_out is not None:
        dv = v.shape[3]
        _check_shape("proj_out", proj_out, f"[{dv}, {dv}]", (dv, dv))
        _check_parameter("proj_out", proj_out, f"[{dv}, {dv}]")
    if key_lengths is not None:
        _check_shape("key_lengths", key_lengths, f"[{q.shape[0]}]", (q.shape[0],))
        if key_lengths.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"key_lengths must be int64, got {key_lengths.dtype}")
        key_lengths = key_lengths.to(device=q.device, dtype=torch.int64)
    options, numbers = pack(config, _check_range(protected, k.shape[2]))
    q_blocks, width, k_blocks = ops.routing_shape(q.shape[2], k.shape[2], options, numbers)
    if alpha_logit is not None:
        alpha_logit = _prepare_alpha(alpha_logit, heads, q_blocks)
    blocks, logits = _prepare_routing(routing, config, (*q.shape[:2], q_blocks, width, k_blocks))
    return (
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
    )

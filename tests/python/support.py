"""Inputs and bounds that the tests share."""

import torch

SEED = 20260212


def make_inputs(
    shape=(2, 4, 2, 150, 170, 32, 48), dtype=torch.float32, seed=SEED, grad=False, device="cpu"
):
    """q, k, v of (B, H, Hkv, Nq, Nk, D, Dv); ragged blocks unless the shape says otherwise."""
    batch, heads, kv_heads, q_tokens, k_tokens, d, dv = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        values = torch.randn(*size, generator=generator).to(device, dtype)
        return values.requires_grad_(grad)

    return (
        normal(batch, heads, q_tokens, d),
        normal(batch, kv_heads, k_tokens, d),
        normal(batch, kv_heads, k_tokens, dv),
    )


def make_parameters(heads, d, blocks, per_head=False, seed=SEED + 1, grad=True, device="cpu"):
    """proj_q, proj_k near the identity and alpha_logit [H, blocks]."""
    generator = torch.Generator().manual_seed(seed)
    size = (heads, d, d) if per_head else (d, d)
    proj = [
        torch.eye(d).expand(size) + 0.2 * torch.randn(size, generator=generator) for _ in range(2)
    ]
    alpha = torch.randn(heads, blocks, generator=generator)
    return [p.detach().to(device, copy=True).requires_grad_(grad) for p in (*proj, alpha)]


def relative_error(value, expected):
    """Relative L2 error, in double."""
    value, expected = value.detach().double(), expected.detach().double()
    assert value.shape == expected.shape
    assert torch.isfinite(value).all()
    return float((value - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_close_as_naive(value, expected, naive, tokens, name, terms=0.0):
    """At most twice the error of a naive fp32 run, plus the rounding of sums over `tokens` terms:
    sqrt(tokens) roundings of 2^-24, four such sums in a row (mean, scores, branch, mix). `terms` is
    the norm of what cancels in a difference, which rounds by its own size and not by the result's.
    """
    size = max(1.0, terms / float(expected.detach().double().norm().clamp_min(1e-30)))
    floor = 4 * tokens**0.5 * 2.0**-24 * size
    error, bound = relative_error(value, expected), 2 * relative_error(naive, expected) + floor
    assert error <= bound, f"{name}: relative error {error:.3g}, bound {bound:.3g}"

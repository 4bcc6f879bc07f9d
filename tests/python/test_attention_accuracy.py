"""Forward, backward and routing against the dense double-precision computation."""

import dataclasses

import pytest
import torch

import sla2
from dense import cancelled_terms, dense, weights_of_blocks
from support import assert_close_as_naive, make_inputs, make_parameters, relative_error

BASE = sla2.Config(keep=0.3, block_q=64, block_k=32, precision="fp32")
HARD = {
    "default": {},
    "elu": {"feature_map": "elu"},
    "relu": {"feature_map": "relu"},
    "raw_keys": {"linear_keys": "raw"},
    "all_keys": {"linear_scope": "all"},
    "scale": {"scale": 0.3},
    "matched": {"backward": "matched"},
    "keep_all": {"keep": 1.0},
    "keep_one": {"keep": 0.01},
    "blocks": {"block_q": 32, "block_k": 64},
}
SOFT = {
    "soft": {},
    "soft_softmax": {"score_norm": "softmax"},
    "soft_tau": {"tau": 0.5},
    "soft_relu": {"feature_map": "relu"},
    "soft_all_keys": {"linear_scope": "all"},
    "soft_keep_all": {"keep": 1.0},
}
CASES = {
    **{name: (change, "hard") for name, change in HARD.items()},
    **{name: (change, "soft") for name, change in SOFT.items()},
}


def config_of(name):
    change, routing = CASES[name]
    return dataclasses.replace(BASE, routing=routing, **change)


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def compare(config, q, k, v, proj_q, proj_k, alpha, device="cpu", **options):
    """Ours on a device, the leaves and the rest on the CPU. Both sides' forward and backward, in
    double and in a naive fp32 run, under our hard routing (soft routing is continuous: each side
    computes its own)."""
    inputs = [t for t in (q, k, v, proj_q, proj_k, alpha, options.get("proj_out")) if t is not None]
    there = on(device, q, k, v, proj_q, proj_k, alpha)
    options_there = {
        n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()
    }
    out = sla2.attention(*there, config=config, **options_there).cpu()
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(out.shape, generator=generator)
    ours = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
    given = None
    if config.routing == "hard":
        route_options = {n: options_there[n] for n in ("protected", "key_lengths") if n in options}
        blocks = sla2.route(*there[:2], *there[3:5], config=config, **route_options).blocks.cpu()
        given = weights_of_blocks(blocks, -(-k.shape[2] // config.block_k))
    sides = []
    for dtype in (torch.float64, torch.float32):
        parts = dense(
            q, k, v, proj_q, proj_k, alpha, config=config, given=given, dtype=dtype, **options
        )
        grads = torch.autograd.grad(parts["out"], inputs, cotangent.to(dtype), allow_unused=True)
        sides.append((parts, grads))
    (exact, exact_grads), (naive, naive_grads) = sides
    tokens = k.shape[2]
    assert_close_as_naive(out, exact["out"], naive["out"], tokens, "out")
    parts = sla2.attention_parts(*there, config=config, **options_there)
    parts = type(parts)(*(None if t is None else t.cpu() for t in parts))
    for name in ("out_sparse", "out_linear", "lse"):
        if name == "out_linear" and not exact[name].any():
            assert not parts.out_linear.any()
            continue
        assert_close_as_naive(getattr(parts, name), exact[name], naive[name], tokens, name)
    assert torch.equal(parts.out, out)
    names = [
        n
        for n, t in (
            ("q", q),
            ("k", k),
            ("v", v),
            ("proj_q", proj_q),
            ("proj_k", proj_k),
            ("alpha_logit", alpha),
            ("proj_out", options.get("proj_out")),
        )
        if t is not None
    ]
    scale = config.scale or q.shape[3] ** -0.5
    terms = dict(
        zip("qk", cancelled_terms(q, k, v, exact["attended"], cotangent, scale), strict=True)
    )
    for name, mine, expected, simple in zip(names, ours, exact_grads, naive_grads, strict=True):
        if expected is None or not expected.any():
            assert mine is None or mine.abs().max() <= 1e-6, name
            continue
        assert_close_as_naive(
            mine, expected, simple, tokens, f"gradient of {name}", terms.get(name, 0.0)
        )


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, device):
    config = config_of(name)
    q, k, v = make_inputs(grad=True)
    parameters = make_parameters(4, 32, -(-150 // config.block_q))
    compare(config, q, k, v, *parameters, device=device)


@pytest.mark.parametrize("name", ["default", "soft", "matched", "soft_softmax"])
@pytest.mark.parametrize(
    "implementation",
    sla2.info()["implementations"],
    ids=lambda implementation: implementation["name"],
)
def test_each_implementation(monkeypatch, implementation, name):
    refusal = implementation["refusal_forward"] or implementation["refusal_backward"]
    if refusal:
        pytest.skip(f"{implementation['name']}: {refusal}")
    monkeypatch.setenv("SLA2_IMPLEMENTATION", implementation["name"])
    q, k, v = make_inputs(grad=True)
    compare(config_of(name), q, k, v, *make_parameters(4, 32, 3), device=implementation["device"])


def test_an_unknown_implementation_is_named(monkeypatch):
    monkeypatch.setenv("SLA2_IMPLEMENTATION", "abacus")
    with pytest.raises(ValueError, match="got abacus"):
        sla2.attention(*make_inputs(), config=BASE)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_protected_and_key_lengths(routing, device):
    config = dataclasses.replace(BASE, routing=routing)
    q, k, v = make_inputs(grad=True)
    lengths = torch.tensor([170, 101])
    parameters = make_parameters(4, 32, 3)
    compare(config, q, k, v, *parameters, device, protected=(90, 120), key_lengths=lengths)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_router_and_alpha_per_head(routing, device):
    config = dataclasses.replace(BASE, routing=routing)
    q, k, v = make_inputs(grad=True)
    compare(config, q, k, v, *make_parameters(4, 32, 1, per_head=True), device)


def test_routers_of_different_forms(device):
    config = dataclasses.replace(BASE, routing="soft")
    q, k, v = make_inputs(grad=True)
    per_layer, _, alpha = make_parameters(4, 32, 3)
    _, per_head, _ = make_parameters(4, 32, 3, per_head=True)
    compare(config, q, k, v, per_layer, per_head, alpha, device)


def test_sla(device):
    config = dataclasses.replace(BASE, method="sla")
    q, k, v = make_inputs(grad=True)
    generator = torch.Generator().manual_seed(5)
    proj_out = (0.3 * torch.randn(48, 48, generator=generator)).requires_grad_()
    compare(config, q, k, v, None, None, None, device, proj_out=proj_out)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 16, 16), (1, 2, 1, 64, 33, 64, 16), (1, 1, 1, 40, 200, 80, 128)]
)
def test_shapes(shape, device):
    q, k, v = make_inputs(shape, grad=True)
    compare(BASE, q, k, v, *make_parameters(shape[1], shape[5], -(-shape[3] // 64)), device)


def test_keep_all_is_full_attention(device):
    q, k, v = make_inputs((1, 2, 2, 100, 130, 32, 32), device=device)
    config = dataclasses.replace(BASE, keep=1.0)
    alpha = torch.full((2, 1), -3.0, device=device)
    out = sla2.attention(q, k, v, alpha_logit=alpha, config=config)
    full = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(out, full) < 4 * 130**0.5 * 2.0**-24


def test_route_hard_matches_scores(device):
    """Equal to the dense choice; where they differ the two scores must be nearly tied."""
    q, k, v = make_inputs((2, 4, 2, 300, 700, 32, 32))
    proj_q, proj_k, _ = make_parameters(4, 32, 1)
    there = on(device, q, k, proj_q, proj_k)
    blocks = sla2.route(*there, config=BASE, protected=(5, 40)).blocks.cpu()
    expected = dense(q, k, v, proj_q, proj_k, config=BASE, protected=(5, 40))
    assert blocks.dtype == torch.int32 and blocks.shape == (2, 4, 5, 6 + 2)
    assert (blocks.diff(dim=-1) > 0).all()
    ours = weights_of_blocks(blocks, 22).reshape(8, 5, 22)
    for head in range(8):
        scores, m = expected["scores"][head], expected["weights"][head]
        wrong = ours[head] != m
        threshold = scores.masked_fill(m == 0, float("inf"))
        threshold[:, :2] = float("inf")  # protected
        distance = (scores - threshold.amin(1, keepdim=True)).abs()
        assert (distance[wrong] < 1e-5 * scores.abs().max()).all()


def test_route_ties_go_to_the_lower_block(device):
    q, k, _ = make_inputs((1, 1, 1, 64, 320, 16, 16), device=device)
    blocks = sla2.route(q, torch.ones_like(k), config=BASE).blocks
    assert blocks.tolist() == [[[[0, 1, 2]]]]


@pytest.mark.parametrize("score_norm", ["none", "softmax"])
def test_route_soft(score_norm, device):
    config = dataclasses.replace(BASE, routing="soft", score_norm=score_norm)
    q, k, v = make_inputs()
    lengths = torch.tensor([170, 65])
    there = on(device, q, k, lengths)
    routing = sla2.route(*there[:2], config=config, key_lengths=there[2])
    routing = sla2.Routing(routing.blocks.cpu(), routing.weights.cpu())
    expected = dense(q, k, v, config=config, key_lengths=lengths)
    assert routing.weights.shape == (2, 4, 3, 6)
    for b, blocks in enumerate((6, 3)):
        mine = torch.cat([*routing.weights[b, :, :, :blocks]]).double()
        theirs = torch.cat(expected["weights"][4 * b : 4 * b + 4])
        # x = p / tau + lambda in fp32: |x| < 64, one rounding each, and m' <= 1/4.
        assert (mine - theirs).abs().max() < 64 * 2.0**-23
        assert not routing.weights[b, :, :, blocks:].any()
        target = torch.full((12,), max(0.3 * blocks, 1.0), dtype=torch.float64)
        assert torch.allclose(mine.sum(1), target, atol=blocks * 64 * 2.0**-23)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_given_routing_is_used(routing):
    config = dataclasses.replace(BASE, routing=routing)
    q, k, v = make_inputs(grad=True)
    parameters = make_parameters(4, 32, 3)
    found = sla2.route(q, k, *parameters[:2], config=config)
    out = sla2.attention(q, k, v, *parameters, config=config, routing=found)
    own = sla2.attention(q, k, v, *parameters, config=config)
    # weights -> logits and back costs a few roundings; blocks are the same bits.
    assert relative_error(out, own) <= (0 if routing == "hard" else 1e-5)
    flipped = sla2.Routing(found.blocks, None if found.weights is None else found.weights.flip(-1))
    if routing == "hard":
        flipped = sla2.Routing(
            torch.arange(found.blocks.shape[-1], dtype=torch.int32)
            .expand_as(found.blocks)
            .contiguous(),
            None,
        )
    changed = sla2.attention(q, k, v, *parameters, config=config, routing=flipped)
    given = flipped.weights.double() if routing == "soft" else weights_of_blocks(flipped.blocks, 6)
    expected = dense(q, k, v, *parameters, config=config, given=given)["out"]
    assert relative_error(changed, expected) < 1e-5
    d_proj = torch.autograd.grad(changed.sum(), parameters[:2], allow_unused=True)
    assert all(g is None or not g.any() for g in d_proj)


def test_alpha_is_resampled(device):
    q, k, v = make_inputs(device=device)
    _, _, alpha = make_parameters(4, 32, 5, device=device)
    resampled = torch.nn.functional.interpolate(alpha[None], size=3, mode="linear")[0]
    out = sla2.attention(q, k, v, alpha_logit=alpha, config=BASE)
    assert torch.equal(out, sla2.attention(q, k, v, alpha_logit=resampled, config=BASE))
    out.sum().backward()
    assert alpha.grad.shape == (4, 5) and alpha.grad.any()


# Relative L2 error of o_s on normal inputs, from the formats' roundings. bf16: q, k, v and p are
# each rounded to 8 bits, 2^-9/sqrt(3) rms: 2.3e-3 together. int8: a rounding error is
# amax/127/sqrt(12): q with amax 2.5 sigma 0.0057, k 3.8 sigma 0.0086, v 3.2 sigma 0.0073, p of
# rms 0.2 in steps of 1/255 0.0057: 1.4e-2 together. fp8: v in e4m3 (3 bits, 2^-4/sqrt(3)/sqrt(2)
# rms 0.026) and p likewise: 3.8e-2 with int8's q and k. Allowed is twice that.
BOUNDS = {"bf16": 2 * 2.3e-3, "int8": 2 * 1.4e-2, "fp8": 2 * 3.8e-2}


@pytest.mark.parametrize("precision", BOUNDS)
def test_low_precision(precision, device):
    config = dataclasses.replace(BASE, precision=precision, backward="matched")
    q, k, v = make_inputs((1, 2, 2, 200, 640, 64, 64), grad=True)
    parts = sla2.attention_parts(*on(device, q, k, v), config=config)
    parts = type(parts)(*(None if t is None else t.cpu() for t in parts))
    given = weights_of_blocks(parts.blocks, 20)
    expected = dense(q, k, v, config=config, given=given)
    error = relative_error(parts.out_sparse, expected["out_sparse"])
    assert 1e-4 < error <= BOUNDS[precision]  # not below: then it is not the format asked for
    assert relative_error(parts.out_linear, expected["out_linear"]) < 2.0**-7


@pytest.mark.parametrize("dtype,unit", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_16_bit_inputs(dtype, unit, device):
    """Output and saved o_s, o_l are rounded to the type, and so are the products' operands: four
    roundings forward; backward as many again, on the difference dP - Ds (twice as large)."""
    config = dataclasses.replace(BASE, precision="bf16")
    q, k, v = make_inputs(dtype=dtype, grad=True)
    there = on(device, q, k, v)
    out = sla2.attention(*there, config=config).cpu()
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    grads = torch.autograd.grad(out, (q, k, v), cotangent)
    given = weights_of_blocks(sla2.route(*there[:2], config=config).blocks.cpu(), 6)
    expected = dense(q, k, v, config=config, given=given)["out"]
    expected_grads = torch.autograd.grad(expected, (q, k, v), cotangent.double())
    assert out.dtype == dtype
    assert relative_error(out, expected) <= 4 * unit
    for mine, theirs in zip(grads, expected_grads, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, theirs) <= 8 * unit


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_finite_differences(routing):
    """gradcheck wants double, which the operators do not take: the derivative along one random
    direction, by central differences of fp32 results summed in double. The derivatives are about
    100, the step 1e-3: the truncation is about 1e-4 of them (1e-2 at a step of 1e-2, for the router
    with its 1/tau) and the rounding, 2^-24 sqrt(outputs) / step = 3e-3, less. Allowed is 1e-3.
    Routing is held fixed for q, k, v and alpha_logit; the router moves it by itself."""
    config = dataclasses.replace(BASE, routing=routing)
    q, k, v = make_inputs((1, 2, 1, 70, 100, 16, 16), grad=True)
    parameters = make_parameters(2, 16, 2)
    fixed = sla2.route(q, k, *parameters[:2], config=config)
    generator = torch.Generator().manual_seed(7)
    cotangent = torch.randn((1, 2, 70, 16), generator=generator).double()

    def check(tensors, routing_of_call):
        def value(*moved):
            swap = dict(zip(map(id, tensors), moved, strict=True))
            args = [swap.get(id(t), t) for t in (q, k, v, *parameters)]
            out = sla2.attention(*args, config=config, routing=routing_of_call)
            return (out.double() * cotangent).sum()

        grads = torch.autograd.grad(value(*tensors), tensors)
        step = 1e-3
        for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
            # Along the gradient, so that the derivative is as large as it can be.
            direction = grad / grad.norm() * tensor.numel() ** 0.5
            with torch.no_grad():
                sides = [
                    value(
                        *[t + s * step * direction if j == i else t for j, t in enumerate(tensors)]
                    )
                    for s in (1, -1)
                ]
            numeric = float(sides[0] - sides[1]) / (2 * step)
            analytic = float((grad.double() * direction.double()).sum())
            assert abs(numeric - analytic) <= 1e-3 * abs(analytic) + 3e-3, i

    check((q, k, v, parameters[2]), fixed)
    if routing == "soft":
        check((parameters[0], parameters[1]), None)

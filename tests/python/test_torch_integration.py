"""The operators as citizens of torch: opcheck, compile, autocast, checkpoints, threads, strides."""

import dataclasses
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sla2
from sla2.config import pack, unpack
from support import make_inputs, make_parameters, relative_error

HARD = sla2.Config(keep=0.3, block_q=64, block_k=32, precision="fp32")
SOFT = dataclasses.replace(HARD, routing="soft")
CONFIGS = {"hard": HARD, "soft": SOFT, "int8": dataclasses.replace(HARD, precision="int8")}


def arguments(config, grad=True, device="cpu"):
    q, k, v = make_inputs(grad=grad, device=device)
    return (
        q,
        k,
        v,
        *make_parameters(4, 32, 3, grad=grad, device=device),
        None,
        None,
        None,
        None,
        *pack(config, (3, 9)),
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_opcheck_forward(config, device):
    call = arguments(config, device=device)
    torch.library.opcheck(torch.ops.sla2.forward.default, (*call, True))


def test_opcheck_forward_given_routing_and_layout(device):
    call = list(arguments(HARD, device=device))
    call[0] = call[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    call[7] = torch.tensor([170, 33], device=device)
    call[8] = torch.zeros(2, 4, 3, 2, dtype=torch.int32, device=device)
    call[8][..., 1] = -1
    torch.library.opcheck(torch.ops.sla2.forward.default, (*call, True))


def test_opcheck_forward_without_saving(device):
    call = arguments(HARD, grad=False, device=device)
    torch.library.opcheck(torch.ops.sla2.forward.default, (*call, False))


@pytest.mark.parametrize("config", [HARD, SOFT], ids=["hard", "soft"])
def test_opcheck_backward(config, device):
    call = arguments(config, grad=False, device=device)
    out, out_sparse, out_linear, lse, k_mean, blocks, logits = torch.ops.sla2.forward(*call, True)
    soft = config.routing == "soft"
    wanted = 0b0111111 if soft else 0b0001111
    torch.library.opcheck(
        torch.ops.sla2.backward.default,
        (
            out,
            *call[:8],
            out_sparse,
            out_linear,
            lse,
            k_mean,
            None if soft else blocks,
            logits if soft else None,
            *call[10:],
            wanted,
        ),
    )


@pytest.mark.parametrize("config", [HARD, SOFT], ids=["hard", "soft"])
def test_opcheck_route(config, device):
    q, k, _ = make_inputs(device=device)
    torch.library.opcheck(
        torch.ops.sla2.route.default, (q, k, None, None, None, *pack(config, None))
    )


@pytest.mark.parametrize(
    "name,backend", [("hard", "inductor"), ("soft", "aot_eager"), ("int8", "aot_eager")]
)
def test_compile_fullgraph(name, backend, device):
    torch._dynamo.reset()
    config = CONFIGS[name]
    module = sla2.Attention(4, 32, 150, config).to(device)
    q, k, v = make_inputs((2, 4, 2, 150, 170, 32, 32), grad=True, device=device)
    leaves = [q, k, v, *module.parameters()]

    def block(q, k, v):
        return (module(q * 1.5, k, v, protected=(3, 9)).transpose(1, 2).flatten(2)).sin()

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    expected, out = block(q, k, v), compiled(q, k, v)
    assert relative_error(out, expected) < 1e-6
    grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or relative_error(mine, theirs) < 1e-5


def test_compile_follows_shape_and_config():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, config: sla2.attention(q, k, v, config=config),
        fullgraph=True,
        backend="aot_eager",
    )
    for tokens in (100, 130, 190):
        for keep in (0.3, 0.5, 0.9):
            config = dataclasses.replace(HARD, keep=keep)
            q, k, v = make_inputs((1, 2, 1, tokens, tokens + 70, 32, 32))
            assert torch.equal(compiled(q, k, v, config), sla2.attention(q, k, v, config=config))


def test_compile_route_and_parts(device):
    torch._dynamo.reset()
    q, k, v = make_inputs(device=device)
    parts = torch.compile(
        lambda *a: sla2.attention_parts(*a, config=SOFT), fullgraph=True, backend="aot_eager"
    )(q, k, v)
    for mine, theirs in zip(parts, sla2.attention_parts(q, k, v, config=SOFT), strict=True):
        assert torch.equal(mine, theirs)
    routing = torch.compile(
        lambda *a: sla2.route(*a, config=SOFT), fullgraph=True, backend="aot_eager"
    )(q, k)
    assert torch.equal(routing.weights, sla2.route(q, k, config=SOFT).weights)


def test_fake_tensors_give_shapes_without_data():
    with torch.device("meta"):
        q = torch.empty(1, 2, 1000, 64)
        k = torch.empty(1, 1, 900, 64)
    out = sla2.attention(q, k, k, config=HARD)
    assert out.shape == (1, 2, 1000, 64) and out.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch_attention_does(dtype, device):
    q, k, v = make_inputs(grad=True, device=device)
    parameters = make_parameters(4, 32, 3, device=device)
    with torch.autocast(device, dtype=dtype):
        out = sla2.attention(q, k.bfloat16(), v, *parameters, config=HARD)
        full = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert out.dtype == full.dtype == dtype
    by_hand = sla2.attention(
        q.to(dtype), k.bfloat16().to(dtype), v.to(dtype), *parameters, config=HARD
    )
    assert torch.equal(out, by_hand)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and parameters[2].grad.dtype == torch.float32
    with torch.autocast(device, dtype=dtype, enabled=False):
        assert sla2.attention(q, k, v, config=HARD).dtype == torch.float32


def test_autocast_compiles(device):
    torch._dynamo.reset()
    q, k, v = make_inputs(device=device)
    compiled = torch.compile(
        lambda *a: sla2.attention(*a, config=HARD), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(compiled(q, k, v), sla2.attention(q, k, v, config=HARD))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("config", [HARD, SOFT], ids=["hard", "soft"])
def test_activation_checkpointing(use_reentrant, config, device):
    q, k, v = make_inputs(grad=True, device=device)
    parameters = make_parameters(4, 32, 3, device=device)
    leaves = (q, k, v, *parameters)

    def run(*tensors):
        return sla2.attention(*tensors, config=config)

    def gradients(out):
        for leaf in leaves:
            leaf.grad = None
        out.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    plain = gradients(run(*leaves))
    again = gradients(checkpoint(run, *leaves, use_reentrant=use_reentrant))
    for mine, theirs in zip(again, plain, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def test_two_threads_at_once(device):
    cases = [
        (make_inputs(seed=s, grad=True, device=device), CONFIGS[name])
        for s, name in enumerate(("hard", "soft"))
    ]

    def run(case):
        (q, k, v), config = case
        out = sla2.attention(q, k, v, config=config)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    expected = [run(case) for case in cases]
    failures = []

    def repeat(i):
        for _ in range(5):
            if not all(map(torch.equal, run(cases[i]), expected[i])):
                failures.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_same_bits_on_any_number_of_threads():
    q, k, v = make_inputs(grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = sla2.attention(q, k, v, config=HARD)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def copies(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(e.count for e in profile.key_averages() if e.key in ("aten::copy_", "aten::clone"))


def test_strided_inputs_are_not_copied(device):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in make_inputs(device=device))
    fused = torch.randn(2, 150, 3, 4, 32, device=device).permute(
        2, 0, 3, 1, 4
    )  # a fused projection's output
    sliced = (q[..., 16:], k[:, :, ::2, :16], v[:, :, 1::2, :16])
    for inputs in ((q, k, v), tuple(fused), sliced):
        assert copies(lambda inputs=inputs: sla2.attention(*inputs, config=HARD)) == 0
        dense_inputs = [t.contiguous() for t in inputs]
        out = sla2.attention(*inputs, config=HARD)
        assert torch.equal(out, sla2.attention(*dense_inputs, config=HARD))
    out = sla2.attention(q, k, v, config=HARD)
    assert out.transpose(1, 2).is_contiguous()  # q's own layout comes back
    leaf = q.detach().requires_grad_()
    sla2.attention(leaf, k, v, config=HARD).square().sum().backward()
    assert leaf.grad.stride() == q.stride()


def test_other_last_strides_and_offsets_are_right(device):
    q, k, v = make_inputs(device=device)
    expected = sla2.attention(q, k, v, config=HARD)
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert torch.equal(sla2.attention(*columns, config=HARD), expected)
    shifted = [
        torch.empty(t.numel() + 3, device=device)[3:].view(t.shape).copy_(t) for t in (q, k, v)
    ]
    assert torch.equal(sla2.attention(*shifted, config=HARD), expected)
    expanded = k[:, :1].expand(-1, 2, -1, -1)
    assert torch.equal(
        sla2.attention(q, expanded, v, config=HARD),
        sla2.attention(q, expanded.contiguous(), v, config=HARD),
    )


def test_expanded_gradient_and_partial_requires_grad(device):
    q, k, v = make_inputs(device=device)
    v.requires_grad_()
    out = sla2.attention(q, k, v, config=HARD)
    out.sum().backward()  # the gradient of sum() is one number, expanded
    ones = torch.autograd.grad(sla2.attention(q, k, v, config=HARD), v, torch.ones_like(out))[0]
    assert torch.equal(v.grad, ones) and q.grad is None and k.grad is None


def test_second_derivative_is_refused():
    q, k, v = make_inputs(grad=True)
    (grad,) = torch.autograd.grad(
        sla2.attention(q, k, v, config=HARD).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_parameters_of_any_float_type(device):
    q, k, v = make_inputs(device=device)
    parameters = make_parameters(4, 32, 3, device=device)
    proj_q, proj_k, alpha = (p.detach().bfloat16() for p in parameters)
    leaves = [p.clone().requires_grad_() for p in (proj_q, proj_k, alpha)]
    out = sla2.attention(q, k, v, *leaves, config=SOFT)
    same = sla2.attention(q, k, v, *(p.float() for p in leaves), config=SOFT)
    assert torch.equal(out, same)
    out.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.any() for p in leaves)


def test_module():
    module = sla2.Attention(4, 32, 150, HARD, router="head")
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "proj_q": (4, 32, 32),
        "proj_k": (4, 32, 32),
        "alpha_logit": (4, 3),
    }
    q, k, v = make_inputs((2, 4, 2, 150, 170, 32, 32))
    assert torch.equal(module(q, k, v), sla2.attention(q, k, v, config=HARD))
    sla = sla2.Attention(4, 32, 150, dataclasses.replace(HARD, method="sla"), alpha="head")
    assert [n for n, _ in sla.named_parameters()] == ["proj_out"]
    sparse = sla2.attention_parts(q, k, v, config=HARD).out_sparse
    assert torch.equal(sla(q, k, v), sparse)  # proj_out starts at zero
    assert sla2.Attention(4, 32, 150, HARD, alpha="head").alpha_logit.shape == (4, 1)


def test_pack_and_info():
    config = sla2.Config(
        0.2, 32, 256, 0.5, "relu", "fp8", "soft", 0.3, "softmax", "raw", "all", "matched", "sla"
    )
    assert unpack(*pack(config, (4, 8))) == (config, (4, 8))
    assert unpack(*pack(sla2.Config(), None)) == (sla2.Config(), (0, 0))
    found = sla2.info()
    assert found["version"] == sla2.__version__
    assert found["implementations"][-1]["name"] == "reference"


def test_tensors_of_two_devices_are_named(device):
    q, k, v = make_inputs(device=device)
    with pytest.raises(ValueError, match=f"k must be on q's device {device}.*, got meta"):
        sla2.attention(q, k.to("meta"), v, config=HARD)


def test_self_test(device):
    """Compares every accelerator's kernels with the reference; there are none without a GPU."""
    tests = sla2.self_test(use_cache=False)
    if device == "cuda":
        assert [t["implementation"] for t in tests] and all(t["checks"] >= 12 for t in tests)
    elif not torch.cuda.is_available():
        assert tests == []


def test_graph_capture():
    """A call is kernels on the current stream and nothing else."""
    if not torch.cuda.is_available() or not sla2.ops.HAS_CUDA:
        pytest.skip("CUDA graphs need a GPU that torch finds, and a build with the CUDA backend")
    q, k, v = make_inputs(device="cuda")
    expected = sla2.attention(q, k, v, config=HARD)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sla2.attention(q, k, v, config=HARD)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_a_routing_of_another_device_is_refused():
    if not torch.cuda.is_available() or not sla2.ops.HAS_CUDA:
        pytest.skip("two devices: needs a GPU that torch finds, and a build with the CUDA backend")
    call = list(arguments(HARD, grad=False, device="cuda"))
    call[8] = torch.zeros(2, 4, 3, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="routing.blocks must be on q's device"):
        torch.ops.sla2.forward(*call, True)

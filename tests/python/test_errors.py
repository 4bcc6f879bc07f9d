"""Wrong input: ValueError naming the argument, the rule and the value."""

import re

import pytest
import torch

import sla2
from support import make_inputs

CONFIG = sla2.Config(keep=0.3, block_q=64, block_k=32, precision="fp32")
SLA = sla2.Config(method="sla")
Q, K, V = make_inputs()
EYE = torch.eye(32)


@pytest.mark.parametrize(
    "field,value,rule",
    [
        ("keep", 0.0, "in (0, 1]"),
        ("keep", float("nan"), "in (0, 1]"),
        ("keep", "a", "in (0, 1]"),
        ("block_q", 48, "32, 64, 128 or 256"),
        ("block_k", 64.0, "32, 64, 128 or 256"),
        ("scale", -1.0, "positive and finite"),
        ("scale", float("inf"), "positive and finite"),
        ("tau", 0.0, "positive and finite"),
        ("feature_map", "tanh", "one of 'softmax', 'elu', 'relu'"),
        ("precision", "fp16", "one of 'int8', 'fp8', 'bf16', 'fp32'"),
        ("routing", None, "one of 'hard', 'soft'"),
        ("score_norm", "l2", "one of 'none', 'softmax'"),
        ("linear_keys", "", "one of 'smoothed', 'raw'"),
        ("linear_scope", "some", "one of 'complement', 'all'"),
        ("backward", 1, "one of 'paper', 'matched'"),
        ("method", "sla3", "one of 'sla2', 'sla'"),
    ],
)
def test_config(field, value, rule):
    with pytest.raises(ValueError, match=re.escape(f"{field} must be")) as error:
        sla2.Config(**{field: value})
    assert rule in str(error.value) and repr(value) in str(error.value)


def call(q=Q, k=K, v=V, *args, config=CONFIG, **options):
    return lambda: sla2.attention(q, k, v, *args, config=config, **options)


BLOCKS = torch.zeros(2, 4, 3, 1, dtype=torch.int32)
SOFT = sla2.Config(keep=0.3, block_q=64, block_k=32, precision="fp32", routing="soft")
WEIGHTS = torch.ones(2, 4, 3, 6)


@pytest.mark.parametrize(
    "run,message",
    [
        (call(q=Q[0]), "q must have shape [batch, heads, tokens, features], got [4, 150, 32]"),
        (call(q=Q.double()), "q must be float32, bfloat16 or float16, got torch.float64"),
        (call(k=K.half()), "k must have q's type torch.float32, got torch.float16"),
        (call(q=Q[..., :20], k=K[..., :20]), "head_dim must be a multiple of 16 up to 256, got 20"),
        (call(v=V[..., :40]), "value_dim must be a multiple of 16 up to 256, got 40"),
        (call(q=Q[:, :, :0]), "q must have no empty axis, got shape [2, 4, 0, 32]"),
        (
            call(k=K[:1], v=V[:1]),
            "k must have shape [2, Hkv, Nk, 32] to go with q, got [1, 2, 170, 32]",
        ),
        (call(q=Q[:, :3]), "k must have a number of heads that divides q's 3, got 2"),
        (
            call(v=V[:, :, :9]),
            "v must have shape [2, 2, 170] + [Dv] to go with k, got [2, 2, 9, 48]",
        ),
        (call(Q, K, V, EYE[:16]), "proj_q must have shape [32, 32] or [4, 32, 32], got [16, 32]"),
        (
            call(Q, K, V, None, 3),
            "proj_k must be a tensor of shape [32, 32] or [4, 32, 32], got int",
        ),
        (
            call(Q, K, V, None, None, torch.zeros(3, 1)),
            "alpha_logit must have shape [4, M] or [4, 1], got [3, 1]",
        ),
        (
            call(Q, K, V, None, None, [1.0]),
            "alpha_logit must be a tensor of shape [4, M] or [4, 1], got list",
        ),
        (
            call(Q, K, V, None, None, torch.zeros(4, 1, dtype=torch.int64)),
            "alpha_logit must be of a float type, got torch.int64",
        ),
        (call(Q, K, V, EYE.int()), "proj_q must be of a float type, got torch.int32"),
        (
            call(config=SLA, proj_out=torch.eye(48).bool()),
            "proj_out must be of a float type, got torch.bool",
        ),
        (call(routing=(1, 2)), "routing must be a sla2.Routing, got tuple"),
        (call(routing=EYE), "routing must be a sla2.Routing, got Tensor"),
        (
            call(routing=sla2.Routing(BLOCKS, WEIGHTS * 2), config=SOFT),
            "routing.weights must be in [0, 1], got 2",
        ),
        (
            call(routing=sla2.Routing(BLOCKS, WEIGHTS * float("nan")), config=SOFT),
            "routing.weights must be in [0, 1], got nan",
        ),
        (
            call(routing=sla2.Routing(BLOCKS, WEIGHTS.int()), config=SOFT),
            "routing.weights must be of a float type, got torch.int32",
        ),
        (
            call(protected=(False, True)),
            "protected must be (start, end) with 0 <= start <= end <= 170, got (False, True)",
        ),
        (call(proj_out=EYE), "proj_out must be None with method 'sla2', got a tensor"),
        (call(Q, K, V, EYE, config=SLA), "proj_q must be None with method 'sla', got a tensor"),
        (call(config=SLA, proj_out=EYE), "proj_out must have shape [48, 48], got [32, 32]"),
        (call(config="int8"), "config must be a sla2.Config, got str"),
        (
            call(protected=(4, 171)),
            "protected must be (start, end) with 0 <= start <= end <= 170, got (4, 171)",
        ),
        (call(protected=5), "protected must be (start, end) with 0 <= start <= end <= 170, got 5"),
        (call(key_lengths=torch.tensor([3])), "key_lengths must have shape [2], got [1]"),
        (call(key_lengths=torch.ones(2)), "key_lengths must be int64, got torch.float32"),
        (call(key_lengths=torch.tensor([3, 171])), "key_lengths must be in [1, 170], got 171"),
        (call(key_lengths=torch.tensor([0, 17])), "key_lengths must be in [1, 170], got 0"),
        (
            call(routing=sla2.Routing(BLOCKS[:1], None)),
            "routing.blocks must have shape [2, 4, 3, 1], got [1, 4, 3, 1]",
        ),
        (
            call(routing=sla2.Routing(BLOCKS.long(), None)),
            "routing.blocks must be int32, got torch.int64",
        ),
        (
            call(routing=sla2.Routing(BLOCKS + 6, None)),
            "routing must list at least one block in [0, 6), ascending, then -1; got 6",
        ),
        (
            call(routing=sla2.Routing(BLOCKS, None), config=sla2.Config(routing="soft")),
            "routing.weights must be a tensor of shape",
        ),
    ],
)
def test_attention(run, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        run()


def test_errors_while_compiling_name_the_argument():
    with pytest.raises(Exception, match=re.escape("alpha_logit must have shape [4, M]")):
        torch.compile(
            call(Q, K, V, None, None, torch.zeros(3, 1)), fullgraph=True, backend="aot_eager"
        )()


@pytest.mark.skipif(
    torch.cuda.is_available() or sla2.ops.HAS_CUDA, reason="needs a build without a CUDA backend"
)
def test_other_devices_are_named():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 1, 64, 32, device="cuda")
        with pytest.raises(ValueError, match="this build has no CUDA backend, got cuda:0"):
            sla2.attention(q, q, q)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"attn_mask": torch.ones(2, 2)}, "attn_mask must be None: SLA2 has no mask"),
        ({"dropout_p": 0.1}, "dropout_p must be 0: SLA2 has no dropout, got 0.1"),
        ({"is_causal": True}, "is_causal must be False: SLA2 has no causal mask"),
        ({}, "key must have query's 4 heads unless enable_gqa is True, got 2"),
    ],
)
def test_drop_in_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sla2.scaled_dot_product_attention(Q, K, V, **options)


@pytest.mark.parametrize(
    "arguments,options,message",
    [
        ((Q, K, V[0]), {}, "value must have shape [batch, heads, tokens, features], got"),
        ((Q, K.half(), V), {}, "key must have query's type torch.float32, got torch.float16"),
        ((Q, K[:1], V[:1]), {}, "key must have shape [2, Hkv, Nk, 32] to go with query, got"),
        ((Q, K, V[:, :, :9]), {}, "value must have shape [2, 2, 170] + [Dv] to go with key, got"),
        ((Q, K, V), {"config": "int8"}, "config must be a sla2.Config, got str"),
    ],
)
def test_drop_in_uses_its_own_names(arguments, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        sla2.scaled_dot_product_attention(*arguments, enable_gqa=True, **options)


def test_drop_in():
    out = sla2.scaled_dot_product_attention(Q, K, V, scale=0.3, enable_gqa=True, config=CONFIG)
    config = sla2.Config(keep=0.3, block_q=64, block_k=32, precision="fp32", scale=0.3)
    assert torch.equal(out, sla2.attention(Q, K, V, config=config))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_heads": 0}, "num_heads must be a whole number of at least 1, got 0"),
        ({"head_dim": 72}, "head_dim must be a multiple of 16 up to 256, got 72"),
        ({"seq_len": -1}, "seq_len must be a whole number of at least 1, got -1"),
        ({"router": "x"}, "router must be 'layer' or 'head', got 'x'"),
        ({"alpha": "x"}, "alpha must be 'block' or 'head', got 'x'"),
        ({"num_heads": True}, "num_heads must be a whole number of at least 1, got True"),
        ({"config": "x"}, "config must be a sla2.Config, got str"),
    ],
)
def test_module(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sla2.Attention(**{"num_heads": 2, "head_dim": 32, "seq_len": 64, **options})


@pytest.mark.parametrize(
    "change,message",
    [
        ({"q": Q.double()}, "q must be of type float32, bfloat16 or float16, got float64"),
        ({"v": V.half()}, "v must have q's type float32, got float16"),
        (
            {"alpha_logit": torch.zeros(4, 1).long()},
            "alpha_logit must be of a float type, got int64",
        ),
        ({"key_lengths": torch.ones(2)}, "key_lengths must be of type int64, got float32"),
        ({"blocks": BLOCKS.long()}, "routing.blocks must be of type int32, got int64"),
    ],
)
def test_operator_called_directly_names_types(change, message):
    names = "q k v proj_q proj_k alpha_logit proj_out key_lengths blocks logits".split()
    tensors = {**dict.fromkeys(names), "q": Q, "k": K, "v": V, **change}
    with pytest.raises(RuntimeError, match="sla2: invalid argument: " + re.escape(message)):
        torch.ops.sla2.forward(*tensors.values(), *sla2.config.pack(CONFIG, None), False)


def test_operator_called_directly_says_what_is_wrong():
    with pytest.raises(RuntimeError, match="sla2: invalid argument: options must have 12 values"):
        torch.ops.sla2.route(Q, K, None, None, None, [1], [0.5])

"""The C++ transformer against diffusers' WanTransformer3DModel, on small random configurations."""

import json
import os
import pathlib
import subprocess

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from safetensors.torch import load_file, save_file  # noqa: E402

from program import WAN  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("SLA2_BUILD_DIR", ROOT / "build" / "release"))
PROGRAM = BUILD / "bin" / "wan_forward"

BASE = {**WAN, "attention_head_dim": 24}  # no power of two
PIXELS = dict(patch_size=(1, 8, 8), in_channels=3, out_channels=3)
# name, changes of BASE, tokens (frames, height, width), batch, text length
CASES = [
    ("base", {}, (3, 4, 4), 1, 5),
    ("odd_grid", {}, (5, 7, 3), 2, 1),
    ("pixels", dict(PIXELS, attention_head_dim=64), (4, 5, 3), 2, 4),
    ("time_patch", dict(patch_size=(2, 1, 3), num_attention_heads=3), (3, 5, 2), 1, 7),
    ("no_cross_norm", dict(cross_attn_norm=False), (2, 3, 5), 1, 5),
    ("wide_heads", dict(attention_head_dim=128, num_attention_heads=1), (2, 2, 7), 2, 3),
    ("head_of_16", dict(attention_head_dim=16, num_attention_heads=5), (1, 6, 6), 1, 2),
    ("other_channels_out", dict(out_channels=7, freq_dim=33), (2, 3, 2), 1, 2),
    ("eps_and_layers", dict(eps=1e-3, num_layers=4), (2, 3, 2), 3, 2),
]


@pytest.fixture(scope="module", autouse=True)
def program():
    if not PROGRAM.exists():
        pytest.skip(f"{PROGRAM} is not built (set SLA2_BUILD_DIR, or run `make setup`)")


def make_case(changes, grid, batch, length):
    config = {**BASE, **changes}
    torch.manual_seed(1234)
    model = diffusers.WanTransformer3DModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases must matter too
            parameter.add_(0.05 * torch.randn_like(parameter))
    size = [tokens * patch for tokens, patch in zip(grid, config["patch_size"], strict=True)]
    inputs = dict(
        x=torch.randn(batch, config["in_channels"], *size),
        timestep=torch.linspace(999.0, 3.25, batch),
        text=torch.randn(batch, length, config["text_dim"]),
    )
    return model, inputs


def reference(model, inputs):
    with torch.no_grad():
        return model(inputs["x"], inputs["timestep"], inputs["text"], return_dict=False)[0]


def run(model_folder, inputs, folder, *options):
    save_file(inputs, folder / "in.safetensors")
    done = subprocess.run(
        [PROGRAM, model_folder, folder / "in.safetensors", folder / "out.safetensors", *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")["out"]


def relative_error(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("name,changes,grid,batch,length", CASES, ids=[case[0] for case in CASES])
def test_same_output(tmp_path, name, changes, grid, batch, length):
    model, inputs = make_case(changes, grid, batch, length)
    model.save_pretrained(tmp_path / "model")
    wanted = reference(model, inputs)
    got = run(tmp_path / "model", inputs, tmp_path)
    assert got.shape == wanted.shape
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(run(tmp_path / "model", inputs, tmp_path, "--tiles"), wanted) < 1e-5


def test_sharded_folder_of_diffusers(tmp_path):
    model, inputs = make_case({}, (2, 3, 3), 1, 3)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    got = run(tmp_path / "model", inputs, tmp_path)
    assert relative_error(got, reference(model, inputs)) < 1e-5


@pytest.mark.parametrize("shard", [1 << 30, 40000], ids=["whole", "sharded"])
def test_diffusers_loads_what_we_save(tmp_path, shard):
    model, inputs = make_case({}, (2, 3, 3), 1, 3)
    model.save_pretrained(tmp_path / "model")
    run(tmp_path / "model", inputs, tmp_path, "--save", tmp_path / "saved", "--shard", str(shard))
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard == 40000)
    loaded, info = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info.values()), info
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    # The weights are the same bits; where the file's mapping puts them decides the order of sums.
    assert relative_error(reference(loaded, inputs), reference(model, inputs)) < 1e-6


def test_image_to_video_is_refused(tmp_path):
    model, inputs = make_case({}, (1, 2, 2), 1, 2)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_dim": 1280}))
    save_file(inputs, tmp_path / "in.safetensors")
    done = subprocess.run(
        [PROGRAM, tmp_path / "model", tmp_path / "in.safetensors", tmp_path / "out.safetensors"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "image_dim must be null" in done.stderr
    assert not (tmp_path / "out.safetensors").exists()

"""Running the program in tests: where it is, what it says, small models and clips."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--batch 2 --layers 1 --heads 1 --head-dim 16 --ffn-dim 32 --text-dim 16 --height 16 --width 16"
    " --frames 4 --caption-tokens 2 --warmup 2 --device cpu --threads 1 --seed 3"
).split()

# A small model of Wan's own kind, as diffusers takes it.
WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=20,
    freq_dim=32,
    ffn_dim=64,
    num_layers=2,
    cross_attn_norm=True,
    rope_max_seq_len=64,
)


def find_program():
    candidates = [
        os.environ.get("SLA2_PROGRAM", ""),
        ROOT / "build/release/bin/sla2",
        ROOT / ".venv/bin/sla2",
    ]
    return next((str(path) for path in candidates if path and Path(path).is_file()), None)


PROGRAM = find_program()


def make_media(ffmpeg, arguments):
    subprocess.run([ffmpeg, "-v", "error", "-y", *map(str, arguments)], check=True)


def sla2(*arguments, timeout=120, **more):
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **more
    )


def done(*arguments):
    result = sla2(*arguments)
    assert result.returncode == 0, (arguments, result.stderr)
    return result


def start(*arguments):
    """The running program; its output is read by communicate()."""
    return subprocess.Popen(
        [PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def pretrain(clips, out, *more, steps=6):
    return sla2("pretrain", "--data", clips, "--out", out, "--steps", steps, *TINY, *more)


def wait_until(process, reached):
    """Until reached(); the process must still run."""
    end = time.time() + 90
    while time.time() < end:
        assert process.poll() is None, process.communicate()
        if reached():
            return
        time.sleep(0.002)
    raise AssertionError("no progress")


def error_of(result, code):
    """The one line of an error."""
    assert result.returncode == code, result
    lines = [line for line in result.stderr.splitlines() if line.startswith("sla2: error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def metadata_of(path):
    """A safetensors file's metadata."""
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]


def contents_of(folder):
    """Every file below the folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def page_of(path):
    """What a report page's script puts into each element; skips without node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not there to run the page's script")
    script = Path(__file__).with_name("run_page.js")
    result = subprocess.run([node, script, path], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)

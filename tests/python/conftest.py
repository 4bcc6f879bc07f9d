"""Where the tests run, and what those of the program share."""

import os

import pytest
import torch

from program import make_media, pretrain
from sla2 import ops


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Every test that asks for it runs on the CPU and on a GPU."""
    if request.param == "cuda":
        if not ops.HAS_CUDA:
            pytest.skip("this build has no CUDA backend")
        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU here")
    return request.param


@pytest.fixture(scope="session")
def ffmpeg():
    path = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    os.environ["SLA2_FFMPEG"] = path
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory, ffmpeg):
    """A folder with bars.mp4 and noise.mp4, two seconds each."""
    folder = tmp_path_factory.mktemp("clips")
    for name, source in (
        ("bars", "testsrc=size=32x32:rate=8"),
        ("noise", "mandelbrot=size=32x32:rate=8"),
    ):
        make_media(
            ffmpeg,
            ["-f", "lavfi", "-i", source, "-t", "2", "-pix_fmt", "yuv420p", folder / f"{name}.mp4"],
        )
    return folder


@pytest.fixture(scope="session")
def model(clips, tmp_path_factory):
    """The smallest model, 6 steps old: do not write into it."""
    out = tmp_path_factory.mktemp("model") / "m"
    result = pretrain(clips, out)
    assert result.returncode == 0, result.stderr
    return out

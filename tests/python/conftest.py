"""Where the tests run."""

import pytest
import torch

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

"""fp8 on a CPU: refused by the program, and never silent in the library."""

import subprocess
import sys

import pytest

from program import PROGRAM, sla2

needs_program = pytest.mark.skipif(PROGRAM is None, reason="the program is not built")
SHAPE = "--shape 1,1,256,16 --keep 0.5 --block-q 32 --block-k 32 --repeats 1 --device cpu".split()


@needs_program
def test_the_program_refuses_fp8_on_a_cpu(monkeypatch):
    monkeypatch.delenv("SLA2_IMPLEMENTATION", raising=False)
    done = sla2("bench", "op", "--precision", "fp8", *SHAPE)
    assert done.returncode == 2
    assert "--precision fp8 needs a GPU, got --device cpu" in done.stderr
    assert "int8, bf16 or fp32" in done.stderr


def test_the_library_says_that_it_fell_back():
    code = """
import torch, sla2
q = torch.randn(1, 1, 64, 16)
for _ in range(2):
    sla2.attention(q, q, q, config=sla2.Config(precision="fp8"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [x for x in done.stderr.splitlines() if x.startswith("sla2: ")]
    assert len(lines) == 1
    assert lines[0].startswith("sla2: forward runs on the reference, which is very slow: ")

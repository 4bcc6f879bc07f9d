#!/usr/bin/env bash
# Builds the wheel, installs it into a scratch environment that shares this one's torch, and runs it there.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf dist
make wheel
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
site=$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps dist/*.whl
# torch and what it needs; the source tree's own sla2.pth is not read: .pth files of a path that is
# added by a .pth file are not.
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/torch.pth"
cd "$scratch"
"$scratch/venv/bin/python" - "$site" <<'PY'
import sys

import torch

import sla2

assert sla2.__file__.startswith(sys.argv[1]), sla2.__file__
q = torch.randn(1, 2, 256, 64, requires_grad=True)
out = sla2.attention(q, q, q, config=sla2.Config(keep=0.3))
out.sum().backward()
assert torch.isfinite(q.grad).all()
print(f"wheel: sla2 {sla2.__version__} runs with torch {torch.__version__}")
PY

#!/usr/bin/env bash
# Formatting, clang-tidy on the torch-free sources, Python, and the rule that the core knows no torch.
set -euo pipefail
cd "$(dirname "$0")/.."
git ls-files -z '*.cpp' '*.h' '*.inc' '*.cu' '*.cuh' | xargs -0 clang-format --dry-run -Werror
.venv/bin/ruff check --quiet python tests bench tools
.venv/bin/ruff format --check --quiet python tests bench tools
if grep -rnE '#include *[<"](torch|ATen|c10)/' include src io; then
  echo "lint: include/, src/ and io/ must not include torch" >&2
  exit 1
fi
# Not the sources with torch/torch.h: parsing it alone takes 20 s a file.
git ls-files -z 'src/*.cpp' 'io/*.cpp' 'bench/*.cpp' |
  xargs -0 -P "$(nproc)" -n 1 clang-tidy -p build/release --quiet
echo "lint: clean"

#!/usr/bin/env bash
# Formatting, clang-tidy on the torch-free sources, Python, and the repository's own rules.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/sources.sh
cpp_sources | xargs -0 clang-format --dry-run -Werror
# shellcheck disable=SC2086  # a list of folders
.venv/bin/ruff check --quiet $python_sources
# shellcheck disable=SC2086
.venv/bin/ruff format --check --quiet $python_sources
.venv/bin/python tools/check_repository.py
# Not the sources with torch/torch.h: parsing it alone takes 20 s a file.
git ls-files -z 'src/*.cpp' 'io/*.cpp' 'bench/*.cpp' |
  xargs -0 -P "$(nproc)" -n 1 clang-tidy -p build/release --quiet
echo "lint: clean"

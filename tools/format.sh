#!/usr/bin/env bash
# Repairs what lint.sh refuses of formatting.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/sources.sh
cpp_sources | xargs -0 clang-format -i
# shellcheck disable=SC2086  # a list of folders
.venv/bin/ruff check --fix --quiet $python_sources
# shellcheck disable=SC2086
.venv/bin/ruff format --quiet $python_sources

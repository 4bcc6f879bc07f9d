#!/usr/bin/env bash
# Formatting, Python lint, and the rule that the core knows no torch.
set -euo pipefail
cd "$(dirname "$0")/.."
git ls-files -z '*.cpp' '*.h' | xargs -0 clang-format --dry-run -Werror
.venv/bin/ruff check python tests
if grep -rnE '#include *[<"](torch|ATen|c10)/' include src io; then
  echo "lint: include/, src/ and io/ must not include torch" >&2
  exit 1
fi
echo "lint: clean"

#!/usr/bin/env bash
# ctest, then pytest; the last line is `N passed, N failed, N skipped`. Exits 1 if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
logs=build/test-logs
mkdir -p $logs
ctest --test-dir build/release --output-on-failure --output-junit "$PWD/$logs/ctest.xml" \
  --parallel "$(nproc)"
.venv/bin/python -m pytest tests/python -q -rs --junitxml=$logs/pytest.xml
.venv/bin/python - $logs/ctest.xml $logs/pytest.xml <<'PY'
import sys
import xml.etree.ElementTree as ET

passed = failed = skipped = 0
for path in sys.argv[1:]:
    try:
        cases = list(ET.parse(path).getroot().iter("testcase"))
    except (OSError, ET.ParseError) as error:
        print(f"{path}: {error}")
        cases = []
    if not cases:
        failed += 1  # a runner that ran nothing has failed
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(failed > 0)
PY

#!/usr/bin/env bash
# ctest and pytest; the last line is `N passed, N failed, N skipped`. Exits 1 if anything failed: a
# test, a runner, or a test program that is not there.
set -uo pipefail
cd "$(dirname "$0")/.."
build=${SLA2_TEST_BUILD:-build/release}   # what ctest runs
tests=${SLA2_TEST_PYTHON:-tests/python}   # what pytest runs
logs=${SLA2_TEST_LOGS:-build/test-logs}
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
rm -f "$logs"/ctest.xml "$logs"/pytest.xml  # an old log must not speak for a runner that died
# At the same time: ctest's tests keep a core busy each, pytest's wait for programs to start.
.venv/bin/python -m pytest "$tests" -q -rs --junitxml="$logs/pytest.xml" > "$logs/pytest.log" 2>&1 &
pytest=$!
trap 'kill $pytest 2> /dev/null || true' EXIT
ctest --test-dir "$build" --output-on-failure --output-junit "$logs/ctest.xml" \
  --parallel "$(nproc)"
ctest_status=$?
wait $pytest
pytest_status=$?
trap - EXIT
cat "$logs/pytest.log"
.venv/bin/python tools/count_tests.py "$logs/ctest.xml" $ctest_status "$logs/pytest.xml" $pytest_status

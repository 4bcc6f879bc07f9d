"""The repository's own tools: what must fail there fails."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CTEST = shutil.which("ctest")

PASSES = 'add_test([=[suite.passes]=] "true")\n'
SKIPS = (
    'add_test([=[suite.skips]=] "echo" "[  SKIPPED ]")\n'
    'set_tests_properties([=[suite.skips]=] PROPERTIES SKIP_REGULAR_EXPRESSION "SKIPPED")\n'
)
MISSING = 'add_test([=[suite.gone]=] "/nowhere/core_test")\n'
NOT_BUILT = "add_test([=[core_test_NOT_BUILT]=] core_test_NOT_BUILT)\n"
FAILS = 'add_test([=[suite.fails]=] "false")\n'


def run_tests(folder, ctest, pytest_code="def test_one():\n    pass\n"):
    """The last line and the status of run_tests.sh over tests of our own."""
    build, tests = folder / "build", folder / "tests"
    build.mkdir()
    tests.mkdir()
    if ctest is not None:
        (build / "CTestTestfile.cmake").write_text(ctest)
    (tests / "test_one.py").write_text(pytest_code)
    environment = {
        **os.environ,
        "SLA2_TEST_BUILD": str(build),
        "SLA2_TEST_PYTHON": str(tests),
        "SLA2_TEST_LOGS": str(folder / "logs"),
    }
    environment.pop("PYTEST_CURRENT_TEST", None)
    done = subprocess.run(
        [ROOT / "tools" / "run_tests.sh"], env=environment, capture_output=True, text=True
    )
    return done.stdout.splitlines()[-1], done.returncode


needs_ctest = pytest.mark.skipif(CTEST is None, reason="ctest is not on PATH")


@needs_ctest
@pytest.mark.parametrize(
    "ctest,last_line,status",
    [
        (PASSES + SKIPS, "2 passed, 0 failed, 1 skipped", 0),
        (PASSES + FAILS, "2 passed, 1 failed, 0 skipped", 1),
        (PASSES + MISSING, "2 passed, 1 failed, 0 skipped", 1),
        (PASSES + NOT_BUILT, "2 passed, 1 failed, 0 skipped", 1),
        (None, "1 passed, 1 failed, 0 skipped", 1),
    ],
    ids=["good", "fails", "program_is_gone", "program_was_not_built", "no_tests"],
)
def test_a_missing_test_program_fails(tmp_path, ctest, last_line, status):
    assert run_tests(tmp_path, ctest) == (last_line, status)


@needs_ctest
@pytest.mark.parametrize(
    "code",
    ["import nowhere\n", "", "import os\n\n\ndef test_dies():\n    os._exit(3)\n"],
    ids=["broken", "no_tests", "dies"],
)
def test_a_broken_pytest_fails(tmp_path, code):
    (tmp_path / "logs").mkdir()
    old = '<testsuite><testcase name="old"/></testsuite>'
    (tmp_path / "logs" / "pytest.xml").write_text(old)
    assert run_tests(tmp_path, PASSES, code) == ("1 passed, 1 failed, 0 skipped", 1)

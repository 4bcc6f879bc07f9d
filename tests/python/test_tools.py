"""The repository's own tools: what must fail there fails."""

import os
import re
import shutil
import subprocess
import sys
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


def check_repository(folder, files):
    """What check_repository.py says about a repository of these files."""
    files = {"CMakeLists.txt": "project(sla2 VERSION 0.4.2 LANGUAGES CXX)\n", **files}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_repository.py", folder],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "room", ["src/core/a.cpp", "include/sla2/a.h", "io/a.cpp", "src/cuda/a.cu"]
)
@pytest.mark.parametrize(
    "line",
    [
        "#include <torch/torch.h>",
        "# include <torch/torch.h>",
        '  #  include "c10/core/Device.h"',
        "#include <caffe2/core/logging.h>",
        '#include "torch_ops/arguments.h"',
        '#include "video/weights.h"',
        "#include <ATen/ATen.h>",
    ],
)
def test_the_core_includes_no_torch(tmp_path, room, line):
    status, text = check_repository(tmp_path, {room: f"int a;\n{line}\n"})
    assert status == 1 and f"{room}:2: include/, src/ and io/ must not include torch" in text


def test_other_includes_pass(tmp_path):
    lines = '#include <vector>\n#include "io/video_file.h"\n// #include <torch/torch.h>\n'
    files = {"src/a.cpp": lines, "video/a.cpp": "#include <torch/torch.h>\n"}
    assert check_repository(tmp_path, files) == (0, "")


def test_documents_that_are_named_exist(tmp_path):
    files = {"src/a.cpp": "// docs/here.md\n// docs/gone.md\n", "docs/here.md": ""}
    assert check_repository(tmp_path, files) == (
        1,
        "lint: src/a.cpp:2: docs/gone.md does not exist\n",
    )


def test_the_version_stands_in_one_place(tmp_path):
    status, text = check_repository(tmp_path, {"python/a.py": 'V = "0.4.2"\n', "b.py": "10.4.2.1"})
    assert status == 1 and text.startswith("lint: python/a.py:1: the version 0.4.2")
    assert len(text.splitlines()) == 1


def test_this_repository_keeps_its_rules():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_repository.py"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_lint_and_format_take_the_same_files():
    for script in ("lint.sh", "format.sh"):
        text = (ROOT / "tools" / script).read_text()
        assert "source tools/sources.sh" in text and "cpp_sources | xargs" in text
        assert len(re.findall(r"ruff .*\$python_sources", text)) == 2
        assert "ls-files -z '*.cpp'" not in text
    assert "tools/format.sh" in (ROOT / "Makefile").read_text()


def test_versions_agree():
    import sla2

    version = re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert sla2.__version__ == sla2.info()["version"] == version


LIBRARY = ROOT / "python" / "sla2" / "lib" / "libsla2_torch.so"
TORCH_CPP = re.compile(r"_Z.*(?<!\d)(2at|3c10|5torch|6caffe2|8pybind11)\w")  # mangled namespaces


def symbols(option):
    done = subprocess.run(
        ["nm", "--dynamic", option, LIBRARY], capture_output=True, text=True, check=True
    )
    return [line.split()[-1].split("@")[0] for line in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not on PATH")
def test_the_library_is_tied_to_no_python_and_no_cpp_torch():
    needed = symbols("--undefined-only")
    assert "aoti_torch_get_sizes" in needed
    assert [name for name in needed if TORCH_CPP.match(name)] == []
    assert TORCH_CPP.match("_ZN3c105ErrorC1Ev") and TORCH_CPP.match("_ZNK2at10TensorBase4sizeEl")
    assert [name for name in needed if re.match(r"_?Py[A-Z_]", name)] == []
    # Of ours only the version: two copies of the library in one process do not meet.
    assert [name for name in symbols("--defined-only") if "sla2" in name] == ["sla2_torch_version"]


@pytest.mark.parametrize(
    "program,says,message",
    [
        (
            "cmake",
            "cmake version 3.20.1",
            "setup: cmake must be of version 3.25 or later, got 3.20.1",
        ),
        ("g++", "9.4.0", "setup: g++ must be of version 12 or later, got 9.4.0"),
        ("python3", "3.8.10", "setup: python3 must be of version 3.10 or later, got 3.8.10"),
        ("cmake", "", "setup: cmake must be of version 3.25 or later, got none"),
    ],
)
def test_setup_names_a_tool_that_is_too_old(tmp_path, program, says, message):
    """In a copy that has the scripts alone: nothing is installed or built."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, text in ("dpkg-query", "install ok installed"), (program, says):
        (fakes / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (fakes / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}"}
    environment.pop("CXX", None)
    done = subprocess.run(
        [tmp_path / "tools" / "setup.sh"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (1, message)
    assert not (tmp_path / ".venv").exists()

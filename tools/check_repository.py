#!/usr/bin/env python3
"""Rules of the repository that no compiler checks; prints every breach, exits with 1 on any.

- include/, src/ and io/ know no torch.
- A document that is named somewhere exists.
- The version stands in CMakeLists.txt alone.

check_repository.py [FOLDER]: of another tree (the tests' own). Only files that git tracks."""

import re
import subprocess
import sys
from pathlib import Path

TORCH = re.compile(r'^\s*#\s*include\s*[<"]\s*(torch|ATen|c10|caffe2|torch_ops|video)/')
DOCUMENT = re.compile(r"\bdocs/[\w-]+\.md\b")
VERSION = re.compile(r"^project\(sla2 VERSION (\d+\.\d+\.\d+)", re.MULTILINE)
TEXT = {
    ".cpp",
    ".h",
    ".inc",
    ".cu",
    ".cuh",
    ".py",
    ".md",
    ".txt",
    ".toml",
    ".sh",
    ".cmake",
    ".html",
}
SOURCES = {".cpp", ".h", ".inc", ".cu", ".cuh"}
# The changelog speaks of versions, the tests of breaches, requirements of other packages.
OTHERS = ("CHANGELOG.md", "tests/", "tools/requirements.txt", "tools/check_repository.py")


def tracked(root: Path) -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    return [
        name for name in listing.stdout.decode().split("\0") if name and (root / name).is_file()
    ]


def breaches(root: Path) -> list[str]:
    found = []
    version = VERSION.search((root / "CMakeLists.txt").read_text())
    if version is None:
        found.append("CMakeLists.txt: must begin with project(sla2 VERSION x.y.z, found none")
    for name in tracked(root):
        if Path(name).suffix not in TEXT or name in ("tools/check_repository.py",):
            continue
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{name}:{number}: "
            in_core = name.startswith(("include/", "src/", "io/")) and Path(name).suffix in SOURCES
            if in_core and TORCH.search(line):
                found.append(
                    where + "include/, src/ and io/ must not include torch: " + line.strip()
                )
            if not name.startswith("tests/"):
                for document in DOCUMENT.findall(line):
                    if not (root / document).is_file():
                        found.append(where + f"{document} does not exist")
            if version and name != "CMakeLists.txt" and not name.startswith(OTHERS):
                if re.search(rf"(?<![\d.]){re.escape(version[1])}(?![\d.])", line):
                    found.append(where + f"the version {version[1]} stands in CMakeLists.txt alone")
    return found


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    found = breaches(root)
    for breach in found:
        print(f"lint: {breach}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

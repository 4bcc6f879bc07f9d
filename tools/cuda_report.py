#!/usr/bin/env python3
"""What ptxas says about the kernels: registers, spills, stack, for every architecture.

cuda_report.py compile NVCC ARGUMENTS...  runs the compiler (CMake's launcher) and keeps what ptxas
                                          says beside the object, as OBJECT.ptxas
cuda_report.py check FOLDER [ARCH...]     fails if main kernels spill or one is missing
cuda_report.py table FOLDER               the Markdown table of docs/cuda.md
"""

import pathlib
import re
import subprocess
import sys
from collections import defaultdict

FORMATS = ["int8", "fp8", "bf16", "fp16", "fp32"]
MOST_REGISTERS = 255
# Bytes stored a thread: main kernels spill nothing; the rest (head sizes over 128, inputs of
# several bf16 terms) a little.
SPILLS_OF_OTHERS = 512


def compile_and_keep(command):
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    lines = result.stderr.splitlines(keepends=True)
    report = [line for line in lines if line.startswith(("ptxas info", "    "))]
    sys.stderr.writelines(line for line in lines if line not in report)
    if result.returncode == 0 and "-o" in command and report:
        pathlib.Path(command[command.index("-o") + 1] + ".ptxas").write_text("".join(report))
    return result.returncode


class Kernel:
    def __init__(self, name, arch):
        self.name, self.arch = name, arch
        self.registers = self.stack = self.stores = self.loads = 0


def is_main(name):
    """Kernels of the usual problems: head sizes up to 128, 16-bit or quantised products of bf16."""
    template = re.search(r"<(.*)>", name)
    if template is None:
        return True
    arguments = [part.strip() for part in template.group(1).split(",")]
    if name.startswith("attend_kernel"):
        return arguments[0] != "fp32" and arguments[1] != "256"
    if name.startswith("sums_kernel"):
        return arguments[0] == "false"
    if name.startswith(("keys_kernel", "reduce_kernel", "prepare_kernel")):
        return arguments[0] == "Bf16" and arguments[1] != "256"
    return arguments[0] == "1" and arguments[-1] != "256"


def plain_names(mangled):
    names = sorted(mangled)
    out = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    plain = {}
    for name, full in zip(names, out, strict=True):
        short = full.replace("(anonymous namespace)::", "").replace("sla2::cuda::", "")
        short = re.sub(r"\(Format\)(\d)", lambda m: FORMATS[int(m.group(1))], short)
        short = re.sub(r"\([A-Z]\w+\)$", "", short).replace("void ", "")
        plain[name] = short
    return plain


def read_reports(folder):
    kernels = []
    for path in sorted(pathlib.Path(folder).rglob("*.ptxas")):
        current = None
        for line in path.read_text().splitlines():
            if entry := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
                current = Kernel(*entry.groups())
                current.file = path.name.removesuffix(".cu.o.ptxas")
                kernels.append(current)
            elif current is None:
                continue
            elif spills := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
            ):
                current.stack, current.stores, current.loads = map(int, spills.groups())
            elif used := re.search(r"Used (\d+) registers", line):
                current.registers = int(used.group(1))
    if not kernels:
        raise SystemExit(f"{folder}: no *.ptxas: build with -DSLA2_CUDA=ON first")
    names = plain_names({kernel.name for kernel in kernels})
    for kernel in kernels:
        kernel.name = names[kernel.name]
    return kernels


def check(folder, architectures):
    kernels = read_reports(folder)
    problems = []
    by_arch = defaultdict(set)
    for kernel in kernels:
        by_arch[kernel.arch].add(kernel.name)
        allowed = 0 if is_main(kernel.name) else SPILLS_OF_OTHERS
        if kernel.stores > allowed:
            problems.append(
                f"{kernel.arch} {kernel.name}: spill stores must be at most {allowed} bytes, got "
                f"{kernel.stores}"
            )
        if not 0 < kernel.registers <= MOST_REGISTERS:
            problems.append(f"{kernel.arch} {kernel.name}: {kernel.registers} registers")
    for arch in architectures:
        if f"sm_{arch}" not in by_arch:
            problems.append(f"sm_{arch}: no report, got {', '.join(sorted(by_arch))}")
    if len({frozenset(names) for names in by_arch.values()}) > 1:
        problems.append("the architectures have different kernels")
    print(f"{len(kernels)} kernels of {len(by_arch)} architectures, {len(problems)} problems")
    print("\n".join(problems))
    return 1 if problems else 0


def table(folder):
    kernels = read_reports(folder)
    architectures = sorted({k.arch for k in kernels}, key=lambda arch: int(arch[3:]))
    rows = defaultdict(dict)
    for kernel in kernels:
        rows[(kernel.file, kernel.name)][kernel.arch] = kernel
    print(f"| kernel | main | {' | '.join(architectures)} |")
    print(f"|---|---|{'---|' * len(architectures)}")
    for (_, name), by_arch in rows.items():
        cells = []
        for arch in architectures:
            kernel = by_arch[arch]
            cells.append(f"{kernel.registers}" + (f" ({kernel.stores} B)" if kernel.stores else ""))
        print(f"| {name} | {'yes' if is_main(name) else ''} | {' | '.join(cells)} |")
    return 0


def main(arguments):
    if len(arguments) > 1 and arguments[0] == "compile":
        return compile_and_keep(arguments[1:])
    if len(arguments) > 1 and arguments[0] == "check":
        return check(arguments[1], arguments[2:])
    if len(arguments) == 2 and arguments[0] == "table":
        return table(arguments[1])
    sys.stderr.write(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Registers, shared memory and spills of every CUDA kernel, as the build's ptxas reported them.

`python -m pytest python_tests/test_kernel_registers.py --update-readme` writes docs/kernel_registers.md.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from harness_tools import nvcc

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch.__version__}"
DOCUMENT = ROOT / "docs/kernel_registers.md"

HEADER = """# Registers of the CUDA kernels

What ptxas of nvcc {version} reports: registers per thread, by architecture (a multiprocessor has 65536), and static
shared memory in bytes. Rings of slabs are dynamic shared memory, which ptxas does not know. No kernel spills registers:
a test refuses one that does. The same test writes this file:
`make test ARGS="python_tests/test_kernel_registers.py --update-readme"`.

"""


class Usage(NamedTuple):
    registers: int
    shared: int
    stack: int  # bytes; spills are kept there
    spills: int  # bytes


def enumerators():
    """{(enum, value): enumerator} of the kernels' headers: c++filt prints numbers."""
    names = {}
    for header in ROOT.glob("csrc/cuda/**/*.h"):
        text = re.sub(r"//.*", "", header.read_text())
        for enum, body in re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", text):
            value = -1
            for item in filter(None, map(str.strip, body.split(","))):
                name, _, number = item.partition("=")
                value = int(number) if number else value + 1
                names[enum, str(value)] = name.strip()
    return names


def readable(symbols):
    """{mangled name: template and its arguments}."""
    filtered = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names, result = enumerators(), {}
    for symbol, text in zip(symbols, filtered.stdout.splitlines(), strict=True):
        text = text.replace("backpack_cuda::cuda::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
        text = re.sub(r"\((\w+)\)(\d+)", lambda match: names.get(match.groups(), match[0]), text)
        depth, end = 0, len(text)
        for position, character in enumerate(text):  # up to the function's arguments
            depth += (character == "<") - (character == ">")
            if character == "(" and not depth:
                end = position
                break
        result[symbol] = text[:end].replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
    return result


def parse(log):
    """[(symbol, architecture, usage)] of one compilation."""
    entries = re.split(r"^ptxas info\s+: Compiling entry function ", log, flags=re.M)[1:]
    found = []
    for entry in entries:
        symbol, architecture = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
        stack, stores, loads = map(
            int,
            re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append((symbol, architecture, Usage(registers, int(shared[1]) if shared else 0, stack, stores + loads)))
    return found


@pytest.fixture(scope="module")
def usages():
    """{source: {kernel: {architecture: usage}}} of the build."""
    if not list(BUILD.glob("CMakeFiles/*.dir/csrc/cuda/**/*.ptxas")):
        pytest.skip("the library was built without CUDA")
    result = {}
    for source in sorted(ROOT.glob("csrc/cuda/**/*.cu")):
        name = source.relative_to(ROOT)
        logs = list(BUILD.glob(f"CMakeFiles/*.dir/{name}.o.ptxas"))
        assert logs, f"{name} has not been built"
        found = [entry for log in logs for entry in parse(log.read_text())]
        assert found or "__global__" not in source.read_text(), f"ptxas said nothing about {name}"
        names = readable([symbol for symbol, _, _ in found]) if found else {}
        kernels = defaultdict(dict)
        for symbol, architecture, usage in found:
            kernels[names[symbol]][architecture] = usage
        result[str(name.relative_to("csrc/cuda"))] = kernels
    return result


def test_nvcc_warns_of_nothing(usages):
    warnings = [
        line
        for log in BUILD.glob("CMakeFiles/*.dir/csrc/cuda/**/*.ptxas")
        for line in log.read_text().splitlines()
        if "warning" in line.lower()
    ]
    assert usages and not warnings, "\n".join(warnings)


def test_no_kernel_spills(usages):
    spilling = [
        f"{source}: {kernel} for {architecture}: {usage}"
        for source, kernels in usages.items()
        for kernel, by_architecture in kernels.items()
        for architecture, usage in by_architecture.items()
        if usage.spills or usage.stack
    ]
    assert not spilling, "\n".join(spilling)


def table(usages):
    architectures = sorted({name for kernels in usages.values() for found in kernels.values() for name in found})
    rows = [
        "| source | kernel | " + " | ".join(architectures) + " | shared |",
        "|---|---|" + "--:|" * len(architectures) + "--:|",
    ]
    for source, kernels in usages.items():
        for kernel, found in sorted(kernels.items()):
            registers = [str(found[name].registers) if name in found else "" for name in architectures]
            shared = max(usage.shared for usage in found.values())
            rows.append(f"| {source} | `{kernel}` | " + " | ".join(registers) + f" | {shared} |")
    return "\n".join(rows) + "\n"


def nvcc_version():
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


@pytest.mark.skipif(nvcc is None, reason="no nvcc")
def test_table_is_up_to_date(usages, request):
    text = HEADER.format(version=nvcc_version()) + table(usages)
    if request.config.getoption("--update-readme"):
        DOCUMENT.write_text(text)
    current = DOCUMENT.read_text()
    if f"nvcc {nvcc_version()} " not in current:
        pytest.skip("the table is another nvcc's, which uses other registers")
    assert current == text, f"{DOCUMENT.name} is out of date: run this test with --update-readme"

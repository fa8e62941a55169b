"""Small helpers of all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

every_kernel_is_slow = False  # set by `--cuda-on-cpu`, before the tests are imported


def examples(count: int) -> int:
    """How many random examples to try, where there would be `count` with kernels at full speed."""
    return max(1, count // 6) if every_kernel_is_slow else count


def named(arguments: str, cases: dict[str, Any]):
    """`pytest.mark.parametrize` over a dict of cases, its keys as test ids."""
    return pytest.mark.parametrize(arguments, list(cases.values()), ids=list(cases))


def some(cases: dict[str, Any], *names: str) -> dict[str, Any]:
    """The named ones of `cases`."""
    return {name: cases[name] for name in names}


def subprocess_environment() -> dict[str, str]:
    """The environment of a Python program that imports the package and these helpers from the source tree."""
    here = Path(__file__).resolve().parent
    paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_memory_probe(program: str, *arguments: str) -> dict[str, int]:
    """{case: bytes} as a program of this folder prints it, in a process that gives freed memory back at once."""
    probe = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    environment = {**subprocess_environment(), "MALLOC_MMAP_THRESHOLD_": "65536"}
    finished = subprocess.run(probe, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def assert_close(name: str, actual: Tensor, expected: Tensor, largest: float, reference: float | None = None) -> None:
    """Equal shapes, all finite, error at most `largest` times the largest expected entry (or `reference`)."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if expected.numel():
        error = (actual.detach().cpu().double() - expected.detach()).abs().max().item()
        bound = largest * (expected.abs().max().item() if reference is None else reference)
        assert error <= bound, f"{name}: error {error:.3e} above {bound:.3e}"  # false for NaN

"""Tools of the tests that run CUDA kernels on the CPU (csrc/harness) or through nvcc."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc" / "harness"))

import harness_build  # noqa: E402

SEEDS = range(5)
SANITIZER_RUNTIMES = {"": [], "thread": ["libtsan.so"], "address": ["libasan.so", "libstdc++.so"]}


def reason_to_skip():
    if platform.machine() != "x86_64":
        return "the harness switches stacks on x86-64 only"
    if not shutil.which(harness_build.COMPILER):
        return f"no host compiler {harness_build.COMPILER}"
    if not harness_build.cuda_include_folders():
        return "NVIDIA's CUDA headers are missing: neither nvcc nor pip packages have them"
    return None


needs_harness = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))


def run_script(script, *arguments, sanitizer="", **environment):
    """Runs a Python program with the sanitizer's runtime preloaded; returns the completed process."""
    runtimes = [
        subprocess.run([harness_build.COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in SANITIZER_RUNTIMES[sanitizer]
    ]
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CUDA_ON_CPU_")},
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=67",
        "OPENBLAS_NUM_THREADS": "1",  # its threads would be reported as races
        "PYTHONMALLOC": "malloc",
        "TSAN_OPTIONS": "exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=67",
        **{name: str(value) for name, value in environment.items()},
    }
    if runtimes:
        variables["LD_PRELOAD"] = " ".join(done.stdout.strip() for done in runtimes)
    command = [sys.executable, *map(str, (script, *arguments))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:  # an old ThreadSanitizer on a kernel that randomises more bits
        without_randomisation = ["setarch", platform.machine(), "-R", *command]
        done = subprocess.run(without_randomisation, env=variables, capture_output=True, text=True)
    return done


# ---- the programs python_tests/<kernel>_on_cpu.py ----


def program(kernel):
    """run(library, arguments..., sanitizer=..., environment...) of a kernel's program."""
    return functools.partial(run_script, Path(__file__).with_name(f"{kernel}_on_cpu.py"))


def check_passes(run, library, *arguments, seeds=SEEDS):
    """The program must end well on every schedule; returns what it printed, each text once."""
    outputs = set()
    for seed in seeds:
        done = run(library, *arguments, CUDA_ON_CPU_SEED=seed)
        assert done.returncode == 0, f"seed {seed}\n{done.stdout}{done.stderr}"
        outputs.add(done.stdout)
    return outputs


def check_under_sanitizer(run, sanitizer, library, *arguments):
    """With several blocks at a time, for races between them, and buffers without slack."""
    done = run(library, *arguments, "--exact", sanitizer=sanitizer, CUDA_ON_CPU_RESIDENT=3)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- planted faults ----

PLAIN, ADDRESS, THREAD = "", "address", "thread"  # sanitizers
WRONG, REPORTED, RACE, OUT_OF_BOUNDS = 3, 4, 66, 67  # exit status of a kernel's program


class Fault(NamedTuple):
    """An error planted into a kernel's source, and how the kernel's program must end because of it."""

    sanitizer: str
    status: int | tuple[int, ...]  # one of these
    report: str  # pattern that the output must contain
    patches: list  # (path below csrc, text, replacement)


class FaultyLibraries:
    """Builds the library of every fault, two at a time; `build(fault)` compiles one."""

    def __init__(self, faults, build):
        harness_build.runtime_objects()
        with ThreadPoolExecutor(2) as pool:
            self._libraries = {name: pool.submit(build, fault) for name, fault in faults.items()}

    def __getitem__(self, name):
        return self._libraries[name].result()


def check_fault(fault, run, seeds=SEEDS):
    """`run(seed)` must end as the fault says: on every seed, or once under a sanitizer."""
    statuses = fault.status if isinstance(fault.status, tuple) else (fault.status,)
    for seed in seeds if not fault.sanitizer else [0]:
        done = run(seed)
        output = done.stdout + done.stderr
        caught = done.returncode in statuses and re.search(fault.report, output)
        assert caught, f"seed {seed}: status {done.returncode}\n{output}"


# ---- nvcc ----

nvcc = harness_build.find_nvcc()
needs_nvcc = pytest.mark.skipif(nvcc is None, reason="no nvcc")
BOTH_ARCHITECTURES = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]


def run_nvcc(*arguments):
    """nvcc's output; the test fails when nvcc does."""
    command = [nvcc, "-std=c++20", f"-I{ROOT / 'csrc'}", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr

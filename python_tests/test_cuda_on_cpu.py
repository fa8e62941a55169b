"""The tests of operators, layers and quantities once more, with the CUDA kernels executed on the CPU (csrc/harness).

Each file runs in a process of its own, in which `--cuda-on-cpu` swaps the operators.
"""

import subprocess
import sys

import operators_on_harness
import pytest
from harness_tools import ROOT, needs_harness
from helpers import subprocess_environment

FILES = [
    "test_backward_passes.py",
    "test_column_stats.py",
    "test_first_order.py",
    "test_kron_factor.py",
    "test_layers.py",
    "test_ops_dtypes.py",
    "test_ops_geometry.py",
    "test_outer_norm.py",
    "test_weighted_grad.py",
]
# Parts of names: tests of tools, of composites, of the CPU kernels alone, and of sums too long for the harness.
LEFT_OUT = [
    "opcheck",
    "compile",
    "gradcheck",
    "instruction_sets",
    "every_way",
    "peak_memory",
    "thread_counts",
    "long_sums",
]


@pytest.fixture(scope="module")
def library():
    return operators_on_harness.build()


@needs_harness
@pytest.mark.parametrize("file", FILES)
def test_file_passes_with_cuda_kernels(file, library, request):
    if request.config.getoption("--cuda-on-cpu"):
        pytest.skip("the kernels are swapped already")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--cuda-on-cpu",
        "-k",
        f"not ({' or '.join(LEFT_OUT)})",
        ROOT / "python_tests" / file,
    ]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=subprocess_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

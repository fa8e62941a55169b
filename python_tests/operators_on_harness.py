"""The CUDA operators for CPU tensors: bindings and kernels as they are, executed by csrc/harness.

`python_tests --cuda-on-cpu` swaps them for the CPU's operators, so that every test of operators, layers and quantities
becomes a test of the CUDA code.
"""

import functools

import torch
from harness_tools import ROOT, harness_build

import backpack_cuda  # noqa: F401  (loads the operators that are swapped)

NAMESPACE = "backpack_cuda_on_cpu"
OPERATORS = (
    "linear_grad_stats",
    "conv_grad_stats",
    "conv_transpose_grad_stats",
    "bias_grad_stats",
    "outer_norm",
    "linear_weighted_grad",
    "conv_weighted_grad",
    "conv_transpose_weighted_grad",
    "linear_column_stats",
    "conv_column_stats",
    "conv_transpose_column_stats",
    "bias_column_stats",
    "linear_kron_factor",
    "conv_kron_factor",
    "_cuda_option",
)


def build(**options):
    """Compiles bindings and kernels, registered under NAMESPACE for CPU tensors; returns the library's path."""
    csrc = ROOT / "csrc"

    def below(pattern):
        return sorted(str(path.relative_to(csrc)) for path in csrc.glob(pattern))

    bindings = [
        *("library.cpp", "ops/convolution.cpp", "cpu/result_pool.cpp", "cpu/workspace.cpp"),
        *below("common/*.cpp"),
        *below("ops/*_cuda.cpp"),
        *below("cuda/**/*.cpp"),
    ]
    return harness_build.build(
        below("cuda/**/*.cu"),
        operators=bindings,
        defines=[f"-DBACKPACK_CUDA_OPERATORS={NAMESPACE}", "-DBACKPACK_CUDA_KEY=CPU", "-DBACKPACK_CUDA_SM90A"],
        **options,
    )


@functools.cache
def load():
    """The namespace of the CUDA operators for CPU tensors."""
    torch.ops.load_library(str(build()))
    return getattr(torch.ops, NAMESPACE)


def swap_in(set_attribute=setattr, called=lambda name: None):
    """Makes torch.ops.backpack_cuda call the CUDA operators, for the types that these serve.

    `set_attribute` may be monkeypatch.setattr; `called` is told the name of each CUDA operator that runs.
    """
    served = (torch.float32, torch.bfloat16, torch.float16)

    def call(name, cuda, cpu, *arguments):
        if name not in ("_cuda_option", "outer_norm") and arguments[0].dtype not in served:
            return cpu(*arguments)
        called(name)
        return cuda(*arguments)

    for name in OPERATORS:
        cuda, cpu = getattr(load(), name), getattr(torch.ops.backpack_cuda, name)
        set_attribute(torch.ops.backpack_cuda, name, functools.partial(call, name, cuda, cpu))

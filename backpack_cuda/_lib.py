"""Loads the operators' library. Importing never fails: what is wrong is said when an operator is first needed."""

from functools import cache
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_C.so")


def _load() -> str | None:
    """Loads the library; returns None, or the sentence that explains why it cannot be used."""
    if not _LIBRARY.exists():
        return (
            f"backpack_cuda is not built ({_LIBRARY.name} is missing beside the package): "
            "run `pip install --no-build-isolation .` in the source tree."
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"backpack_cuda's {_LIBRARY.name} does not load into torch {torch.__version__}: {error}"
    return None


PROBLEM = _load()


def operators():
    """The operators' namespace, `torch.ops.backpack_cuda`.

    Raises:
        RuntimeError: the library is missing or does not load; the message says what to do.
    """
    if PROBLEM is not None:
        raise RuntimeError(PROBLEM)
    return torch.ops.backpack_cuda


def require(operator: str, device_type: str) -> None:
    """Checks that `operator` can serve tensors on `device_type`.

    Raises:
        RuntimeError: the library is missing or does not load, or was built without the CUDA kernels that are needed.
    """
    operators()
    if device_type == "cuda" and not has_kernel(operator, device_type):
        raise RuntimeError(
            f"{operator}: this build of backpack_cuda has no CUDA kernels, so that CUDA tensors need another one, with "
            "nvcc on PATH or named by CUDACXX: `pip install --no-build-isolation .` in the source tree, or `make "
            "build` (BACKPACK_CUDA_WITH_CUDA=ON makes a build without nvcc fail)."
        )


@cache
def has_kernel(operator: str, device_type: str) -> bool:
    """Whether `operator` has a kernel for tensors on `device_type` ("cpu", "cuda", ...)."""
    operators()
    key, name = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type), f"backpack_cuda::{operator}"
    known = key is not None and torch._C._dispatch_has_kernel(name)  # an older library may lack the operator
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)

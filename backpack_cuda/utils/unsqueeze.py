"""Functions of matrices that take vectors, too."""

import functools
from collections.abc import Callable

from torch import Tensor


def kfacmp_unsqueeze_if_missing_dim(mat_dim: int) -> Callable[[Callable], Callable]:
    """Decorator of functions from a tensor with `mat_dim` dims to a tensor: an input without the last dim gets one.

    The result then has it removed again.
    """

    def decorate(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        @functools.wraps(function)
        def run(mat: Tensor) -> Tensor:
            if mat.dim() == mat_dim - 1:
                return function(mat.unsqueeze(-1)).squeeze(-1)
            return function(mat)

        return run

    return decorate

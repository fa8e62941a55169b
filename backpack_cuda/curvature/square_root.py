"""The square root of a curvature matrix, column by column."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class SquareRoot(NamedTuple):
    """Columns S_vn of a square root of the curvature at a tensor [N, *], block per sample.

    The block of sample n is sum_v signs[v, n] S_vn S_vn^T. Columns are formed on request, so that a sweep holds no more
    of them than its memory budget allows.
    """

    count: int  # V
    form: Callable[[int, int], tuple[Tensor, Tensor | None]]
    # form(begin, end) -> columns [end - begin, N, *] in the tensor's type and signs [end - begin, N], None if all are 1

"""The low-level calls for statistics of the per-sample gradients of columns: generalised Gauss-Newton diagonals."""

from collections.abc import Iterable

from torch import Tensor

from backpack_cuda import _lib
from backpack_cuda.ops import checks, dispatch
from backpack_cuda.stats import ColumnStats, ColumnWant


def linear_column_stats(
    input: Tensor, columns: Tensor, signs: Tensor | None = None, *, want: str | Iterable[str] = ("diag",)
) -> ColumnStats:
    """Statistics of G_vn = sum_t columns[v, n, t, :] input[n, t, :]^T, of a Linear layer's weight [O, I].

    Args:
        input: the layer's input [N, *, I].
        columns: V output gradients of every sample, [V, N, *, O]: the columns of a square root of a curvature matrix
            at the layer's output, scaled as that is (with the 1/N of a mean-reduced loss in the matrix).
        signs: factors of the squares, any real numbers, [V, N] in float32 (float64 for float64 operands); None: 1.
        want: a non-empty subset of "factor", "batch_diag", "diag".

    Returns:
        ColumnStats with "factor" [V, N, O, I] = G_vn in the operands' type, "batch_diag" [N, O, I] =
        sum_v signs[v, n] G_vn^2 and "diag" [O, I] = sum_vn signs[v, n] G_vn^2 in float32 (float64 for float64).

    Raises:
        ValueError: ranks, shapes or devices that do not fit, an unknown or empty `want`.
        TypeError: not a tensor, unequal types, or a type other than float32, float64, bfloat16, float16.
        RuntimeError: the package's library is not built, or not for the operands' device.
    """
    flags = checks.want(want, checks.COLUMN_WANTS)
    checks.linear_columns(input, columns)
    checks.signs(signs, columns)
    _lib.require("linear_column_stats", input.device.type)
    return dispatch.linear_column_stats(input, columns, signs, flags, ColumnWant.NOTHING)[0]


def conv_column_stats(
    input: Tensor,
    columns: Tensor,
    kernel_size: int | Iterable[int],
    *,
    signs: Tensor | None = None,
    stride: int | Iterable[int] = 1,
    padding: int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
    want: str | Iterable[str] = ("diag",),
) -> ColumnStats:
    """Statistics of the per-sample gradients G_vn of a convolution's weight [O, C/groups, *kernel_size].

    Args:
        input: the layer's input [N, C, *size] with 1, 2 or 3 spatial dimensions.
        columns: V output gradients of every sample, [V, N, O, *output size].
        kernel_size, stride, padding, dilation, groups: as in torch.nn.Conv2d; a single number stands for all
            dimensions. The padding is with zeros.
        signs, want: as in `linear_column_stats`, which also names the results, their scaling and the errors.
    """
    flags = checks.want(want, checks.COLUMN_WANTS)
    geometry = checks.conv_columns(input, columns, kernel_size, stride, padding, dilation, groups)
    checks.signs(signs, columns)
    _lib.require("conv_column_stats", input.device.type)
    return dispatch.conv_column_stats(geometry, input, columns, signs, flags, ColumnWant.NOTHING)[0]


def conv_transpose_column_stats(
    input: Tensor,
    columns: Tensor,
    kernel_size: int | Iterable[int],
    *,
    signs: Tensor | None = None,
    stride: int | Iterable[int] = 1,
    padding: int | Iterable[int] = 0,
    output_padding: int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
    want: str | Iterable[str] = ("diag",),
) -> ColumnStats:
    """`conv_column_stats` of a transposed convolution: its weight is [C, O/groups, *kernel_size].

    `output_padding` and the other sizes are as in torch.nn.ConvTranspose2d.
    """
    flags = checks.want(want, checks.COLUMN_WANTS)
    geometry = checks.conv_columns(input, columns, kernel_size, stride, padding, dilation, groups, True, output_padding)
    checks.signs(signs, columns)
    _lib.require("conv_transpose_column_stats", input.device.type)
    return dispatch.conv_column_stats(geometry, input, columns, signs, flags, ColumnWant.NOTHING)[0]


def bias_column_stats(
    columns: Tensor, signs: Tensor | None = None, *, want: str | Iterable[str] = ("diag",), channel_dim: int = -1
) -> ColumnStats:
    """Statistics of an additive bias [O]: G_vn[o] sums columns[v, n] over its other dimensions.

    Args:
        columns: V output gradients of every sample, [V, N, ..., O, ...].
        signs, want: as in `linear_column_stats`.
        channel_dim: where O is; -1 for a Linear layer, 2 for convolutions.

    Returns:
        ColumnStats with "factor" [V, N, O], "batch_diag" [N, O], "diag" [O].

    Raises:
        ValueError: a rank below 3, a `channel_dim` out of range, 0 or 1, `signs` that do not fit, an unknown or empty
            `want`.
        TypeError: not a tensor, unequal types, or a type other than float32, float64, bfloat16, float16.
        RuntimeError: the package's library is not built, or not for the operand's device.
    """
    flags = checks.want(want, checks.COLUMN_WANTS)
    dim = checks.channel_dim(columns, channel_dim, "columns", 2)
    checks.signs(signs, columns)
    _lib.require("bias_column_stats", columns.device.type)
    return dispatch.bias_column_stats(columns, dim, signs, flags)

"""The low-level calls for statistics of per-sample gradients."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from backpack_cuda import _lib
from backpack_cuda.ops import checks, dispatch
from backpack_cuda.stats import Stats, Want


class GradStats(NamedTuple):
    """Statistics of the per-sample gradients G_n of one parameter of shape P; None where not wanted."""

    grad: Tensor | None  # [*P]     sum_n G_n
    batch_grad: Tensor | None  # [N, *P]  G_n
    batch_l2: Tensor | None  # [N]      sum_p G_n[p]^2
    sum_grad_squared: Tensor | None  # [*P]     sum_n G_n[p]^2


def _public(stats: Stats) -> GradStats:
    return GradStats(*stats[:4])


def linear_grad_stats(input: Tensor, grad_output: Tensor, want: str | Iterable[str] = ("grad",)) -> GradStats:
    """Statistics of the per-sample gradients of a Linear layer's weight [O, I].

    Args:
        input: the layer's input [N, *, I].
        grad_output: the gradient of the loss with respect to the layer's output [N, *, O].
        want: a non-empty subset of "grad", "batch_grad", "batch_l2", "sum_grad_squared".

    Returns:
        GradStats with "grad" and "sum_grad_squared" [O, I], "batch_grad" [N, O, I], "batch_l2" [N]; see the text of
        `backpack_cuda.ops` for types, scaling and precision.

    Raises:
        ValueError: a rank below 2, unequal leading dimensions or devices, an unknown or empty `want`.
        TypeError: not a tensor, unequal types, or a type other than float32, float64, bfloat16, float16.
        RuntimeError: the package's library is not built, or not for the operands' device.
    """
    flags = checks.want(want)
    checks.linear_operands(input, grad_output)
    _lib.require("linear_grad_stats", input.device.type)
    return _public(dispatch.linear_stats(input, grad_output, flags, Want.NOTHING)[0])


def conv_grad_stats(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: int | Iterable[int],
    *,
    stride: int | Iterable[int] = 1,
    padding: int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
    want: str | Iterable[str] = ("grad",),
) -> GradStats:
    """Statistics of the per-sample gradients of a convolution's weight [O, C/groups, *kernel_size].

    Args:
        input: the layer's input [N, C, *size] with 1, 2 or 3 spatial dimensions.
        grad_output: the gradient of the loss with respect to the layer's output [N, O, *output size].
        kernel_size, stride, padding, dilation, groups: as in torch.nn.Conv2d; a single number stands for all
            dimensions. The padding is with zeros.
        want: a non-empty subset of "grad", "batch_grad", "batch_l2", "sum_grad_squared".

    Returns:
        GradStats; see the text of `backpack_cuda.ops` for types, scaling and precision.

    Raises:
        ValueError: ranks, batch sizes, devices, groups or sizes that do not fit, an unknown or empty `want`.
        TypeError: not a tensor or number, unequal types, or a type other than float32, float64, bfloat16, float16.
        RuntimeError: the package's library is not built, or not for the operands' device.
    """
    flags = checks.want(want)
    geometry = checks.conv_operands(input, grad_output, kernel_size, stride, padding, dilation, groups)
    _lib.require("conv_grad_stats", input.device.type)
    return _public(dispatch.conv_stats(geometry, input, grad_output, flags, Want.NOTHING)[0])


def conv_transpose_grad_stats(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: int | Iterable[int],
    *,
    stride: int | Iterable[int] = 1,
    padding: int | Iterable[int] = 0,
    output_padding: int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
    want: str | Iterable[str] = ("grad",),
) -> GradStats:
    """`conv_grad_stats` of a transposed convolution: its weight is [C, O/groups, *kernel_size].

    `output_padding` and the other sizes are as in torch.nn.ConvTranspose2d.
    """
    flags = checks.want(want)
    geometry = checks.conv_operands(
        input, grad_output, kernel_size, stride, padding, dilation, groups, True, output_padding
    )
    _lib.require("conv_transpose_grad_stats", input.device.type)
    return _public(dispatch.conv_stats(geometry, input, grad_output, flags, Want.NOTHING)[0])


def bias_grad_stats(grad_output: Tensor, want: str | Iterable[str] = ("grad",), channel_dim: int = -1) -> GradStats:
    """Statistics of the per-sample gradients of an additive bias [O]: G_n[o] sums grad_output over the other dims.

    Args:
        grad_output: the gradient of the loss with respect to the layer's output, [N, ..., O, ...].
        want: a non-empty subset of "grad", "batch_grad", "batch_l2", "sum_grad_squared".
        channel_dim: where O is; -1 for a Linear layer, 1 for convolutions.

    Returns:
        GradStats with "grad" and "sum_grad_squared" [O], "batch_grad" [N, O], "batch_l2" [N].

    Raises:
        ValueError: a rank below 2, a `channel_dim` out of range or 0, an unknown or empty `want`.
        TypeError: not a tensor, or a type other than float32, float64, bfloat16, float16.
        RuntimeError: the package's library is not built, or not for the operand's device.
    """
    flags = checks.want(want)
    dim = checks.channel_dim(grad_output, channel_dim)
    _lib.require("bias_grad_stats", grad_output.device.type)
    return _public(dispatch.bias_stats(grad_output, dim, flags))


def outer_norm(input: Tensor, grad_output: Tensor) -> Tensor:
    """Squared norms of the outer products grad_output_n input_n^T: "batch_l2" of a Linear layer with 2-d input.

    |b a^T|^2 = |a|^2 |b|^2 (Goodfellow, "Efficient per-example gradient computations", 2015), so one read of both.

    Args:
        input: [N, I].
        grad_output: [N, O].

    Returns:
        [N], float32 (float64 for float64 operands).

    Raises:
        ValueError: ranks, batch sizes or devices that do not fit.
        TypeError: not a tensor, unequal types, or a type other than float32, float64, bfloat16, float16.
        RuntimeError: the package's library is not built, or not for the operands' device.
    """
    checks.matrix_operands(input, grad_output)
    _lib.require("outer_norm", input.device.type)
    return dispatch.outer_norm(input, grad_output)

"""The low-level calls for weighted sums of per-sample gradients, such as DP-SGD's clipped gradient."""

from collections.abc import Iterable

from torch import Tensor

from backpack_cuda import _lib
from backpack_cuda.ops import checks, composite, dispatch


def linear_weighted_grad(input: Tensor, grad_output: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights[n] G_n of a Linear layer's weight: one product, the per-sample gradients are never formed.

    Args:
        input: the layer's input [N, *, I].
        grad_output: the gradient of the loss with respect to the layer's output [N, *, O].
        weights: one number per sample, [N], float32 (float64 for float64 operands), on the operands' device.

    Returns:
        [O, I] in the operands' type. Sums are float32 (float64), rounded once; on a GPU, with 2-d operands of half
        types, weights[n] * grad_output[n] is rounded to that type beforehand.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: not a tensor, unequal types, or a type other than float32, float64, bfloat16, float16.
        RuntimeError: the package's library is not built, or not for the operands' device.
    """
    checks.linear_operands(input, grad_output)
    checks.sample_weights(weights, input)
    _lib.require("linear_weighted_grad", input.device.type)
    return dispatch.linear_weighted_grad(input, grad_output, weights)


def conv_weighted_grad(
    input: Tensor,
    grad_output: Tensor,
    weights: Tensor,
    kernel_size: int | Iterable[int],
    *,
    stride: int | Iterable[int] = 1,
    padding: int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
) -> Tensor:
    """sum_n weights[n] G_n of a convolution's weight, [O, C/groups, *kernel_size].

    `input`, `grad_output` and the sizes are those of `conv_grad_stats`, `weights` and the errors those of
    `linear_weighted_grad`.
    """
    geometry = checks.conv_operands(input, grad_output, kernel_size, stride, padding, dilation, groups)
    checks.sample_weights(weights, input)
    _lib.require("conv_weighted_grad", input.device.type)
    return dispatch.conv_weighted_grad(geometry, input, grad_output, weights)


def conv_transpose_weighted_grad(
    input: Tensor,
    grad_output: Tensor,
    weights: Tensor,
    kernel_size: int | Iterable[int],
    *,
    stride: int | Iterable[int] = 1,
    padding: int | Iterable[int] = 0,
    output_padding: int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`conv_weighted_grad` of a transposed convolution: its weight is [C, O/groups, *kernel_size]."""
    geometry = checks.conv_operands(
        input, grad_output, kernel_size, stride, padding, dilation, groups, True, output_padding
    )
    checks.sample_weights(weights, input)
    _lib.require("conv_transpose_weighted_grad", input.device.type)
    return dispatch.conv_weighted_grad(geometry, input, grad_output, weights)


def bias_weighted_grad(grad_output: Tensor, weights: Tensor, channel_dim: int = -1) -> Tensor:
    """sum_n weights[n] G_n of an additive bias, [O]; by PyTorch's operations on every device.

    `grad_output` and `channel_dim` are those of `bias_grad_stats`, `weights` that of `linear_weighted_grad`.
    """
    dim = checks.channel_dim(grad_output, channel_dim)
    checks.sample_weights(weights, grad_output)
    return composite.bias_weighted_grad(grad_output, weights, dim)

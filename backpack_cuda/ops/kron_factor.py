"""The low-level calls for Kronecker factors: sums of outer products of a layer's inputs with themselves.

KFAC approximates a layer's curvature by B (x) A. Linear layers: Martens & Grosse, "Optimizing neural networks with
Kronecker-factored approximate curvature" (2015); convolutions: Grosse & Martens, "A Kronecker-factored approximate
Fisher matrix for convolution layers" (2016). With `scale=1 / N` these calls give the input factor A in BackPACK's
convention, which sums over positions: A = 1/N sum_n sum_t a_nt a_nt^T. Grosse & Martens' expectation over positions is
`scale=1 / (N * positions)`. `linear_kron_factor` of a layer's output gradients gives B.
"""

from collections.abc import Iterable

from torch import Tensor

from backpack_cuda import _lib
from backpack_cuda.ops import checks, dispatch


def linear_kron_factor(
    x: Tensor, scale: float = 1.0, out: Tensor | None = None, decay: float = 0.0, *, homogeneous: bool = False
) -> Tensor:
    """decay * out + scale * sum_r x_r x_r^T over the rows x_r of a tensor: half of a matrix product's work.

    Args:
        x: [*, D], any number of leading dimensions, all summed over: the layer's input, or its output gradient.
        scale: a finite number.
        out: where to put the result, [D', D'] of the result's type, on the device of `x` and apart from it in memory;
            None for a new tensor. Not with an `x` that requires grad.
        decay: the weight of what `out` holds, a finite number. Its upper triangle counts; with 0 it is not read.
        homogeneous: append a 1 to every row, for a weight and bias treated as one matrix: D' = D + 1, otherwise D' = D.

    Returns:
        [D', D'], symmetric to the last bit; float32 for float32, bfloat16 and float16, float64 for float64. Values of
        half types are multiplied exactly and summed in float32.

    Raises:
        ValueError: a shape or device that does not fit, `decay` without `out`, `out` that shares memory with `x`.
        TypeError: not a tensor, number or bool, a type other than float32, float64, bfloat16, float16, or an `out` of
            another type.
        RuntimeError: the package's library is not built, or not for the operand's device.
    """
    checks.tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: expected at least 1 dimension [*, D], got {list(x.shape)}")
    checks.flag("homogeneous", homogeneous)
    size = x.shape[-1] + homogeneous
    checks.running_average(x, (size, size), scale, out, decay)
    _lib.require("linear_kron_factor", x.device.type)
    return dispatch.linear_kron_factor(x, scale, out, decay, homogeneous)


def conv_kron_factor(
    x: Tensor,
    kernel_size: int | Iterable[int],
    *,
    stride: int | Iterable[int] = 1,
    padding: int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
    scale: float = 1.0,
    out: Tensor | None = None,
    decay: float = 0.0,
    homogeneous: bool = False,
) -> Tensor:
    """decay * out + scale * sum_np a_np a_np^T over the patches a_np that a convolution sees; never unfolded.

    Patch p of sample n has the entries x[n, c, p * stride + k * dilation - padding] in the order (c, *k), as in
    torch.nn.functional.unfold, and zeros outside of the input.

    Args:
        x: the layer's input [N, C, *size] with 1, 2 or 3 spatial dimensions.
        kernel_size, stride, padding, dilation, groups: as in torch.nn.Conv2d; a single number stands for all
            dimensions. The padding is with zeros.
        scale, out, decay, homogeneous: as in `linear_kron_factor`.

    Returns:
        [D', D'] with D = C / groups * prod(kernel_size); with more than one group [groups, D', D'], one factor for each
        (the blocks between groups belong to no weight). Types as in `linear_kron_factor`.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_kron_factor` and `conv_grad_stats` do.
    """
    geometry, positions = checks.conv_input(x, kernel_size, stride, padding, dilation, groups)
    return _conv(x, geometry, positions, scale, out, decay, homogeneous)


def conv_transpose_kron_factor(
    x: Tensor,
    kernel_size: int | Iterable[int],
    *,
    stride: int | Iterable[int] = 1,
    padding: int | Iterable[int] = 0,
    output_padding: int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
    scale: float = 1.0,
    out: Tensor | None = None,
    decay: float = 0.0,
    homogeneous: bool = False,
) -> Tensor:
    """`conv_kron_factor` of a transposed convolution, over the patches of its OUTPUT's positions.

    The patch of output position p has the entries x[n, c, i] where i * stride + k * dilation - padding = p, in the
    order (c, *k), and zeros where no i does that. So it belongs to the weight [C, O / groups, *kernel_size] with its
    first two dimensions swapped, as BackPACK has it.
    """
    geometry, positions = checks.conv_input(x, kernel_size, stride, padding, dilation, groups, True, output_padding)
    return _conv(x, geometry, positions, scale, out, decay, homogeneous)


def _conv(x, geometry, positions, scale, out, decay, homogeneous) -> Tensor:
    checks.flag("homogeneous", homogeneous)
    checks.running_average(x, geometry.factor_shape(x.shape[1], homogeneous), scale, out, decay)
    _lib.require("conv_kron_factor", x.device.type)
    return dispatch.conv_kron_factor(x, geometry, positions, scale, out, decay, homogeneous)

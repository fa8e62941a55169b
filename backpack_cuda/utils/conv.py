"""Patches of a convolution's input, and diagonals of the curvature of its parameters.

For programs that call BackPACK's functions of these names; the layers themselves never form patches. Every padding
mode, string paddings, dilation and groups.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_cuda.ops import composite, dispatch
from backpack_cuda.rules.conv import conv_geometry, padded
from backpack_cuda.stats import ColumnWant

_MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def get_conv_module(N: int) -> type[nn.Module]:
    """torch's convolution of N dims. A KeyError for others than 1, 2 and 3."""
    return _MODULES[N]


def get_conv_function(N: int) -> Callable:
    """torch's function for a convolution of N dims. A KeyError for others than 1, 2 and 3."""
    return _FUNCTIONS[N]


def unfold_input(module: nn.Module, input: Tensor) -> Tensor:
    """The patches of a convolution's input, [N, C * prod(kernel_size), L] for L output positions.

    Args:
        module: a torch.nn.Conv1d, Conv2d or Conv3d.
        input: its input [N, C, *size].

    Raises:
        ValueError: an input of another rank, or smaller than the kernel.
    """
    spatial = len(module.kernel_size)
    if input.dim() != spatial + 2:
        raise ValueError(f"input: expected {spatial + 2} dims [N, C, *size], got size {list(input.shape)}")
    geometry, pad = conv_geometry(module)
    input = padded(input, module, pad)
    positions = geometry.output_size(tuple(input.shape[2:]))
    if min(positions) < 1:
        raise ValueError(f"input: size {list(input.shape[2:])} is smaller than the kernel {list(geometry.window())}")
    return flat_patches(composite.patches(input, geometry, positions), spatial)


def unfold_by_conv(input: Tensor, module: nn.Module) -> Tensor:
    """As `unfold_input`, with the arguments in the other order."""
    return unfold_input(module, input)


def flat_patches(windows: Tensor, spatial: int) -> Tensor:
    """[N, C, *positions, *kernel] as [N, C * K, L]."""
    windows = windows.permute(0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
    return windows.flatten(1, 1 + spatial).flatten(2)


def get_weight_gradient_factors(input: Tensor, grad_out: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Patches [N, C * K, L] of the input [N, C, *size], and grad_out [N, O, *output size] as [N, O, L]."""
    return unfold_input(module, input), grad_out.flatten(2)


def extract_weight_diagonal(module: nn.Module, unfolded_input: Tensor, S: Tensor, sum_batch: bool = True) -> Tensor:
    """The diagonal of (J^T S) (J^T S)^T with J the Jacobian of the layer's output for its weight.

    Args:
        module: a convolution.
        unfolded_input: the patches of its input, [N, C * K, L].
        S: columns of a curvature's square root at its output, [V, N, O, *output size].
        sum_batch: sum over the samples.

    Returns:
        [*weight], or [N, *weight] of every sample; float32 (float64 for float64).
    """
    diagonals = group_diagonals(module.groups, unfolded_input, S, sum_batch)  # [O/G, C/G * K] of each group
    shape = module.weight.shape if sum_batch else (S.shape[1], *module.weight.shape)
    return torch.cat(diagonals, -2).reshape(shape)


def group_diagonals(groups: int, patches: Tensor, S: Tensor, sum_batch: bool) -> list[Tensor]:
    """Per group the squares of S [V, N, O, *] times patches [N, C * K, L], summed over v: [O/G, C/G * K]; [N, ...]."""
    want = ColumnWant.DIAG if sum_batch else ColumnWant.BATCH_DIAG
    pairs = zip(patches.chunk(groups, 1), S.flatten(3).chunk(groups, 2), strict=True)
    found = []
    for rows, columns in pairs:
        stats, _ = dispatch.linear_column_stats(rows.mT, columns.mT, None, want, ColumnWant.NOTHING)
        found.append(stats.diag if sum_batch else stats.batch_diag)
    return found


def extract_bias_diagonal(module: nn.Module, S: Tensor, sum_batch: bool = True) -> Tensor:
    """As `extract_weight_diagonal`, for the bias of a (transposed) convolution: [O], or [N, O]."""
    want = ColumnWant.DIAG if sum_batch else ColumnWant.BATCH_DIAG
    stats = dispatch.bias_column_stats(S, 2, None, want)
    return stats.diag if sum_batch else stats.batch_diag


def _grad_input_padding(
    grad_output: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The output_padding of the transposed convolution that brings grad_output [N, O, *] back to `input_size`.

    Raises:
        ValueError: another number of sizes, or one that a convolution does not take to grad_output's.
    """
    positions = grad_output.shape[2:]
    dims = len(positions)
    sizes = tuple(input_size)[2:] if len(input_size) == dims + 2 else tuple(input_size)
    if len(sizes) != dims:
        raise ValueError(f"input_size: expected {dims} or {dims + 2} numbers, got {list(input_size)}")
    dilation = (1,) * dims if dilation is None else dilation
    least = [
        (p - 1) * s - 2 * pad + d * (k - 1) + 1
        for p, s, pad, d, k in zip(positions, stride, padding, dilation, kernel_size, strict=True)
    ]
    extra = tuple(size - smallest for size, smallest in zip(sizes, least, strict=True))
    if not all(0 <= e < s for e, s in zip(extra, stride, strict=True)):
        largest = [smallest + s - 1 for smallest, s in zip(least, stride, strict=True)]
        raise ValueError(f"input_size: expected sizes from {least} to {largest}, got {list(sizes)}")
    return extra

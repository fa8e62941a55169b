"""Patches of a transposed convolution's input, and diagonals of the curvature of its parameters.

For programs that call BackPACK's functions of these names. With dilation, groups and output_padding.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_cuda.ops import composite
from backpack_cuda.rules.conv import conv_transpose_geometry
from backpack_cuda.utils.conv import extract_bias_diagonal, flat_patches, group_diagonals

__all__ = [
    "extract_bias_diagonal",
    "extract_weight_diagonal",
    "get_conv_transpose_function",
    "get_conv_transpose_module",
    "get_weight_gradient_factors",
    "unfold_by_conv_transpose",
]

_MODULES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def get_conv_transpose_module(N: int) -> type[nn.Module]:
    """torch's transposed convolution of N dims. A KeyError for others than 1, 2 and 3."""
    return _MODULES[N]


def get_conv_transpose_function(N: int) -> Callable:
    """torch's function for a transposed convolution of N dims. A KeyError for others than 1, 2 and 3."""
    return _FUNCTIONS[N]


def unfold_by_conv_transpose(input: Tensor, module: nn.Module, output_size: Sequence[int] | None = None) -> Tensor:
    """What a transposed convolution's kernel multiplies at each output pixel, [N, C * prod(kernel_size), X].

    Entry (c, k) of output pixel x is the pixel of channel c that reaches x through kernel entry k, or zero.

    Args:
        input: the layer's input [N, C, *size].
        module: a torch.nn.ConvTranspose1d, ConvTranspose2d or ConvTranspose3d.
        output_size: as in the layer's forward; None: by the layer's `output_padding`.

    Raises:
        ValueError: an input of another rank, or without an output pixel.
    """
    spatial = len(module.kernel_size)
    if input.dim() != spatial + 2:
        raise ValueError(f"input: expected {spatial + 2} dims [N, C, *size], got size {list(input.shape)}")
    geometry = conv_transpose_geometry(module, input, output_size)
    positions = geometry.output_size(tuple(input.shape[2:]))
    if min(positions) < 1:
        raise ValueError(f"input: size {list(input.shape[2:])} gives an output of size {list(positions)}")
    windows = composite.patches(*composite.conv_of_transposed(input, geometry), positions)
    return flat_patches(windows.flip(*range(2, 2 + spatial)), spatial)


def get_weight_gradient_factors(input: Tensor, grad_out: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """The unfolded input [N, C * K, X], and grad_out [N, O, *output size] as [N, O, X]."""
    size = grad_out.shape[2:]
    own = conv_transpose_geometry(module, input, None).output_size(tuple(input.shape[2:]))
    # As an argument torch allows fewer sizes: `output_padding` may be up to the dilation.
    return unfold_by_conv_transpose(input, module, None if tuple(own) == size else size), grad_out.flatten(2)


def extract_weight_diagonal(module: nn.Module, unfolded_input: Tensor, S: Tensor, sum_batch: bool = True) -> Tensor:
    """As the function of this name for convolutions.

    Args:
        module: a transposed convolution.
        unfolded_input: of `unfold_by_conv_transpose`, [N, C * K, X].
        S: columns of a curvature's square root at its output, [V, N, O, *output size].
        sum_batch: sum over the samples.

    Returns:
        [*weight], or [N, *weight] of every sample; float32 (float64 for float64).
    """
    channels, outputs, *kernel = module.weight.shape  # [C, O/G, *kernel]
    diagonals = group_diagonals(module.groups, unfolded_input, S, sum_batch)  # [O/G, C/G * K] of each group
    parts = [diagonal.unflatten(-1, (channels // module.groups, -1)).transpose(-2, -3) for diagonal in diagonals]
    joined = torch.cat(parts, -3)  # [C, O/G, K]
    return joined.reshape(*joined.shape[:-3], channels, outputs, *kernel)

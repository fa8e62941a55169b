"""Per-sample gradients from plain torch operations: differentiable, on any device, and materialised chunk by chunk.

The kernels' twin for the two cases that they do not serve: results that must themselves be differentiable
(`create_graph=True`), and devices without a kernel.
"""

from collections.abc import Callable, Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack_cuda.ops import library
from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.stats import (
    ColumnStats,
    ColumnWant,
    Stats,
    Want,
    column_stats_of_chunks,
    statistics_dtype,
    stats_of_chunks,
)

_CHUNK_ELEMENTS = 1 << 24  # of a chunk's per-sample gradients and of its patches


def _sample_chunks(batch_size: int, elements_per_sample: int, whole: bool) -> Iterator[slice]:
    """Slices of the batch; a single one where `whole` is set (the graph keeps every chunk anyway)."""
    step = max(1, batch_size if whole else _CHUNK_ELEMENTS // max(1, elements_per_sample))
    for begin in range(0, max(batch_size, 1), step):
        yield slice(begin, begin + step)


def _stats(rows: Callable[[slice], Tensor], batch_size: int, elements: int, want: int, dtype: torch.dtype) -> Stats:
    chunks = _sample_chunks(batch_size, elements, whole=torch.is_grad_enabled())
    return stats_of_chunks((rows(chunk) for chunk in chunks), want, dtype)


def linear(input: Tensor, grad_output: Tensor, weight_want: int, bias_want: int) -> tuple[Stats, Stats]:
    """Statistics of a Linear layer's weight and bias; input [N, *, I], grad_output [N, *, O]."""
    n, i, o = input.shape[0], input.shape[-1], grad_output.shape[-1]
    t = prod(input.shape[1:-1])
    dtype = statistics_dtype(input.dtype)

    def weight_rows(chunk: slice) -> Tensor:  # [N_c, O, I]
        a, b = input[chunk].to(dtype), grad_output[chunk].to(dtype)
        return b.reshape(len(b), t, o).transpose(1, 2) @ a.reshape(len(a), t, i)

    weight = _stats(weight_rows, n, o * i, weight_want, input.dtype) if weight_want else Stats()
    return weight, bias(grad_output, -1, bias_want)


def outer_norm(input: Tensor, grad_output: Tensor) -> Tensor:
    """|input_n|^2 |grad_output_n|^2 of input [N, I] and grad_output [N, O]: [N]."""
    dtype = statistics_dtype(input.dtype)
    return input.to(dtype).square().sum(1) * grad_output.to(dtype).square().sum(1)


def bias(grad_output: Tensor, channel_dim: int, want: int) -> Stats:
    """Statistics of an additive bias along `channel_dim` of grad_output [N, ...]."""
    if not want:
        return Stats()
    dtype = statistics_dtype(grad_output.dtype)

    def rows(chunk: slice) -> Tensor:  # [N_c, O]
        moved = grad_output[chunk].movedim(channel_dim, 1)
        return moved.reshape(*moved.shape[:2], prod(moved.shape[2:])).sum(2, dtype=dtype)

    return _stats(rows, grad_output.shape[0], prod(grad_output.shape[1:]), want, grad_output.dtype)


def patches(image: Tensor, geometry: ConvGeometry, positions: tuple[int, ...]) -> Tensor:
    """Windows of image [..., *size] that the kernel sees, [..., *positions, *kernel]: a view of the padded image.

    Any number of positions, at least one in each dimension, and any padding: outside of the image are zeros.
    """
    first = image.dim() - len(positions)
    extents = [(count - 1) * s + w for count, s, w in zip(positions, geometry.stride, geometry.window(), strict=True)]
    margins = []
    for dim, (extent, padding) in enumerate(zip(extents, geometry.padding, strict=True), start=first):
        begin = min(max(-padding, 0), image.shape[dim])  # the part of the image that windows see, [begin, end)
        end = max(min(extent - padding, image.shape[dim]), begin)
        image = image.narrow(dim, begin, end - begin)
        before = min(padding + begin, extent) if end > begin else extent
        margins[:0] = (before, extent - before - (end - begin))
    windows = F.pad(image, margins) if any(margins) else image
    for dim, (window, stride, dilation) in enumerate(
        zip(geometry.window(), geometry.stride, geometry.dilation, strict=True), start=first
    ):
        windows = windows.unfold(dim, window, stride)[..., ::dilation]
    return windows


class _ConvOperands:
    """A (transposed) convolution's per-sample gradients as products of patches and pixels, group by group.

    In a transposed convolution input and grad_output swap roles: the patches are those of grad_output.
    """

    def __init__(self, geometry: ConvGeometry, input_shape: torch.Size, output_shape: torch.Size) -> None:
        self.geometry, self.groups = geometry, geometry.groups
        image, pixels = (output_shape, input_shape) if geometry.transposed else (input_shape, output_shape)
        self.positions = tuple(pixels[2:])
        self.t, self.k = prod(self.positions), prod(geometry.kernel_size)
        self.shape = geometry.weight_shape(input_shape[1], output_shape[1])
        self.elements = max(prod(self.shape), image[1] * self.t * self.k)  # per sample, of what is formed

    def of(self, input: Tensor, grad_output: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Patches [..., g, c, T, K] and pixels [..., g, o, T] of some samples; one may have further dims in front."""
        image, pixels = (grad_output, input) if self.geometry.transposed else (input, grad_output)
        channels, g = -1 - len(self.positions), self.groups
        c, o = image.shape[channels] // g, pixels.shape[channels] // g
        a = patches(image.to(dtype), self.geometry, self.positions)
        a = a.reshape(*image.shape[:channels], g, c, self.t, self.k)
        return a, pixels.to(dtype).reshape(*pixels.shape[:channels], g, o, self.t)

    def gradients(self, input: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., N_c, *weight] of input [N_c, C, *] and grad_output [..., N_c, O, *]."""
        leading = grad_output.shape[: -1 - len(self.positions)]
        if self.t == 0 or 0 in leading:
            return input.new_zeros(*leading, *self.shape, dtype=dtype)
        product = torch.einsum("...gctk,...got->...gock", *self.of(input, grad_output, dtype))
        return product.reshape(*leading, *self.shape)


def conv(
    geometry: ConvGeometry, input: Tensor, grad_output: Tensor, weight_want: int, bias_want: Want
) -> tuple[Stats, Stats]:
    """Statistics of a (transposed) convolution's weight and bias; input [N, C, *], grad_output [N, O, *]."""
    operands, n = _ConvOperands(geometry, input.shape, grad_output.shape), input.shape[0]
    dtype = statistics_dtype(input.dtype)

    def weight_rows(chunk: slice) -> Tensor:  # [N_c, *weight]
        return operands.gradients(input[chunk], grad_output[chunk], dtype)

    weight = _stats(weight_rows, n, operands.elements, weight_want, input.dtype) if weight_want else Stats()
    return weight, bias(grad_output, 1, bias_want)


# --- Columns: V output gradients per sample. ---


def _column_stats(
    rows: Callable[[slice, slice], Tensor], columns: Tensor, signs: Tensor | None, elements: int, want: int
) -> ColumnStats:
    """Statistics of rows(columns, samples) [V_c, N_c, *P]; `elements` are those of a column and sample."""
    whole = torch.is_grad_enabled()

    def of_samples(samples: slice) -> Iterator[tuple[Tensor, Tensor | None]]:
        count = columns[:, samples].shape[1]
        for some in _sample_chunks(columns.shape[0], count * elements, whole):
            yield rows(some, samples), None if signs is None else signs[some, samples]

    chunks = (of_samples(samples) for samples in _sample_chunks(columns.shape[1], columns.shape[0] * elements, whole))
    return column_stats_of_chunks(chunks, want, columns.dtype)


def _signed_squares(columns: Tensor, signs: Tensor | None) -> Tensor:
    """sum_v signs[v] columns[v]^2 of columns [V, N, O] in the statistics' type: [N, O]."""
    squares = columns.to(statistics_dtype(columns.dtype)).square()
    return (squares if signs is None else squares * signs.unsqueeze(2)).sum(0)


def linear_columns(
    input: Tensor, columns: Tensor, signs: Tensor | None, weight_want: int, bias_want: int
) -> tuple[ColumnStats, ColumnStats]:
    """Column statistics of a Linear layer's weight and bias; input [N, *, I], columns [V, N, *, O], signs [V, N]."""
    i, o, t = input.shape[-1], columns.shape[-1], prod(input.shape[1:-1])
    dtype = statistics_dtype(input.dtype)
    bias_stats = bias_columns(columns, -1, signs, bias_want)

    def weight_rows(some: slice, samples: slice) -> Tensor:  # [V_c, N_c, O, I]
        a, b = input[samples].to(dtype), columns[some, samples].to(dtype)
        return b.reshape(*b.shape[:2], t, o).transpose(2, 3) @ a.reshape(len(a), t, i)

    if not weight_want:
        return ColumnStats(), bias_stats
    if input.dim() > 2 or weight_want & ColumnWant.FACTOR:
        return _column_stats(weight_rows, columns, signs, o * i, weight_want), bias_stats
    a, b = input.to(dtype).square(), _signed_squares(columns, signs)  # (b a^T)^2 = b^2 (a^2)^T
    return ColumnStats(
        batch_diag=b.unsqueeze(2) * a.unsqueeze(1) if weight_want & ColumnWant.BATCH_DIAG else None,
        diag=b.T @ a if weight_want & ColumnWant.DIAG else None,
    ), bias_stats


def conv_columns(
    geometry: ConvGeometry, input: Tensor, columns: Tensor, signs: Tensor | None, weight_want: int, bias_want: int
) -> tuple[ColumnStats, ColumnStats]:
    """Column statistics of a (transposed) convolution's weight and bias; input [N, C, *], columns [V, N, O, *]."""
    operands = _ConvOperands(geometry, input.shape, columns.shape[1:])
    dtype = statistics_dtype(input.dtype)

    def weight_rows(some: slice, samples: slice) -> Tensor:  # [V_c, N_c, *weight]
        return operands.gradients(input[samples], columns[some, samples], dtype)

    weight = ColumnStats()
    if weight_want:
        weight = _column_stats(weight_rows, columns, signs, operands.elements, weight_want)
    return weight, bias_columns(columns, 2, signs, bias_want)


def bias_columns(columns: Tensor, channel_dim: int, signs: Tensor | None, want: int) -> ColumnStats:
    """Column statistics of an additive bias along `channel_dim` of columns [V, N, ...]; signs [V, N]."""
    if not want:
        return ColumnStats()
    positions = [d for d in range(2, columns.dim()) if d != channel_dim % columns.dim()]
    dtype = statistics_dtype(columns.dtype)
    sums = columns.sum(positions, dtype=dtype) if positions else columns  # [V, N, O]
    batch_diag = _signed_squares(sums, signs) if want & (ColumnWant.BATCH_DIAG | ColumnWant.DIAG) else None  # [N, O]
    return ColumnStats(
        factor=sums.to(columns.dtype) if want & ColumnWant.FACTOR else None,
        batch_diag=batch_diag if want & ColumnWant.BATCH_DIAG else None,
        diag=batch_diag.sum(0) if want & ColumnWant.DIAG else None,
    )


# --- Weighted sums, of a scaled copy of grad_output. ---


def _scaled(grad_output: Tensor, weights: Tensor) -> Tensor:
    """grad_output [N, *] times weights [N], in the type of the weights."""
    return grad_output.to(weights.dtype) * weights.reshape(-1, *(1,) * (grad_output.dim() - 1))


def linear_weighted_grad(input: Tensor, grad_output: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights[n] G_n of a Linear layer's weight; input [N, *, I], grad_output [N, *, O], weights [N]."""
    grad = library.linear_weight_grad(input.to(weights.dtype), _scaled(grad_output, weights))
    return grad.to(input.dtype)


def conv_weighted_grad(geometry: ConvGeometry, input: Tensor, grad_output: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights[n] G_n of a (transposed) convolution's weight; input [N, C, *], grad_output [N, O, *].

    Not by convolution_backward, whose own derivative refuses some transposed convolutions.
    """
    operands, scaled = _ConvOperands(geometry, input.shape, grad_output.shape), _scaled(grad_output, weights)
    grad = input.new_zeros(operands.shape, dtype=weights.dtype)
    if operands.t == 0 or len(input) == 0:
        return grad.to(input.dtype)
    for chunk in _sample_chunks(len(input), operands.elements, whole=torch.is_grad_enabled()):
        a, b = operands.of(input[chunk], scaled[chunk], weights.dtype)
        grad = grad + torch.einsum("ngctk,ngot->gock", a, b).reshape(operands.shape)
    return grad.to(input.dtype)


def bias_weighted_grad(grad_output: Tensor, weights: Tensor, channel_dim: int) -> Tensor:
    """sum_n weights[n] G_n of an additive bias along `channel_dim` of grad_output [N, ...]."""
    positions = [d for d in range(1, grad_output.dim()) if d != channel_dim % grad_output.dim()]
    rows = grad_output.sum(positions, dtype=weights.dtype) if positions else grad_output.to(weights.dtype)  # [N, O]
    return (rows * weights[:, None]).sum(0).to(grad_output.dtype)


# --- Kronecker factors. ---


def _second_moment(rows: Tensor, homogeneous: bool) -> Tensor:
    """sum_r x_r x_r^T over the last but one dimension of rows [*, R, D]; [*, D', D']."""
    rows = F.pad(rows, (0, 1), value=1.0) if homogeneous else rows
    return rows.mT @ rows


def mirrored(product: Tensor) -> Tensor:
    """The upper triangle of [*, D, D] on both sides: a matrix product need not be symmetric to the last bit."""
    return product.triu() + product.triu(1).mT


def linear_kron_factor(x: Tensor, homogeneous: bool = False) -> Tensor:
    """sum_r x_r x_r^T over the rows of x [*, D]; [D', D']."""
    rows = x.to(statistics_dtype(x.dtype)).reshape(prod(x.shape[:-1]), x.shape[-1])
    return mirrored(_second_moment(rows, homogeneous))


def conv_kron_factor(
    x: Tensor, geometry: ConvGeometry, positions: tuple[int, ...], homogeneous: bool = False
) -> Tensor:
    """sum_np a_np a_np^T over the patches of x [N, C, *], [groups, D', D']."""
    n, g, t, k = len(x), geometry.groups, prod(positions), prod(geometry.kernel_size)
    c = x.shape[1] // g
    size = c * k + homogeneous
    factor = x.new_zeros((g, size, size), dtype=statistics_dtype(x.dtype))
    if n == 0 or t == 0:
        return factor
    for chunk in _sample_chunks(n, x.shape[1] * t * k, whole=torch.is_grad_enabled()):
        windows = patches(x[chunk].to(factor.dtype), geometry, positions)
        rows = windows.reshape(-1, g, c, t, k).permute(1, 0, 3, 2, 4).reshape(g, -1, c * k)  # [g, N_c * T, D]
        factor = factor + _second_moment(rows, homogeneous)
    return mirrored(factor)


def patch_sums(x: Tensor, geometry: ConvGeometry, positions: tuple[int, ...]) -> Tensor:
    """The patches that `conv_kron_factor` multiplies, summed over positions: [N, C * prod(kernel_size)]."""
    if geometry.transposed:
        x, geometry = conv_of_transposed(x, geometry)
    if 0 in positions:
        return x.new_zeros(x.shape[0], x.shape[1] * prod(geometry.kernel_size), dtype=statistics_dtype(x.dtype))
    windows = patches(x, geometry, positions)  # [N, C, *positions, *kernel]
    sums = windows.sum(tuple(range(2, 2 + len(positions))), dtype=statistics_dtype(x.dtype))
    return sums.reshape(x.shape[0], x.shape[1] * prod(geometry.kernel_size))


def conv_of_transposed(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """An image and a convolution with the patches of a transposed convolution, position by position in reverse.

    Zeros between the pixels take the place of the stride. The kernel of that convolution is flipped; flipping the
    image instead reverses the order of the positions, over which a Kronecker factor sums.
    """
    sizes = zip(x.shape[2:], geometry.stride, strict=True)
    image = x.new_zeros(*x.shape[:2], *(max((size - 1) * stride + 1, 0) for size, stride in sizes))
    image[(..., *(slice(None, None, stride) for stride in geometry.stride))] = x.flip(*range(2, x.dim()))
    margins = zip(geometry.window(), geometry.padding, geometry.output_padding, strict=True)
    return image, ConvGeometry(
        geometry.kernel_size,
        stride=(1,) * len(geometry.stride),
        padding=tuple(window - 1 - padding + extra for window, padding, extra in margins),
        dilation=geometry.dilation,
        groups=geometry.groups,
    )

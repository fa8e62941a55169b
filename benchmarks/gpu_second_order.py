"""Times what second-order quantities are made of: column statistics and Kronecker factors, beside torch calls.

As gpu_kernels.py does it, whose functions do the timing.
"""

from math import prod
from typing import Any

import torch
from gpu_kernels import LARGEST_RESULT, MIB, Device, library_gradient, measure_cells, per_sample
from gpu_shapes import PRECISIONS, Group, Layer
from torch import Tensor
from torch.nn.functional import conv2d, unfold

from backpack_cuda.ops import dispatch
from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.stats import ColumnWant

COLUMNS = 10  # V, as of ten classes
COLUMN_WANTS = {"diag": ColumnWant.DIAG, "batch_diag": ColumnWant.BATCH_DIAG}


# --- Column statistics ----------------------------------------------------------------------------------------


def column_stats(layer: Layer, name: str, input: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """This package's result `name` of the weight, from columns [V, N, ...]."""
    if layer.linear:
        stats, _ = dispatch.linear_column_stats(input, columns, None, COLUMN_WANTS[name], 0)
    else:
        stats, _ = dispatch.conv_column_stats(ConvGeometry(*layer.sizes()), input, columns, None, COLUMN_WANTS[name], 0)
    return {name: getattr(stats, name)}


def composed_column_stats(layer: Layer, name: str, input: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """The same from torch calls, with the per-sample gradients of one column at a time; none where T = 1."""
    if layer.linear and layer.positions == 1:
        a, b = input.float().square(), columns.float().square().sum(0)
        return {name: b.T @ a if name == "diag" else b[:, :, None] * a[:, None]}
    total: Tensor | None = None
    for column in columns:
        rows = per_sample(layer, input, column)
        if name == "diag":
            squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()
        else:
            squares = rows.float().square()
        total = squares if total is None else total.add_(squares)
    return {name: total}


def measure_columns(group: Group, device: Device, rounds: int) -> dict[str, Any]:
    """One layer's column statistics; "library" is its weight gradient, of one column."""
    layer, precision = group.layer, group.precision
    input, grad_output = layer.operands(device.name, PRECISIONS[precision])
    columns = torch.stack([grad_output.roll(v, 0) * (1 + v) for v in range(COLUMNS)])  # [V, N, ...]
    cells: dict[str, dict[str, Any]] = {name: {} for name in COLUMN_WANTS}
    pairs = {}
    for name in COLUMN_WANTS:
        if name == "batch_diag" and 4 * layer.samples * prod(layer.weight_shape) > LARGEST_RESULT:
            cells[name]["skipped"] = f"the result would take more than {LARGEST_RESULT // MIB} MiB"
            continue
        pairs[name] = (
            lambda n=name: column_stats(layer, n, input, columns),
            lambda n=name: composed_column_stats(layer, n, input, columns),
        )
    library, measured = measure_cells(
        lambda: library_gradient(layer, input, grad_output), pairs, precision, device, rounds
    )
    return {"layer": layer.text(), "precision": precision, "library": library, "cells": cells | measured}


# --- Kronecker factors ----------------------------------------------------------------------------------------


def unfolded_factor(layer: Layer, input: Tensor) -> Tensor:
    """The input factor A [D, D] of a convolution by unfold and one matrix product; 1x1 kernels need no unfold."""
    if layer.kernel == 1:
        patches = input[:, :, :: layer.stride, :: layer.stride].flatten(2)
    else:
        patches = unfold(input, layer.kernel, padding=layer.padding, stride=layer.stride)  # [N, D, T]
    rows = patches.transpose(0, 1).flatten(1)  # [D, N * T]
    return rows @ rows.T / len(input)


def kron_factor(layer: Layer, input: Tensor) -> Tensor:
    """The same by this package."""
    positions = (layer.output_size,) * 2
    return dispatch.conv_kron_factor(input, ConvGeometry(*layer.sizes()), positions, 1 / len(input))


def measure_factor(layer: Layer, precision: str, device: Device, rounds: int) -> dict[str, Any]:
    """One convolution's input factor; "library" is its forward pass."""
    dtype = PRECISIONS[precision]
    input, _ = layer.operands(device.name, dtype)
    weight = torch.randn(layer.weight_shape, device=device.name).to(dtype)
    pair = lambda: {"A": kron_factor(layer, input)}, lambda: {"A": unfolded_factor(layer, input)}
    library, cells = measure_cells(
        lambda: conv2d(input, weight, None, layer.stride, layer.padding, groups=layer.groups),
        {"factor": pair},
        precision,
        device,
        rounds,
    )
    size = prod(layer.weight_shape[1:])
    return {
        "layer": layer.text(),
        "count": layer.count,
        "precision": precision,
        "flops": 2.0 * layer.samples * layer.num_positions * size**2,  # of the product of unfolded inputs
        "library": library,
        "cell": cells["factor"],
    }

"""Checks of the low-level calls' arguments; every message names the argument, what was expected and what came."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor

from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.stats import Want, statistics_dtype

WANTS = {
    "grad": Want.GRAD,
    "batch_grad": Want.BATCH_GRAD,
    "batch_l2": Want.BATCH_L2,
    "sum_grad_squared": Want.SUM_GRAD_SQUARED,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def want(names: str | Iterable[str]) -> int:
    """The flags of a non-empty collection of statistics' names (or of one name)."""
    known = ", ".join(map(repr, WANTS))
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Iterable):
        raise TypeError(f"want: expected names among {known}, got {type(names).__name__}")
    flags = Want.NOTHING
    for name in names:
        if name not in WANTS:
            raise ValueError(f"want: expected names among {known}, got {name!r}")
        flags |= WANTS[name]
    if not flags:
        raise ValueError(f"want: expected at least one of {known}, got none")
    return flags


def tensor(name: str, value) -> None:
    """A tensor of a floating type that the statistics are defined for."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.layout != torch.strided:
        raise NotImplementedError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")


def _shapes(input: Tensor, grad_output: Tensor) -> str:
    return f"got input {list(input.shape)} and grad_output {list(grad_output.shape)}"


def operands(input, grad_output) -> None:
    """Two tensors of one type, device and batch size."""
    tensor("input", input)
    tensor("grad_output", grad_output)
    if input.dtype != grad_output.dtype:
        raise TypeError(
            f"grad_output: expected the dtype of input, got input {input.dtype} and grad_output {grad_output.dtype}"
        )
    if input.device != grad_output.device:
        raise ValueError(
            f"grad_output: expected the device of input, got input on {input.device} "
            f"and grad_output on {grad_output.device}"
        )


def linear_operands(input, grad_output) -> None:
    """input [N, *, I] and grad_output [N, *, O] with the same leading dimensions."""
    operands(input, grad_output)
    if input.dim() < 2:
        raise ValueError(f"input: expected at least 2 dimensions [N, *, I], {_shapes(input, grad_output)}")
    if input.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(f"grad_output: expected the leading dimensions [N, *] of input, {_shapes(input, grad_output)}")


def matrix_operands(input, grad_output) -> None:
    """input [N, I] and grad_output [N, O]."""
    linear_operands(input, grad_output)
    if input.dim() != 2:
        raise ValueError(f"input: expected 2 dimensions [N, I], {_shapes(input, grad_output)}")


def _sizes(name: str, value, dims: int, least: int) -> tuple[int, ...]:
    """One integer per spatial dimension, each at least `least`; a single integer stands for all."""
    values = (value,) * dims if isinstance(value, Integral) else tuple(value) if isinstance(value, Iterable) else None
    if values is None or not all(isinstance(v, Integral) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name}: expected an int or a sequence of {dims} ints, got {value!r}")
    if len(values) != dims:
        raise ValueError(f"{name}: expected {dims} numbers, one per spatial dimension, got {value!r}")
    if any(v < least for v in values):
        raise ValueError(f"{name}: expected numbers of at least {least}, got {value!r}")
    return tuple(int(v) for v in values)


def _geometry(dims, kernel_size, stride, padding, dilation, groups, transposed, output_padding) -> ConvGeometry:
    """The checked sizes of a (transposed) convolution in `dims` dimensions."""
    geometry = ConvGeometry(
        kernel_size=_sizes("kernel_size", kernel_size, dims, 1),
        stride=_sizes("stride", stride, dims, 1),
        padding=_sizes("padding", padding, dims, 0),
        dilation=_sizes("dilation", dilation, dims, 1),
        groups=int(groups),
        transposed=transposed,
        output_padding=_sizes("output_padding", output_padding, dims, 0),
    )
    if transposed and any(
        e >= max(s, d) for e, s, d in zip(geometry.output_padding, geometry.stride, geometry.dilation, strict=True)
    ):
        raise ValueError(
            f"output_padding: expected numbers below the larger of stride {geometry.stride} and dilation "
            f"{geometry.dilation}, got {output_padding!r}"
        )
    return geometry


def _group_count(groups) -> None:
    if isinstance(groups, bool) or not isinstance(groups, Integral):
        raise TypeError(f"groups: expected an int, got {groups!r}")


def conv_operands(
    input, grad_output, kernel_size, stride, padding, dilation, groups, transposed=False, output_padding=0
) -> ConvGeometry:
    """input [N, C, *] and grad_output [N, O, *] of a (transposed) convolution; returns its geometry."""
    operands(input, grad_output)
    dims = input.dim() - 2
    if dims not in (1, 2, 3):
        raise ValueError(f"input: expected 3, 4 or 5 dimensions [N, C, 1 to 3 spatial], {_shapes(input, grad_output)}")
    if grad_output.dim() != input.dim():
        raise ValueError(f"grad_output: expected the rank of input, {_shapes(input, grad_output)}")
    _group_count(groups)
    channels, out_channels = input.shape[1], grad_output.shape[1]
    if groups < 1 or channels % groups or out_channels % groups:
        raise ValueError(
            f"groups: expected a positive divisor of the channels {channels} of input and {out_channels} of "
            f"grad_output, got {groups}"
        )
    geometry = _geometry(dims, kernel_size, stride, padding, dilation, groups, transposed, output_padding)
    if input.shape[0] != grad_output.shape[0]:
        raise ValueError(f"grad_output: expected the batch size of input, {_shapes(input, grad_output)}")
    expected = geometry.output_size(tuple(input.shape[2:]))
    if any(size < 0 for size in expected) or tuple(grad_output.shape[2:]) != expected:
        raise ValueError(
            f"grad_output: expected spatial size {list(expected)} for kernel_size {geometry.kernel_size}, stride "
            f"{geometry.stride}, padding {geometry.padding}, dilation {geometry.dilation}, "
            f"{_shapes(input, grad_output)}"
        )
    return geometry


def sample_weights(weights, operand: Tensor) -> None:
    """weights [N] on the device of `operand` [N, ...], in the type of its statistics."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a Tensor, got {type(weights).__name__}")
    dtype = statistics_dtype(operand.dtype)
    if weights.dtype != dtype:
        raise TypeError(f"weights: expected {dtype} for operands of {operand.dtype}, got {weights.dtype}")
    if weights.layout != torch.strided:
        raise NotImplementedError(f"weights: expected a dense (strided) tensor, got layout {weights.layout}")
    if weights.shape != operand.shape[:1]:
        raise ValueError(
            f"weights: expected one per sample, [{operand.shape[0]}], got {list(weights.shape)} for operands of "
            f"shape {list(operand.shape)}"
        )
    if weights.device != operand.device:
        raise ValueError(f"weights: expected the device {operand.device} of the operands, got {weights.device}")


def channel_dim(grad_output, dim) -> int:
    """The bias' dimension of grad_output [N, ...], not the batch dimension."""
    tensor("grad_output", grad_output)
    if isinstance(dim, bool) or not isinstance(dim, Integral):
        raise TypeError(f"channel_dim: expected an int, got {dim!r}")
    rank = grad_output.dim()
    if rank < 2:
        raise ValueError(f"grad_output: expected at least 2 dimensions, got {list(grad_output.shape)}")
    if not -rank < dim < rank or dim == 0:
        raise ValueError(
            f"channel_dim: expected a dimension of grad_output {list(grad_output.shape)} other than the batch "
            f"dimension 0, got {dim}"
        )
    return int(dim) % rank


def conv_input(
    x, kernel_size, stride, padding, dilation, groups, transposed=False, output_padding=0
) -> tuple[ConvGeometry, tuple[int, ...]]:
    """x [N, C, *] of a (transposed) convolution; returns its geometry and the spatial size of its output."""
    tensor("x", x)
    dims = x.dim() - 2
    if dims not in (1, 2, 3):
        raise ValueError(f"x: expected 3, 4 or 5 dimensions [N, C, 1 to 3 spatial], got {list(x.shape)}")
    _group_count(groups)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a positive divisor of the channels {x.shape[1]} of x, got {groups}")
    geometry = _geometry(dims, kernel_size, stride, padding, dilation, groups, transposed, output_padding)
    positions = geometry.output_size(tuple(x.shape[2:]))
    if any(size < 0 for size in positions):
        raise ValueError(
            f"x: expected a spatial size that kernel_size {geometry.kernel_size}, dilation {geometry.dilation} and "
            f"padding {geometry.padding} fit, got {list(x.shape)}"
        )
    return geometry, positions


def flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def _finite(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a real number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def running_average(x: Tensor, shape: tuple[int, ...], scale, out, decay) -> None:
    """scale and decay of a sum that is added to out, of this shape, in the type of the statistics of x."""
    _finite("scale", scale)
    _finite("decay", decay)
    if out is None:
        if decay:
            raise ValueError(f"decay: expected 0 without out, got {decay!r}")
        return
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a Tensor or None, got {type(out).__name__}")
    dtype = statistics_dtype(x.dtype)
    if out.dtype != dtype:
        raise TypeError(f"out: expected {dtype} for x of {x.dtype}, got {out.dtype}")
    if out.layout != torch.strided:
        raise NotImplementedError(f"out: expected a dense (strided) tensor, got layout {out.layout}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected shape {list(shape)} for x {list(x.shape)}, got {list(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"out: expected the device {x.device} of x, got {out.device}")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        name = "out" if out.requires_grad else "x"
        raise ValueError(f"out: expected None or operands that do not require grad, got {name} that requires grad")
    if torch.compiler.is_compiling():
        return
    if torch._C._overlaps(out, x):
        raise ValueError("out: expected memory apart from that of x, got tensors that overlap")
    if torch._debug_has_internal_overlap(out) == 1:
        raise ValueError(f"out: expected one place in memory per entry, got strides {list(out.stride())}")

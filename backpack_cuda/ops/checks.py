"""Checks of the low-level calls' arguments; every message names the argument, what was expected and what came."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor

from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.stats import ColumnWant, Want, statistics_dtype

WANTS = {
    "grad": Want.GRAD,
    "batch_grad": Want.BATCH_GRAD,
    "batch_l2": Want.BATCH_L2,
    "sum_grad_squared": Want.SUM_GRAD_SQUARED,
}
COLUMN_WANTS = {
    "factor": ColumnWant.FACTOR,
    "batch_diag": ColumnWant.BATCH_DIAG,
    "diag": ColumnWant.DIAG,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def want(names: str | Iterable[str], flag_of: dict[str, int] = WANTS) -> int:
    """The flags of a non-empty collection of statistics' names (or of one name)."""
    known = ", ".join(map(repr, flag_of))
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Iterable):
        raise TypeError(f"want: expected names among {known}, got {type(names).__name__}")
    flags = Want.NOTHING
    for name in names:
        if name not in flag_of:
            raise ValueError(f"want: expected names among {known}, got {name!r}")
        flags |= flag_of[name]
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


def _shapes(input: Tensor, other: Tensor, name: str = "grad_output") -> str:
    return f"got input {list(input.shape)} and {name} {list(other.shape)}"


def operands(input, other, name: str = "grad_output") -> None:
    """Two tensors of one type and device."""
    tensor("input", input)
    tensor(name, other)
    if input.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of input, got input {input.dtype} and {name} {other.dtype}")
    if input.device != other.device:
        raise ValueError(
            f"{name}: expected the device of input, got input on {input.device} and {name} on {other.device}"
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


def _conv_geometry(
    input: Tensor,
    output: Tensor,
    name: str,
    leading: int,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    transposed,
    output_padding,
) -> ConvGeometry:
    """The geometry of a (transposed) convolution of input [N, C, *] and `output` [`leading` dims, N, O, *]."""
    shapes = _shapes(input, output, name)
    dims = input.dim() - 2
    if dims not in (1, 2, 3):
        raise ValueError(f"input: expected 3, 4 or 5 dimensions [N, C, 1 to 3 spatial], {shapes}")
    if output.dim() != leading + input.dim():
        expected = f"one dimension more than input, [V, N, O, {dims} spatial]" if leading else "the rank of input"
        raise ValueError(f"{name}: expected {expected}, {shapes}")
    _group_count(groups)
    channels, (batch_size, out_channels, *size) = input.shape[1], output.shape[leading:]
    if groups < 1 or channels % groups or out_channels % groups:
        raise ValueError(
            f"groups: expected a positive divisor of the channels {channels} of input and {out_channels} of "
            f"{name}, got {groups}"
        )
    geometry = _geometry(dims, kernel_size, stride, padding, dilation, groups, transposed, output_padding)
    if input.shape[0] != batch_size:
        raise ValueError(f"{name}: expected the batch size of input, {shapes}")
    expected = geometry.output_size(tuple(input.shape[2:]))
    if any(e < 0 for e in expected) or tuple(size) != expected:
        raise ValueError(
            f"{name}: expected spatial size {list(expected)} for kernel_size {geometry.kernel_size}, stride "
            f"{geometry.stride}, padding {geometry.padding}, dilation {geometry.dilation}, {shapes}"
        )
    return geometry


def conv_operands(
    input, grad_output, kernel_size, stride, padding, dilation, groups, transposed=False, output_padding=0
) -> ConvGeometry:
    """input [N, C, *] and grad_output [N, O, *] of a (transposed) convolution; returns its geometry."""
    operands(input, grad_output)
    sizes = kernel_size, stride, padding, dilation, groups, transposed, output_padding
    return _conv_geometry(input, grad_output, "grad_output", 0, *sizes)


def linear_columns(input, columns) -> None:
    """input [N, *, I] and columns [V, N, *, O] with the same dimensions N, *."""
    operands(input, columns, "columns")
    shapes = _shapes(input, columns, "columns")
    if input.dim() < 2:
        raise ValueError(f"input: expected at least 2 dimensions [N, *, I], {shapes}")
    if columns.shape[1:-1] != input.shape[:-1]:
        raise ValueError(f"columns: expected [V, N, *, O] with the leading dimensions [N, *] of input, {shapes}")


def conv_columns(
    input, columns, kernel_size, stride, padding, dilation, groups, transposed=False, output_padding=0
) -> ConvGeometry:
    """input [N, C, *] and columns [V, N, O, *] of a (transposed) convolution; returns its geometry."""
    operands(input, columns, "columns")
    sizes = kernel_size, stride, padding, dilation, groups, transposed, output_padding
    return _conv_geometry(input, columns, "columns", 1, *sizes)


def _factors(name: str, value, expected: str, shape: torch.Size, operand: Tensor) -> None:
    """Factors of the statistics of `operand`: of `shape`, on its device, in the type of its statistics."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    dtype = statistics_dtype(operand.dtype)
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} for operands of {operand.dtype}, got {value.dtype}")
    if value.layout != torch.strided:
        raise NotImplementedError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected {expected}, {list(shape)}, got {list(value.shape)} for operands of shape "
            f"{list(operand.shape)}"
        )
    if value.device != operand.device:
        raise ValueError(f"{name}: expected the device {operand.device} of the operands, got {value.device}")


def sample_weights(weights, operand: Tensor) -> None:
    """weights [N] of `operand` [N, ...]."""
    _factors("weights", weights, "one per sample", operand.shape[:1], operand)


def signs(value, columns: Tensor) -> None:
    """None, or signs [V, N] of columns [V, N, ...]."""
    if value is not None:
        _factors("signs", value, "one per column and sample", columns.shape[:2], columns)


def channel_dim(output, dim, name: str = "grad_output", leading: int = 1) -> int:
    """The bias' dimension of `output`, not one of the `leading` dimensions."""
    tensor(name, output)
    if isinstance(dim, bool) or not isinstance(dim, Integral):
        raise TypeError(f"channel_dim: expected an int, got {dim!r}")
    rank = output.dim()
    if rank <= leading:
        raise ValueError(f"{name}: expected at least {leading + 1} dimensions, got {list(output.shape)}")
    if not -rank <= dim < rank or dim % rank < leading:
        others = "the batch dimension 0" if leading == 1 else "the dimensions 0 of columns and 1 of samples"
        raise ValueError(
            f"channel_dim: expected a dimension of {name} {list(output.shape)} other than {others}, got {dim}"
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

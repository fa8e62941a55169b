"""Calls of the layer operators as data: shapes, options, memory layouts; operator and oracle on them."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from helpers import assert_close
from oracle import FIELDS, Stats, layer_statistics
from torch import Tensor

import backpack_cuda  # noqa: F401  (loads the operators)
from backpack_cuda.ops.geometry import ConvGeometry

HALVES = (torch.bfloat16, torch.float16)
ALL_FIELDS = 31  # want bits of the raw operators: 2**k asks for FIELDS[k]


def want_bits(*names: str) -> int:
    """The raw operators' `want` for the given fields."""
    return sum(1 << FIELDS.index(name) for name in names)


# Memory layouts: the same values, another place in memory; everything around them is NaN.
def _copy_into(view: Tensor, values: Tensor) -> Tensor:
    view.copy_(values)
    return view


def guarded(values: Tensor) -> Tensor:
    """A contiguous copy inside a larger buffer of NaN, misaligned by one element."""
    buffer = values.new_full((values.numel() + 130,), math.nan)
    return _copy_into(buffer[65 : 65 + values.numel()].view(values.shape), values)


def strided(values: Tensor) -> Tensor:
    """Every second element of a NaN buffer in every dimension."""
    buffer = values.new_full([2 * size + 1 for size in values.shape], math.nan)
    return _copy_into(buffer[tuple(slice(1, 2 * size + 1, 2) for size in values.shape)], values)


def reversed_dims(values: Tensor) -> Tensor:
    """Fortran order: the first dimension is the fastest."""
    order = tuple(reversed(range(values.dim())))
    return guarded(values.permute(order)).permute(order)


def channels_last(values: Tensor) -> Tensor:
    """Dimension 1 is the fastest (any rank)."""
    return guarded(values.movedim(1, -1)).movedim(-1, 1) if values.dim() > 1 else guarded(values)


def aligned_channels_last(values: Tensor) -> Tensor:
    """As `channels_last`, with nothing around it: where kernels may copy 16 bytes at a time."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if values.dim() > 1 else values.contiguous()


def batch_inside(values: Tensor) -> Tensor:
    """The first two dimensions swapped in memory (time-major sequences)."""
    return guarded(values.transpose(0, 1)).transpose(0, 1) if values.dim() > 1 else guarded(values)


def expanded_from(*dims: int):
    """The first entry along `dims` repeated by stride 0: other values, but no other layout has them."""

    def layout(values: Tensor) -> Tensor:
        for dim in dims:
            if dim < values.dim() and values.shape[dim]:
                values = values.narrow(dim, 0, 1).expand(values.shape)
        return values

    return layout


LAYOUTS = {
    "contiguous": lambda values: values.contiguous(),
    "guarded": guarded,
    "strided": strided,
    "reversed_dims": reversed_dims,
    "channels_last": channels_last,
    "aligned_channels_last": aligned_channels_last,
    "batch_inside": batch_inside,
    "expanded_samples": expanded_from(0),
    "expanded_channels": expanded_from(1),
    "expanded_last": expanded_from(-1),
    "expanded_all": expanded_from(0, 1, 2, 3, 4),
}


@dataclass(frozen=True)
class Case:
    """One call of a layer operator; `options` are the keyword arguments of the stock function."""

    family: str  # "linear", "conv", "conv_transpose"
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    input_layout: str = "contiguous"
    grad_output_layout: str = "contiguous"
    seed: int = 0

    @property
    def num_bias(self) -> int:
        transposed = self.family == "conv_transpose"
        return self.weight_shape[1] * self.options["groups"] if transposed else self.weight_shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    def function(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's stock forward."""
        if self.family == "linear":
            return F.linear(input, weight, bias)
        return getattr(F, f"{self.family}{len(self.kernel_size)}d")(input, weight, bias, **self.options)

    def output_shape(self) -> tuple[int, ...]:
        with torch.device("meta"):
            one = self.function(torch.empty(1, *self.input_shape[1:]), torch.empty(self.weight_shape), None)
        return (self.input_shape[0], *one.shape[1:])

    def operands(self, device="cpu", dtype=torch.float32, integers: bool = False) -> tuple[Tensor, Tensor]:
        """(input, grad_output) of this case, standard normal, or small integers."""
        generator = torch.Generator().manual_seed(self.seed)
        result = []
        layouts = (self.input_layout, self.grad_output_layout)
        for shape, layout in zip((self.input_shape, self.output_shape()), layouts, strict=True):
            if integers:
                values = torch.randint(-2, 3, shape, generator=generator).to(dtype)
            else:
                values = torch.randn(shape, generator=generator).to(dtype)
            result.append(LAYOUTS[layout](values.to(device)))
        return result[0], result[1]

    def geometry_arguments(self) -> tuple:
        """The raw operator's arguments between the operands and the wants."""
        if self.family == "linear":
            return ()
        o = self.options
        middle = (o["output_padding"],) if self.family == "conv_transpose" else ()
        return (self.kernel_size, o["stride"], o["padding"], *middle, o["dilation"], o["groups"])

    def geometry(self) -> ConvGeometry:
        """The Python layer's description of a (transposed) convolution."""
        return ConvGeometry(self.kernel_size, transposed=self.family == "conv_transpose", **self.options)

    def raw(
        self, input: Tensor, grad_output: Tensor, weight_want=ALL_FIELDS, bias_want=ALL_FIELDS
    ) -> tuple[Stats, Stats]:
        """The operator itself: (weight, bias) statistics; what is not wanted has shape [0]."""
        op = getattr(torch.ops.backpack_cuda, f"{self.family}_grad_stats")
        results = op(input, grad_output, *self.geometry_arguments(), weight_want, bias_want)
        return Stats(*results[:5]), Stats(*results[5:])

    def public(self, input: Tensor, grad_output: Tensor, want):
        """The Python face: GradStats of the weight."""
        op = getattr(backpack_cuda.ops, f"{self.family}_grad_stats")
        if self.family == "linear":
            return op(input, grad_output, want=want)
        return op(input, grad_output, self.kernel_size, **self.options, want=want)

    def raw_weighted(self, input: Tensor, grad_output: Tensor, weights: Tensor) -> Tensor:
        """The operator itself: sum_n weights[n] G_n."""
        op = getattr(torch.ops.backpack_cuda, f"{self.family}_weighted_grad")
        return op(input, grad_output, weights, *self.geometry_arguments())

    def public_weighted(self, input: Tensor, grad_output: Tensor, weights: Tensor) -> Tensor:
        """The Python face of `raw_weighted`."""
        op = getattr(backpack_cuda.ops, f"{self.family}_weighted_grad")
        if self.family == "linear":
            return op(input, grad_output, weights)
        return op(input, grad_output, weights, self.kernel_size, **self.options)

    def oracle(self, input: Tensor, grad_output: Tensor) -> tuple[Stats, Stats]:
        """(weight, bias) statistics in float64."""
        return layer_statistics(self.function, self.weight_shape, self.num_bias, input, grad_output)

    def magnitudes(self, input: Tensor, grad_output: Tensor) -> tuple[Stats, Stats]:
        """The oracle on absolute values: what each entry's rounding errors are proportional to."""
        return self.oracle(input.abs(), grad_output.abs())


def linear(input_shape, out_features: int, **other) -> Case:
    """A Linear case from its input shape [N, *, I]."""
    return Case("linear", tuple(input_shape), (out_features, input_shape[-1]), **other)


def conv(
    input_shape,
    out_channels: int,
    kernel,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    output_padding=None,
    **other,
) -> Case:
    """A ConvNd case from its input shape [N, C, *]; with `output_padding` a ConvTransposeNd case."""
    dims = len(input_shape) - 2

    def per_dim(value) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value)

    options = {
        "stride": per_dim(stride),
        "padding": per_dim(padding),
        "dilation": per_dim(dilation),
        "groups": groups,
    }
    if output_padding is None:
        weight_shape = (out_channels, input_shape[1] // groups, *per_dim(kernel))
        return Case("conv", tuple(input_shape), weight_shape, options, **other)
    options["output_padding"] = per_dim(output_padding)
    weight_shape = (input_shape[1], out_channels // groups, *per_dim(kernel))
    return Case("conv_transpose", tuple(input_shape), weight_shape, options, **other)


# Named cases: small, yet each on another path of the kernels.
CASES: dict[str, Case] = {
    "linear": linear((5, 13), 17),
    "linear_wide": linear((33, 70), 45),
    "linear_one_feature": linear((4, 1), 1),
    "linear_one_sample": linear((1, 9), 4),
    "linear_one_token": linear((6, 1, 11), 7),
    "linear_few_tokens": linear((4, 3, 40), 35),
    "linear_tokens": linear((3, 37, 20), 19),
    "linear_grid": linear((2, 3, 2, 4, 10), 6),
    "linear_expanded_loss": linear((3, 8, 12), 9, grad_output_layout="expanded_all"),
    "conv1d": conv((3, 4, 17), 5, 3, padding=1),
    "conv1d_strided_grouped": conv((2, 6, 19), 4, 4, stride=3, padding=2, dilation=2, groups=2),
    "conv2d_1x1": conv((3, 17, 5, 4), 9, 1),
    "conv2d_3x3": conv((3, 5, 8, 9), 34, 3, padding=1),
    "conv2d_one_output": conv((4, 6, 3, 3), 7, 3),
    "conv2d_uneven": conv((2, 3, 9, 12), 6, (2, 5), stride=(2, 1), padding=(0, 3), dilation=(3, 1)),
    "conv2d_skips_rows": conv((2, 3, 9, 9), 4, 1, stride=4),
    "conv2d_grouped": conv((3, 8, 6, 7), 12, 3, stride=2, padding=1, groups=4),
    "conv2d_depthwise": conv((3, 6, 7, 5), 6, 3, padding=1, groups=6),
    "conv2d_depthwise_multiplied": conv((2, 5, 7, 8), 15, 3, padding=2, dilation=2, groups=5),
    "conv2d_channels_last": conv(
        (3, 7, 6, 5), 8, 3, padding=1, input_layout="channels_last", grad_output_layout="channels_last"
    ),
    "conv3d": conv((2, 3, 5, 4, 6), 4, (2, 3, 1), stride=(1, 2, 1), padding=1),
    "conv3d_grouped": conv((2, 4, 4, 5, 4), 6, 2, padding=1, dilation=2, groups=2),
    "conv_transpose1d": conv((3, 4, 7), 5, 3, stride=2, padding=1, output_padding=1),
    "conv_transpose2d": conv((3, 5, 4, 6), 7, 3, stride=2, padding=1, output_padding=1),
    "conv_transpose2d_grouped": conv(
        (2, 6, 4, 3), 9, (2, 3), stride=(1, 3), dilation=(2, 1), groups=3, output_padding=0
    ),
    "conv_transpose2d_depthwise": conv((2, 4, 5, 5), 8, 3, padding=1, groups=4, output_padding=0),
    "conv_transpose2d_cropped": conv((2, 3, 4, 4), 2, 2, stride=2, padding=3, output_padding=1),
    "conv_transpose3d": conv((2, 3, 3, 2, 3), 4, 2, stride=2, dilation=2, output_padding=(1, 0, 1)),
}


class Tolerance(NamedTuple):
    """What an entry's error may be."""

    largest: float  # relative to the largest reference entry
    entry: float  # relative to the magnitude that this entry's rounding errors scale with


TOLERANCES = {torch.float32: Tolerance(1e-5, 1e-5), torch.float64: Tolerance(1e-10, 1e-13)}


def assert_stats(actual: Stats, expected: Stats, magnitude: Stats, tolerance: Tolerance, fields=FIELDS) -> None:
    """Every wanted statistic within `tolerance`, squares not negative, every other statistic empty.

    `magnitude`: the statistics of the absolute values; an entry's rounding errors are proportional to them.
    """
    for name in FIELDS:
        value, reference, scale = (getattr(stats, name) for stats in (actual, expected, magnitude))
        if name not in fields:
            assert value.shape == (0,), f"{name} was not asked for"
            continue
        sizes = [reference]
        if name == "sum_grad_centered_squared":  # deviations inherit the rounding errors of the gradients
            scale = magnitude.sum_grad_squared
            sizes = [expected.sum_grad_squared]
        # Where everything cancels, rounding errors are relative to what cancelled.
        size = max((t.abs().max().item() for t in (*sizes, 3e-2 * scale) if t.numel()), default=0.0)
        assert_close(name, value, reference, tolerance.largest, size)
        error = (value.cpu().double() - reference).abs()
        worst = (error / scale).nan_to_num().max().item() if error.numel() else 0.0
        assert (error <= tolerance.entry * scale).all(), f"{name}: entry off by {worst:.1e} of its magnitude"
        if name not in ("grad", "batch_grad"):
            assert (value >= 0).all(), f"{name}: negative"


def kernel_dtypes(device) -> tuple[torch.dtype, ...]:
    """The types of TOLERANCES that the operators of such a device take."""
    return tuple(TOLERANCES) if torch.device(device).type == "cpu" else (torch.float32,)


def check_case(case: Case, device="cpu") -> None:
    """All five statistics of weight and bias against the oracle, in each of the device's types on the same values."""
    dtypes = kernel_dtypes(device)
    input, grad_output = case.operands(device, dtypes[0])
    expected, magnitude = case.oracle(input, grad_output), case.magnitudes(input, grad_output)
    for dtype in dtypes:
        placed = (
            LAYOUTS[layout](operand.to(dtype))
            for layout, operand in ((case.input_layout, input), (case.grad_output_layout, grad_output))
        )
        for actual, reference, scale in zip(case.raw(*placed), expected, magnitude, strict=True):
            assert_stats(actual, reference, scale, TOLERANCES[dtype])
            assert {value.dtype for value in actual} == {dtype}


@contextlib.contextmanager
def cpu_option(name: str, value: int):
    """Sets one test switch of the CPU kernels and puts the old value back."""
    old = torch.ops.backpack_cuda._cpu_option(name, value)
    try:
        yield
    finally:
        torch.ops.backpack_cuda._cpu_option(name, old)

"""What is known of autograd's functions: which are linear, which act elementwise, and their second derivatives.

Functions go by the names of their graph nodes, without "Backward" and the number of the overload: "NativeLayerNorm" for
NativeLayerNormBackward0. Second derivatives are formed from what the nodes saved, differentiably under grad mode. They
are right far from zero, where autograd's own often are not.
"""

import re
from collections.abc import Callable
from functools import cache
from math import log, pi, sqrt
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack_cuda.stats import statistics_dtype

# Linear or piecewise linear in all operands together.
LINEAR = frozenset(
    # sums
    "Add Sub Rsub Neg Sum Nansum Mean Cumsum Trace Copy ToCopy Clone Alias Frac "
    # shapes
    "View UnsafeView ReshapeAlias Permute Transpose T Expand Repeat Squeeze Unsqueeze AsStrided Unfold Im2Col Col2Im "
    "PixelShuffle PixelUnshuffle ChannelShuffle Flip Roll Rot90 Diagonal DiagEmbed BlockDiag Tril Triu "
    # choice and placement of entries
    "Select Slice Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Unbind Cat Stack Index IndexSelect IndexAdd "
    "IndexCopy IndexFill Fill IndexPut Put Take Gather Scatter ScatterAdd MaskedSelect MaskedFill MaskedScatter Where "
    "SelectScatter SliceScatter DiagonalScatter AsStridedScatter Embedding ConstantPadNd "
    "ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D "
    # piecewise linear functions
    "Relu LeakyRelu RreluWithNoise Hardtanh Hardsigmoid Hardshrink Softshrink Threshold Clamp ClampMin ClampMax "
    "Maximum Minimum Fmax Fmin Max Min Amax Amin Aminmax Cummax Cummin Sort Topk Kthvalue Median Nanmedian Mode "
    # pooling, resizing, dropout
    "MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D "
    "FractionalMaxPool2D FractionalMaxPool3D MaxUnpool2D MaxUnpool3D "
    "AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D NativeDropout "
    "UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
    "UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D "
    "UpsampleLinear1D UpsampleBilinear2D UpsampleTrilinear3D UpsampleBicubic2D "
    "UpsampleBilinear2DAa UpsampleBicubic2DAa AffineGridGenerator "
    # complex numbers as pairs of real ones, Fourier transforms
    "FftR2C FftC2C FftC2R ViewAsReal ViewAsComplex Conj Complex".split()
)


@cache
def function_name(node_name: str) -> str:
    """The function of a node, without the number of its overload: "NativeLayerNorm" of NativeLayerNormBackward0."""
    return re.sub(r"Backward(s|\d*)(_copy)?$", "", node_name.rpartition("::")[2])


def readable_name(node: Node) -> str:
    """The function of a node, for messages: "native_layer_norm"."""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", function_name(node.name())).lower()


_DIMS = ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1", "_saved_dimension")
_dims_by_name: dict[str, tuple[str, ...]] = {}  # name of a node -> those of _DIMS that it has


def dims_of(node: Node) -> list[int | tuple[int, ...] | None]:
    """The dimensions that a node chooses from, sums over or moves; negative ones as unsigned integers of 64 bits."""
    name = node.name()
    if name not in _dims_by_name:
        _dims_by_name[name] = tuple(attribute for attribute in _DIMS if hasattr(node, attribute))
    return [getattr(node, attribute, None) for attribute in _dims_by_name[name]]


def operand_metadata(node: Node, operand: int):
    """Size, type and device of a node's operand."""
    edge, output_nr = node.next_functions[operand]
    return edge._input_metadata[output_nr]


def _only_copies(node: Node) -> bool:
    """Whether a change of a view in place, by whatever function, is linear: its backward depends on no operand."""
    (output,) = node._input_metadata
    with torch.enable_grad():
        gradients = node(torch.ones(output.shape, dtype=output.dtype, device=output.device))
    gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
    return all(
        operand is None or (gradient is not None and not gradient.requires_grad)
        for gradient, (operand, _) in zip(gradients, node.next_functions, strict=True)
    )


# As LINEAR, under a condition.
LINEAR_IF: dict[str, Callable[[Node], bool]] = {
    "Abs": lambda node: not operand_metadata(node, 0).dtype.is_complex,
    "ScatterReduce": lambda node: node._saved_reduce != "prod",
    "CopySlices": _only_copies,
}

# Linear in all operands together but the one of this index.
LINEAR_BUT_IN: dict[str, int] = {
    "NativeLayerNorm": 0,
    "NativeGroupNorm": 0,
    "GridSampler2D": 1,
    "GridSampler3D": 1,
    "Lerp": 2,
    "Addcdiv": 2,
    "Remainder": 1,
    "Fmod": 1,
}

# Linear in each of the operands named by index, which multiply each other; further operands are added.
PRODUCTS = {
    "Mul": (0, 1),
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "Mv": (0, 1),
    "Dot": (0, 1),
    "Addmm": (1, 2),
    "Addmv": (1, 2),
    "Addr": (1, 2),
    "Addbmm": (1, 2),
    "Baddbmm": (1, 2),
    "Addcmul": (1, 2),
    "Linear": (0, 1),
    "Convolution": (0, 1),
    "Trilinear": (0, 1, 2),
    "PreluKernel": (0, 1),
    "LinalgCross": (0, 1),
    "EmbeddingBag": (0, 1),
}

# As PRODUCTS when not in training mode.
BATCH_NORMS = frozenset("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm".split())

# Piecewise constant.
STEPS = frozenset("Sign Floor Ceil Round Trunc Zero".split())


class Saved(SimpleNamespace):
    """What a node has saved, by name."""

    @classmethod
    def of(cls, node: Node) -> "Saved":
        """Reads every attribute once."""
        return cls(
            **{name.removeprefix("_saved_"): getattr(node, name) for name in dir(node) if name.startswith("_saved_")}
        )


def _wide(tensor: Tensor) -> Tensor:
    """A saved tensor in the type of statistics."""
    return tensor.to(statistics_dtype(tensor.dtype))


def _of_input(second_derivative: Callable[[Tensor], Tensor]) -> Callable[[Saved], Tensor]:
    """phi'' of a function that saves its input."""
    return lambda saved: second_derivative(_wide(saved.self))


def _of_result(second_derivative: Callable[[Tensor], Tensor]) -> Callable[[Saved], Tensor]:
    """phi'' of a function that saves its result, from which phi'' follows."""
    return lambda saved: second_derivative(_wide(saved.result))


def _by_autograd(function: Callable[[Tensor], Tensor]) -> Callable[[Saved], Tensor]:
    """phi'' of a rare function that saves its input."""

    def second_derivative(saved: Saved) -> Tensor:
        create_graph = torch.is_grad_enabled()
        x = _wide(saved.self)
        with torch.enable_grad():
            x = x if create_graph else x.detach().requires_grad_()
            (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x, create_graph=create_graph)
        return second

    return second_derivative


def _gelu(saved: Saved) -> Tensor:
    x = _wide(saved.self).clamp(-50, 50)  # far beyond, phi'' is 0 and its factors overflow
    if saved.approximate == "none":
        return (-x * x / 2).exp() * (2 - x * x) / sqrt(2 * pi)
    # x (1 + tanh u) / 2 with u = scale (x + cubic x^3)
    scale, cubic = sqrt(2 / pi), 0.044715
    du = scale * (1 + 3 * cubic * x * x)
    u = scale * (x + cubic * x**3)
    slope = 4 * torch.sigmoid(2 * u) * torch.sigmoid(-2 * u)  # 1 - tanh(u)^2, without cancellation
    return slope * (du + x * (3 * scale * cubic * x - u.tanh() * du * du))


def _silu(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x) * (2 - x * torch.tanh(x / 2))


def _mish(x: Tensor) -> Tensor:
    # x w with w = tanh(softplus(x)): by q = sigmoid(-x) = exp(-softplus(x)), w = (1 - q^2) / (1 + q^2)
    s, q = torch.sigmoid(x), torch.sigmoid(-x)
    slope = (2 * q / (1 + q * q)).square()  # 1 - w^2
    w = s * (1 + q) / (1 + q * q)
    return slope * s * (2 + x * (q - 2 * w * s))


def _softplus(saved: Saved) -> Tensor:
    x, beta = _wide(saved.self) * saved.beta, saved.beta
    curved = beta * torch.sigmoid(x) * torch.sigmoid(-x)
    return torch.where(x <= saved.threshold, curved, torch.zeros_like(x))


def _elu(saved: Saved) -> Tensor:
    height, rate = saved.alpha * saved.scale, saved.input_scale
    if hasattr(saved, "self"):
        x = _wide(saved.self)
        curved = height * (x.clamp(max=0) * rate).exp()
    else:  # in place
        x = _wide(saved.result)
        curved = x + height
    return torch.where(x < 0, rate**2 * curved, torch.zeros_like(x))


def _celu(saved: Saved) -> Tensor:
    alpha = saved.alpha
    if hasattr(saved, "self"):
        x = _wide(saved.self)
        curved = (x.clamp(max=0) / alpha).exp() / alpha
    else:
        x = _wide(saved.result)
        curved = (x + alpha) / alpha**2
    return torch.where(x < 0, curved, torch.zeros_like(x))


def _pow_in_base(saved: Saved) -> Tensor:
    if not isinstance(saved.self, Tensor):
        return _pow_in_exponent(saved)  # the only operand
    base, exponent = _wide(saved.self), saved.exponent
    factor = exponent * (exponent - 1)
    if isinstance(exponent, Tensor):
        return factor * base.pow(torch.where(factor == 0, 0.0, exponent - 2))  # no 0 * inf for 0^0 and 0^1
    return factor * base.pow(exponent - 2) if factor else torch.zeros_like(base)


def _pow_in_exponent(saved: Saved) -> Tensor:
    result = _wide(saved.result)
    base = saved.self if isinstance(saved.self, Tensor) else torch.tensor(saved.self, dtype=result.dtype)
    return result * torch.where(base == 0, 1.0, base).log().square()  # no 0 * inf for 0^x


# Elementwise: operand index -> phi'' in that operand, in the type of statistics.
ELEMENTWISE: dict[str, dict[int, Callable[[Saved], Tensor]]] = {
    name: {0: second_derivative}
    for name, second_derivative in {
        "Sigmoid": _of_result(lambda y: y * (1 - y) * (1 - 2 * y)),
        "Tanh": _of_result(lambda y: -2 * y * (1 - y * y)),
        "Gelu": _gelu,
        "Silu": _of_input(_silu),
        "Mish": _of_input(_mish),
        "Softplus": _softplus,
        "Elu": _elu,
        "Celu": _celu,
        "LogSigmoid": _of_input(lambda x: -torch.sigmoid(x) * torch.sigmoid(-x)),
        "Hardswish": _of_input(lambda x: (x.abs() < 3).to(x.dtype) / 3),
        "Exp": _of_result(lambda y: y),
        "Exp2": _of_result(lambda y: log(2) ** 2 * y),
        "Expm1": _of_result(lambda y: y + 1),
        "Log": _of_input(lambda x: -x.reciprocal().square()),
        "Log2": _of_input(lambda x: -x.reciprocal().square() / log(2)),
        "Log10": _of_input(lambda x: -x.reciprocal().square() / log(10)),
        "Log1P": _of_input(lambda x: -(1 + x).reciprocal().square()),
        "Sqrt": _of_result(lambda y: -0.25 / y**3),
        "Rsqrt": _of_result(lambda y: 0.75 * y**5),
        "Reciprocal": _of_result(lambda y: 2 * y**3),
        "Sin": _of_input(lambda x: -x.sin()),
        "Cos": _of_input(lambda x: -x.cos()),
        "Tan": _of_result(lambda y: 2 * y * (1 + y * y)),
        "Sinh": _of_input(torch.sinh),
        "Cosh": _of_input(torch.cosh),
        "Erf": _of_input(lambda x: -4 / sqrt(pi) * x * (-x * x).exp()),
        "Erfc": _of_input(lambda x: 4 / sqrt(pi) * x * (-x * x).exp()),
        **{
            name: _by_autograd(getattr(torch, name.lower()))
            for name in ("Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh", "Erfinv", "Lgamma")
        },
    }.items()
}
ELEMENTWISE["Div"] = {1: lambda saved: 2 * _wide(saved.self) / _wide(saved.other) ** 3}  # linear in 0
ELEMENTWISE["Pow"] = {0: _pow_in_base, 1: _pow_in_exponent}

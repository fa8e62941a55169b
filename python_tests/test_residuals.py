"""The functions between layers and loss that a Hessian depends on: found, refused, and their diagonals.

A small driver forms Hessian diagonals from the sources alone; the oracle is double backward in float64 on stock layers.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from helpers import assert_close, named
from torch import Tensor, nn

import backpack_cuda as bp
from backpack_cuda.capture import LayerFunction, ObserverFunction
from backpack_cuda.curvature.residuals import ResidualSource, residual_sources


def layers_of(output: Tensor) -> dict:
    """The nodes of the layers in the graph of `output`, and their parameters that require a gradient."""
    found, seen, stack = {}, {None}, [output.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(operand for operand, _ in node.next_functions)
            function = getattr(type(node), "_forward_cls", None)
            if function in (LayerFunction, ObserverFunction):
                parameters = dict(node.parameters) if function is LayerFunction else node.observation.parameters
                found[node] = {name: p for name, p in parameters.items() if p is not None and p.requires_grad}
    return found


def sources_of(model: nn.Module, loss: Callable, x: Tensor) -> tuple[Tensor, list[ResidualSource]]:
    """The prediction, and the sources of an extended model."""
    prediction = model(x)
    (gradient,) = torch.autograd.grad(loss(prediction), prediction, retain_graph=True)
    return prediction, residual_sources(prediction, gradient, layers_of(prediction), len(x))


def diagonal_from_sources(model: nn.Module, loss: Callable, x: Tensor) -> list[Tensor]:
    """The Hessian diagonals of the parameters: the loss' own curvature, plus that of the sources."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    prediction, sources = sources_of(model, loss, x)
    result = [torch.zeros_like(p) for p in parameters]
    hessian = torch.autograd.functional.hessian(loss, prediction.detach())
    hessian = hessian.reshape(prediction.numel(), prediction.numel())
    values, vectors = torch.linalg.eigh(hessian)
    for value, vector in zip(values, vectors.T, strict=True):
        rows = torch.autograd.grad(prediction, parameters, vector.view_as(prediction), True, allow_unused=True)
        for diagonal, row in zip(result, rows, strict=True):
            if row is not None:
                diagonal += value * row.square()
    for source in sources:
        half = source.root.count // 2
        for begin, end in ((0, half), (half, source.root.count)):
            columns, signs = source.root.form(begin, end)
            assert signs.shape == (end - begin, len(x)) and columns.shape[0] == end - begin
            for column, sample_signs in zip(columns, signs, strict=True):
                for n, sign in enumerate(sample_signs):
                    single = torch.zeros_like(column).view(len(x), -1)
                    single[n] = column.view(len(x), -1)[n]
                    rows = torch.autograd.grad(
                        [source.edge], parameters, [single.view_as(column)], True, allow_unused=True
                    )
                    for diagonal, row in zip(result, rows, strict=True):
                        if row is not None:
                            diagonal += sign * row.square()
    return result


def dense_diagonal(model: nn.Module, loss: Callable, x: Tensor) -> list[Tensor]:
    """The Hessian diagonals by double backward."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    result = []
    for parameter in parameters:
        (gradient,) = torch.autograd.grad(loss(model(x)), parameter, create_graph=True)
        entries = []
        for i in range(parameter.numel()):
            row = None
            if gradient.requires_grad:
                (row,) = torch.autograd.grad(gradient.flatten()[i], parameter, retain_graph=True, allow_unused=True)
            entries.append(parameter.new_zeros(()) if row is None else row.flatten()[i])
        result.append(torch.stack(entries).view_as(parameter).detach())
    return result


def check(model: nn.Module, x: Tensor, loss: Callable | None = None) -> None:
    """The diagonals from the sources of a float64 model against double backward."""
    model = model.double()
    x = x.double()
    if loss is None:
        weights = torch.rand(model(x).shape, dtype=torch.float64) + 0.5

        def loss(prediction: Tensor) -> Tensor:
            return (weights * (prediction - 0.3).square()).mean()

    expected = dense_diagonal(model, loss, x)
    actual = diagonal_from_sources(bp.extend(copy.deepcopy(model)), loss, x)
    scale = max(e.abs().max().item() for e in expected)
    for name, a, e in zip(dict(model.named_parameters()), actual, expected, strict=True):
        assert_close(name, a, e, 1e-10, scale)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)


def sandwich(function: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (2, 3, 4)) -> nn.Module:
    """A layer, an elementwise function, and `function` of a tensor [N, *shape]."""
    return nn.Sequential(
        nn.Linear(2, torch.Size(shape).numel()), Apply(torch.sin), nn.Unflatten(1, shape), Apply(function)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Elementwise functions
# ---------------------------------------------------------------------------------------------------------------------

SMOOTH = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus(3, 2)": lambda x: F.softplus(x, 3.0, 2.0),
    "elu": F.elu,
    "elu(2)": lambda x: F.elu(x, 2.0),
    "selu": F.selu,
    "celu": F.celu,
    "celu(0.5)": lambda x: F.celu(x, 0.5),
    "logsigmoid": F.logsigmoid,
    "hardswish": F.hardswish,
    "tanhshrink": F.tanhshrink,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "2^x": lambda x: 2**x,
    "2^x by tensors": lambda x: torch.full_like(x, 2.0) ** x,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": lambda x: torch.tan(x.clamp(-1, 1)),
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "x * x": lambda x: x * x,
    "x^2": lambda x: x**2,
    "x^3": lambda x: x.pow(3),
    "x^1": lambda x: x.pow(1),
    "x^(1, 2, ..)": lambda x: x.pow(torch.arange(x.shape[-1]) % 3),
    "square": torch.square,
}
POSITIVE = {  # of x > 0
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "1 / x": lambda x: 1 / x,
    "tensor / x": lambda x: torch.arange(1.0, len(x) + 1, dtype=x.dtype)[:, None] / x,
    "tensor / x broadcast": lambda x: (torch.arange(1.0, 5, dtype=x.dtype) / x[..., None]).sum(-1),
    "x^1.5": lambda x: x**1.5,
    "x^-2": lambda x: x**-2,
    "acosh": lambda x: torch.acosh(1 + x),
    "lgamma": torch.lgamma,
}
BOUNDED = {"asin": torch.asin, "acos": torch.acos, "atanh": torch.atanh, "erfinv": torch.erfinv}  # of -1 < x < 1
IN_PLACE = {
    "sigmoid_": torch.sigmoid_,
    "tanh_": torch.tanh_,
    "silu_": lambda x: F.silu(x, inplace=True),
    "elu_": F.elu_,
    "celu_": F.celu_,
    "selu_": F.selu_,
    "hardswish_": lambda x: F.hardswish(x, inplace=True),
    "mish_": lambda x: F.mish(x, inplace=True),
    "exp_": torch.exp_,
}
ELEMENTWISE = (
    SMOOTH
    | {name: lambda x, f=f: f(F.relu(x) + 0.5) for name, f in POSITIVE.items()}
    | {name: lambda x, f=f: f(x.clamp(-0.9, 0.9)) for name, f in BOUNDED.items()}
    | {name: lambda x, f=f: f(x * 1) for name, f in IN_PLACE.items()}
)


@named("function", ELEMENTWISE)
def test_elementwise_function(function):
    """Between layers, twice, against double backward."""
    model = nn.Sequential(nn.Linear(2, 3), Apply(function), nn.Linear(3, 3), Apply(function))
    check(model, torch.randn(3, 2))


FAR = [0.0, 1e-30, 1e-8, 0.1, 0.5, 1.0, 1.7, 2.9, 5.0, 10.0, 15.0, 19.0, 30.0, 50.0, 88.0, 300.0, 1e3, 1e5, 1e15, 1e30]


def curvature_of(function: Callable, points: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """phi'' as the module forms it, by autograd, and phi, at the given points."""
    x = torch.tensor(points).to(dtype)[:, None]
    layer = nn.Linear(1, 1).to(dtype)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    z = bp.extend(layer)(x)
    y = function(z)
    with torch.no_grad():
        (source,) = residual_sources(y, torch.ones_like(y), layers_of(y), len(x))
    _, signs = source.root.form(0, 1)
    (first,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    return signs.squeeze(0), second.squeeze(1), y.detach().squeeze(1)


@named("function", {n: f for n, f in SMOOTH.items() if n not in ("x * x", "x^1", "x^(1, 2, ..)", "tan", "tanhshrink")})
def test_far_points(function):
    """Right and finite where the function is, in float64 against autograd (where that is), in float32 against both."""
    points = [sign * value for value in FAR for sign in (1, -1)]
    actual, expected, values = curvature_of(function, points, torch.float64)
    finite = values.isfinite() & (values.abs() < 1e100)
    assert actual[finite].isfinite().all()
    known = finite & expected.isfinite()
    torch.testing.assert_close(actual[known], expected[known], rtol=1e-7, atol=1e-12)
    single, _, values = curvature_of(function, points, torch.float32)
    finite = values.isfinite()
    assert single.dtype == torch.float32 and single[finite].isfinite().all()
    torch.testing.assert_close(single[finite].double(), actual[finite], rtol=2e-5, atol=1e-6)

"""Hessian diagonals for tests: by double backward, and by a small driver from the sources alone."""

import copy
from collections.abc import Callable

import torch
from helpers import assert_close
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
        (gradient,) = torch.autograd.grad(loss(model(x)), parameter, create_graph=True, materialize_grads=True)
        entries = []
        for i in range(parameter.numel()):
            row = None
            if gradient.requires_grad:
                (row,) = torch.autograd.grad(gradient.flatten()[i], parameter, retain_graph=True, allow_unused=True)
            entries.append(parameter.new_zeros(()) if row is None else row.flatten()[i])
        result.append(torch.stack(entries).view_as(parameter).detach())
    return result


def check_diagonals(model: nn.Module, x: Tensor, loss: Callable | None = None) -> None:
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
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, a, e in zip(names, actual, expected, strict=True):
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
        nn.Linear(1, torch.Size(shape).numel(), False), Apply(torch.sin), nn.Unflatten(1, shape), Apply(function)
    )


def assigned(x: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    """A copy of x after a change in place."""
    copied = x.clone()
    change(copied)
    return copied


def into_zeros(x: Tensor) -> Tensor:
    """x and its double in turn along the last dimension, assigned to slices."""
    result = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    result[..., ::2] = x
    result[..., 1::2] = 2 * x
    return result

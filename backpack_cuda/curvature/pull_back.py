"""Reverse mode for many columns, between tensors of a graph."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backpack_cuda.context import batching


def pull_back(
    sources: Sequence[GradientEdge], targets: Sequence[GradientEdge], columns: Sequence[Tensor]
) -> list[Tensor | None]:
    """Columns [V, *source] at each source -> [V, *target] at each target; None where no source depends on it."""
    create_graph = torch.is_grad_enabled()
    count = len(columns[0])
    if count > 1 and not create_graph:
        with contextlib.suppress(Exception), warnings.catch_warnings():  # an operation without batching rule
            warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
            return _batched(sources, targets, columns)
    # One by one; under create_graph always, since some batching rules have wrong second derivatives.
    found = [
        torch.autograd.grad(sources, targets, column, retain_graph=True, create_graph=create_graph, allow_unused=True)
        for column in zip(*columns, strict=True)
    ]
    if count == 1:
        return [None if grad is None else grad[None] for grad in found[0]]
    return [None if grads[0] is None else torch.stack(grads) for grads in zip(*found, strict=True)]


@contextlib.contextmanager
def keeping_retained_gradient(prediction: Tensor) -> Iterator[None]:
    """What passes through `prediction` inside does not enter its gradient, if it retains that."""
    if not prediction.retains_grad:
        yield
        return
    retained = prediction.grad

    def drop(_: Tensor) -> None:
        prediction.grad = None  # torch would add to it, and what was retained under torch.vmap is no tensor any more

    handle = prediction.register_hook(drop)  # runs before torch retains the gradient
    try:
        yield
    finally:
        handle.remove()
        prediction.grad = retained


def _batched(
    sources: Sequence[GradientEdge], targets: Sequence[GradientEdge], columns: Sequence[Tensor]
) -> list[Tensor | None]:
    reached: list[bool] = []

    def pull(column: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(sources, targets, column, retain_graph=True, allow_unused=True)
        reached[:] = [grad is not None for grad in found]
        return [grad for grad in found if grad is not None]

    with batching():
        found = iter(torch.func.vmap(pull)(list(columns)))
    return [next(found) if is_reached else None for is_reached in reached]

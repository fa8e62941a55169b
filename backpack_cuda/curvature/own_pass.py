"""Reading what a graph's nodes have saved, while a backward pass runs."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class _Call(torch.autograd.Function):
    """Its backward calls a function."""

    @staticmethod
    def forward(ctx, trigger, function):
        ctx.function = function
        return trigger.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.function()
        return grad, None


def in_own_pass(function: Callable[[], Result]) -> Result:
    """`function()`, called in a backward pass of its own, under the grad mode of the caller.

    Activation checkpointing allows each saved tensor to be read once per backward pass: the one that runs now needs
    them itself.
    """
    results = []
    grad_mode = torch.is_grad_enabled()

    def call() -> None:
        with torch.set_grad_enabled(grad_mode):
            results.append(function())

    with torch.enable_grad():
        trigger = torch.zeros((), requires_grad=True)
        output = _Call.apply(trigger, call)
    output.backward()
    return results[0]

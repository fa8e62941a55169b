"""Branches of a network that meet again, as modules.

Kept for BackPACK's programs: a sum in a forward (`x + self.block(x)`) gives the same quantities. All quantities work
with both, also those that BackPACK refuses at branches (KFLR, DiagHessian and others).
"""

from collections import OrderedDict

from torch import Tensor, nn


class _Branch(nn.Module):
    """Calls every child on the same input.

    Args:
        *args: modules, or one OrderedDict of them, as torch.nn.Sequential takes them.
    """

    def __init__(self, *args: OrderedDict[str, nn.Module] | nn.Module):
        super().__init__()
        is_dict = len(args) == 1 and isinstance(args[0], OrderedDict)
        named = args[0].items() if is_dict else ((str(position), child) for position, child in enumerate(args))
        for name, child in named:
            self.add_module(name, child)

    def forward(self, input: Tensor) -> tuple:
        """The children's outputs, in their order."""
        return tuple(child(input) for child in self.children())


class SumModule(nn.Module):
    """The sum of one or more tensors of the same shape."""

    def forward(self, *input: Tensor) -> Tensor:
        """The sum of all inputs.

        Raises:
            AssertionError: there is no input, one is not a tensor, or shapes differ.
        """
        if not input:
            raise AssertionError("input: expected at least one tensor, got none")
        if not all(isinstance(summand, Tensor) for summand in input):
            raise AssertionError(f"input: expected tensors, got {[type(summand).__name__ for summand in input]}")
        if any(summand.shape != input[0].shape for summand in input):
            raise AssertionError(f"input: expected equal shapes, got {[list(summand.shape) for summand in input]}")
        return sum(input[1:], input[0])


class Parallel(nn.Module):
    """Calls modules on the same input and merges their outputs.

    Args:
        *args: modules, or one OrderedDict of them, as torch.nn.Sequential takes them; they become `branch`.
        merge_module: called with all outputs, as `merge`; None: `SumModule()`.
    """

    def __init__(self, *args: OrderedDict[str, nn.Module] | nn.Module, merge_module: nn.Module | None = None):
        super().__init__()
        self.branch = _Branch(*args)
        self.merge = SumModule() if merge_module is None else merge_module

    def forward(self, input: Tensor) -> Tensor:
        """The merged outputs of all branches."""
        return self.merge(*self.branch(input))

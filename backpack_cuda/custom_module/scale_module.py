"""Multiplication by a constant, as a module."""

from torch import Tensor, nn


class ScaleModule(nn.Module):
    """Multiplies its input by a constant. Kept for BackPACK's programs: `0.5 * x` gives the same quantities.

    Args:
        weight: the constant; an attribute, not a parameter.

    Raises:
        ValueError: `weight` is not a float.
    """

    def __init__(self, weight: float = 1.0):
        super().__init__()
        if not isinstance(weight, float):
            raise ValueError(f"weight: expected a float, got {weight!r} of type {type(weight).__name__}")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """input * weight."""
        return input * self.weight

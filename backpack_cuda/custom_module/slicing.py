"""Indexing of a tensor, as a module."""

from torch import Tensor, nn


class Slicing(nn.Module):
    """Takes a part of its input. Kept for BackPACK's programs: `x[:, 0]` in a forward gives the same quantities.

    Args:
        slice_info: what stands between the brackets; dimension 0, the samples, must stay whole.
    """

    def __init__(self, slice_info: tuple[slice | int, ...]):
        super().__init__()
        self.slice_info = slice_info

    def forward(self, input: Tensor) -> Tensor:
        """The part of the input."""
        return input[self.slice_info]

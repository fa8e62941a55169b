"""A permutation of dimensions, as a module."""

from torch import Tensor, nn


class Permute(nn.Module):
    """Permutes the dimensions of its input. Kept for BackPACK's programs: `x.permute(...)` gives the same quantities.

    Args:
        *dims: the new order of all dimensions; with `init_transpose` the two that change places.
        init_transpose: whether `dims` are two dimensions that change places.

    Raises:
        ValueError: dimension 0, the samples, would not stay where it is.
    """

    def __init__(self, *dims: int, init_transpose: bool = False):
        super().__init__()
        if (0 in dims) if init_transpose else (dims[:1] != (0,)):
            kind = "two dimensions other than 0" if init_transpose else "0 in the first place"
            raise ValueError(f"dims: expected {kind}, because dimension 0 holds the samples, got {dims}")
        self.dims = dims
        self.init_transpose = init_transpose

    def forward(self, input: Tensor) -> Tensor:
        """A view of the input with the new order."""
        return input.transpose(*self.dims) if self.init_transpose else input.permute(self.dims)

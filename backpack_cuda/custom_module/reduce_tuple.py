"""One element of a tuple, as a module."""

from torch import Tensor, nn


class ReduceTuple(nn.Module):
    """Takes an element of a tuple, such as a recurrent layer's output. Kept for BackPACK's programs.

    Args:
        index: which element.
    """

    def __init__(self, index: int = 0):
        super().__init__()
        self.index = index

    def forward(self, input: tuple) -> tuple | Tensor:
        """The element."""
        return input[self.index]

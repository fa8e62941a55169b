"""torch.nn.functional.pad as a module."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Pad(nn.Module):
    """Pads its input in any mode. Kept for BackPACK's programs: `F.pad` in a forward gives the same quantities.

    Args:
        pad, mode, value: as torch.nn.functional.pad takes them.
    """

    def __init__(self, pad: Sequence[int], mode: str = "constant", value: float = 0.0):
        super().__init__()
        self.pad = pad
        self.mode = mode
        self.value = value

    def forward(self, input: Tensor) -> Tensor:
        """The padded input."""
        return F.pad(input, self.pad, mode=self.mode, value=self.value)

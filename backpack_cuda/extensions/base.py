"""What every quantity has in common."""

from collections.abc import Sequence
from operator import index


class BackpropExtension:
    """A quantity that backward passes inside `with backpack(...)` form and save on the parameters.

    Args:
        savefield: name of the attribute of a parameter that holds the result.
        subsampling: indices of the samples to form the quantity for (may repeat); None for all.

    Raises:
        ValueError: `subsampling` holds something other than non-negative integers.
    """

    def __init__(self, savefield: str, subsampling: Sequence[int] | None = None):
        if subsampling is not None:
            try:
                subsampling = [index(sample) for sample in subsampling]
            except TypeError as error:
                raise ValueError(f"subsampling: expected indices of samples, got {subsampling!r}") from error
            if min(subsampling, default=0) < 0:
                raise ValueError(f"subsampling: expected indices of at least 0, got {subsampling!r}")
        self.savefield = savefield
        self._subsampling = subsampling

    def get_subsampling(self) -> list[int] | None:
        """The samples that the quantity is formed for; None for all."""
        return self._subsampling

    def __repr__(self) -> str:
        arguments = "" if self._subsampling is None else f"subsampling={self._subsampling}"
        return f"{type(self).__name__}({arguments})"

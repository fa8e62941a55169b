"""What every kind of per-sample gradient offers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from backpack_cuda.per_sample.columns import ColumnUse, LoopedColumns
from backpack_cuda.stats import Stats


class NoPerSampleGradients(Exception):
    """A module's per-sample gradients do not exist or cannot be formed; the message is a sentence for the user."""


class Use(ABC):
    """One use of a layer in a forward pass: the per-sample gradients of its parameters, not yet formed.

    Attributes:
        batch_size: N.
        dtype: the type of the gradients.
        mixes_samples: whether sample n's output depends on other samples, so that G_n is only the n-th summand of the
            gradient and not the gradient of sample n's loss.
    """

    batch_size: int
    dtype: torch.dtype
    mixes_samples = False

    @abstractmethod
    def stats(self, want: dict[str, int]) -> dict[str, Stats]:
        """Statistics of each named parameter. Differentiable under grad mode. May raise NoPerSampleGradients."""

    @abstractmethod
    def select(self, samples: slice | Tensor) -> "Use":
        """The same use restricted to some samples: a slice, or indices [K] (which may repeat)."""

    def part(self, name: str) -> "tuple[Use, str]":
        """What of a use of several parts a parameter belongs to, and its name there."""
        return self, name

    def around(self, part: "Use", name: str) -> "Use":
        """A use that consists of such a part, in which the parameter has its name of this one."""
        return part

    def joined(self, uses: Sequence["Use"]) -> "Use | None":
        """`uses` of one weight, all of this kind, as a single one with their positions behind each other.

        None where there is none.
        """
        return None

    def as_columns(self) -> ColumnUse:
        """The output gradients as columns with V = 1."""
        return LoopedColumns([self])

"""Per-sample gradients of a module whose parameters belong to several factorised uses: recurrent layers."""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from backpack_cuda.per_sample.base import Use
from backpack_cuda.per_sample.columns import ColumnUse
from backpack_cuda.stats import ColumnStats, Stats


class Part(NamedTuple):
    """A use, and the module's parameters in it."""

    use: Use | ColumnUse
    names: dict[str, str]  # the parameter's name in the module -> in the use


def _stats(parts: Sequence[Part], want: dict[str, int], *signs) -> dict:
    """Every wanted statistic, in one call for each part."""
    result = {}
    for part in parts:
        own = {inside: want[name] for name, inside in part.names.items() if name in want}
        if own:
            found = part.use.stats(own, *signs)
            result |= {name: found[inside] for name, inside in part.names.items() if name in want}
    return result


class PartsUse(Use):
    """Uses that are formed when the first statistic is asked for."""

    def __init__(self, form: Callable[[], list[Part]], batch_size: int, dtype: torch.dtype):
        self._form = form
        self.batch_size = batch_size
        self.dtype = dtype

    @cached_property
    def parts(self) -> list[Part]:
        """The uses, each of other parameters."""
        return self._form()

    @classmethod
    def of(cls, parts: list[Part]) -> "PartsUse":
        """Of uses that are there already."""
        return cls(lambda: parts, parts[0].use.batch_size, parts[0].use.dtype)

    def part(self, name: str) -> tuple[Use, str]:
        return next((part.use, part.names[name]) for part in self.parts if name in part.names)

    def around(self, part: Use, name: str) -> "PartsUse":
        return PartsUse.of([Part(part, {name: "weight"})])

    def stats(self, want: dict[str, int]) -> dict[str, Stats]:
        return _stats(self.parts, want)

    def select(self, samples: slice | Tensor) -> "PartsUse":
        return PartsUse.of([Part(part.use.select(samples), part.names) for part in self.parts])

    def as_columns(self) -> "PartsColumns":
        return PartsColumns([Part(part.use.as_columns(), part.names) for part in self.parts])


class PartsColumns(ColumnUse):
    """The same with V output gradients of every sample."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts
        self.batch_size = parts[0].use.batch_size
        self.dtype = parts[0].use.dtype

    def part(self, name: str) -> tuple[ColumnUse, str]:
        return next((part.use, part.names[name]) for part in self._parts if name in part.names)

    def around(self, part: ColumnUse, name: str) -> "PartsColumns":
        return PartsColumns([Part(part, {name: "weight"})])

    def stats(self, want: dict[str, int], signs: Tensor | None) -> dict[str, ColumnStats]:
        return _stats(self._parts, want, signs)

    def select(self, samples: slice | Tensor) -> "PartsColumns":
        return PartsColumns([Part(part.use.select(samples), part.names) for part in self._parts])

    def positions(self) -> float:
        return self._parts[0].use.positions()  # the same for all parts

    def output_identity(self, name: str) -> Hashable:
        use, _ = self.part(name)
        return id(use.columns), use.columns.shape[-1]

    def input_moment(self, name: str, scale: float) -> Tensor | None:
        use, inside = self.part(name)
        return use.input_moment(inside, scale)

    def input_sums(self, name: str) -> Tensor | None:
        use, inside = self.part(name)
        return use.input_sums(inside)

    def output_moment(self, name: str) -> Tensor:
        use, inside = self.part(name)
        return use.output_moment(inside)

    def summed_moment(self, name: str) -> Tensor:
        use, inside = self.part(name)
        return use.summed_moment(inside)

    def output_rows(self, name: str) -> Tensor:
        use, inside = self.part(name)
        return use.output_rows(inside)

    def output_sums(self, name: str) -> Tensor:
        use, inside = self.part(name)
        return use.output_sums(inside)

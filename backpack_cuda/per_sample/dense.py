"""Per-sample gradients that are materialised: layers without a factorised form, and sums of unlike uses."""

from collections.abc import Callable
from functools import cached_property, reduce

import torch
from torch import Tensor

from backpack_cuda.per_sample.base import Use
from backpack_cuda.per_sample.columns import SummedColumns, common_batch_size
from backpack_cuda.stats import Stats, Want, statistics_dtype, stats_of_chunks

_CHUNK_ELEMENTS = 1 << 22  # of the per-sample gradients that a SummedUse holds at a time


class DenseUse(Use):
    """Per-sample gradients as tensors."""

    def __init__(self, batch_grads: dict[str, Tensor], mixes_samples: bool = False):
        self.batch_grads = batch_grads  # each [N, *P]
        first = next(iter(batch_grads.values()))
        self.batch_size = first.shape[0]
        self.dtype = first.dtype
        self.mixes_samples = mixes_samples

    def stats(self, want: dict[str, int]) -> dict[str, Stats]:
        result = {}
        for name, flags in want.items():
            rows = self.batch_grads[name]
            result[name] = stats_of_chunks([rows.to(statistics_dtype(rows.dtype))], flags, rows.dtype)
        return result

    def select(self, samples: slice | Tensor) -> "DenseUse":
        return DenseUse({name: rows[samples] for name, rows in self.batch_grads.items()}, self.mixes_samples)


class LazyDenseUse(Use):
    """A DenseUse that is formed when the first statistic is asked for."""

    def __init__(self, form: Callable[[], dict[str, Tensor]], mixes_samples: bool = False):
        self.mixes_samples = mixes_samples
        self._form = form

    @cached_property
    def _dense(self) -> DenseUse:
        return DenseUse(self._form(), self.mixes_samples)

    @property
    def batch_size(self) -> int:
        return self._dense.batch_size

    @property
    def dtype(self) -> torch.dtype:
        return self._dense.dtype

    def stats(self, want: dict[str, int]) -> dict[str, Stats]:
        return self._dense.stats(want)

    def select(self, samples: slice | Tensor) -> DenseUse:
        return self._dense.select(samples)


class SummedUse(Use):
    """One parameter used several times: sample n's gradient is the sum of its gradients over the uses."""

    def __init__(self, uses: list[tuple[Use, str]]):
        self._uses = uses  # (use, the parameter's name in it)
        self.batch_size = common_batch_size([use for use, _ in uses])
        self.dtype = uses[0][0].dtype
        self.mixes_samples = any(use.mixes_samples for use, _ in uses)

    def _rows(self, samples: slice) -> Tensor:  # [N_c, *P]
        rows = [use.select(samples).stats({name: Want.BATCH_GRAD})[name].batch_grad for use, name in self._uses]
        return reduce(torch.add, [r.to(statistics_dtype(r.dtype)) for r in rows])

    def stats(self, want: dict[str, int]) -> dict[str, Stats]:
        ((name, flags),) = want.items()
        n = max(self.batch_size, 1)
        elements = self._rows(slice(0, 1)).numel()
        step = n if torch.is_grad_enabled() else max(1, _CHUNK_ELEMENTS // max(1, elements))
        chunks = (self._rows(slice(begin, begin + step)) for begin in range(0, n, step))
        return {name: stats_of_chunks(chunks, flags, self.dtype)}

    def select(self, samples: slice | Tensor) -> "SummedUse":
        return SummedUse([(use.select(samples), name) for use, name in self._uses])

    def as_columns(self) -> SummedColumns:
        return SummedColumns([(use.as_columns(), name) for use, name in self._uses])


def merge(uses: list[tuple[Use, str]]) -> Use:
    """All uses of one parameter as a single use; ask it for the parameter under the first use's name."""
    summed = SummedUse(uses)
    parts = [use.part(name) for use, name in uses]
    joined = None
    if len({type(use) for use, _ in parts}) == 1 and all(name == "weight" for _, name in parts):
        joined = parts[0][0].joined([use for use, _ in parts])
    first, name = uses[0]
    return summed if joined is None else first.around(joined, name)

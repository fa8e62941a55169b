"""Uses of a layer with V output gradients per sample: the columns of a square root of a curvature matrix.

G_vn is the per-sample gradient of sample n that belongs to column v. If the columns S_vn of sample n at the layer's
output satisfy sum_v S_vn S_vn^T = H_n, then sum_v G_vn G_vn^T is H_n pulled back to the parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property, reduce
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backpack_cuda.ops import composite, dispatch
from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.stats import ColumnStats, ColumnWant, Want, column_stats_of_chunks, statistics_dtype

if TYPE_CHECKING:
    from backpack_cuda.per_sample.base import Use

_CHUNK_ELEMENTS = 1 << 22  # of the per-sample gradients that a SummedColumns holds at a time


class NoKroneckerFactors(Exception):
    """A parameter's curvature has no known Kronecker factors; the message is a sentence for the user."""


class ColumnUse(ABC):
    """One use of a layer in a forward pass, with columns at its output.

    Kronecker factors are composed of four sums over the R positions of a use: an input factor of the rows a_nr that
    the weight multiplies, an output factor of the columns b_vnr at its outputs, each with the sum over positions
    outside or inside of the product. Layers with groups have factors per group, [G, D, D].

    Attributes:
        batch_size: N.
        dtype: the type of the columns.
        mixes_samples: as of `Use`.
        sums_positions: whether BackPACK's convention sums the columns over positions before it multiplies them.
    """

    batch_size: int
    dtype: torch.dtype
    mixes_samples = False
    sums_positions = False

    @cached_property
    def output_factors(self) -> dict[tuple, Tensor]:
        """Room for output factors that several parameters and quantities have in common."""
        return {}

    @abstractmethod
    def stats(self, want: dict[str, int], signs: Tensor | None) -> dict[str, ColumnStats]:
        """Statistics of each named parameter; signs [V, N] or None. Differentiable under grad mode."""

    @abstractmethod
    def select(self, samples: slice | Tensor) -> "ColumnUse":
        """The same use restricted to some samples: a slice, or indices [K] (which may repeat)."""

    def part(self, name: str) -> "tuple[ColumnUse, str]":
        """What of a use of several parts a parameter belongs to, and its name there."""
        return self, name

    def around(self, part: "ColumnUse", name: str) -> "ColumnUse":
        """A use that consists of such a part, in which the parameter has its name of this one."""
        return part

    def joined(self, uses: Sequence["ColumnUse"]) -> "ColumnUse | None":
        """`uses` of one weight, all of this kind, as a single one with their positions behind each other.

        None where there is none.
        """
        return None

    def positions(self) -> float:
        """R, how often the weight is applied to a sample, on average."""
        return 1

    def groups(self, name: str) -> int:
        """G, the number of blocks of the parameter's Kronecker factors."""
        return 1

    def input_identity(self, name: str) -> Hashable | None:
        """Equal for uses with equal input factors; None where that is not known."""
        return None

    def output_identity(self, name: str) -> Hashable | None:
        """Equal for parameters of this use with equal output factors per group."""
        return None

    def input_moment(self, name: str, scale: float) -> Tensor | None:
        """scale * sum_nr a_nr a_nr^T, [D, D] or [G, D, D]; None for a parameter with an output factor only."""
        return None

    def input_sums(self, name: str) -> Tensor | None:
        """sum_r a_nr, [N, G * D]."""
        return None

    def output_moment(self, name: str) -> Tensor:
        """sum_vnr b_vnr b_vnr^T, [O, O] or [G, O, O]."""
        return moment(self.output_sums(name), self.groups(name))

    def summed_moment(self, name: str) -> Tensor:
        """sum_vn (sum_r b_vnr) (sum_r b_vnr)^T, [O, O] or [G, O, O]."""
        return moment(self.output_sums(name), self.groups(name))

    def with_mean_input(self, name: str) -> "ColumnUse":
        """A batch of one with the mean of the samples' inputs, for the input factor of a parameter."""
        raise NoKroneckerFactors(f"{name}, whose Jacobian has no mean that is known to factorise")

    def by_position(self, name: str, matrix: Tensor) -> Tensor:
        """A matrix [D, D] over the D features of a sample's output, as [R, O, R, O] over its positions."""
        raise NoKroneckerFactors(f"{name}, of a layer without a known factorisation")

    def output_rows(self, name: str) -> Tensor:
        """b_vnr, [V, N, *, O]; for an additive parameter its per-sample gradients."""
        return self.output_sums(name)

    def output_sums(self, name: str) -> Tensor:
        """sum_r b_vnr, [V, N, G * O]; for an additive parameter its per-sample gradients."""
        rows = self.stats({name: ColumnWant.FACTOR}, None)[name].factor  # [V, N, *P]
        if rows.dim() > 3:
            raise NoKroneckerFactors(f"{name} of size {list(rows.shape[2:])}, of a layer without a known factorisation")
        return rows.reshape(*rows.shape[:2], prod(rows.shape[2:]))


def moment(rows: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """scale * sum of the outer products of rows [*, G * D]: [D, D], or the blocks [G, D, D] of G > 1 groups."""
    if groups == 1:
        return dispatch.linear_kron_factor(rows, scale)
    return torch.stack([dispatch.linear_kron_factor(block, scale) for block in rows.chunk(groups, -1)])


class LinearColumns(ColumnUse):
    """A Linear layer: G_vn = sum_t columns[v, n, t] input[n, t]^T of `weight`, sum_t columns[v, n, t] of `bias`."""

    def __init__(self, input: Tensor | None, columns: Tensor, lengths: Tensor | None = None):
        self.input = input  # [N, *, I]; None where only the bias is trained
        self.columns = columns  # [V, N, *, O]
        self.lengths = lengths  # [N], positions of each sample, the others being zero; None for all
        self.batch_size = columns.shape[1]
        self.dtype = columns.dtype

    def stats(self, want: dict[str, int], signs: Tensor | None) -> dict[str, ColumnStats]:
        weight_want, bias_want = want.get("weight", ColumnWant.NOTHING), want.get("bias", ColumnWant.NOTHING)
        if self.input is None:
            return {"bias": dispatch.bias_column_stats(self.columns, self.columns.dim() - 1, signs, bias_want)}
        pair = dispatch.linear_column_stats(self.input, self.columns, signs, weight_want, bias_want)
        return dict(zip(("weight", "bias"), pair, strict=True))

    def select(self, samples: slice | Tensor) -> "LinearColumns":
        input = None if self.input is None else self.input[samples]
        return LinearColumns(input, self.columns[:, samples], None if self.lengths is None else self.lengths[samples])

    def positions(self) -> float:
        return prod(self.columns.shape[2:-1]) if self.lengths is None else self.lengths.double().mean().item()

    def input_identity(self, name: str) -> Hashable | None:
        return _identity(self.input) if name == "weight" else None

    def input_moment(self, name: str, scale: float) -> Tensor | None:
        return dispatch.linear_kron_factor(self.input, scale) if name == "weight" else None

    def input_sums(self, name: str) -> Tensor | None:
        if name != "weight":
            return None
        sums = _sum_positions(self.input, 1)
        # Times R / R_n, so that the mean over positions is that of each sample.
        return sums if self.lengths is None else sums * (self.positions() / self.lengths)[:, None].to(sums)

    def with_mean_input(self, name: str) -> "LinearColumns":
        return LinearColumns(None if self.input is None else _mean_sample(self.input), self.columns[:, :1])

    def by_position(self, name: str, matrix: Tensor) -> Tensor:
        positions, outputs = prod(self.columns.shape[2:-1]), self.columns.shape[-1]
        return matrix.view(positions, outputs, positions, outputs)

    def output_rows(self, name: str) -> Tensor:
        return self.columns

    def output_moment(self, name: str) -> Tensor:
        return dispatch.linear_kron_factor(self.columns, 1.0)

    def output_sums(self, name: str) -> Tensor:
        return _sum_positions(self.columns, 2)

    def joined(self, uses: Sequence["LinearColumns"]) -> "LinearColumns":
        inputs = [positions_flat(use.input, 1) for use in uses]  # [N, T, I] each
        columns = [positions_flat(use.columns, 2) for use in uses]  # [V, N, T, O] each
        return LinearColumns(torch.cat(inputs, 1), torch.cat(columns, 2), sum_of_lengths(uses))


class ConvColumns(ColumnUse):
    """A (transposed) convolution: as LinearColumns with the patches of its input as rows.

    The Kronecker factors of a transposed convolution take the patches of its input from which it forms an output pixel,
    in the order (C, *kernel): they approximate the curvature of `weight.transpose(0, 1)`, as BackPACK's.
    """

    sums_positions = True

    def __init__(self, geometry: ConvGeometry, input: Tensor, columns: Tensor):
        self.geometry = geometry
        self.input = input  # [N, C, *size]
        self.columns = columns  # [V, N, O, *output size]
        self.batch_size = columns.shape[1]
        self.dtype = columns.dtype

    def stats(self, want: dict[str, int], signs: Tensor | None) -> dict[str, ColumnStats]:
        weight_want, bias_want = want.get("weight", ColumnWant.NOTHING), want.get("bias", ColumnWant.NOTHING)
        pair = dispatch.conv_column_stats(self.geometry, self.input, self.columns, signs, weight_want, bias_want)
        return dict(zip(("weight", "bias"), pair, strict=True))

    def select(self, samples: slice | Tensor) -> "ConvColumns":
        return ConvColumns(self.geometry, self.input[samples], self.columns[:, samples])

    def positions(self) -> int:
        return prod(self.columns.shape[3:])

    def groups(self, name: str) -> int:
        return self.geometry.groups if name == "weight" else 1

    def input_identity(self, name: str) -> Hashable | None:
        if name != "weight":
            return None
        return (_identity(self.input), self.geometry, tuple(self.columns.shape[3:]))

    def input_moment(self, name: str, scale: float) -> Tensor | None:
        if name != "weight":
            return None
        return dispatch.conv_kron_factor(self.input, self.geometry, tuple(self.columns.shape[3:]), scale)

    def input_sums(self, name: str) -> Tensor | None:
        if name != "weight":
            return None
        return composite.patch_sums(self.input, self.geometry, tuple(self.columns.shape[3:]))

    def with_mean_input(self, name: str) -> "ConvColumns":
        return ConvColumns(self.geometry, _mean_sample(self.input), self.columns[:, :1])

    def by_position(self, name: str, matrix: Tensor) -> Tensor:
        positions, outputs = self.positions(), self.columns.shape[2]
        return matrix.view(outputs, positions, outputs, positions).permute(1, 0, 3, 2)

    def output_moment(self, name: str) -> Tensor:
        return moment(self.columns.movedim(2, -1), self.groups(name))  # of rows [V, N, *output size, O]

    def output_sums(self, name: str) -> Tensor:
        return self.columns.flatten(3).sum(3, dtype=statistics_dtype(self.dtype))  # [V, N, O]


class LoopedColumns(ColumnUse):
    """Any other use: its per-sample gradients column by column."""

    def __init__(self, uses: Sequence["Use"]):
        self._uses = uses  # one per column
        self.batch_size = uses[0].batch_size
        self.dtype = uses[0].dtype
        self.mixes_samples = uses[0].mixes_samples

    def stats(self, want: dict[str, int], signs: Tensor | None) -> dict[str, ColumnStats]:
        return {
            name: column_stats_of_chunks([self._columns(name, signs)], flags, self.dtype)
            for name, flags in want.items()
        }

    def _columns(self, name: str, signs: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Per-sample gradients [1, N, *P] and signs [1, N] of one column after the other."""
        wide = statistics_dtype(self.dtype)
        for v, use in enumerate(self._uses):
            rows = use.stats({name: Want.BATCH_GRAD})[name].batch_grad
            yield rows[None].to(wide), None if signs is None else signs[v : v + 1]

    def output_identity(self, name: str) -> Hashable | None:
        return name

    def select(self, samples: slice | Tensor) -> "LoopedColumns":
        return LoopedColumns([use.select(samples) for use in self._uses])


def common_batch_size(uses: Sequence["ColumnUse | Use"]) -> int:
    """N of the uses of one parameter in one backward pass."""
    sizes = sorted({use.batch_size for use in uses})
    if len(sizes) > 1:
        raise ValueError(
            f"a parameter was used with batch sizes {' and '.join(map(str, sizes))} in one backward pass: which "
            "samples belong together is unknown; call backward once per forward pass"
        )
    return sizes[0]


class SummedColumns(ColumnUse):
    """One parameter used several times: its per-sample gradients are the sums over the uses."""

    def __init__(self, uses: Sequence[tuple[ColumnUse, str]]):
        self._uses = uses  # (use, the parameter's name in it)
        self.batch_size = common_batch_size([use for use, _ in uses])
        self.dtype = uses[0][0].dtype
        self.mixes_samples = any(use.mixes_samples for use, _ in uses)
        self.sums_positions = any(use.sums_positions for use, _ in uses)

    def stats(self, want: dict[str, int], signs: Tensor | None) -> dict[str, ColumnStats]:
        ((name, flags),) = want.items()
        return {name: column_stats_of_chunks(self._chunks(signs), flags, self.dtype)}

    def _chunks(self, signs: Tensor | None) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """Per-sample gradients [V, N_c, *P] and signs [V, N_c] of one part of the batch after the other."""
        n, step = max(self.batch_size, 1), 1
        if torch.is_grad_enabled():
            step = n  # the graph keeps them all
        elif n > 1:
            step = max(1, _CHUNK_ELEMENTS // max(1, self._rows(slice(0, 1)).numel()))
        for begin in range(0, n, step):
            samples = slice(begin, begin + step)
            yield [(self._rows(samples), None if signs is None else signs[:, samples])]

    def _rows(self, samples: slice) -> Tensor:  # [V, N_c, *P]
        wide = statistics_dtype(self.dtype)
        rows = [use.select(samples).stats({n: ColumnWant.FACTOR}, None)[n].factor for use, n in self._uses]
        return reduce(torch.add, [r.to(wide) for r in rows])

    def select(self, samples: slice | Tensor) -> "SummedColumns":
        return SummedColumns([(use.select(samples), name) for use, name in self._uses])

    def positions(self) -> int:
        return sum(use.positions() for use, _ in self._uses)

    def groups(self, name: str) -> int:
        (use, own_name), *_ = self._uses
        return use.groups(own_name)

    def _sum(self, form) -> Tensor | None:
        parts = [form(use, name) for use, name in self._uses]
        if any(part is None for part in parts):
            return None
        return torch.stack(parts).sum(0)

    def input_moment(self, name: str, scale: float) -> Tensor | None:
        return self._sum(lambda use, n: use.input_moment(n, scale))

    def input_sums(self, name: str) -> Tensor | None:
        return self._sum(lambda use, n: use.input_sums(n))

    def with_mean_input(self, name: str) -> "SummedColumns":
        return SummedColumns([(use.with_mean_input(own_name), own_name) for use, own_name in self._uses])

    def output_moment(self, name: str) -> Tensor:
        if any(isinstance(use, LoopedColumns) for use, _ in self._uses):  # the whole block, of the summed gradients
            return moment(self.output_sums(name), 1)
        return self._sum(lambda use, n: use.output_moment(n))

    def output_sums(self, name: str) -> Tensor:
        return self._sum(lambda use, n: use.output_sums(n))


def merge_columns(uses: Sequence[tuple[ColumnUse, str]]) -> ColumnUse:
    """All uses of one parameter as a single use; ask it for the parameter under the first use's name."""
    summed = SummedColumns(uses)
    parts = [use.part(name) for use, name in uses]
    joined = None
    if len({type(use) for use, _ in parts}) == 1 and all(name == "weight" for _, name in parts):
        joined = parts[0][0].joined([use for use, _ in parts])
    first, name = uses[0]
    return summed if joined is None else first.around(joined, name)


def sum_of_lengths(uses: Sequence) -> Tensor | None:
    """[N]: each sample's positions in several uses of one kind together, None where all samples have the same."""
    if all(use.lengths is None for use in uses):
        return None
    positions = [prod(use.input.shape[1:-1]) if use.lengths is None else use.lengths for use in uses]
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, positions))).sum(0)


def _identity(tensor: Tensor) -> Hashable:
    """Equal for the same values in the same memory, while that is in use."""
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype


def _mean_sample(input: Tensor) -> Tensor:
    """The mean over the samples, as a batch of one in the statistics' type; zeros for none."""
    return input.sum(0, keepdim=True, dtype=statistics_dtype(input.dtype)) / max(input.shape[0], 1)


def positions_flat(rows: Tensor, leading: int) -> Tensor:
    """The dims between the `leading` first and the last as one."""
    return rows.reshape(*rows.shape[:leading], prod(rows.shape[leading:-1]), rows.shape[-1])


def _sum_positions(rows: Tensor, leading: int) -> Tensor:
    """Sum over the dims between the `leading` first and the last, in the statistics' type."""
    if rows.dim() == leading + 1:
        return rows
    return positions_flat(rows, leading).sum(leading, dtype=statistics_dtype(rows.dtype))

"""Per-sample gradients of an Embedding: few rows of the weight, each the sum of some output gradients.

Row e of G_n is the sum of sample n's output gradients at the positions that looked up token e. Positions with the same
sample and token form a run; the gradients are summed by run once, and every statistic follows from these rows, as many
as there are positions. All sizes are known beforehand, so that a GPU is never waited for, and sums are taken in a fixed
order on the CPU and on CUDA: results are deterministic.
"""

import mmap
from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from backpack_cuda.ops import dispatch
from backpack_cuda.per_sample.base import Use
from backpack_cuda.per_sample.columns import ColumnUse, NoKroneckerFactors, positions_flat
from backpack_cuda.stats import ColumnStats, ColumnWant, Stats, Want, statistics_dtype

_PAGE = 4096  # bytes
_LARGE = 16 << 20  # bytes of a result above which no memory of earlier results is kept (csrc/cpu/result_pool.cpp)
_CACHED = 1 << 16  # elements of an intermediate result on the CPU


class Runs(NamedTuple):
    """Positions with the same sample and token, sorted by sample, then by token.

    On the CPU R is the number of runs. On a GPU, which would have to be waited for, it is the number of positions, and
    the runs beyond the last one are without any.
    """

    of_positions: Tensor  # [positions] run of each position; R for the padding token
    sample: Tensor  # [R]
    token: Tensor  # [R]
    used: Tensor | None  # [R] whether the run has a position; None if all have


class Lookup:
    """Which tokens the samples of a batch look up."""

    def __init__(
        self, tokens: Tensor, num_embeddings: int, padding_idx: int | None = None, scale: Tensor | None = None
    ):
        self.tokens = tokens  # [N, *]
        self.num_embeddings = num_embeddings  # E
        self.padding_idx = padding_idx  # the token that has no gradient
        self.scale = scale  # [E] factors of the rows' gradients, of the whole batch; None for 1

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def runs(self) -> Runs:
        n, e, each = self.batch_size, max(self.num_embeddings, 1), prod(self.tokens.shape[1:])
        tokens = self.tokens.reshape(n, each).long()
        keys = (tokens + torch.arange(0, n * e, e, device=tokens.device).unsqueeze(1)).reshape(-1)
        if each == 1:
            key, run, used = keys, torch.arange(n, device=keys.device), None
        elif _on_gpu(keys):
            key, run, used = _runs_of_same_count(keys)
        else:
            key, run = keys.unique(return_inverse=True)
            used = None
        if self.padding_idx is not None:
            run = run.masked_fill(tokens.reshape(-1) == self.padding_idx, len(key))
        return Runs(run, key.div(e, rounding_mode="floor"), key % e, used)

    def rows(self, gradients: Tensor) -> Tensor:
        """Output gradients [V, N, *, H] summed by run: [V, R, H], in the statistics' type."""
        v, h, r, positions = gradients.shape[0], gradients.shape[-1], len(self.runs.token), self.tokens.numel()
        rows, size = gradients.to(statistics_dtype(gradients.dtype)).reshape(v * positions, h), positions
        if self.padding_idx is not None or positions > self.batch_size:
            size = r if self.padding_idx is None else r + 1  # the last row is the padding token's
            rows = sum_rows(rows, _repeated(self.runs.of_positions, v, size), v * size)
        rows = rows.view(v, size, h)[:, :r]
        if self.scale is None:
            return rows
        return rows * self.scale.index_select(0, self.runs.token).to(rows.dtype).unsqueeze(1)

    def spread(self, rows: Tensor) -> Tensor:
        """Rows of runs [V, R, H] as per-sample gradients [V, N, E, H]."""
        v, _, h = rows.shape
        n, e = self.batch_size, self.num_embeddings
        index = _repeated(self.runs.sample * e + self.runs.token, v, n * e)
        result, bytes_per_row = None, max(_PAGE, h * rows.dtype.itemsize)
        if rows.device.type == "cpu" and not torch.is_grad_enabled():
            result = _zeros_by_page(rows, (v * n * e, h), touched=len(index) * bytes_per_row)
        if result is None:
            result = _zeros(rows, (v * n * e, h))
        return result.index_add_(0, index, rows.reshape(-1, h)).view(v, n, e, h)

    def sum_samples(self, rows: Tensor, form: Callable[[Tensor, slice], Tensor] | None = None) -> Tensor:
        """Rows of runs [*, R, H] summed over the samples, after form(rows [*, R_c, H], runs) -> [R_c, H]: [E, H]."""
        if form is None:
            return sum_rows(rows, self.runs.token, self.num_embeddings)
        parts = _parts(rows)
        if len(parts) == 1:
            return sum_rows(form(rows, parts[0]), self.runs.token, self.num_embeddings)
        result = _zeros(rows, (self.num_embeddings, rows.shape[-1]))
        for part in parts:
            result.index_add_(0, self.runs.token[part], form(rows[..., part, :], part))
        return result

    def select(self, samples: slice | Tensor) -> "Lookup":
        return Lookup(self.tokens[samples], self.num_embeddings, self.padding_idx, self.scale)

    def joined(self, lookups: Sequence["Lookup"]) -> "Lookup | None":
        """The positions of several lookups behind each other; None where they are not treated alike."""
        if any(other.scale is not None or other.padding_idx != self.padding_idx for other in lookups):
            return None
        tokens = [positions_flat(other.tokens.long().unsqueeze(-1), 1) for other in lookups]  # [N, T, 1] each
        return Lookup(torch.cat(tokens, 1).squeeze(2), self.num_embeddings, self.padding_idx)


def _parts(rows: Tensor) -> list[slice]:
    """Parts of the R runs of rows [*, R, H] whose intermediate results stay in the caches.

    A single one where a graph keeps these results, and on a GPU.
    """
    r, h = max(rows.shape[-2], 1), max(rows.shape[-1], 1)
    step = r if torch.is_grad_enabled() or _on_gpu(rows) else max(1, _CACHED // h)
    return [slice(begin, begin + step) for begin in range(0, r, step)]


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _runs_of_same_count(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct keys [R], the index of each key among them [R], and which of them are there; without `unique`.

    The others, behind those, are equal to the last one.
    """
    ordered, order = keys.sort()
    starts = torch.zeros_like(ordered)
    starts[1:] = ordered[1:] != ordered[:-1]
    ordered_run = starts.cumsum(0)
    run = torch.empty_like(keys).scatter_(0, order, ordered_run)
    distinct = ordered[-1:].repeat(len(keys)).scatter_(0, ordered_run, ordered)
    return distinct, run, torch.arange(len(keys), device=keys.device) <= ordered_run[-1:]


def _repeated(index: Tensor, times: int, size: int) -> Tensor:
    """index [R] below `size` for `times` tensors behind each other: [times * R]."""
    if times == 1:
        return index
    return (index + size * torch.arange(times, device=index.device).unsqueeze(1)).reshape(-1)


def sum_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Rows [R, H] with the same index [R] summed: [size, H]. Differentiable."""
    if _on_gpu(rows) and rows.numel():
        return _sum_rows_sorted(rows, index, size)
    return _zeros(rows, (size, rows.shape[1])).index_add_(0, index, rows)


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if torch.is_grad_enabled() or like.dtype != statistics_dtype(like.dtype):
        return like.new_zeros(shape)
    return dispatch.empty_result(like, shape).zero_()


def _zeros_by_page(like: Tensor, shape: tuple[int, int], touched: int) -> Tensor | None:
    """Zeros in fresh memory that the system provides page by page, when a page is first written.

    Of a large result all but the `touched` bytes are then neither written nor taken. None where it is faster to write
    zeros: pages in order cost less than single ones, and for a small result earlier ones may have left memory.
    """
    size = prod(shape) * like.dtype.itemsize
    if size < max(_LARGE, 4 * touched):
        return None
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _sum_rows_sorted(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """`sum_rows` in an order that does not change on a GPU, unlike that of index_add_."""
    return torch.ops.aten.embedding_dense_backward(rows, index, size, -1, False)


class EmbeddingUse(Use):
    """G_n[e] = sum_t [tokens[n, t] = e] grad_output[n, t] of `weight` [E, H]."""

    def __init__(self, lookup: Lookup, grad_output: Tensor, sparse: bool = False):
        self.lookup = lookup
        self.grad_output = grad_output  # [N, *, H]
        self.sparse = sparse  # the gradient is left to torch, which makes it a sparse tensor
        self.batch_size = lookup.batch_size
        self.dtype = grad_output.dtype

    def stats(self, want: dict[str, int]) -> dict[str, Stats]:
        return {name: self._stats(flags) for name, flags in want.items()}

    def _stats(self, want: int) -> Stats:
        lookup = self.lookup
        (rows,) = lookup.rows(self.grad_output.unsqueeze(0))  # [R, H]
        grad = batch_grad = batch_l2 = sum_grad_squared = centered = total = None
        if want & Want.SUM_GRAD_CENTERED_SQUARED or (want & Want.GRAD and not self.sparse):
            total = lookup.sum_samples(rows)
        if want & Want.GRAD and not self.sparse:
            grad = total.to(self.dtype)
        if want & Want.BATCH_GRAD:
            (batch_grad,) = lookup.spread(rows.to(self.dtype).unsqueeze(0))
        if want & Want.BATCH_L2:
            norms = torch.cat([rows[part].square().sum(1) for part in _parts(rows)])
            batch_l2 = sum_rows(norms.unsqueeze(1), lookup.runs.sample, self.batch_size).squeeze(1)
        if want & Want.SUM_GRAD_SQUARED:
            sum_grad_squared = lookup.sum_samples(rows, lambda part, _: part.square())
        if want & Want.SUM_GRAD_CENTERED_SQUARED:
            centered = self._centered(rows, total)
        return Stats(grad, batch_grad, batch_l2, sum_grad_squared, centered)

    def _centered(self, rows: Tensor, total: Tensor) -> Tensor:
        """sum_n (G_n - mean)^2 [E, H] from the rows of runs [R, H] and their sums over the samples [E, H].

        Of k samples with a token the squared deviations from their own mean m are summed; k (1 - k/N) m^2 is due to the
        others. It is added in k equal parts, so that only rows that occur are touched.
        """
        _, _, token, used = self.lookup.runs
        occurs = rows.new_ones(len(rows)) if used is None else used.to(rows.dtype)
        k = rows.new_zeros(len(total)).index_add_(0, token, occurs).index_select(0, token).unsqueeze(1)  # [R, 1]
        others = 1 - k / self.batch_size

        def squares(rows: Tensor, part: slice) -> Tensor:
            mean = total.index_select(0, token[part]) / k[part]
            found = (rows - mean).square().addcmul(mean * others[part], mean)
            return found if used is None else found.masked_fill(~used.unsqueeze(1), 0.0)

        return self.lookup.sum_samples(rows, squares)

    def select(self, samples: slice | Tensor) -> "EmbeddingUse":
        return EmbeddingUse(self.lookup.select(samples), self.grad_output[samples], self.sparse)

    def joined(self, uses: Sequence["EmbeddingUse"]) -> "EmbeddingUse | None":
        lookup = self.lookup.joined([use.lookup for use in uses])
        if lookup is None:
            return None
        return EmbeddingUse(lookup, torch.cat([positions_flat(use.grad_output, 1) for use in uses], 1), self.sparse)

    def as_columns(self) -> "EmbeddingColumns":
        return EmbeddingColumns(self.lookup, self.grad_output.unsqueeze(0))


class EmbeddingColumns(ColumnUse):
    """As EmbeddingUse with columns in the place of the output gradient."""

    def __init__(self, lookup: Lookup, columns: Tensor):
        self.lookup = lookup
        self.columns = columns  # [V, N, *, H]
        self.batch_size = lookup.batch_size
        self.dtype = columns.dtype

    def stats(self, want: dict[str, int], signs: Tensor | None) -> dict[str, ColumnStats]:
        return {name: self._stats(flags, signs) for name, flags in want.items()}

    def _stats(self, want: int, signs: Tensor | None) -> ColumnStats:
        lookup = self.lookup
        rows = lookup.rows(self.columns)  # [V, R, H]
        factor = batch_diag = diag = None
        if want & ColumnWant.FACTOR:
            factor = lookup.spread(rows.to(self.dtype))
        if want & (ColumnWant.BATCH_DIAG | ColumnWant.DIAG):
            signs = None if signs is None else signs.index_select(1, lookup.runs.sample)  # [V, R]

            def squares(rows: Tensor, part: slice) -> Tensor:
                return _signed_squares(rows, None if signs is None else signs[:, part])

            if want & ColumnWant.BATCH_DIAG:
                (batch_diag,) = lookup.spread(squares(rows, slice(None)).unsqueeze(0))
            if want & ColumnWant.DIAG:
                diag = lookup.sum_samples(rows, squares)
        return ColumnStats(factor, batch_diag, diag)

    def select(self, samples: slice | Tensor) -> "EmbeddingColumns":
        return EmbeddingColumns(self.lookup.select(samples), self.columns[:, samples])

    def joined(self, uses: Sequence["EmbeddingColumns"]) -> "EmbeddingColumns | None":
        lookup = self.lookup.joined([use.lookup for use in uses])
        if lookup is None:
            return None
        return EmbeddingColumns(lookup, torch.cat([positions_flat(use.columns, 2) for use in uses], 2))

    def output_sums(self, name: str) -> Tensor:
        e, h = self.lookup.num_embeddings, self.columns.shape[-1]
        raise NoKroneckerFactors(f"{name} of size {[e, h]}, whose factor over the tokens would be of size {[e, e]}")


def _signed_squares(rows: Tensor, signs: Tensor | None) -> Tensor:
    """sum_v signs[v] rows[v]^2 of rows [V, R, H] and signs [V, R]: [R, H]."""
    total = None
    for v, row in enumerate(rows):  # one after the other: the squares of all columns are never there
        signed = row if signs is None else row * signs[v].unsqueeze(1)
        total = row * signed if total is None else total.addcmul(row, signed)
    return total

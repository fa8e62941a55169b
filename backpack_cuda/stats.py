"""What can be asked of a layer's per-sample gradients, and the answer."""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Want:
    """Statistics of the per-sample gradients G_n; the values are those of csrc/ops/grad_stats.h.

    Plain integers: an enum.IntFlag takes microseconds per operation, in every layer of every step.
    """

    NOTHING = 0
    GRAD = 1
    BATCH_GRAD = 2
    BATCH_L2 = 4
    SUM_GRAD_SQUARED = 8
    SUM_GRAD_CENTERED_SQUARED = 16


class Stats(NamedTuple):
    """Statistics of the per-sample gradients G_n [N, *P] of one parameter; None where not wanted."""

    grad: Tensor | None = None  # [*P]     sum_n G_n
    batch_grad: Tensor | None = None  # [N, *P]  G_n
    batch_l2: Tensor | None = None  # [N]      sum_p G_n[p]^2
    sum_grad_squared: Tensor | None = None  # [*P]     sum_n G_n[p]^2
    sum_grad_centered_squared: Tensor | None = None  # [*P]     sum_n (G_n[p] - mean_n G_n[p])^2

    @classmethod
    def of(cls, tensors: Iterable[Tensor], want: int) -> "Stats":
        """From an operator's five results, in the order of the fields; the unwanted ones are dropped."""
        grad, batch_grad, batch_l2, sum_grad_squared, sum_grad_centered_squared = tensors
        return cls(
            grad if want & Want.GRAD else None,
            batch_grad if want & Want.BATCH_GRAD else None,
            batch_l2 if want & Want.BATCH_L2 else None,
            sum_grad_squared if want & Want.SUM_GRAD_SQUARED else None,
            sum_grad_centered_squared if want & Want.SUM_GRAD_CENTERED_SQUARED else None,
        )


class ColumnWant:
    """Statistics of the per-sample gradients G_vn of V columns; the values are those of csrc/ops/column_want.h."""

    NOTHING = 0
    FACTOR = 1
    BATCH_DIAG = 2
    DIAG = 4


class ColumnStats(NamedTuple):
    """Statistics of the per-sample gradients G_vn [V, N, *P] of one parameter; None where not wanted."""

    factor: Tensor | None = None  # [V, N, *P]  G_vn
    batch_diag: Tensor | None = None  # [N, *P]     sum_v signs[v, n] G_vn^2
    diag: Tensor | None = None  # [*P]        sum_vn signs[v, n] G_vn^2

    @classmethod
    def of(cls, tensors: Iterable[Tensor], want: int) -> "ColumnStats":
        """From an operator's three results, in the order of the fields; the unwanted ones are dropped."""
        factor, batch_diag, diag = tensors
        return cls(
            factor if want & ColumnWant.FACTOR else None,
            batch_diag if want & ColumnWant.BATCH_DIAG else None,
            diag if want & ColumnWant.DIAG else None,
        )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which squares and sums of per-sample gradients of `dtype` are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats_of_chunks(chunks: Iterable[Tensor], want: int, dtype: torch.dtype) -> Stats:
    """Statistics of materialised per-sample gradients, by differentiable torch operations.

    Args:
        chunks: per-sample gradients [N_c, *P] of successive chunks of the batch, at least one, in
            `statistics_dtype(dtype)`.
        want: the statistics to form.
        dtype: the type of the operands, and of the results `grad` and `batch_grad`.

    The centered second moment of two chunks is merged by Chan, Golub and LeVeque (1983).
    """
    count, total, squared, centered = 0, None, None, None
    rows, norms = [], []
    for chunk in chunks:  # [N_c, *P]
        n = chunk.shape[0]
        if want & Want.BATCH_GRAD:
            rows.append(chunk)
        if want & Want.BATCH_L2:
            norms.append(chunk.square().reshape(n, prod(chunk.shape[1:])).sum(1))
        if want & (Want.SUM_GRAD_SQUARED | Want.GRAD | Want.SUM_GRAD_CENTERED_SQUARED):
            chunk_total = chunk.sum(0)
            if want & Want.SUM_GRAD_SQUARED:
                chunk_squared = chunk.square().sum(0)
                squared = chunk_squared if squared is None else squared + chunk_squared
            if want & Want.SUM_GRAD_CENTERED_SQUARED:
                chunk_centered = (chunk - chunk_total / max(n, 1)).square().sum(0)
                if centered is None:
                    centered = chunk_centered
                else:
                    shift = chunk_total / n - total / count
                    centered = centered + chunk_centered + shift.square() * (count * n / (count + n))
            total = chunk_total if total is None else total + chunk_total
        count += n
    return Stats(
        grad=total.to(dtype) if want & Want.GRAD else None,
        batch_grad=torch.cat(rows).to(dtype) if rows else None,
        batch_l2=torch.cat(norms) if norms else None,
        sum_grad_squared=squared,
        sum_grad_centered_squared=centered,
    )


def column_stats_of_chunks(
    chunks: Iterable[Iterable[tuple[Tensor, Tensor | None]]], want: int, dtype: torch.dtype
) -> ColumnStats:
    """Statistics of materialised per-sample gradients of columns, by differentiable torch operations.

    Args:
        chunks: for successive chunks of the batch, at least one, the successive chunks of columns, at least one:
            gradients [V_c, N_c, *P] in `statistics_dtype(dtype)` and their signs [V_c, N_c], None for 1.
        want: the statistics to form.
        dtype: the type of the operands, and of the result `factor`.
    """
    factor, rows, diag = [], [], None
    for columns in chunks:
        gradients, square = [], None
        for gradient, signs in columns:  # [V_c, N_c, *P]
            if want & ColumnWant.FACTOR:
                gradients.append(gradient.to(dtype))
            if want & (ColumnWant.BATCH_DIAG | ColumnWant.DIAG):
                signed = gradient.square()
                if signs is not None:
                    signed = signed * signs.reshape(*signs.shape, *(1,) * (gradient.dim() - 2))
                signed = signed.sum(0)  # [N_c, *P]
                square = signed if square is None else square + signed
        if want & ColumnWant.FACTOR:
            factor.append(torch.cat(gradients))
        if want & ColumnWant.BATCH_DIAG:
            rows.append(square)
        if want & ColumnWant.DIAG:
            diag = square.sum(0) if diag is None else diag + square.sum(0)
    return ColumnStats(
        factor=torch.cat(factor, 1) if factor else None,
        batch_diag=torch.cat(rows) if rows else None,
        diag=diag,
    )

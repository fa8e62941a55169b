"""Diagonals of the curvature of a Linear layer's parameters, from columns S of its square root at the layer's output.

For programs that call BackPACK's functions of these names; `backpack_cuda.ops` has the same for tensors alone.
"""

from torch import Tensor, nn

from backpack_cuda.ops import dispatch
from backpack_cuda.stats import ColumnWant


def extract_weight_diagonal(module: nn.Linear, S: Tensor, sum_batch: bool = True) -> Tensor:
    """The diagonal of (J^T S) (J^T S)^T with J the Jacobian of the layer's output for its weight.

    Args:
        module: a Linear layer that holds its input [N, *, I] as `input0`.
        S: columns at its output, [V, N, *, O].
        sum_batch: sum over the samples.

    Returns:
        [O, I], or [N, O, I] of every sample; float32 (float64 for float64).
    """
    want = ColumnWant.DIAG if sum_batch else ColumnWant.BATCH_DIAG
    stats, _ = dispatch.linear_column_stats(module.input0, S, None, want, ColumnWant.NOTHING)
    return stats.diag if sum_batch else stats.batch_diag


def extract_bias_diagonal(module: nn.Linear, S: Tensor, sum_batch: bool = True) -> Tensor:
    """As `extract_weight_diagonal`, for the layer's bias: [O], or [N, O]."""
    want = ColumnWant.DIAG if sum_batch else ColumnWant.BATCH_DIAG
    stats = dispatch.bias_column_stats(S, S.dim() - 1, None, want)
    return stats.diag if sum_batch else stats.batch_diag

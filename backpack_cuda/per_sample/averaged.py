"""Uses of a layer with one matrix at its output, instead of columns: what Kronecker factors need of them."""

import torch
from torch import Tensor

from backpack_cuda.per_sample.columns import ColumnUse


class AveragedUse:
    """A use with a matrix [D, D] over the D features of a sample's output, for all samples."""

    def __init__(self, use: ColumnUse, matrix: Tensor):
        self._use = use  # with no columns
        self._matrix = matrix
        self.output_factors: dict[tuple, Tensor] = {}

    def __getattr__(self, name: str):
        return getattr(self._use, name)

    def output_moment(self, name: str) -> Tensor:
        """The sum of the blocks that belong to one position, [O, O] or [G, O, O]."""
        blocks = self._use.by_position(name, self._matrix)  # [R, O, R, O]
        return self._of_groups(name, blocks[0, :, 0] if len(blocks) == 1 else blocks.diagonal(dim1=0, dim2=2).sum(-1))

    def summed_moment(self, name: str) -> Tensor:
        """The sum of the blocks of all pairs of positions, [O, O] or [G, O, O]."""
        blocks = self._use.by_position(name, self._matrix)
        return self._of_groups(name, blocks[0, :, 0] if len(blocks) == 1 else blocks.sum((0, 2)))

    def _of_groups(self, name: str, factor: Tensor) -> Tensor:
        groups = self._use.groups(name)
        if groups > 1:
            size = len(factor) // groups
            factor = factor.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return _symmetric(factor)


class AveragedColumns:
    """Any other use: with the columns of its Jacobian to a tensor of D features, and a matrix [D, D] there."""

    def __init__(self, use: ColumnUse, matrix: Tensor):
        self._use = use  # column v of sample n is what one-hot feature v at the tensor is pulled back to
        self._matrix = matrix
        self.output_factors: dict[tuple, Tensor] = {}

    def __getattr__(self, name: str):
        return getattr(self._use, name)

    def output_moment(self, name: str) -> Tensor:
        """(1/N) sum_nr of the matrix pulled back to position r, [O, O]."""
        return self._pulled_back(self._use.output_rows(name))

    def summed_moment(self, name: str) -> Tensor:
        """The same for the sum of the positions, [O, O]."""
        return self._pulled_back(self._use.output_sums(name))

    def _pulled_back(self, rows: Tensor) -> Tensor:
        """(1/N) sum of j^T mat j over the matrices j [D, O] in rows [D, N, *, O]."""
        rows = rows.to(self._matrix.dtype).flatten(1, -2)  # [D, N * R, O]
        pushed = (self._matrix @ rows.flatten(1)).view_as(rows)
        return _symmetric(rows.flatten(0, 1).t() @ pushed.flatten(0, 1) / max(self._use.batch_size, 1))


def _symmetric(factor: Tensor) -> Tensor:
    """Without the difference that rounding makes; a new tensor."""
    twice = factor + factor.mT
    return twice / 2 if torch.is_grad_enabled() else twice.mul_(0.5)

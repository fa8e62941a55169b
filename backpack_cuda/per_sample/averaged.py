"""Uses of a layer with one matrix at its output, instead of columns: what Kronecker factors need of them."""

from collections.abc import Hashable

import torch
from torch import Tensor

from backpack_cuda.per_sample.columns import ColumnUse, NoKroneckerFactors


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
        blocks = self._use.by_position(self._matrix)  # [R, O, R, O]
        return self._of_groups(name, blocks[0, :, 0] if len(blocks) == 1 else blocks.diagonal(dim1=0, dim2=2).sum(-1))

    def summed_moment(self, name: str) -> Tensor:
        """The sum of the blocks of all pairs of positions, [O, O] or [G, O, O]."""
        blocks = self._use.by_position(self._matrix)
        return self._of_groups(name, blocks[0, :, 0] if len(blocks) == 1 else blocks.sum((0, 2)))

    def _of_groups(self, name: str, factor: Tensor) -> Tensor:
        groups = self._use.groups(name)
        if groups > 1:
            size = len(factor) // groups
            factor = factor.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return _symmetric(factor)


class AveragedBlocks(ColumnUse):
    """Any other use, by the Jacobians of its output in its parameters: their whole blocks."""

    def __init__(self, jacobians: dict[str, Tensor], matrix: Tensor, batch_size: int, mixes_samples: bool):
        self._jacobians = jacobians  # [N, D, P] each, of the vectors among the parameters
        self._matrix = matrix  # [D, D]
        self.batch_size = batch_size
        self.dtype = matrix.dtype
        self.mixes_samples = mixes_samples

    def stats(self, want, signs):
        raise NotImplementedError("a matrix at the output has Kronecker factors only")

    def select(self, samples):
        raise NotImplementedError("a matrix at the output has no samples")

    def output_identity(self, name: str) -> Hashable | None:
        return name

    def output_moment(self, name: str) -> Tensor:
        jacobian = self._jacobians.get(name)
        if jacobian is None:
            raise NoKroneckerFactors(f"{name}, of a layer without a known factorisation")
        pushed = torch.matmul(self._matrix, jacobian)  # [N, D, P]
        block = jacobian.flatten(0, 1).t() @ pushed.flatten(0, 1) / max(self.batch_size, 1)
        return _symmetric(block)

    def summed_moment(self, name: str) -> Tensor:
        return self.output_moment(name)


def _symmetric(factor: Tensor) -> Tensor:
    """Without the difference that rounding makes; a new tensor."""
    twice = factor + factor.mT
    return twice / 2 if torch.is_grad_enabled() else twice.mul_(0.5)

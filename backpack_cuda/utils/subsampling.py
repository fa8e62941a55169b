"""Some samples of a batch."""

from collections.abc import Sequence

from torch import Tensor


def subsample(tensor: Tensor, dim: int = 0, subsampling: Sequence[int] | None = None) -> Tensor:
    """The entries of `tensor` along `dim` with the indices `subsampling` (which may repeat); all of them for None.

    Raises:
        IndexError: there is no such dim or index.
    """
    if subsampling is None:
        return tensor
    if not -tensor.dim() <= dim < tensor.dim():
        raise IndexError(f"dim: expected one of a tensor of size {list(tensor.shape)}, got {dim}")
    return tensor[(slice(None),) * (dim % tensor.dim()) + (subsampling,)]

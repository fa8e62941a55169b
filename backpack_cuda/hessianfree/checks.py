"""One tensor or several: what the functions of this package accept."""

from collections.abc import Iterable

from torch import Tensor

Tensors = Tensor | Iterable[Tensor]


def as_tuple(name: str, tensors: Tensors) -> tuple[Tensor, ...]:
    """One tensor or several as a tuple."""
    found = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    for tensor in found:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor or several, got {type(tensor).__name__} among them")
    return found


def check_alike(name: str, tensors: tuple[Tensor, ...], other_name: str, others: tuple[Tensor, ...]) -> None:
    """`tensors` have the number and sizes of `others`."""
    if len(tensors) != len(others):
        raise ValueError(f"{name}: expected {len(others)} tensors, one for each of {other_name}, got {len(tensors)}")
    for i, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
        if tensor.shape != other.shape:
            raise ValueError(
                f"{name}[{i}]: expected the size {list(other.shape)} of {other_name}[{i}], got {list(tensor.shape)}"
            )

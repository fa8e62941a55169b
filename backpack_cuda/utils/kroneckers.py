"""Products and inverses of Kronecker products A (x) B (x) ..., from their factors.

Factors are matrices, or those of the G groups of a layer, [G, rows, columns] each, as `KFAC` and `KFLR` save them for a
layer with groups: they stand for a block diagonal matrix, whose g-th block is the Kronecker product of the g-th
matrices.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from math import prod
from numbers import Real

import torch
from torch import Tensor

from backpack_cuda.utils.unsqueeze import kfacmp_unsqueeze_if_missing_dim

_LARGEST_INVERSE = 1e8  # of an eigenvalue


def kfacs_to_mat(factors: Sequence[Tensor]) -> Tensor:
    """The matrix A (x) B (x) ... of factors [A, B, ...].

    Raises:
        ValueError: no factor, factors that are not matrices, or with different numbers of groups.
    """
    if _groups(factors) is None:
        return reduce(two_kfacs_to_mat, factors)
    return torch.block_diag(*(reduce(two_kfacs_to_mat, blocks) for blocks in zip(*factors, strict=True)))


def two_kfacs_to_mat(A: Tensor, B: Tensor) -> Tensor:
    """The matrix A (x) B.

    Raises:
        ValueError: one of them is no matrix.
    """
    for name, factor in (("A", A), ("B", B)):
        if not is_matrix(factor):
            raise ValueError(f"{name}: expected a matrix, got size {list(factor.shape)}")
    return torch.einsum("ij,kl->ikjl", A, B).reshape(A.shape[0] * B.shape[0], A.shape[1] * B.shape[1])


def kfac_mat_prod(factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function M -> (A (x) B (x) ...) M of factors [A, B, ...], for a vector [D] or a matrix [D, V].

    Raises:
        ValueError: as `kfacs_to_mat`; by the function for a D that is not the product of the factors' columns.
    """
    groups = _groups(factors)
    columns = [factor.shape[-1] for factor in factors]
    equation = kfac_mat_prod_einsum_equation(len(factors))
    if groups is not None:
        inputs, output = equation.split("->")
        equation = ",".join("..." + letters for letters in inputs.split(",")) + "->..." + output
    leading = columns if groups is None else [groups, *columns]

    @kfacmp_unsqueeze_if_missing_dim(mat_dim=2)
    def product(mat: Tensor) -> Tensor:
        """The Kronecker product times a vector [D] or a matrix [D, V]."""
        if not is_matrix(mat) or len(mat) != prod(leading):
            raise ValueError(f"mat: expected size [{prod(leading)}] or [{prod(leading)}, V], got {list(mat.shape)}")
        result = torch.einsum(equation, mat.reshape(*leading, mat.shape[1]), *factors)
        return result.reshape(prod(result.shape[:-1]), mat.shape[1])

    return product


def apply_kfac_mat_prod(factors: Sequence[Tensor], mat: Tensor) -> Tensor:
    """(A (x) B (x) ...) mat; as `kfac_mat_prod`."""
    return kfac_mat_prod(factors)(mat)


def inv_kfacs(factors: Sequence[Tensor], shift: float | Sequence[float] | None = None) -> list[Tensor]:
    """The inverses [(A + s1 I)^-1, (B + s2 I)^-1, ...] of symmetric factors [A, B, ...].

    By their eigenvalues; the inverse of an eigenvalue is at most 1e8, and at least -1e8.

    Args:
        factors: symmetric matrices, or groups of them.
        shift: what is added to the diagonals, one number for all factors or one for each; None: nothing.

    Raises:
        ValueError: factors that are not square matrices, or another number of shifts.
        TypeError: shifts that are not numbers.
    """
    return [_inverse(factor, s) for factor, s in zip(factors, _shifts(factors, shift), strict=True)]


def inv_kfac_mat_prod(
    factors: Sequence[Tensor], shift: float | Sequence[float] | None = None
) -> Callable[[Tensor], Tensor]:
    """The function M -> ((A + s1 I)^-1 (x) (B + s2 I)^-1 (x) ...) M; arguments and errors as `inv_kfacs`."""
    return kfac_mat_prod(inv_kfacs(factors, shift))


def apply_inv_kfac_mat_prod(
    factors: Sequence[Tensor], mat: Tensor, shift: float | Sequence[float] | None = None
) -> Tensor:
    """((A + s1 I)^-1 (x) (B + s2 I)^-1 (x) ...) mat; as `inv_kfac_mat_prod`."""
    return inv_kfac_mat_prod(factors, shift)(mat)


def kfac_mat_prod_einsum_equation(num_factors: int) -> str:
    """The einsum equation of a matrix, its rows taken apart, and the factors it is multiplied with: "bde,ab,cd->ace".

    Raises:
        ValueError: no factor, or more than there are letters for.
    """
    if not 1 <= num_factors <= 12:
        raise ValueError(f"num_factors: expected 1 to 12, got {num_factors}")
    letters = get_letters()
    pairs = [(next(letters), next(letters)) for _ in range(num_factors)]
    last = next(letters)
    rows, columns = ("".join(side) for side in zip(*pairs, strict=True))
    return f"{columns}{last},{','.join(map(''.join, pairs))}->{rows}{last}"


def all_tensors_of_order(order: int, tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors have `order` dims."""
    return all(is_tensor_of_order(order, tensor) for tensor in tensors)


def is_tensor_of_order(order: int, tensor: Tensor) -> bool:
    """Whether a tensor has `order` dims."""
    return tensor.dim() == order


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has two dims."""
    return is_tensor_of_order(2, tensor)


def is_vector(tensor: Tensor) -> bool:
    """Whether a tensor has one dim."""
    return is_tensor_of_order(1, tensor)


def get_letters(max_letters: int = 26) -> Iterator[str]:
    """The first `max_letters` letters of the alphabet, one after the other."""
    yield from (chr(ord("a") + i) for i in range(max_letters))


def _groups(factors: Sequence[Tensor]) -> int | None:
    """The number of groups of the factors; None for matrices."""
    sizes = [list(factor.shape) for factor in factors]
    if sizes and all_tensors_of_order(2, factors):
        return None
    if sizes and all_tensors_of_order(3, factors) and len({size[0] for size in sizes}) == 1:
        return sizes[0][0]
    raise ValueError(
        f"factors: expected matrices, or all of them [G, rows, columns] with the same G, got sizes {sizes}"
    )


def _shifts(factors: Sequence[Tensor], shift) -> list:
    if shift is None:
        return [0.0] * len(factors)
    if _is_number(shift):
        return [shift] * len(factors)
    if not isinstance(shift, list | tuple) or not all(map(_is_number, shift)):
        raise TypeError(f"shift: expected a number, a list or tuple of numbers, or None, got {shift!r}")
    if len(shift) != len(factors):
        raise ValueError(f"shift: expected one number for each of {len(factors)} factors, got {shift!r}")
    return list(shift)


def _is_number(value) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)


def _inverse(factor: Tensor, shift) -> Tensor:
    if factor.dim() not in (2, 3) or factor.shape[-1] != factor.shape[-2]:
        raise ValueError(f"factors: expected square matrices, got size {list(factor.shape)}")
    values, vectors = torch.linalg.eigh(factor)
    inverse = (values + shift).reciprocal().clamp(-_LARGEST_INVERSE, _LARGEST_INVERSE)
    return (vectors * inverse.unsqueeze(-2)) @ vectors.mT

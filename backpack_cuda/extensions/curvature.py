"""Choices of a Kronecker-factored curvature, under BackPACK's names: of which matrix, and how it is pushed back."""

from collections.abc import Callable

from torch import Tensor


class Curvature:
    """Which matrix is approximated: what becomes of the second derivatives of the functions before the prediction."""

    HESSIAN = "hessian"  # kept
    GGN = "ggn"  # left out
    PCH_ABS = "pch-abs"  # their absolute values
    PCH_CLIP = "pch-clip"  # the positive ones

    CHOICES = [HESSIAN, GGN, PCH_CLIP, PCH_ABS]

    _MODIFICATIONS: dict[str, Callable[[Tensor], Tensor]] = {
        HESSIAN: lambda residual: residual,
        PCH_ABS: lambda residual: residual.abs(),
        PCH_CLIP: lambda residual: residual.clamp(min=0),
    }

    @classmethod
    def require_residual(cls, curv_type: str) -> bool:
        """Whether second derivatives are needed."""
        one_of("curv_type", curv_type, cls.CHOICES)
        return curv_type in cls._MODIFICATIONS

    @classmethod
    def is_pch(cls, curv_type: str) -> bool:
        """Whether the matrix is a positive-curvature Hessian."""
        one_of("curv_type", curv_type, cls.CHOICES)
        return curv_type in (cls.PCH_ABS, cls.PCH_CLIP)

    @classmethod
    def modify_residual(cls, residual: Tensor | None, curv_type: str) -> Tensor | None:
        """What is added to the matrix for a function with the second-order term `residual`; None for nothing."""
        if residual is None or not cls.require_residual(curv_type):
            return None
        return cls._MODIFICATIONS[curv_type](residual)


class LossHessianStrategy:
    """How the loss' Hessian enters."""

    EXACT = "exact"  # as a square root with all columns
    SAMPLING = "sampling"  # as one with sampled columns
    SUM = "sum"  # as one matrix, summed over the samples

    CHOICES = [EXACT, SAMPLING, SUM]


class BackpropStrategy:
    """What is pushed back through the network."""

    SQRT = "sqrt"  # columns of the square root, for each sample
    BATCH_AVERAGE = "average"  # one matrix, averaged over the samples after every function

    CHOICES = [BATCH_AVERAGE, SQRT]


class ExpectationApproximation:
    """How the expectation over the samples is split between a parameter's Jacobian J and the curvature H behind it."""

    BOTEV_MARTENS = "E[J^T E(H) J]"
    CHEN = "E(J^T) E(H) E(J)"

    CHOICES = [BOTEV_MARTENS, CHEN]


def one_of(name: str, value, known) -> str:
    """`value`, if it is one of the known ones."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")
    return value

"""The first-order quantities, under BackPACK's import path."""

from backpack_cuda.extensions.first_order import BatchGrad, BatchL2Grad, SumGradSquared, Variance

__all__ = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]

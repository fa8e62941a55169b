"""The quantities, under BackPACK's names."""

from backpack_cuda.extensions.base import BackpropExtension
from backpack_cuda.extensions.first_order import BatchGrad, BatchL2Grad, SumGradSquared, Variance

__all__ = ["BackpropExtension", "BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]

"""The quantities, under BackPACK's names."""

from backpack_cuda.extensions.averaged import HBP, KFRA
from backpack_cuda.extensions.backprop_extension import BackpropExtension
from backpack_cuda.extensions.first_order import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from backpack_cuda.extensions.kronecker import KFAC, KFLR
from backpack_cuda.extensions.products import GGNMP, HMP, PCHMP
from backpack_cuda.extensions.second_order import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
)

__all__ = [
    "GGNMP",
    "HBP",
    "HMP",
    "KFAC",
    "KFLR",
    "KFRA",
    "BackpropExtension",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchGrad",
    "BatchL2Grad",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "PCHMP",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Variance",
]

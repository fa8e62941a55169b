"""Kronecker-factored curvature, under BackPACK's import path."""

from backpack_cuda.extensions.averaged import HBP, KFRA
from backpack_cuda.extensions.curvature import BackpropStrategy, ExpectationApproximation, LossHessianStrategy
from backpack_cuda.extensions.kronecker import KFAC, KFLR

__all__ = ["HBP", "KFAC", "KFLR", "KFRA", "BackpropStrategy", "ExpectationApproximation", "LossHessianStrategy"]

"""Diagonals of the generalised Gauss-Newton matrix, under BackPACK's import path."""

from backpack_cuda.extensions.second_order import BatchDiagGGNExact, BatchDiagGGNMC, DiagGGNExact, DiagGGNMC

__all__ = ["BatchDiagGGNExact", "BatchDiagGGNMC", "DiagGGNExact", "DiagGGNMC"]

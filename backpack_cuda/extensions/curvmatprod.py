"""The curvature products, under BackPACK's import path."""

from backpack_cuda.extensions.products import GGNMP, HMP, PCHMP

__all__ = ["GGNMP", "HMP", "PCHMP"]

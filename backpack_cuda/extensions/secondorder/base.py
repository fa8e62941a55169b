"""Base of quantities whose modules hand quantities back to each other, under BackPACK's import path."""

from backpack_cuda.extensions.backprop_extension import SecondOrderBackpropExtension

__all__ = ["SecondOrderBackpropExtension"]

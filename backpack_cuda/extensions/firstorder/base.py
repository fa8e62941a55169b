"""Bases of first-order quantities, formed from the gradients at a module alone, under BackPACK's import path."""

from backpack_cuda.extensions.backprop_extension import FirstOrderBackpropExtension
from backpack_cuda.extensions.module_extension import ModuleExtension

__all__ = ["FirstOrderBackpropExtension", "FirstOrderModuleExtension"]


class FirstOrderModuleExtension(ModuleExtension):
    """A ModuleExtension that hands nothing back to other modules."""

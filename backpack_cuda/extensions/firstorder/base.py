"""Bases of first-order quantities that others write: formed from the gradients at a module alone."""

from collections.abc import Sequence

from torch import nn

from backpack_cuda.extensions.backprop_extension import FAIL_WARN, BackpropExtension
from backpack_cuda.extensions.module_extension import ModuleExtension


class FirstOrderModuleExtension(ModuleExtension):
    """A ModuleExtension that hands nothing back to other modules."""


class FirstOrderBackpropExtension(BackpropExtension):
    """A BackpropExtension that warns at modules with parameters that it has no extension for, rather than fail."""

    def __init__(
        self,
        savefield: str,
        module_exts: dict[type[nn.Module], ModuleExtension] | None = None,
        fail_mode: str = FAIL_WARN,
        subsampling: Sequence[int] | None = None,
    ):
        super().__init__(savefield, module_exts, fail_mode, subsampling)

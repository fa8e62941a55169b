"""What BackPACK calls its converter; here nothing is converted."""

from torch import nn
from torch.fx import Tracer

from backpack_cuda.custom_module.branching import SumModule, _Branch
from backpack_cuda.custom_module.permute import Permute
from backpack_cuda.custom_module.reduce_tuple import ReduceTuple
from backpack_cuda.custom_module.scale_module import ScaleModule


class BackpackTracer(Tracer):
    """A torch.fx tracer that does not look inside of BackPACK's modules. Kept for programs that trace with it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` appears in the graph as one call."""
        leaves = (ScaleModule, SumModule, _Branch, ReduceTuple, Permute)
        return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)


def convert_module_to_backpack(module: nn.Module, debug: bool = False) -> nn.Module:
    """Returns `module` itself: no conversion is needed.

    BackPACK traces the module into a torch.fx.GraphModule in which functional calls have become modules, since it needs
    a module for each step of the computation. `backpack_cuda` takes the steps from the autograd graph, so that the
    module works as it is: with functional calls, residual sums, modules called twice, recurrent layers of several
    layers, and forwards that torch.fx cannot trace. Like BackPACK's result, the returned module is callable, has the
    same parameters and is to be extended; unlike it, it keeps its class, its attributes and its state_dict's names.
    A program that asks for modules which BackPACK creates (`flatten0`, `sum_module0`) does not find them.

    Args:
        module: any module.
        debug: print that nothing is converted.

    Returns:
        The same module, not yet extended.

    Raises:
        TypeError: `module` is not a torch.nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if debug:
        print(f"[DEBUG] {type(module).__name__} needs no conversion")
    return module

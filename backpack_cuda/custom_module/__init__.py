"""BackPACK's modules for what is not a module in torch: branches, sums, scaling, permuting, padding, slicing.

Kept so that programs which use them run. `backpack_cuda` differentiates through the autograd graph, so that a plain
`x + f(x)`, `0.5 * x`, `x.permute(...)`, `F.pad(x, ...)` or `x[:, 0]` in a forward gives the same quantities.
"""

from backpack_cuda.custom_module.branching import Parallel, SumModule
from backpack_cuda.custom_module.pad import Pad
from backpack_cuda.custom_module.permute import Permute
from backpack_cuda.custom_module.reduce_tuple import ReduceTuple
from backpack_cuda.custom_module.scale_module import ScaleModule
from backpack_cuda.custom_module.slicing import Slicing

__all__ = ["Pad", "Parallel", "Permute", "ReduceTuple", "ScaleModule", "Slicing", "SumModule"]

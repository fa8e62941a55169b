"""BackPACK's classes of derivatives, one per layer, which autograd makes superfluous here: there are none.

Their import fails with a sentence that says what to use instead. Only `convnd.weight_jac_t_save_memory` exists.
"""

import importlib.abc
import importlib.util
import sys

_ADVICE = (
    "is one of BackPACK's internal classes of derivatives, which backpack_cuda does not have: autograd differentiates "
    "the layers. To make a layer known to all quantities, use backpack_cuda.register_layer; to pull something back "
    "through a module in a ModuleExtension, torch.func.vjp(module, module.input0) (docs/extending.md)"
)


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(name)
    raise ImportError(f"{__name__}.{name} {_ADVICE}", name=f"{__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder):
    """Explains why there is no such submodule; asked after the finders that find files."""

    def find_spec(self, name: str, path=None, target=None):
        if name.startswith(f"{__name__}."):
            raise ImportError(f"{name} {_ADVICE}", name=name)
        return None


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.append(_Finder())

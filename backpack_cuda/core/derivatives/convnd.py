"""BackPACK's import path of a switch that programs use; see `backpack_cuda.core.derivatives`."""

from backpack_cuda.core import derivatives


class weight_jac_t_save_memory:
    """Does nothing, so that programs with it run unchanged.

    In BackPACK it chooses between a fast algorithm for the per-sample gradients of convolutions that repeats the input
    for every output channel, and a slow one that does not. The kernels here never repeat the input.

    Args:
        save_memory: no effect.
    """

    def __init__(self, save_memory: bool = True):
        self.save_memory = save_memory

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception) -> None:
        pass


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(name)
    raise ImportError(f"{__name__}.{name} {derivatives._ADVICE}", name=f"{__name__}.{name}")

"""`with backpack(...)`: which quantities the backward passes inside form."""

from collections.abc import Callable
from numbers import Integral

from torch import nn

from backpack_cuda.context import enter, leave
from backpack_cuda.extensions import BackpropExtension


class backpack:
    """Backward passes inside this context also form the given quantities.

    Results are attributes of the parameters, named by the extension's `savefield` and overwritten by every backward
    pass. A nested context replaces the outer one until it exits. A context holds for the thread that entered it, like
    torch.no_grad().

    Args:
        *exts: instances of the classes in `backpack_cuda.extensions`; possibly none.
        extension_hook: called with a module once its quantities are present; they may be deleted there.
            `module.input0` is the module's input (of modules whose weights have results) while the hook runs.
        debug: print what is formed.
        retain_graph: keep the inputs and outputs that modules extended with `store_io=True` hold, for a further
            backward pass through the same graph. Nothing else needs it.
        memory_budget: bytes that the columns of second-order quantities may take at a time, at the outputs of all
            layers together; more columns than that are pushed through the graph one after the other, with the same
            results. None: a quarter of the free memory up to 1 GiB, but 16 MiB on the CPU for quantities without an
            entry for every sample, which are faster with less there.

    Raises:
        ValueError: an argument is not an instance of an extension, or the budget is not positive.
        TypeError: the budget is no int.
    """

    def __init__(
        self,
        *exts,
        extension_hook: Callable[[nn.Module], None] | None = None,
        debug: bool = False,
        retain_graph: bool = False,
        memory_budget: int | None = None,
    ):
        for ext in exts:
            if not isinstance(ext, BackpropExtension):
                raise ValueError(
                    "backpack expects instances of BackpropExtension, such as BatchGrad(), "
                    f"but received {ext!r} of type {type(ext).__name__}"
                )
        if memory_budget is not None:
            if isinstance(memory_budget, bool) or not isinstance(memory_budget, Integral):
                raise TypeError(f"memory_budget: expected an int, a number of bytes, or None, got {memory_budget!r}")
            if memory_budget < 1:
                raise ValueError(f"memory_budget: expected at least 1 byte, got {memory_budget}")
        self._wanted = (exts, debug, extension_hook, retain_graph, memory_budget)

    def __enter__(self) -> None:
        enter(*self._wanted)

    def __exit__(self, *exception) -> None:
        leave()

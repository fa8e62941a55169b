"""What passes shall do, as global state: the active quantities (`CTX`), and whether to prepare for any (`disable`)."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from torch import nn


class CTX:
    """What the innermost `with backpack(...)` asks for. BackPACK's class of this name; use `backpack` to change it."""

    _extensions: tuple = ()
    _debug: bool = False
    _extension_hook: Callable[[nn.Module], None] | None = None
    _retain_graph: bool = False
    _memory_budget: int | None = None

    @classmethod
    def get_active_exts(cls) -> tuple:
        """The active extensions, in the order in which they were given."""
        return cls._extensions

    @classmethod
    def set_active_exts(cls, extensions) -> None:
        """Replaces the active extensions."""
        cls._extensions = tuple(extensions)

    @classmethod
    def is_extension_active(cls, *extension_classes: type) -> bool:
        """Whether an extension of one of the given classes is active."""
        return any(isinstance(extension, extension_classes) for extension in cls._extensions)

    @classmethod
    def get_debug(cls) -> bool:
        """Whether debug output is printed."""
        return cls._debug

    @classmethod
    def set_debug(cls, debug: bool) -> None:
        """Switches debug output."""
        cls._debug = debug

    @classmethod
    def get_extension_hook(cls) -> Callable[[nn.Module], None] | None:
        """The function to call per module, or None."""
        return cls._extension_hook

    @classmethod
    def set_extension_hook(cls, extension_hook: Callable[[nn.Module], None] | None) -> None:
        """Replaces the function to call per module."""
        cls._extension_hook = extension_hook

    @classmethod
    def get_retain_graph(cls) -> bool:
        """Whether modules extended with `store_io=True` keep their stored input and output."""
        return cls._retain_graph

    @classmethod
    def set_retain_graph(cls, retain_graph: bool) -> None:
        """Switches whether stored inputs and outputs are kept."""
        cls._retain_graph = retain_graph

    @classmethod
    def get_memory_budget(cls) -> int | None:
        """Bytes that the columns of second-order quantities may take at a time; None for the default."""
        return cls._memory_budget


_local = threading.local()


@contextlib.contextmanager
def sweeping() -> Iterator[None]:
    """Marks that the backward passes of this thread push columns of a curvature, not the gradient."""
    outer, _local.sweeping = is_sweeping(), True
    try:
        yield
    finally:
        _local.sweeping = outer


def is_sweeping() -> bool:
    """Whether this thread's backward pass pushes columns of a curvature."""
    return getattr(_local, "sweeping", False)


@contextlib.contextmanager
def batching() -> Iterator[None]:
    """Marks that this thread pushes columns through a graph under a function transform.

    Forward passes inside it can only be checkpointed segments that run again, and must save what they saved before.
    """
    _local.batching = True
    try:
        yield
    finally:
        _local.batching = False


def is_batching() -> bool:
    """Whether this thread pushes columns through a graph under a function transform."""
    return getattr(_local, "batching", False)


class disable:
    """Forward passes inside this context prepare for no quantity; they cost what torch's own layers cost."""

    _depth = 0

    def __enter__(self) -> None:
        disable._depth += 1

    def __exit__(self, *exception) -> None:
        disable._depth -= 1

    @staticmethod
    def should_store_io() -> bool:
        """Whether forward passes prepare for quantities, that is, whether no `disable` is active."""
        return disable._depth == 0

"""What passes shall do, per thread: the active quantities (`CTX`), and whether to prepare for any (`disable`).

The state lies where torch keeps its own modes, so that a backward pass sees the one of the thread that called
backward(), in whichever threads the engine runs it.
"""

import atexit
import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_KEY = "backpack_cuda"
_get, _set = torch._C._get_obj_in_tls, torch._C._stash_obj_in_tls


class _Owner:
    """Lives as long as the states of one thread."""

    def __init__(self):
        self.thread = threading.get_ident()
        _owners.add(self)


_owners: "weakref.WeakSet[_Owner]" = weakref.WeakSet()


@atexit.register
def _await_ended_threads() -> None:
    """torch drops a thread's states when the system ends the thread, a moment after Python has.

    That takes Python's lock, which aborts the process once the interpreter has begun to end.
    """
    deadline = time.monotonic() + 1.0
    while any(owner.thread not in sys._current_frames() for owner in list(_owners)) and time.monotonic() < deadline:
        time.sleep(0.001)


class State(NamedTuple):
    """What one thread's passes shall do."""

    owner: _Owner | None = None
    extensions: tuple = ()
    debug: bool = False
    extension_hook: Callable[[nn.Module], None] | None = None
    retain_graph: bool = False
    memory_budget: int | None = None
    disabled: int = 0  # how many `disable` are active
    sweeping: bool = False  # whether backward passes push columns of a curvature, not the gradient
    batching: bool = False  # whether they do so under a function transform
    authoring: bool = False  # whether what somebody else wrote for a module runs
    outer: "State | None" = None  # of the `with backpack(...)` around this one


def current() -> State:
    """The state that holds for what this thread does now."""
    try:
        return _get(_KEY)
    except RuntimeError:  # the first time in this thread
        state = State(_Owner())
        _set(_KEY, state)
        return state


current._torchdynamo_disable = True  # a step that is compiled calls it between its graphs


def enter(
    extensions: tuple,
    debug: bool,
    extension_hook: Callable[[nn.Module], None] | None,
    retain_graph: bool,
    memory_budget: int | None,
) -> None:
    """Replaces what quantities are active, until `leave()`."""
    outer = current()
    inner = outer._replace(
        extensions=extensions,
        debug=debug,
        extension_hook=extension_hook,
        retain_graph=retain_graph,
        memory_budget=memory_budget,
        outer=outer,
    )
    _set(_KEY, inner)


def leave() -> None:
    """Back to the state before the last `enter()`."""
    state = current()
    _set(_KEY, state.outer or State(state.owner))


@contextlib.contextmanager
def _with(**changes) -> Iterator[None]:
    outer = current()
    _set(_KEY, outer._replace(**changes))
    try:
        yield
    finally:
        _set(_KEY, outer)


def no_op(*args, **kwargs) -> None:
    """Takes anything and does nothing."""


class CTX:
    """What the innermost `with backpack(...)` of this thread asks for. BackPACK's class of this name.

    Use `backpack` to change it. Each thread has a state of its own; the engine's threads work under the one of the
    thread that called backward().
    """

    _handles: list[RemovableHandle] = []

    @staticmethod
    def get_active_exts() -> tuple:
        """The active extensions, in the order in which they were given."""
        return current().extensions

    @staticmethod
    def set_active_exts(active_exts: Iterable) -> None:
        """Replaces the active extensions."""
        _set(_KEY, current()._replace(extensions=tuple(active_exts)))

    @staticmethod
    def is_extension_active(*extension_classes: type) -> bool:
        """Whether an extension of one of the given classes is active."""
        return any(isinstance(extension, extension_classes) for extension in current().extensions)

    @staticmethod
    def get_debug() -> bool:
        """Whether debug output is printed."""
        return current().debug

    @staticmethod
    def set_debug(debug: bool) -> None:
        """Switches debug output."""
        _set(_KEY, current()._replace(debug=debug))

    @staticmethod
    def get_extension_hook() -> Callable[[nn.Module], None]:
        """The function to call per module; one that does nothing where none was given."""
        return current().extension_hook or no_op

    @staticmethod
    def set_extension_hook(extension_hook: Callable[[nn.Module], None] | None) -> None:
        """Replaces the function to call per module."""
        _set(_KEY, current()._replace(extension_hook=None if extension_hook is no_op else extension_hook))

    @staticmethod
    def get_retain_graph() -> bool:
        """Whether modules keep their stored input and output after the backward pass."""
        return current().retain_graph

    @staticmethod
    def set_retain_graph(retain_graph: bool) -> None:
        """Switches whether stored inputs and outputs are kept."""
        _set(_KEY, current()._replace(retain_graph=retain_graph))

    @staticmethod
    def get_memory_budget() -> int | None:
        """Bytes that the columns of second-order quantities may take at a time; None for the default."""
        return current().memory_budget

    @staticmethod
    def add_hook_handle(hook_handle: RemovableHandle) -> None:
        """Notes the handle of a hook for `remove_hooks()`."""
        CTX._handles.append(hook_handle)

    @staticmethod
    def remove_hooks() -> None:
        """Removes the hooks whose handles were noted by `add_hook_handle()`.

        Extended models keep working: what prepares them for quantities is no hook of theirs that is noted here. (In
        BackPACK this call ends the extension of every model of the process.)
        """
        handles, CTX._handles = CTX._handles, []
        for handle in handles:
            handle.remove()


def sweeping() -> contextlib.AbstractContextManager[None]:
    """Marks that the backward passes of this thread push columns of a curvature, not the gradient."""
    return _with(sweeping=True)


def is_sweeping() -> bool:
    """Whether this backward pass pushes columns of a curvature."""
    return current().sweeping


def batching() -> contextlib.AbstractContextManager[None]:
    """Marks that this thread pushes columns through a graph under a function transform.

    Forward passes inside it can only be checkpointed segments that run again, and must save what they saved before.
    """
    return _with(batching=True)


def is_batching() -> bool:
    """Whether columns are pushed through a graph under a function transform."""
    return current().batching


def authoring() -> contextlib.AbstractContextManager[None]:
    """Marks that this thread runs what somebody else wrote for a module: its own passes form no quantities."""
    return _with(authoring=True, disabled=current().disabled + 1)


def is_authoring() -> bool:
    """Whether what somebody else wrote for a module runs."""
    return current().authoring


class disable:
    """Forward passes of this thread inside this context prepare for no quantity; they cost what torch's layers cost.

    Segments that torch.utils.checkpoint runs again with use_reentrant=False are the exception: both runs have to save
    the same tensors, and one of them may be outside.
    """

    def __enter__(self) -> None:
        _set(_KEY, current()._replace(disabled=current().disabled + 1))

    def __exit__(self, *exception) -> None:
        _set(_KEY, current()._replace(disabled=current().disabled - 1))

    @staticmethod
    def should_store_io() -> bool:
        """Whether no `disable` is active."""
        return not current().disabled


def is_disabled() -> bool:
    """Whether a forward pass must not prepare for quantities."""
    return current().disabled > 0 and not _is_checkpointed()


def _is_checkpointed() -> bool:
    """Whether a checkpointed segment runs, for the first time or again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"

"""What is known of the extensions that others wrote: which modules they are for, and which of them are active.

BackPACK stores inputs and outputs of all modules, always. Here only the modules whose class has an extension that
somebody wrote keep them; and all extended ones, while a ModuleExtension is defined whose module class is not known yet
(its quantity may be made after the first forward pass).
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from backpack_cuda.context import current

_LIBRARY = __name__.partition(".")[0]
_module_classes: WeakSet = WeakSet()  # of modules, with an extension that somebody wrote
_unused: WeakSet = WeakSet()  # ModuleExtensions that are defined, but registered for no class of modules yet
_anything = False  # a plain bool, because every forward pass asks


def define(extension_class: type) -> None:
    """Called for every subclass of ModuleExtension."""
    global _anything
    if extension_class.__module__.partition(".")[0] != _LIBRARY:
        _unused.add(extension_class)
        _anything = True


def register(module_class: type[nn.Module], extension) -> None:
    """Called for every module extension that is registered for a class of modules."""
    global _anything
    _module_classes.add(module_class)
    for known in type(extension).__mro__:
        _unused.discard(known)
    _anything = True


def keeps_any() -> bool:
    """Whether there may be modules that keep their tensors."""
    return _anything


def keeps_tensors(module: nn.Module) -> bool:
    """Whether an extended module's inputs and outputs are kept for extensions."""
    if not _anything or torch.compiler.is_compiling():
        return False
    return bool(_unused) or class_for(module, _module_classes) is not None


def class_for(module: nn.Module, classes) -> type[nn.Module] | None:
    """The one of `classes` that `module` belongs to, exactly; a layer of this library belongs to torch's."""
    module_class = type(module)
    if module_class not in classes and module_class.__module__ == f"{_LIBRARY}.layers":
        module_class = module_class.__base__
    return module_class if module_class in classes else None


def is_authored(ext) -> bool:
    """Whether an extension is somebody else's, or one of ours that somebody added to."""
    return not ext.own or ext.has_module_extensions


def authored() -> list:
    """The active extensions that have a say in what happens at modules."""
    return list(filter(is_authored, current().extensions))


def _has_parameters(module: nn.Module) -> bool:
    """Whether the module's own forward uses parameters."""
    return any(p is not None for p in module._parameters.values()) or "parametrizations" in module._modules


def handle_unknown_module(ext, module: nn.Module) -> None:
    """What a quantity without an extension for this module's class does."""
    if ext.own or ext._fail_mode == "SILENT":
        return
    sentence = f"Extension saving to {ext.savefield} does not have an extension for Module {type(module)}"
    if ext._fail_mode == "ERROR":
        raise NotImplementedError(f"{sentence}; add one by set_module_extension({type(module).__name__}, ...)")
    if _has_parameters(module):
        warnings.warn(f"{sentence} although the module has parameters", stacklevel=2)


@contextlib.contextmanager
def lent(module: nn.Module, attributes: dict[str, Any]) -> Iterator[None]:
    """Attributes of a module for a while."""
    before = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


class OpenCalls:
    """The calls of modules whose exit one backward pass has reached, and whose extensions have not run yet."""

    def __init__(self):
        self._calls: dict[int, list] = {}  # id of a module -> its calls
        self._reached: set[int] = set()  # ids of the modules that had a call here
        self._left: list[tuple] = []  # (saved quantities, place) that some module may not have fetched
        # By ids of (module, extension): columns at the module's outputs, [V_c, N, *output] each.
        self._columns: dict[tuple[int, int], list[tuple]] = {}

    def open(self, call, module: nn.Module) -> None:
        """A backward pass has reached the exit of a call."""
        self._calls.setdefault(id(module), []).append(call)
        self._reached.add(id(module))

    def close(self, call, module: nn.Module) -> None:
        """The extensions of a call are about to run."""
        calls = self._calls[id(module)]
        calls.remove(call)
        if not calls:
            del self._calls[id(module)]

    def module_done(self, module: nn.Module, input) -> bool:
        """Called before a module's hook, when the library's quantities are there; whether the hook is seen to here."""
        if id(module) not in self._reached:
            for ext in authored():
                if ext.module_extension(module) is not None:
                    raise RuntimeError(
                        f"{ext}: no input and output of {type(module).__name__} were kept for its extension; register "
                        "the extension, or define its class, before the forward pass, and run that outside of "
                        "disable(); outputs must be tensors or tuples of tensors"
                    )
                handle_unknown_module(ext, module)
        waiting = [call for call in self._calls.get(id(module), ()) if call.hook_due is None]
        if not waiting:
            return False
        call = waiting[-1]
        call.hook_due = (input,)
        if not call.awaits_entry:
            call.finish()
        return True

    def finish(self) -> None:
        """Runs what waited for gradients at inputs that never came; called when the pass ends."""
        while self._calls:
            next(iter(self._calls.values()))[-1].finish()
        self.forget()

    def forget(self) -> None:
        """Drops the backpropagated quantities that were not fetched."""
        for saved_quantities, place in self._left:
            saved_quantities.retrieve_quantity(place, delete_old=True)
        self._left.clear()
        self._columns.clear()

    def hand_back(self, ext, place, quantity) -> None:
        """Saves a backpropagated quantity for the module that computed the tensor at `place`."""
        ext.saved_quantities.save_quantity(place, quantity, ext.accumulate_backpropagated_quantities)
        self._left.append((ext.saved_quantities, place))

    def add_columns(self, ext, module: nn.Module, columns: tuple) -> None:
        """Keeps columns of a curvature's square root at the outputs of a module, for its extension."""
        self._columns.setdefault((id(module), id(ext)), []).append(columns)

    def fetch_columns(self, ext, module: nn.Module):
        """All columns [V, N, *output] at the output of a module (a tuple for several outputs); None without any."""
        chunks = self._columns.pop((id(module), id(ext)), None)
        if chunks is None:
            return None
        outputs = tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*chunks, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]

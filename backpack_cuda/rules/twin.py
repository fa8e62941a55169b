"""A second module with the same tensors: what replaces these in a call of it, no other thread sees."""

import contextlib
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

# Hooks that compute a module's weight from its parameters before each forward, without state or randomness.
_WEIGHT_HOOKS = (WeightNorm, BasePruningMethod)

# What every module has, besides its parameters, buffers and children: flags and dicts of hooks.
_STOCK_ATTRIBUTES = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, types.BuiltinFunctionType)


def weight_hooks(module: nn.Module) -> list[Callable]:
    """The hooks of a module that compute its weight."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _WEIGHT_HOOKS)]


class _RefersToModules(Exception):
    """An attribute of a module may refer to the module, so that a twin's forward could use the original."""


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same module with places of its own for its tensors: what is put there, no other thread sees.

    `twins` are those of the parts that have one already. Raises _RefersToModules where it would not be the same.
    """
    if module in twins:
        return twins[module]
    twin = twins[module] = object.__new__(type(module))
    for name, value in vars(module).items():
        if name == "forward":
            if getattr(value, "_previous", value) is not None:
                raise _RefersToModules
        elif name == "_modules":
            twin.__dict__[name] = {n: None if m is None else _twin(m, twins) for n, m in value.items()}
        elif name in ("_parameters", "_buffers"):
            twin.__dict__[name] = dict(value)
        elif name in _STOCK_ATTRIBUTES:
            if len(twins) > 1 and "hooks" in name:  # those of the module itself do not run
                _apart([hook for hook in value.values() if not isinstance(hook, _WEIGHT_HOOKS)])
            twin.__dict__[name] = value
        elif not name.startswith("_backpack_"):
            twin.__dict__[name] = _apart(value)
    return twin


def _apart(value: Any) -> Any:
    """An attribute that refers to no module, in lists and dicts of its own."""
    if isinstance(value, (Tensor, *_PLAIN)):
        return value
    if isinstance(value, weakref.ref) and isinstance(value(), Tensor | None):
        return value
    if isinstance(value, types.FunctionType) and value.__closure__ is None and not value.__defaults__:
        return value
    if type(value) in (list, tuple, set, frozenset, torch.Size):
        return type(value)(map(_apart, value))
    if type(value) is dict:
        return {_apart(key): _apart(item) for key, item in value.items()}
    raise _RefersToModules


def apart_from_other_threads(module: nn.Module, forward: Callable) -> tuple[nn.Module, Callable]:
    """A twin of `module` and its `forward`; the module itself where its attributes are too involved for that."""
    with contextlib.suppress(_RefersToModules):
        if isinstance(forward, functools.partial) and len(forward.args) == 1 and forward.args[0] is module:
            twin = _twin(module, {})
            return twin, functools.partial(forward.func, twin)
        if getattr(forward, "__self__", None) is module:
            twin = _twin(module, {})
            return twin, types.MethodType(forward.__func__, twin)
    return module, forward

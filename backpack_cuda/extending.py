"""`extend`: stock modules get the layers' behaviour in place."""

from __future__ import annotations

import functools
import weakref

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from backpack_cuda import layers
from backpack_cuda.authored import keeps_tensors
from backpack_cuda.capture import IO_FLAG, module_done
from backpack_cuda.context import is_authoring, is_disabled, is_sweeping
from backpack_cuda.custom_module.branching import Parallel, _Branch
from backpack_cuda.custom_module.reduce_tuple import ReduceTuple
from backpack_cuda.module_calls import enter, is_exit, leave, run_kept
from backpack_cuda.rules import forward_for
from backpack_cuda.rules.generic import owned_parameters
from backpack_cuda.rules.loss import LossFunction, loss_forward

_ANNOUNCEMENT = "_backpack_announcement"  # attribute of extended modules without parameters
_CONTAINERS = (nn.Sequential, GraphModule, Parallel, _Branch, ReduceTuple)  # no extension hook is called for these
_OWN_LAYERS = tuple(getattr(layers, name) for name in layers.__all__)


class ExtendedForward:
    """The `forward` attribute of an extended module.

    An object of its own rather than a bound method, so that deepcopy and pickle bind the copy to the copied module; it
    refers weakly to its module, so that modules are freed when their last user goes.
    """

    def __init__(self, module: nn.Module, previous=None):
        self._module = weakref.ref(module)
        self._previous = previous  # a forward that somebody had put on this instance
        self._rule = forward_for(module)

    def __call__(self, *args, **kwargs):
        module = self._module()
        # partial(): torch.compile of torch 2.11 does not trace a bound method that is made here.
        stock = self._previous or functools.partial(type(module).forward, module)
        if keeps_tensors(module):
            if self._rule is not loss_forward:
                return run_kept(module, functools.partial(self._rule, module, stock), *args, **kwargs)
            stock = functools.partial(run_kept, module, stock)  # the columns start at the prediction itself
        return self._rule(module, stock, *args, **kwargs)

    def __reduce__(self):
        return _restore, (self._module(), self._previous)


def _restore(module: nn.Module, previous) -> ExtendedForward:
    return ExtendedForward(module, previous)


def extend(module: nn.Module, debug: bool = False, use_converter: bool = False, store_io: bool = False) -> nn.Module:
    """Prepares `module` and its children, in place, for the quantities of `with backpack(...)`.

    Classes, parameters, hooks and state_dict stay as they are; deepcopy, pickle and torch.save work. Extending twice is
    the same as extending once. What happens between the modules (functional calls, views, residual sums) is free.
    First-order quantities do not need the loss function; for second-order ones it must be extended too.

    Args:
        module: any module. `backpack_cuda`'s own layers need no extension, but may be extended.
        debug: print each module that is extended.
        use_converter: accepted for BackPACK's programs; no conversion is needed, and the module itself is returned
            (`convert_module_to_backpack` says why).
        store_io: store each module's inputs and output as attributes `input0`, ..., `output` from forward to the end of
            the module's backward, as BackPACK does. Keeps the activations alive.

    Returns:
        The same module.

    Raises:
        TypeError: `module` is not a torch.nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    for name, child in module.named_children():
        if name != "parametrizations":  # part of the module's own forward: owned_parameters()
            extend(child, debug=debug, store_io=store_io)
    if debug:
        print(f"[DEBUG] Extending {type(module).__name__}")
    if store_io:
        module.__dict__[IO_FLAG] = True
    module._backpack_extend = True
    forward = module.__dict__.get("forward")
    if isinstance(module, _OWN_LAYERS) or isinstance(forward, ExtendedForward):
        pass
    elif owned_parameters(module) or forward_for(module) is loss_forward:
        module.forward = ExtendedForward(module, forward)
    announced = not owned_parameters(module) and not isinstance(module, _CONTAINERS)
    if announced and _announce not in module._forward_hooks.values():
        module.register_forward_hook(_announce)
    has_forward = isinstance(module.__dict__.get("forward"), ExtendedForward)
    if not has_forward and not isinstance(module, _CONTAINERS) and _leave not in module._forward_hooks.values():
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, with_kwargs=True)
    if store_io and _store_io not in module._forward_hooks.values():
        module.register_forward_hook(_store_io)
    return module


def _enter(module: nn.Module, inputs: tuple) -> tuple | None:
    """Forward pre-hook of modules without a forward of ours."""
    return enter(module, inputs) if keeps_tensors(module) else None


def _leave(module: nn.Module, inputs: tuple, kwargs: dict, output):
    """Forward hook of modules without a forward of ours."""
    return leave(module, inputs, kwargs, output) if keeps_tensors(module) else None


def _announce(module: nn.Module, inputs: tuple, output) -> None:
    """Forward hook of modules without parameters: their extension hook runs when the backward pass reaches them."""
    if torch.compiler.is_compiling() or is_disabled():
        return
    node = output.grad_fn if isinstance(output, Tensor) else None  # a tracer's stand-in has everything one asks for
    if isinstance(node, LossFunction._backward_cls) and is_exit(node.next_functions[0][0]):
        node = node.next_functions[0][0].next_functions[0][0]  # what was computed between a kept call's ends
    if node is not None:
        announcement = module.__dict__.get(_ANNOUNCEMENT)
        if announcement is None:
            announcement = module.__dict__[_ANNOUNCEMENT] = _Announcement(module)
        node.register_prehook(announcement)


class _Announcement:
    """Calls the extension hook of a module from a graph node, without keeping the module alive."""

    def __init__(self, module: nn.Module):
        self._module = weakref.ref(module)

    def __reduce__(self):
        return _Announcement, (self._module(),)

    def __call__(self, grad_outputs) -> None:
        module = self._module()
        if module is not None and not is_sweeping() and not is_authoring():
            module_done(module)


def _store_io(module: nn.Module, inputs: tuple, output) -> None:
    """Forward hook of modules extended with `store_io=True`."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or is_disabled():
        return
    for position, value in enumerate(inputs):
        setattr(module, f"input{position}", value)
    if isinstance(output, Tensor):
        module.output = output
    elif isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        module.output = output[0]

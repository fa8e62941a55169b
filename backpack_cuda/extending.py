"""`extend`: stock modules get the layers' behaviour in place."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from backpack_cuda import layers
from backpack_cuda.authored import keeps_tensors
from backpack_cuda.context import current, is_authoring, is_disabled, is_sweeping
from backpack_cuda.module_calls import enter, is_exit, leave, run_kept
from backpack_cuda.passes import module_done
from backpack_cuda.rules import forward_for
from backpack_cuda.rules.generic import generic_forward, owned_parameters
from backpack_cuda.rules.loss import LossFunction, loss_forward
from backpack_cuda.stored import IO_FLAG, memory_cleanup, store
from backpack_cuda.utils.module_classification import is_no_op

_ANNOUNCEMENT = "_backpack_announcement"  # attribute of extended modules without parameters
_OWN_LAYERS = tuple(getattr(layers, name) for name in layers.__all__)


class ExtendedForward:
    """The `forward` attribute of an extended module.

    An object of its own rather than a bound method, so that deepcopy and pickle bind the copy to the copied module; it
    refers weakly to its module, so that modules are freed when their last user goes.
    """

    def __init__(self, module: nn.Module, previous=None):
        self._module = weakref.ref(module)
        self._previous = previous  # a forward that somebody had put on this instance
        self.rule = forward_for(module)

    def __call__(self, *args, **kwargs):
        module = self._module()
        if module is None:
            raise RuntimeError(
                "the extended module whose copy.copy() is called exists no longer; call extend() on the copy, or use "
                "copy.deepcopy()"
            )
        # partial(): torch.compile of torch 2.11 does not trace a bound method that is made here.
        stock = self._previous or functools.partial(type(module).forward, module)
        if keeps_tensors(module):
            if self.rule is not loss_forward:
                return run_kept(module, functools.partial(self.rule, module, stock), *args, **kwargs)
            stock = functools.partial(run_kept, module, stock)  # the columns start at the prediction itself
        return self.rule(module, stock, *args, **kwargs)

    def restore_if_copied(self, module: nn.Module) -> None:
        """Takes this forward off a module that got it, with all attributes, from another one by copy.copy()."""
        if self._module() is not module:
            del module.forward
            if self._previous is not None:
                module.forward = self._previous

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
            the module's backward, as BackPACK does; detached from the graph. Keeps the activations alive.

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
    if isinstance(forward, ExtendedForward):
        forward.restore_if_copied(module)
        forward = module.__dict__.get("forward")
    if isinstance(module, _OWN_LAYERS) or isinstance(forward, ExtendedForward):
        pass
    elif owned_parameters(module) or forward_for(module) is loss_forward:
        module.forward = ExtendedForward(module, forward)
    if is_no_op(module):
        return module  # nothing is stored and no hook is called for these
    has_forward = isinstance(module.__dict__.get("forward"), ExtendedForward)
    # A module may have got its first parameter, or lost its last, since it was extended before.
    has_parameters = bool(owned_parameters(module))
    is_generic = has_forward and module.forward.rule is generic_forward
    _set_hook(module, _announce, not has_parameters)
    _set_hook(module, _announce_frozen, has_parameters and is_generic)
    _set_hook(module, _enter, not has_forward, pre=True)
    _set_hook(module, _leave, not has_forward, with_kwargs=True)
    if store_io and _store_io not in module._forward_hooks.values():
        module.register_forward_hook(_store_io, with_kwargs=True)
    return module


def _set_hook(module: nn.Module, hook: Callable, wanted: bool, pre: bool = False, **options) -> None:
    """Registers a forward hook (`pre`: pre-hook) of ours once, or removes it."""
    hooks = module._forward_pre_hooks if pre else module._forward_hooks
    known = [key for key, other in hooks.items() if other is hook]
    if wanted and not known:
        (module.register_forward_pre_hook if pre else module.register_forward_hook)(hook, **options)
    elif not wanted:
        for key in known:
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


def _enter(module: nn.Module, inputs: tuple) -> tuple | None:
    """Forward pre-hook of modules without a forward of ours."""
    if torch.compiler.is_compiling() or not keeps_tensors(module):
        return None
    return enter(module, inputs)


def _leave(module: nn.Module, inputs: tuple, kwargs: dict, output):
    """Forward hook of modules without a forward of ours."""
    if torch.compiler.is_compiling() or not keeps_tensors(module):
        return None
    return leave(module, inputs, kwargs, output)


def _announce(module: nn.Module, inputs: tuple, output) -> None:
    """Forward hook of modules without parameters: their extension hook runs when the backward pass reaches them."""
    if torch.compiler.is_compiling() or is_disabled():
        return
    first = _first(output)
    node = None if first is None else first.grad_fn
    if isinstance(node, LossFunction._backward_cls) and is_exit(node.next_functions[0][0]):
        node = node.next_functions[0][0].next_functions[0][0]  # what was computed between a kept call's ends
    if node is not None:
        announcement = module.__dict__.get(_ANNOUNCEMENT)
        if announcement is None:
            announcement = module.__dict__[_ANNOUNCEMENT] = _Announcement(module)
        node.register_prehook(announcement)


def _announce_frozen(module: nn.Module, inputs: tuple, output) -> None:
    """The same of modules whose parameters need no gradients; of others the observer calls the hook."""
    if not any(parameter.requires_grad for parameter in owned_parameters(module).values()):
        _announce(module, inputs, output)


def _first(output) -> Tensor | None:
    """A module's output, or the first of its outputs; None for what is no tensor, such as a tracer's stand-in."""
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


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


def _store_io(module: nn.Module, inputs: tuple, kwargs: dict, output) -> None:
    """Forward hook of modules extended with `store_io=True`; for calls that a backward pass can reach."""
    if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(output)):
        names = list(inspect.signature(type(module).forward).parameters)[1:] if kwargs else []
        hook_store_io(module, inputs, output)
        store(module, {f"input{names.index(name)}": value for name, value in kwargs.items() if name in names})


def hook_store_io(module: nn.Module, input: tuple, output) -> None:
    """Stores a call's tensors, detached, as attributes of its module: `input0`, ..., `output`. BackPACK's forward hook.

    For `module.register_forward_hook`; `extend(module, store_io=True)` does the same, and deletes them when the
    backward pass has been there. Nothing is stored without a graph, inside `disable()` and under a compiler, nor under
    a name that a child, parameter or buffer of the module has.

    Args:
        module: the module that was called.
        input: its positional inputs.
        output: what it returned; of a tuple the first element is stored.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or is_disabled():
        return
    tensors = {f"input{position}": value for position, value in enumerate(input)}
    first = _first(output)
    store(module, tensors if first is None else {**tensors, "output": first})


def hook_run_extensions(module: nn.Module, g_inp: tuple, g_out: tuple) -> None:
    """What is left to do for BackPACK's backward hook: deletes what `hook_store_io` stored.

    Quantities are formed, and extension hooks called, from the graph of an extended module's forward pass, and need no
    hook of this kind.

    Args:
        module: the module that the backward pass has been through.
        g_inp, g_out: the gradients at its inputs and outputs.

    Raises:
        RuntimeError: quantities are active, and the module is not extended, so that nothing forms them.
    """
    if current().extensions and "_backpack_extend" not in module.__dict__:
        raise RuntimeError(
            f"{type(module).__name__}: a backward hook alone forms no quantities; call extend(module) before the "
            "forward pass"
        )
    if not current().retain_graph:
        memory_cleanup(module)

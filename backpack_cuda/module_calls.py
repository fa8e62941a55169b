"""Calls of modules that extensions of others are for: the gradients at their inputs and outputs, and their tensors.

Two functions that hand on what they get enclose such a call in the graph. The one behind it receives the gradients at
its outputs, the one before it those at its inputs, and with these the extensions run, in the order in which they are
active. torch's own backward hooks do the same, but warn at every first layer, and refuse changes in place.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import BackwardHookFunction

from backpack_cuda import authored
from backpack_cuda.capture import ObserverFunction, capturing, in_operand_types, reached
from backpack_cuda.context import authoring, current, is_authoring, is_sweeping
from backpack_cuda.extensions.module_extension import ModuleExtension
from backpack_cuda.passes import Pass, register, run_hook
from backpack_cuda.rules.loss import LossFunction, is_loss_module
from backpack_cuda.stored import IO_FLAG, is_taken, store

_KEPT = "_backpack_kept"  # attribute of modules, names of the attributes that were stored here
_ENTRY = "_backpack_entry"  # attribute of a call's first differentiated input, its node, while the forward runs


class MissingQuantity(RuntimeError, AssertionError):
    """A module got no backpropagated quantity. An AssertionError in BackPACK; it is a RuntimeError too."""


class EntryFunction(torch.autograd.Function):
    """Hands on a call's inputs, and receives their gradients when all of the call has been differentiated."""

    hands_on = True

    @staticmethod
    def forward(ctx, *inputs):
        ctx.call = None  # a weak reference, because the call holds the outputs of this node
        ctx.entry = None  # what is known of the inputs, without this node
        outputs = tuple(input.detach() for input in inputs)  # as of ObserverFunction
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @in_operand_types
    def backward(ctx, *grad_inputs):
        call = None if ctx.call is None else ctx.call()
        if call is not None and not (is_sweeping() or is_authoring()):
            call.entry_reached(grad_inputs)
        return grad_inputs


class ExitFunction(torch.autograd.Function):
    """Hands on a call's outputs, and receives their gradients before any of the call has been differentiated."""

    hands_on = True

    @staticmethod
    def forward(ctx, call, *outputs):
        ctx.call = call
        outputs = tuple(output.detach() for output in outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @in_operand_types
    def backward(ctx, *grad_outputs):
        if not (is_sweeping() or is_authoring()):
            ctx.call.exit_reached(ctx, grad_outputs)
        return (None, *grad_outputs)


# As of LayerFunction: checkpointed segments run again under function transforms, which these never see batched.
_apply_entry, _apply_exit = (super(torch.autograd.Function, f).apply for f in (EntryFunction, ExitFunction))

_HOOK_NODE = BackwardHookFunction._backward_cls  # of the backward hooks of a user on a module
_HANDING_ON = (
    _HOOK_NODE,
    *(f._backward_cls for f in (EntryFunction, ExitFunction, ObserverFunction, LossFunction)),
)


def _place(tensor: Tensor):
    """The place in the graph where a tensor was computed, (node, output); None for a leaf.

    A tensor and what a function handed on of it have the same place.
    """
    node, output = tensor.grad_fn, tensor.output_nr
    while isinstance(node, _HANDING_ON):
        node, output = node.next_functions[output]
    return None if node is None or hasattr(node, "variable") else (node, output)


class _Entry(NamedTuple):
    """Where a call's inputs enter it."""

    node: object = None  # of EntryFunction; None where no input requires a gradient
    positions: Sequence[int] = ()  # of its tensors among the inputs
    places: Sequence[tuple | None] = ()  # of these tensors in the graph before it
    versions: dict[str, int] = {}  # of the inputs, by their names as attributes


class ModuleCall:
    """One call of a module, from its forward pass until the extensions have run."""

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple,
        keywords: Sequence[str],
        entry: _Entry,
        outputs: tuple,
        exit_positions: Sequence[int],
    ):
        self._module = weakref.ref(module)
        self._keywords = keywords
        self._entry = entry
        self._exit_positions = exit_positions  # of the differentiated tensors among the outputs
        self._output_count = len(outputs)
        self._output_place = _place(outputs[0]) if isinstance(outputs[0], Tensor) else None
        self._tensors = {f"input{i}": value for i, value in enumerate(inputs)} | {"output": outputs[0]}
        found = {name: value._version for name, value in self._tensors.items() if _has_version(value)}
        self._versions = found | entry.versions  # of the tensors, as the module got and returned them
        self._state: Pass | None = None  # the pass that has reached the exit, and not yet the entry
        self._grad_outputs: tuple[Tensor | None, ...] = ()
        self.awaits_entry = False  # whether the pass will reach the entry
        self.hook_due: tuple | None = None  # (input,) where the module's hook is to follow

    def store(self, module: nn.Module) -> None:
        """Makes the tensors attributes of the module."""
        if IO_FLAG not in module.__dict__:
            stored = {name: value for name, value in self._tensors.items() if not _is_taken(module, name)}
            module.__dict__[_KEPT] = {*module.__dict__.get(_KEPT, ()), *stored}
            store(module, stored)

    # ---- backward ----

    def exit_reached(self, node, grad_outputs: Sequence[Tensor]) -> None:
        """The gradients at the outputs are known."""
        if not authored.authored() and current().extension_hook is None:
            if self._entry.node is None:
                self._release()
            return
        self._grad_outputs = _placed(grad_outputs, self._exit_positions, self._output_count)
        self._state = Pass.current(node)
        self.awaits_entry = self._entry.node is not None and reached(self._entry.node) is not False
        self._state.calls.open(self, self._module())

    def entry_reached(self, grad_inputs: Sequence[Tensor]) -> None:
        """The gradients at the inputs are known."""
        if self._state is not None:
            self.finish(grad_inputs)
        elif not authored.authored() and current().extension_hook is None:
            self._release()

    def finish(self, grad_inputs: Sequence[Tensor] | None = None) -> None:
        """Runs the active extensions, and the module's hook if it is due."""
        module, state, self._state = self._module(), self._state, None
        grad_outputs, self._grad_outputs = self._grad_outputs, ()
        state.calls.close(self, module)
        if module is None:
            return
        count = len(self._tensors) - 1
        grads = [] if grad_inputs is None else grad_inputs
        positions = [] if grad_inputs is None else self._entry.positions
        with self._attached(module):
            self._run(state, module, _placed(grads, positions, count), grad_outputs)
            if self.hook_due is not None:
                (input,), self.hook_due = self.hook_due, None
                run_hook(module, input)
        self._release()

    def _run(self, state: Pass, module: nn.Module, g_inp: tuple, g_out: tuple) -> None:
        for ext in authored.authored():
            extension = ext.module_extension(module)
            if extension is None:
                authored.handle_unknown_module(ext, module)
                continue
            if self._keywords:
                raise NotImplementedError(
                    f"{ext}: {type(module).__name__} was called with the keyword arguments "
                    f"{', '.join(self._keywords)}; extensions see the positional ones only, as input0, input1, ...: "
                    "pass them by position"
                )
            taken = [name for name in self._tensors if _is_taken(module, name)]
            if taken:
                raise NotImplementedError(
                    f"{ext}: {type(module).__name__} has an attribute {taken[0]} of its own, where extensions expect a "
                    "tensor of the call; rename it"
                )
            with authoring(), self._explained(ext, module):
                self._apply(state, ext, extension, module, g_inp, g_out)

    def _apply(
        self, state: Pass, ext, extension: ModuleExtension, module: nn.Module, g_inp: tuple, g_out: tuple
    ) -> None:
        extension.check_hyperparameters_module_extension(ext, module, g_inp, g_out)
        backpropagated = ext.expects_backpropagation_quantities()
        quantity = None
        if backpropagated:
            quantity = state.calls.fetch_columns(ext, module) if ext.own else self._fetch(ext)
            if quantity is None and not is_loss_module(module):
                raise MissingQuantity(
                    f"{ext}: {type(module).__name__} expects a backpropagated quantity at its output, but got None: "
                    "the loss and every module between must be extended, and nothing but them may use the output "
                    "(call torch.nn.Flatten() rather than flatten(), and so on)"
                )
        for name in extension._params:
            parameter = getattr(module, name, None)
            if parameter is not None and parameter.requires_grad:
                value = getattr(extension, name)(ext, module, g_inp, g_out, quantity)
                state.save_once(module, name, parameter, ext, value)
        if backpropagated and not ext.own and self._entry.node is not None:
            quantity = extension.backpropagate(ext, module, g_inp, g_out, quantity)
            for place in self._entry.places:
                if place is not None:  # no leaf, where nobody would fetch it
                    state.calls.hand_back(ext, place, quantity)

    def _fetch(self, ext):
        return ext.saved_quantities.retrieve_quantity(self._output_place, delete_old=True)

    # ---- the tensors ----

    @contextlib.contextmanager
    def _attached(self, module: nn.Module) -> Iterator[None]:
        """The call's tensors as attributes of its module; those that were changed in place are left out."""
        before = {name: module.__dict__[name] for name in self._tensors if name in module.__dict__}
        own = {name: value for name, value in self._tensors.items() if not _is_taken(module, name)}
        for name, value in own.items():
            if self._is_changed(name):
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value
        try:
            yield
        finally:
            for name in own:
                module.__dict__.pop(name, None)
            if IO_FLAG not in module.__dict__ or current().retain_graph:  # else the hook has dropped them
                module.__dict__.update(before)

    def _is_changed(self, name: str) -> bool:
        return name in self._versions and self._tensors[name]._version != self._versions[name]

    @contextlib.contextmanager
    def _explained(self, ext, module: nn.Module) -> Iterator[None]:
        """Says why an attribute is missing."""
        try:
            yield
        except AttributeError as error:
            if getattr(error, "obj", None) is module and error.name in self._tensors and self._is_changed(error.name):
                raise RuntimeError(
                    f"{ext}: {error.name} of {type(module).__name__} was changed in place after it was used or formed, "
                    "so that its value is lost; use functions that are not in place (inplace=False)"
                ) from error
            raise

    def _release(self) -> None:
        """Drops the tensors, unless a further backward pass through the graph may need them."""
        module = self._module()
        if current().retain_graph:
            return
        if module is not None and IO_FLAG not in module.__dict__:
            for name in self._tensors:
                if not _is_taken(module, name):
                    module.__dict__.pop(name, None)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._tensors = dict.fromkeys(self._tensors)


def _has_version(value) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def _is_taken(module: nn.Module, name: str) -> bool:
    """Whether a module has a child, parameter, buffer or attribute of this name that was not stored here."""
    if is_taken(module, name):
        return True
    return name in module.__dict__ and IO_FLAG not in module.__dict__ and name not in module.__dict__.get(_KEPT, ())


def _placed(tensors: Sequence, positions: Sequence[int], count: int) -> tuple:
    """`tensors` at their positions among `count`, None elsewhere."""
    placed: list = [None] * count
    for position, tensor in zip(positions, tensors, strict=True):
        placed[position] = tensor
    return tuple(placed)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


def enter(module: nn.Module, args: tuple) -> tuple:
    """The positional inputs for a call of `module` whose tensors are kept."""
    positions = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.requires_grad]
    if not positions or not capturing():
        return args
    places = [_place(args[i]) for i in positions]
    entered = _apply_entry(*[args[i] for i in positions])
    entered = entered if isinstance(entered, tuple) else (entered,)
    args = list(args)
    for i, value in zip(positions, entered, strict=True):
        args[i] = value
    versions = {f"input{i}": value._version for i, value in enumerate(args) if _has_version(value)}
    node = entered[0].grad_fn
    node.entry = _Entry(None, positions, places, versions)
    setattr(entered[0], _ENTRY, node)
    return tuple(args)


def leave(module: nn.Module, args: tuple, kwargs: dict, output):
    """The output of a call of `module` on what `enter` gave, prepared for extensions."""
    outputs = output if isinstance(output, tuple) else (output,)
    differentiated = [i for i, value in enumerate(outputs) if isinstance(value, Tensor) and value.requires_grad]
    if not differentiated or not capturing():
        return output
    entry = _Entry()
    for value in args:
        node = _entry_node(value) if isinstance(value, Tensor) else None
        if node is not None and node.entry is not None:
            entry, node.entry = node.entry._replace(node=node), None
    call = ModuleCall(module, args, list(kwargs), entry, outputs, differentiated)
    call.store(module)
    if entry.node is not None:
        entry.node.call = weakref.ref(call)
    handed_on = _apply_exit(call, *[outputs[i] for i in differentiated])
    handed_on = handed_on if isinstance(handed_on, tuple) else (handed_on,)
    register(handed_on[0], ())
    if isinstance(output, Tensor):
        return handed_on[0]
    outputs = list(outputs)
    for i, value in zip(differentiated, handed_on, strict=True):
        outputs[i] = value
    return type(output)(*outputs) if hasattr(output, "_fields") else type(output)(outputs)


def _entry_node(input: Tensor):
    """The node by which a tensor entered a call, or None; past the backward hooks that a user has put on the module."""
    if _ENTRY in input.__dict__:  # also where the module has changed the tensor in place
        return input.__dict__.pop(_ENTRY)
    node, output = input.grad_fn, input.output_nr
    while isinstance(node, _HOOK_NODE):
        node, output = node.next_functions[output]
    return node if isinstance(node, EntryFunction._backward_cls) else None


def is_exit(node) -> bool:
    """Whether a node of the graph is behind a call whose tensors are kept."""
    return isinstance(node, ExitFunction._backward_cls)


def run_kept(module: nn.Module, forward: Callable, *args, **kwargs):
    """`forward(*args, **kwargs)`, a call of `module` whose tensors are kept."""
    args = enter(module, args)
    return leave(module, args, kwargs, forward(*args, **kwargs))

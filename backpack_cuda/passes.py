"""What one backward pass has done so far: the uses of parameters still to come, results, and the modules' hooks."""

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from backpack_cuda.authored import OpenCalls, authored, is_authored, keeps_any
from backpack_cuda.context import CTX, State, current
from backpack_cuda.extensions.first_order import FirstOrderExtension
from backpack_cuda.extensions.kronecker import KFAC
from backpack_cuda.extensions.second_order import SecondOrderExtension
from backpack_cuda.per_sample import NoKroneckerFactors, NoPerSampleGradients, Use
from backpack_cuda.per_sample.dense import merge
from backpack_cuda.stats import Stats, Want
from backpack_cuda.stored import IO_FLAG, is_taken, memory_cleanup

# ---------------------------------------------------------------------------------------------------------------------
# Which nodes of live graphs use a parameter
# ---------------------------------------------------------------------------------------------------------------------


class _Reference(weakref.ref):
    """A weak reference to a node; `key` is the id of the parameter that the node uses."""

    __slots__ = ("key",)


_nodes: dict[int, list[_Reference]] = {}  # id of a parameter -> its nodes
_nodes_lock = threading.RLock()  # R: a collection of garbage inside may call _forget()


def _forget(reference: _Reference) -> None:
    with _nodes_lock:
        references = _nodes.get(reference.key)
        if references is not None:
            references.remove(reference)
            if not references:
                del _nodes[reference.key]


def register(output: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Notes that the graph node which formed `output` uses `parameters`."""
    node = output.grad_fn
    task = torch._C._current_graph_task_id()
    if task != -1 and CTX.get_active_exts():  # a forward inside a backward pass: activation checkpointing
        node.outer_pass = Pass.of_task(task)
    with _nodes_lock:
        for parameter in parameters:
            reference = _Reference(node, _forget)
            reference.key = key = id(parameter)
            references = _nodes.get(key)
            if references is None:
                _nodes[key] = [reference]
            else:
                references.append(reference)
                if len(references) == 1:  # the last of the others was forgotten meanwhile
                    _nodes[key] = references


class _Pending:
    """A parameter with several uses in the running backward pass."""

    def __init__(self, module: nn.Module, parameter: nn.Parameter, expected: set[int]):
        self.module = module  # of the first use
        self.parameter = parameter
        self.expected = expected  # ids of the nodes still to run
        self.uses: list[tuple[Use, str]] = []


class Pass:
    """What one backward pass has done so far.

    A pass that activation checkpointing starts inside another belongs to the outer one: both differentiate one loss.
    """

    _of_task: dict[int, "Pass"] = {}

    def __init__(self):
        self.finished: set[int] = set()  # ids of the parameters with results
        self.pending: dict[int, _Pending] = {}
        self.waiting: list[tuple[nn.Module, set[int], Tensor | None]] = []  # modules whose hook is due, in order
        # By ids of (parameter, extension): what the losses contributed so far; None where there is no result.
        self.curvature: dict[tuple[int, int], object] = {}
        self.factor_nodes: dict[tuple[int, int], frozenset[int]] = {}  # of Kronecker factors: ids of the uses' nodes
        self.losses: list[tuple[object, Tensor | None]] = []  # (normalisation, factor) of the losses that were reached
        self.asked = current()  # of the thread that called backward()
        self.forms_from_gradients = any(map(from_gradients, self.asked.extensions))
        self._saved: list[tuple[nn.Parameter, str, Callable]] = []  # results of this pass, as weak references
        self._saved_by_authors: set[tuple[int, int]] = set()  # ids of parameters and extensions
        self.calls = OpenCalls()

    @classmethod
    def of_task(cls, task: int) -> "Pass":
        """The pass of the engine's task that runs now."""
        state = cls._of_task.get(task)
        if state is None:
            state = cls._begin(task, cls())
        return state

    @classmethod
    def running(cls) -> "Pass | None":
        """The pass of the engine's task that runs now, if anything has asked for it yet."""
        return cls._of_task.get(torch._C._current_graph_task_id())

    @classmethod
    def current(cls, node) -> "Pass":
        """The pass that `node`'s backward runs in, or the pass around it."""
        task = torch._C._current_graph_task_id()
        outer = getattr(node, "outer_pass", None)
        if outer is not None and task not in cls._of_task:
            return cls._begin(task, outer, is_part=True)
        return cls.of_task(task)

    @classmethod
    def _begin(cls, task: int, state: "Pass", is_part: bool = False) -> "Pass":
        cls._of_task[task] = state
        Variable._execution_engine.queue_callback(_End(task, state, is_part))
        return state

    def finish(self) -> None:
        """Finishes what a use that never ran was waited for."""
        for key in list(self.pending):
            self.finish_pending(key)
        self.run_hooks()
        self.calls.finish()

    def save(self, parameter: nn.Parameter, ext, value) -> None:
        """Puts a result on a parameter."""
        if self.asked.debug:
            print(f"[DEBUG] {ext} saves {ext.savefield} of a parameter {list(parameter.shape)}")
        setattr(parameter, ext.savefield, value)
        self._saved.append((parameter, ext.savefield, _weakly(value)))

    def save_once(self, module: nn.Module, name: str, parameter: nn.Parameter, ext, value) -> None:
        """Puts a result of somebody else's making on a parameter, of which nobody knows how to add a second one."""
        key = (id(parameter), id(ext))
        if key in self._saved_by_authors or self.uses(parameter) > 1:
            raise NotImplementedError(
                f"{ext}: {type(module).__name__}.{name} is used several times in this backward pass, and the results "
                "of its extension for the single uses have no known sum; use backpack_cuda.register_layer, or one "
                "module for each use"
            )
        self._saved_by_authors.add(key)
        self.save(parameter, ext, value)

    def discard(self) -> None:
        """Takes the results of a pass that failed from the parameters: they would be a part of the whole only."""
        for parameter, savefield, saved in self._saved:
            found = parameter.__dict__.get(savefield)
            if found is not None and _weakly(found)() is saved():  # else of a later pass
                del parameter.__dict__[savefield]
        self._saved.clear()
        self.calls.forget()

    def check_covered(self, module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """The second-order results of these parameters must be there, from a loss that was reached before."""
        for ext in self.asked.extensions:
            if isinstance(ext, SecondOrderExtension) and not from_gradients(ext) and not ext.module_extension(module):
                for name, parameter in parameters.items():
                    if (id(parameter), id(ext)) not in self.curvature:
                        raise RuntimeError(
                            f"{ext}: the backward pass reached {type(module).__name__}.{name} through no loss with a "
                            "known Hessian: call extend(loss_function) before the forward pass, and let every term of "
                            "the loss that depends on the parameter come from such a module (torch.nn.MSELoss, "
                            "CrossEntropyLoss, BCEWithLogitsLoss, or one of backpack_cuda.curvature.register_loss)"
                        )

    def expected(self, node, parameter) -> set[int]:
        """Ids of all nodes that use `parameter` in the running backward pass."""
        references = list(_nodes.get(id(parameter), ()))  # others forget and register
        if len(references) == 1:
            return {id(node)}
        nodes = [other for reference in references if (other := reference()) is not None]
        return {id(node)} | {id(n) for n in nodes if n is not node and torch._C._will_engine_execute_node(n)}

    def uses(self, parameter) -> int:
        """How many nodes use `parameter` in the running backward pass."""
        nodes = [reference() for reference in _nodes.get(id(parameter), ())]
        return sum(node is not None and torch._C._will_engine_execute_node(node) for node in nodes)

    def shared(self, node, parameters) -> bool:
        """Whether one of `parameters` has further uses in this backward pass."""
        return any(len(self.expected(node, parameter)) > 1 for parameter in parameters)

    def finish_pending(self, key: int) -> None:
        """Forms the results of a parameter with several uses."""
        pending = self.pending.pop(key)
        name = pending.uses[0][1]
        if self.forms_from_gradients:
            with _warning_if_impossible([pending.parameter]):
                _form(self, pending.module, merge(pending.uses), {name: pending.parameter}, Want.NOTHING)
        self.finished.add(key)

    def run_hooks(self) -> None:
        """Runs the hook of every module whose parameters all have their results."""
        due = [entry for entry in self.waiting if entry[1] <= self.finished]
        self.waiting = [entry for entry in self.waiting if not entry[1] <= self.finished]
        for module, _, input in due:
            module_done(module, input, self)


class _End:
    """Called by the engine at the end of a task; dropped by it, uncalled, with a task that failed."""

    def __init__(self, task: int, state: Pass, is_part: bool):
        self._task = task
        self._state: Pass | None = state
        self._is_part = is_part  # of the pass of another task

    def __call__(self) -> None:
        Pass._of_task.pop(self._task, None)
        if not self._is_part:
            self._state.finish()
        self._state = None

    def __del__(self):
        if self._state is not None:
            Pass._of_task.pop(self._task, None)
            self._state.discard()


def _weakly(result) -> Callable:
    """A weak reference to a result, or to its first tensor, by which it is known."""
    try:
        return weakref.ref(result[0] if isinstance(result, list) and result else result)
    except TypeError:  # of a kind that has none
        return lambda: result


# ---------------------------------------------------------------------------------------------------------------------
# Forming and saving
# ---------------------------------------------------------------------------------------------------------------------


def from_gradients(ext) -> bool:
    """Whether a quantity is formed from the ordinary output gradients, layer by layer."""
    return isinstance(ext, FirstOrderExtension) or (isinstance(ext, KFAC) and ext.fisher == "empirical")


def _check_mixing(state: Pass, module: nn.Module) -> None:
    for ext in state.asked.extensions:
        if ext.own and ext.module_extension(module) is None:
            ext.check_mixed_samples(module)


@contextlib.contextmanager
def _warning_if_impossible(parameters: Iterable[nn.Parameter]):
    """Warns where a module has no per-sample gradients, and leaves no result (of an earlier pass) on its parameters."""
    try:
        yield
    except NoPerSampleGradients as reason:
        extensions = [ext for ext in CTX.get_active_exts() if from_gradients(ext)]
        for parameter in parameters:
            for ext in extensions:
                parameter.__dict__.pop(ext.savefield, None)
        names = ", ".join(ext.savefield for ext in extensions)
        warnings.warn(f"no {names} for the parameters of {reason}", stacklevel=3)


def _form(state: Pass, module: nn.Module, use: Use, parameters: dict[str, nn.Parameter], also: int) -> dict[str, Stats]:
    """Forms what the active extensions want of `parameters`, plus the statistics `also`, and saves the results."""
    extensions = [
        ext
        for ext in state.asked.extensions
        if isinstance(ext, FirstOrderExtension) and ext.module_extension(module) is None
    ]
    shared = [ext for ext in extensions if ext.get_subsampling() is None]
    want = also
    for ext in shared:
        want |= ext.want
    stats = use.stats(dict.fromkeys(parameters, want)) if want else {}
    for ext in extensions:
        own, size = stats, use.batch_size
        if ext not in shared:
            samples = torch.tensor(ext.get_subsampling(), dtype=torch.long)
            if len(samples) and int(samples.max()) >= use.batch_size:
                raise ValueError(
                    f"subsampling: expected indices below the batch size {use.batch_size}, got {ext.get_subsampling()}"
                )
            part, size = use.select(samples), len(samples)
            own = part.stats(dict.fromkeys(parameters, ext.want))
        for name, parameter in parameters.items():
            state.save(parameter, ext, ext.quantity(own[name], size))
    _form_empirical(state, module, use, parameters)
    return stats


def _form_empirical(state: Pass, module: nn.Module, use: Use, parameters: dict[str, nn.Parameter]) -> None:
    """Forms and saves the factors of the empirical Fisher matrix, whose column is the ordinary output gradient."""
    for ext in state.asked.extensions:
        if isinstance(ext, SecondOrderExtension) and from_gradients(ext):
            scale = ext.empirical_scale(state.losses)
            columns = use.as_columns()
            for name, parameter in parameters.items():
                try:
                    factors = ext.factors(columns, name)
                except NoKroneckerFactors as reason:
                    parameter.__dict__.pop(ext.savefield, None)
                    ext.without_factors(module, reason)
                else:
                    state.save(parameter, ext, [factors[0] * scale, *factors[1:]])


def record(
    state: Pass,
    node,
    module: nn.Module,
    use: Use,
    parameters: dict[str, nn.Parameter],
    input: Tensor | None,
    fused: bool,
) -> dict[str, Tensor]:
    """Forms or queues the results of `parameters`; returns their gradients where `fused` (none has further uses)."""
    gradients = {}
    if use.mixes_samples and parameters:
        _check_mixing(state, module)
    single = {}
    for name, parameter in parameters.items():
        key = id(parameter)
        if key in state.finished:
            raise NotImplementedError(
                f"{type(module).__name__}.{name} is used in several checkpointed segments with use_reentrant=True, "
                "whose uses cannot be brought together; call torch.utils.checkpoint.checkpoint with use_reentrant=False"
            )
        if key not in state.pending:
            expected = () if fused else state.expected(node, parameter)
            if len(expected) < 2:
                single[name] = parameter
                continue
            state.pending[key] = _Pending(module, parameter, expected)
        pending = state.pending[key]
        pending.uses.append((use, name))
        pending.expected.discard(id(node))
        if not pending.expected:
            state.finish_pending(key)
    if fused and single:
        stats = _form(state, module, use, single, Want.GRAD)
        gradients = {name: stats[name].grad for name in single}
    elif single:
        with _warning_if_impossible(single.values()):
            _form(state, module, use, single, Want.NOTHING)
    state.finished.update(map(id, single.values()))
    # A module used several times has its hook called once, after its last use.
    state.waiting = [entry for entry in state.waiting if entry[0] is not module]
    if len(single) == len(parameters) and not state.waiting:
        module_done(module, input, state)
    else:
        state.waiting.append((module, {id(p) for p in parameters.values()}, input))
        state.run_hooks()
    return gradients


def is_attended(module: nn.Module, now: State) -> bool:
    """Whether somebody wants to know when a backward pass has come through this module."""
    return now.extension_hook is not None or IO_FLAG in module.__dict__ or any(map(is_authored, now.extensions))


def module_done(module: nn.Module, input: Tensor | None = None, state: Pass | None = None) -> None:
    """Runs what others wrote for a module, when the quantities of this library are there, and then its hook."""
    if authored():
        state = state or Pass.of_task(torch._C._current_graph_task_id())
    elif keeps_any():
        state = state or Pass.running()
    else:
        state = None
    if state is None or not state.calls.module_done(module, input):
        run_hook(module, input)


def run_hook(module: nn.Module, input: Tensor | None = None) -> None:
    """Runs the extension hook of a module, with `module.input0` set to `input`, and drops what it stored."""
    hook = current().extension_hook
    stores_io = IO_FLAG in module.__dict__
    if hook is not None:
        lent = input is not None and not is_taken(module, "input0")
        stored = module.__dict__.get("input0")
        if lent:
            module.__dict__["input0"] = input  # setattr() makes a parameter of the module of one that is its input
        try:
            hook(module)
        finally:
            if lent and stored is None:
                module.__dict__.pop("input0", None)
            elif lent:
                module.__dict__["input0"] = stored
    if stores_io and not current().retain_graph:
        memory_cleanup(module)

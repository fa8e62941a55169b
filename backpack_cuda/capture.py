"""From a layer's backward to results on its parameters: the autograd functions and the bookkeeping of a backward pass.

A layer's forward runs inside one of the two functions below, whose backward asks the active `backpack(...)` context
what is wanted and forms it, together with the ordinary gradient, in one call. Nothing but what autograd saves is kept.
"""

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import _get_grad_fn_or_grad_acc
from torch.utils import _pytree as pytree

from backpack_cuda.authored import OpenCalls, authored, is_authored, keeps_any
from backpack_cuda.autocast import autocast_enabled, without_autocast
from backpack_cuda.context import CTX, State, current, is_authoring, is_batching, is_disabled, is_sweeping
from backpack_cuda.extensions.first_order import FirstOrderExtension
from backpack_cuda.extensions.kronecker import KFAC
from backpack_cuda.extensions.second_order import SecondOrderExtension
from backpack_cuda.per_sample import ColumnUse, NoKroneckerFactors, NoPerSampleGradients, Use
from backpack_cuda.per_sample.dense import merge
from backpack_cuda.stats import Stats, Want

# A node's `sweeping` where torch differentiates in the parameters inside of modules.
TO_PARAMETERS = "to parameters"
IO_FLAG = "_backpack_store_io"  # attribute of modules extended with store_io=True


def capturing(*inputs) -> bool:
    """Whether a forward pass on `inputs` must prepare for quantities, rather than run torch's own layer untouched.

    Not without a graph, not inside `disable()`, not under tracers and function transforms, which take the layers apart
    themselves (a sweep's own transform is not meant), and not for inputs that quantities are not defined for (complex,
    nested or sparse ones).
    """
    return (
        torch.is_grad_enabled()
        and all(map(_has_quantities, inputs))
        and not torch.compiler.is_compiling()
        and not (current().disabled and is_disabled())
        and (torch._C._functorch.peek_interpreter_stack() is None or is_batching())
        and torch.autograd.forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


def _has_quantities(input) -> bool:
    """Whether quantities are defined for a layer with such an input; where they are asked for and not, a warning."""
    if not isinstance(input, Tensor):
        return False  # a tracer's stand-in
    if input.is_complex() or input.layout != torch.strided:
        if CTX.get_active_exts():
            kind = input.dtype if input.is_complex() else f"{input.layout} layout"
            warnings.warn(f"no results for a layer whose input has {kind}: a dense real tensor is needed", stacklevel=4)
        return False
    return True


class LayerOperation(Protocol):
    """A layer's forward and backward as plain functions of tensors; without state, so that it can be shared.

    One whose output is linear in weight and bias, with a backward that is exactly the transpose, says so by an
    attribute `bias_dim`, the output's dimension that the bias lies along: `curvature/products.py` uses it.
    """

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""

    def to_save(self, input: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        """Input and weight for the backward pass, None where torch's layer does not keep them."""

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """torch's gradients of (input, weight, bias), None where `needs` is False."""

    def use(self, input: Tensor, grad_output: Tensor) -> Use:
        """The per-sample gradients of weight and bias.

        An entry of the weight acts on an entry of the output through one entry of the input, or none. Where the use
        leaves out the gradient of the weight, `backward` is asked for it.
        """

    def use_of_squares(self, input: Tensor, grad_output: Tensor) -> Use:
        """As `use`, of the squares of the entries through which the weight acts."""

    def columns(self, input: Tensor, columns: Tensor) -> ColumnUse:
        """The same for V output gradients of every sample, columns [V, *grad_output]."""

    def original_input(self, input: Tensor) -> Tensor:
        """The module's input from the one that `forward` got."""


def reached(node) -> bool | None:
    """Whether the running backward pass forms the gradient that `node` receives; None where torch does not say."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf, in torch.autograd.grad()
        return None


def _asked_for(accumulator) -> bool:
    """Whether the running backward pass forms the gradient of the parameter with this gradient accumulator."""
    return reached(accumulator) is not False  # torch refuses to say it of leaves that torch.autograd.grad() asked for


def in_operand_types(backward: Callable) -> Callable:
    """Backward passes run in the types of their operands, also when called inside an autocast region."""

    @functools.wraps(backward)
    def run(ctx, *grad_outputs):
        known = next((grad for grad in grad_outputs if grad is not None), None)
        with contextlib.nullcontext() if known is None else without_autocast(known.device.type):
            return backward(ctx, *grad_outputs)

    return run


class LayerFunction(torch.autograd.Function):
    """A layer with a factorised per-sample gradient. Its kernel call replaces the ordinary weight gradient's."""

    @staticmethod
    def forward(ctx, input, weight, bias, module, operation):
        saved_input, saved_weight = operation.to_save(input, weight, ctx.needs_input_grad)
        ctx.save_for_backward(saved_input, saved_weight)
        ctx.module = module
        ctx.operation = operation
        ctx.sweeping = False  # whether curvature/ pushes columns or directions through
        own = module._parameters
        ctx.parameters = (("weight", own["weight"]), ("bias", own.get("bias")))  # they may be replaced later
        return operation.forward(input, weight, bias)

    @staticmethod
    @in_operand_types
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        module, operation = ctx.module, ctx.operation
        # A backward pass that was asked for some gradients only (`inputs=...`) does not reach every edge.
        needs_input, needs_weight, needs_bias = needs = [
            need and reached(ctx.next_functions[edge][0]) is not False
            for edge, need in enumerate(ctx.needs_input_grad[:3])
        ]
        if ctx.sweeping:
            return (*operation.backward(grad_output, input, weight, needs), None, None)
        now = current()
        requested = now.extensions and (needs_weight or needs_bias)
        if now.authoring or (not requested and (now.sweeping or not _is_attended(module, now))):
            return (*operation.backward(grad_output, input, weight, needs), None, None)

        parameters = parameters_of(ctx) if requested else {}
        state = Pass.current(ctx)
        state.check_covered(module, parameters)
        first_order = state.forms_from_gradients
        if not first_order and not _is_attended(module, now):
            return (*operation.backward(grad_output, input, weight, needs), None, None)
        use = operation.use(input, grad_output)
        # Gradients that must be differentiable, or of a parameter with further uses, come from torch.
        fused = first_order and not torch.is_grad_enabled() and not state.shared(ctx, parameters.values())
        gradients = _record(state, ctx, module, use, parameters, operation.original_input(input), fused)
        grad_weight, grad_bias = gradients.get("weight"), gradients.get("bias")
        missing = (needs_input, needs_weight and grad_weight is None, needs_bias and grad_bias is None)
        grad_input, stock_weight, stock_bias = operation.backward(grad_output, input, weight, missing)
        return (
            grad_input,
            stock_weight if grad_weight is None else grad_weight,
            stock_bias if grad_bias is None else grad_bias,
            None,
            None,
        )


# Function.apply() without its preparations for function transforms, under which LayerFunction never runs.
apply_layer = super(torch.autograd.Function, LayerFunction).apply


def parameters_of(node) -> dict[str, nn.Parameter]:
    """The parameters of a layer's or observer's node that the running backward pass is asked for.

    None that was frozen since the forward pass: torch forms no gradient for those either.
    """
    if isinstance(node, LayerFunction._backward_cls):
        return {
            name: parameter
            for edge, (name, parameter) in enumerate(node.parameters, start=1)
            if node.needs_input_grad[edge] and parameter.requires_grad and _asked_for(node.next_functions[edge][0])
        }
    parameters = node.observation.parameters
    return {name: p for name, p in parameters.items() if p.requires_grad and _asked_for(_get_grad_fn_or_grad_acc(p))}


class PulledBack(Protocol):
    """What V output gradients of a module's call become; formed when it is asked for."""

    def use(self) -> Use:
        """The per-sample gradients, of V = 1."""

    def columns(self) -> ColumnUse:
        """The same for all V."""

    def gradients(self, names: Sequence[str]) -> list[Tensor]:
        """[V, *input] of each named input."""


class Replay(Protocol):
    """A module's call whose backward pass is known, for V output gradients at once; keeps what several share."""

    def pull_back(self, columns: Sequence[Tensor | None], count: int, keep: bool = False) -> PulledBack:
        """From V = `count` gradients [V, *output] of each output, None for zeros.

        With `keep` the next call returns the same again if it gets the same tensors.
        """


class ReplayRule(NamedTuple):
    """How to replay a module's call."""

    form: Callable[..., Replay]  # of (observation, args, kwargs)
    batch_size: int
    column_bytes: int  # that one output gradient takes on its way back


class Observation(NamedTuple):
    """A module's call whose output gradients are asked for: what is needed to form its per-sample gradients later."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    positions: list[int]  # of the differentiated tensors among the output's leaves
    form: Callable[..., Use]  # of (observation, args, kwargs, grad_outputs)
    rebuild_inputs: Callable[[tuple[Tensor, ...]], tuple[tuple, dict]]  # saved tensors -> args, kwargs
    autocast: torch.dtype | None  # autocast's type during the call
    rule: ReplayRule | None  # None: torch's own backward pass is the only one known
    edges: tuple[str, ...]  # with a rule, the inputs and parameters whose gradients the replay can form


class ObserverFunction(torch.autograd.Function):
    """Hands on a module's outputs, and their gradients to an observation.

    The ordinary gradients come from torch's own backward pass behind it; or, where a replay has to run anyway, from
    that, on edges past torch's graph, which gets no gradients then.
    """

    @staticmethod
    def forward(ctx, observation, inputs, *tensors):
        ctx.save_for_backward(*inputs)
        ctx.observation = observation
        ctx.sweeping = False
        ctx.replay = None
        ctx.set_materialize_grads(observation.rule is None)
        # detach(): a new tensor on the same storage that may be changed in place later, unlike an input handed on.
        outputs = tuple(output.detach() for output in tensors[: len(observation.positions)])
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @in_operand_types
    def backward(ctx, *grad_outputs):
        observation = ctx.observation
        module = observation.module
        gradients = {}  # of the edges past torch's graph
        if is_authoring():
            pass
        elif ctx.sweeping:
            if observation.rule is not None and ctx.sweeping != TO_PARAMETERS:
                needed = _needed_edges(ctx)
                pulled = _pull_back(replay_of(ctx, ctx.saved_tensors), needed, grad_outputs)
                gradients = dict(zip(needed, pulled, strict=True))
                grad_outputs = (None,) * len(grad_outputs)
        elif not CTX.get_active_exts():
            module_done(module)
        else:
            wanted = parameters_of(ctx)
            if wanted or not is_sweeping():
                saved = ctx.saved_tensors
                args, kwargs = observation.rebuild_inputs(saved)
                state = Pass.current(ctx)
                state.check_covered(module, wanted)
                pulled, fused = None, False
                if observation.rule is None:
                    use = observation.form(observation._replace(parameters=wanted), args, kwargs, grad_outputs)
                else:
                    columns = [None if grad is None else grad[None] for grad in grad_outputs]
                    pulled = replay_of(ctx, saved).pull_back(columns, 1)
                    use = pulled.use()
                    if wanted and state.forms_from_gradients and not torch.is_grad_enabled():
                        fused = not state.shared(ctx, wanted.values())
                gradients = _record(state, ctx, module, use, wanted, args[0] if args else kwargs.get("input"), fused)
                ctx.replay = None
                if fused:
                    inputs = [name for name in _needed_edges(ctx) if name not in observation.parameters]
                    gradients |= dict(zip(inputs, (g[0] for g in pulled.gradients(inputs)), strict=True))
                    grad_outputs = (None,) * len(grad_outputs)
        return (None, None, *grad_outputs, *map(gradients.get, observation.edges))


def _needed_edges(node) -> list[str]:
    """The names of an observer's edges whose gradients the running backward pass needs."""
    edges = node.observation.edges
    first = len(node.next_functions) - len(edges)
    return [name for i, name in enumerate(edges) if reached(node.next_functions[first + i][0]) is not False]


def replay_of(node, saved: tuple[Tensor, ...]) -> Replay:
    """The replay of an observed call with a rule; its node keeps it until its own backward pass is done."""
    create_graph = torch.is_grad_enabled()
    if node.replay is None or node.replay[0] != create_graph:
        observation = node.observation
        node.replay = create_graph, observation.rule.form(observation, *observation.rebuild_inputs(saved))
    return node.replay[1]


class _PullBackFunction(torch.autograd.Function):
    """A replay's gradients of inputs, with columns in the place of torch.vmap's batch dimension."""

    @staticmethod
    def forward(call, *columns):
        return tuple(g[0] for g in call([None if c is None else c[None] for c in columns], 1))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, call, *columns):
        count = info.batch_size
        moved = [
            c if c is None else c.expand(count, *c.shape) if dim is None else c.movedim(dim, 0)
            for c, dim in zip(columns, in_dims[1:], strict=True)
        ]
        found = tuple(call(moved, count))
        return found, (0,) * len(found)


def _pull_back(replay: Replay, names: Sequence[str], columns: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """The gradients of named inputs from one gradient of each output; under torch.vmap from all at once."""

    def call(columns: Sequence[Tensor | None], count: int) -> list[Tensor]:
        return replay.pull_back(columns, count, keep=True).gradients(names)

    if not names:
        return []
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _PullBackFunction.apply(call, *columns)
    return [g[0] for g in call([None if c is None else c[None] for c in columns], 1)]


def without_tensors(args: tuple, kwargs: dict) -> tuple[list[Tensor], Callable[[tuple[Tensor, ...]], tuple]]:
    """A call's tensors, and a function that puts them back to (args, kwargs).

    The tensors are to be saved by autograd, so that they live no longer than the graph.
    """
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    marked = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # the class stands for a tensor

    def rebuild(saved: tuple[Tensor, ...]) -> tuple[tuple, dict]:
        left = iter(saved)
        return pytree.tree_unflatten([next(left) if leaf is Tensor else leaf for leaf in marked], structure)

    return tensors, rebuild


def observe(
    module: nn.Module,
    parameters: dict,
    form: Callable,
    args: tuple,
    kwargs: dict,
    output,
    rule: ReplayRule | None = None,
    edges: dict[str, Tensor] | None = None,
):
    """`output` again, with a node in the graph that hands its gradients to `form` where quantities are wanted.

    `form(observation, args, kwargs, grad_outputs)` returns the per-sample gradients of `parameters`. With a `rule`, its
    replay forms these and the gradients of `edges`, the call's differentiated inputs and parameters by name.
    """
    leaves, structure = pytree.tree_flatten(output)
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not positions:
        unknown = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor | int | float | str | None)}
        if unknown and CTX.get_active_exts():
            warnings.warn(
                f"no results for the parameters of {type(module).__name__}: its output is of the unknown type "
                f"{', '.join(sorted(unknown))}; use tensors, tuples, lists and dicts",
                stacklevel=2,
            )
        return output
    tensors, rebuild_inputs = without_tensors(args, kwargs)
    device_type = leaves[positions[0]].device.type
    autocast = torch.get_autocast_dtype(device_type) if autocast_enabled(device_type) else None
    edges = edges or {}
    observation = Observation(module, parameters, positions, form, rebuild_inputs, autocast, rule, tuple(edges))
    observed = ObserverFunction.apply(observation, tensors, *[leaves[i] for i in positions], *edges.values())
    observed = observed if isinstance(observed, tuple) else (observed,)
    register(observed[0], parameters.values())
    for i, leaf in zip(positions, observed, strict=True):
        leaves[i] = leaf
    return pytree.tree_unflatten(leaves, structure)


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


def _record(
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


def _is_attended(module: nn.Module, now: State) -> bool:
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


def memory_cleanup(module: nn.Module) -> None:
    """Deletes the input and output that a module extended with `store_io=True` holds (`input0`, ..., `output`)."""
    for name in [name for name in module.__dict__ if is_stored(name)]:
        delattr(module, name)


def is_stored(name: str) -> bool:
    """Whether an attribute of this name holds a module's input or output."""
    return name == "output" or (name.startswith("input") and name[len("input") :].isdigit())


def is_taken(module: nn.Module, name: str) -> bool:
    """Whether a module has a child, parameter or buffer of this name."""
    return name in module._modules or name in module._parameters or name in module._buffers


def store(module: nn.Module, attributes: dict[str, object]) -> None:
    """Attributes of a module, which may be tensors or not; none in the place of a child, parameter or buffer.

    Without their graph, which knows the module: it would not be freed without a backward pass.
    """
    for name, value in attributes.items():
        if not is_taken(module, name):
            has_graph = isinstance(value, Tensor) and value.grad_fn is not None
            # Not setattr(), as in run_hook().
            module.__dict__[name] = value.detach() if has_graph else value

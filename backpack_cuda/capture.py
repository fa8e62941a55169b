"""The autograd functions around layers and other modules.

A layer's forward runs inside one of the two functions below, whose backward asks the active `backpack(...)` context
what is wanted and forms it, together with the ordinary gradient, in one call. Nothing but what autograd saves is kept.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import _get_grad_fn_or_grad_acc
from torch.utils import _pytree as pytree

from backpack_cuda.autocast import autocast_enabled, without_autocast
from backpack_cuda.context import CTX, current, is_authoring, is_batching, is_disabled, is_sweeping
from backpack_cuda.passes import Pass, is_attended, module_done, record, register
from backpack_cuda.per_sample import ColumnUse, Use

# A node's `sweeping` where torch differentiates in the parameters inside of modules.
TO_PARAMETERS = "to parameters"


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
        if now.authoring or (not requested and (now.sweeping or not is_attended(module, now))):
            return (*operation.backward(grad_output, input, weight, needs), None, None)

        parameters = parameters_of(ctx) if requested else {}
        state = Pass.current(ctx)
        state.check_covered(module, parameters)
        first_order = state.forms_from_gradients
        if not first_order and not is_attended(module, now):
            return (*operation.backward(grad_output, input, weight, needs), None, None)
        use = operation.use(input, grad_output)
        # Gradients that must be differentiable, or of a parameter with further uses, come from torch.
        fused = first_order and not torch.is_grad_enabled() and not state.shared(ctx, parameters.values())
        gradients = record(state, ctx, module, use, parameters, operation.original_input(input), fused)
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
    if isinstance(node, LAYER_NODE):
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
    samples_first: Callable[[int, Tensor], Tensor]  # of a leaf's position and a tensor like that: [N, *]
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
    # Without a rule, of (observation, args, kwargs, shapes of outputs): the batch's dimension in each, and its size.
    find_batch: Callable[..., tuple[list[int], int]] | None


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
                needed = _needed(ctx, _edges(ctx))
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
                    replays = state.forms_from_gradients or ctx.replay is not None
                    pulled = replay_of(ctx, saved).pull_back(columns, 1)
                    use = pulled.use()
                    if wanted and replays and not torch.is_grad_enabled():
                        fused = not state.shared(ctx, wanted.values())
                gradients = record(state, ctx, module, use, wanted, args[0] if args else kwargs.get("input"), fused)
                ctx.replay = None
                if fused:
                    inputs = _needed(ctx, input_edges(ctx))
                    gradients |= dict(zip(inputs, (g[0] for g in pulled.gradients(inputs)), strict=True))
                    grad_outputs = (None,) * len(grad_outputs)
        return (None, None, *grad_outputs, *map(gradients.get, observation.edges))


# The nodes that both leave in a graph.
LAYER_NODE, OBSERVER_NODE = LayerFunction._backward_cls, ObserverFunction._backward_cls


def module_of(node) -> nn.Module:
    """The module of a layer's or observer's node."""
    return node.module if isinstance(node, LAYER_NODE) else node.observation.module


def _edges(node) -> dict[str, int]:
    """The places of an observer's edges past torch's graph among its operands, by their names."""
    edges = node.observation.edges
    return dict(zip(edges, range(len(node.next_functions) - len(edges), len(node.next_functions)), strict=True))


def input_edges(node) -> dict[str, int]:
    """Those of the call's inputs."""
    return {name: edge for name, edge in _edges(node).items() if name not in node.observation.parameters}


def _needed(node, edges: dict[str, int]) -> list[str]:
    """The names of those edges whose gradients the running backward pass needs."""
    return [name for name, edge in edges.items() if reached(node.next_functions[edge][0]) is not False]


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
    find_batch: Callable | None = None,
):
    """`output` again, with a node in the graph that hands its gradients to `form` where quantities are wanted.

    `form(observation, args, kwargs, grad_outputs)` returns the per-sample gradients of `parameters`. With a `rule`, its
    replay forms these and the gradients of `edges`, the call's differentiated inputs and parameters by name. Without
    one, `find_batch(observation, args, kwargs, shapes)` tells where in outputs of these shapes the batch is.
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
    observation = Observation(
        module, parameters, positions, form, rebuild_inputs, autocast, rule, tuple(edges), find_batch
    )
    observed = ObserverFunction.apply(observation, tensors, *[leaves[i] for i in positions], *edges.values())
    observed = observed if isinstance(observed, tuple) else (observed,)
    register(observed[0], parameters.values())
    for i, leaf in zip(positions, observed, strict=True):
        leaves[i] = leaf
    return pytree.tree_unflatten(leaves, structure)

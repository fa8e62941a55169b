"""Products with the curvature blocks of single parameters, as linear maps that the backward pass records.

With t(z) = d/dh sum_q <g_q(h), z_q>, the derivative of gradients g_q in directions z_q, torch records a graph that is
linear in z; its reverse mode is the transposed map. That turns three derivatives into products:

* Hessian: with g_q = dl/dy_q, h(z)_p = d/dy_p sum_q <g_q, z_q>. The Hessian is symmetric, so that reverse mode from h_p
  to z_p multiplies with its block.
* Jacobian: with g_q(u) = J_q^T u from a direction u at the prediction, reverse mode from g_p to u multiplies with J_p.
* Transposed Jacobian: t(z) = d/du sum_q <g_q(u), z_q> = sum_q J_q z_q; reverse mode from t to z_p.

The directions enter at the layers' outputs y rather than at the parameters, where a layer is linear in these and uses
them alone: no gradient of a weight is formed then, and J_p continues with the layer itself, applied to v as its weight.
Everywhere else (tied weights, any module without a rule) they enter at the parameter.

Recording happens while the backward pass runs, since it frees what its graph saved. The directions live on a level of
their own of torch's function transforms: the recorded graph contains what depends on them and nothing else, so that it
keeps neither the model's graph alive nor the parameters (which hold the products: a cycle that nobody would collect).
What it needs beyond directions are constants (`_Constants`), of which those that are parameters are copied.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch.eager_transforms import _create_differentiable
from torch.autograd.graph import GradientEdge, Node

from backpack_cuda.autocast import without_autocast
from backpack_cuda.capture import LAYER_NODE, OBSERVER_NODE, TO_PARAMETERS, module_of, parameters_of
from backpack_cuda.context import CTX, batching, sweeping
from backpack_cuda.curvature.losses import LossHessian
from backpack_cuda.curvature.memory import CACHED, default_budget
from backpack_cuda.curvature.own_pass import in_own_pass
from backpack_cuda.curvature.pull_back import keeping_retained_gradient
from backpack_cuda.curvature.residuals import residual_curvatures
from backpack_cuda.extensions.products import HMP, PCHMP, ProductExtension
from backpack_cuda.passes import Pass

Map = Callable[[Tensor], Tensor | None]  # linear; None for zeros
Result = TypeVar("Result")


# ---------------------------------------------------------------------------------------------------------------------
# What a recorded graph keeps
# ---------------------------------------------------------------------------------------------------------------------


class _Constant:
    """A tensor that a recorded map multiplies with."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.version: int | None = None

    def remember_version(self) -> None:
        """From now on a change in place is an error."""
        self.version = None if self.tensor.is_inference() else self.tensor._version

    def __call__(self) -> Tensor:
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                f"curvature product: a tensor of size {list(self.tensor.shape)} that it needs was changed in place "
                "after the backward pass that formed it (the model's input, an activation or a buffer); run forward "
                "and backward again, or do not change the tensor while the product is used"
            )
        return self.tensor


class _Constants:
    """All that a recording keeps, as hooks for what autograd saves.

    Args:
        changing: parameters and running statistics, which change between backward passes (the latter without a sign of
            it): the maps keep copies of those they need.
        attached: leave the layers' inputs differentiable, for `create_graph=True`.
        copies: by the original's address the copies so far, for all recordings of a loss.
    """

    def __init__(self, changing: Sequence[Tensor], attached: bool, copies: dict[int, torch.UntypedStorage]):
        self._pointers = {t.untyped_storage().data_ptr() for t in changing if t.layout == torch.strided}
        self._attached = attached
        self._copies = copies
        self._found: list[_Constant] = []

    def keep(self, tensor: Tensor) -> _Constant:
        """What autograd saves; it knows itself what the tensor depends on."""
        while _functorch.is_gradtrackingtensor(tensor):
            tensor = _functorch.get_unwrapped(tensor)
        constant = _Constant(tensor)
        self._found.append(constant)
        return constant

    def keep_input(self, tensor: Tensor) -> _Constant:
        """What a layer multiplies with."""
        constant = _Constant(tensor)
        if self._attached:
            constant.remember_version()
        else:
            self._found.append(constant)
        return constant

    def finish(self) -> None:
        """Detaches all from the model's graph and its parameters. Not while a level is open."""
        for constant in self._found:
            constant.tensor = self._own(constant.tensor.detach())
            constant.remember_version()
        self._found.clear()

    def _own(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or tensor.is_mkldnn:
            return tensor
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self._pointers:
            return tensor
        if pointer not in self._copies:
            self._copies[pointer] = storage.clone()
        own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return own.set_(self._copies[pointer], tensor.storage_offset(), tensor.shape, tensor.stride())


@contextlib.contextmanager
def _recording(constants: _Constants, apart: bool) -> Iterator[Callable[[Sequence[Tensor]], list[Tensor]]]:
    """Yields a function that makes directions of the given zeros, from which on torch records.

    Args:
        constants: what the recorded graph keeps.
        apart: on a level of its own, so that the recorded graph holds nothing but what depends on directions. Else it
            is attached to the model's graph, as `create_graph=True` needs it, and activation checkpointing, whose
            segments cannot run again on a level.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks(constants.keep, _Constant.__call__)
    if not apart:
        with torch.enable_grad(), hooks:
            yield lambda zeros: [zero.requires_grad_() for zero in zeros]
        return
    with torch.no_grad():  # of the model's graph
        level = _functorch._grad_increment_nesting()
    try:
        with torch.enable_grad(), hooks, batching():
            yield lambda zeros: _create_differentiable([_functorch._wrap_for_grad(z, level) for z in zeros], level)
    finally:
        _functorch._grad_decrement_nesting()


# ---------------------------------------------------------------------------------------------------------------------
# Where directions enter
# ---------------------------------------------------------------------------------------------------------------------


class _AtParameter:
    """A parameter that is perturbed itself."""

    def __init__(self, parameter: nn.Parameter):
        self.edge: GradientEdge | Tensor = parameter
        self.metadata = parameter
        self.parameters = [parameter]

    def keep(self, constants: _Constants) -> None:
        """Nothing: the parameter's Jacobian is the identity."""

    def maps(self, parameter: nn.Parameter) -> tuple[Map, Map]:
        """From the parameter to here, and its transpose."""
        return (lambda v: v), (lambda w: w)


class _AtOutput:
    """The output of a layer, which is linear in those of its parameters that are used nowhere else."""

    def __init__(self, node, parameters: dict[str, nn.Parameter]):
        self.node = node
        self.edge = GradientEdge(node, 0)
        self.metadata = node._input_metadata[0]
        self.by_name = parameters
        self.parameters = list(parameters.values())

    def keep(self, constants: _Constants) -> None:
        input, _ = self.node.saved_tensors
        self.input = None if input is None else constants.keep_input(input)

    def maps(self, parameter: nn.Parameter) -> tuple[Map, Map]:
        """From the parameter to here, and its transpose."""
        operation, input = self.node.operation, self.input
        shape, dtype = self.metadata.shape, self.metadata.dtype
        (name,) = (name for name, other in self.by_name.items() if other is parameter)
        size, parameter_dtype = parameter.shape, parameter.dtype
        if name == "bias":
            dim = operation.bias_dim % len(shape)
            others = [d for d in range(len(shape)) if d != dim]

            def push(v: Tensor) -> Tensor:
                return v.to(dtype).view(-1, *(1,) * (len(shape) - 1 - dim)).expand(shape)

            def pull(w: Tensor) -> Tensor:
                return (w.sum(others) if others else w).to(parameter_dtype)

        else:

            def push(v: Tensor) -> Tensor:
                return operation.forward(input(), v.to(dtype), None)

            def pull(w: Tensor) -> Tensor:
                x = input()
                like = torch.empty((), dtype=x.dtype, device=x.device).expand(size)  # of which the size counts alone
                return operation.backward(w, x, like, (False, True, False))[1].to(parameter_dtype)

        return push, pull


_Place = _AtParameter | _AtOutput


class _Graph:
    """The layers of a graph, and where the directions of their parameters enter."""

    def __init__(self, root: Node, copies: dict[int, torch.UntypedStorage]):
        self._copies = copies  # of what recordings keep
        self.nodes: list[Node] = []  # of all layers and observers
        self.layers: dict[Node, dict[str, nn.Parameter]] = {}  # with their parameters that are asked for
        self.batch_norms: list[Node] = []
        self.has_weight_norm = False
        outside: set[int] = set()  # ids of the leaves that are reached from outside of layers with a rule
        self._walk(root, outside)
        uses: dict[int, int] = {}
        for parameters in self.layers.values():
            for parameter in parameters.values():
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        self.places: list[_Place] = []
        placed: set[int] = set()
        for node, parameters in self.layers.items():
            alone = {}
            if isinstance(node, LAYER_NODE) and hasattr(node.operation, "bias_dim"):
                alone = {n: p for n, p in parameters.items() if uses[id(p)] == 1 and id(p) not in outside}
            if alone:
                self.places.append(_AtOutput(node, alone))
            for name, parameter in parameters.items():
                if name not in alone and id(parameter) not in placed:
                    placed.add(id(parameter))
                    self.places.append(_AtParameter(parameter))

    def _walk(self, root: Node, outside: set[int]) -> None:
        visited, stack = {None}, [root]
        while stack:
            node = stack.pop()
            if node in visited:
                continue
            visited.add(node)
            following = node.next_functions
            if isinstance(node, LAYER_NODE | OBSERVER_NODE):
                self.nodes.append(node)
                parameters = parameters_of(node)
                if parameters:
                    self.layers[node] = parameters
                if isinstance(node, LAYER_NODE):
                    following = following[:1]  # of the input
            elif node.name() == "torch::autograd::AccumulateGrad":
                outside.add(id(node.variable))
            elif node.name() == "CheckpointFunctionBackward":
                raise NotImplementedError(
                    "torch.utils.checkpoint with use_reentrant=True hides its layers from the graph: curvature "
                    "products need use_reentrant=False"
                )
            elif "WeightNormInterface" in node.name():
                self.has_weight_norm = True
            elif "BatchNorm" in node.name():
                self.batch_norms.append(node)
            stack.extend(operand for operand, _ in following)

    def constants(self, attached: bool) -> _Constants:
        """For a recording in this graph, with what the layers' Jacobians need. Each saved tensor is read once."""
        changing: list[Tensor] = [p for parameters in self.layers.values() for p in parameters.values()]
        for node in self.nodes:
            changing += module_of(node).parameters()

        def read() -> _Constants:
            for node in self.batch_norms:
                statistics = (getattr(node, f"_saved_running_{name}", None) for name in ("mean", "var"))
                changing.extend(tensor for tensor in statistics if tensor is not None)
            constants = _Constants(changing, attached, self._copies)
            for place in self.places:
                place.keep(constants)
            return constants

        return in_own_pass(read)

    def width_after(self, place: _Place) -> int:
        """Bytes that a direction takes at the outputs of all layers that it may pass: those called later."""
        users = [
            n for n, parameters in self.layers.items() if any(p is place.parameters[0] for p in parameters.values())
        ]
        first = min(node._sequence_nr() for node in users)
        held = [m for node in self.nodes if node._sequence_nr() >= first for m in node._input_metadata]
        return sum(prod(m.shape) * m.dtype.itemsize for m in held)

    @contextlib.contextmanager
    def marked(self, prediction: Tensor) -> Iterator[None]:
        """The layers' backward passes inside form no quantities, and the prediction retains no gradient of theirs."""
        for node in self.nodes:
            node.sweeping = TO_PARAMETERS
        try:
            with sweeping(), keeping_retained_gradient(prediction):
                yield
        finally:
            for node in self.nodes:
                node.sweeping = False


def _zeros(places: Sequence) -> list[Tensor]:
    """Zeros like the tensors that edges' metadata (or tensors) describe."""
    return [torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in places]


def _grad(outputs, inputs, grad_outputs) -> list[Tensor | None]:
    """Differentiable gradients, None where an input is not reached."""
    return list(
        torch.autograd.grad(outputs, inputs, grad_outputs, retain_graph=True, create_graph=True, allow_unused=True)
    )


def _depends(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Recording
# ---------------------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """Curvature at a tensor between parameters and loss."""

    edge: GradientEdge
    curvature: dict[int, Map]  # by the id of the extension: the product with the curvature there


def _hessian_maps(loss: GradientEdge, grad_output: Tensor, graph: _Graph, attached: bool, apart: bool) -> list[Map]:
    """For every place the product with the loss' Hessian with respect to the tensor there."""
    places = graph.places
    constants = graph.constants(attached)
    zeros = _zeros([place.metadata for place in places])
    with torch.enable_grad():
        gradients = _grad(loss, [place.edge for place in places], grad_output)
    curved = [i for i, gradient in enumerate(gradients) if _depends(gradient)]
    maps: list[Map] = [_nothing] * len(places)
    if curved:
        with _recording(constants, apart) as directions:
            z = directions([zeros[i] for i in curved])
            h = _grad([gradients[i] for i in curved], [places[i].edge for i in curved], z)
        for i, h_i, z_i in zip(curved, h, z, strict=True):
            if _depends(h_i):
                maps[i] = _transposed(h_i, z_i)
    constants.finish()
    return maps


def _nothing(v: Tensor) -> None:
    """The product with a matrix of zeros."""


def _transposed(output: Tensor, direction: Tensor) -> Map:
    """The transpose of the recorded map from `direction` to `output`."""

    def product(v: Tensor) -> Tensor | None:
        create_graph = torch.is_grad_enabled()
        (found,) = torch.autograd.grad(
            output, direction, v, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return found

    return product


def _sandwich_maps(sources: Sequence[_Source], graph: _Graph, attached: bool, apart: bool) -> dict[int, list[Map]]:
    """By the id of an extension for every place sum_s J_s^T C_s J_s, with the Jacobians J_s of the sources' tensors."""
    places = graph.places
    constants = graph.constants(attached)
    zeros_z = _zeros([place.metadata for place in places])
    starts = [source.edge for source in sources]
    zeros_u = _zeros([edge.node._input_metadata[edge.output_nr] for edge in starts])
    with _recording(constants, apart) as directions:
        u = directions(zeros_u)
        g = _grad(starts, [place.edge for place in places], u)
        reached = [i for i, gradient in enumerate(g) if _depends(gradient)]
        z = directions([zeros_z[i] for i in reached])
        t = _grad([g[i] for i in reached], u, z) if reached else []
    constants.finish()
    by_extension: dict[int, list[Map]] = {}
    for key in dict.fromkeys(key for source in sources for key in source.curvature):
        chosen = [s for s in range(len(t)) if key in sources[s].curvature and _depends(t[s])]
        maps: list[Map] = [_nothing] * len(places)
        if chosen:
            curvatures = [sources[s].curvature[key] for s in chosen]
            for i, z_i in zip(reached, z, strict=True):
                maps[i] = _sandwich(g[i], [u[s] for s in chosen], curvatures, [t[s] for s in chosen], z_i)
        by_extension[key] = maps
    return by_extension


def _sandwich(g: Tensor, u: list[Tensor], curvatures: list[Map], t: list[Tensor], z: Tensor) -> Map:
    """v -> sum_s J_s^T C_s J_s v, from the recorded u -> g = sum_s J_s^T u_s and z -> t_s = J_s z."""

    def product(v: Tensor) -> Tensor | None:
        create_graph = torch.is_grad_enabled()
        tangents = torch.autograd.grad(g, u, v, retain_graph=True, create_graph=create_graph, allow_unused=True)
        outputs, weighted = [], []
        for tangent, curvature, output in zip(tangents, curvatures, t, strict=True):
            if tangent is not None:
                outputs.append(output)
                weighted.append(curvature(tangent))
        if not outputs:
            return None
        (found,) = torch.autograd.grad(
            outputs, z, weighted, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return found

    return product


def _loss_curvature(hessian: LossHessian, factor: Tensor | None) -> Map:
    """The product with `factor` times the Hessian of the loss at the prediction."""
    unscaled = hessian.product()
    if factor is None:
        return unscaled
    return lambda u: unscaled(u) * factor.to(u.dtype)


def _residual_curvature(curvature: Tensor, modify: str) -> Map:
    """The product with a diagonal made non-negative."""
    diagonal = curvature.abs() if modify == "abs" else curvature.clamp(min=0)
    return lambda u: (diagonal * u).to(u.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# What parameters get
# ---------------------------------------------------------------------------------------------------------------------


class _Summand(NamedTuple):
    """What one loss contributes to a parameter's product: pull(curvature(push(v)))."""

    push: Map
    curvature: Map
    pull: Map

    def __call__(self, v: Tensor) -> Tensor:
        """[*P] -> [*P]."""
        found = self.curvature(self.push(v))
        return torch.zeros_like(v) if found is None else self.pull(found)


class CurvatureProduct:
    """Multiplies vectors with a parameter's block of a curvature matrix.

    Args of a call:
        mat: [V, *P] or [*P], of the parameter's type and device.

    Returns of a call:
        The product of each vector, of the same size. Differentiable in `mat`, and in the parameters if the backward
        pass ran under `create_graph=True`.

    Raises:
        TypeError: `mat` is no tensor.
        ValueError: another size, type or device.
        RuntimeError: a tensor that the product needs was changed in place since the backward pass.
    """

    def __init__(self, name: str, parameter: Tensor, summands: list[_Summand], width: int, attached: bool):
        self._name = name
        self._shape, self._dtype, self._device = parameter.shape, parameter.dtype, parameter.device
        self._summands = summands
        self._width = width  # bytes that a vector takes at the layers' outputs
        self._attached = attached

    def __call__(self, mat: Tensor) -> Tensor:
        self._check(mat)
        differentiable = torch.is_grad_enabled() and (self._attached or mat.requires_grad)
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(differentiable),
            without_autocast(self._device.type),
        ):
            if mat.dim() == len(self._shape):
                return self._single(mat)
            if differentiable or len(mat) < 2:
                return self._one_by_one(mat)
            step = self._step()
            with contextlib.suppress(Exception), warnings.catch_warnings():  # an operation without batching rule
                warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
                parts = [self._vectorised(part) for part in mat.split(step)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            return self._one_by_one(mat)

    def _check(self, mat: Tensor) -> None:
        if not isinstance(mat, Tensor):
            raise TypeError(f"{self._name}: expected a Tensor, got {type(mat).__name__}")
        shape = list(self._shape)
        if mat.shape != self._shape and mat.shape[1:] != self._shape:
            raise ValueError(f"{self._name}: expected a tensor [V, *P] or [*P] with P = {shape}, got {list(mat.shape)}")
        if mat.dtype != self._dtype or mat.device != self._device:
            raise ValueError(
                f"{self._name}: expected the parameter's type {self._dtype} on {self._device}, got {mat.dtype} on "
                f"{mat.device}"
            )

    def _single(self, v: Tensor) -> Tensor:
        """[*P] -> [*P]."""
        result = self._summands[0](v)
        for summand in self._summands[1:]:
            result = result + summand(v)
        return result

    def _one_by_one(self, mat: Tensor) -> Tensor:
        return torch.stack([self._single(v) for v in mat]) if len(mat) else torch.zeros_like(mat)

    def _vectorised(self, mat: Tensor) -> Tensor:
        return torch.func.vmap(self._single)(mat) if len(mat) > 1 else self._one_by_one(mat)

    def _step(self) -> int:
        """How many vectors to multiply at a time."""
        budget = CTX.get_memory_budget()
        if budget is None:
            budget = default_budget(self._device) if self._device.type == "cuda" else CACHED
        return max(1, budget // max(self._width, 1))

    def __reduce__(self):
        # Copies of a model, and what is loaded from a file, have no backward pass behind them.
        return _Lost, (self._name,)

    def __repr__(self) -> str:
        return f"{self._name} of a parameter {list(self._shape)}"


class _Lost:
    """Stands for a product in copies and files."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, mat: Tensor) -> Tensor:
        raise RuntimeError(f"{self._name}: products are not copied or saved; run backward() of this model")


def form_products(
    extensions: Sequence[ProductExtension],
    loss: GradientEdge,
    grad_output: Tensor,
    prediction: Tensor,
    hessian: LossHessian | None,
    factor: Tensor | None,
    grad_prediction: Callable[[], Tensor],
    state: Pass,
) -> None:
    """Saves the products of all parameters that the running backward pass is asked for, with what one loss adds.

    Args:
        extensions: the active ones.
        loss: where the graph of the loss' value starts.
        grad_output: the gradient there.
        prediction: the loss' first argument.
        hessian: the loss' Hessian; None if `HMP` is all that is active.
        factor: what the Hessian is multiplied by; None for 1.
        grad_prediction: forms the gradient at the prediction.
        state: of the running backward pass.
    """
    attached = torch.is_grad_enabled()
    of_hessian = [ext for ext in extensions if isinstance(ext, HMP)]
    others = [ext for ext in extensions if not isinstance(ext, HMP)]
    copies: dict[int, torch.UntypedStorage] = {}
    try:
        if of_hessian:
            graph = _Graph(loss.node, copies)
            of_hessian[0].check_reached(graph.places)
            if graph.has_weight_norm:
                raise NotImplementedError(
                    f"{of_hessian[0]}: torch's second derivatives of weight normalisation are wrong; parametrise the "
                    "weight by g * v / v.norm() in operations of your own, or freeze its parameters. GGNMP allows it"
                )
            with graph.marked(prediction):
                maps = _apart_if_possible(partial(_hessian_maps, loss, grad_output, graph), attached)
            for ext in of_hessian:
                _save(ext, graph, maps, state, attached)
        if others:
            graph = _Graph(prediction.grad_fn, copies)
            others[0].check_reached(graph.places)
            with graph.marked(prediction):
                sources = _sources(others, hessian, factor, grad_prediction, graph)
                by_extension = _apart_if_possible(partial(_sandwich_maps, sources, graph), attached)
            for ext in others:
                _save(ext, graph, by_extension[id(ext)], state, attached)
    except RuntimeError as error:
        _raise_readable(extensions[0], error)


def _apart_if_possible(record: Callable[[bool, bool], Result], attached: bool) -> Result:
    """`record(attached, apart)`, apart from the model's graph unless the products are to be differentiable.

    Nor can a checkpointed segment run its layers again on a level, or torch unpack a PackedSequence, whose batch sizes
    it reads from memory that a level hides; attached to the graph they can.
    """
    if not attached:
        try:
            return record(attached, True)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ("_SingleLevelFunction", "Cannot access data pointer")):
                raise
    return record(attached, False)


def _sources(
    extensions: Sequence[ProductExtension],
    hessian: LossHessian,
    factor: Tensor | None,
    grad_prediction: Callable[[], Tensor],
    graph: _Graph,
) -> list[_Source]:
    """The prediction, and for `PCHMP` the elementwise functions' inputs."""
    prediction = hessian.prediction
    # A factor that was not waited for may be negative: NaN, as the square roots of other quantities.
    positive = factor if factor is None else torch.where(factor < 0, torch.nan, factor)
    of_loss = {id(ext): _loss_curvature(hessian, positive if ext.needs_convex_loss else factor) for ext in extensions}
    sources = [_Source(GradientEdge(prediction.grad_fn, prediction.output_nr), of_loss)]
    with_residuals = [ext for ext in extensions if isinstance(ext, PCHMP)]
    if with_residuals:
        for edge, curvature in residual_curvatures(prediction, grad_prediction(), graph.layers):
            by_modification = {m: _residual_curvature(curvature, m) for m in {ext.modify for ext in with_residuals}}
            sources.append(_Source(edge, {id(ext): by_modification[ext.modify] for ext in with_residuals}))
    return sources


def _save(ext: ProductExtension, graph: _Graph, maps: Sequence[Map], state: Pass, attached: bool) -> None:
    """Adds what a loss contributes to the products so far."""
    for place, curvature in zip(graph.places, maps, strict=True):
        width = graph.width_after(place)
        for parameter in place.parameters:
            push, pull = place.maps(parameter)
            key = (id(parameter), id(ext))
            summands = [*state.curvature.get(key, ()), _Summand(push, curvature, pull)]
            state.curvature[key] = summands
            state.save(parameter, ext, CurvatureProduct(str(ext), parameter, summands, width, attached))


_NOT_TWICE = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented|twice .*once_differentiable")


def _raise_readable(ext: ProductExtension, error: RuntimeError) -> None:
    """Raises `error`, or what to do about a function that torch differentiates only once."""
    found = _NOT_TWICE.search(str(error))
    if found is None:
        raise error
    name = (found.group(1) or "an autograd function marked as once_differentiable").removesuffix("_backward")
    if "attention" in name:
        way = "run the forward pass inside torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    elif "cudnn" in name:
        way = "run the forward pass inside torch.backends.cudnn.flags(enabled=False)"
    elif "mkldnn" in name:
        way = "run the forward pass inside torch.backends.mkldnn.flags(enabled=False)"
    else:
        way = "replace it by operations that can be, or freeze the parameters that it depends on"
    raise NotImplementedError(f"{ext}: torch cannot differentiate the backward pass of {name}; {way}") from error

"""Where a Hessian differs from the generalised Gauss-Newton matrix: the elementwise non-linear functions of a graph.

With J_s the Jacobian from the parameters to a tensor s, the Hessian of the total loss l of a prediction f is

    J_f^T (d2l/df2) J_f + sum over the functions y = phi(x) of J_x^T diag(phi''(x) dl/dy) J_x

where every other function between parameters and prediction is linear, or piecewise linear, in whatever depends on a
parameter, and every phi acts elementwise. This module finds them in the autograd graph and forms their diagonals. A
function that is not known (functions.py) is an error.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import product
from math import prod
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, _get_grad_fn_or_grad_acc
from torch.utils.checkpoint import CheckpointFunction

from backpack_cuda.capture import OBSERVER_NODE, LayerFunction, ObserverFunction, module_of
from backpack_cuda.curvature.functions import (
    BATCH_NORMS,
    ELEMENTWISE,
    LINEAR,
    LINEAR_BUT_IN,
    LINEAR_IF,
    PRODUCTS,
    STEPS,
    Saved,
    function_name,
    operand_metadata,
    readable_name,
)
from backpack_cuda.curvature.own_pass import in_own_pass
from backpack_cuda.curvature.square_root import SquareRoot
from backpack_cuda.stats import statistics_dtype


class ResidualSource(NamedTuple):
    """The curvature that one elementwise function adds to the Hessian, at its input x."""

    edge: GradientEdge  # of x, where the columns start
    curvature: Tensor  # [*x], phi''(x) dl/dy
    root: SquareRoot  # of its diagonal matrix: columns one-hot in a feature of x, the curvature itself as signs
    deeper: bool  # whether x depends on more than the layer whose output it is, or is none
    name: str  # of the function, for messages


# ---------------------------------------------------------------------------------------------------------------------
# The walk through the graph
# ---------------------------------------------------------------------------------------------------------------------


def _module_name(layer: Node) -> str:
    return type(module_of(layer)).__name__


Layers = Mapping[Node, Mapping[str, Tensor]]  # the layers' nodes -> their parameters by name


class _Source(NamedTuple):
    """An elementwise function that is not linear in one of its operands."""

    node: Node
    operand: int
    dependence: int
    second_derivative: Callable[[Saved], Tensor]


class _Walk:
    """Which parameters each node of a graph depends on, as the bits of an integer; two bits for each parameter.

    The lower half of the bits stands for parameters that are reached past their layers' nodes, the upper half for those
    reached through them: columns of a square root get to a parameter through its layer alone.
    """

    def __init__(self, layers: Layers, quantity: str = "Hessian diagonal", alternative: str = "DiagGGNExact"):
        self.sources: list[_Source] = []
        self._none = f"no {quantity}"
        self._advice = f"{alternative} allows it"
        self._names: list[str] = []  # of the parameters
        self._own: dict[Node, int] = {}  # layer -> its parameters
        self._leaves: dict[Node, int] = {}  # where a parameter enters the graph -> its bit
        self._repeated = 0  # parameters of several layers
        bits: dict[int, int] = {}  # id of a parameter -> its bit
        for node, parameters in layers.items():
            self._own[node] = 0
            for name, parameter in parameters.items():
                if id(parameter) in bits:
                    self._repeated |= bits[id(parameter)]
                else:
                    bits[id(parameter)] = self._leaves[_get_grad_fn_or_grad_acc(parameter)] = 1 << len(bits)
                    self._names.append(f"{_module_name(node)}.{name}")
                self._own[node] |= bits[id(parameter)]
        self._count = len(bits)
        self._past_layers = (1 << self._count) - 1

    def run(self, root: Node) -> None:
        """Visits all that `root` depends on, operands first."""
        known: dict[Node | None, int] = {None: 0}
        stack = [root]
        while stack:
            node = stack[-1]
            if node in known:
                stack.pop()
                continue
            operands = [operand for operand, _ in node.next_functions]
            missing = [operand for operand in operands if operand not in known]
            if missing:
                stack.extend(missing)
            else:
                known[node] = self._visit(node, [known[operand] for operand in operands]) | self._leaves.get(node, 0)
                stack.pop()
        outside = known[root] & self._past_layers
        if outside:
            raise NotImplementedError(
                f"{self._named(outside)} also acts on the prediction from outside of its module, where no quantity can "
                "be formed: use it in the forward of extended modules only"
            )

    def _visit(self, node: Node, operands: list[int]) -> int:
        """What `node` depends on, from what its operands depend on. Raises unless the function is known."""
        union = reduce(or_, operands, 0)
        if isinstance(node, BackwardCFunction):  # a function in Python, of any name
            function = type(node)._forward_cls
            if function is LayerFunction or function is ObserverFunction:
                own = self._own.get(node, 0)
                if function is LayerFunction:
                    self._check_apart(node, operands[:2])  # input and weight
                return union & ~own | own << self._count
            if getattr(function, "hands_on", False):
                return union
            if union or function is CheckpointFunction:  # a reentrant checkpoint may hide layers
                raise self._unknown(node)
            return 0
        if not union:
            return 0
        name = function_name(node.name())
        if name in LINEAR or (name in LINEAR_IF and LINEAR_IF[name](node)):
            return union
        if name in STEPS or getattr(node, "_saved_rounding_mode", None) is not None:  # a rounded quotient
            return 0
        if name in LINEAR_BUT_IN and not any(operands[LINEAR_BUT_IN[name] :][:1]):
            return union
        if name in BATCH_NORMS and not (operands[0] and node._saved_training):
            self._check_apart(node, operands[:2])
            return union
        edges = node.next_functions
        if name == "Mul" and len(edges) == 2 and edges[0] == edges[1]:  # x * x
            self._add_source(node, 0, union, lambda saved: torch.tensor(2.0))
            return union
        if name in PRODUCTS:
            self._check_apart(node, [operands[i] for i in PRODUCTS[name] if i < len(operands)])
            return union
        if name in ELEMENTWISE:
            self._check_apart(node, operands)
            for operand, second_derivative in ELEMENTWISE[name].items():
                if operand < len(operands) and operands[operand]:
                    self._add_source(node, operand, operands[operand], second_derivative)
            return union
        raise self._unknown(node)

    def _add_source(
        self, node: Node, operand: int, dependence: int, second_derivative: Callable[[Saved], Tensor]
    ) -> None:
        inside = dependence & self._past_layers
        if inside:
            raise NotImplementedError(
                f"{self._none} of {self._named(inside)}: its module is not linear in it, but applies "
                f"{readable_name(node)} to what depends on it"
            )
        if operand_metadata(node, operand).dtype.is_complex:
            raise self._unknown(node)
        self.sources.append(_Source(node, operand, dependence, second_derivative))

    def _check_apart(self, node: Node, operands: Sequence[int]) -> None:
        """Raises if operands that are multiplied with each other depend on the same parameter."""
        seen = 0
        for operand in operands:
            parameters = (operand | operand >> self._count) & self._past_layers
            if parameters & seen:
                break
            seen |= parameters
        else:
            return
        names = self._named(parameters & seen)
        if isinstance(node, BackwardCFunction):
            raise NotImplementedError(
                f"{self._none} of {names}: it is used again on what depends on its own earlier use, which adds "
                f"terms between the two uses. {self._advice}"
            )
        raise NotImplementedError(
            f"{self._none}: {readable_name(node)} multiplies two tensors that both depend on {names}. {self._advice}"
        )

    def _unknown(self, node: Node) -> NotImplementedError:
        name = node.name()
        if name.endswith("CopySlices"):
            what = "a function that changes a view in place: apply it out of place"
        elif name == "CheckpointFunctionBackward":
            what = "torch.utils.checkpoint.checkpoint(..., use_reentrant=True): set use_reentrant=False"
        elif isinstance(node, BackwardCFunction):
            what = f"the autograd function {type(node)._forward_cls.__name__}, of which nothing is known"
        elif function_name(name) in BATCH_NORMS:
            what = "a batch normalisation in training mode: call eval()"
        else:
            what = f"{readable_name(node)} ({name})"
        return NotImplementedError(
            f"{self._none}: functions of what depends on parameters must be linear, piecewise linear or elementwise, "
            f"and known as such. This one is not: {what}. {self._advice}"
        )

    def is_deeper(self, source: _Source) -> bool:
        """Whether a source depends on more than the layer whose output it is at, or is at none."""
        layer, _ = source.node.next_functions[source.operand]
        return bool(source.dependence & ~((self._own.get(layer, 0) & ~self._repeated) << self._count))

    def _named(self, parameters: int) -> str:
        """The first names of a set of parameters."""
        names = list(dict.fromkeys(name for i, name in enumerate(self._names) if parameters >> i & 1))
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def residual_curvatures(
    prediction: Tensor, grad_prediction: Tensor, layers: Layers
) -> list[tuple[GradientEdge, Tensor]]:
    """Every elementwise function's input x and the curvature phi''(x) dl/dy there [*x], for the products of `PCHMP`.

    Arguments and errors as `residual_sources`; samples may depend on each other.
    """
    walk = _Walk(layers, "positive-curvature Hessian", "GGNMP")
    second_derivatives = _second_derivatives(walk, prediction)
    found = _curvatures(walk, second_derivatives, prediction, grad_prediction)
    return [(GradientEdge(*walk.sources[i].node.next_functions[walk.sources[i].operand]), c) for i, c in found.items()]


def _second_derivatives(walk: _Walk, prediction: Tensor) -> list[Tensor]:
    """Walks through the graph; phi''(x) of every source."""

    def form() -> list[Tensor]:
        walk.run(prediction.grad_fn)
        saved = {source.node: Saved.of(source.node) for source in walk.sources}
        return [source.second_derivative(saved[source.node]) for source in walk.sources]

    return in_own_pass(form)


def _curvatures(
    walk: _Walk, second_derivatives: Sequence[Tensor], prediction: Tensor, grad_prediction: Tensor
) -> dict[int, Tensor]:
    """phi''(x) dl/dy [*x] by the index of a source, of those that the prediction depends on."""
    if not walk.sources:
        return {}
    grad_outputs = torch.autograd.grad(  # dl/dy
        prediction,
        [GradientEdge(source.node, 0) for source in walk.sources],
        grad_prediction,
        retain_graph=True,
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    result = {}
    for i, grad_output in enumerate(grad_outputs):
        if grad_output is not None:
            x = operand_metadata(walk.sources[i].node, walk.sources[i].operand)
            curvature = second_derivatives[i] * grad_output.to(statistics_dtype(grad_output.dtype))
            result[i] = curvature.sum_to_size(x.shape)
    return result


def residual_sources(
    prediction: Tensor, grad_prediction: Tensor, layers: Layers, batch_size: int
) -> list[ResidualSource]:
    """The curvature that elementwise functions between the layers and `prediction` add to the Hessian.

    Runs backward passes through the graph, which it leaves intact. Differentiable under grad mode.

    Args:
        prediction: what the loss depends on.
        grad_prediction: the loss' gradient there, of the same size.
        layers: the nodes of the layers in the graph of `prediction` -> those of their parameters that count, by name;
            all that use such a parameter. The others are constants.
        batch_size: N. Tensors between the layers and the prediction have N entries along dimension 0, or the N * R of
            a tensor [N, R, *] whose first dimensions were flattened.

    Raises:
        NotImplementedError: the graph has a function that is not known to be linear, piecewise linear or elementwise,
            or more than one function of a parameter multiplied with each other.
        ValueError: dimension 0 of some function's input or layer's output is not the batch, or samples are mixed.
    """
    walk = _Walk(layers)

    second_derivatives = _second_derivatives(walk, prediction)
    if not walk.sources or not batch_size:
        return []
    names = [readable_name(source.node) for source in walk.sources]
    edges = [GradientEdge(*source.node.next_functions[source.operand]) for source in walk.sources]
    deeper = [walk.is_deeper(source) for source in walk.sources]
    starts = [(f"the input of {name}", edge) for name, edge in zip(names, edges, strict=True)]
    for place, edge in starts:
        check_batch(place, edge, batch_size)
    if any(deeper):
        # The prediction too, where the loss' columns start: beside the sources' columns the check costs nothing.
        starts.append(("the prediction", GradientEdge(prediction.grad_fn, prediction.output_nr)))
        check_samples_apart(starts, layers, batch_size)
    result = []
    for i, curvature in _curvatures(walk, second_derivatives, prediction, grad_prediction).items():
        x = operand_metadata(walk.sources[i].node, walk.sources[i].operand)
        root = _one_hot(curvature, x.dtype, batch_size)
        result.append(ResidualSource(edges[i], curvature, root, deeper[i], names[i]))
    return result


def _one_hot(curvature: Tensor, dtype: torch.dtype, batch_size: int) -> SquareRoot:
    """The square root of the diagonal matrix of `curvature` [N * R, *] with one column per feature of a sample.

    The columns are free of square roots, which have no derivative at zero: the signs carry the values.
    """
    shape = curvature.shape
    signs = curvature.reshape(batch_size, -1)  # [N, D]
    count = signs.shape[1]

    def form(begin: int, end: int) -> tuple[Tensor, Tensor]:
        columns = torch.zeros(end - begin, batch_size, count, dtype=dtype, device=signs.device)
        columns.diagonal(begin, 0, 2).fill_(1.0)
        return columns.view(end - begin, *shape), signs[:, begin:end].t().contiguous()

    return SquareRoot(count, form)


def check_samples_apart(
    sources: Sequence[tuple[str, GradientEdge]],
    layers: Layers,
    batch_size: int,
    elsewhere: Mapping[Node, Sequence[int]] | None = None,
) -> None:
    """Raises a ValueError unless columns that start at `sources`, each a name and an edge, stay within their samples.

    The columns of all samples are pushed back at once, which is right only if dimension 0 is the batch everywhere and
    samples do not act on each other. Columns of random signs for one half of the samples must leave nothing at the
    layers' outputs for the other half; 2 log2(N) halves tell every sample from every other. Nodes in `elsewhere` have
    the batch in these dimensions of their outputs.
    """
    elsewhere = elsewhere or {}
    for name, edge in sources:
        check_batch(name, edge, batch_size)
    edges = [edge for _, edge in sources]
    if batch_size < 2 or not edges or not _reach_others(edges, layers, batch_size, elsewhere):
        return
    name, edge = next((s for s in sources if _reach_others([s[1]], layers, batch_size, elsewhere)), sources[0])
    raise samples_not_apart(name, edge.node._input_metadata[edge.output_nr].shape, batch_size)


def check_batch(name: str, edge: GradientEdge, batch_size: int) -> None:
    shape = edge.node._input_metadata[edge.output_nr].shape
    if batch_size > 1 and (not shape or shape[0] % batch_size):
        raise samples_not_apart(name, shape, batch_size)


def samples_not_apart(name: str, shape: Sequence[int], batch_size: int) -> ValueError:
    return ValueError(
        f"{name}: expected the {batch_size} samples of the batch along dimension 0, none of which acts on another "
        f"between the layers and there; got size {list(shape)}, with samples that are not apart"
    )


def _reach_others(
    edges: Sequence[GradientEdge], layers: Layers, batch_size: int, elsewhere: Mapping[Node, Sequence[int]]
) -> bool:
    """Whether, from `edges` back to the layers' outputs, any sample leaves something for another one.

    Layers that know themselves where their samples are may have them in another order: each may be reached by one only.
    """
    outputs = [GradientEdge(node, i) for node in layers for i in range(len(node._input_metadata))]
    signs = []  # [N, D] of each edge
    for edge in edges:
        x = edge.node._input_metadata[edge.output_nr]
        drawn = torch.empty(batch_size, prod(x.shape) // batch_size, dtype=x.dtype, device=x.device)
        signs.append(drawn.bernoulli_(generator=torch.Generator(x.device).manual_seed(0)).mul_(2).sub_(1))
    sizes = [edge.node._input_metadata[edge.output_nr].shape for edge in edges]
    digits = range((batch_size - 1).bit_length())
    leaks = []
    known: dict[tuple, Tensor] = {}  # by digit, side and node: [N], which of its samples were reached
    for digit, side in product(digits, (0, 1)):
        half = torch.arange(batch_size) >> digit & 1 == side  # [N]
        columns = [(s * half[:, None].to(s.device)).view(size) for s, size in zip(signs, sizes, strict=True)]
        gradients = torch.autograd.grad(edges, outputs, columns, retain_graph=True, allow_unused=True)
        for edge, gradient in zip(outputs, gradients, strict=True):
            if gradient is None:
                continue
            rows = _samples_first(edge, gradient, elsewhere)
            if rows is not None:
                found, key = rows.flatten(1), (digit, side, edge.node)
                own = ((found != 0) & ~found.isnan()).any(1)
                known[key] = known[key] | own if key in known else own
                continue
            if not gradient.dim() or gradient.shape[0] % batch_size:
                raise samples_not_apart(f"the output of {_module_name(edge.node)}", gradient.shape, batch_size)
            found = gradient.reshape(batch_size, -1)
            leaks.append(((found != 0) & ~found.isnan() & ~half[:, None].to(found.device)).any())
    for (digit, side, node), own in known.items():
        if side and (digit, 0, node) in known:
            leaks.append((own & known[digit, 0, node]).any())
    return bool(torch.stack(leaks).any()) if leaks else False


def _samples_first(edge: GradientEdge, gradient: Tensor, elsewhere: Mapping[Node, Sequence[int]]) -> Tensor | None:
    """[N, *], from a gradient of a layer that knows where its samples are; None of others."""
    if edge.node in elsewhere:
        return gradient.movedim(elsewhere[edge.node][edge.output_nr], 0)
    if isinstance(edge.node, OBSERVER_NODE) and edge.node.observation.rule is not None:
        observation = edge.node.observation
        return observation.rule.samples_first(observation.positions[edge.output_nr], gradient)
    return None

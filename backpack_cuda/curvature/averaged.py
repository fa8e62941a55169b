"""From a loss to one matrix at every layer's output, averaged over the samples after every step back.

What is where: `points.py` the tensors at which a matrix can stand, `steps.py` the way from one to the next.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from backpack_cuda.capture import LAYER_NODE, OBSERVER_NODE, module_of
from backpack_cuda.context import CTX
from backpack_cuda.curvature.functions import readable_name
from backpack_cuda.curvature.losses import LossHessian
from backpack_cuda.curvature.memory import CACHED, default_budget
from backpack_cuda.curvature.own_pass import in_own_pass
from backpack_cuda.curvature.points import Graph, Point
from backpack_cuda.curvature.pull_back import pull_back
from backpack_cuda.curvature.residuals import check_batch, check_samples_apart, residual_sources, samples_not_apart
from backpack_cuda.curvature.steps import Budget, Step, saved_for_step, step_to
from backpack_cuda.curvature.sweep import LayerCall, Sweep, errors_for_users, looks_after_samples
from backpack_cuda.extensions.averaged import HBP
from backpack_cuda.extensions.curvature import Curvature
from backpack_cuda.extensions.second_order import SecondOrderExtension
from backpack_cuda.per_sample import AveragedColumns, AveragedUse, NoKroneckerFactors
from backpack_cuda.stats import statistics_dtype

_LARGEST_LIMIT = 8 << 30


def is_averaged(ext: SecondOrderExtension) -> bool:
    """Whether a quantity is formed from averaged matrices rather than columns."""
    return isinstance(ext, HBP) and ext.averages


class _Plan(NamedTuple):
    """The way to all layers, and what it takes."""

    root: Point
    points: list[Point]
    steps: dict[int, Step]  # id of a point -> the step to it from its parent
    layers: dict[int, list[LayerCall]]  # id of a point -> the layers with factors from its matrix
    inner: set[Node]  # the functions between two points, or a point and a layer that has none
    memory: int  # bytes at a time
    largest: Point


class AveragedSweep(Sweep):
    """Everything that one loss contributes to the quantities that are formed from averaged matrices."""

    extensions: Sequence[HBP]

    def run(self, hessian: LossHessian, grad_prediction: Callable[[], Tensor], factor: Tensor | None) -> None:
        self._check_used_once()
        with self._marked():
            plan = self._plan()
            self._check_memory(plan)
            self.saved, saved = in_own_pass(lambda: self._read(plan))
            self._check_inside()
            groups: dict[tuple, list[HBP]] = {}
            for ext in self.extensions:
                groups.setdefault((ext.root, ext.curv_type), []).append(ext)
            for (root, curv_type), extensions in groups.items():
                residuals = {}
                if Curvature.require_residual(curv_type):
                    residuals = self._residuals(plan, grad_prediction(), curv_type)
                start = self._at_prediction(hessian, root, factor)
                self._push_matrix(plan, start, saved, residuals, extensions)
        self._save()

    def _check_used_once(self) -> None:
        for uses in self.uses.values():
            if len(uses) > 1:
                layer, name = uses[0]
                raise NotImplementedError(
                    f"{self.extensions[0]}: {type(layer.module).__name__}.{name} is used {len(uses)} times in the "
                    "forward pass, at different tensors with averaged matrices of their own; KFLR and KFAC allow it"
                )

    def _read(self, plan: _Plan) -> tuple[dict[int, tuple], dict[int, tuple]]:
        """What the graph has saved for the layers' uses, and for the steps below points; each node is read once."""
        of_layers = {layer.node: layer.node.saved_tensors for layer in self.layers}
        of_points = {}
        for point in plan.points:
            if point.children:
                of_points[id(point)] = of_layers[point.node] if point.node in of_layers else saved_for_step(point)
        return {id(layer): of_layers[layer.node] for layer in self.layers}, of_points

    def _needs_residuals(self) -> bool:
        return any(Curvature.require_residual(ext.curv_type) for ext in self.extensions)

    # ---- before anything is allocated

    def _plan(self) -> _Plan:
        graph = Graph(self.prediction, [layer.node for layer in self.layers])
        by_node = graph.tree(self.batch_size, self._where_samples_are_apart)
        points = list(by_node.values())
        budget = self._budget()
        self.dtype = functools.reduce(
            torch.promote_types, (statistics_dtype(m.dtype) for point in points for m in point.metadata)
        )
        steps = {id(p): step_to(p, self.batch_size, self.dtype, budget) for p in points if p.parent is not None}
        root = by_node[self.prediction.grad_fn]
        inner = {node for point in points for node in point.between[:-1]}
        layers: dict[int, list[LayerCall]] = {}
        columns: dict[int, int] = {}
        for layer in self.layers:
            point = graph.nearest(layer.node, by_node)
            layers.setdefault(id(point), []).append(layer)
            nodes = [] if layer.node is point.node else graph.between(layer.node, point.node)[:-1]
            inner.update(nodes)
            columns[id(point)] = columns.get(id(point), 0) + self._column_bytes([layer.node, *nodes], layer, point)
        largest = max(points, key=lambda point: point.features)
        return _Plan(root, points, steps, layers, inner, self._memory(root, steps, columns), largest)

    def _budget(self) -> Budget:
        given = CTX.get_memory_budget()
        if given is not None:
            return Budget(given, given)
        samples = default_budget(self.prediction.device)
        return Budget(samples if self.prediction.is_cuda else CACHED, samples)

    def _memory(self, root: Point, steps: dict[int, Step], columns: dict[int, int]) -> int:
        """Bytes that all matrices and temporary tensors take at a time; under create_graph none is freed.

        Args:
            root: the prediction's point.
            steps: by id of a point the step to it.
            columns: by id of a point the bytes of a column from there to its layers.
        """
        keeps = torch.is_grad_enabled()
        held = most = 0
        for point, last in root.visits():
            matrix, step = point.features**2 * self.dtype.itemsize, steps.get(id(point))
            temporary = 0 if step is None else step.temporary(last)
            temporary = max(temporary, point.features * columns.get(id(point), 0))
            if keeps:
                held += matrix + temporary
                most = held
                continue
            if step is None:  # of a leaf of the tree nothing is held
                most = 2 * matrix
                held = matrix
                continue
            parent = point.parent.features**2 * self.dtype.itemsize
            moves = last and step.in_place()
            most = max(most, held + temporary + (0 if moves else matrix))
            held += matrix - (parent if last else 0)
            most = max(most, held)
            if not point.children:
                held -= matrix
        return most

    def _column_bytes(self, nodes: Sequence[Node], layer: LayerCall, point: Point) -> int:
        """Of what one feature of a point is pulled back to at a module, with all `nodes`; 0 for layers with a rule."""
        if isinstance(layer.node, LAYER_NODE):
            return 0
        itemsize = self.dtype.itemsize
        held = 2 * self.batch_size * point.features * itemsize
        rule = layer.node.observation.rule
        if rule is not None:
            held += 2 * rule.column_bytes
        else:
            held += 3 * self.batch_size * sum(p.numel() for p in layer.parameters.values() if p.dim() < 2) * itemsize
        return held + sum(prod(m.shape) * m.dtype.itemsize for node in nodes for m in node._input_metadata)

    def _check_memory(self, plan: _Plan) -> None:
        d = plan.largest.features
        where = _place(plan.largest)
        for ext in self.extensions:
            ext.memory_needed = plan.memory
            if CTX.get_debug():
                print(f"[DEBUG] {ext} takes {_readable_bytes(plan.memory)}, for matrices up to [{d}, {d}] at {where}")
        for ext in self.extensions:
            limit = ext.memory_limit
            if limit is None:
                limit = default_budget(self.prediction.device, _LARGEST_LIMIT)
            if plan.memory > limit:
                raise ValueError(
                    f"{ext}: needs {_readable_bytes(plan.memory)} for matrices over the features of a sample, the "
                    f"largest [{d}, {d}] at {where}, which is more than the memory_limit of {_readable_bytes(limit)}; "
                    f"{type(ext).__name__}(..., memory_limit={plan.memory}) would take it, KFLR and KFAC need none"
                )

    def _where_samples_are_apart(self, points: list[Point]) -> list[Point]:
        """Those with the samples along dimension 0, none of which acts on another one up to the prediction.

        The others are skipped, but for the layers' outputs and the prediction: an error. Recurrent and attention
        modules may have their batch elsewhere. Asked once per architecture.
        """
        count = self.batch_size
        check_batch("the prediction", self.edge, count)
        points = [point for point in points if not any(m.dtype.is_complex for m in point.metadata)]
        if count < 2:
            return points
        known = _known_apart.setdefault(self.layers[0].module, {})
        # Which points there are depends on the parameters that are asked for, too.
        places = tuple((point.node.name(), *(tuple(m.shape) for m in point.metadata)) for point in points)
        key = (self.prediction.shape, self.structure, places)
        if key not in known:
            elsewhere = self._elsewhere()
            nodes = {
                layer.node: layer.parameters
                for layer in self.layers
                if looks_after_samples(layer) and (layer.batch_size == count or layer.node in elsewhere)
            }
            if nodes:
                check_samples_apart([("the prediction", self.edge)], nodes, count, elsewhere)
            verdicts = self._verdicts(points)
            chosen = [i for i, verdict in enumerate(verdicts) if verdict]
            if None not in verdicts:
                known[key] = chosen
        else:
            chosen = known[key]
        # A layer that nothing arrives at has a matrix of zeros.
        kept = {layer.node for layer in self.layers if not looks_after_samples(layer)} | {self.prediction.grad_fn}
        chosen = {points[i].node for i in chosen} | kept
        return [point for point in points if point.node in chosen]

    def _verdicts(self, points: list[Point]) -> list[bool | None]:
        """Of each point whether samples are apart there; None where nothing arrives, so that there is nothing to see.

        Columns of random signs for one half of the samples must leave nothing for the other half; 2 log2(N) halves
        tell every sample from every other.
        """
        count, layers = self.batch_size, {layer.node: layer for layer in self.layers}
        fitting = [p for p in points if all(m.shape and m.shape[0] % count == 0 for m in p.metadata)]
        edges = [edge for point in fitting for edge in point.edges]
        device = self.prediction.device
        signs = torch.empty(count, self.prediction.numel() // count, dtype=self.prediction.dtype, device=device)
        signs.bernoulli_(generator=torch.Generator(device).manual_seed(0)).mul_(2).sub_(1)
        leaks, seen = torch.zeros(2, len(edges), dtype=torch.bool, device=device)
        digits = range((count - 1).bit_length())
        for half in [torch.arange(count, device=device) >> digit & 1 == side for digit in digits for side in (0, 1)]:
            half = half[:, None]
            column = (signs * half).view(self.prediction.shape)
            found = torch.autograd.grad(self.edge, edges, column, retain_graph=True, allow_unused=True)
            for i, gradient in enumerate(found):
                if gradient is not None and gradient.numel():
                    entries = gradient.reshape(count, -1)
                    entries = (entries != 0) & ~entries.isnan()
                    leaks[i] |= (entries & ~half).any()
                    seen[i] |= entries.any()
        leaks, seen = iter(leaks.tolist()), iter(seen.tolist())
        verdicts: dict[Node, bool | None] = {}
        for point in fitting:
            pairs = [(next(leaks), next(seen)) for _ in point.edges]
            arrives = any(arrived for _, arrived in pairs)
            verdicts[point.node] = False if any(leak for leak, _ in pairs) else True if arrives else None
        for node, layer in layers.items():
            if verdicts.get(node, False) is False and not looks_after_samples(layer):
                name = type(layer.module).__name__
                raise samples_not_apart(
                    f"{self.extensions[0]}: the output of {name}", node._input_metadata[0].shape, count
                )
        return [verdicts.get(point.node, False) for point in points]

    # ---- matrices

    def _at_prediction(self, hessian: LossHessian, root, factor: Tensor | None) -> Tensor:
        """sum_n H_n at the prediction, [D, D]; with R rows [N * R, *] for each sample a block for each of them."""
        prediction, count = self.prediction, self.batch_size
        dtype = self.dtype
        if not count:
            size = prediction[:0].flatten(1).shape[1] if prediction.dim() > 1 else 1
            return torch.zeros(size, size, dtype=dtype, device=prediction.device)
        if root.kind == "exact":
            blocks = hessian.summed(prediction.shape[0] // count)
            matrix = blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)
        else:
            sampled = hessian.sampled(root.mc_samples)
            columns, _ = sampled.form(0, sampled.count)
            columns = columns.to(dtype).reshape(len(columns) * count, -1)  # [M * N, D]
            matrix = columns.t() @ columns
        matrix = matrix.to(dtype)
        return matrix if factor is None else matrix * factor.to(dtype)

    def _residuals(self, plan: _Plan, grad_prediction: Tensor, curv_type: str) -> dict[int, Tensor]:
        """By id of a point what the functions that act on it add to the diagonal of its matrix, [D]."""
        sources = residual_sources(self.prediction, grad_prediction, self._nodes(), self.batch_size)
        found: dict[int, Tensor] = {}
        by_node = {point.node: point for point in plan.points}
        for source in sources:
            point = by_node.get(source.edge.node)
            if source.edge.node in plan.inner or (point is not None and len(point.edges) > 1):
                raise NotImplementedError(
                    f"{self.extensions[0]}: {source.name} is not linear and inside of a branch, whose second "
                    "derivatives cannot be averaged; curv_type=Curvature.GGN allows it"
                )
            if point is None:
                continue  # no layer's matrix is formed from what is there
            summed = source.curvature.reshape(self.batch_size, -1).sum(0)
            modified = Curvature.modify_residual(summed, curv_type)
            found[id(point)] = found[id(point)] + modified if id(point) in found else modified
        return found

    def _push_matrix(
        self,
        plan: _Plan,
        start: Tensor,
        saved: dict[int, tuple],
        residuals: dict[int, Tensor],
        extensions: Sequence[HBP],
    ) -> None:
        held: dict[int, Tensor] = {}
        for point, last in plan.root.visits():
            if point.parent is None:
                matrix = start
            else:
                key = id(point.parent)
                matrix = held.pop(key) if last else held[key]
                matrix = matrix.to(point.metadata[0].device)
                if self.batch_size and point.features and point.parent.features:
                    owned = last and not torch.is_grad_enabled()
                    matrix = plan.steps[id(point)].run(matrix, owned, saved.get(key, ()))
                else:
                    matrix = matrix.new_zeros(point.features, point.features)
            if id(point) in residuals:
                matrix = matrix + residuals[id(point)].to(matrix.dtype).diag_embed()
            for layer in plan.layers.get(id(point), ()):
                self._add_use(layer, point, matrix, extensions)
            if point.children:
                held[id(point)] = matrix

    def _add_use(self, layer: LayerCall, point: Point, matrix: Tensor, extensions: Sequence[HBP]) -> None:
        parameters = layer.parameters
        if isinstance(layer.node, OBSERVER_NODE) and layer.node.observation.rule is None:
            parameters = {name: p for name, p in parameters.items() if p.dim() < 2}
            self._add_nothing(layer, parameters.keys(), extensions)
        if not parameters:
            return
        with errors_for_users(extensions[0]):
            use = self._use(LayerCall(layer.node, parameters), point, matrix, self.saved[id(layer)])
            self._check(use, layer, extensions)
        for ext in extensions:
            for name, parameter in parameters.items():
                with errors_for_users(ext):
                    self._add_factors(ext, use, name, parameter, layer.module)

    def _add_nothing(self, layer: LayerCall, known: Collection[str], extensions: Sequence[HBP]) -> None:
        """For the parameters of a module without a rule that are no vectors."""
        for name, parameter in layer.parameters.items():
            if name not in known:
                reason = f"{name} of size {list(parameter.shape)}, of a layer without a known factorisation"
                for ext in extensions:
                    ext.without_factors(layer.module, NoKroneckerFactors(reason))
                    self.state.curvature[id(parameter), id(ext)] = None

    def _use(self, layer: LayerCall, point: Point, matrix: Tensor, saved: tuple) -> AveragedUse | AveragedColumns:
        """A layer's call with the matrix at its output, or at a point after it."""
        if isinstance(layer.node, LAYER_NODE):
            return AveragedUse(layer.use([None], 0, saved), matrix)
        features, n = point.features, self.batch_size
        count = max(features, 1)  # one column, of zeros, where there are no features
        matrix = matrix if features else matrix.new_zeros(1, 1)
        onehot = torch.eye(count, features, dtype=matrix.dtype, device=matrix.device)[:, None].expand(-1, n, -1)
        columns = [
            part.to(m.dtype).reshape(count, *m.shape)
            for part, m in zip(onehot.split(point.sizes, 2), point.metadata, strict=True)
        ]
        if layer.node is point.node:
            given = {edge.output_nr: part for edge, part in zip(point.edges, columns, strict=True)}
            columns = [given.get(edge.output_nr) for edge in layer.edges]
        else:
            columns = pull_back(point.edges, layer.edges, columns)
        return AveragedColumns(layer.use(columns, count, saved), matrix)


# By the first layer's module the architectures and predictions' shapes -> the points where samples are apart.
_known_apart: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def _place(point: Point) -> str:
    node, output = point.node, point.edges[0].output_nr
    while getattr(getattr(type(node), "_forward_cls", None), "hands_on", False):  # the ends of a module's call
        node, output = node.next_functions[output]
    if isinstance(node, LAYER_NODE | OBSERVER_NODE):
        return f"the output of {type(module_of(node)).__name__}"
    return f"the result of {readable_name(node)}"


def _readable_bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"

"""From a loss to the curvature of all layers: columns of its Hessian's square root, pushed back to their outputs.

The autograd graph is the tape: the columns go through ordinary reverse mode, so that whatever stands between the layers
is differentiated by torch itself. One sweep per square root feeds all quantities that are formed from it.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack_cuda.capture import (
    LAYER_NODE,
    OBSERVER_NODE,
    TO_PARAMETERS,
    input_edges,
    module_of,
    parameters_of,
    replay_of,
)
from backpack_cuda.context import CTX, sweeping
from backpack_cuda.curvature.functions import dims_of
from backpack_cuda.curvature.losses import LossHessian
from backpack_cuda.curvature.memory import CACHED, LARGEST, default_budget
from backpack_cuda.curvature.own_pass import in_own_pass
from backpack_cuda.curvature.pull_back import keeping_retained_gradient, pull_back
from backpack_cuda.curvature.residuals import check_samples_apart, residual_sources
from backpack_cuda.curvature.square_root import SquareRoot
from backpack_cuda.extensions.kronecker import KroneckerExtension
from backpack_cuda.extensions.second_order import SecondOrderExtension
from backpack_cuda.ops import dispatch
from backpack_cuda.passes import Pass
from backpack_cuda.per_sample import (
    ColumnUse,
    LoopedColumns,
    NoKroneckerFactors,
    NoPerSampleGradients,
    merge_columns,
)
from backpack_cuda.stats import ColumnStats, ColumnWant, Want, statistics_dtype


class LayerCall:
    """A layer's call in the graph, with those of its parameters that quantities are asked for."""

    def __init__(self, node, parameters: dict[str, nn.Parameter]):
        self.node = node
        self.parameters = parameters
        outputs = 1 if isinstance(node, LAYER_NODE) else len(node._input_metadata)
        self.edges = [GradientEdge(node, i) for i in range(outputs)]

    @property
    def module(self) -> nn.Module:
        return module_of(self.node)

    @property
    def batch_size(self) -> int | None:
        """N; None for a module without a rule."""
        if isinstance(self.node, LAYER_NODE):
            return self.node._input_metadata[0].shape[0]
        rule = self.node.observation.rule
        return None if rule is None else rule.batch_size

    @property
    def output_rows(self) -> int | None:
        """The size of the dimension of a module's output that is commonly the batch."""
        shape = self.node._input_metadata[0].shape
        dim = 0 if getattr(self.module, "batch_first", True) else 1
        return shape[dim] if len(shape) > dim else None

    def filled(self, columns: Sequence[Tensor | None], count: int) -> list[Tensor]:
        """`count` columns [V, *output] at each of the layer's outputs, with zeros for None."""
        return [
            torch.zeros(count, *m.shape, dtype=m.dtype, device=m.device) if c is None else c
            for c, m in zip(columns, self.node._input_metadata, strict=True)
        ]

    def use(self, columns: Sequence[Tensor | None], count: int, saved: tuple[Tensor | None, ...]) -> ColumnUse:
        """The layer's per-sample gradients from `count` columns [V, *output] at each of its outputs (None: zeros)."""
        if isinstance(self.node, OBSERVER_NODE) and self.node.observation.rule is not None:
            return replay_of(self.node, saved).pull_back(columns, count).columns()
        filled = self.filled(columns, count)
        if isinstance(self.node, LAYER_NODE):
            return self.node.operation.columns(saved[0], filled[0])
        observation = self.node.observation._replace(parameters=self.parameters)
        args, kwargs = observation.rebuild_inputs(saved)
        form = observation.form
        return LoopedColumns([form(observation, args, kwargs, grads) for grads in zip(*filled, strict=True)])


def looks_after_samples(layer: LayerCall) -> bool:
    """Whether a recurrent or attention module may have its samples in another dimension than the first."""
    return isinstance(layer.module, nn.RNNBase) or not getattr(layer.module, "batch_first", True)


class Sweep:
    """Everything that one loss contributes to the active quantities."""

    def __init__(self, extensions: Sequence[SecondOrderExtension], prediction: Tensor, state: Pass):
        self.extensions = extensions
        self.prediction = prediction
        self.edge = GradientEdge(prediction.grad_fn, prediction.output_nr)
        self.state = state
        self.layers, self.passing, mixing, self.structure = _layers(prediction)
        extensions[0].check_reached(self.layers)
        self.batch_size = self._batch_size()
        _check_apart(mixing, self.batch_size, extensions)
        self.input_factors: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.uses: dict[int, list[tuple[LayerCall, str]]] = {}  # id of a parameter -> its uses
        for layer in self.layers:
            for name, parameter in layer.parameters.items():
                self.uses.setdefault(id(parameter), []).append((layer, name))

    def _batch_size(self) -> int:
        """N, which the layers know; a prediction may have been flattened to [N * R, C]."""
        rows = self.prediction.shape[0] if self.prediction.dim() else 1
        sizes = {layer.batch_size for layer in self.layers} - {None}
        if not sizes:  # modules without a rule alone, as where only normalisations are trained
            sizes = {layer.output_rows for layer in self.layers}
        if len(sizes) == 1:
            (size,) = sizes
            if 0 < size < rows and rows % size == 0:
                return size
        return rows

    def run(self, hessian: LossHessian, grad_prediction: Callable[[], Tensor], factor: Tensor | None) -> None:
        """Forms all quantities of a loss with this Hessian, times `factor`."""
        by_root: dict[tuple, list[SecondOrderExtension]] = {}
        for ext in self.extensions:
            by_root.setdefault((ext.root.kind, ext.root.mc_samples), []).append(ext)
        with self._marked():
            self._check_samples()
            self.saved = in_own_pass(lambda: {id(layer): layer.node.saved_tensors for layer in self.layers})
            self._check_inside()
            for (kind, mc_samples), extensions in by_root.items():
                if kind == "exact":
                    every = any(ext.needs_every_column or ext.has_module_extensions for ext in extensions)
                    root = self._of_samples(hessian.exact if every else hessian.reduced)
                else:
                    root = hessian.sampled(mc_samples)
                self._push(self.edge, _scaled(root, factor), extensions, self.layers, reaches_all=True)
                with_residuals = [ext for ext in extensions if ext.root.with_residuals]
                if with_residuals:
                    self._push_residuals(grad_prediction(), with_residuals)
        self._save()

    # ---- sources ----

    def _check_samples(self) -> None:
        """The samples must not act on each other between layers and loss; asked once per architecture and shape."""
        known = _known_apart.setdefault(self.layers[0].module, set())
        architecture = (self.prediction.shape, self.structure)
        if architecture in known:
            return
        per_sample = self.prediction.shape[0] // max(self.batch_size, 1) if self.prediction.dim() else 1
        name = "the prediction" if per_sample == 1 else f"the prediction, of {per_sample} rows for each sample"
        # Those with a rule and another batch are refused with their own number of samples.
        elsewhere = self._elsewhere()
        nodes = {
            layer.node: layer.parameters
            for layer in self.layers
            if layer.batch_size == self.batch_size or not looks_after_samples(layer) or layer.node in elsewhere
        }
        if nodes:
            check_samples_apart([(name, self.edge)], nodes, self.batch_size, elsewhere)
        known.add(architecture)

    def _elsewhere(self) -> dict[Node, list[int]]:
        """Of modules without a rule that may have their batch elsewhere: its dimensions in the outputs.

        Not of those that will be refused, since they have another batch or cannot be run on single samples.
        """
        layers = [layer for layer in self.layers if layer.batch_size is None and looks_after_samples(layer)]
        found = {}
        if not layers or self.batch_size < 2:
            return found
        for layer, saved in zip(layers, in_own_pass(lambda: [r.node.saved_tensors for r in layers]), strict=True):
            observation = layer.node.observation._replace(parameters=layer.parameters)
            shapes = [torch.Size(metadata.shape) for metadata in layer.node._input_metadata]
            with contextlib.suppress(NoPerSampleGradients):
                dims, batch_size = observation.find_batch(observation, *observation.rebuild_inputs(saved), shapes)
                if batch_size == self.batch_size:
                    found[layer.node] = dims
        return found

    def _check_inside(self) -> None:
        """No parameter of a module without a rule may act on the prediction from outside of the module's calls."""
        calls = {layer.node: layer for layer in self.layers if layer.batch_size is None}
        names = {id(p): (layer.module, name) for layer in calls.values() for name, p in layer.parameters.items()}
        allowed: frozenset[int] = frozenset()  # ids of the parameters of the calls around
        parts = [([self.prediction.grad_fn], set(), allowed)] if calls else []
        entered = set()
        while parts:
            stack, visited, allowed = parts.pop()  # visited: at first the nodes of a call's inputs, where it ends
            while stack:
                node = stack.pop()
                if node is None or node in visited:
                    continue
                visited.add(node)
                following = [operand for operand, _ in _operands(node)]
                if node in calls:
                    inputs = [t.grad_fn for t in self.saved[id(calls[node])] if t.grad_fn is not None]
                    if node not in entered:
                        entered.add(node)
                        own = map(id, node.observation.parameters.values())
                        parts.append((following, set(inputs), allowed.union(own)))
                    following = inputs
                elif node.name() == "torch::autograd::AccumulateGrad":
                    key = id(node.variable)
                    if key in names and key not in allowed:
                        raise _acts_outside(*names[key])
                stack.extend(following)

    def _of_samples(self, root: SquareRoot) -> SquareRoot:
        """Of a prediction [N * R, ...], whose rows have their own Hessians: columns for each of a sample's R rows."""
        rows = self.prediction.shape[0]
        if rows == self.batch_size:
            return root
        per_sample = rows // self.batch_size

        def form(begin: int, end: int) -> tuple[Tensor, None]:
            # Column v * R + r is column v at the r-th row of each sample, zero at the others.
            first = begin // per_sample
            found, _ = root.form(first, (end - 1) // per_sample + 1)
            found = found.unflatten(1, (self.batch_size, per_sample))  # [V_c, N, R, ...]
            v = torch.arange(begin, end, device=found.device)
            row = v % per_sample
            kept = found[v // per_sample - first, :, row]  # [end - begin, N, ...]
            index = row.view(-1, 1, 1, *(1,) * (kept.dim() - 2)).expand(kept.unsqueeze(2).shape)
            columns = kept.new_zeros(*kept.shape[:2], per_sample, *kept.shape[2:])
            return columns.scatter(2, index, kept.unsqueeze(2)).flatten(1, 2), None

        return SquareRoot(root.count * per_sample, form)

    def _nodes(self) -> dict[Node, dict[str, nn.Parameter]]:
        return {layer.node: layer.parameters for layer in self.layers}

    def _push_residuals(self, grad_prediction: Tensor, extensions: Sequence[SecondOrderExtension]) -> None:
        for source in residual_sources(self.prediction, grad_prediction, self._nodes(), self.batch_size):
            layer = self._with_output_at(source.edge)
            if layer is not None:
                self._add_at_output(layer, source.curvature, extensions)
            if layer is None or source.deeper:
                layers = [other for other in self.layers if other is not layer]
                self._push(source.edge, source.root, extensions, layers)

    def _with_output_at(self, edge: GradientEdge) -> LayerCall | None:
        """The layer whose output an edge stands for, if its parameters are used nowhere else."""
        for layer in self.layers:
            if layer.node is edge.node and isinstance(edge.node, LAYER_NODE):
                once = all(len(self.uses[id(parameter)]) == 1 for parameter in layer.parameters.values())
                return layer if once else None
        return None

    def _add_at_output(self, layer: LayerCall, curvature: Tensor, extensions: Sequence[SecondOrderExtension]) -> None:
        """What diagonal curvature at a layer's output, of its size, contributes to the diagonals of its parameters.

        A weight's entry acts on an output entry through at most one entry of the input, so that the sum over one-hot
        columns of G_vn^2 is the gradient that belongs to the squared input.
        """
        input, _ = self.saved[id(layer)]
        use = layer.node.operation.use_of_squares(input, curvature)
        self._check(use, layer, extensions)
        want = Want.GRAD
        if any(ext.want & ColumnWant.BATCH_DIAG for ext in extensions):
            want |= Want.BATCH_GRAD
        stats = use.stats(dict.fromkeys(layer.parameters, want))
        for name, parameter in layer.parameters.items():
            own = ColumnStats(batch_diag=stats[name].batch_grad, diag=stats[name].grad)
            for ext in extensions:
                key = (id(parameter), id(ext))
                self.state.curvature[key] = ext.update(self.state.curvature.get(key), own, 0, 1)

    # ---- pushing ----

    def _needs_residuals(self) -> bool:
        return any(ext.root.with_residuals for ext in self.extensions)

    @contextlib.contextmanager
    def _marked(self) -> Iterator[None]:
        """The layers' backward passes inside form no weight gradients and no quantities."""
        nodes = [layer.node for layer in self.layers] + self.passing
        for node in nodes:
            node.sweeping = True
        if self._needs_residuals():  # also of the functions inside, which torch's own backward pass goes through
            for node in self.passing:
                node.sweeping = TO_PARAMETERS
        try:
            with sweeping(), keeping_retained_gradient(self.prediction):
                yield
        finally:
            for node in nodes:
                node.sweeping = False

    def _push(
        self,
        edge: GradientEdge,
        root: SquareRoot,
        extensions: Sequence[SecondOrderExtension],
        layers: Sequence[LayerCall],
        reaches_all: bool = False,
    ) -> None:
        """What a root at `edge` contributes to `layers`; `reaches_all`: zeros to those that do not depend on it."""
        total = root.count
        step = self._step(edge, extensions)
        edges = [edge for layer in layers for edge in layer.edges]
        for begin in range(0, total, step):
            columns, signs = root.form(begin, min(begin + step, total))
            found = iter(pull_back([edge], edges, [columns]))
            uses = {}
            for layer in layers:
                grads = [next(found) for _ in layer.edges]
                own = self._leave_to_others(layer, grads, len(columns), extensions)
                if own and (reaches_all or any(grad is not None for grad in grads)):
                    with errors_for_users(extensions[0]):
                        uses[id(layer)] = layer.use(grads, len(columns), self.saved[id(layer)])
            self._collect(uses, signs, extensions, begin, total)

    def _leave_to_others(
        self, layer: LayerCall, columns: Sequence[Tensor | None], count: int, extensions: Sequence[SecondOrderExtension]
    ) -> bool:
        """Leaves the columns to the extensions that others wrote for this module; whether any is formed here."""
        own = False
        for ext in extensions:
            if ext.module_extension(layer.module) is None:
                own = True
            else:
                filled = layer.filled(columns, count)
                if ext.get_subsampling() is not None:
                    samples = _samples(ext, self.batch_size)
                    filled = [c[:, samples] for c in filled]
                self.state.calls.add_columns(ext, layer.module, filled)
        return own

    def _step(self, edge: GradientEdge, extensions: Sequence[SecondOrderExtension]) -> int:
        """How many columns to push at a time."""
        held = [edge.node._input_metadata[edge.output_nr]]
        held += [metadata for layer in self.layers for metadata in layer.node._input_metadata]
        column = sum(prod(metadata.shape) * metadata.dtype.itemsize for metadata in held)
        rules = [layer.node.observation.rule for layer in self.layers if isinstance(layer.node, OBSERVER_NODE)]
        column += sum(rule.column_bytes for rule in rules if rule is not None)
        budget = CTX.get_memory_budget()
        device = self.prediction.device
        if budget is None:
            # Not the caches for results of every sample, which each chunk would read and write once more.
            large = device.type == "cuda" or any(ext.per_sample for ext in extensions)
            budget = default_budget(device, LARGEST if large else CACHED)
        return max(1, budget // max(column, 1))

    # ---- collecting ----

    def _collect(
        self,
        uses: dict[int, ColumnUse],
        signs: Tensor | None,
        extensions: Sequence[SecondOrderExtension],
        begin: int,
        total: int,
    ) -> None:
        """Adds what columns [begin, ...) of `total` contribute to the results of all parameters."""
        shared: dict[int, list[tuple[ColumnUse, str, LayerCall]]] = {}
        for layer in self.layers:
            use = uses.pop(id(layer), None)
            if use is None:
                continue
            self._check(use, layer, extensions)
            single = {}
            for name, parameter in layer.parameters.items():
                if len(self.uses[id(parameter)]) == 1:
                    single[name] = parameter
                else:
                    shared.setdefault(id(parameter), []).append((use, name, layer))
            if single:
                self._add(use, single, layer.module, signs, extensions, begin, total)
        for parts in shared.values():
            _, name, layer = parts[0]
            use = merge_columns([(use, name) for use, name, _ in parts])
            self._add(use, {name: layer.parameters[name]}, layer.module, signs, extensions, begin, total)

    def _check(self, use: ColumnUse, layer: LayerCall, extensions: Sequence[SecondOrderExtension]) -> None:
        if use.mixes_samples:
            for ext in extensions:
                ext.check_mixed_samples(layer.module)
        if use.batch_size != self.batch_size:
            raise ValueError(
                f"{extensions[0]}: {type(layer.module).__name__} sees {use.batch_size} samples, the loss "
                f"{self.batch_size}: dimension 0 must be the samples, in the input of every layer and in the prediction"
            )

    def _add(
        self,
        use: ColumnUse,
        parameters: dict[str, nn.Parameter],
        module: nn.Module,
        signs: Tensor | None,
        extensions: Sequence[SecondOrderExtension],
        begin: int,
        total: int,
    ) -> None:
        extensions = [ext for ext in extensions if ext.module_extension(module) is None]
        if not extensions:
            return
        kronecker = [ext for ext in extensions if isinstance(ext, KroneckerExtension)]
        of_columns = [ext for ext in extensions if not isinstance(ext, KroneckerExtension)]
        with errors_for_users(extensions[0]):
            stats = _stats(use, parameters, signs, [ext for ext in of_columns if ext.get_subsampling() is None])
            for ext in of_columns:
                own = stats
                if ext.get_subsampling() is not None:
                    own = _stats(use.select(_samples(ext, use.batch_size)), parameters, None, [ext])
                for name, parameter in parameters.items():
                    key = (id(parameter), id(ext))
                    self.state.curvature[key] = ext.update(self.state.curvature.get(key), own[name], begin, total)
        for ext in kronecker:
            for name, parameter in parameters.items():
                with errors_for_users(ext):
                    self._add_factors(ext, use, name, parameter, module)

    def _add_factors(
        self, ext: KroneckerExtension, use: ColumnUse, name: str, parameter: nn.Parameter, module: nn.Module
    ) -> None:
        key = (id(parameter), id(ext))
        if self.state.curvature.get(key, ()) is None:
            return  # known to have no factors
        try:
            output = self._output_factor(ext, use, name)
            factors = self.state.curvature.get(key)
            if factors is None:
                input = self._input_factor(ext, use, name)
                factors = [output] if input is None else [output, input]
            else:
                factors = [factors[0] + output, *factors[1:]]
            nodes = frozenset(id(layer.node) for layer, _ in self.uses[id(parameter)])
            if self.state.factor_nodes.setdefault(key, nodes) != nodes:
                raise NotImplementedError(
                    f"{ext}: the losses of this backward pass reach {type(module).__name__}.{name} through different "
                    "uses, whose input factors have no sum; call backward() for each loss, or one loss on all outputs"
                )
        except NoKroneckerFactors as reason:
            factors = None
            ext.without_factors(module, reason)
        self.state.curvature[key] = factors

    def _output_factor(self, ext: KroneckerExtension, use: ColumnUse, name: str) -> Tensor:
        """B, which weight and bias of a layer without groups have in common."""
        key = (ext.effective_convention(use), use.groups(name), use.output_identity(name))
        if key not in use.output_factors:
            use.output_factors[key] = ext.output_factor(use, name)
        return use.output_factors[key]

    def _input_factor(self, ext: KroneckerExtension, use: ColumnUse, name: str) -> Tensor | None:
        """A, which layers with the same input (query, key and value) and several quantities have in common."""
        identity = use.input_identity(name)
        if identity is None:
            return ext.input_factor(use, name)
        key = (ext.effective_convention(use), ext.get_ea_strategy(), identity)
        if key not in self.input_factors:
            # With the input itself, whose memory must not be used again while it is identified by that.
            self.input_factors[key] = (ext.input_factor(use, name), use.input)
        return self.input_factors[key][0]

    def _save(self) -> None:
        """Puts the results so far on the parameters; a further loss replaces them by its sum with them."""
        storages: set[int] = set()
        for uses in self.uses.values():
            layer, name = uses[0]
            parameter = layer.parameters[name]
            for ext in self.extensions:
                if ext.module_extension(layer.module) is not None:
                    continue
                result = self.state.curvature[id(parameter), id(ext)]
                if result is None:
                    parameter.__dict__.pop(ext.savefield, None)
                    continue
                value = ext.quantity(result)
                if isinstance(value, Tensor):
                    value = _own(value, storages)
                else:
                    value = [_own(factor, storages) for factor in value]
                self.state.save(parameter, ext, value)


def _own(result: Tensor, storages: set[int]) -> Tensor:
    """A result in memory of its own, which users may change: what results have in common is computed once.

    Not in one of `storages`, to which it is added, and not expanded.
    """
    storage = result.untyped_storage()
    if storage.data_ptr() in storages or storage.nbytes() != result.numel() * result.element_size():
        if torch.is_grad_enabled() or result.dtype != statistics_dtype(result.dtype):
            result = result.clone(memory_format=torch.contiguous_format)
        else:
            result = dispatch.empty_result(result, result.shape).copy_(result)
        storage = result.untyped_storage()
    if result.numel():
        storages.add(storage.data_ptr())
    return result


# By the first layer's module the architectures, predictions' shapes and functions, whose samples are known to be apart.
_known_apart: weakref.WeakKeyDictionary[nn.Module, set] = weakref.WeakKeyDictionary()


def _layers(prediction: Tensor) -> tuple[list[LayerCall], list, list, int]:
    """The calls of layers in the prediction's graph with parameters that the running backward pass is asked for.

    Also the nodes of other calls whose backward pass is known, those of batch normalisations, which may mix the
    samples, and a hash of all functions in their order, with the dimensions that they act along.
    """
    layers, passing, mixing, names = [], [], [], []
    outside: set[int] = set()  # ids of the leaves that are reached from outside of layers with a rule
    visited, stack = set(), [prediction.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        name = node.name()
        names.append(name)
        names += dims_of(node)
        if isinstance(node, LAYER_NODE | OBSERVER_NODE):
            parameters = parameters_of(node)
            if parameters:
                layers.append(LayerCall(node, parameters))
            elif isinstance(node, OBSERVER_NODE) and node.observation.rule is not None:
                passing.append(node)
        elif name == "torch::autograd::AccumulateGrad":
            outside.add(id(node.variable))  # or inside of a module without a rule
        else:
            if "BatchNorm" in name:
                mixing.append(node)
            elif name == "CheckpointFunctionBackward":
                raise NotImplementedError(
                    "torch.utils.checkpoint with use_reentrant=True hides its layers from the graph: second-order "
                    "quantities need use_reentrant=False"
                )
        stack.extend(operand for operand, _ in _operands(node))
    # Those of modules without a rule are known only when their inputs are: _check_inside().
    outside -= {id(p) for layer in layers if layer.batch_size is None for p in layer.parameters.values()}
    for layer in layers:
        for name, parameter in layer.parameters.items():
            if id(parameter) in outside:
                raise _acts_outside(layer.module, name)
    return layers, passing, mixing, hash(tuple(names))


def _operands(node: Node) -> Sequence[tuple[Node | None, int]]:
    """What a node acts on; of a call with a rule, its inputs."""
    if isinstance(node, LAYER_NODE):
        return node.next_functions[:1]
    if isinstance(node, OBSERVER_NODE) and node.observation.rule is not None:
        return [node.next_functions[edge] for edge in input_edges(node).values()]
    return node.next_functions


def _acts_outside(module: nn.Module, name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__}.{name} also acts on the prediction from outside of its module, where no quantity can "
        "be formed: use it in the forward of extended modules only, or freeze it"
    )


def reached_parameters(output: Tensor) -> list[str]:
    """The names of the layers' parameters that `output` depends on and the running backward pass is asked for."""
    layers, *_ = _layers(output)
    return list(dict.fromkeys(f"{type(layer.module).__name__}.{name}" for layer in layers for name in layer.parameters))


def _check_apart(nodes, batch_size: int, extensions: Sequence[SecondOrderExtension]) -> None:
    """No batch normalisation may take its statistics from the batch; instance normalisation is one of [1, N * C, *]."""
    for node in nodes:
        training = getattr(node, "_saved_training", getattr(node, "_saved_train", True))
        if training and batch_size > 1 and node._input_metadata[0].shape[0] != 1:
            raise NotImplementedError(
                f"{extensions[0]}: a batch normalisation in train mode mixes the samples of its batch, so that the "
                "curvature is no sum over samples; call eval() on it"
            )


def _stats(use: ColumnUse, parameters, signs: Tensor | None, extensions) -> dict[str, ColumnStats]:
    want = 0
    for ext in extensions:
        want |= ext.want
    return use.stats(dict.fromkeys(parameters, want), signs) if want else {}


def _samples(ext: SecondOrderExtension, batch_size: int) -> Tensor:
    samples = ext.get_subsampling()
    if samples and max(samples) >= batch_size:
        raise ValueError(f"subsampling: expected indices below the batch size {batch_size}, got {samples}")
    return torch.tensor(samples, dtype=torch.long)


@contextlib.contextmanager
def errors_for_users(ext: SecondOrderExtension) -> Iterator[None]:
    try:
        yield
    except NoPerSampleGradients as reason:
        raise NotImplementedError(f"{type(ext).__name__}: not possible for the parameters of {reason}") from reason


def _scaled(root: SquareRoot, factor: Tensor | None) -> SquareRoot:
    """A square root of `factor` times the curvature."""
    if factor is None:
        return root

    def form(begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        columns, signs = root.form(begin, end)
        return columns * factor.sqrt().to(columns.dtype), signs

    return SquareRoot(root.count, form)

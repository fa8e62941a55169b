"""One step back of an averaged matrix: (1/N) sum_n J_n^T mat J_n for the functions between two tensors of a graph.

| what is between                            | what is done                                                            |
|--------------------------------------------|-------------------------------------------------------------------------|
| views, sums with a constant                | nothing                                                                 |
| elementwise functions, slopes d_n          | mat * (1/N) sum_n d_n d_n^T                                             |
| a Linear layer on [N, I]                   | W^T mat W                                                               |
| another Linear layer, a convolution        | rows of mat are samples of the layer's own backward, twice              |
| max pooling                                | mat is added at the places that were chosen, for every sample           |
| anything whose J_n is the same for all n   | N rows of mat at a time as one column of the batch, twice               |
| anything else                              | rows of mat as columns for every sample, twice                          |

Every step states the memory that it takes beyond the two matrices, from sizes alone.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from backpack_cuda.capture import LAYER_NODE, OBSERVER_NODE
from backpack_cuda.curvature.functions import BATCH_NORMS, ELEMENTWISE, dims_of, function_name, operand_metadata
from backpack_cuda.curvature.points import Point, operands_of
from backpack_cuda.curvature.pull_back import pull_back
from backpack_cuda.ops import dispatch

# Functions that leave a sample's entries as they are, in the same order.
_UNCHANGED = frozenset("View UnsafeView ReshapeAlias Alias Squeeze Unsqueeze Clone ToCopy".split())

# Elementwise where an operand has the size of the result.
_ELEMENTWISE = frozenset(ELEMENTWISE) | frozenset(
    "Add Sub Rsub Neg Mul Div Abs Frac Where Maximum Minimum Fmax Fmin MaskedFill Addcmul Addcdiv Lerp Remainder Fmod "
    "Relu LeakyRelu RreluWithNoise Hardtanh Hardsigmoid Hardshrink Softshrink Threshold Clamp ClampMin ClampMax "
    "NativeDropout".split()
)

# With a Jacobian that does not depend on the operands, nor on the sample where samples do not act on each other and are
# not chosen by their index (_keeps_samples).
_SAME_FOR_ALL = _UNCHANGED | frozenset(
    "Add Sub Rsub Neg Sum Mean Cumsum Permute Transpose Expand Repeat Unfold Im2Col Col2Im "
    "PixelShuffle PixelUnshuffle ChannelShuffle Flip Roll Select Slice Split SplitWithSizes Unbind Cat Stack "
    "ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D "
    "AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D "
    "UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
    "UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D "
    "UpsampleLinear1D UpsampleBilinear2D UpsampleTrilinear3D UpsampleBicubic2D".split()
)

# The same in the operand of this index, where it alone depends on the samples.
_SAME_IN = {"Mm": 0, "Addmm": 1, "Linear": 0, "Convolution": 0}

_SMALL = 128  # below, torch's product is faster than the kernel for symmetric ones
_STRIPES = 8  # of rows, in which a symmetric product is formed, without what earlier ones contain

_MAX_POOLINGS = {  # -> the number of pooled dims
    "MaxPool2DWithIndices": 2,
    "MaxPool3DWithIndices": 3,
    "AdaptiveMaxPool2D": 2,
    "AdaptiveMaxPool3D": 3,
    "FractionalMaxPool2D": 2,
    "FractionalMaxPool3D": 3,
}


class Budget(NamedTuple):
    """Bytes that a step may take for what it forms piece by piece."""

    columns: int  # of columns that are pushed at a time, and rows of matrices
    samples: int  # of a matrix for every sample


class Step:
    """A step from a point's parent to the point; this one for views."""

    def __init__(self, point: Point, batch_size: int, dtype: torch.dtype, budget: Budget):
        self.point = point
        self.source = point.parent
        self.batch_size = batch_size
        self.dtype = dtype  # of all matrices
        self.budget = budget

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def temporary(self, owned: bool) -> int:
        """Bytes that the step takes beside its two matrices; with `owned` there is but one."""
        return 0

    def in_place(self) -> bool:
        """Whether the parent's matrix becomes the result where nothing else needs it."""
        return True

    def run(self, matrix: Tensor, owned: bool, saved: tuple) -> Tensor:
        """The matrix at the point [D, D]; may change the given one in place where it is `owned`."""
        return matrix if owned else matrix.clone()

    # ---- for the other steps

    def _pull(self, columns: Tensor) -> Tensor:
        """Columns [V, N, D] at the parent -> at the point, in the type of statistics."""
        source, point = self.source, self.point
        if len(source.edges) == len(point.edges) == 1:
            (output,) = source.metadata
            (found,) = pull_back(source.edges, point.edges, [columns.to(output.dtype).reshape(-1, *output.shape)])
            if found is not None:
                return found.to(self.dtype).reshape(len(columns), self.batch_size, -1)
            return columns.new_zeros(len(columns), self.batch_size, point.features)
        parts = [
            part.to(m.dtype).reshape(len(columns), *m.shape)
            for part, m in zip(columns.split(source.sizes, 2), source.metadata, strict=True)
        ]
        found = pull_back(source.edges, point.edges, parts)
        return torch.cat(
            [
                columns.new_zeros(len(columns), self.batch_size, size)
                if grad is None
                else grad.to(self.dtype).reshape(len(columns), self.batch_size, size)
                for grad, size in zip(found, point.sizes, strict=True)
            ],
            2,
        )

    def _column_bytes(self) -> int:
        """Bytes of a column for all samples, at all functions in between."""
        entries = self.batch_size * (2 * self.source.features + 2 * self.point.features) * self.itemsize
        inner = [m for node in self.point.between[:-1] for m in node._input_metadata]
        return entries + sum(prod(m.shape) * m.dtype.itemsize for m in inner)

    def _columns_at_a_time(self) -> int:
        return max(1, self.budget.columns // max(self._column_bytes(), 1))

    def _rows_at_a_time(self, width: int) -> int:
        return max(1, self.budget.columns // max(width * self.itemsize, 1))


class _Elementwise(Step):
    def temporary(self, owned: bool) -> int:
        features = self.point.features
        rows = min(features, self._rows_at_a_time(features))
        return (rows * features + 3 * self.batch_size * features) * self.itemsize

    def run(self, matrix: Tensor, owned: bool, saved: tuple) -> Tensor:
        slopes = self._slopes()  # [N, D]
        features = self.point.features
        rows = self._rows_at_a_time(features)
        if rows >= features or torch.is_grad_enabled():
            if features < _SMALL:
                averaged = (slopes / self.batch_size).t() @ slopes
            else:
                averaged = dispatch.linear_kron_factor(slopes, 1 / self.batch_size)
            return matrix.mul_(averaged) if owned else matrix * averaged
        averaged = slopes.t() / self.batch_size
        matrix = matrix if owned else matrix.clone()
        for begin in range(0, features, rows):
            matrix[begin : begin + rows] *= averaged[begin : begin + rows] @ slopes
        return matrix

    def _slopes(self) -> Tensor:
        (edge,), (output,) = self.point.edges, self.source.metadata
        (slopes,) = torch.autograd.grad(
            self.source.edges[0],
            edge,
            torch.ones(output.shape, dtype=output.dtype, device=output.device),
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
        )
        return slopes.reshape(self.batch_size, -1).to(self.dtype)


class _Twice(Step):
    """mat J for all rows of mat, then J^T of its columns."""

    def in_place(self) -> bool:
        return False

    def temporary(self, owned: bool) -> int:
        product = self.source.features * self.point.features * self.itemsize
        return product + self._pushing_bytes()

    def run(self, matrix: Tensor, owned: bool, saved: tuple) -> Tensor:
        product = self._push_all(matrix, saved)  # [D_out, D_in], mat J
        return self._push_all(product.t(), saved)

    def _push_all(self, rows: Tensor, saved: tuple) -> Tensor:
        at_a_time = self._at_a_time()
        return in_pieces(len(rows), at_a_time, lambda begin, end: self._push(rows[begin:end], saved))

    def _pushing_bytes(self) -> int:
        raise NotImplementedError

    def _at_a_time(self) -> int:
        raise NotImplementedError

    def _push(self, rows: Tensor, saved: tuple) -> Tensor:
        """Rows [K, D_out] times J, [K, D_in]."""
        raise NotImplementedError


class _Layer(_Twice):
    """A layer with a rule, by its own backward."""

    def _width(self) -> int:
        return self.source.features + self.point.features

    def _pushing_bytes(self) -> int:
        rows = min(max(self.source.features, self.point.features), self._at_a_time())
        return 3 * rows * self._width() * self.itemsize  # libraries copy operands and results of convolutions

    def _at_a_time(self) -> int:
        return self._rows_at_a_time(self._width())

    def _push(self, rows: Tensor, saved: tuple) -> Tensor:
        input, weight = saved
        (output,) = self.source.metadata
        (metadata,) = self.point.metadata
        columns = rows.reshape(-1, *output.shape[1:])
        # Only the size of the input counts.
        input = weight.new_empty(1, dtype=self.dtype).expand(len(columns), *metadata.shape[1:])
        found, _, _ = self.source.node.operation.backward(columns, input, weight.to(self.dtype), (True, False, False))
        return found.reshape(len(rows), -1)


class _Linear(_Layer):
    """A Linear layer on a sample without further dimensions: W^T mat W, of whose symmetric product a half is formed."""

    def run(self, matrix: Tensor, owned: bool, saved: tuple) -> Tensor:
        _, weight = saved  # [O, I]
        features = len(weight.t())
        if features < _SMALL or torch.is_grad_enabled():
            return super().run(matrix, owned, saved)
        weight = weight.to(self.dtype)
        product = weight.t() @ matrix  # [I, O]
        result = product.new_empty(features, features)
        step = max(_SMALL, features // _STRIPES)
        for begin in range(0, features, step):
            end = begin + step
            torch.mm(product[begin:end], weight[:, begin:], out=result[begin:end, begin:])
            result[end:, begin:end] = result[begin:end, end:].t()
        return result


class _SameForAll(_Twice):
    """As many rows as there are samples in one column of the batch."""

    def _pushing_bytes(self) -> int:
        rows = max(self.source.features, self.point.features)
        return min(-(-rows // self.batch_size), self._columns_at_a_time()) * self._column_bytes()

    def _at_a_time(self) -> int:
        return self._columns_at_a_time() * self.batch_size

    def run(self, matrix: Tensor, owned: bool, saved: tuple) -> Tensor:
        result = super().run(matrix, owned, saved)
        # Functions that choose entries give views of the matrix, which others may still need; sums expanded tensors.
        shares = result.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
        return result.clone(memory_format=torch.contiguous_format) if shares or 0 in result.stride() else result

    def _push(self, rows: Tensor, saved: tuple) -> Tensor:
        count = -(-len(rows) // self.batch_size)
        missing = count * self.batch_size - len(rows)
        columns = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        found = self._pull(columns.reshape(count, self.batch_size, -1))
        return found.flatten(0, 1)[: len(rows)]


class _MaxPooling(Step):
    def in_place(self) -> bool:
        return False

    def temporary(self, owned: bool) -> int:
        return self.source.features**2 * 2 * torch.long.itemsize

    def run(self, matrix: Tensor, owned: bool, saved: tuple) -> Tensor:
        (indices,) = saved  # [N, C, *], into the pooled dims of each channel
        features, dims = self.point.features, _MAX_POOLINGS[function_name(self.source.node.name())]
        (input,) = self.point.metadata
        pixels = prod(input.shape[-dims:])
        channels = features // pixels
        indices = indices.reshape(self.batch_size, channels, -1)
        indices = indices + pixels * torch.arange(channels, device=indices.device)[:, None]
        indices = indices.flatten(1)  # [N, D_out]
        result = torch.zeros(features * features, dtype=matrix.dtype, device=matrix.device)
        values = (matrix / self.batch_size).reshape(-1)
        for chosen in indices:
            places = (chosen[:, None] * features + chosen).view(-1)
            result = (
                result.index_add(0, places, values) if matrix.requires_grad else result.index_add_(0, places, values)
            )
        return result.view(features, features)


class _Generic(Step):
    def in_place(self) -> bool:
        return False

    def _block(self) -> int:
        """How many features of the point are done at a time: those of mat J_n are held for all samples."""
        feature = self.batch_size * self.source.features * self.itemsize
        return max(1, min(self.point.features, self.budget.samples // max(feature, 1)))

    def temporary(self, owned: bool) -> int:
        held = self.batch_size * self.source.features * self._block() * self.itemsize
        columns = min(max(self.source.features, self._block()), self._columns_at_a_time())
        return held + columns * self._column_bytes()

    def run(self, matrix: Tensor, owned: bool, saved: tuple) -> Tensor:
        at_a_time = self._columns_at_a_time()

        def block(begin: int, end: int) -> Tensor:
            def first(row: int, to: int) -> Tensor:  # [V, N, end - begin] of mat J_n
                columns = matrix[row:to, None].expand(-1, self.batch_size, -1)
                return self._pull(columns)[..., begin:end]

            held = in_pieces(len(matrix), at_a_time, first)  # [D_out, N, end - begin]

            def second(column: int, to: int) -> Tensor:
                return self._pull(held[..., column:to].permute(2, 1, 0)).sum(1)  # [V, D_in]

            return in_pieces(end - begin, at_a_time, second)

        return in_pieces(self.point.features, self._block(), block) / self.batch_size


def in_pieces(count: int, at_a_time: int, form: Callable[[int, int], Tensor]) -> Tensor:
    """Rows [count, *] from form(begin, end) for some of them."""
    if at_a_time >= count:
        return form(0, count)
    pieces = range(0, count, at_a_time)
    if torch.is_grad_enabled():
        return torch.cat([form(begin, min(begin + at_a_time, count)) for begin in pieces])
    result = None
    for begin in pieces:
        rows = form(begin, min(begin + at_a_time, count))
        if result is None:
            result = rows.new_empty(count, *rows.shape[1:])
        result[begin : begin + len(rows)] = rows
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Which step
# ---------------------------------------------------------------------------------------------------------------------


def step_to(point: Point, batch_size: int, dtype: torch.dtype, budget: Budget) -> Step:
    """The cheapest step from a point's parent that is known to be right; matrices are of the type `dtype`."""
    return _kind(point, batch_size)(point, batch_size, dtype, budget)


def _kind(point: Point, batch_size: int) -> type[Step]:
    inside = {point.node, *point.between[:-1]}
    # Of every function the places of operands that come from the point.
    places = {
        node: [i for i, (operand, _) in enumerate(operands_of(node)) if operand in inside] for node in point.between
    }
    source, outputs = point.parent, len(point.parent.edges)
    if len(point.edges) == outputs == 1:
        if all(len(p) == 1 and _leaves_unchanged(node, p[0]) for node, p in places.items()):
            return Step
        if all(_is_elementwise(node, p) for node, p in places.items()):
            return _Elementwise
        if len(point.between) == 1:
            if isinstance(source.node, LAYER_NODE):
                is_plain_linear = getattr(source.node.operation, "bias_dim", None) == -1 and _has_rows(point)
                return _Linear if is_plain_linear else _Layer
            if not isinstance(source.node, BackwardCFunction) and function_name(source.node.name()) in _MAX_POOLINGS:
                return _MaxPooling
    if all(_is_same_for_all(node, p) and _keeps_samples(node, p[0], batch_size) for node, p in places.items()):
        return _SameForAll
    return _Generic


def _has_rows(point: Point) -> bool:
    """Whether the point is a tensor [N, D]."""
    (metadata,) = point.metadata
    return len(metadata.shape) == 2 and metadata.shape[1] == point.features


def _hands_on(node: BackwardCFunction) -> bool:
    """Whether a node is an observer, or another function of ours, that gives on what it gets."""
    if isinstance(node, OBSERVER_NODE):
        return node.observation.rule is None
    return getattr(type(node)._forward_cls, "hands_on", False)


def _same_size(node: Node, place: int, shape: bool = True) -> bool:
    operand = operand_metadata(node, place)
    sizes = [tuple(m.shape) for m in node._input_metadata]
    return any(tuple(operand.shape) == size if shape else prod(operand.shape) == prod(size) for size in sizes)


def _leaves_unchanged(node: Node, place: int) -> bool:
    if isinstance(node, BackwardCFunction):
        return _hands_on(node) and len(node._input_metadata) == 1
    name = function_name(node.name())
    if name in ("Add", "Sub"):
        positive = place == 0 or (name == "Add" and getattr(node, "_saved_alpha", None) == 1)
        return positive and _same_size(node, place)
    return name in _UNCHANGED and _same_size(node, place, shape=False)


def _is_elementwise(node: Node, places: Sequence[int]) -> bool:
    if len(places) == 1 and _leaves_unchanged(node, places[0]):
        return True
    if isinstance(node, BackwardCFunction):
        return False
    name = function_name(node.name())
    if not all(_same_size(node, place) for place in places):
        return False
    return (
        name in _ELEMENTWISE
        or (name in BATCH_NORMS and list(places) == [0] and not node._saved_training)
        or (name == "PreluKernel" and list(places) == [0])
    )


def _is_same_for_all(node: Node, places: Sequence[int]) -> bool:
    if isinstance(node, BackwardCFunction):
        return isinstance(node, LAYER_NODE) or _hands_on(node)
    name = function_name(node.name())
    return name in _SAME_FOR_ALL or (name in _SAME_IN and list(places) == [_SAME_IN[name]])


def _keeps_samples(node: Node, place: int, batch_size: int) -> bool:
    """Whether the samples are in dimension 0 of what a node returns, where it treats none in its own way: a loop over
    them, of which each is sliced as its length says, is no function with the same Jacobian for all.
    """
    if batch_size < 2:
        return True
    if any(not m.shape or m.shape[0] % batch_size for m in node._input_metadata):
        return False
    if isinstance(node, BackwardCFunction):
        return True
    name = function_name(node.name())
    of_result = name in ("Stack", "Unsqueeze")
    size = len((node._input_metadata[0] if of_result else operand_metadata(node, place)).shape)
    first = (0, (1 << 64) - size)  # negative ones are those of unsigned integers
    if name == "Permute":
        return node._saved_dims[0] in first
    dims: list[int] = []
    for found in dims_of(node):
        dims += found if isinstance(found, tuple) else (found,)
    return not any(dim in first for dim in dims)


def saved_for_step(point: Point) -> tuple:
    """What the step below a point needs of what its node has saved."""
    node = point.node
    if isinstance(node, LAYER_NODE):
        return node.saved_tensors
    if not isinstance(node, BackwardCFunction) and function_name(node.name()) in _MAX_POOLINGS:
        return (node._saved_result1,)  # the indices
    return ()

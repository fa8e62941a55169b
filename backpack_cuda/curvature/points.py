"""Where one matrix can stand for all that follows: the tensors of a graph that every path back to a layer passes.

In the graph of a prediction a tensor dominates a layer if no path from the prediction to the layer avoids it. Each
tensor's immediate dominator is the next such one towards the prediction, so that they form a tree: a chain where
functions follow each other, with a fork where branches join.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack_cuda.capture import LAYER_NODE


class Point:
    """A node's outputs that act on the prediction: D features of every sample."""

    def __init__(self, node: Node, outputs: Sequence[int], batch_size: int):
        self.node = node
        metadata, outputs = node._input_metadata, sorted(outputs)
        self.edges = [GradientEdge(node, i) for i in outputs]
        self.metadata = [metadata[i] for i in outputs]  # shape [N * R, *], dtype, device
        self.sizes = [prod(m.shape) // max(batch_size, 1) if batch_size else prod(m.shape[1:]) for m in self.metadata]
        self.features = sum(self.sizes)  # D
        self._parent: weakref.ref[Point] | None = None  # no cycle, which would keep the graph
        self.between: list[Node] = []  # the functions from here to the parent; its own is the last one
        self.children: list[Point] = []
        self._subtree = 1

    @property
    def parent(self) -> "Point | None":
        """The next point on the way to the prediction."""
        return None if self._parent is None else self._parent()

    def visits(self) -> Iterator[tuple["Point", bool]]:
        """This point and all below, parents first; with whether it is the last child. The largest subtree comes last,
        so that what a fork holds is given on, not kept.
        """
        stack = [(self, True)]
        while stack:
            point, last = stack.pop()
            yield point, last
            children = sorted(point.children, key=lambda child: child._subtree, reverse=True)
            stack.extend((child, i == 0) for i, child in enumerate(children))


class Graph:
    """The part of a prediction's graph that leads to some nodes, with the dominators of each node."""

    def __init__(self, prediction: Tensor, layers: Sequence[Node]):
        self.root = prediction.grad_fn
        self.layers = layers
        self.consumers: dict[Node, list[tuple[Node, int]]] = {}  # node -> (node that it acts on, place among operands)
        self.outputs: dict[Node, set[int]] = {self.root: {prediction.output_nr}}
        self._order: dict[Node, int] = {}  # consumers first
        self._connect(set(layers))
        self._dominator = self._dominators()

    def _connect(self, layers: set[Node]) -> None:
        leads: dict[Node | None, bool] = {None: False}
        finished = []
        stack = [self.root]
        while stack:
            node = stack[-1]
            if node in leads:
                stack.pop()
                continue
            operands = [operand for operand, _ in operands_of(node)]
            missing = [operand for operand in operands if operand not in leads]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            leads[node] = node in layers or any(leads[operand] for operand in operands)
            if leads[node]:
                finished.append(node)
        for node in reversed(finished):
            self._order[node] = len(self._order)
            for place, (operand, output_nr) in enumerate(operands_of(node)):
                if leads[operand]:
                    self.consumers.setdefault(operand, []).append((node, place))
                    self.outputs.setdefault(operand, set()).add(output_nr)

    def _dominators(self) -> dict[Node, Node]:
        """The immediate dominator of each node but the root (Cooper, Harvey and Kennedy; one pass, without cycles)."""
        found: dict[Node, Node] = {}
        for node in self._order:
            if node is self.root:
                continue
            (nearest, _), *others = self.consumers[node]
            for other, _ in others:
                while nearest is not other:
                    if self._order[nearest] < self._order[other]:
                        other = found[other]
                    else:
                        nearest = found[nearest]
            found[node] = nearest
        return found

    def tree(self, batch_size: int, choose: Callable[[list[Point]], list[Point]]) -> dict[Node, Point]:
        """The points that the matrices of `layers` pass; `choose` leaves out those where a matrix cannot stand.

        The prediction's point must be among the chosen ones.
        """
        passed: dict[Node, Point] = {}
        for node in self.layers:
            while node not in passed:
                passed[node] = Point(node, tuple(self.outputs[node]), batch_size)
                if node is self.root:
                    break
                node = self._dominator[node]
        ordered = sorted(passed.values(), key=lambda point: self._order[point.node])
        points = {point.node: point for point in choose(ordered)}
        for point in points.values():
            if point.node is self.root:
                continue
            point._parent = weakref.ref(self.nearest(self._dominator[point.node], points))
            point.parent.children.append(point)
            point.between = self.between(point.node, point.parent.node)
        for point in reversed(points.values()):
            if point.parent is not None:
                point.parent._subtree += point._subtree
        return points

    def nearest(self, node: Node, points: Mapping[Node, Point]) -> Point:
        """The point at a node, or the nearest one towards the prediction."""
        while node not in points:
            node = self._dominator[node]
        return points[node]

    def between(self, node: Node, dominator: Node) -> list[Node]:
        """The functions from a node's outputs to those of one of its dominators, whose own is the last one."""
        found, stack = [], [node]
        seen = set()
        while stack:
            for consumer, _ in self.consumers[stack.pop()]:
                if consumer not in seen:
                    seen.add(consumer)
                    if consumer is not dominator:
                        found.append(consumer)
                        stack.append(consumer)
        return [*found, dominator]


def operands_of(node: Node) -> Sequence[tuple[Node | None, int]]:
    """The nodes whose outputs a node acts on; of a layer's, not its parameters."""
    return node.next_functions[:1] if isinstance(node, LAYER_NODE) else node.next_functions

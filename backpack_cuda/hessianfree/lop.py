"""Products with transposed Jacobians."""

import torch
from torch import Tensor

from backpack_cuda.hessianfree.checks import Tensors, as_tuple, check_alike


def L_op(ys: Tensors, xs: Tensors, ws: Tensors, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """The vectors `ws` times the transposed Jacobian of `ys` with respect to `xs`.

    Args:
        ys: outputs of a graph; a tensor or several.
        xs: tensors in that graph; a tensor or several.
        ws: one vector for each of `ys`, of its size.
        retain_graph: whether the graph may be used again.
        detach: return the products without a graph.

    Returns:
        A vector for each of `xs`, of its size; zeros where `ys` does not depend on it.

    Raises:
        TypeError: something else than tensors.
        ValueError: numbers or sizes that do not belong together.
    """
    ys, xs, ws = as_tuple("ys", ys), as_tuple("xs", xs), as_tuple("ws", ws)
    check_alike("ws", ws, "ys", ys)
    products = torch.autograd.grad(
        ys, xs, ws, create_graph=True, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    return tuple(product.detach() for product in products) if detach else products


def transposed_jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """`L_op` under another name: the vectors `v` times the transposed Jacobian of `f` with respect to `x`."""
    return L_op(f, x, v, retain_graph=retain_graph, detach=detach)

"""Products with Jacobians, by differentiating the product with the transposed one (Townsend 2017)."""

import torch
from torch import Tensor

from backpack_cuda.hessianfree.checks import Tensors, as_tuple, check_alike


def R_op(ys: Tensors, xs: Tensors, vs: Tensors, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """The Jacobian of `ys` with respect to `xs` times the vectors `vs`.

    Args:
        ys: outputs of a graph; a tensor or several.
        xs: tensors in that graph; a tensor or several.
        vs: one vector for each of `xs`, of its size.
        retain_graph: whether the graph may be used again.
        detach: return the products without a graph.

    Returns:
        A vector for each of `ys`, of its size.

    Raises:
        TypeError: something else than tensors.
        ValueError: numbers or sizes that do not belong together.
    """
    ys, xs, vs = as_tuple("ys", ys), as_tuple("xs", xs), as_tuple("vs", vs)
    check_alike("vs", vs, "xs", xs)
    ws = [torch.zeros_like(y, requires_grad=True) for y in ys]
    transposed = torch.autograd.grad(
        ys, xs, ws, create_graph=True, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    # Where ys does not depend on xs the gradient does not depend on ws.
    used = [(t, v) for t, v in zip(transposed, vs, strict=True) if t.requires_grad]
    if not used:
        return tuple(torch.zeros_like(y) for y in ys)
    products = torch.autograd.grad(
        [t for t, _ in used], ws, [v for _, v in used], create_graph=True, allow_unused=True, materialize_grads=True
    )
    return tuple(product.detach() for product in products) if detach else products


def jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """`R_op` under another name: the Jacobian of `f` with respect to `x` times the vectors `v`."""
    return R_op(f, x, v, retain_graph=retain_graph, detach=detach)

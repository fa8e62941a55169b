"""Products with Hessians (Pearlmutter 1994)."""

import torch
from torch import Tensor

from backpack_cuda.hessianfree.checks import Tensors, as_tuple, check_alike


def hessian_vector_product(
    f: Tensor, params: Tensors, v: Tensors, grad_params: Tensors | None = None, detach: bool = True
) -> tuple[Tensor, ...]:
    """The Hessian of `f` with respect to `params`, blocks between different ones included, times the vectors `v`.

    The Hessian is symmetric, so that one differentiation of the gradient is enough.

    Args:
        f: a scalar with a graph.
        params: a tensor of that graph, or several.
        v: one vector for each of `params`, of its size.
        grad_params: the gradient of `f` for each of `params`, formed under `create_graph=True`, if it is known already.
        detach: return the products without a graph.

    Returns:
        A vector for each of `params`, of its size; zeros where `f` is linear.

    Raises:
        TypeError: something else than tensors.
        ValueError: numbers or sizes that do not belong together.
    """
    params, v = as_tuple("params", params), as_tuple("v", v)
    check_alike("v", v, "params", params)
    if grad_params is None:
        grad_params = torch.autograd.grad(f, params, create_graph=True, materialize_grads=True)
    else:
        grad_params = as_tuple("grad_params", grad_params)
        check_alike("grad_params", grad_params, "params", params)
    curved = [(g, vector) for g, vector in zip(grad_params, v, strict=True) if g.requires_grad]
    if not curved:
        return tuple(torch.zeros_like(p) for p in params)
    products = torch.autograd.grad(
        [g for g, _ in curved],
        params,
        [vector for _, vector in curved],
        create_graph=not detach,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return tuple(product.detach() for product in products) if detach else products

"""Curvature products of a stock model by plain loops in float64: no vectorisation, no hooks, nothing of the package."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Products = dict[str, Callable[[Tensor], Tensor]]  # by the parameter's name: [*P] -> [*P]


def hessian_products(model: nn.Module, loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Products:
    """Products with the blocks of the Hessian of loss(model(inputs)), by double backward."""

    def product(parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
        def multiply(v: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(loss(model(inputs)), parameter, create_graph=True, materialize_grads=True)
            if not gradient.requires_grad:
                return torch.zeros_like(v)
            return torch.autograd.grad((gradient * v).sum(), parameter, materialize_grads=True)[0]

        return multiply

    return {name: product(p) for name, p in model.named_parameters() if p.requires_grad}


def loss_hessian(loss: Callable[[Tensor], Tensor], prediction: Tensor) -> Tensor:
    """The Hessian [D, D] of the loss at the prediction, of D entries, row by row."""
    f = prediction.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(f), f, create_graph=True)
    return torch.stack([torch.autograd.grad(g, f, retain_graph=True)[0].flatten() for g in gradient.flatten()])


def jacobian(tensor: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """[D, |P|] for each parameter, row by row."""
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in tensor.flatten()
    ]
    return [torch.stack([row[i].flatten() for row in rows]) for i in range(len(parameters))]


def ggn_products(model: nn.Module, loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Products:
    """Products with the blocks of the GGN, from dense Jacobians."""
    return sandwich_products(model, [(prediction := model(inputs), loss_hessian(loss, prediction))])


def sandwich_products(model: nn.Module, curvatures: list[tuple[Tensor, Tensor]]) -> Products:
    """Products with sum_s J_s^T C_s J_s, for tensors of a graph and the dense matrices C_s [D, D] there."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    blocks = [torch.zeros(p.numel(), p.numel(), dtype=p.dtype) for p in parameters.values()]
    for tensor, curvature in curvatures:
        for block, rows in zip(blocks, jacobian(tensor, list(parameters.values())), strict=True):
            block += rows.T @ curvature @ rows

    def product(block: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: (block @ v.flatten()).view_as(v)

    return {name: product(block) for name, block in zip(parameters, blocks, strict=True)}

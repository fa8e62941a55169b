"""Slow float64 oracles of what is defined by a recursion over the modules of a Sequential: KFRA and PCHMP.

Nothing of the product is imported here. Every module is a dense per-sample Jacobian, entry by entry from autograd.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from curvature_oracle import loss_hessian
from torch import Tensor, nn


class Step(NamedTuple):
    """One module of a Sequential at the samples' inputs x_n."""

    name: str
    jacobian: Tensor  # [N, D_out, D_in]   of its output
    parameters: dict[str, Tensor]  # [N, D_out, |P|]   Jacobians by the parameter's name
    residual: Tensor  # [N, D_in]   sum_i (g_n)_i d^2 f_i / dx^2, the diagonal; zero for linear modules


def _jacobian(outputs: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """[D_out, numel] of `outputs`, one row after the other."""
    rows = [
        torch.autograd.grad(entry, wanted, retain_graph=True, materialize_grads=True, allow_unused=True)
        for entry in outputs.flatten()
    ]
    return [torch.stack([row[i].flatten() for row in rows]) for i in range(len(wanted))]


def steps(model: nn.Sequential, loss: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[list[Step], Tensor]:
    """The steps of a stock float64 model, first one first, and the Hessians [N, D, D] of the loss at its outputs."""
    outputs = model(inputs).detach()
    hessian = loss_hessian(loss, outputs)
    outputs.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(outputs), outputs)
    samples: list[list[Step]] = []
    for n in range(len(inputs)):
        x, at = inputs[n : n + 1], []
        for module in model:
            at.append(x)
            x = module(x).detach()
        g, found = gradient[n : n + 1], []
        for (name, module), x in reversed(list(zip(model.named_children(), at, strict=True))):
            x = x.detach()
            x = x.requires_grad_() if x.is_floating_point() else x
            parameters = dict(module.named_parameters(prefix=name))
            wanted = [*([x] if x.requires_grad else []), *parameters.values()]
            y = module(x)
            jacobians = _jacobian(y, wanted)
            residual = torch.zeros(1)
            if x.requires_grad:
                (g_in,) = torch.autograd.grad(y, x, g, create_graph=True)
                residual = torch.zeros(x.numel(), dtype=x.dtype)
                if g_in.requires_grad:
                    for i, entry in enumerate(g_in.flatten()):
                        (row,) = torch.autograd.grad(entry, x, retain_graph=True, materialize_grads=True)
                        residual[i] = row.flatten()[i]
                g = g_in.detach()
            own = dict(zip(parameters, jacobians[1:] if x.requires_grad else jacobians, strict=True))
            found.append(Step(name, jacobians[0], own, residual))
        samples.append(found[::-1])
    joined = []
    for calls in zip(*samples, strict=True):
        parameters = {name: torch.stack([c.parameters[name] for c in calls]) for name in calls[0].parameters}
        jacobian, residual = (torch.stack([getattr(c, field) for c in calls]) for field in ("jacobian", "residual"))
        joined.append(Step(calls[0].name, jacobian, parameters, residual))
    return joined, hessian


def averaged(chain: list[Step], hessian: Tensor) -> dict[str, Tensor]:
    """By module name KFRA's matrix [D_out, D_out] at the module's output (Botev et al. 2017).

    The batch average of the loss' Hessians, sum_n H_n of the total loss, is pushed back by (1/N) sum_n J_n^T mat J_n.
    """
    mat, found = hessian.sum(0), {}
    for step in reversed(chain):
        found[step.name] = mat
        if step is not chain[0]:
            mat = (step.jacobian.mT @ mat @ step.jacobian).mean(0)
    return found


def output_factor(module: nn.Module, mat: Tensor, convention: str, groups: int = 1) -> Tensor:
    """B [groups, O, O] of a Linear layer or convolution with the matrix `mat` at its output.

    expand: the sum over positions of the block that belongs to one, reduce: over all pairs of positions; "backpack" is
    the first for Linear layers, the second for convolutions.
    """
    linear = isinstance(module, nn.Linear)
    outputs = module.out_features if linear else module.out_channels
    places = torch.arange(len(mat))  # of the features of a sample's output
    places = places.reshape(-1, outputs) if linear else places.reshape(outputs, -1).T  # [R, O]
    if convention == "backpack":
        convention = "expand" if linear else "reduce"
    result = torch.zeros(groups, outputs // groups, outputs // groups, dtype=mat.dtype)
    for i, r in enumerate(places):
        for j, s in enumerate(places):
            if i == j or convention == "reduce":
                for g, (rows, columns) in enumerate(zip(r.chunk(groups), s.chunk(groups), strict=True)):
                    result[g] += mat[rows][:, columns]
    return result


def positive_blocks(chain: list[Step], hessian: Tensor, modify: str) -> dict[str, Tensor]:
    """By parameter name the block [|P|, |P|] of the positive-curvature Hessian (Dangel et al. 2020).

    Residuals enter with their negative entries set to zero ("clip") or turned positive ("abs").
    """
    change = {"clip": lambda r: r.clamp(min=0), "abs": torch.abs}[modify]
    found = {}
    for step in reversed(chain):
        for name, jacobian in step.parameters.items():
            found[name] = (jacobian.mT @ hessian @ jacobian).sum(0)
        if step is not chain[0]:
            hessian = step.jacobian.mT @ hessian @ step.jacobian + torch.diag_embed(change(step.residual))
    return found

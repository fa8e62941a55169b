"""What the results should be, from plain torch alone: one backward pass per sample, class or parameter."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peers import QUANTITIES, Peer, tensors, vectors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, unfold

# Extension -> name of the parameter -> its result; that of a Kronecker-factored extension is a list.
References = dict[str, dict[str, Any]]

FIRST_ORDER = {"BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"}
GGN = {"DiagGGNExact", "DiagGGNMC", "BatchDiagGGNExact", "BatchDiagGGNMC", "SqrtGGNExact", "SqrtGGNMC"}
FACTORS = {"KFAC", "KFLR"}
PRODUCTS = {"HMP", "GGNMP", "PCHMP"}
HESSIAN_PARAMETERS = 20_000  # of models whose Hessian's diagonal is compared: it takes a product for each
# Estimates of the quantity without MC: only their size is compared.
SAMPLED = {"DiagGGNMC", "BatchDiagGGNMC", "SqrtGGNMC", "KFAC"}


def reference_results(model: nn.Module, inputs: Tensor, labels: Tensor, extensions: Collection[str]) -> References:
    """What each of `extensions` should give, as far as `compare` looks at it."""
    wanted, reference = set(extensions), {}
    if wanted & FIRST_ORDER:
        reference |= first_order(model, inputs, labels)
    if wanted & GGN:
        per_sample = ggn_diagonals(model, inputs)
        total = {name: rows.sum(0) for name, rows in per_sample.items()}
        reference |= {name: per_sample if name.startswith("Batch") else total for name in GGN}
    if wanted & FACTORS:
        reference |= dict.fromkeys(FACTORS, kronecker_factors(model, inputs))
    if "KFRA" in wanted:
        reference["KFRA"] = averaged_factors(model, inputs)
    for extension in PRODUCTS & wanted:
        reference[extension] = products(model, inputs, labels, extension)
    if "DiagHessian" in wanted:
        small = sum(p.numel() for p in model.parameters()) <= HESSIAN_PARAMETERS
        reference["DiagHessian"] = hessian_diagonal(model, inputs, labels) if small else {}
    return reference


def first_order(model: nn.Module, inputs: Tensor, labels: Tensor) -> References:
    """Every statistic of the per-sample gradients."""
    parameters = dict(model.named_parameters())
    rows = []
    for n in range(len(labels)):
        loss = cross_entropy(model(inputs[n : n + 1]), labels[n : n + 1]) / len(labels)
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    batch_grads = {name: torch.stack(column) for name, *column in zip(parameters, *rows, strict=True)}
    return {
        "BatchGrad": batch_grads,
        "BatchL2Grad": {name: g.flatten(1).double().square().sum(1) for name, g in batch_grads.items()},
        "SumGradSquared": {name: g.double().square().sum(0) for name, g in batch_grads.items()},
        "Variance": {name: g.double().var(0, correction=0) for name, g in batch_grads.items()},
    }


def hessian_roots(logits: Tensor) -> Iterator[Tensor]:
    """Columns [N, C] of a square root of the Hessian of the mean cross-entropy at `logits` [N, C], one per class."""
    p = logits.detach().softmax(1)
    for v, one_hot in enumerate(torch.eye(logits.shape[1], device=logits.device)):
        yield (p[:, v, None] / len(p)).sqrt() * (one_hot - p)


def ggn_diagonals(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Each sample's share of the GGN's diagonal, [N, *P], one sample and class at a time."""
    parameters = dict(model.named_parameters())
    diagonals = {name: p.new_zeros(len(inputs), *p.shape) for name, p in parameters.items()}
    for n, sample in enumerate(inputs):
        logits = model(sample[None])
        for root in hessian_roots(logits):
            gradients = torch.autograd.grad(logits, list(parameters.values()), root, retain_graph=True)
            for diagonal, gradient in zip(diagonals.values(), gradients, strict=True):
                diagonal[n].addcmul_(gradient, gradient, value=1 / len(inputs))
    return diagonals


def kronecker_factors(model: nn.Module, inputs: Tensor) -> dict[str, list[Tensor]]:
    """KFLR's [B, A] of weights and [B] of biases of all Linear layers and convolutions without groups.

    BackPACK's scaling: both sum over the positions of a convolution, B before and A after the product. Linear layers
    with positions, which BackPACK refuses, sum after the products, and A is a mean over samples and positions.
    """
    called: dict[str, tuple[Tensor, Tensor]] = {}  # module -> its input and output
    handles = [
        module.register_forward_hook(lambda _, i, o, name=name: called.update({name: (i[0].detach(), o)}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    logits = model(inputs)
    for handle in handles:
        handle.remove()
    modules = {name: model.get_submodule(name) for name in called}
    factors = {name: torch.zeros(2 * [len(module.weight)], device=inputs.device) for name, module in modules.items()}
    for root in hessian_roots(logits):
        columns = torch.autograd.grad(logits, [output for _, output in called.values()], root, retain_graph=True)
        for (name, module), column in zip(modules.items(), columns, strict=True):
            rows = column.flatten(2).sum(2) if isinstance(module, nn.Conv2d) else column.flatten(0, -2)
            factors[name] += rows.T @ rows
    result = {}
    for name, module in modules.items():
        x, b = called[name][0], factors[name]
        if isinstance(module, nn.Conv2d):
            x = unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
            a = sum(sample.T @ sample for sample in x) / len(x)
        else:
            x = x.flatten(0, -2)
            a = x.T @ x / len(x)
        result[f"{name}.weight"] = [b, a]
        if module.bias is not None:
            result[f"{name}.bias"] = [b]
    return result


def hessian_diagonal(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """By one product with the Hessian per parameter."""
    parameters = dict(model.named_parameters())
    loss = cross_entropy(model(inputs), labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    diagonals = {}
    for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
        entries = [
            torch.autograd.grad(entry, p, retain_graph=True)[0].flatten()[i]
            for i, entry in enumerate(gradient.flatten())
        ]
        diagonals[name] = torch.stack(entries).reshape(p.shape)
    return diagonals


def products(model: nn.Module, inputs: Tensor, labels: Tensor, extension: str) -> dict[str, Tensor]:
    """Of each parameter's block of the curvature with its first two vectors, by two backward passes each, [2, *P]."""
    if extension == "PCHMP" and any(isinstance(module, nn.Tanh | nn.Sigmoid) for module in model.modules()):
        return {}  # without them nothing of the Hessian is clipped, but by the GGN
    parameters, rows, found = dict(model.named_parameters()), vectors(model, 2), {}
    logits = model(inputs)
    p = logits.detach().softmax(1)
    for name, parameter in parameters.items():
        if extension == "HMP":
            loss = cross_entropy(logits, labels)
            (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
            blocks = [torch.autograd.grad(gradient, parameter, row, retain_graph=True)[0] for row in rows[name]]
        else:
            probe = torch.zeros_like(logits, requires_grad=True)
            (pulled,) = torch.autograd.grad(logits, parameter, probe, create_graph=True)
            # [N, C] each
            pushed = [torch.autograd.grad(pulled, probe, row, retain_graph=True)[0] for row in rows[name]]
            curved = [p * (j - (p * j).sum(1, keepdim=True)) / len(p) for j in pushed]
            blocks = [torch.autograd.grad(logits, parameter, h, retain_graph=True)[0] for h in curved]
        found[name] = torch.stack(blocks)
    return found


def averaged_factors(model: nn.Module, inputs: Tensor) -> dict[str, list[Tensor]]:
    """KFRA's [B, A] of weights and [B] of biases of a network of Linear and ReLU layers (Botev et al. 2017)."""
    if not all(isinstance(module, nn.Linear | nn.ReLU) for module in model):
        return {}
    entering = [inputs]  # of each module, [N, I]
    for module in model:
        entering.append(module(entering[-1]).detach())
    N, result = len(inputs), {}
    averaged = sum(root.T @ root for root in hessian_roots(entering[-1]))  # [O, O], the sum of the samples' Hessians
    for position in reversed(range(len(model))):
        module, x = model[position], entering[position]
        if isinstance(module, nn.ReLU):
            slope = (x > 0).to(x.dtype)
            averaged = averaged * (slope.T @ slope) / N
            continue
        result[f"{position}.weight"], result[f"{position}.bias"] = [averaged, x.T @ x / N], [averaged]
        averaged = module.weight.detach().T @ averaged @ module.weight.detach()
    return result


def comparable(extension: str, result: Any) -> list[Tensor]:
    """The tensors to compare of one result, or of the reference in its place."""
    if extension in FACTORS and extension in SAMPLED:
        return [torch.stack([factor.trace() for factor in result]).prod()]
    if extension in SAMPLED:
        return [result.sum()]
    return tensors(result)


def compare(peer: Peer, quantity: str, reference: References) -> dict[str, Any]:
    """The results that `peer` has just computed against those of plain torch; of sampled ones, only their sizes.

    Returns: "relative_error" (largest difference over largest value, of the worst parameter; None if there is nothing
    to compare) and "missing" (number of results that are not there)
    """
    errors, missing = [], 0
    for extension in QUANTITIES[quantity]:
        results = peer.results(extension)
        for name, expected in reference[extension].items():
            if name not in results:
                missing += 1
                continue
            result = results[name]
            if extension.startswith("SqrtGGN"):  # [V, N, *P]; columns are free up to a rotation, their squares are not
                result = torch.linalg.vector_norm(result, dim=(0, 1)).square()
            if extension in PRODUCTS:
                result = result[: len(expected)]
                expected = expected[: len(result)]
            pairs = zip(comparable(extension, result), comparable(extension, expected), strict=True)
            errors += [((own - other).abs().max() / other.abs().max()).item() for own, other in pairs]
    return {"relative_error": max(errors, default=None), "missing": missing}

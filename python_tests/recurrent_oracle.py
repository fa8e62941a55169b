"""Kronecker factors of recurrent modules by a slow float64 loop over samples and positions.

Nothing of the product is imported here. The arguments of all gates are noted as the loop forms them, and autograd gives
the columns of the curvature's square root there.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Rows = tuple[Tensor, Tensor]  # rows [T, I] that a weight multiplies, columns [V, T, G] at the products


class Loop(nn.Module):
    """A recurrent module without projection on one sample, [1, T, I] or packed; notes what its weights multiply."""

    def __init__(self, module: nn.RNNBase):
        super().__init__()
        self.weights = {name: p.detach() for name, p in module.named_parameters()}
        self.mode, self.layers, self.directions = module.mode, module.num_layers, 1 + module.bidirectional
        self.products: dict[str, list[tuple[Tensor, Tensor]]] = {}  # by weight: (row, product)

    def _product(self, which: str, suffix: str, row: Tensor) -> Tensor:
        product = self.weights[f"weight_{which}_{suffix}"] @ row + self.weights[f"bias_{which}_{suffix}"]
        product = product if product.requires_grad else product.requires_grad_()
        self.products.setdefault(f"{which}_{suffix}", []).append((row.detach(), product))
        return product

    def _cell(self, suffix: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self._product("ih", suffix, x), self._product("hh", suffix, h)
        if self.mode == "GRU":
            (ar, az, an), (br, bz, bn) = a.chunk(3), b.chunk(3)
            z = (az + bz).sigmoid()
            return (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h, c
        if self.mode == "LSTM":
            i, f, g, o = (a + b).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        return ((a + b).tanh() if self.mode == "RNN_TANH" else (a + b).relu()), c

    def forward(self, input: Tensor | PackedSequence, hx=None):
        rows = list(input.data if isinstance(input, PackedSequence) else input[0])
        last_h, last_c = [], []
        for layer in range(self.layers):
            sides = []
            for direction in range(self.directions):
                suffix = f"l{layer}" + "_reverse" * direction
                h = c = torch.zeros(self.weights[f"weight_hh_{suffix}"].shape[1], dtype=rows[0].dtype)
                side = []
                for x in rows[::-1] if direction else rows:
                    h, c = self._cell(suffix, x, h, c)
                    side.append(h)
                sides.append(side[::-1] if direction else side)
                last_h.append(h)
                last_c.append(c)
            rows = [torch.cat(both) for both in zip(*sides, strict=True)]
        output, h, c = torch.stack(rows), torch.stack(last_h)[:, None], torch.stack(last_c)[:, None]
        output = PackedSequence(output, *input[1:]) if isinstance(input, PackedSequence) else output[None]
        return output, (h, c) if self.mode == "LSTM" else h


def recurrent_uses(model: nn.Module, sample: Callable[[int], Tensor], roots: Tensor) -> dict[str, list[Rows]]:
    """Of every weight of the recurrent modules of a stock model, by name: rows and columns of each sample.

    `sample(n)` runs the model on one sample; roots [V, N, D] at its output.
    """
    found: dict[str, list[Rows]] = {}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.RNNBase)}
    try:
        for n in range(roots.shape[1]):
            loops = {name: Loop(module) for name, module in modules.items()}
            for name, loop in loops.items():
                _replace(model, name, loop)
            output = sample(n).flatten()
            for name, loop in loops.items():
                for which, products in loop.products.items():
                    kind, _, suffix = which.partition("_")
                    rows, leaves = zip(*products, strict=True)
                    columns = [torch.stack(_gradients(output @ root, leaves)) for root in roots[:, n]]
                    both = torch.stack(rows), torch.stack(columns)
                    found.setdefault(f"{name}.weight_{kind}_{suffix}", []).append(both)
    finally:
        for name, module in modules.items():
            _replace(model, name, module)
    return found


def _gradients(scalar: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar, tensors, retain_graph=True, materialize_grads=True)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def recurrent_factors(
    model: nn.Module, sample: Callable[[int], Tensor], roots: Tensor, convention: str = "backpack"
) -> dict[str, list[Tensor]]:
    """By parameter name [B, A] of a weight and [B] of a bias; positions are those that a sample has.

    "backpack" is "expand" for sequences.
    """
    factors = {}
    for name, uses in recurrent_uses(model, sample, roots).items():
        a, b = 0, 0
        for rows, columns in uses:
            if convention == "reduce":
                rows, columns = rows.mean(0, keepdim=True), columns.sum(1, keepdim=True)
            a = a + rows.mT @ rows
            b = b + columns.flatten(0, 1).mT @ columns.flatten(0, 1)
        factors[name] = [b, a / (len(uses) if convention == "reduce" else sum(len(rows) for rows, _ in uses))]
        factors[name.replace("weight", "bias")] = [b]
    return factors

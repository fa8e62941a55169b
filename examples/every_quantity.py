"""Every quantity of one small network: its attribute, its shape, and what it tells.

Two backward passes on a batch of scikit-learn's handwritten digits. The first forms what follows from the gradients of
single samples, the second what follows from the curvature of the loss. Several roads lead to the same numbers, which
the end of the output shows.

    python examples/every_quantity.py
"""

import torch
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit("This example needs scikit-learn: pip install scikit-learn") from error

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)

BATCH_SIZE = 32
FIRST_ORDER = BatchGrad, BatchL2Grad, SumGradSquared, Variance
SECOND_ORDER = (
    *(DiagGGNExact, DiagGGNMC, BatchDiagGGNExact, BatchDiagGGNMC, SqrtGGNExact, SqrtGGNMC),
    *(KFAC, KFLR, KFRA, DiagHessian, BatchDiagHessian, HMP, GGNMP, PCHMP),
)


def load_batch() -> tuple[Tensor, Tensor]:
    """Images [N, 64] with grey values from 0 to 1, and labels [N]."""
    digits = load_digits()
    images = torch.tensor(digits.data[:BATCH_SIZE] / 16, dtype=torch.float32)
    return images, torch.tensor(digits.target[:BATCH_SIZE])


def small_network() -> nn.Sequential:
    """A multilayer perceptron, extended."""
    return extend(nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)))


def collect(model: nn.Module, images: Tensor, labels: Tensor, extensions: tuple) -> dict[str, dict]:
    """One backward pass; by the attribute's name its values by the parameter's name."""
    active = [make() for make in extensions]
    loss = extend(nn.CrossEntropyLoss())(model(images), labels)
    with backpack(*active):
        loss.backward()
    return {ext.savefield: {name: getattr(p, ext.savefield) for name, p in model.named_parameters()} for ext in active}


def shape_of(value) -> str:
    """A tensor's shape, those of a list of tensors, or what a function maps to what."""
    if callable(value):
        return "function [V, *P] -> [V, *P]"
    if isinstance(value, Tensor):
        return str(list(value.shape))
    return " and ".join(map(shape_of, value))


def roads(found: dict[str, dict], weight: nn.Parameter, name: str) -> dict[str, list[float]]:
    """Numbers of one weight, each reached on several roads."""
    gradients = found["grad_batch"][name].flatten(1)  # [N, |P|]
    vector = torch.ones(1, *weight.shape)
    blocks = found["kflr"][name]  # [B, A]
    return {
        "squared norm of the first sample's gradient": [
            gradients[0].square().sum().item(),
            found["batch_l2"][name][0].item(),
        ],
        "largest second moment of an entry": [
            gradients.square().sum(0).max().item(),
            found["sum_grad_squared"][name].max().item(),
        ],
        "trace of the Gauss-Newton matrix": [
            found["diag_ggn_exact"][name].sum().item(),
            found["diag_ggn_exact_batch"][name].sum().item(),
            found["sqrt_ggn_exact"][name].square().sum().item(),
            (blocks[0].trace() * blocks[1].trace()).item(),  # approximately
        ],
        "trace of the Hessian": [found["diag_h"][name].sum().item(), found["diag_h_batch"][name].sum().item()],
        "curvature along a vector of ones": [
            (vector * found[product][name](vector)).sum().item() for product in ("hmp", "ggnmp", "pchmp")
        ],  # equal: the layers between the parameter and the loss are piecewise linear
    }


def run() -> tuple[dict[str, dict], dict[str, list[float]]]:
    """All quantities of all parameters, and the roads to the same numbers."""
    torch.manual_seed(0)
    images, labels = load_batch()
    model = small_network()
    found = collect(model, images, labels, FIRST_ORDER) | collect(model, images, labels, SECOND_ORDER)
    print(f"{'attribute':22} of a weight {list(model[0].weight.shape)} and a bias {list(model[0].bias.shape)}")
    for savefield, values in found.items():
        print(f"{savefield:22} {shape_of(values['0.weight']):32} {shape_of(values['0.bias'])}")
    numbers = roads(found, model[0].weight, "0.weight")
    for title, values in numbers.items():
        print(f"{title:45}", *(f"{value:10.5f}" for value in values))
    return found, numbers


if __name__ == "__main__":
    run()

"""A layer of one's own: radial basis functions that recognise handwritten digits, and the digits that they find odd.

The layer answers exp(-|x - c_k|^2 / width) for each of its centres c_k, which it learns. There are three ways to the
gradients of single samples, and this example takes all of them:

1. do nothing: the backward pass of any module is vectorised over the samples;
2. `register_layer`: one function from the layer's input and output gradient to the per-sample gradients, for all
   quantities of first and second order;
3. BackPACK's way: a `ModuleExtension` for one quantity, which also runs with BackPACK.

    python examples/custom_layer.py [--epochs 10]
"""

import argparse

import torch
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit("This example needs scikit-learn: pip install scikit-learn") from error

from backpack_cuda import backpack, extend, register_layer
from backpack_cuda.extensions import BatchGrad, BatchL2Grad, DiagGGNExact
from backpack_cuda.extensions.firstorder.base import FirstOrderModuleExtension

CENTRES = 60
BATCH_SIZE = 64


class RadialBasis(nn.Module):
    """[N, I] -> [N, K]: how near the input is to each of the centres [K, I]."""

    def __init__(self, centres: Tensor, width: float):
        super().__init__()
        self.centres = nn.Parameter(centres.clone())
        self.width = width

    def forward(self, input: Tensor) -> Tensor:
        squares = (input[:, None] - self.centres).square().sum(2)  # [N, K]
        return (-squares / self.width).exp()


def centre_gradients(module: RadialBasis, input: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The second way: per-sample gradients [N, K, I] from input [N, I] and output gradient [N, K]."""
    factors = 2 / module.width * grad_output * module.forward(input)  # [N, K]
    return {"centres": factors[..., None] * (input[:, None] - module.centres)}


class CentreBatchGrad(FirstOrderModuleExtension):
    """The third way, for `BatchGrad`: a method named after the parameter."""

    def __init__(self):
        super().__init__(params=["centres"])

    def centres(self, ext, module, g_inp, g_out, bpQuantities) -> Tensor:
        factors = 2 / module.width * g_out[0] * module.output  # [N, K]
        return factors[..., None] * (module.input0[:, None] - module.centres)


def load_data() -> tuple[Tensor, Tensor]:
    """Images [N, 64] and labels [N]."""
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32)[:1000], torch.tensor(digits.target)[:1000]


def network(images: Tensor) -> nn.Sequential:
    """A hidden layer of radial basis functions, whose centres start at the first digits; extended."""
    return extend(nn.Sequential(RadialBasis(images[:CENTRES], width=9.0), nn.Linear(CENTRES, 10)))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> float:
    """A normal training loop; returns the accuracy on what it was trained on."""
    optimiser = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def batch_grad(model: nn.Module, images: Tensor, labels: Tensor, extension: BatchGrad) -> Tensor:
    """[N, K, I]: the gradients of the centres, sample by sample."""
    loss = nn.functional.cross_entropy(model(images), labels, reduction="sum")
    with backpack(extension):
        loss.backward()
    return model[0].centres.grad_batch


def run(epochs: int = 10) -> tuple[dict[str, Tensor], Tensor, Tensor, float]:
    """The gradients of all three ways, the norm of every sample's gradient, the centres' curvature, the accuracy."""
    torch.manual_seed(0)
    images, labels = load_data()
    model = network(images)
    accuracy = train(model, images, labels, epochs)

    gradients = {"nothing registered": batch_grad(model, images[:100], labels[:100], BatchGrad())}
    register_layer(RadialBasis, centre_gradients)
    gradients["register_layer"] = batch_grad(model, images[:100], labels[:100], BatchGrad())
    extension = BatchGrad()
    extension.set_module_extension(RadialBasis, CentreBatchGrad())
    gradients["ModuleExtension"] = batch_grad(model, images[:100], labels[:100], extension)
    first = gradients["nothing registered"]
    for way, found in gradients.items():
        print(f"{way:20} differs by {(found - first).abs().max():.1e} from the first way")

    # Everything else needs no further function.
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))(model(images), labels)
    with backpack(BatchL2Grad(), DiagGGNExact()):
        loss.backward()
    norms = sum(p.batch_l2 for p in model.parameters()).sqrt()  # [N]
    curvature = model[0].centres.diag_ggn_exact.sum(1)  # [K]
    odd = norms.argsort(descending=True)[:5].tolist()
    print(f"accuracy {accuracy:.3f}; the digits with the largest gradients:", *(f"no. {n} ({labels[n]})" for n in odd))
    print(f"centres that matter most to the predictions: {curvature.argsort(descending=True)[:5].tolist()}")
    return gradients, norms, curvature, accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    run(**vars(parser.parse_args()))

"""Three optimisers that look at more than the average gradient, beside SGD, on scikit-learn's handwritten digits.

* VarianceAdapted shortens the step of an entry whose gradient the samples disagree about, to the factor that brings it
  nearest to the step along the true gradient (Balles & Hennig 2018, arXiv:1705.07774). Needs `Variance`.
* SecondMoment divides by the root of the averaged squares of the samples' gradients, where Adam takes the square of
  their mean. Needs `SumGradSquared`.
* DiagonalNewton divides by the diagonal of the Gauss-Newton matrix plus a damping. Needs `DiagGGNExact`.

    python examples/optimisers.py [--epochs 3] [--seed 0]
"""

import argparse
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit("This example needs scikit-learn: pip install scikit-learn") from error

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import DiagGGNExact, SumGradSquared, Variance

BATCH_SIZE = 64
TRAIN_SAMPLES = 1437  # of 1797; the rest is for testing


class VarianceAdapted(torch.optim.Optimizer):
    """SGD whose step is multiplied, entry by entry, by g^2 / (g^2 + variance of g)."""

    quantities = (Variance,)

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float):
        super().__init__(parameters, {"lr": learning_rate})

    @torch.no_grad()
    def step(self, batch_size: int) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                # g is the sum of g_n: its variance is N times theirs, which is estimated without bias.
                variance = p.variance * batch_size**2 / (batch_size - 1)
                square = p.grad.square()
                p.sub_(group["lr"] * p.grad * square / (square + variance + 1e-12))


class SecondMoment(torch.optim.Optimizer):
    """Averages of the gradient and of the samples' squared gradients; steps along their quotient."""

    quantities = (SumGradSquared,)

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, decay: float = 0.9):
        super().__init__(parameters, {"lr": learning_rate, "decay": decay})

    @torch.no_grad()
    def step(self, batch_size: int) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(mean=torch.zeros_like(p), square=torch.zeros_like(p), weight=0.0)
                # g_n contains the loss' 1/N: the squares of the samples' own gradients, averaged, are N sum_n g_n^2.
                state["mean"].lerp_(p.grad, 1 - group["decay"])
                state["square"].lerp_(batch_size * p.sum_grad_squared, 1 - group["decay"])
                state["weight"] += (1 - group["decay"]) * (1 - state["weight"])  # both averages start at 0
                p.sub_(group["lr"] * state["mean"] / ((state["weight"] * state["square"]).sqrt() + 1e-8))


class DiagonalNewton(torch.optim.Optimizer):
    """Newton's step with the diagonal of the Gauss-Newton matrix for the Hessian."""

    quantities = (DiagGGNExact,)

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, damping: float = 0.5):
        super().__init__(parameters, {"lr": learning_rate, "damping": damping})

    @torch.no_grad()
    def step(self, batch_size: int) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / (p.diag_ggn_exact + group["damping"]))


class SGD(torch.optim.SGD):
    """torch's own."""

    quantities = ()

    def step(self, batch_size: int) -> None:
        super().step()


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, 0.5),
    "variance adapted": lambda parameters: VarianceAdapted(parameters, 1.0),
    "second moment": lambda parameters: SecondMoment(parameters, 0.05),
    "diagonal Newton": lambda parameters: DiagonalNewton(parameters, 0.5),
}


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 1, 8, 8] and labels [N] for training, then for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(len(labels), generator=generator).tensor_split([TRAIN_SAMPLES])
    return images[train], labels[train], images[test], labels[test]


def train(make_optimiser: Callable, data: tuple[Tensor, ...], epochs: int, seed: int) -> tuple[list[float], float]:
    """The training loss of every epoch, and the accuracy on the test set."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    convolution = nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()
    model = extend(nn.Sequential(*convolution, nn.Linear(96, 16), nn.Tanh(), nn.Linear(16, 10)))
    loss_function = extend(nn.CrossEntropyLoss())
    optimiser = make_optimiser(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH_SIZE):
            optimiser.zero_grad()
            loss = loss_function(model(images[batch]), labels[batch])
            with backpack(*[make() for make in optimiser.quantities]):
                loss.backward()
            optimiser.step(len(batch))
            total += loss.item() * len(batch)
        losses.append(total / len(labels))
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    return losses, accuracy


def run(epochs: int = 3, seed: int = 0) -> dict[str, tuple[list[float], float]]:
    """Losses and accuracy of every optimiser."""
    data = load_data(seed)
    results = {name: train(make, data, epochs, seed) for name, make in OPTIMISERS.items()}
    print(f"{'optimiser':18} test accuracy   training loss of every epoch")
    for name, (losses, accuracy) in results.items():
        print(f"{name:18} {accuracy:13.3f}  ", *(f"{loss:6.3f}" for loss in losses))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    run(**vars(parser.parse_args()))

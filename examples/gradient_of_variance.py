"""Differentiate a quantity: train towards parameters at which the samples agree about the gradient.

With `create_graph=True` the results are part of the graph, like every other tensor. So the variance of the per-sample
gradients can stand in the loss. Two networks learn to recognise handwritten digits, one of them with that penalty: its
gradients are much less noisy in the end, at a similar loss.

    python examples/gradient_of_variance.py [--steps 60]
"""

import argparse

import torch
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit("This example needs scikit-learn: pip install scikit-learn") from error

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import Variance

BATCH_SIZE = 128
PENALTY = 20.0


def load_batch() -> tuple[Tensor, Tensor]:
    """Images [N, 64] and labels [N]."""
    digits = load_digits()
    images = torch.tensor(digits.data[:BATCH_SIZE] / 16, dtype=torch.float32)
    return images, torch.tensor(digits.target[:BATCH_SIZE])


def noise(model: nn.Module, loss: Tensor) -> Tensor:
    """The summed variance of the samples' own gradients, as a differentiable function of the parameters."""
    parameters = list(model.parameters())
    with backpack(Variance()):
        torch.autograd.grad(loss, parameters, create_graph=True)  # unlike backward() leaves no graph in `.grad`
    # The gradients g_n contain the 1/N of the loss: those of the samples' own losses have N^2 times their variance.
    total = BATCH_SIZE**2 * sum(p.variance.sum() for p in parameters)
    for p in parameters:
        del p.variance  # would keep the graph alive
    return total


def train(penalty: float, steps: int) -> list[tuple[float, float]]:
    """(loss, noise) of every step."""
    torch.manual_seed(0)
    images, labels = load_batch()
    model = extend(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))
    parameters = list(model.parameters())
    history = []
    optimiser = torch.optim.Adam(parameters, 0.02)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        variance = noise(model, loss)
        history.append((loss.item(), variance.item()))
        gradients = torch.autograd.grad(loss + penalty / BATCH_SIZE * variance, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
    return history


def run(steps: int = 60) -> dict[float, list[tuple[float, float]]]:
    """Losses and noise by the penalty's factor."""
    histories = {penalty: train(penalty, steps) for penalty in (0.0, PENALTY)}
    for penalty, history in histories.items():
        print(f"penalty {penalty:4.1f}: " + ", ".join(f"loss {a:.3f} noise {b:.2f}" for a, b in history[:: steps // 3]))
        print(f"     at the end: loss {history[-1][0]:.3f} noise {history[-1][1]:.2f}")
    return histories


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    run(**vars(parser.parse_args()))

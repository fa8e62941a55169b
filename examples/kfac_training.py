"""Train with Kronecker-factored curvature, and compare with SGD and Adam, on scikit-learn's handwritten digits.

The Fisher information matrix of a layer's weight is roughly a Kronecker product B (x) A of two small matrices, A of the
layer's inputs and B of its output gradients (KFAC: Martens and Grosse 2015, arXiv:1503.05671; for convolutions, Grosse
and Martens 2016, arXiv:1602.01407). Both come out of a backward pass with ``KFAC``. Their inverses precondition the
gradient G [out, in]:

    (B (x) A)^-1 vec(G) = vec(B^-1 G A^-1)

As in these papers, the factors are running averages, are damped before they are inverted, and an update that would
change the predictions too much is shortened. Since they change slowly, only every second step renews them.

All three optimisers train the same network from the same weights with the same batches and take turns, step by step, so
that they share whatever else the machine does. Each has the best of eight settings, see GRID; ``--tune`` repeats that
search. The network has tanh activations and no normalisation, which makes it ill-conditioned: with ReLU, these digits
are so easy that Adam needs as few steps as KFAC. A step of KFAC takes longer, the more so in a network this small.

    python examples/kfac_training.py [--epochs 10] [--seed 0] [--out kfac_training.png]
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

try:
    import matplotlib

    matplotlib.use("Agg")  # draws into files, needs no display
    from matplotlib import pyplot as plt
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"This example needs {error.name}, which is not installed: pip install scikit-learn matplotlib tqdm"
    ) from error

import backpack_cuda as bp
from backpack_cuda import backpack, extend
from backpack_cuda.extensions import KFAC

# What was tried for each optimiser. All have momentum 0.9 (Adam: betas 0.9 and 0.999), no weight decay, and a learning
# rate that falls to zero linearly. KFAC's learning rate, and below the decay, the columns and the renewal of its
# factors, were chosen by hand beforehand.
GRID = {
    "SGD": [{"learning_rate": rate} for rate in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)],
    "Adam": [{"learning_rate": rate} for rate in (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)],
    "KFAC": [
        {"learning_rate": 0.3, "damping": damping, "largest_change": largest_change}
        for damping, largest_change in itertools.product((0.003, 0.01, 0.03, 0.1), (0.0005, 0.001))
    ],
}
# The best by the training loss: by the mean of its logarithm over all steps, for seeds that the demo does not use.
BEST = {
    "SGD": {"learning_rate": 0.3},
    "Adam": {"learning_rate": 0.02},
    "KFAC": {"learning_rate": 0.3, "damping": 0.01, "largest_change": 0.0005},
}
TUNING_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Settings:
    """What the demo runs with; every field is also an option of the command line."""

    epochs: int = 10
    batch_size: int = 128
    train_samples: int = 1437  # of 1797; the rest is for testing
    target_loss: float = 0.01  # how fast the optimisers reach this training loss is reported
    evaluate_every: int = 5  # steps
    renew_every: int = 2  # steps of KFAC that share Kronecker factors
    mc_samples: int = 4  # of the factors B
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: str = "kfac_training.png"

    def __post_init__(self) -> None:
        if not 20 <= self.train_samples < 1797:
            raise ValueError(f"train_samples must be from 20 to 1796, not {self.train_samples}.")


@dataclass(frozen=True)
class Digits:
    """The data, all of it on one device."""

    images: Tensor  # [N, 1, 8, 8], standardised
    labels: Tensor  # [N]
    test_images: Tensor  # [M, 1, 8, 8]
    test_labels: Tensor  # [M]


@dataclass
class Curve:
    """How one optimiser fares; one entry per evaluation."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of training steps alone
    loss: list[float] = field(default_factory=list)  # on the whole training set
    accuracy: list[float] = field(default_factory=list)  # on the test set

    def add(self, steps: int, seconds: float, loss: float, accuracy: float) -> None:
        """One more evaluation."""
        self.steps.append(steps)
        self.seconds.append(seconds)
        self.loss.append(loss)
        self.accuracy.append(accuracy)

    def reached(self, target_loss: float) -> tuple[int, float] | None:
        """Steps and seconds until the training loss is first at or below `target_loss`."""
        found = zip(self.steps, self.seconds, self.loss, strict=True)
        return next(((steps, seconds) for steps, seconds, loss in found if loss <= target_loss), None)


def load_data(settings: Settings) -> Digits:
    """Split the digits into training and test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(settings.seed)
    train, test = torch.randperm(len(labels), generator=generator).tensor_split([settings.train_samples])
    tensors = images[train], labels[train], images[test], labels[test]
    return Digits(*(tensor.to(settings.device) for tensor in tensors))


def digit_cnn(layers: ModuleType) -> nn.Sequential:
    """A CNN with the layers of ``torch.nn``, or those of ``backpack_cuda``, which offer curvature."""
    return nn.Sequential(
        layers.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        layers.Conv2d(8, 16, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        layers.Conv2d(16, 16, 3, padding=1),
        nn.Tanh(),
        layers.Conv2d(16, 16, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        layers.Linear(16 * 2 * 2, 32),
        nn.Tanh(),
        layers.Linear(32, 10),
    )


class Preconditioner:
    """Multiplies the gradients of `model` with the inverses of its damped Kronecker factors."""

    def __init__(self, model: nn.Module, damping: float, largest_change: float, decay: float = 0.95) -> None:
        self.parameters = list(model.parameters())
        self.damping, self.largest_change, self.decay = damping, largest_change, decay
        self.factors: list[list[Tensor]] = []  # of each parameter: [B, A] of a weight, [B] of a bias
        self.inverses: list[list[Tensor]] = []

    def renew(self) -> None:
        """Take the factors that ``KFAC`` has just left on the parameters into the running averages."""
        new = [p.kfac for p in self.parameters]
        for averages, factors in zip(self.factors, new, strict=False):  # none before the first time
            for average, factor in zip(averages, factors, strict=True):
                factor.lerp_(average, self.decay)
        self.factors = new
        self.inverses = [self.damped_inverses(factors) for factors in new]

    def damped_inverses(self, factors: list[Tensor]) -> list[Tensor]:
        """The damping is split between the factors by their size (Martens and Grosse 2015, section 6.3)."""
        sizes = [factor.diagonal().mean() for factor in factors]
        geometric_mean = torch.stack(sizes).prod() ** (1 / len(sizes))
        inverses = []
        for factor, size in zip(factors, sizes, strict=True):
            share = self.damping ** (1 / len(factors)) * size / geometric_mean
            identity = torch.eye(len(factor), device=factor.device)
            inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(factor + share * identity)))
        return inverses

    def precondition(self, learning_rate: float) -> None:
        """Replace every ``.grad``, and bound the change of the predictions to second order, a KL divergence."""
        products = []
        for p, inverses in zip(self.parameters, self.inverses, strict=True):
            if len(inverses) == 2:
                b, a = inverses
                products.append((b @ p.grad.flatten(1) @ a).view_as(p))  # [O, I], also of a convolution
            else:
                products.append(inverses[0] @ p.grad)
        change = sum((p.grad * product).sum() for p, product in zip(self.parameters, products, strict=True))
        shorter = (self.largest_change / (learning_rate**2 * change)).sqrt().clamp(max=1.0)
        for p, product in zip(self.parameters, products, strict=True):
            p.grad = shorter * product


@dataclass
class Run:
    """One network and what trains it."""

    optimizer: str  # a key of GRID
    setting: dict[str, float]
    settings: Settings
    steps: int  # of the whole training
    seconds: float = 0.0  # of the training steps so far

    def __post_init__(self) -> None:
        torch.manual_seed(self.settings.seed)
        self.model = digit_cnn(bp if self.optimizer == "KFAC" else nn).to(self.settings.device)
        self.loss_function = extend(nn.CrossEntropyLoss()) if self.optimizer == "KFAC" else nn.CrossEntropyLoss()
        rate, parameters = self.setting["learning_rate"], self.model.parameters()
        if self.optimizer == "Adam":
            self.update: torch.optim.Optimizer = torch.optim.Adam(parameters, rate)
        else:
            self.update = torch.optim.SGD(parameters, rate, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.update, 1.0, 0.0, self.steps)
        if self.optimizer == "KFAC":
            self.preconditioner = Preconditioner(self.model, self.setting["damping"], self.setting["largest_change"])

    def step(self, number: int, images: Tensor, labels: Tensor) -> None:
        """One training step."""
        begin = time.perf_counter()
        self.update.zero_grad()
        loss = self.loss_function(self.model(images), labels)
        if self.optimizer != "KFAC":
            loss.backward()
        else:
            if number % self.settings.renew_every == 0:
                with backpack(KFAC(mc_samples=self.settings.mc_samples, convention="expand")):
                    loss.backward()
                self.preconditioner.renew()
            else:
                loss.backward()
            self.preconditioner.precondition(self.schedule.get_last_lr()[0])
        self.update.step()
        self.schedule.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - begin


def batches(digits: Digits, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """All epochs' batches of images and labels."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(digits.labels), generator=generator).split(settings.batch_size):
            yield digits.images[batch], digits.labels[batch]


@torch.no_grad()
def evaluate(model: nn.Module, digits: Digits) -> tuple[float, float]:
    """Training loss and test accuracy."""
    loss = cross_entropy(model(digits.images), digits.labels)
    accuracy = (model(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    return loss.item(), accuracy.item()


def train(chosen: dict[str, tuple[str, dict[str, float]]], settings: Settings) -> dict[str, Curve]:
    """Train one network for each entry of `chosen`, name -> (optimiser, its setting), all of them side by side."""
    digits = load_data(settings)
    steps = settings.epochs * -(-len(digits.labels) // settings.batch_size)
    runs = {name: Run(*choice, settings, steps) for name, choice in chosen.items()}
    curves = {name: Curve() for name in runs}
    for number, batch in enumerate(tqdm(batches(digits, settings), desc="training", total=steps, unit="step")):
        for name, run in runs.items():
            run.step(number, *batch)
            if (number + 1) % settings.evaluate_every == 0 or number + 1 == steps:
                loss, accuracy = evaluate(run.model, digits)
                curves[name].add(number + 1, run.seconds, loss, accuracy)
    return curves


def draw(curves: dict[str, Curve], settings: Settings) -> None:
    """Write the picture to ``settings.out``."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", sharey="row", sharex="col")
    for name, curve in curves.items():
        rate = BEST[name]["learning_rate"]
        for column, x in enumerate((curve.steps, curve.seconds)):
            axes[0, column].plot(x, curve.loss, label=f"{name}, learning rate {rate}")
            axes[1, column].plot(x, curve.accuracy, label=name)
    axes[0, 0].set(ylabel="training loss", yscale="log")
    axes[1, 0].set(ylabel="test accuracy", xlabel="training steps", ylim=(0.8, 1.0))
    axes[1, 1].set(xlabel="seconds of training")
    for column in axes[0]:
        column.axhline(settings.target_loss, color="0.3", lw=1, ls="--")
    axes[0, 0].legend(frameon=False)
    figure.suptitle("The same network on the digits", x=0.01, ha="left")
    figure.savefig(settings.out, dpi=110)
    plt.close(figure)


def print_report(curves: dict[str, Curve], settings: Settings) -> None:
    """The findings as text."""
    print(f"optimiser   training loss   test accuracy   until training loss {settings.target_loss}")
    for name, curve in curves.items():
        reached = curve.reached(settings.target_loss)
        until = f"{reached[0]} steps, {reached[1]:.2f} s" if reached else "not reached"
        print(f"{name:11s} {curve.loss[-1]:<15.2g} {curve.accuracy[-1]:<15.1%} {until}")
    print(f"picture     {settings.out}")


def run(settings: Settings) -> dict[str, Curve]:
    """The whole demo: train with every optimiser's best setting, draw and print the curves."""
    torch.set_num_threads(1)  # such small tensors gain nothing from more
    curves = train({name: (name, setting) for name, setting in BEST.items()}, settings)
    draw(curves, settings)
    print_report(curves, settings)
    return curves


def tune(settings: Settings) -> None:
    """Print how every setting of the grid fares."""
    for name, grid in GRID.items():
        chosen = {", ".join(f"{key} {value}" for key, value in setting.items()): (name, setting) for setting in grid}
        scores = dict.fromkeys(chosen, 0.0)
        for seed in TUNING_SEEDS:
            curves = train(chosen, Settings(**vars(settings) | {"seed": seed}))
            for text, curve in curves.items():
                scores[text] += torch.tensor(curve.loss).log10().mean().item() / len(TUNING_SEEDS)
        for text, score in sorted(scores.items(), key=lambda item: item[1]):
            print(f"{name}, {text}: mean log10 of the training loss {score:.2f}")


def parse_arguments(arguments: list[str] | None = None) -> tuple[Settings, bool]:
    """Settings from the command line, one option per field, and whether to tune."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    helps = {
        "train_samples": "of the 1797 digits; the rest is for testing",
        "target_loss": "report how fast this training loss is reached",
        "evaluate_every": "steps between two points of a curve",
        "renew_every": "steps of KFAC that share Kronecker factors",
        "mc_samples": "sampled columns that KFAC's factors are made of",
        "out": "the picture",
    }
    for option in fields(Settings):
        name = "--" + option.name.replace("_", "-")
        text = helps.get(option.name, option.name.replace("_", " "))
        parser.add_argument(name, type=type(option.default), default=option.default, help=text)
    parser.add_argument("--tune", action="store_true", help="try all settings of the grid instead (some minutes)")
    chosen = vars(parser.parse_args(arguments))
    tuning = chosen.pop("tune")
    try:
        return Settings(**chosen), tuning
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    settings, tuning = parse_arguments()
    (tune if tuning else run)(settings)

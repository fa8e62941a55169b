"""Know what the network does not know: Laplace uncertainty on turned digits, from KFLR of the last layer.

A CNN learns scikit-learn's handwritten digits, and is then shown test digits that are turned further and further,
unlike anything that it was trained on. Its softmax stays rather sure of itself. The Laplace approximation (MacKay 1992;
of the last layer: Kristiadi et al. 2020, arXiv:2002.10118) makes the last layer's weight W normally distributed around
what was learnt, with the precision

    B (x) A + prior precision * I

``KFLR`` gives the factors of the curvature of the training loss, B of the logits and A of the features. Logits are
linear in W, hence normal as well, with a variance that is large for features unlike those of the training. The prior
precision maximises the evidence, the probability of the training labels with W integrated out: no data is held out.

    python examples/laplace_digits.py [--epochs 8] [--seed 0] [--out laplace_digits.png]
"""

import argparse
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

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
from backpack_cuda.extensions import KFLR

ANGLES = range(0, 181, 15)  # degrees
PRIOR_PRECISIONS = torch.logspace(-2, 4, 61)  # that are tried


@dataclass(frozen=True)
class Settings:
    """What the demo runs with; every field is also an option of the command line."""

    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 0.003
    train_samples: int = 1437  # of 1797; the rest is for testing
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: str = "laplace_digits.png"

    def __post_init__(self) -> None:
        if not 20 <= self.train_samples < 1797:
            raise ValueError(f"train_samples must be from 20 to 1796, not {self.train_samples}.")


@dataclass(frozen=True)
class Digits:
    """The data, all of it on one device. Images have grey values from 0, the background, to 1."""

    images: Tensor  # [N, 1, 8, 8]
    labels: Tensor  # [N]
    test_images: Tensor  # [M, 1, 8, 8]
    test_labels: Tensor  # [M]


@dataclass(frozen=True)
class Quality:
    """How good predictions are, averaged over the test set; one entry per angle."""

    accuracy: Tensor
    confidence: Tensor  # largest probability
    entropy: Tensor  # nats
    negative_log_likelihood: Tensor  # of the right label

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> "Quality":
        """From `probabilities` [angles, M, C] and `labels` [M]."""
        confidence, predicted = probabilities.max(-1)
        logarithms = probabilities.clamp_min(1e-12).log()
        right = logarithms.gather(-1, labels.expand(len(probabilities), -1)[..., None])[..., 0]
        return cls(
            accuracy=(predicted == labels).float().mean(-1),
            confidence=confidence.mean(-1),
            entropy=-(probabilities * logarithms).sum(-1).mean(-1),
            negative_log_likelihood=-right.mean(-1),
        )


@dataclass(frozen=True)
class Report:
    """What the demo found."""

    prior_precision: float
    map: Quality
    laplace: Quality


def load_data(settings: Settings) -> Digits:
    """Split the digits into training and test set."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(settings.seed)
    train, test = torch.randperm(len(labels), generator=generator).tensor_split([settings.train_samples])
    tensors = images[train], labels[train], images[test], labels[test]
    return Digits(*(tensor.to(settings.device) for tensor in tensors))


def turned(images: Tensor, degrees: float) -> Tensor:
    """`images` [M, 1, 8, 8], turned around their centres; what comes in from outside is background."""
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = affine_grid(matrix.to(images).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def digit_cnn() -> nn.Sequential:
    """A small CNN. A one is appended to the features, so that the last layer has its bias in its weight."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.ConstantPad1d((0, 1), 1.0),
        bp.Linear(65, 10, bias=False),  # like torch's, and offers curvature
    )


def train(model: nn.Module, digits: Digits, settings: Settings) -> None:
    """A normal training loop."""
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in tqdm(range(settings.epochs), desc="training", unit="epoch"):
        for batch in torch.randperm(len(digits.labels), generator=generator).split(settings.batch_size):
            optimizer.zero_grad()
            cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()
            optimizer.step()


class LastLayerLaplace:
    """The normal distribution of the weight W [C, D] of `model`'s last layer after seeing `images` and `labels`."""

    def __init__(self, model: nn.Sequential, images: Tensor, labels: Tensor) -> None:
        self.features, self.last = model[:-1], model[-1]
        with torch.no_grad():
            features = self.features(images)  # [N, D]
        loss = extend(nn.CrossEntropyLoss(reduction="sum"))(self.last(features), labels)
        with backpack(KFLR()):
            loss.backward()
        self.log_likelihood = -loss.detach()
        # B (x) A is diagonal in the basis of the factors' eigenvectors.
        (b_values, self.b_basis), (a_values, self.a_basis) = map(torch.linalg.eigh, self.last.weight.kflr)
        self.curvature = b_values.clamp_min(0)[:, None] * a_values.clamp_min(0)  # [C, D]
        candidates = PRIOR_PRECISIONS.to(images.device)
        evidence = torch.stack([self.log_evidence(precision) for precision in candidates])
        self.prior_precision = candidates[evidence.argmax()]

    def log_evidence(self, prior_precision: Tensor) -> Tensor:
        """Laplace's approximation of log p(labels)."""
        weight = self.last.weight.detach()
        log_prior = 0.5 * (weight.numel() * prior_precision.log() - prior_precision * weight.square().sum())
        return self.log_likelihood + log_prior - 0.5 * (self.curvature + prior_precision).log().sum()

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [M, C] of the network as it was trained, and averaged over W.

        The mean of a softmax over normal logits is nearly that of logits / sqrt(1 + pi/8 * variance) (MacKay 1992).
        """
        features = self.features(images)  # [M, D]
        logits = self.last(features)
        scaled = (features @ self.a_basis).square() @ (1 / (self.curvature + self.prior_precision)).T  # [M, C]
        variance = scaled @ self.b_basis.square().T
        return logits.softmax(1), (logits / (1 + math.pi / 8 * variance).sqrt()).softmax(1)


def draw(report: Report, digits: Digits, settings: Settings) -> None:
    """Write the picture to ``settings.out``."""
    figure = plt.figure(figsize=(12, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 1))
    curves = {
        "entropy of the prediction, in nats": "entropy",
        "mean confidence (dotted: accuracy)": "confidence",
        "negative log-likelihood": "negative_log_likelihood",
    }
    for axes, (title, name) in zip(top.subplots(1, 3), curves.items(), strict=True):
        for label, quality, colour in (("MAP", report.map, "tab:red"), ("Laplace", report.laplace, "tab:blue")):
            axes.plot(ANGLES, getattr(quality, name).cpu(), ".-", color=colour, label=label)
            if name == "confidence":
                axes.plot(ANGLES, quality.accuracy.cpu(), ":", color=colour)
        axes.set(xlabel="rotation in degrees", xticks=range(0, 181, 45))
        axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    for axes, angle in zip(bottom.subplots(1, len(ANGLES)), ANGLES, strict=True):
        axes.imshow(turned(digits.test_images[:1], angle)[0, 0].cpu().numpy(), cmap="gray_r")
        axes.set(xticks=[], yticks=[], xlabel=f"{angle}°")
    figure.savefig(settings.out, dpi=110)
    plt.close(figure)


def print_report(report: Report, settings: Settings) -> None:
    """The findings as text."""
    print(f"prior precision of the largest evidence: {report.prior_precision:.3g}")
    print("angle  accuracy      confidence    entropy       negative log-likelihood; each: MAP, Laplace")
    columns = [
        getattr(quality, name)
        for name in ("accuracy", "confidence", "entropy", "negative_log_likelihood")
        for quality in (report.map, report.laplace)
    ]
    for angle, *numbers in zip(ANGLES, *columns, strict=True):
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        print(f"{angle:4d}°", *(f"{float(own):6.2f}{float(other):6.2f}" for own, other in pairs), sep="  ")
    print(f"picture: {settings.out}")


def run(settings: Settings) -> Report:
    """The whole demo: train, approximate the posterior, predict turned digits, draw and print the report."""
    torch.manual_seed(settings.seed)
    digits = load_data(settings)
    model = digit_cnn().to(settings.device)
    train(model, digits, settings)
    laplace = LastLayerLaplace(model, digits.images, digits.labels)
    predictions = [laplace.predict(turned(digits.test_images, angle)) for angle in ANGLES]
    qualities = [Quality.of(torch.stack(p), digits.test_labels) for p in zip(*predictions, strict=True)]
    report = Report(laplace.prior_precision.item(), *qualities)
    draw(report, digits, settings)
    print_report(report, settings)
    return report


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line, one option per field."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    helps = {"train_samples": "of the 1797 digits; the rest is for testing", "out": "the picture"}
    for option in fields(Settings):
        name = "--" + option.name.replace("_", "-")
        text = helps.get(option.name, option.name.replace("_", " "))
        parser.add_argument(name, type=type(option.default), default=option.default, help=text)
    try:
        return Settings(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    run(parse_arguments())

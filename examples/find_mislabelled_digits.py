"""Find wrong labels with per-sample gradient norms, and watch the gradient noise, in a normal training loop.

Five per cent of the training labels of scikit-learn's handwritten digits are replaced by wrong ones. A small
CNN learns from them, and the backward pass that trains it also yields two statistics of the batch:

* ``BatchL2Grad``: the squared norm of every sample's gradient. A sample that keeps pulling hard on the
  weights disagrees with the rest of the data. Averaged over the epochs, the norms rank the samples.
* ``Variance``: how much the samples disagree about every weight, from which the gradient noise scale follows:
  roughly the batch size beyond which a larger batch stops paying (McCandlish et al. 2018, arXiv:1812.06162).

The true labels are used only to mark the picture and to score the ranking, never to make it.

    python examples/find_mislabelled_digits.py [--epochs 15] [--seed 0] [--out report.png]
"""

import argparse
import statistics
import time
from collections.abc import Callable
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
from backpack_cuda import backpack
from backpack_cuda.extensions import BatchL2Grad, Variance


@dataclass(frozen=True)
class Settings:
    """What the demo runs with; every field is also an option of the command line."""

    epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 0.02
    flipped: float = 0.05  # fraction of the training labels that are replaced by wrong ones
    train_samples: int = 1437  # of 1797; the rest is for testing
    seed: int = 0
    timing_rounds: int = 40  # steps of either kind that are timed; 0 skips the comparison
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: str = "report.png"

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"A variance needs batches of at least 2 samples, not {self.batch_size}.")
        if not 20 <= self.train_samples < 1797:
            raise ValueError(f"train_samples must be from 20 to 1796, not {self.train_samples}.")


@dataclass(frozen=True)
class Digits:
    """The data, all of it on one device."""

    images: Tensor  # [N, 1, 8, 8], standardised
    labels: Tensor  # [N], as given to the training: some are wrong
    true_labels: Tensor  # [N]
    test_images: Tensor  # [M, 1, 8, 8]
    test_labels: Tensor  # [M]

    @property
    def flipped(self) -> Tensor:
        """[N], bool: which training labels are wrong."""
        return self.labels != self.true_labels


@dataclass
class History:
    """What the training loop records."""

    norms: Tensor  # [epochs, N]: norm of the gradient of each sample's loss; an epoch sees each sample once
    gradient_variance: list[float] = field(default_factory=list)  # tr(Sigma), one per step: noise_estimates()
    gradient_squared: list[float] = field(default_factory=list)  # |G|^2, likewise


@dataclass(frozen=True)
class Report:
    """What the demo found."""

    test_accuracy: float
    suspicion: Tensor  # [N]: each training sample's gradient norm, averaged over the epochs
    flipped: Tensor  # [N], bool: the truth
    precision: dict[int, float]  # k -> share of wrong labels among the k most suspicious samples
    noise_scale: list[float]  # one per epoch
    milliseconds: tuple[float, float] | None  # a training step of plain torch layers, and with statistics


def load_data(settings: Settings) -> Digits:
    """Split the digits into training and test set, and replace a fraction of the training labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target)

    generator = torch.Generator().manual_seed(settings.seed)
    train, test = torch.randperm(len(labels), generator=generator).tensor_split([settings.train_samples])

    count = round(settings.flipped * len(train))
    chosen = torch.randperm(len(train), generator=generator)[:count]
    shift = torch.randint(1, 10, (count,), generator=generator)  # 1 ... 9: never back to the true class
    given = labels[train].clone()
    given[chosen] = (given[chosen] + shift) % 10

    tensors = images[train], given, labels[train], images[test], labels[test]
    return Digits(*(tensor.to(settings.device) for tensor in tensors))


def digit_cnn(layers: ModuleType) -> nn.Sequential:
    """A small CNN with the layers of ``torch.nn``, or those of ``backpack_cuda``, which offer statistics."""
    return nn.Sequential(
        layers.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        layers.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        layers.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        layers.Linear(128, 10),
    )


def sgd(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimiser of the demo."""
    return torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9)


def per_sample_norms(model: nn.Module, batch_size: int) -> Tensor:
    """Norm of the gradient of every sample's own loss, over all parameters together: [B].

    The loss is a mean over the B samples of the batch, so sample n contributes g_n = grad f_n / B to ``.grad``.
    ``batch_l2`` holds |g_n|^2 for one parameter: summing over parameters gives the squared norm of the whole,
    and the factor B undoes the mean, so that batches of any size compare.
    """
    return batch_size * torch.stack([p.batch_l2 for p in model.parameters()]).sum(0).sqrt()


def noise_estimates(model: nn.Module, batch_size: int) -> tuple[float, float]:
    """Unbiased estimates of tr(Sigma) and |G|^2, whose ratio is the "simple noise scale" of McCandlish et al.

    Let h_n = grad f_n be independent with mean G and covariance Sigma, and h = mean_n h_n, which is ``.grad``.
    The loss being a mean over B samples, the contributions that ``Variance`` sees are g_n = h_n / B:

        variance, summed over all weights = mean_n |g_n - mean_m g_m|^2 = 1 / B^3 * sum_n |h_n - h|^2

    The expectation of sum_n |h_n - h|^2 is (B - 1) tr(Sigma), that of |h|^2 is |G|^2 + tr(Sigma) / B. Hence

        tr(Sigma) = B^3 / (B - 1) * variance          |G|^2 = |h|^2 - tr(Sigma) / B

    The second can come out negative for a single batch. Divide means over many steps, not the numbers of one
    step: the ratio of two noisy numbers is biased even where neither of them is.
    """
    variance = sum(p.variance.sum() for p in model.parameters())
    squared_norm = sum(p.grad.square().sum() for p in model.parameters())
    trace = batch_size**3 / (batch_size - 1) * variance
    return trace.item(), (squared_norm - trace / batch_size).item()


def train(model: nn.Module, digits: Digits, settings: Settings) -> History:
    """A normal training loop; the statistics cost one ``with`` statement around ``backward``."""
    optimizer = sgd(model, settings)
    samples = len(digits.labels)
    generator = torch.Generator().manual_seed(settings.seed)
    history = History(norms=torch.zeros(settings.epochs, samples, device=settings.device))
    steps = settings.epochs * -(-samples // settings.batch_size)

    with tqdm(total=steps, desc="training", unit="step") as bar:
        for epoch in range(settings.epochs):
            for batch in torch.randperm(samples, generator=generator).split(settings.batch_size):
                optimizer.zero_grad()
                loss = cross_entropy(model(digits.images[batch]), digits.labels[batch])
                with backpack(BatchL2Grad(), Variance()):
                    loss.backward()

                history.norms[epoch, batch] = per_sample_norms(model, len(batch))
                if len(batch) > 1:  # one sample has no variance
                    trace, squared_norm = noise_estimates(model, len(batch))
                    history.gradient_variance.append(trace)
                    history.gradient_squared.append(squared_norm)

                optimizer.step()
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    return history


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` for which `model` predicts the label."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def precision_at(suspicion: Tensor, flipped: Tensor, k: int) -> float:
    """Share of wrong labels among the `k` most suspicious samples; by chance it is the share among all."""
    return flipped[suspicion.topk(k).indices].float().mean().item()


def ratio_of_means(variance: Tensor, squared: Tensor) -> Tensor:
    """Noise scale from the estimates of many steps, [..., steps] each; nan where |G|^2 averages to <= 0."""
    mean_squared = squared.mean(-1)
    return torch.where(mean_squared > 0, variance.mean(-1) / mean_squared, torch.nan)


def noise_scale_by_epoch(history: History) -> list[float]:
    """The noise scale of every epoch's steps together."""
    epochs = len(history.norms)
    variance = torch.tensor(history.gradient_variance).tensor_split(epochs)
    squared = torch.tensor(history.gradient_squared).tensor_split(epochs)
    return [ratio_of_means(v, s).item() for v, s in zip(variance, squared, strict=True)]


def time_steps(digits: Digits, settings: Settings) -> tuple[float, float]:
    """Median milliseconds of a whole training step: plain torch layers, and ours with both statistics.

    Both models start equal and take turns within one run, so that they share whatever else the machine does.
    """
    images, labels = digits.images[: settings.batch_size], digits.labels[: settings.batch_size]
    plain, ours = digit_cnn(nn).to(settings.device), digit_cnn(bp).to(settings.device)
    ours.load_state_dict(plain.state_dict())
    plain_optimizer, our_optimizer = sgd(plain, settings), sgd(ours, settings)

    def plain_step() -> None:
        plain_optimizer.zero_grad()
        cross_entropy(plain(images), labels).backward()
        plain_optimizer.step()

    def our_step() -> None:
        our_optimizer.zero_grad()
        loss = cross_entropy(ours(images), labels)
        with backpack(BatchL2Grad(), Variance()):
            loss.backward()
        our_optimizer.step()

    def milliseconds(step: Callable[[], None]) -> float:
        begin = time.perf_counter()
        step()
        if images.is_cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    for step in (plain_step, our_step) * 3:  # the first steps of either kind are slower
        milliseconds(step)
    rounds = tqdm(range(settings.timing_rounds), desc="timing", unit="round")
    times = [(milliseconds(plain_step), milliseconds(our_step)) for _ in rounds]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def draw_histogram(axes: plt.Axes, suspicion: Tensor, flipped: Tensor) -> None:
    """How the norms of samples with a right and with a wrong label are distributed."""
    low, high = suspicion.clamp_min(1e-12).log10().aminmax()
    bins = torch.logspace(low.item(), high.item() + 1e-6, 41).tolist()
    for mask, name, colour in ((~flipped, "right label", "tab:blue"), (flipped, "wrong label", "tab:red")):
        norms = suspicion[mask].numpy()
        axes.hist(norms, bins, label=f"{name} ({len(norms)})", color=colour, alpha=0.6, edgecolor="white")
    axes.set(xscale="log", yscale="log", xlabel="gradient norm, mean over epochs", ylabel="training samples")
    axes.set_title("Per-sample gradient norms", loc="left")
    axes.legend(frameon=False, loc="upper right")


def draw_noise_scale(axes: plt.Axes, history: History, settings: Settings) -> None:
    """The noise scale along the training: every step by itself, and a running ratio of means."""
    variance = torch.tensor(history.gradient_variance)
    squared = torch.tensor(history.gradient_squared)
    steps = torch.arange(1, len(variance) + 1)
    usable = squared > 0
    axes.plot(steps[usable], (variance / squared)[usable], ".", ms=4, color="0.7", label="single step")

    window = max(1, min(len(variance) // 15, 25))
    running = ratio_of_means(variance.unfold(0, window, 1), squared.unfold(0, window, 1))
    axes.plot(steps[window - 1 :], running, color="tab:green", label=f"last {window} steps")
    axes.axhline(settings.batch_size, color="0.3", lw=1, ls="--", label=f"batch size ({settings.batch_size})")

    finite = running[running.isfinite()]
    if len(finite):  # a few single steps lie far outside
        axes.set_ylim(finite.min().item() / 4, finite.max().item() * 4)
    axes.set(yscale="log", xlim=(0, len(steps) + 1), xlabel="training step")
    axes.set_ylabel(r"$\mathrm{tr}(\Sigma)\,/\,|G|^2$, in samples")
    axes.set_title("Gradient noise scale", loc="left")
    axes.legend(ncols=3, loc="lower right", columnspacing=1, handlelength=1.5)


def draw_suspects(figure: plt.Figure, digits: Digits, suspicion: Tensor) -> None:
    """The 16 most suspicious digits with their given and true labels."""
    title = "The 16 most suspicious digits, worst first (red: the given label is wrong, blue: it is right)"
    figure.suptitle(title, x=0.01, ha="left")
    suspects = suspicion.topk(16).indices.tolist()
    for axes, index in zip(figure.subplots(2, 8).flat, suspects, strict=True):
        given, true = int(digits.labels[index]), int(digits.true_labels[index])
        colour = "tab:red" if given != true else "tab:blue"
        axes.imshow(digits.images[index, 0].cpu().numpy(), cmap="gray_r")
        axes.set_title(f"given {given}, true {true}", fontsize=10, color=colour)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=colour, linewidth=2)


def draw_report(digits: Digits, report: Report, history: History, settings: Settings) -> None:
    """Write the picture to ``settings.out``."""
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, hspace=0.03)
    left, right = top.subplots(1, 2)
    draw_histogram(left, report.suspicion.cpu(), report.flipped.cpu())
    draw_noise_scale(right, history, settings)
    draw_suspects(bottom, digits, report.suspicion)
    figure.savefig(settings.out, dpi=110)
    plt.close(figure)


def print_report(report: Report, settings: Settings) -> None:
    """The findings as text."""
    chance = report.flipped.float().mean().item()
    print(f"test accuracy                {report.test_accuracy:.1%}")
    if report.milliseconds:
        plain, ours = report.milliseconds
        ratio = ours / plain
        print(f"time per training step       {ours:.2f} ms; plain torch {plain:.2f} ms; ratio {ratio:.2f}")
    for k, precision in report.precision.items():
        print(f"wrong labels in the top {k:<4d} {precision:.1%}; by chance {chance:.1%}")
    print("noise scale by epoch         " + " ".join(f"{scale:.0f}" for scale in report.noise_scale))
    print(f"picture                      {settings.out}")


def run(settings: Settings) -> Report:
    """The whole demo: train, rank the training samples, compare step times, draw and print the report."""
    torch.manual_seed(settings.seed)
    digits = load_data(settings)
    model = digit_cnn(bp).to(settings.device)
    history = train(model, digits, settings)

    # In the first epochs every norm is large, in the last ones a wrong label may have been memorised. The
    # mean over all epochs needs no choice of a window, and ranked as well as any window or median that was tried.
    suspicion = history.norms.mean(0)
    flipped = digits.flipped
    top = sorted({10, 20, int(flipped.sum())} - {0})
    report = Report(
        test_accuracy=accuracy(model, digits.test_images, digits.test_labels),
        suspicion=suspicion,
        flipped=flipped,
        precision={k: precision_at(suspicion, flipped, k) for k in top},
        noise_scale=noise_scale_by_epoch(history),
        milliseconds=time_steps(digits, settings) if settings.timing_rounds else None,
    )
    draw_report(digits, report, history, settings)
    print_report(report, settings)
    return report


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line, one option per field."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    helps = {
        "flipped": "fraction of the training labels that are replaced by wrong ones",
        "train_samples": "of the 1797 digits; the rest is for testing",
        "timing_rounds": "training steps timed with and without statistics; 0 skips the comparison",
        "out": "the picture",
    }
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

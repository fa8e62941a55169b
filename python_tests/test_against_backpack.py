"""The same program with one import changed: BackPACK's numbers, where BackPACK is right."""

import copy
import importlib
import warnings

import pytest
import torch
from curvature_tools import SECOND_ORDER
from helpers import assert_close, named
from model_cases import SAVED, Residual
from torch import nn

backpack_original = pytest.importorskip("backpack", reason="BackPACK is not installed")

EXTENSIONS = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
PROGRAMS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 3)), (5, 6)),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Flatten(), nn.Linear(16, 3)),
        (5, 4, 3),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, (2, 3), stride=2, dilation=1, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        (4, 2, 8, 9),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, 3)),
        (4, 2, 8),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.ELU(), nn.Flatten(), nn.Linear(24, 3)), (3, 2, 3, 3, 3)),
    "transposed 1d": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(21, 3)),
        (4, 2, 4),
    ),
    "transposed 2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.SELU(), nn.Flatten(), nn.Linear(72, 3)),
        (4, 2, 2, 3),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4).eval(), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)),
        (4, 2, 8),
    ),
    "residual": (lambda: nn.Sequential(Residual(nn)), (4, 2, 5, 4)),
    "lstm": (lambda: nn.Sequential(nn.LSTM(3, 4, batch_first=True), Last(), nn.Linear(4, 3)), (4, 5, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 3)), (5, 4)),
}


class Last(nn.Module):
    """The last output of a recurrent module."""

    def forward(self, outputs):
        return outputs[0][:, -1]


First = importlib.import_module("backpack.custom_module.reduce_tuple").ReduceTuple  # of a tuple of outputs


def run(library: str, build, shape, loss: nn.Module, extensions: list[str], dtype: torch.dtype):
    """One step of a program; returns the parameters, the modules the hook saw, and what it found there."""
    backpack = importlib.import_module(library)
    names = importlib.import_module(f"{library}.extensions")
    torch.manual_seed(0)
    model = backpack.extend(build().to(dtype))
    loss_function = backpack.extend(copy.deepcopy(loss))
    generator = torch.Generator().manual_seed(1)
    if isinstance(model[0], nn.Embedding):
        inputs = torch.randint(7, shape, generator=generator)
    else:
        inputs = torch.randn(shape, generator=generator, dtype=dtype)
    with torch.no_grad(), backpack.disable():
        outputs = model(inputs)
    if isinstance(loss, nn.CrossEntropyLoss):
        targets = torch.randint(3, (len(outputs), *outputs.shape[2:]), generator=generator)
    else:
        targets = torch.rand(outputs.shape, generator=generator, dtype=dtype)
        targets = targets.round() if isinstance(loss, nn.BCEWithLogitsLoss) else targets
    visits = []

    def hook(module):
        if list(module.parameters(recurse=False)):
            present = {
                name: sorted((set(SAVED) | set(SECOND_ORDER)) & set(vars(p)))
                for name, p in module.named_parameters(recurse=False)
            }
            visits.append((type(module).__name__, tuple(module.input0.shape), present))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        warnings.filterwarnings("ignore", "Extension saving to .* Module .*Residual")  # BackPACK: of a container
        warnings.filterwarnings("ignore", "The Kronecker factors stored")  # BackPACK: of ConvTranspose
        with backpack.backpack(*[getattr(names, name)() for name in extensions], extension_hook=hook):
            loss_function(model(inputs), targets).backward()
    return dict(model.named_parameters()), visits


@pytest.mark.parametrize(
    "extensions", [["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"], ["BatchGrad"]], ids=len
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@named("build, shape", PROGRAMS)
def test_same_numbers(build, shape, reduction, extensions):
    dtype, tolerance = torch.float64, 1e-10
    if any(isinstance(m, nn.LSTM | nn.Embedding) for m in build().modules()):
        extensions = ["BatchGrad"]  # BackPACK has no other one for them
        dtype, tolerance = torch.float32, 1e-5  # nor float64 for Embedding
    loss = nn.CrossEntropyLoss(reduction=reduction)
    theirs, their_visits = run("backpack", build, shape, loss, extensions, dtype)
    ours, our_visits = run("backpack_cuda", build, shape, loss, extensions, dtype)
    assert our_visits == their_visits
    for name, reference in theirs.items():
        for attribute in ("grad", *SAVED):
            expected, actual = getattr(reference, attribute, None), getattr(ours[name], attribute, None)
            assert (expected is None) == (actual is None), f"{name}.{attribute}"
            if expected is not None:
                size = reference.grad_batch.abs().max().item() ** (1 if attribute.startswith("grad") else 2)
                assert_close(f"{name}.{attribute}", actual, expected.double(), tolerance, size)


GGN = ["DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact"]
HESSIAN = ["DiagHessian", "BatchDiagHessian"]
# Program -> the quantities that BackPACK has for all of its layers.
SECOND_ORDER_PROGRAMS = {
    **{name: (*PROGRAMS[name], [*GGN, *HESSIAN, "KFLR"]) for name in ("mlp", "cnn", "conv1d", "transposed 1d")},
    **{name: (*PROGRAMS[name], [*GGN, *HESSIAN]) for name in ("tokens", "conv3d", "transposed 2d")},
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2), nn.LogSigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        (3, 4, 6, 4),
        [*GGN, *HESSIAN],
    ),
    "batch norm": (*PROGRAMS["batch norm"], GGN),
    "adaptive pooling": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        (3, 2, 5, 5),
        ["DiagGGNExact", "BatchDiagGGNExact", *HESSIAN],
    ),
    "lstm": (
        lambda: nn.Sequential(nn.LSTM(3, 4, batch_first=True), First(), nn.Flatten(), nn.Linear(20, 3)),
        (4, 5, 3),
        ["DiagGGNExact", "BatchDiagGGNExact"],
    ),
    "dense prediction": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.Sigmoid(), nn.Conv1d(4, 3, 1)),
        (3, 2, 3),
        [*GGN, *HESSIAN, "KFLR"],
    ),
    "one output": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)),
        (4, 4),
        [*GGN, *HESSIAN, "KFLR"],
    ),
}
LOSSES = {
    "cross entropy": nn.CrossEntropyLoss(),
    "cross entropy, sum": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
    "mse, sum": nn.MSELoss(reduction="sum"),
    "bce": nn.BCEWithLogitsLoss(),
    "bce, sum": nn.BCEWithLogitsLoss(reduction="sum"),
}
IN_BACKPACK = [  # its other losses want other shapes
    (program, loss)
    for program in SECOND_ORDER_PROGRAMS
    for loss in LOSSES
    if not (program == "dense prediction" and "entropy" not in loss)
    and not ("bce" in loss and program != "one output")
    and not ("entropy" in loss and program == "one output")
]


@pytest.mark.parametrize("program, loss", IN_BACKPACK)
def test_same_curvature(program, loss):
    """Exact quantities, the columns of the square root one by one, and what the hook sees."""
    build, shape, extensions = SECOND_ORDER_PROGRAMS[program]
    in_float32 = program in ("adaptive pooling", "lstm")  # BackPACK has nothing else for them
    dtype, tolerance = (torch.float32, 1e-5) if in_float32 else (torch.float64, 1e-9)
    theirs, their_visits = run("backpack", build, shape, LOSSES[loss], extensions, dtype)
    ours, our_visits = run("backpack_cuda", build, shape, LOSSES[loss], extensions, dtype)
    assert our_visits == their_visits
    for name, reference in theirs.items():
        compared = 0
        for attribute in SECOND_ORDER:
            expected, actual = getattr(reference, attribute, None), getattr(ours[name], attribute, None)
            assert (expected is None) == (actual is None), f"{name}.{attribute}"
            if expected is not None:
                compared += 1
                pairs = zip(actual, expected, strict=True) if isinstance(expected, list) else [(actual, expected)]
                for mine, other in pairs:
                    assert mine.dtype == other.dtype
                    size = max(other.abs().max().item(), 1e-7)
                    assert_close(f"{name}.{attribute}", mine, other.double(), tolerance, size)
        assert compared >= 2


SAMPLED = ["DiagGGNMC", "BatchDiagGGNMC", "SqrtGGNMC", "KFAC"]


@pytest.mark.parametrize("loss", ["cross entropy", "mse"])
@pytest.mark.parametrize("program", ["mlp", "cnn", "conv1d", "transposed 1d"])
def test_same_shapes_of_sampled_curvature(program, loss):
    """The draws differ; shapes, types, lists and the factors of the inputs do not."""
    build, shape, _ = SECOND_ORDER_PROGRAMS[program]
    theirs, their_visits = run("backpack", build, shape, LOSSES[loss], SAMPLED, torch.float64)
    ours, our_visits = run("backpack_cuda", build, shape, LOSSES[loss], SAMPLED, torch.float64)
    assert our_visits == their_visits
    for name, reference in theirs.items():
        for attribute in ("diag_ggn_mc", "diag_ggn_mc_batch", "sqrt_ggn_mc"):
            expected, actual = getattr(reference, attribute), getattr(ours[name], attribute)
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert [f.shape for f in ours[name].kfac] == [f.shape for f in reference.kfac]
        for mine, other in zip(ours[name].kfac[1:], reference.kfac[1:], strict=True):
            assert_close(name, mine, other, 1e-9)


@pytest.mark.parametrize("loss", ["cross entropy", "mse", "bce"])
def test_same_mean_of_sampled_curvature(loss):
    """A thousand draws of either library: the same diagonal, within 5 standard errors of the difference."""
    build, shape, _ = SECOND_ORDER_PROGRAMS["one output" if loss == "bce" else "mlp"]

    def squares(library):
        extensions = importlib.import_module(f"{library}.extensions")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extensions, "SqrtGGNMC", lambda make=extensions.SqrtGGNMC: make(mc_samples=1000))
            parameters, _ = run(library, build, shape, LOSSES[loss], ["SqrtGGNMC"], torch.float64)
        return {name: p.sqrt_ggn_mc.square() for name, p in parameters.items()}

    ours, theirs = squares("backpack_cuda"), squares("backpack")
    for name, other in theirs.items():
        bound = 5 * ((ours[name].var(0) + other.var(0)) / 1000).sqrt() + 1e-12
        assert ((ours[name].mean(0) - other.mean(0)).abs() <= bound).all(), name

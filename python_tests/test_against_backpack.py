"""The same first-order program with one import changed: BackPACK's numbers, where BackPACK is right."""

import importlib
import warnings

import pytest
import torch
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


def run(library: str, build, shape, reduction: str, extensions: list[str], dtype: torch.dtype):
    """A first-order program; returns the parameters, the modules the hook saw, and what it found there."""
    backpack = importlib.import_module(library)
    names = importlib.import_module(f"{library}.extensions")
    torch.manual_seed(0)
    model = backpack.extend(build().to(dtype))
    loss_function = backpack.extend(nn.CrossEntropyLoss(reduction=reduction))
    generator = torch.Generator().manual_seed(1)
    if isinstance(model[0], nn.Embedding):
        inputs = torch.randint(7, shape, generator=generator)
    else:
        inputs = torch.randn(shape, generator=generator, dtype=dtype)
    targets = torch.randint(3, shape[:1], generator=generator)
    visits = []

    def hook(module):
        if list(module.parameters(recurse=False)):
            present = {name: sorted(set(SAVED) & set(vars(p))) for name, p in module.named_parameters(recurse=False)}
            visits.append((type(module).__name__, tuple(module.input0.shape), present))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        warnings.filterwarnings("ignore", "Extension saving to .* Module .*Residual")  # BackPACK: of a container
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
    theirs, their_visits = run("backpack", build, shape, reduction, extensions, dtype)
    ours, our_visits = run("backpack_cuda", build, shape, reduction, extensions, dtype)
    assert our_visits == their_visits
    for name, reference in theirs.items():
        for attribute in ("grad", *SAVED):
            expected, actual = getattr(reference, attribute, None), getattr(ours[name], attribute, None)
            assert (expected is None) == (actual is None), f"{name}.{attribute}"
            if expected is not None:
                size = reference.grad_batch.abs().max().item() ** (1 if attribute.startswith("grad") else 2)
                assert_close(f"{name}.{attribute}", actual, expected.double(), tolerance, size)


NAMES = {
    "backpack": ["CTX", "backpack", "disable", "extend", "extensions", "memory_cleanup", "BackpropExtension"],
    "backpack.extensions": list(EXTENSIONS),
}


@pytest.mark.parametrize("module", list(NAMES))
def test_names_can_be_imported(module):
    ours = importlib.import_module(module.replace("backpack", "backpack_cuda"))
    theirs = importlib.import_module(module)
    for name in NAMES[module]:
        assert hasattr(theirs, name) and hasattr(ours, name)


def test_savefields_are_the_same():
    theirs, ours = (importlib.import_module(f"{name}.extensions") for name in ("backpack", "backpack_cuda"))
    for name in NAMES["backpack.extensions"]:
        assert getattr(ours, name)().savefield == getattr(theirs, name)().savefield
    assert (
        ours.BatchGrad(subsampling=[0, 2]).get_subsampling() == theirs.BatchGrad(subsampling=[0, 2]).get_subsampling()
    )

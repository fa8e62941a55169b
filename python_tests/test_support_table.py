"""What is supported where: every cell is run and compared with the oracle, and the README's table must say the same.

`python -m pytest python_tests/test_support_table.py --update-readme` writes the table.
"""

import warnings
from pathlib import Path

import operators_on_harness
import pytest
import torch
from harness_tools import needs_harness
from helpers import assert_close
from oracle import model_statistics
from torch import nn

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from backpack_cuda.ops import composite

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"

# Name in the table -> (module, shape of a batch of inputs).
LAYERS = {
    "`Linear`, 2-d input": (lambda: nn.Linear(5, 4), (6, 5)),
    "`Linear`, more dimensions": (lambda: nn.Linear(5, 4), (6, 2, 3, 5)),
    "`Conv1d`": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (6, 4, 7)),
    "`Conv2d`": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding="valid"), (6, 4, 7, 6)),
    "`Conv3d`": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (6, 2, 4, 3, 5)),
    "`ConvTranspose1d`": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (6, 4, 5)),
    "`ConvTranspose2d`": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), (6, 4, 3, 4)),
    "`ConvTranspose3d`": (lambda: nn.ConvTranspose3d(2, 3, 2, padding=1), (6, 2, 3, 4, 3)),
    "`BatchNorm1d/2d/3d` in eval mode": (lambda: nn.BatchNorm2d(3).eval(), (6, 3, 4, 2)),
    "`BatchNorm1d/2d/3d` in train mode": (lambda: nn.BatchNorm2d(3), (6, 3, 4, 2)),
    "any other module that treats samples independently": (lambda: nn.LayerNorm([3, 4]), (6, 3, 4)),
}
QUANTITIES = {
    BatchGrad: lambda stats: stats.batch_grad,
    BatchL2Grad: lambda stats: stats.batch_l2,
    SumGradSquared: lambda stats: stats.sum_grad_squared,
    Variance: lambda stats: stats.variance,
}


def cell(make_module, shape, extension, expected, device, monkeypatch) -> str:
    """Runs one quantity on one layer; what the table says about it."""
    used = []
    for name in ("linear", "conv"):
        original = getattr(composite, name)
        monkeypatch.setattr(composite, name, lambda *a, original=original: (used.append("torch"), original(*a))[1])
    torch.manual_seed(0)
    module = make_module().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        targets = torch.randn_like(module(inputs))
    mixes = isinstance(module, nn.BatchNorm2d) and module.training
    factorised = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    reference = None if mixes else model_statistics(module, nn.MSELoss(), inputs, targets)
    extended = extend(module.to(device))
    loss = nn.MSELoss()(extended(inputs.to(device)), targets.to(device))
    with warnings.catch_warnings(record=True) as caught, backpack(extension):
        warnings.simplefilter("always")
        try:
            loss.backward()
        except NotImplementedError:
            return "error"
    for name, parameter in module.named_parameters():
        result = getattr(parameter, extension.savefield)
        if mixes:
            torch.testing.assert_close(result.sum(0), parameter.grad)
        else:
            torch.testing.assert_close(result.cpu(), expected(reference[name]), rtol=1e-9, atol=1e-12)
    if caught:
        return "summands, warns"
    return "kernel" if factorised and not used else "torch"


def on_cuda(make_module, shape, monkeypatch) -> str:
    """Runs all quantities at once through the CUDA operators on the harness; what the table says about CUDA."""
    torch.manual_seed(0)
    module, inputs = make_module().double(), torch.randn(shape, dtype=torch.float64)
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return "torch; not measured"
    with torch.no_grad():
        targets = torch.randn_like(module(inputs))
    reference = model_statistics(module, nn.MSELoss(), inputs, targets)
    called, extensions = [], [q() for q in QUANTITIES]
    with monkeypatch.context() as patch:
        operators_on_harness.swap_in(patch.setattr, called.append)
        loss = nn.MSELoss()(extend(module.float())(inputs.float()), targets.float())
        with backpack(*extensions):
            loss.backward()
    assert len(called) == 1, "one call gives the gradients and all statistics of weight and bias"
    for name, parameter in module.named_parameters():
        for extension, expected in zip(extensions, QUANTITIES.values(), strict=True):
            assert_close(extension.savefield, getattr(parameter, extension.savefield), expected(reference[name]), 1e-5)
    return "kernel; not measured"


def table(device, monkeypatch) -> str:
    """The table in Markdown."""
    head = ["layer", *(f"`{extension.__name__}`" for extension in QUANTITIES), "on CUDA"]
    rows = [head, ["---"] * len(head)]
    for name, (make_module, shape) in LAYERS.items():
        cells = [cell(make_module, shape, q(), expected, device, monkeypatch) for q, expected in QUANTITIES.items()]
        simulated = device.type == "cpu"  # on a GPU the tests of the layers run the kernels themselves
        rows.append([name, *cells, on_cuda(make_module, shape, monkeypatch) if simulated else ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@needs_harness
def test_readme_table_is_what_runs(request, device, monkeypatch):
    text = table(device, monkeypatch)
    before, _, rest = README.read_text().partition(BEGIN)
    current, _, after = rest.partition(END)
    if request.config.getoption("--update-readme"):
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    elif device.type == "cpu":
        assert current.strip() == text, "README.md's table is out of date: run this test with --update-readme"


@pytest.mark.parametrize("extension", QUANTITIES)
def test_quantities_of_the_table_are_exported(extension):
    import backpack_cuda

    assert getattr(backpack_cuda.extensions, extension.__name__) is extension

"""What is supported where: every cell is run and compared with the oracle, and the README's table must say the same.

`python -m pytest python_tests/test_support_table.py --update-readme` writes the table.
"""

import copy
import warnings
from pathlib import Path

import operators_on_harness
import pytest
import torch
from curvature_oracle import curvature, hessian_diagonals, square_root
from curvature_tools import assert_exact_ggn, assert_factors, assert_nothing_saved, expected_factors
from harness_tools import needs_harness
from helpers import assert_close
from model_cases import Scale
from oracle import model_statistics
from products_oracle import Products, ggn_products, hessian_products
from recurrent_oracle import recurrent_factors
from sequential_oracle import positive_blocks, steps
from torch import nn

import backpack_cuda
from backpack_cuda import backpack, extend
from backpack_cuda.curvature.losses import is_loss
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
from backpack_cuda.ops import composite

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"


class Outputs(nn.Module):
    """The outputs of a recurrent module at all positions."""

    def __init__(self, module: nn.RNNBase):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)[0]


# Name in the table -> (module, shape of a batch of inputs; of tokens where the module is an Embedding).
LAYERS = {
    "`Linear`, 2-d input": (lambda: nn.Linear(5, 4), (6, 5)),
    "`Linear`, more dimensions": (lambda: nn.Linear(5, 4), (6, 2, 3, 5)),
    "`Conv1d`": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (6, 4, 7)),
    "`Conv2d`": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding="valid"), (6, 4, 7, 6)),
    "`Conv3d`": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (6, 2, 4, 3, 5)),
    "`ConvTranspose1d`": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (6, 4, 5)),
    "`ConvTranspose2d`": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), (6, 4, 3, 4)),
    "`ConvTranspose3d`": (lambda: nn.ConvTranspose3d(2, 3, 2, padding=1), (6, 2, 3, 4, 3)),
    "`Embedding`": (lambda: nn.Embedding(5, 3), (6, 4)),
    "`RNN`, `LSTM`, `GRU`": (lambda: Outputs(nn.GRU(3, 2, 2, batch_first=True, bidirectional=True)), (6, 3, 3)),
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

# Columns of the second-order table: those that share code; of the sampled ones the exact one is run.
SECOND_ORDER = {
    "`DiagGGNExact/MC`, `BatchDiagGGNExact/MC`": [DiagGGNExact, BatchDiagGGNExact, DiagGGNMC, BatchDiagGGNMC],
    "`SqrtGGNExact/MC`": [SqrtGGNExact, SqrtGGNMC],
    "`KFLR`, `KFAC`": [KFLR, KFAC],
    "`KFRA`, `HBP`": [KFRA],  # of one sample, where it equals KFLR
    "`DiagHessian`, `BatchDiagHessian`": [DiagHessian, BatchDiagHessian],
}
PRODUCTS = {"`HMP`, `GGNMP`": [HMP, GGNMP], "`PCHMP`": [PCHMP]}
SECOND_ORDER_LAYERS = {
    **{name: layer for name, layer in LAYERS.items() if not name.startswith("any")},
    "vectors of any other module that treats samples independently": (lambda: nn.LayerNorm(4), (6, 3, 4)),
    "larger parameters of such modules": (lambda: nn.LayerNorm([3, 4]), (6, 3, 4)),
}


def inputs_of(module, *shape) -> torch.Tensor:
    """A batch of inputs."""
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, shape)
    return torch.randn(shape, dtype=torch.float64)


def way(module, used) -> str:
    """How a layer's results are formed, where `used` says what composites ran."""
    if isinstance(module, nn.Embedding):
        return "scatter"  # test_embedding.py: within the memory of the result
    by_kernels = nn.Linear | nn.modules.conv._ConvNd | Outputs
    return "kernel" if isinstance(module, by_kernels) and not used else "torch"


def cell(make_module, shape, extension, expected, device, monkeypatch) -> str:
    """Runs one quantity on one layer; what the table says about it."""
    used = []
    for name in ("linear", "conv"):
        original = getattr(composite, name)
        monkeypatch.setattr(composite, name, lambda *a, original=original: (used.append("torch"), original(*a))[1])
    torch.manual_seed(0)
    module = make_module().double()
    inputs = inputs_of(module, *shape)
    with torch.no_grad():
        targets = torch.randn_like(module(inputs))
    mixes = isinstance(module, nn.BatchNorm2d) and module.training
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
    return way(module, used)


def on_cuda(make_module, shape, monkeypatch) -> str:
    """Runs all quantities at once through the CUDA operators on the harness; what the table says about CUDA."""
    torch.manual_seed(0)
    module = make_module().double()
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd | Outputs):
        return f"{way(module, [])}; not measured"
    inputs = inputs_of(module, *shape)
    with torch.no_grad():
        targets = torch.randn_like(module(inputs))
    reference = model_statistics(module, nn.MSELoss(), inputs, targets)
    called, extensions = [], [q() for q in QUANTITIES]
    with monkeypatch.context() as patch:
        operators_on_harness.swap_in(patch.setattr, called.append)
        loss = nn.MSELoss()(extend(module.float())(inputs.float()), targets.float())
        with backpack(*extensions):
            loss.backward()
    expected_calls = 8 if isinstance(module, Outputs) else 1  # two for every layer and direction
    assert len(called) == expected_calls, "one call gives the gradients and all statistics of weight and bias"
    for name, parameter in module.named_parameters():
        for extension, expected in zip(extensions, QUANTITIES.values(), strict=True):
            assert_close(extension.savefield, getattr(parameter, extension.savefield), expected(reference[name]), 1e-5)
    return "kernel; not measured"


def second_order_case(make_module, shape, before: bool, samples: int = 2):
    """(float64 model, inputs, targets): the layer by itself, or with parameters and a nonlinearity before it."""
    torch.manual_seed(0)
    module = make_module().double()
    if isinstance(module, nn.Embedding):
        model = nn.Sequential(module, nn.Tanh()) if before else module  # nothing can be before it
    else:
        model = nn.Sequential(Scale(shape[-1]).double(), nn.Tanh(), module) if before else module
    inputs = inputs_of(module, samples, *shape[1:])
    with torch.no_grad():
        return model, inputs, torch.randn_like(model(inputs))


def run_and_compare(model, inputs, targets, extensions, device, tolerance=1e-9, dtype=torch.float64) -> None:
    """One backward pass of a layer, compared with the oracle. Raises what the product raises."""
    extensions = [make() for make in extensions if "MC" not in make.__name__ and make is not KFAC]
    fields = {ext.savefield for ext in extensions}

    def loss(outputs):
        return nn.functional.mse_loss(outputs, targets)

    expected = curvature(model, loss, inputs)
    diagonals = hessian_diagonals(model, loss, inputs) if "diag_h" in fields else {}
    # A parameter of the whole block: everything but weights of Linear layers and convolutions.
    factors, factor_fields = {}, fields & {"kflr", "kfra"}
    if factor_fields:
        roots = square_root(expected.hessian)
        factors = expected_factors(model, inputs, roots, "backpack")
        factors |= recurrent_factors(model, lambda n: model(inputs[n : n + 1]), roots)
    for name, parameter in model.named_parameters():
        if factor_fields and name not in factors and parameter.dim() < 2:
            factors[name] = [expected.blocks(name).sum(0)]
    extended, extended_loss = extend(model.to(device, dtype)), extend(nn.MSELoss())
    inputs = inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
    value = extended_loss(extended(inputs), targets.to(device, dtype))
    with backpack(*extensions):
        value.backward()
    assert_exact_ggn(model, expected, tolerance, fields)
    for name, rows in diagonals.items():
        size = rows.abs().max().item()
        parameter = model.get_parameter(name)
        assert_close(name, parameter.diag_h, rows.sum(0), tolerance, len(rows) * size)
        assert_close(name, parameter.diag_h_batch, rows, tolerance, size)
    for field in factor_fields:
        assert_factors(model, field, factors, tolerance)


def second_order_cell(make_module, shape, extensions, device, monkeypatch) -> str:
    """Runs one group of quantities on one layer, alone and behind another; what the table says about it."""
    used, works = [], []
    for name in ("linear_columns", "conv_columns", "bias_columns", "linear_kron_factor", "conv_kron_factor"):
        original = getattr(composite, name)
        monkeypatch.setattr(composite, name, lambda *a, original=original: (used.append("torch"), original(*a))[1])
    for before in (False, True):
        model, inputs, targets = second_order_case(make_module, shape, before, 1 if KFRA in extensions else 2)
        try:
            if any(isinstance(m, nn.BatchNorm2d) and m.training for m in model.modules()):
                refused(model, inputs, targets, extensions, device)
            run_and_compare(model, inputs, targets, extensions, device)
        except NotImplementedError:
            assert_nothing_saved(model)
        else:
            works.append(before)
    if not works:
        return "error"
    text = way(make_module(), used)
    return text if True in works else f"{text}; error for parameters before it"


def product_cell(make_module, shape, extensions, device) -> str:
    """Runs one group of products on one layer, alone and behind another; what the table says about it."""
    works = []
    for before in (False, True):
        model, inputs, targets = second_order_case(make_module, shape, before)
        expected = expected_products(model, inputs, targets)
        inputs = inputs.to(device)
        try:
            value = extend(nn.MSELoss())(extend(model.to(device))(inputs), targets.to(device))
            with backpack(*[make() for make in extensions]):
                value.backward()
        except NotImplementedError:
            continue
        works.append(before)
        for field in [make().savefield for make in extensions]:
            for name, parameter in model.named_parameters():
                v, product = torch.randn(parameter.shape, dtype=torch.float64), expected[field]()[name]
                actual = getattr(parameter, field)(v.to(device))
                assert_close(f"{name}.{field}", actual, product(v), 1e-9, 1 + product(v).abs().max().item())
    if not works:
        return "error"
    return "torch" if True in works else "torch; error for parameters before it"


def expected_products(model, inputs, targets) -> dict:
    """By savefield the oracles, each a function of no argument."""
    stock = copy.deepcopy(model)

    def loss(outputs):
        return nn.functional.mse_loss(outputs, targets)

    def positive() -> Products:
        if not isinstance(stock, nn.Sequential):  # nothing behind its parameters is curved
            return ggn_products(stock, loss, inputs)
        blocks = positive_blocks(*steps(stock, loss, inputs), "clip")
        return {name: lambda v, block=block: (block @ v.flatten()).view_as(v) for name, block in blocks.items()}

    return {
        "hmp": lambda: hessian_products(stock, loss, inputs),
        "ggnmp": lambda: ggn_products(stock, loss, inputs),
        "pchmp": positive,
    }


def refused(model, inputs, targets, extensions, device) -> None:
    """Runs a model that the oracle, which takes samples one by one, cannot compare with."""
    value = extend(nn.MSELoss())(extend(model.to(device))(inputs.to(device)), targets.to(device))
    with backpack(extensions[0]()):
        value.backward()
    raise AssertionError(f"{model} was not refused")


def second_order_on_cuda(make_module, shape, monkeypatch) -> str:
    """Runs the exact quantities through the CUDA operators on the harness; what the table says about CUDA."""
    model, inputs, targets = second_order_case(make_module, shape, before=False)
    if not isinstance(model, nn.Linear | nn.modules.conv._ConvNd | Outputs):
        return f"{way(model, [])}; not measured"
    called = []
    with monkeypatch.context() as patch:
        operators_on_harness.swap_in(patch.setattr, called.append)
        extensions = [DiagGGNExact, BatchDiagGGNExact, SqrtGGNExact, KFLR]
        run_and_compare(model, inputs, targets, extensions, torch.device("cpu"), 1e-5, torch.float32)
    assert any(name.endswith("column_stats") for name in called)
    factors = "" if any(name.endswith("kron_factor") for name in called) else ", factors by torch"
    return f"kernel{factors}; not measured"


def markdown(rows: list[list[str]]) -> str:
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(device, monkeypatch) -> str:
    """Both tables and the losses in Markdown."""
    simulated = device.type == "cpu"  # on a GPU the tests of the layers run the kernels themselves
    rows = [["layer", *(f"`{extension.__name__}`" for extension in QUANTITIES), "on CUDA"]]
    for name, (make_module, shape) in LAYERS.items():
        cells = [cell(make_module, shape, q(), expected, device, monkeypatch) for q, expected in QUANTITIES.items()]
        rows.append([name, *cells, on_cuda(make_module, shape, monkeypatch) if simulated else ""])
    second = [["layer", *SECOND_ORDER, *PRODUCTS, "on CUDA"]]
    for name, (make_module, shape) in SECOND_ORDER_LAYERS.items():
        cells = [second_order_cell(make_module, shape, e, device, monkeypatch) for e in SECOND_ORDER.values()]
        cells += [product_cell(make_module, shape, e, device) for e in PRODUCTS.values()]
        second.append([name, *cells, second_order_on_cuda(make_module, shape, monkeypatch) if simulated else ""])
    losses = [name for name in sorted(vars(nn)) if name.endswith("Loss") and is_loss(object.__new__(getattr(nn, name)))]
    sentence = f"Losses of the second order: {', '.join(f'`{name}`' for name in losses)}, and those of `register_loss`."
    return "\n\n".join([markdown(rows), markdown(second), sentence])


@needs_harness
def test_readme_table_is_what_runs(request, device, monkeypatch):
    text = table(device, monkeypatch)
    before, _, rest = README.read_text().partition(BEGIN)
    current, _, after = rest.partition(END)
    if request.config.getoption("--update-readme"):
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    elif device.type == "cpu":
        assert current.strip() == text, "README.md's table is out of date: run this test with --update-readme"


@pytest.mark.parametrize(
    "extension", [*QUANTITIES, *(e for group in (SECOND_ORDER | PRODUCTS).values() for e in group)]
)
def test_quantities_of_the_table_are_exported(extension):
    assert getattr(backpack_cuda.extensions, extension.__name__) is extension

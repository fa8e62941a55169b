"""Running a model with second-order quantities, and comparing what it saves with the oracle."""

import torch
from curvature_oracle import Curvature, LayerUse, joined, kronecker_factors, layer_uses
from helpers import assert_close
from torch import Tensor, nn

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import (
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
)

EXACT = {e().savefield: e for e in (DiagGGNExact, BatchDiagGGNExact, SqrtGGNExact)}
MONTE_CARLO = {e().savefield: e for e in (DiagGGNMC, BatchDiagGGNMC, SqrtGGNMC)}
HESSIAN = {e().savefield: e for e in (DiagHessian, BatchDiagHessian)}
KRONECKER = {"kfac": KFAC, "kflr": KFLR}
SECOND_ORDER = EXACT | MONTE_CARLO | HESSIAN | KRONECKER
CONVENTIONS = ("backpack", "expand", "reduce")


# Name -> (loss for three classes, kind of targets).
LOSSES = {
    "mse": (nn.MSELoss(), "normal"),
    "mse, sum": (nn.MSELoss(reduction="sum"), "normal"),
    "cross entropy": (nn.CrossEntropyLoss(), "classes"),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), "classes"),
    "cross entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.3), "classes"),
    "cross entropy, soft": (nn.CrossEntropyLoss(), "soft"),
    "cross entropy, weighted": (nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]).double()), "classes"),
    "cross entropy, weighted, smoothed": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]).double(), label_smoothing=0.2),
        "classes",
    ),
    "cross entropy, weighted, soft": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]).double(), reduction="sum"),
        "soft",
    ),
    "cross entropy, ignored": (nn.CrossEntropyLoss(), "some ignored"),
    "cross entropy, ignored, weighted": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]).double(), label_smoothing=0.2),
        "some ignored",
    ),
    "bce": (nn.BCEWithLogitsLoss(), "between 0 and 1"),
    "bce, sum": (nn.BCEWithLogitsLoss(reduction="sum"), "between 0 and 1"),
    "bce, weighted": (
        nn.BCEWithLogitsLoss(
            weight=torch.tensor([1.0, 0.2, 3.0]).double(), pos_weight=torch.tensor([2.0, 0.5, 1.0]).double()
        ),
        "between 0 and 1",
    ),
}
BODIES = {  # three classes; the second has three positions, too, which is what BCEWithLogitsLoss' weights belong to
    "vectors": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4, 4)),
    "positions": (lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.SiLU(), nn.Conv1d(4, 3, 1)), (3, 2, 4)),
}


def targets_for(kind: str, outputs: Tensor) -> Tensor:
    if kind == "normal":
        return torch.randn_like(outputs)
    if kind == "between 0 and 1":
        return torch.rand_like(outputs)
    if kind == "soft":
        return torch.randn_like(outputs).softmax(1)
    targets = torch.randint(outputs.shape[1], (len(outputs), *outputs.shape[2:]))
    if kind == "some ignored":
        targets[1] = -100
        targets.view(-1)[-1] = -100
    return targets


def backward(model: nn.Module, loss, inputs: Tensor, targets: Tensor, *extensions, scale: float = 1.0, **options):
    """Extends model and loss in place and runs one forward and backward pass with the extensions; the loss' value."""
    value = scale * extend(loss)(extend(model)(inputs), targets)
    with backpack(*extensions, **options):
        value.backward()
    return value.detach()


def saved(model: nn.Module, savefields=tuple(SECOND_ORDER)) -> dict[str, dict[str, object]]:
    """By the parameter's name and the attribute what lies on the parameters."""
    return {
        name: {field: getattr(p, field) for field in savefields if hasattr(p, field)}
        for name, p in model.named_parameters()
    }


def assert_nothing_saved(model: nn.Module) -> None:
    for name, found in saved(model).items():
        assert not found, f"{name}: {sorted(found)}"


def assert_same(actual: dict, expected: dict, tolerance: float = 0.0) -> None:
    """Two results of `saved`, attribute by attribute; bit by bit with tolerance 0."""
    assert actual.keys() == expected.keys()
    for name, quantities in expected.items():
        assert actual[name].keys() == quantities.keys(), name
        for field, value in quantities.items():
            mine, theirs = (list(v) if isinstance(v, list) else [v] for v in (actual[name][field], value))
            assert len(mine) == len(theirs)
            for a, b in zip(mine, theirs, strict=True):
                assert a.dtype == b.dtype
                assert_close(f"{name}.{field}", a, b.double(), tolerance)


def assert_exact_ggn(model: nn.Module, expected: Curvature, tolerance: float = 1e-9, fields=tuple(EXACT)) -> None:
    """The exact GGN quantities of every trained parameter; of the square root, what it is the root of.

    Errors are relative to the parameter's largest entry, to 1e-3 of the model's largest, or to 1e-6 of what a loss
    Hessian of ones would give: entries of the oracle's cancel to 1e-16.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(parameters) == set(expected.jacobian)
    floor = 1e-6 * max(j.abs().max().item() ** 2 for j in expected.jacobian.values())
    diags = {name: expected.batch_diag(name) for name in parameters}
    largest = max(diag.abs().max().item() for diag in diags.values())
    for name, parameter in parameters.items():
        size = max(diags[name].abs().max().item(), 1e-3 * largest, floor)
        if "diag_ggn_exact" in fields:
            assert_close(f"{name}.diag_ggn_exact", parameter.diag_ggn_exact, diags[name].sum(0), tolerance, size)
        if "diag_ggn_exact_batch" in fields:
            assert_close(f"{name}.diag_ggn_exact_batch", parameter.diag_ggn_exact_batch, diags[name], tolerance, size)
        if "sqrt_ggn_exact" in fields:
            root = parameter.sqrt_ggn_exact
            assert root.shape[1:] == diags[name].shape
            flat = root.detach().cpu().double().reshape(*root.shape[:2], -1)  # [V, N, |P|]
            gram = torch.einsum("vnp,vnq->npq", flat, flat)
            assert_close(f"{name}.sqrt_ggn_exact", gram, expected.blocks(name), tolerance, size)


def expected_factors(model: nn.Module, inputs: Tensor, roots: Tensor, convention: str) -> dict[str, list[Tensor]]:
    """By parameter name the Kronecker factors of all Linear layers and convolutions of a stock model.

    A weight's are [B, A], per group or without a dimension for a single one, a bias' [B] of all groups. Uses of a tied
    weight count together.
    """
    by_module = layer_uses(model, inputs, roots)
    modules = dict(model.named_modules())
    uses: dict[int, list[LayerUse]] = {}
    for name, calls in by_module.items():
        for parameter in modules[name].parameters(recurse=False):
            uses.setdefault(id(parameter), []).extend(calls)
    factors = {}
    for name, parameter in model.named_parameters():
        module = modules[name.rpartition(".")[0]]
        if id(parameter) in uses and parameter.requires_grad:
            use, is_linear = joined(uses[id(parameter)]), isinstance(module, nn.Linear)
            if parameter is module.weight:
                b, a = kronecker_factors(use, convention, is_linear)
                factors[name] = [b, a] if len(a) > 1 else [b[0], a[0]]
            else:  # of all groups together
                use = use._replace(columns=use.columns.flatten(3).unsqueeze(3))
                factors[name] = [kronecker_factors(use, convention, is_linear)[0][0]]
    return factors


def assert_factors(model: nn.Module, savefield: str, expected: dict[str, list[Tensor]], tolerance: float = 1e-9):
    """The factors of the named parameters, symmetric bit by bit, writable and sharing no memory."""
    parameters = dict(model.named_parameters())
    largest = max((f[0].abs().max().item() for f in expected.values()), default=0)
    seen = set()
    for name, factors in expected.items():
        actual = getattr(parameters[name], savefield)
        assert isinstance(actual, list) and len(actual) == len(factors), name
        for place, (mine, reference) in enumerate(zip(actual, factors, strict=True)):
            size = max(reference.abs().max().item(), 1e-3 * largest if place == 0 else 0, 1e-6)
            assert_close(f"{name}.{savefield}[{place}]", mine, reference, tolerance, size)
            assert torch.equal(mine, mine.mT), f"{name}.{savefield}[{place}] is not symmetric"
            assert mine.untyped_storage().data_ptr() not in seen, f"{name}.{savefield}[{place}] shares memory"
            seen.add(mine.untyped_storage().data_ptr())

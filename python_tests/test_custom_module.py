"""BackPACK's modules: constructors, forwards and errors as there, every quantity at each, and the converter."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from curvature_oracle import curvature, hessian_diagonals, square_root
from curvature_tools import (
    MONTE_CARLO,
    assert_exact_ggn,
    assert_factors,
    assert_same,
    backward,
    expected_factors,
    saved,
)
from helpers import assert_close, named
from model_cases import all_extensions, assert_quantities
from oracle import model_statistics
from torch import Tensor, nn

import backpack_cuda as bp
from backpack_cuda import backpack, extend
from backpack_cuda.custom_module.branching import Parallel, SumModule, _Branch
from backpack_cuda.custom_module.graph_utils import BackpackTracer, convert_module_to_backpack
from backpack_cuda.custom_module.pad import Pad
from backpack_cuda.custom_module.permute import Permute
from backpack_cuda.custom_module.reduce_tuple import ReduceTuple
from backpack_cuda.custom_module.scale_module import ScaleModule
from backpack_cuda.custom_module.slicing import Slicing
from backpack_cuda.extensions import (
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
)


class Join(nn.Module):
    """A merge that is no sum."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], 1)


def residual(width: int, *branch: nn.Module) -> Parallel:
    return Parallel(nn.Identity(), nn.Sequential(*branch, nn.Linear(width, width)))


CASES = {  # (model for three classes, shape of the inputs)
    "sum": (
        lambda: nn.Sequential(nn.Linear(4, 3), Parallel(nn.Linear(3, 3), nn.Tanh(), nn.Identity()), nn.Linear(3, 3)),
        (4, 4),
    ),
    "nested": (
        lambda: nn.Sequential(nn.Linear(4, 3), residual(3, nn.Sigmoid(), residual(3, nn.SiLU())), nn.Linear(3, 3)),
        (4, 4),
    ),
    "a branch alone": (lambda: nn.Sequential(nn.Linear(4, 3), Parallel(nn.Linear(3, 3)), nn.ELU()), (3, 4)),
    "other merge": (
        lambda: nn.Sequential(
            Parallel(nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 1), nn.Tanh()), merge_module=Join())
        ),
        (4, 4),
    ),
    "scale": (
        lambda: nn.Sequential(ScaleModule(0.7), nn.Linear(4, 3), ScaleModule(-2.0), nn.Tanh(), nn.Linear(3, 3)),
        (4, 4),
    ),
    "permute": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), Permute(0, 2, 1), nn.Linear(3, 2), nn.Flatten()),
        (3, 2, 3),
    ),
    "transpose": (
        lambda: nn.Sequential(
            nn.Linear(4, 2), nn.Sigmoid(), Permute(1, 2, init_transpose=True), nn.Flatten(), nn.Linear(4, 3)
        ),
        (3, 2, 4),
    ),
    "pad": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 2, 2), Pad((1, 0), value=0.3), nn.Tanh(), nn.Conv1d(2, 2, 2), nn.Flatten(), nn.Linear(4, 3)
        ),
        (3, 2, 3),
    ),
    "reflection": (
        lambda: nn.Sequential(nn.Conv1d(2, 1, 2), nn.Tanh(), Pad([1, 1], "reflect"), nn.Flatten(), nn.Linear(4, 3)),
        (3, 2, 3),
    ),
    "slicing": (
        lambda: nn.Sequential(nn.Linear(4, 6), Slicing((slice(None), slice(1, None, 2))), nn.SiLU(), nn.Linear(3, 3)),
        (4, 4),
    ),
    "one position": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Slicing((slice(None), -1)), nn.Linear(3, 3)),
        (3, 2, 4),
    ),
    "tuple": (
        lambda: nn.Sequential(_Branch(nn.Linear(4, 3), nn.Identity()), ReduceTuple(), nn.Tanh(), nn.Linear(3, 3)),
        (4, 4),
    ),
}


@named("build, shape", CASES)
def test_quantities(build, shape, device):
    """Of every kind, also those that BackPACK refuses at branches, permutations, scalings and paddings."""
    model = build().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    targets = torch.randint(3, shape[:1])
    loss = nn.CrossEntropyLoss()
    expected = curvature(model, lambda outputs: loss(outputs, targets), inputs)
    first_order = model_statistics(model, loss, inputs, targets)
    diagonals = hessian_diagonals(model, lambda outputs: loss(outputs, targets), inputs)
    factors = expected_factors(model, inputs, square_root(expected.hessian), "backpack")

    extensions = (DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), KFLR(), DiagHessian(), BatchDiagHessian())
    backward(model.to(device), loss, inputs.to(device), targets.to(device), *extensions, *all_extensions())
    assert_quantities(model, first_order)
    assert_exact_ggn(model, expected)
    assert_factors(model, "kflr", factors)
    largest = max(rows.sum(0).abs().max().item() for rows in diagonals.values())
    for name, parameter in model.named_parameters():
        assert_close(f"{name}.diag_h", parameter.diag_h, diagonals[name].sum(0), 1e-8, largest)
        assert_close(f"{name}.diag_h_batch", parameter.diag_h_batch, diagonals[name], 1e-8, largest)


class Functional(nn.Module):
    """The same steps as `modular()`, without modules for them."""

    def __init__(self, first: nn.Module, second: nn.Module, out: nn.Module):
        super().__init__()
        self.first, self.second, self.out = first, second, out

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.pad((x + 0.5 * self.second(x)).transpose(1, 2), (0, 1))[:, :, 1:]
        return self.out(x.flatten(1))


def modular(first: nn.Module, second: nn.Module, out: nn.Module) -> nn.Module:
    return nn.Sequential(
        first,
        Parallel(OrderedDict(identity=nn.Identity(), branch=nn.Sequential(second, ScaleModule(0.5)))),
        Permute(0, 2, 1),
        Pad((0, 1)),
        Slicing((slice(None), slice(None), slice(1, None))),
        nn.Flatten(),
        out,
    )


def test_modules_are_not_needed(device):
    """The functional form gives the same numbers, sampled ones included."""
    layers = [nn.Linear(3, 2).double(), nn.Linear(2, 2).double(), nn.Linear(6, 3).double()]
    inputs, targets = torch.randn(4, 3, 3).double().to(device), torch.randint(3, (4,), device=device)
    results = []
    for build in (Functional, modular):
        model = build(*copy.deepcopy(layers)).to(device)
        torch.manual_seed(1)
        backward(model, nn.CrossEntropyLoss(), inputs, targets, KFAC(), *[make() for make in MONTE_CARLO.values()])
        results.append(dict(zip(["0.w", "0.b", "1.w", "1.b", "2.w", "2.b"], saved(model).values(), strict=True)))
    assert_same(*results, 1e-12)


@pytest.mark.parametrize("slices", [(slice(0, 2),), (slice(None, None, 2), slice(None))])
@pytest.mark.parametrize("make", [DiagGGNExact, KFLR, DiagHessian])
def test_slicing_the_samples(slices, make, device):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Slicing(slices), nn.Linear(3, 2)).to(device)
    inputs = torch.randn(4, 3, device=device)
    targets = torch.randn(2, 2, device=device)
    with pytest.raises((ValueError, NotImplementedError)):
        backward(model, nn.MSELoss(), inputs, targets, make())


# ---------------------------------------------------------------------------------------------------------------------
# Constructors, forwards, errors
# ---------------------------------------------------------------------------------------------------------------------


def test_branches():
    first, second, x = nn.Linear(2, 3), nn.Linear(2, 3), torch.randn(4, 2)
    branch = _Branch(first, second)
    assert [name for name, _ in branch.named_children()] == ["0", "1"]
    assert isinstance(branch(x), tuple)
    assert all(map(torch.equal, branch(x), (first(x), second(x))))
    named_branch = _Branch(OrderedDict(a=first, b=second))
    assert [name for name, _ in named_branch.named_children()] == ["a", "b"]
    parallel = Parallel(first, second)
    assert list(parallel.state_dict()) == ["branch.0.weight", "branch.0.bias", "branch.1.weight", "branch.1.bias"]
    assert isinstance(parallel.merge, SumModule)
    assert torch.equal(parallel(x), first(x) + second(x))
    merge = Join()
    assert Parallel(first, second, merge_module=merge).merge is merge


def test_sums():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(SumModule()(x), x)
    assert torch.equal(SumModule()(x, y, x), x + y + x)
    for wrong in ((), (x, y[:1]), (x, torch.randn(3)), (x, 1.0), ((x, y),)):
        with pytest.raises(AssertionError, match="input"):
            SumModule()(*wrong)


def test_scaling():
    scale = ScaleModule(0.5)
    assert scale.weight == 0.5 and not list(scale.parameters()) and ScaleModule().weight == 1.0
    assert torch.equal(scale(torch.ones(2)), torch.tensor([0.5, 0.5]))
    for wrong in (2, "1", torch.tensor(1.0), None):
        with pytest.raises(ValueError, match="weight"):
            ScaleModule(wrong)


def test_permutations():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(Permute(0, 3, 1, 2)(x), x.permute(0, 3, 1, 2))
    transpose = Permute(1, -1, init_transpose=True)
    assert torch.equal(transpose(x), x.transpose(1, -1))
    assert torch.equal(transpose(x[0]), x[0].transpose(1, -1))
    for dims, init_transpose in (((1, 0, 2), False), ((0, 1), True), ((2, 0), True), ((), False)):
        with pytest.raises(ValueError, match="dims"):
            Permute(*dims, init_transpose=init_transpose)


def test_padding_slicing_and_tuples():
    x = torch.randn(2, 3, 4)
    assert torch.equal(Pad((1, 2), value=3.0)(x), F.pad(x, (1, 2), value=3.0))
    assert torch.equal(Pad([1, 2], mode="circular")(x), F.pad(x, (1, 2), mode="circular"))
    info = (slice(None), 1, slice(None, None, 2))
    assert torch.equal(Slicing(info)(x), x[:, 1, ::2]) and Slicing(info).slice_info is info
    assert ReduceTuple()((x, 1)) is x and ReduceTuple(index=1)((x, 1)) == 1


def test_extension_hook(device):
    """Called for each module but the containers, once the parameters in it have their results."""
    model = extend(CASES["sum"][0]()).to(device)
    seen = []
    with backpack(BatchGrad(), extension_hook=seen.append):
        model(torch.randn(4, 4, device=device)).sum().backward()
    first, (linear, tanh, identity), merge, out = model[0], model[1].branch.children(), model[1].merge, model[2]
    assert set(seen) <= {first, linear, tanh, identity, merge, out} and {first, linear, tanh, merge, out} <= set(seen)


# ---------------------------------------------------------------------------------------------------------------------
# The converter
# ---------------------------------------------------------------------------------------------------------------------


class DataDependent(nn.Module):
    """What torch.fx cannot trace, and a module with parameters called twice: BackPACK's converter refuses both."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < torch.inf:
            x = 2 * self.linear(x) * x
        return self.out(x + self.linear(x).relu_())


@pytest.mark.parametrize("how", ["use_converter", "convert_module_to_backpack"])
def test_conversion_returns_the_module(how, device, capsys):
    model = DataDependent().double()
    inputs, targets = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    expected = model_statistics(model, nn.MSELoss(), inputs, targets)
    curved = curvature(model, lambda f: F.mse_loss(f, targets), inputs)
    model.to(device)
    if how == "use_converter":
        converted = extend(model, use_converter=True, debug=True)
    else:
        converted = bp.convert_module_to_backpack(model, debug=True)
        assert not vars(converted.linear).get("forward")
        extend(converted)
    assert converted is model
    assert "[DEBUG]" in capsys.readouterr().out
    backward(converted, nn.MSELoss(), inputs.to(device), targets.to(device), *all_extensions(), DiagGGNExact())
    assert_quantities(model, expected)
    assert_exact_ggn(model, curved, fields=["diag_ggn_exact"])


def test_conversion_takes_modules():
    with pytest.raises(TypeError, match="module"):
        convert_module_to_backpack(nn.Linear, debug=False)


class TwoInputs(nn.Module):
    """A sum of a branch with itself, as modules."""

    def __init__(self):
        super().__init__()
        self.branch, self.reduce, self.sum = _Branch(nn.Linear(2, 2), nn.Identity()), ReduceTuple(1), SumModule()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.reduce(self.branch(x)), x)


@pytest.mark.parametrize("prepare", [extend, lambda model: model], ids=["extended", "stock"])
def test_tracer(prepare):
    model = prepare(nn.Sequential(ScaleModule(2.0), TwoInputs(), Permute(0, 1)))
    targets = [node.target for node in BackpackTracer().trace(model).nodes if node.op == "call_module"]
    assert targets == ["0", "1.branch", "1.reduce", "1.sum", "2"]

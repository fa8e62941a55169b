"""Modules without a rule: right by the generic rule, or a warning and no result. Never a wrong number."""

import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, named
from model_cases import SAVED, Scale, all_extensions, assert_quantities
from oracle import Stats, from_per_sample, per_sample_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import (
    KFLR,
    KFRA,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SumGradSquared,
    Variance,
)


def statistics(stock: nn.Module, inputs: tuple[Tensor, ...], loss, batch_dims: tuple[int, ...]) -> dict[str, Stats]:
    """The oracle for several inputs with the batch in any dimension; `loss` is a function of the model's result."""
    names, parameters = zip(*((n, p) for n, p in stock.named_parameters() if p.requires_grad), strict=True)

    def sample_loss(n: int) -> Tensor:
        return loss(stock(*[x.narrow(dim, n, 1) for x, dim in zip(inputs, batch_dims, strict=True)]))

    rows = per_sample_gradients(sample_loss, parameters, inputs[0].shape[batch_dims[0]])
    return dict(zip(names, map(from_per_sample, rows), strict=True))


def square(output: Tensor) -> Tensor:
    return (output.square() + output.sin()).sum()


def check(stock: nn.Module, *inputs: Tensor, loss=square, batch_dims=None, device="cpu") -> None:
    """The extended module's quantities are the oracle's."""
    batch_dims = (0,) * len(inputs) if batch_dims is None else batch_dims
    expected = statistics(stock.double(), inputs, loss, batch_dims)
    model = extend(stock).to(device)
    with backpack(*all_extensions()):
        loss(model(*[x.to(device) for x in inputs])).backward()
    assert_quantities(model, expected)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Container(nn.Module):
    """Own parameters around children that have theirs (as class tokens and position embeddings)."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 6, 4))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.GELU(), Scale(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, 5, 4]
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.body(x)[:, 0])


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input) + self.weight.sum()


class Behind(nn.Module):
    """A recurrent or attention module without a rule, and what comes behind its outputs [N, T, 4]."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, function=lambda y: y.sum(1)) -> Tensor:
        x = x if self.module.batch_first else x.transpose(0, 1)
        outputs, _ = self.module(x, x, x) if isinstance(self.module, nn.MultiheadAttention) else self.module(x)
        return function(outputs if self.module.batch_first else outputs.transpose(0, 1))


class TiedWithChild(nn.Module):
    """Own parameters, one of them under two names and one that is a child's, too, and used there as well."""

    def __init__(self, child: nn.Module, apart: bool = True):
        super().__init__()
        self.child = child
        self.first = self.again = nn.Parameter(torch.randn(4, 4))
        self.tied = next(child.parameters())
        self.myself = [] if apart else [self]

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(x)
        y = y[0] if isinstance(y, tuple) else y
        y = (y @ self.first).tanh() @ self.again @ self.tied[:4]
        return y * next(self.child.parameters())[0]


class LowRank(nn.Module):
    """A frozen layer with a trainable low-rank update."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Dictionary(nn.Module):
    """Takes keyword arguments, returns a dictionary with things that are no tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor, *, scale: float, other: Tensor | None = None) -> dict:
        y = scale * (x @ self.weight)
        return {"y": y, "count": 3, "nested": (None, y.sin() if other is None else y * other)}


class Wrapped(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.inner = Dictionary()
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.inner, x)


class SharedTable(nn.Module):
    """An input without batch dimension whose first size happens to be the batch size."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(5, 4))
        self.inner = TableLookup()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.table)


class TableLookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return (x * self.weight) @ table.T


RIGHT = {
    "container with own parameters": lambda: (Container(), normal(3, 5, 4)),
    "subclass of Linear": lambda: (nn.Sequential(nn.Linear(3, 4), Doubled(4, 2)), normal(4, 3)),
    "tied with a Linear child": lambda: (TiedWithChild(nn.Linear(4, 4)), normal(3, 4)),
    "tied with an Embedding child": lambda: (TiedWithChild(nn.Embedding(5, 4)), torch.randint(5, (3, 2))),
    "tied with a recurrent child": lambda: (TiedWithChild(nn.GRU(4, 4, batch_first=True)), normal(3, 2, 4)),
    "tied with a pruned child": lambda: (
        TiedWithChild(prune.random_unstructured(nn.Linear(4, 4, bias=False), "weight", 0.5)),
        normal(3, 4),
    ),
    "tied with children of a child": lambda: (TiedWithChild(nn.Sequential(Doubled(4, 4), nn.Tanh())), normal(3, 4)),
    "tied with a child, one that refers to itself": lambda: (TiedWithChild(nn.Linear(4, 4), False), normal(3, 4)),
    "low-rank update": lambda: (LowRank(), normal(5, 4)),
    "several normalisations": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Unflatten(1, (4, 2)), nn.GroupNorm(2, 4), nn.PReLU()),
        normal(3, 6),
    ),
    "normalisation without shift": lambda: (nn.Sequential(nn.LayerNorm(6, bias=False), nn.Linear(6, 2)), normal(3, 6)),
    "keyword arguments": lambda: (Wrapped(lambda m, x: m(x=x, scale=2.0)["y"]), normal(3, 4)),
    "nested outputs": lambda: (Wrapped(lambda m, x: m(x, scale=2.0)["nested"][1]), normal(3, 4)),
    "two outputs of a dictionary": lambda: (
        Wrapped(lambda m, x: (lambda r: r["y"] * r["nested"][1])(m(x, scale=0.5, other=x[:, :3]))),
        normal(3, 4),
    ),
    "local response and affine": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 2), nn.LocalResponseNorm(2), nn.InstanceNorm2d(4, affine=True)),
        normal(3, 2, 4, 5),
    ),
    "in-place after": lambda: (nn.Sequential(nn.LayerNorm(4), nn.ReLU(inplace=True), nn.Linear(4, 2)), normal(3, 4)),
    "cells": lambda: (nn.GRUCell(3, 4), normal(3, 3), normal(3, 4)),
    "bilinear with middle dimensions": lambda: (nn.Bilinear(2, 3, 4), normal(3, 5, 2), normal(3, 5, 3)),
    "transformer layer by layer": lambda: (
        nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        normal(3, 2, 4),
        normal(3, 5, 4),
    ),
    "no bias": lambda: (
        nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, bias=False),
        normal(3, 2, 4),
    ),
}


@named("build", RIGHT)
def test_right(build, device):
    check(*build(), device=device)


class Sequences(nn.Module):
    """A recurrent module with everything that its call can take."""

    def __init__(self, kind: str, **options):
        super().__init__()
        self.recurrent = getattr(nn, kind)(3, 4, **options)

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        state = (tuple(state) if len(state) > 1 else state[0]) if state else None
        outputs, last = self.recurrent(x, state)
        last = torch.cat(last, -1) if isinstance(last, tuple) else last
        return outputs.sum() + (outputs.square()).sum() + last.sin().sum()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("initial_states", [0, 1])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_modules(kind, initial_states, batch_first, device):
    """Initial states, batch in either place, losses of outputs and last states (BackPACK: wrong or missing)."""
    shape = (3, 5, 3) if batch_first else (5, 3, 3)
    states = [normal(1, 3, 4) for _ in range(initial_states * (2 if kind == "LSTM" else 1))]
    batch_dims = (0 if batch_first else 1, *[1] * len(states))
    module = Sequences(kind, batch_first=batch_first)
    check(module, normal(*shape), *states, loss=lambda y: y, batch_dims=batch_dims, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_modules_in_both_precisions(kind, dtype, device):
    """torch takes another implementation in float32."""
    torch.manual_seed(0)
    stock = getattr(nn, kind)(3, 4, batch_first=True)
    inputs = torch.randn(3, 5, 3)
    expected = statistics(stock.double(), (inputs.double(),), lambda y: square(y[0]), (0,))
    model = extend(stock.to(dtype)).to(device)
    with backpack(*all_extensions()):
        square(model(inputs.to(device, dtype))[0]).backward()
    assert_quantities(model, expected, 1e-4)


def test_recurrent_cell_state_only(device):
    """A loss of an LSTM's cell state alone (BackPACK: no result)."""
    stock = nn.LSTM(3, 4, batch_first=True).double()
    x = normal(3, 5, 3)
    expected = statistics(stock, (x,), lambda y: square(y[1][1]), (0,))
    model = extend(stock).to(device)
    with backpack(*all_extensions()):
        square(model(x.to(device))[1][1]).backward()
    assert_quantities(model, expected)


class Masked(nn.Module):
    """Attention with each kind of mask."""

    def __init__(self, batch_first: bool, kind: str):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.kind = kind
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        length, samples = (x.shape[1], x.shape[0]) if self.batch_first else x.shape[:2]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        padding = torch.zeros(samples, length, dtype=torch.bool, device=x.device)
        padding[:, -1] = True
        options = {"causal": {"attn_mask": causal}, "padding": {"key_padding_mask": padding}, "none": {}}[self.kind]
        return self.attention(x, x, x, **options)[0]


@pytest.mark.parametrize("shape", [(3, 5, 4), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_masks(batch_first, kind, shape, device):
    """Right, also where a mask could be mistaken for a batch of masks."""
    torch.manual_seed(0)
    stock, x = Masked(batch_first, kind).double(), normal(*shape)
    expected = statistics(stock, (x,), square, (0 if batch_first else 1,))
    model = extend(stock).to(device)
    with backpack(*all_extensions()):
        square(model(x.to(device))).backward()
    assert_quantities(model, expected)


def test_table_of_the_batch_size(device):
    """An argument that is shared by the samples but has as many rows as there are samples: refused, not mistaken."""
    torch.manual_seed(0)
    model, x = extend(SharedTable().double()).to(device), normal(5, 4).to(device)
    with backpack(*all_extensions()), pytest.warns(UserWarning, match="TableLookup"):
        square(model(x)).backward()
    assert model.inner.weight.grad is not None
    assert not any(hasattr(model.inner.weight, name) for name in SAVED)


class MinusBatchMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.weight


class InnerDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True) * self.weight


class InnerNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.randn_like(x)) * self.weight


class RunningMean(nn.Module):
    """Its forward changes what its next forward does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = (x - self.mean) * self.weight
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.5)
        return y


class CountingCalls(nn.Module):
    """State in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight * self.calls


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(0)[0] * self.weight


class ScalarOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).square().mean()


class NoBatchInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, size: int) -> Tensor:
        return self.weight.expand(size, 4).sin()


class StraightThrough(nn.Module):
    """Its values treat the samples apart, its gradients do not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return y + (y.mean(0) - y.mean(0).detach()) * torch.arange(1.0, len(y) + 1, dtype=y.dtype)[:, None]


class First(nn.Module):
    def forward(self, x):
        return x[0]


class SelfAttend(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


MIXING = {
    "batch mean": MinusBatchMean,
    "dropout inside": InnerDropout,
    "noise inside": InnerNoise,
    "running mean": RunningMean,
    "sort over the batch": Sorted,
    "scalar output": ScalarOutput,
    "calls counted": CountingCalls,
    "gradients mixed": StraightThrough,
    "attention with dropout": lambda: SelfAttend(0.5),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("extension", [BatchGrad, BatchL2Grad, SumGradSquared, Variance])
@named("build", MIXING)
def test_mixing_and_random_modules_give_no_number(build, extension, device):
    """A warning and no attribute, or an error."""
    torch.manual_seed(0)
    model = extend(build()).double().to(device)
    x = torch.randn(3, 5, 4, dtype=torch.float64, device=device)
    x = x if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()) else x.flatten(0, 1)
    with backpack(extension()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            square(model(x)).backward()
        except NotImplementedError as error:
            caught.append(error)
    assert caught
    for parameter in model.parameters():
        assert not hasattr(parameter, extension().savefield), "a number for a module that mixes samples"


BATCH_NORMS = {
    "vectors": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "sequences": (lambda: nn.BatchNorm1d(4), (6, 4, 3)),
    "images": (lambda: nn.BatchNorm2d(4), (6, 4, 2, 3)),
    "volumes": (lambda: nn.BatchNorm3d(4), (6, 4, 2, 3, 1)),
    "without statistics, in eval mode": (lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), (6, 4)),
}


@named("build, shape", BATCH_NORMS)
def test_batch_norm_that_uses_the_batch(build, shape, device):
    """BatchGrad warns and gives the summands of the gradient, the others raise."""
    model, x = extend(build()).double().to(device), normal(*shape).to(device)
    for extension in (BatchL2Grad(), SumGradSquared(), Variance()):
        with backpack(extension), pytest.raises(NotImplementedError, match="BatchNorm"):
            square(model(x)).backward()
    model.zero_grad()
    with backpack(BatchGrad()), pytest.warns(UserWarning, match="BatchNorm"):
        square(model(x)).backward()
    for parameter in model.parameters():
        assert_close("summands", parameter.grad_batch.sum(0), parameter.grad.cpu(), 1e-10)


class Overwriting(nn.Module):
    """Changes its input in place."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return x * self.weight


class Bags(nn.Module):
    """nn.EmbeddingBag with bags of unequal size."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.EmbeddingBag(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(torch.arange(7, device=x.device), torch.tensor([0, 2, 5], device=x.device))


@dataclass
class Record:
    value: Tensor


class RecordOutput(nn.Module):
    """Its output is an object that torch knows nothing of."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Record:
        return Record(x * self.weight)


class Unpacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = RecordOutput()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).value


class Listed(nn.Module):
    """Uses a parameter by its name, and once more from a list."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.weights = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.weights[0]


NOT_REPEATABLE = {
    "parameter in a list": (Listed, "Listed.*weight"),
    "input changed in place": (Overwriting, "Overwriting"),
    "bags by offsets": (Bags, "EmbeddingBag"),
    "unknown output": (Unpacked, "RecordOutput"),
}


@named("build, name", NOT_REPEATABLE)
def test_modules_that_cannot_be_taken_apart(build, name, device):
    """A warning that names the module; the backward pass and its ordinary gradients go on."""
    torch.manual_seed(0)
    stock = build().double()
    model = extend(nn.Sequential(nn.Linear(4, 4).double(), stock)).to(device)
    x = normal(8, 4).to(device)
    square(model(x)).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with backpack(*all_extensions()), pytest.warns(UserWarning, match=name):
        square(model(x)).backward()
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b) for a, b in zip(plain, ours, strict=True))
    assert not any(hasattr(p, attribute) for p in stock.parameters() for attribute in SAVED)


def test_modules_that_do_not_mix_keep_their_results(device):
    """A warning about one module leaves the quantities of all others right."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(4, 4), MinusBatchMean()).double()
    model, x = extend(stock).to(device), normal(6, 4).to(device)
    with backpack(*all_extensions()), pytest.warns(UserWarning, match="MinusBatchMean"):
        square(model(x)).backward()
    assert not hasattr(model[1].weight, "grad_batch")
    assert_close("sum", model[0].weight.grad_batch.sum(0), model[0].weight.grad.cpu(), 1e-10)


PARAMETRISED = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "weight norm of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), parametrizations.weight_norm(nn.Conv1d(2, 3, 2, padding=1))
    ),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "own": lambda: parametrized(nn.Linear(4, 3), "weight"),
    "own, of the bias": lambda: parametrized(nn.Linear(4, 3), "bias"),
    "own with parameters": lambda: parametrized(nn.Linear(4, 3), "weight", Scale(4)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.3),
    "spectral norm in eval mode": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)).eval(),
}


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.sin() + weight.sum()


def parametrized(module: nn.Module, name: str, by: nn.Module | None = None) -> nn.Module:
    parametrize.register_parametrization(module, name, Symmetric() if by is None else by)
    return module


@named("build", PARAMETRISED)
def test_parametrisations(build, device):
    """Quantities land on the original parameters."""
    torch.manual_seed(0)
    check(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), build()), normal(3, 4), device=device)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).sin() * self.scale


def test_products_under_autocast(device):
    """A sample's gradient is rounded to bfloat16, as that of the batch is: no reason to find samples mixed."""
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = extend(Scaled()).to(device), torch.randn(2, 3, 4, device=device)
        with backpack(BatchGrad()), torch.autocast(device.type, torch.bfloat16):
            square(model(x)).backward()
        assert_close("sum", model.weight.grad_batch.sum(0), model.weight.grad.cpu(), 5e-2)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_by_hook(device):
    """The old torch.nn.utils.weight_norm: weight_g and weight_v."""
    torch.manual_seed(0)
    check(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.utils.weight_norm(nn.Linear(4, 3))), normal(3, 4), device=device)


def test_warnings_come_once_per_module_and_pass(device):
    model, x = extend(nn.Sequential(MinusBatchMean(), MinusBatchMean())).to(device), torch.randn(5, 4, device=device)
    with backpack(*all_extensions()), pytest.warns(UserWarning) as caught:
        square(model(x)).backward()
    assert len([w for w in caught if "MinusBatchMean" in str(w.message)]) == 2


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["recurrent", "attention"])
def test_samples_that_are_mixed_behind_a_first_module_with_its_own_batch(kind, batch_first, device):
    """Refused, unless the samples have only another order there."""
    if kind == "attention":
        module = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        weight = module.in_proj_weight
    else:
        module = nn.GRU(4, 4, 2, batch_first=batch_first)
        module.weight_ih_l1 = weight = module.weight_ih_l0  # has no rule then
    model, loss = extend(Behind(module)).double().to(device), extend(nn.MSELoss(reduction="sum"))
    x = torch.randn(3, 3, 4, dtype=torch.float64, device=device)  # as many positions as samples
    mixing = [lambda y: y.sum(1) - y.sum(1).mean(0), lambda y: y[:, 0] + y[:, 1].flip(0), lambda y: y[0]]
    for function in mixing:
        for extension in (DiagGGNExact, KFRA):
            with pytest.raises(ValueError, match="samples that are not apart"), backpack(extension()):
                loss(model(x, function), torch.zeros_like(x[0])).backward()
    results = []
    order = [0, 1, 2] if batch_first else [2, 0, 1]  # another one in dimension 0 is refused
    for function in (lambda y: y.sum(1), lambda y: y.sum(1)[order]):
        with backpack(DiagGGNExact()):
            loss(model(x, function), torch.zeros_like(x[0])).backward()
        results.append(weight.diag_ggn_exact)
    assert_close("diag", results[1], results[0].cpu(), 1e-10)


def test_generic_rule_draws_no_random_numbers_of_deterministic_modules(device):
    """The state of the random generator is that of a plain backward pass."""
    model, x = extend(nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.5), nn.Linear(4, 2))).to(device), torch.randn(3, 4)
    states = []
    for extensions in ((), all_extensions()):
        torch.manual_seed(3)
        with backpack(*extensions):
            square(model(x.to(device))).backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_saved_tensor_hooks(device):
    """Forward and backward inside torch.autograd.graph.save_on_cpu()."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv1d(2, 3, 2), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3)).double()
    x = normal(3, 2, 5)
    expected = statistics(stock, (x,), square, (0,))
    model = extend(stock).to(device)
    with torch.autograd.graph.save_on_cpu(), backpack(*all_extensions()):
        square(model(x.to(device))).backward()
    assert_quantities(model, expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last(dims, device):
    """torch's group_norm crashes where such an input needs no gradient, as when only the parameters' are asked for."""
    torch.manual_seed(0)
    conv, pool = (nn.Conv2d, nn.MaxPool2d) if dims == 2 else (nn.Conv3d, nn.MaxPool3d)
    stock = nn.Sequential(conv(3, 4, 2), nn.GroupNorm(2, 4), pool(2), nn.Flatten(), nn.Linear(4, 3))
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    check(stock, normal(3, 3, *(3,) * dims).to(memory_format=layout), device=device)


class WithParts(nn.Module):
    """A parameter of its own, children, and an attribute of a kind that the library does not know."""

    def __init__(self, setting=None):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, 4))
        self.activation = nn.Tanh()
        self.linear = nn.Linear(4, 4)
        self.setting = setting

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(self.activation(input * self.weight)) * self.weight


@pytest.mark.parametrize("setting", [None, object()])
@pytest.mark.parametrize("create_graph", [False, True])
def test_children_are_not_reached_twice(create_graph, setting, device):
    """The calls of children that per-sample gradients are formed from have no hooks and store nothing."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(3, 4), WithParts(setting)).double()
    x = normal(5, 3)
    expected = statistics(stock, (x,), square, (0,))
    model, seen = extend(stock, store_io=True).to(device), []
    inputs = {model[1].activation: (5, 4), model[1].linear: (5, 4)}

    def hook(module):
        seen.append(module)
        if module in inputs and hasattr(module, "input0"):
            assert type(module.input0) is Tensor and module.input0.shape == inputs[module]

    with backpack(*all_extensions(), extension_hook=hook):
        loss = square(model(x.to(device)))
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.detach()
        for name in SAVED:
            setattr(parameter, name, getattr(parameter, name).detach())
    assert_quantities(model, expected)
    assert sorted(map(id, seen)) == sorted(map(id, [model[0], model[1], model[1].activation, model[1].linear]))
    assert not any(hasattr(module, "input0") or hasattr(module, "output") for module in model.modules())


class Looks(nn.Module):
    """Notes what is in the place of its parameter while its forward runs, for every thread to see."""

    seen: list[tuple[nn.Module, Tensor]] = []
    known: list[nn.Module] = []

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, 4))
        self.part = nn.Sequential(nn.ReLU())

    def forward(self, input: Tensor) -> Tensor:
        Looks.seen += [(module, module.weight) for module in Looks.known]
        return self.part(input) * self.weight


def test_parameters_stay_in_their_places(device):
    """Another thread may call the module meanwhile."""
    model, x = extend(nn.Sequential(nn.Linear(3, 4), Looks())).to(device), torch.randn(5, 3, device=device)
    weight = model[1].weight
    Looks.known.append(model[1])
    with backpack(*all_extensions()):
        square(model(x)).backward()
    Looks.known.clear()
    assert len(Looks.seen) > 1 and all(found is weight for _, found in Looks.seen)
    Looks.seen.clear()
    assert_close("sum", weight.grad_batch.sum(0), weight.grad.cpu(), 1e-5)


def test_hooks_of_all_modules(device):
    """Backward hooks that are registered for every module of the process."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    handle = nn.modules.module.register_module_full_backward_hook(lambda module, grad_inputs, grad_outputs: None)
    try:
        check(stock, normal(3, 4).requires_grad_(), device=device)
    finally:
        handle.remove()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight * torch.rand_like(input)


@pytest.mark.parametrize("extension", [DiagGGNExact, KFLR, DiagHessian])
def test_second_order_of_random_modules(extension, device):
    model, loss = extend(nn.Sequential(nn.Linear(3, 4), Noisy())).to(device), extend(nn.MSELoss())
    value = loss(model(torch.randn(5, 3, device=device)), torch.zeros(5, 4, device=device))
    with backpack(extension()), pytest.raises(NotImplementedError, match=f"{extension.__name__}.*Noisy"):
        value.backward()

"""KFRA and HBP: against the recursion with dense Jacobians, against BackPACK, and where they are exact."""

import contextlib
import copy
import gc
import importlib
import warnings

import pytest
import torch
from curvature_oracle import curvature, loss_hessian
from curvature_tools import (
    BODIES,
    CONVENTIONS,
    LOSSES,
    assert_nothing_saved,
    assert_same,
    backward,
    expected_factors,
    saved,
    targets_for,
)
from helpers import assert_close, named, run_memory_probe, some
from kfra_memory_probe import CASES
from model_cases import MODELS
from sequential_oracle import output_factor
from torch import Tensor, nn

from backpack_cuda import backpack, extend
from backpack_cuda.curvature import register_loss, steps
from backpack_cuda.extensions import HBP, KFAC, KFLR, KFRA, DiagGGNExact
from backpack_cuda.extensions.curvature import Curvature
from backpack_cuda.extensions.module_extension import ModuleExtension
from backpack_cuda.extensions.secondorder.hbp import BackpropStrategy, ExpectationApproximation, LossHessianStrategy

EXACT, SAMPLING, SUM = LossHessianStrategy.EXACT, LossHessianStrategy.SAMPLING, LossHessianStrategy.SUM
SQRT, AVERAGE = BackpropStrategy.SQRT, BackpropStrategy.BATCH_AVERAGE
MARTENS, CHEN = ExpectationApproximation.BOTEV_MARTENS, ExpectationApproximation.CHEN

# ---------------------------------------------------------------------------------------------------------------------
# The oracle: a chain of modules, dense Jacobians of the whole batch
# ---------------------------------------------------------------------------------------------------------------------


class Skip(nn.Module):
    """x + inner(x); one step back for what comes before it, steps of their own for the functions inside."""

    def __init__(self, *inner: nn.Module):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def call(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)  # of dropout
    return module(x.clone())  # it may be changed in place


def jacobians(function, x: Tensor, samples: int) -> Tensor:
    """[N, D_out, D_in] of each sample; asserts that samples do not act on each other."""
    full = torch.autograd.functional.jacobian(function, x)
    full = full.reshape(samples, -1, samples, x.numel() // samples)
    own = torch.stack([full[n, :, n] for n in range(samples)])
    assert torch.allclose(full.square().sum(), own.square().sum())
    return own


def averaged(jacobian: Tensor, mat: Tensor) -> Tensor:
    return torch.stack([j.T @ mat @ j for j in jacobian]).mean(0)


def matrices(chain: nn.Sequential, inputs: Tensor, mat: Tensor, residuals=None) -> dict[nn.Module, tuple]:
    """By module its input and the matrix at its output."""
    found, samples = {}, len(inputs)
    xs = [inputs]
    for module in chain:
        xs.append(call(module, xs[-1]).detach())
    for module, x in zip(reversed(chain), reversed(xs[:-1]), strict=True):
        found[module] = (x, mat)
        if isinstance(module, Skip):
            found.update(matrices(module.inner, x, mat))
        mat = averaged(jacobians(lambda z, module=module: call(module, z), x, samples), mat)
        if residuals is not None and module in residuals:
            mat = mat + residuals[module].diag()
    return found


def expected_b(model: nn.Sequential, inputs: Tensor, mat: Tensor, convention: str = "backpack", residuals=None):
    """By the name of a parameter the output factor: of layers, and the blocks of vectors of other modules."""
    names = {module: name for name, module in model.named_modules()}
    result = {}
    for module, (x, mat_out) in matrices(model, inputs, mat, residuals).items():
        own = dict(module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention | Attention)))
        for name, parameter in own.items():
            full_name = f"{names[module]}.{name}"
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                groups = getattr(module, "groups", 1) if name == "weight" else 1
                b = output_factor(module, mat_out, convention, groups)
                result[full_name] = b if groups > 1 else b[0]
            elif parameter.dim() == 1:
                rows = []
                for n in range(len(x)):

                    def function(p, n=n, name=name, module=module, x=x):
                        return torch.func.functional_call(module, {name: p}, (x[n : n + 1],)).flatten()

                    rows.append(torch.autograd.functional.jacobian(function, parameter.detach()))
                result[full_name] = averaged(torch.stack(rows), mat_out)
    return result


def assert_b(model: nn.Module, expected: dict[str, Tensor], field: str = "kfra", tolerance: float = 1e-10) -> None:
    parameters, storages = dict(model.named_parameters()), set()
    assert expected
    for name, b in expected.items():
        factors = getattr(parameters[name], field)
        assert_close(name, factors[0], b, tolerance, max(b.abs().max().item(), 1e-9))
        for factor in factors:
            assert torch.equal(factor, factor.mT)
            storages.add(factor.untyped_storage().data_ptr())
    assert len(storages) == sum(len(getattr(parameters[name], field)) for name in expected)


def cross_entropy_start(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Targets, and the sum of the samples' Hessians."""
    outputs = call(model, inputs).detach()
    targets = torch.randint(outputs.shape[1], (len(outputs), *outputs.shape[2:]))
    return targets, loss_hessian(lambda f: nn.functional.cross_entropy(f, targets), outputs).sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------------


class Function(nn.Module):
    """A function between the modules."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def rising(*shape: int) -> Tensor:
    """Different numbers between 0 and 1."""
    size = torch.Size(shape).numel()
    return (torch.arange(size, dtype=torch.float64).view(shape) * 0.37).sin()


class Attention(nn.Module):
    """Self-attention with the batch first."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def vectors(module: nn.Module) -> tuple[nn.Module, tuple]:
    return nn.Sequential(nn.Linear(4, 6), module, nn.LazyLinear(3)), (4, 4)


def images(module: nn.Module) -> tuple[nn.Module, tuple]:
    return nn.Sequential(nn.Conv2d(1, 2, 2), module, nn.Flatten(), nn.LazyLinear(3)), (3, 1, 6, 5)


def lines(module: nn.Module) -> tuple[nn.Module, tuple]:
    return nn.Sequential(nn.Conv1d(2, 2, 2), module, nn.Flatten(), nn.LazyLinear(3)), (3, 2, 7)


def volumes(module: nn.Module) -> tuple[nn.Module, tuple]:
    return nn.Sequential(nn.Conv3d(1, 2, 1), module, nn.Flatten(), nn.LazyLinear(3)), (2, 1, 2, 4, 3)


def tokens(module: nn.Module) -> tuple[nn.Module, tuple]:
    return nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2), nn.Flatten(), nn.LazyLinear(3)), (3, 3, 3)


ACTIVATIONS = (
    "ReLU Sigmoid Tanh LeakyReLU LogSigmoid ELU SELU GELU SiLU Mish CELU ReLU6 Softplus Softsign Hardtanh Hardswish "
    "Hardsigmoid Hardshrink Softshrink Tanhshrink PReLU RReLU"
).split()
CHAINS = {
    **{name: lambda name=name: vectors(getattr(nn, name)()) for name in ACTIVATIONS},
    "dropout": lambda: vectors(nn.Dropout(0.4)),
    "identity": lambda: vectors(nn.Identity()),
    "softmax": lambda: vectors(nn.Softmax(1)),
    "glu": lambda: vectors(nn.GLU()),
    "a function times another": lambda: vectors(Function(lambda x: x.tanh() * x.exp())),
    "a chain of functions": lambda: vectors(Function(lambda x: 2 * (3 - x) / 5 + 1)),
    "halves": lambda: vectors(Function(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1))),
    "gated": lambda: vectors(Function(lambda x: x[:, :3] * x[:, 3:].sigmoid())),
    "unevenly": lambda: vectors(Function(lambda x: torch.where(x > 0, x, 0.1 * x * x))),
    "broadcast": lambda: vectors(Function(lambda x: x - x.mean(1, keepdim=True))),
    "many features": lambda: vectors(nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 129))),
    "of constants": lambda: vectors(Function(lambda x: torch.linspace(1, 2, 24).view(4, 6).double() * x)),
    "gathered": lambda: vectors(Function(lambda x: x.gather(1, torch.arange(24).view(4, 6).flip(0) % 5))),
    "a product of samples": lambda: vectors(Function(lambda x: torch.einsum("ni,nij->nj", x, rising(4, 6, 5)))),
    "weights from outside": lambda: vectors(Function(lambda x: nn.functional.linear(x, rising(5, 6)))),
    "complex": lambda: vectors(Function(lambda x: torch.fft.rfft(x).abs())),
    "in place": lambda: vectors(nn.ReLU(inplace=True)),
    "upside down": lambda: vectors(Function(lambda x: x.flip(0).flip(0))),
    "a sum of nonlinear functions": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Function(lambda x: x.sum(1, keepdim=True)), nn.Linear(1, 3)),
        (4, 4),
    ),
    "chosen nonlinear functions": lambda: vectors(nn.Sequential(nn.Tanh(), Function(lambda x: x[:, 1:5]))),
    "lengths": lambda: (
        tokens(Function(lambda x: torch.stack([s[:k].sum(0, True) for s, k in zip(x, (1, 3, 2), strict=True)])))[0],
        (3, 3, 3),
    ),
    "halves of the batch": lambda: vectors(Function(lambda x: torch.cat([-x[:2], x[2:]], -2))),
    "one channel after the other": lambda: vectors(Function(lambda x: torch.stack([3 - x[..., 0], x[..., 4]], 1))),
    "a convolution for each sample": lambda: lines(
        Function(lambda x: nn.functional.conv1d(x.reshape(1, 6, -1), rising(6, 2, 2), groups=3).view(3, 2, -1))
    ),
    "attention of few tokens": lambda: (tokens(Attention(4))[0], (3, 2, 3)),
    "skip": lambda: vectors(Skip(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6, bias=False))),
    "skip in skip": lambda: vectors(Skip(Skip(nn.Linear(6, 6), nn.Sigmoid()), nn.Tanh(), nn.Linear(6, 6))),
    "linear skip": lambda: vectors(Skip(nn.Linear(6, 6), nn.Linear(6, 6))),
    "batch norm of vectors": lambda: vectors(nn.BatchNorm1d(6)),
    "max pool 1d": lambda: lines(nn.MaxPool1d(3, 2)),
    "average pool 1d": lambda: lines(nn.AvgPool1d(2)),
    "adaptive max pool 1d": lambda: lines(nn.AdaptiveMaxPool1d(4)),
    "adaptive average pool 1d": lambda: lines(nn.AdaptiveAvgPool1d(4)),
    "circular pad": lambda: lines(nn.CircularPad1d(2)),
    "replication pad": lambda: lines(nn.ReplicationPad1d((2, 1))),
    "group norm": lambda: lines(nn.GroupNorm(1, 2)),
    "upsample": lambda: lines(nn.Upsample(scale_factor=2, mode="linear")),
    "conv1d, groups": lambda: lines(nn.Conv1d(2, 4, 3, groups=2, padding="same", padding_mode="reflect")),
    "transposed 1d": lambda: lines(nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2, output_padding=1)),
    "max pool 2d": lambda: images(nn.MaxPool2d(2)),
    "overlapping max pool 2d": lambda: images(nn.MaxPool2d(3, 1, padding=1, dilation=1)),
    "average pool 2d": lambda: images(nn.AvgPool2d(2, padding=1, ceil_mode=True, count_include_pad=False)),
    "adaptive average pool 2d": lambda: images(nn.AdaptiveAvgPool2d((3, 2))),
    "global average pool": lambda: images(nn.AdaptiveAvgPool2d(1)),
    "adaptive max pool 2d": lambda: images(nn.AdaptiveMaxPool2d((3, 2))),
    "zero pad": lambda: images(nn.ZeroPad2d((1, 0, 2, 1))),
    "batch norm": lambda: images(nn.BatchNorm2d(2)),
    "dropout of channels": lambda: images(nn.Dropout2d(0.5)),
    "pixel shuffle": lambda: images(nn.PixelShuffle(1)),
    "conv2d": lambda: images(nn.Conv2d(2, 3, (2, 1), stride=(1, 2), padding=1, dilation=1)),
    "transposed 2d": lambda: images(nn.ConvTranspose2d(2, 2, 2, stride=2)),
    "skip of convolutions": lambda: images(
        Skip(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
    ),
    "max pool 3d": lambda: volumes(nn.MaxPool3d((1, 2, 2))),
    "average pool 3d": lambda: volumes(nn.AvgPool3d((2, 2, 1))),
    "adaptive average pool 3d": lambda: volumes(nn.AdaptiveAvgPool3d((1, 2, 3))),
    "conv3d": lambda: volumes(nn.Conv3d(2, 2, (1, 2, 2))),
    "transposed 3d": lambda: volumes(nn.ConvTranspose3d(2, 2, 1, stride=(1, 1, 2))),
    "layer norm of tokens": lambda: tokens(nn.LayerNorm(4)),
    "attention": lambda: tokens(Attention(4)),  # as many tokens as samples
    "permuted": lambda: tokens(Function(lambda x: x.movedim(1, 0).sin().movedim(0, 1))),
}


def prepared(build, samples: int | None = None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, shape = build()
    inputs = torch.randn(shape if samples is None else (samples, *shape[1:]), dtype=torch.float64)
    with torch.no_grad():
        model.double()(torch.zeros_like(inputs))  # lazy layers
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.double(), inputs


@pytest.mark.parametrize("budget", [None, 1])
@named("build", CHAINS)
def test_recursion(build, budget, device):
    model, inputs = prepared(build)
    targets, start = cross_entropy_start(model, inputs)
    expected = expected_b(model, inputs, start)
    torch.manual_seed(1)
    model.to(device)
    extend(model)
    silent = KFRA(fail_mode="SILENT")
    value = extend(nn.CrossEntropyLoss())(call(model, inputs.to(device)), targets.to(device))
    with backpack(silent, memory_budget=budget):
        value.backward()
    assert_b(model, expected)
    assert silent.memory_needed > 0


# ---------------------------------------------------------------------------------------------------------------------
# Losses, conventions, and where the recursion is exact
# ---------------------------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A loss that is made known by its square root: sum of f^2, twice."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 2 * (prediction - target).square().sum()


register_loss(
    Doubled, lambda module, f, target: 2 * torch.eye(f[0].numel()).to(f).view(-1, 1, *f.shape[1:]).expand(-1, *f.shape)
)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@named("build, shape", BODIES)
@named("loss, kind", LOSSES | {"registered": (Doubled(), "normal")})
def test_losses(loss, kind, build, shape, scale, device):
    model, inputs = build().double(), torch.randn(shape, dtype=torch.float64)
    targets = targets_for(kind, model(inputs).detach())
    start = scale * loss_hessian(lambda f: loss(f, targets), model(inputs).detach()).sum(0)
    expected = expected_b(model, inputs, start)
    loss = copy.deepcopy(loss).to(device)
    backward(model.to(device), loss, inputs.to(device), targets.to(device), KFRA(), scale=scale)
    assert_b(model, expected)


@pytest.mark.parametrize("convention", CONVENTIONS)
@named("build", some(CHAINS, "attention", "conv1d, groups", "conv2d", "transposed 1d", "conv3d", "batch norm"))
def test_conventions(build, convention, device):
    model, inputs = prepared(build)
    targets, start = cross_entropy_start(model, inputs)
    expected = expected_b(model, inputs, start, convention)
    roots = torch.zeros(1, len(inputs), start.shape[0], dtype=torch.float64)
    input_factors = expected_factors(model, inputs, roots, convention)
    kfra = KFRA(convention=convention, fail_mode="SILENT")
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), kfra)
    assert_b(model, expected)
    for name, factors in input_factors.items():
        for mine, a in zip(dict(model.named_parameters())[name].kfra[1:], factors[1:], strict=True):
            assert_close(name, mine, a, 1e-10)


def test_rows_of_a_flattened_prediction(device):
    """Logits [N * T, C]: the Hessian of a sample is block diagonal."""
    model, inputs = prepared(lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (4, 5, 3)))
    targets = torch.randint(3, (4, 5))
    hessian = loss_hessian(lambda f: nn.functional.cross_entropy(f.mT, targets), model(inputs).detach())
    expected = expected_b(model, inputs, hessian.sum(0))
    extend(model.to(device))
    loss = extend(nn.CrossEntropyLoss())(model(inputs.to(device)).flatten(0, 1), targets.flatten().to(device))
    with backpack(KFRA()):
        loss.backward()
    assert_b(model, expected)


ONCE = {name: case for name, case in MODELS.items() if not any(s in name for s in ("shared", "tied", "recurrent use"))}


@named("case", ONCE)
def test_one_sample_is_kflr(case, device):
    """With one sample nothing is averaged: whatever the model is made of."""
    inputs, targets = case.data(1)
    model = extend(case.model().to(device))
    with backpack(KFRA(fail_mode="SILENT"), KFLR(fail_mode="SILENT")):
        extend(copy.deepcopy(case.loss))(model(inputs.to(device)), targets.to(device)).backward()
    found = saved(model, ("kfra", "kflr"))
    largest = max(q["kflr"][0].abs().max().item() for q in found.values() if "kflr" in q)
    for name, quantities in found.items():
        assert ("kfra" in quantities) == ("kflr" in quantities), name
        for mine, theirs in zip(quantities.get("kfra", ()), quantities.get("kflr", ()), strict=True):
            size = max(theirs.abs().max().item(), 1e-3 * largest)
            assert_close(name, mine, theirs.double().cpu(), 1e-9, size)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_exact_for_one_sample(convention, device):
    """B (x) A is the block of the GGN for one sample, with one position for the weight."""
    model = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), Skip(nn.Linear(5, 5, bias=False), nn.Tanh()), nn.Linear(5, 3))
    model, inputs, targets = model.double(), torch.randn(1, 4, dtype=torch.float64), torch.tensor([1])
    expected = curvature(model, lambda f: nn.functional.cross_entropy(f, targets), inputs)
    kfra = KFRA(convention=convention)
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), kfra)
    for name, parameter in model.named_parameters():
        factors = [f.cpu() for f in parameter.kfra]
        product = torch.kron(*factors) if len(factors) == 2 else factors[0]
        assert_close(name, product, expected.blocks(name).sum(0), 1e-9)


class Given(nn.Module):
    """A loss with the root [V, D] of a matrix as that of its Hessian."""

    def __init__(self, root: Tensor):
        super().__init__()
        self.root = root

    def forward(self, prediction: Tensor) -> Tensor:
        return prediction.sum()


register_loss(Given, lambda module, f: module.root.view(-1, 1, *f.shape[1:]))


class LastState(nn.Module):
    """A recurrent layer and its last hidden state: from the output with the batch first or second, or the state."""

    def __init__(self, layer: str, taken: str):
        super().__init__()
        self.taken = taken
        self.recurrent = getattr(nn, layer)(3, 2, batch_first=taken == "batch first")

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.recurrent(x if self.taken == "batch first" else x.transpose(0, 1))
        if self.taken == "state":
            return (state[0] if isinstance(state, tuple) else state)[-1]
        return output[:, -1] if self.taken == "batch first" else output[-1]


@pytest.mark.parametrize("taken", ["batch first", "batch second", "state"])
@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU"])
def test_recurrent(layer, taken, device):
    """Wherever the batch is: the mean over samples of what KFLR makes of the matrix at the last state."""
    torch.manual_seed(0)
    model = nn.Sequential(LastState(layer, taken), nn.Linear(2, 3)).double()
    inputs, targets = torch.randn(4, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    start = loss_hessian(lambda f: nn.functional.cross_entropy(f, targets), model(inputs).detach()).sum(0)
    at_state = model[1].weight.T @ start @ model[1].weight
    values, vectors = torch.linalg.eigh(at_state.detach())
    loss = extend(Given((vectors * values.clamp(min=0).sqrt()).T.to(device)))
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), KFRA())
    sums: dict = {}
    for sample in inputs.to(device).split(1):
        with backpack(KFLR()):
            loss(model[0](sample)).backward()
        for name, parameter in model[0].named_parameters():
            sums[name] = sums.get(name, 0) + parameter.kflr[0] / 4
    for name, parameter in model[0].named_parameters():
        assert_close(name, parameter.kfra[0], sums[name].cpu(), 1e-9)
    backward(model, nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), KFLR())
    for parameter in model.parameters():
        assert all(torch.equal(a, b) for a, b in zip(parameter.kfra[1:], parameter.kflr[1:], strict=True))


@named(
    "function",
    {
        "permute": lambda x: x.permute(0, 2, 1),
        "permute from the end": lambda x: x.permute(-3, -1, -2),
        "transpose": lambda x: x.mT,
        "mean": lambda x: x.mean(-2),
        "last": lambda x: x[..., -1, :],
        "stack": lambda x: torch.stack([x, x], 1),
        "windows": lambda x: x.view(2, 2, 2, 3).permute(0, 2, 1, 3).reshape(4, 2, 3)[:, 0],
    },
)
def test_same_for_all_samples(function, monkeypatch, device):
    """Not pushed back for each sample, as long as the first dimension stays the first."""

    def run(*args):
        raise AssertionError("a step for each sample")

    monkeypatch.setattr(steps._Generic, "run", run)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Function(lambda x: function(x).reshape(2, -1)), nn.LazyLinear(2))
    model.to(device)(torch.zeros(2, 4, 3, device=device))
    backward(model, nn.CrossEntropyLoss(), torch.randn(2, 4, 3, device=device), torch.tensor([0, 1]).to(device), KFRA())


class Parts(nn.Module):
    """Two branches, of which each takes a part of the matrix where they join, and what comes before them all of it."""

    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 4)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.last(torch.cat([2 * self.left(h), 3 * self.right(h)], 1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("budget", [None, 1])
def test_layers_without_features(budget, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 0), nn.ReLU(), nn.PReLU(), nn.Linear(0, 2)).to(device)
    extend(model)
    loss = extend(nn.CrossEntropyLoss())(model(torch.randn(2, 3, device=device)), torch.tensor([0, 1], device=device))
    with backpack(KFRA(), KFLR(), memory_budget=budget):
        loss.backward()
    for name, parameter in model.named_parameters():
        for found, expected in zip(parameter.kfra, parameter.kflr, strict=True):
            assert found.shape == expected.shape, name
            assert torch.allclose(found, expected), name


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_branches_take_parts(samples, device):
    """With equal samples the mean is KFLR."""
    torch.manual_seed(0)
    model = Parts().double()
    inputs = torch.randn(1, 3, dtype=torch.float64).repeat(samples, 1)
    targets = torch.ones(samples, dtype=torch.long)
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), KFRA(), KFLR())
    for name, parameter in model.named_parameters():
        for found, expected in zip(parameter.kfra, parameter.kflr, strict=True):
            assert_close(name, found, expected.cpu(), 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# HBP
# ---------------------------------------------------------------------------------------------------------------------

CURVATURES = Curvature.CHOICES
WITH_RESIDUALS = {
    "vectors": lambda: vectors(nn.Sigmoid()),
    "images": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(4), nn.SiLU(), nn.Linear(4, 3)
        ),
        (3, 1, 5, 5),
    ),
}


def residuals_of(model: nn.Sequential, inputs: Tensor, loss, curv_type: str) -> dict[nn.Module, Tensor]:
    """By elementwise module sum_n phi''(x_n) dl/dy_n, modified, entry by entry."""
    xs = [inputs]
    for module in model:
        xs.append(module(xs[-1]).detach().requires_grad_())
    found = {}
    (g,) = torch.autograd.grad(loss(xs[-1]), xs[-1])
    for module, x in zip(reversed(model), reversed(xs[:-1]), strict=True):
        x = x.detach().requires_grad_()
        (g_in,) = torch.autograd.grad(module(x), x, g, create_graph=True)
        if isinstance(module, nn.Sigmoid | nn.Tanh | nn.SiLU):
            (second,) = torch.autograd.grad(g_in.sum(), x)
            residual = second.flatten(1).sum(0)
            found[module] = {
                Curvature.GGN: torch.zeros_like,
                Curvature.HESSIAN: lambda r: r,
                Curvature.PCH_ABS: torch.abs,
                Curvature.PCH_CLIP: lambda r: r.clamp(min=0),
            }[curv_type](residual)
        g = g_in.detach()
    return found


@pytest.mark.parametrize("curv_type", CURVATURES)
@named("build", WITH_RESIDUALS)
def test_residuals(build, curv_type, device):
    model, inputs = prepared(build)
    targets, start = cross_entropy_start(model, inputs)
    residuals = residuals_of(model, inputs, lambda f: nn.functional.cross_entropy(f, targets), curv_type)
    expected = expected_b(model, inputs, start, residuals=residuals)
    hbp = HBP(curv_type, SUM, AVERAGE, MARTENS)
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), hbp)
    assert_b(model, expected, "hbp")


def test_same_as_kflr_and_kfra(device):
    """The named quantities are choices of HBP; exact and summed Hessians are the same matrix."""
    model, inputs = prepared(CHAINS["max pool 2d"])
    targets, _ = cross_entropy_start(model, inputs)
    choices = {
        "a": HBP(Curvature.GGN, EXACT, SQRT, MARTENS, savefield="a"),
        "b": HBP(Curvature.GGN, SUM, AVERAGE, MARTENS, "b"),
        "c": HBP(Curvature.GGN, EXACT, AVERAGE, MARTENS, "c"),
    }
    backward(
        model.to(device),
        nn.CrossEntropyLoss(),
        inputs.to(device),
        targets.to(device),
        KFLR(),
        KFRA(),
        *choices.values(),
    )
    for parameter in model.parameters():
        for field, other in (("a", "kflr"), ("b", "kfra"), ("c", "kfra")):
            for mine, theirs in zip(getattr(parameter, field), getattr(parameter, other), strict=True):
                assert torch.equal(mine, theirs)
                assert mine.data_ptr() != theirs.data_ptr()


def test_sampled(device):
    """Sampled columns have the summed Hessian as their mean."""
    model, inputs = prepared(lambda: vectors(nn.Tanh()))
    targets, start = cross_entropy_start(model, inputs)
    expected = expected_b(model, inputs, start)
    hbp = HBP(Curvature.GGN, SAMPLING, AVERAGE, MARTENS, mc_samples=20_000)
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), hbp)
    assert_b(model, expected, "hbp", 0.05)
    with_columns = HBP(Curvature.GGN, SAMPLING, SQRT, MARTENS, mc_samples=3)
    torch.manual_seed(0)
    backward(model, nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), with_columns)
    torch.manual_seed(0)
    backward(model, nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), KFAC(3))
    for parameter in model.parameters():
        assert all(map(torch.equal, parameter.hbp, parameter.kfac))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("strategy", [SQRT, AVERAGE])
@named("build", some(CHAINS, "layer norm of tokens", "conv1d, groups", "conv2d", "transposed 1d", "Tanh"))
def test_averaged_input(build, strategy, convention, device):
    """CHEN: A is that of the mean of the inputs, B is what it is."""
    model, inputs = prepared(build)
    targets, _ = cross_entropy_start(model, inputs)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    expected, handles = {}, []
    for layer in layers:

        def note(module, args):
            expected[module] = args[0].detach().mean(0, keepdim=True)

        handles.append(layer.register_forward_pre_hook(note))
    model(inputs)
    for handle in handles:
        handle.remove()
    hessian = Curvature.GGN, (EXACT if strategy == SQRT else SUM), strategy
    extensions = (
        HBP(*hessian, CHEN, "chen", convention=convention, fail_mode="SILENT"),
        HBP(*hessian, MARTENS, "martens", convention=convention, fail_mode="SILENT"),
    )
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), *extensions)
    for layer in layers:
        mean = expected[layer]
        stock = copy.deepcopy(layer).cpu()
        stock.__dict__.pop("forward", None)
        roots = torch.zeros(1, 1, stock(mean).numel(), dtype=torch.float64)
        reference = expected_factors(nn.Sequential(stock), mean, roots, convention)["0.weight"]
        assert torch.equal(layer.weight.chen[0], layer.weight.martens[0])
        assert_close("A", layer.weight.chen[1], reference[1], 1e-10)
        if layer.bias is not None:
            assert torch.equal(layer.bias.chen[0], layer.bias.martens[0])


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("newton", SUM, AVERAGE, MARTENS), "curv_type: expected one of hessian, ggn"),
        ((Curvature.GGN, "all", AVERAGE, MARTENS), "loss_hessian_strategy: expected one of exact, sampling, sum"),
        ((Curvature.GGN, SUM, "mean", MARTENS), "backprop_strategy: expected one of average, sqrt"),
        ((Curvature.GGN, SUM, AVERAGE, "mean"), "ea_strategy: expected one of"),
        ((Curvature.GGN, SUM, SQRT, MARTENS), "loss_hessian_strategy: expected 'exact' or 'sampling' with"),
        ((Curvature.HESSIAN, EXACT, SQRT, MARTENS), "curv_type: expected 'ggn' with backprop_strategy 'sqrt'"),
        ((Curvature.PCH_ABS, SAMPLING, SQRT, CHEN), "curv_type: expected 'ggn' with backprop_strategy 'sqrt'"),
    ],
)
def test_unknown_choices(arguments, match):
    with pytest.raises(ValueError, match=match):
        HBP(*arguments)


def test_choices_by_name():
    assert KFRA().savefield == "kfra" and HBP(Curvature.GGN, SUM, AVERAGE, MARTENS).savefield == "hbp"
    choices = {
        KFRA(): (Curvature.GGN, SUM, AVERAGE, MARTENS),
        KFLR(): (Curvature.GGN, EXACT, SQRT, MARTENS),
        KFAC(): (Curvature.GGN, SAMPLING, SQRT, MARTENS),
        HBP(Curvature.HESSIAN, SUM, AVERAGE, CHEN): (Curvature.HESSIAN, SUM, AVERAGE, CHEN),
    }
    for ext, expected in choices.items():
        assert (
            ext.get_curv_type(),
            ext.get_loss_hessian_strategy(),
            ext.get_backprop_strategy(),
            ext.get_ea_strategy(),
        ) == expected
    assert repr(KFRA(5, convention="expand")) == "KFRA(convention='expand', memory_limit=5)"
    with pytest.raises(TypeError, match="memory_limit: expected an int"):
        KFRA(1.5)
    with pytest.raises(ValueError, match="memory_limit: expected at least 0"):
        KFRA(-1)


BACKPACK_PROGRAMS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)), (4, 5)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 3, (2, 3), stride=2, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.ZeroPad2d(1),
            nn.ConvTranspose2d(3, 2, 2),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        (3, 2, 8, 9),
    ),
}
BACKPACK_CHOICES = {
    "exact, sqrt": (Curvature.GGN, EXACT, SQRT, MARTENS),
    **{f"{curv_type}, average": (curv_type, SUM, AVERAGE, MARTENS) for curv_type in CURVATURES},
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@named("choices", BACKPACK_CHOICES)
@named("build, shape", BACKPACK_PROGRAMS)
def test_as_backpack(build, shape, choices, reduction):
    pytest.importorskip("backpack", reason="BackPACK is not installed")
    if choices[0] != Curvature.GGN and len(shape) == 4:
        pytest.skip("BackPACK knows residuals of vectors only")
    dtype, tolerance = (torch.float32, 1e-5) if len(shape) == 4 else (torch.float64, 1e-10)  # BackPACK's AvgPool2d
    inputs, results = torch.randn(shape, dtype=dtype), []
    targets = torch.randint(3, shape[:1])
    for library in ("backpack", "backpack_cuda"):
        torch.manual_seed(0)
        backpack, hbp = (importlib.import_module(library + path) for path in ("", ".extensions.secondorder.hbp"))
        model, loss = backpack.extend(build().to(dtype)), backpack.extend(nn.CrossEntropyLoss(reduction=reduction))
        with warnings.catch_warnings(), backpack.backpack(hbp.HBP(*choices)):
            warnings.filterwarnings("ignore", "Full backward hook is firing|The Kronecker factors stored")
            loss(model(inputs), targets).backward()
        results.append(list(model.parameters()))
    for theirs, ours in zip(*results, strict=True):
        for mine, reference in zip(ours.hbp, theirs.hbp, strict=True):
            assert_close("hbp", mine, reference.double(), tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unstated_memory() -> dict[str, int]:
    """Bytes beyond results and statement of every large pass."""
    return run_memory_probe("kfra_memory_probe.py")


@pytest.mark.parametrize("name", list(CASES))
def test_memory_is_what_was_stated(name, unstated_memory):
    """Or less, but for a little that the process itself needs."""
    assert unstated_memory[name] <= 8 << 20


def wide(width: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 3))
    return model, torch.randn(4, 2), torch.tensor([0, 1, 2, 0])


def test_memory_is_stated(capsys):
    """From the sizes alone: the result and the product before it for the Linear layer, then in place."""
    model, inputs, targets = wide(50)
    kfra = KFRA()
    assert kfra.memory_needed is None
    backward(model, nn.CrossEntropyLoss(), inputs, targets, kfra, debug=True)
    matrices, pushed = 3 * 3 + 3 * 50 + 50 * 50, 3 * 50 * (3 + 50)
    assert kfra.memory_needed == 4 * (matrices + pushed)
    assert "KFRA() takes 41.4 KiB, for matrices up to [50, 50] at the result of relu" in capsys.readouterr().out


@pytest.mark.parametrize("make", [KFRA, lambda **options: HBP(Curvature.GGN, SUM, AVERAGE, MARTENS, **options)])
def test_memory_limit(make):
    model, inputs, targets = wide(50)
    limited = make(memory_limit=30_000)
    with pytest.raises(ValueError, match=r"needs 41.4 KiB .* largest \[50, 50\] at the result of relu, .* 29.3 KiB"):
        backward(model, nn.CrossEntropyLoss(), inputs, targets, limited)
    assert all(not hasattr(p, limited.savefield) for p in model.parameters())
    enough = make(memory_limit=limited.memory_needed)
    backward(model, nn.CrossEntropyLoss(), inputs, targets, enough)
    assert all(hasattr(p, enough.savefield) for p in model.parameters())


def test_the_place_is_named_where_modules_keep_their_tensors():
    """As the quantities that others write make them do."""

    class Unused(ModuleExtension):
        pass

    model, inputs, targets = wide(50)
    with pytest.raises(ValueError, match=r"largest \[50, 50\] at the result of relu"):
        backward(model, nn.CrossEntropyLoss(), inputs, targets, KFRA(memory_limit=1))
    assert Unused.__name__  # alive until here


def test_nothing_large_is_allocated():
    """A matrix of 16 TiB is refused before anything of it is there."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 1000 * 1000, 1))
    kfra = KFRA()
    with pytest.raises(ValueError, match=r"needs .* the largest \[2000000, 2000000\]"):
        backward(model, nn.MSELoss(), torch.randn(1, 1, 1000, 1000), torch.zeros(1, 1), kfra)
    assert kfra.memory_needed > 4 * 2_000_000**2


def test_memory_is_freed():
    """No tensor but the results stays, after a pass and after an error."""

    def step(limit=None):
        model, inputs, targets = wide(20)
        with contextlib.suppress(ValueError):
            backward(model, nn.CrossEntropyLoss(), inputs, targets, KFRA(limit))

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    step()
    before = tensors()
    for limit in (None, 0, None):
        step(limit)
    assert tensors() <= before


# ---------------------------------------------------------------------------------------------------------------------
# Passes
# ---------------------------------------------------------------------------------------------------------------------


def factors_of(model: nn.Module) -> dict:
    return saved(model, ("kfra",))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_no_samples(convention, device):
    """An empty batch has factors of zeros."""
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, 3))
    inputs, targets = torch.randn(0, 2, 5), torch.zeros(0, dtype=torch.long)
    kfra = KFRA(convention=convention)
    loss = nn.CrossEntropyLoss(reduction="sum")
    backward(model.to(device), loss, inputs.to(device), targets.to(device), kfra)
    for parameter in model.parameters():
        outputs = parameter.shape[0]
        assert [f.shape[0] for f in parameter.kfra] == [outputs, parameter[0].numel()][: parameter.dim()]
        assert all(not f.any() for f in parameter.kfra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@named("build", some(CHAINS, "Tanh", "max pool 2d", "average pool 2d", "skip", "layer norm of tokens"))
def test_types(build, dtype, device):
    model, inputs = prepared(build)
    model, inputs = model.to(dtype), inputs.to(dtype)
    with torch.no_grad():
        targets = torch.randint(3, (len(inputs),))
    reference = copy.deepcopy(model).double()
    start = loss_hessian(lambda f: nn.functional.cross_entropy(f, targets), reference(inputs.double()).detach()).sum(0)
    expected = expected_b(reference, inputs.double(), start)
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), KFRA())
    for parameter in model.parameters():
        assert all(f.dtype == torch.float32 for f in parameter.kfra)
    assert_b(model, expected, tolerance=2e-5 if dtype == torch.float32 else 0.15)


def test_mixed_types(device):
    """Layers of different types: the widest one for all matrices."""
    torch.manual_seed(0)
    double, single = nn.Linear(4, 3).double(), nn.Linear(3, 4)
    model = nn.Sequential(single, Function(lambda x: x.double()), nn.Tanh(), double, Function(lambda x: x.float()))
    model.append(nn.Linear(3, 3))
    reference = nn.Sequential(*(copy.deepcopy(m).double() for m in model if not isinstance(m, Function)))
    inputs, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), KFRA())
    backward(reference.to(device), nn.CrossEntropyLoss(), inputs.double().to(device), targets.to(device), KFRA())
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        for factor, expected in zip(mine.kfra, other.kfra, strict=True):
            assert_close("kfra", factor, expected.cpu(), 1e-5)


@named("frozen", {name: name for name in ("first", "last", "weights", "biases")})
def test_frozen_parameters(frozen, device):
    """Results of the others do not change, and frozen ones have none."""
    model, inputs = prepared(CHAINS["skip of convolutions"])
    targets = torch.randint(3, (len(inputs),))
    whole = copy.deepcopy(model).to(device)
    backward(whole, nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), KFRA())
    parameters = dict(model.named_parameters())
    chosen = {
        "first": ["0.weight", "0.bias"],
        "last": ["3.weight", "3.bias"],
        "weights": [name for name in parameters if name.endswith("weight")],
        "biases": [name for name in parameters if name.endswith("bias")],
    }[frozen]
    for name in chosen:
        parameters[name].requires_grad_(False)
    model.to(device)
    backward(model, nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), KFRA(), extension_hook=lambda _: None)
    expected = {name: {} if name in chosen else q for name, q in factors_of(whole).items()}
    assert_same(factors_of(model), expected, 1e-12)


def test_other_parameters_in_the_next_pass(device):
    """The same model, with fewer results wanted: those that are there do not change."""
    model, inputs = prepared(lambda: tokens(Attention(4)))
    inputs, targets = inputs.to(device), torch.randint(3, (len(inputs),)).to(device)
    model.to(device)
    kfra = KFRA(fail_mode="SILENT")
    backward(model, nn.CrossEntropyLoss(), inputs, targets, kfra)
    whole = factors_of(model)
    parameters = dict(model.named_parameters())
    for chosen in (["4.weight"], ["2.bias"], ["1.attention.out_proj.bias", "4.bias"], ["0.weight"], list(whole)):
        for parameter in parameters.values():
            parameter.__dict__.pop("kfra", None)
        loss = extend(nn.CrossEntropyLoss())(model(inputs), targets)
        with backpack(kfra):
            loss.backward(inputs=[parameters[name] for name in chosen])
        assert_same(factors_of(model), {name: q if name in chosen else {} for name, q in whole.items()}, 1e-12)


def test_shared_parameters_are_refused():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    with pytest.raises(NotImplementedError, match=r"Linear.weight is used 2 times .* KFLR and KFAC allow it"):
        backward(model, nn.CrossEntropyLoss(), torch.randn(2, 3), torch.tensor([0, 1]), KFRA())
    assert all(not hasattr(p, "kfra") for p in model.parameters())


def test_two_losses(device):
    """Losses of one prediction add up; of different ones they have no sum of input factors, but of matrices."""
    model, inputs = prepared(lambda: vectors(nn.Tanh()))
    inputs, targets = inputs.to(device), torch.randint(3, (4,), device=device)
    model = extend(model.to(device))
    losses = [extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())]
    sums: dict = {}
    for weight, loss in zip((1.0, 0.5), losses, strict=True):
        outputs = model(inputs)
        y = targets if isinstance(loss, nn.CrossEntropyLoss) else torch.zeros_like(outputs)
        with backpack(KFRA()):
            (weight * loss(outputs, y)).backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.kfra[0]
    outputs = model(inputs)
    with backpack(KFRA()):
        (losses[0](outputs, targets) + 0.5 * losses[1](outputs, torch.zeros_like(outputs))).backward()
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.kfra[0], sums[name].cpu(), 1e-12)
    hidden = model[:2](inputs)
    with backpack(KFRA()):
        (losses[1](hidden, torch.zeros_like(hidden)) + losses[0](model[2](hidden), targets)).backward()
    assert all(hasattr(p, "kfra") for p in model.parameters())


def test_samples_must_stay_apart():
    for function in (lambda x: x - x.mean(0), lambda x: x.flip(0)):
        model = nn.Sequential(nn.Linear(3, 4), Function(function), nn.Linear(4, 3))
        with pytest.raises(ValueError, match="samples that are not apart"):
            backward(model, nn.CrossEntropyLoss(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), KFRA())
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(NotImplementedError, match="batch normalisation in train mode"):
        backward(model, nn.CrossEntropyLoss(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), KFRA())


def test_nothing_arrives_at_first(device):
    """A branch that starts at zero, with the batch elsewhere inside: what is seen later is not what was seen first."""
    torch.manual_seed(0)
    attention = Attention(4)
    model = nn.Sequential(nn.Linear(3, 4), Skip(attention), nn.Flatten(), nn.Linear(16, 3)).double()
    projection = attention.attention.out_proj
    weight = projection.weight.detach().clone()
    inputs, targets = torch.randn(4, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    model.to(device)
    for scale in (0.0, 1.0):
        with torch.no_grad():
            projection.weight.copy_(scale * weight)
        kfra = KFRA(fail_mode="SILENT")
        backward(model, nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), kfra)
    stock = copy.deepcopy(model).cpu()
    for module in stock.modules():
        module.__dict__.pop("forward", None)
    start = loss_hessian(lambda f: nn.functional.cross_entropy(f, targets), stock(inputs).detach()).sum(0)
    assert_b(model, expected_b(stock, inputs, start))


def test_checkpointed_and_retained(device):
    """Segments that run again in the backward pass, and a second backward pass through the same graph."""
    model, inputs = prepared(CHAINS["skip of convolutions"])
    targets = torch.randint(3, (len(inputs),)).to(device)
    inputs, loss_function = inputs.to(device), extend(nn.CrossEntropyLoss())
    extend(model.to(device))
    results = []
    for checkpointed in (False, True):
        x = inputs
        for module in model:
            x = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
        loss = loss_function(x, targets)
        for retain_graph in (True, False):
            with backpack(KFRA()):
                loss.backward(retain_graph=retain_graph)
            results.append(factors_of(model))
    for result in results[1:]:
        assert_same(result, results[0], 1e-12)


@named("build", some(CHAINS, "Tanh", "softmax", "max pool 2d", "average pool 1d", "skip of convolutions"))
def test_differentiable(build, device):
    """The gradient of a function of the factors, against differences."""
    model, inputs = prepared(build)
    targets = torch.randint(3, (len(inputs),)).to(device)
    inputs, loss_function = inputs.to(device), extend(nn.CrossEntropyLoss())
    extend(model.to(device))
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(device) for p in parameters]

    def value(create_graph: bool) -> Tensor:
        with backpack(KFRA()):
            loss_function(model(inputs), targets).backward(create_graph=create_graph)
        return sum(f.square().sum() for p in parameters for f in p.kfra)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        total = value(create_graph=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    differences = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        differences.append(value(create_graph=False))
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=step)
    assert_close("slope", slope, ((differences[0] - differences[1]) / 2e-6).cpu(), 1e-5)
    for parameter in parameters:
        parameter.grad = None
        del parameter.kfra


def test_beside_other_quantities(device):
    """One pass with columns and matrices, by the same names as alone."""
    model, inputs = prepared(CHAINS["max pool 2d"])
    inputs, targets = inputs.to(device), torch.randint(3, (len(inputs),)).to(device)
    model.to(device)
    extensions = (KFRA(), KFLR(), DiagGGNExact())
    backward(model, nn.CrossEntropyLoss(), inputs, targets, *extensions)
    together = saved(model, ("kfra", "kflr", "diag_ggn_exact"))
    for ext in extensions:
        backward(model, nn.CrossEntropyLoss(), inputs, targets, ext)
    assert_same(saved(model, ("kfra", "kflr", "diag_ggn_exact")), together, 1e-14)


def test_unknown_factorisations():
    """Matrices of modules without a rule: an error that names them, or no attribute."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm([2, 4]), nn.Flatten(), nn.Linear(8, 3))
    inputs, targets = torch.randn(2, 2, 3), torch.tensor([0, 1])
    with pytest.raises(NotImplementedError, match="KFRA: no Kronecker factors are known for LayerNorm.weight"):
        backward(model, nn.CrossEntropyLoss(), inputs, targets, KFRA())
    assert_nothing_saved(model)
    backward(model, nn.CrossEntropyLoss(), inputs, targets, KFRA(fail_mode="SILENT"))
    assert hasattr(model[0].weight, "kfra") and not hasattr(model[1].weight, "kfra")
    hessian = HBP(Curvature.HESSIAN, SUM, AVERAGE, MARTENS, fail_mode="SILENT")
    with pytest.raises(NotImplementedError, match="no Hessian diagonal"):
        backward(model, nn.CrossEntropyLoss(), inputs, targets, hessian)


def test_residuals_inside_of_branches_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), Skip(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 3))
    hessian = HBP(Curvature.HESSIAN, SUM, AVERAGE, MARTENS)
    with pytest.raises(NotImplementedError, match="tanh is not linear and inside of a branch"):
        backward(model, nn.CrossEntropyLoss(), torch.randn(2, 3), torch.tensor([0, 1]), hessian)

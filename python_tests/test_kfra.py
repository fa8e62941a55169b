"""KFRA and HBP: against the recursion with dense Jacobians, against BackPACK, and where they are exact."""

import pytest
import torch
from curvature_oracle import loss_hessian
from helpers import assert_close, named
from sequential_oracle import output_factor
from torch import Tensor, nn

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import KFRA
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
    return module(x)


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
        model(torch.zeros((2, *shape[1:])))  # lazy layers
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

"""Random small architectures with random losses, reproducible from a seed.

`random_case(seed)` draws freely from everything that may stand between parametric layers; with `elementwise_only` the
nonlinear parts are piecewise linear or elementwise, which is what the Hessian's diagonal is formed for.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Case(NamedTuple):
    """A stock float64 model, its inputs, and a loss with its targets."""

    model: nn.Module
    loss: nn.Module
    inputs: Tensor  # [N, ...]
    targets: Tensor

    def loss_of(self, outputs: Tensor) -> Tensor:
        return self.loss(outputs, self.targets)


# ---------------------------------------------------------------------------------------------------------------------
# Modules with functional code
# ---------------------------------------------------------------------------------------------------------------------


class Call(nn.Module):
    """A function without parameters; `name` is for the model's repr."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


class Residual(nn.Module):
    """x + inner(x), scaled."""

    def __init__(self, inner: nn.Module, scale: float = 1.0):
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


class Branches(nn.Module):
    """Two branches, concatenated along `dim` or added."""

    def __init__(self, left: nn.Module, right: nn.Module, dim: int | None):
        super().__init__()
        self.left, self.right, self.dim = left, right, dim

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return left + right if self.dim is None else torch.cat([left, right], self.dim)


class Gate(nn.Module):
    """The product of two branches."""

    def __init__(self, left: nn.Module, right: nn.Module):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * torch.sigmoid(self.right(x))


class Again(nn.Module):
    """One module called several times in a row, with an activation between."""

    def __init__(self, inner: nn.Module, times: int):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.inner(x))
        return x


class Twins(nn.Module):
    """One module called on two versions of the input side by side, as Siamese networks do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner(x.flip(-1))


class Attention(nn.Module):
    """Causal or full self-attention of [N, T, F] from Linear layers and torch's function."""

    def __init__(self, size: int, causal: bool):
        super().__init__()
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(query, key, value, is_causal=self.causal))


class AttentionModule(nn.Module):
    """torch's module, whose parameters have no rule of their own."""

    def __init__(self, size: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(size, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Scale(nn.Module):
    """Parameters of its own, without a rule."""

    def __init__(self, size: int):
        super().__init__()
        self.factor = nn.Parameter(1 + 0.3 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------

PIECEWISE_LINEAR = [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.Identity]
SMOOTH = [nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.SELU, nn.LogSigmoid]
OTHER_ACTIVATIONS = [nn.Mish, nn.Hardswish, nn.Softsign, nn.CELU, nn.Tanhshrink, nn.Softshrink]
FUNCTIONS = [F.relu, torch.tanh, F.gelu, torch.sigmoid, F.silu, F.softplus]
FREE_FUNCTIONS = [torch.sin, torch.exp, torch.square, F.softsign]  # without modules of their own

Shape = tuple[int, ...]  # of one sample
Draw = Callable[[random.Random, Shape], "nn.Module | None"]


def _linear(rng: random.Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], rng.choice((2, 3, 4)), bias=rng.random() < 0.8)


def _square_linear(rng: random.Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], shape[-1], bias=rng.random() < 0.8)


def _convolution(rng: random.Random, shape: Shape) -> nn.Module | None:
    dims = len(shape) - 1
    if not 1 <= dims <= 3:
        return None
    groups = rng.choice([g for g in (1, 1, 2, shape[0]) if shape[0] % g == 0])
    kernel = [rng.randint(1, min(3, size)) for size in shape[1:]]
    options: dict = {"groups": groups, "bias": rng.random() < 0.7}
    mode = rng.choice(("zeros", "zeros", "circular", "reflect", "replicate"))
    if mode == "reflect" and min(shape[1:]) < 2:
        mode = "zeros"
    padding = rng.choice(("same", "valid", 0, 1, 1))
    if padding == "same":
        kernel = [size - (size + 1) % 2 for size in kernel]  # odd: torch warns of even ones
        options |= {"padding": "same", "padding_mode": mode if mode != "reflect" else "zeros"}
    else:
        options |= {"padding": padding, "stride": rng.choice((1, 1, 2)), "padding_mode": mode}
        if padding == 1 and min(shape[1:]) >= 3:
            options["dilation"] = rng.choice((1, 2))
            kernel = [min(k, 2) for k in kernel] if options["dilation"] == 2 else kernel
    return getattr(nn, f"Conv{dims}d")(shape[0], groups * rng.randint(1, 2), kernel, **options)


def _transposed(rng: random.Random, shape: Shape) -> nn.Module | None:
    dims = len(shape) - 1
    if not 1 <= dims <= 2 or max(shape[1:]) > 4:
        return None
    groups = rng.choice([g for g in (1, 1, 2) if shape[0] % g == 0])
    stride = rng.choice((1, 2))
    return getattr(nn, f"ConvTranspose{dims}d")(
        shape[0],
        groups * rng.randint(1, 2),
        [rng.randint(1, 2) for _ in range(dims)],
        stride=stride,
        output_padding=rng.randint(0, stride - 1),
        padding=rng.choice((0, 0, 1)) if min(shape[1:]) >= 3 else 0,
        dilation=1 if stride == 1 else rng.choice((1, 2)),
        groups=groups,
        bias=rng.random() < 0.7,
    )


def _same_size_convolution(rng: random.Random, shape: Shape) -> nn.Module | None:
    dims = len(shape) - 1
    return getattr(nn, f"Conv{dims}d")(shape[0], shape[0], 3, padding=1) if 1 <= dims <= 3 else None


def _batch_norm(rng: random.Random, shape: Shape) -> nn.Module | None:
    if len(shape) > 4:
        return None
    module = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)](shape[0]).eval()
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 2)
    return module


def _norm(rng: random.Random, shape: Shape) -> nn.Module | None:
    kind = rng.choice(("layer", "layer", "group", "rms"))
    if kind == "group" and shape[0] % 2 == 0 and math.prod(shape) > 2:
        return nn.GroupNorm(2, shape[0])
    if kind == "rms":
        return nn.RMSNorm(shape[-1])
    return nn.LayerNorm(shape[-1] if rng.random() < 0.5 else shape) if shape[-1] > 1 else None


def _pooling(rng: random.Random, shape: Shape) -> nn.Module | None:
    dims = len(shape) - 1
    if not 1 <= dims <= 3:
        return None
    kind = rng.choice(("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"))
    if kind.startswith("Adaptive"):
        return getattr(nn, f"{kind}{dims}d")(tuple(rng.randint(1, size) for size in shape[1:]))
    return getattr(nn, f"{kind}{dims}d")(2, stride=rng.choice((1, 2))) if min(shape[1:]) >= 2 else None


def _reshaping(rng: random.Random, shape: Shape) -> nn.Module | None:
    options: list[nn.Module] = [nn.Flatten(), Call("double", lambda x: 2 * x), nn.Dropout(0.0)]
    if shape[-1] > 1:
        options += [
            Call("drop the first", lambda x: x[..., 1:]),
            Call("flip", lambda x: x.flip(-1)),
            Call("index", lambda x: x[..., [0, -1, 0]]),
            Call("pad", lambda x: F.pad(x, (1, 0))),
        ]
    if len(shape) > 1:
        options += [
            Call("transpose", lambda x: x.transpose(1, 2)),
            Call("mean over positions", lambda x: x.flatten(2).mean(2)),
            Call("take a position", lambda x: x[:, 0]),
            Call("reshape", lambda x: x.reshape(len(x), -1, 1)),
        ]
    if len(shape) == 3 and max(shape[1:]) <= 2:
        options.append(nn.Upsample(scale_factor=2))
    return rng.choice(options)


def _activation(rng: random.Random, shape: Shape) -> nn.Module:
    return rng.choice(PIECEWISE_LINEAR + SMOOTH + SMOOTH + OTHER_ACTIVATIONS)()


def _known_activation(rng: random.Random, shape: Shape) -> nn.Module:
    return rng.choice(PIECEWISE_LINEAR + SMOOTH + SMOOTH)()


def _function(rng: random.Random, shape: Shape) -> nn.Module:
    function = rng.choice(FUNCTIONS + FREE_FUNCTIONS)
    return Call(function.__name__, function)


def _known_function(rng: random.Random, shape: Shape) -> nn.Module:
    function = rng.choice(FUNCTIONS)
    return Call(function.__name__, function)


def _residual(inner: list[Draw]) -> Draw:
    def draw(rng: random.Random, shape: Shape) -> nn.Module:
        parts = [_square_linear(rng, shape) if rng.random() < 0.6 else _same_size_convolution(rng, shape)]
        parts.insert(rng.randint(0, 1), rng.choice(inner)(rng, shape))
        return Residual(nn.Sequential(*[p for p in parts if p is not None]), rng.choice((1.0, 0.5)))

    return draw


def _branches(inner: list[Draw]) -> Draw:
    def draw(rng: random.Random, shape: Shape) -> nn.Module:
        left, right = (nn.Sequential(_square_linear(rng, shape), rng.choice(inner)(rng, shape)) for _ in range(2))
        return Branches(left, right, rng.choice((None, 1, -1)))

    return draw


def _twins(rng: random.Random, shape: Shape) -> nn.Module:
    return Twins(_same_size_convolution(rng, shape) or _linear(rng, shape))


def _again(rng: random.Random, shape: Shape) -> nn.Module:
    convolution = _same_size_convolution(rng, shape) if rng.random() < 0.5 else None
    return Again(convolution or _square_linear(rng, shape), rng.randint(2, 3))


def _gate(rng: random.Random, shape: Shape) -> nn.Module:
    return Gate(_square_linear(rng, shape), _square_linear(rng, shape))


def _attention(rng: random.Random, shape: Shape) -> nn.Module | None:
    if len(shape) != 2:
        return None
    return AttentionModule(shape[-1]) if rng.random() < 0.3 else Attention(shape[-1], rng.random() < 0.5)


def _scale(rng: random.Random, shape: Shape) -> nn.Module:
    return Scale(shape[-1])


PARAMETRIC: list[Draw] = [_linear, _linear, _convolution, _convolution, _convolution, _transposed, _batch_norm]
ANY: list[list[Draw]] = [  # a kind first, then one of it
    PARAMETRIC,
    [_activation],
    [_activation, _function],
    [_pooling, _reshaping],
    [_norm, _attention, _attention],
    [_residual([_activation, _function]), _branches([_activation, _function])],
    [_twins, _again, _gate, _scale],
]
ELEMENTWISE: list[list[Draw]] = [
    PARAMETRIC,
    [_known_activation],
    [_known_activation, _known_function],
    [_pooling, _reshaping],
    [_residual([_known_activation, _known_function]), _branches([_known_activation, _known_function]), _twins],
]
INPUT_SHAPES: list[Shape] = [(4,), (3,), (3, 4), (4, 5), (4, 3), (2, 4, 3), (2, 3, 5), (2, 2, 3, 2)]


def _tie(rng: random.Random, model: nn.Module) -> None:
    """Lets two layers of the same kind share their weight, sometimes."""
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    pairs = [(a, b) for a in layers for b in layers if a is not b and a.weight.shape == b.weight.shape]
    if pairs and rng.random() < 0.2:
        first, second = rng.choice(pairs)
        second.weight = first.weight


def random_loss(rng: random.Random, outputs: Tensor) -> tuple[nn.Module, Tensor]:
    """A loss with targets for `outputs` [N, C, *]."""
    samples, classes = outputs.shape[:2]
    kinds = ["mse", "bce", "bce, weighted", "ce", "ce, ignored", "ce, weighted", "ce, soft"]
    reduction = rng.choice(("mean", "sum"))
    double = {"dtype": torch.float64}
    kind = rng.choice(kinds if classes > 1 else kinds[:3])
    if kind == "mse":
        return nn.MSELoss(reduction=reduction), torch.randn(outputs.shape, **double)
    if kind == "bce":
        return nn.BCEWithLogitsLoss(reduction=reduction), torch.rand(outputs.shape, **double)
    if kind == "bce, weighted":
        weight = torch.rand(outputs.shape[1:], **double) + 0.5
        return nn.BCEWithLogitsLoss(reduction=reduction, pos_weight=weight), torch.rand(outputs.shape, **double).round()
    smoothing = rng.choice((0.0, 0.0, 0.2))
    if kind == "ce, soft":
        targets = torch.softmax(torch.randn(outputs.shape, **double), 1)
        return nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing), targets
    targets = torch.randint(classes, (samples, *outputs.shape[2:]))
    options: dict = {"reduction": reduction, "label_smoothing": smoothing}
    if kind == "ce, weighted":
        options["weight"] = torch.rand(classes, **double) + 0.5
    if kind == "ce, ignored":
        options["ignore_index"] = rng.choice((-100, classes - 1))
        targets.view(-1)[-1] = options["ignore_index"]
        targets.view(-1)[0] = 0  # not all of them
    return nn.CrossEntropyLoss(**options), targets


def random_case(seed: int, elementwise_only: bool = False) -> Case:
    """The model of this seed: up to six random steps and an output layer, at most 300 parameters and 16 outputs."""
    rng = random.Random(seed)
    while True:
        torch.manual_seed(rng.randrange(2**31))
        shape = rng.choice(INPUT_SHAPES)
        inputs = torch.randn(rng.randint(1, 3), *shape, dtype=torch.float64)
        model = _random_model(rng, inputs, ELEMENTWISE if elementwise_only else ANY)
        if not elementwise_only:
            _tie(rng, model)
        parameters = list(model.parameters())
        for parameter in parameters[:-1]:
            parameter.requires_grad_(rng.random() > 0.1)
        with torch.no_grad():
            outputs = model(inputs)
        if outputs[0].numel() <= 16 and sum(p.numel() for p in parameters) <= 300:
            loss, targets = random_loss(rng, outputs)
            return Case(model, loss, inputs, targets)


def _random_model(rng: random.Random, x: Tensor, kinds: list[list[Draw]]) -> nn.Module:
    steps: list[nn.Module] = []
    # The first step is parametric, so that what follows is part of the path back to it.
    for draws in [PARAMETRIC[:-1], *rng.choices(kinds, k=rng.randint(2, 6))]:
        step = rng.choice(draws)(rng, tuple(x.shape[1:]))
        if step is None:
            continue
        step = step.double()
        with torch.no_grad():
            y = step(x)
        if 0 < y[0].numel() <= 60 and y.abs().max() < 1e3:
            steps.append(step)
            x = y
    if x.dim() == 2 or rng.random() < 0.4:
        steps += [nn.Flatten(), nn.Linear(x[0].numel(), rng.randint(1, 4))]
    elif rng.random() < 0.5:
        steps.append(nn.Linear(x.shape[-1], 2))
    else:
        steps.append(Call("three positions", lambda x: x.flatten(2)[..., :3]))
        steps.append(nn.Conv1d(x.shape[1], rng.randint(1, 3), 1))
    return nn.Sequential(*steps).double()

"""Hessian diagonals of networks: what is found in their graphs, what is refused, and that samples stay apart."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, examples, named, some
from hessian_oracle import Apply, assigned, check_diagonals, dense_diagonal, into_zeros, sources_of
from random_models import random_case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backpack_cuda as bp
from backpack_cuda.extensions import BatchDiagHessian, DiagHessian

# ---------------------------------------------------------------------------------------------------------------------
# Architectures
# ---------------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, forward: Callable, **layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self._function = forward

    def forward(self, input: Tensor) -> Tensor:
        return self._function(self.layers, input)


class Scale(nn.Module):
    """A module with a parameter of its own, linear in it."""

    def __init__(self, *size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(input)


def residual(layers, x: Tensor) -> Tensor:
    h = torch.tanh(layers["a"](x))
    h = h + F.softplus(layers["b"](h))
    return layers["c"](h + F.relu(h))


def branches(layers, x: Tensor) -> Tensor:
    h = layers["a"](x)
    return torch.cat([torch.sigmoid(h), torch.tanh(h).square() + layers["b"](torch.sin(h)), h.exp()], 1)


def in_place(layers, x: Tensor) -> Tensor:
    h = F.relu_(layers["a"](x)).mul(2).sigmoid_()
    h = layers["b"](h).tanh_()
    h = h.clone().mul_(2).add_(h)
    return F.silu(layers["c"](h), inplace=True)


def gated(layers, x: Tensor) -> Tensor:
    """Products of functions of different parameters."""
    return layers["c"](x).exp() * torch.sigmoid(layers["a"](x)) + layers["b"](x) / (1 + layers["a"](x).square())


def exponents(layers, x: Tensor) -> Tensor:
    return (1 + layers["a"](x).square()) ** torch.sigmoid(layers["b"](x)) + 0.1 * layers["c"](x)


def shared(layers, x: Tensor) -> Tensor:
    """One layer on two branches."""
    return layers["b"](torch.tanh(layers["a"](x)) + torch.sigmoid(layers["a"](torch.sin(x)))) + layers["c"](x)


def fixed_attention(layers, x: Tensor) -> Tensor:
    return x.softmax(1) * torch.tanh(layers["a"](x)) + layers["c"](layers["b"](x).detach().softmax(1))


ARCHITECTURES = {
    "residual": residual,
    "branches": branches,
    "in place": in_place,
    "gated": gated,
    "exponents": exponents,
    "shared": shared,
    "fixed attention": fixed_attention,
}


def three_layers(forward: Callable) -> Model:
    return Model(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 3))


@named("forward", ARCHITECTURES)
def test_architecture(forward):
    check_diagonals(three_layers(forward), torch.randn(3, 3))


MODELS = {
    "deep": nn.Sequential(*[m for i in range(4) for m in (nn.Linear(3 if i else 6, 3), nn.Sigmoid())]),
    "convolutions": nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.SiLU(inplace=True),
        nn.BatchNorm2d(3).eval(),
        nn.MaxPool2d(2),
        nn.GELU(),
        nn.ConvTranspose2d(3, 1, 2),
        nn.Flatten(),
        nn.Linear(6, 2),
    ),
    "frozen layer": nn.Sequential(
        nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3).requires_grad_(False), nn.Sigmoid(), nn.Linear(3, 2)
    ),
    "frozen bottom": nn.Sequential(
        nn.Linear(6, 3).requires_grad_(False), nn.Softmax(1), nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2)
    ),
    "weights only": nn.Sequential(nn.Linear(6, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)),
    "positions": nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)),
    "own parameters": nn.Sequential(nn.Linear(6, 3), Scale(3), nn.Tanh(), Scale(1), nn.Linear(3, 2), Scale(2)),
    "prelu": nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.PReLU(3), nn.Linear(3, 2), nn.PReLU()),
    "layer norm on the input": nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3), nn.Sigmoid()),
    "group norm on the input": nn.Sequential(nn.GroupNorm(2, 6), nn.Linear(6, 3), nn.Sigmoid()),
}


@named("model", MODELS)
def test_model(model):
    if "BatchNorm2d" in str(model):
        model[3].running_mean.uniform_()
        model[3].running_var.uniform_(0.5, 1.0)
    check_diagonals(model, torch.randn(3, 6))


SEVERAL_USES = {
    "successive": lambda layers, x: layers["a"](torch.tanh(layers["a"](x))),
    "two apart": lambda layers, x: layers["a"](layers["b"](torch.relu(layers["a"](x)))),
    "on a branch": lambda layers, x: layers["b"](x) + layers["a"](x + layers["c"](layers["a"](x))),
}


@named("forward", SEVERAL_USES)
def test_nested_uses_of_a_weight(forward):
    model = bp.extend(three_layers(forward))
    with pytest.raises(NotImplementedError, match="Linear.weight: it is used again on what depends on its own earlier"):
        sources_of(model, lambda f: f.square().sum(), torch.randn(3, 3))
    model.layers["a"].weight.requires_grad_(False)
    sources_of(model, lambda f: f.square().sum(), torch.randn(3, 3))


def test_nested_uses_of_a_bias():
    """A bias is added, not multiplied: its uses have no terms between them."""
    model = three_layers(SEVERAL_USES["successive"])
    model.layers["a"].weight.requires_grad_(False)
    check_diagonals(model, torch.randn(3, 3))


class Mixed(nn.Module):
    """A module with a parameter of its own beside a layer."""

    def __init__(self, function: Callable):
        super().__init__()
        self.own = nn.Parameter(torch.rand(3))
        self.layer = nn.Linear(3, 3)
        self._function = function

    def forward(self, input: Tensor) -> Tensor:
        return self._function(self.own, self.layer, input)


MIXED = {  # what is linear in the module's own parameter
    "factor": lambda own, layer, x: own * torch.tanh(layer(x)),
    "beside": lambda own, layer, x: torch.sin(layer(x)) + own * x.exp() + own,
    "interpolation": lambda own, layer, x: torch.lerp(x, torch.tanh(layer(x)), 0.3) @ torch.diag(own),
}
MIXED_REFUSED = {
    "square": ("Mixed.own: .* pow", lambda own, layer, x: own.square() * layer(x)),
    "factor inside": ("Mixed.own: .* tanh", lambda own, layer, x: torch.tanh(own * layer(x))),
    "gate": ("Mixed.own: .* sigmoid", lambda own, layer, x: torch.sigmoid(own) * layer(x)),
    "product": ("both depend on Mixed.own", lambda own, layer, x: own * x * (layer(x) + own)),
    "normalised": ("linalg_vector_norm", lambda own, layer, x: own / own.norm() * layer(x)),
}


@named("function", MIXED)
def test_own_parameter(function):
    check_diagonals(nn.Sequential(Mixed(function), nn.Sigmoid(), nn.Linear(3, 2)), torch.randn(3, 3))
    check_diagonals(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), Mixed(function)), torch.randn(3, 3))


@named("word, function", MIXED_REFUSED)
def test_module_that_is_not_linear_in_its_own_parameter(word, function):
    model = bp.extend(nn.Sequential(Mixed(function), nn.Linear(3, 2)))
    with pytest.raises(NotImplementedError, match=word):
        sources_of(model, lambda f: f.square().sum(), torch.randn(3, 3))


def test_recurrent_layer():
    model = bp.extend(nn.Sequential(nn.GRU(3, 3, batch_first=True), Apply(lambda outputs: outputs[0])))
    with pytest.raises(NotImplementedError):
        sources_of(model, lambda f: f.square().sum(), torch.randn(2, 4, 3))


def test_weight_used_outside_of_its_module():
    model = three_layers(lambda layers, x: torch.tanh(layers["a"](x)) + F.linear(x, layers["a"].weight))
    with pytest.raises(NotImplementedError, match="Linear.weight also acts on the prediction from outside"):
        sources_of(bp.extend(model), lambda f: f.square().sum(), torch.randn(3, 3))


# ---------------------------------------------------------------------------------------------------------------------
# The batch
# ---------------------------------------------------------------------------------------------------------------------

APART = {  # of h [N, 3, 2], the batch along dimension 0
    "flattened": lambda h: torch.sigmoid(h.flatten(0, 1)).view(len(h), 3, 2),
    "all flattened": lambda h: torch.sigmoid(h.flatten()).view(len(h), 3, 2),
    "transposed within": lambda h: torch.sigmoid(h.transpose(1, 2).reshape(-1, 3)).view(len(h), 2, 3),
    "reversed again": lambda h: torch.tanh(h.flip(0).flip(0)),
    "shift of a constant": lambda h: torch.sigmoid(h + torch.arange(len(h))[:, None, None]),
}
MIXING = {
    "positions first": lambda h: torch.sigmoid(h.transpose(0, 1)).transpose(0, 1),
    "flattened with positions first": lambda h: (
        torch.sigmoid(h.transpose(0, 1).flatten(0, 1)).view(3, -1, 2).mT.mT.sum(0).unsqueeze(1)
    ),
    "mean over the batch": lambda h: torch.sigmoid(h - h.mean(0)),
    "neighbour": lambda h: torch.sigmoid(h + 0.5 * h.roll(1, 0)),
    "reversed": lambda h: torch.sigmoid(h.flip(0)),
    "reversed in between": lambda h: torch.sigmoid(h.flip(0)).flip(0),
    "only earlier samples": lambda h: torch.sigmoid(h.cumsum(0)),
    "only later samples": lambda h: torch.sigmoid(h.flip(0).cumsum(0).flip(0)),
    "two samples swapped": lambda h: torch.sigmoid(torch.cat((h[1:2], h[:1], h[2:]))),
    "halves swapped": lambda h: torch.sigmoid(h.roll(len(h) // 2, 0)),
    "above the function": lambda h: torch.sigmoid(h).mean(0, keepdim=True) + torch.sigmoid(h),
    "features of one sample": lambda h: torch.sigmoid(h[0]).sum() + h,
}


def of_positions(function: Callable) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), Apply(function), nn.Flatten())


@named("function", APART)
def test_samples_apart(function):
    check_diagonals(of_positions(function), torch.randn(3, 3, 2))


@pytest.mark.parametrize("samples", [2, 3, 7])
@named("function", MIXING)
def test_samples_that_act_on_each_other(function, samples):
    """Among them a batch as large as the number of positions."""
    model = bp.extend(of_positions(function))
    with pytest.raises(ValueError, match=f"expected the {samples} samples of the batch along dimension 0"):
        sources_of(model, lambda f: f.square().sum(), torch.randn(samples, 3, 2))


def test_error_names_the_function():
    model = bp.extend(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), Apply(lambda h: torch.exp(h - h.mean(0))), nn.GELU()))
    with pytest.raises(ValueError, match=r"the input of exp: .* got size \[4, 2\]"):
        sources_of(model, lambda f: f.square().sum(), torch.randn(4, 2))


def test_single_sample():
    """It may have any layout."""
    check_diagonals(of_positions(MIXING["positions first"]), torch.randn(1, 3, 2))


def test_empty_batch():
    model = bp.extend(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    assert sources_of(model, lambda f: f.square().sum(), torch.randn(0, 2))[1] == []


def test_global_generator_is_left_alone():
    model = bp.extend(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
    x, state = torch.randn(3, 2), torch.get_rng_state()
    sources_of(model, lambda f: f.square().sum(), x)
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


def test_columns_are_formed_in_pieces():
    model = bp.extend(nn.Sequential(nn.Linear(2, 6), nn.Unflatten(1, (2, 3)), nn.Tanh(), nn.Flatten()))
    _, (source,) = sources_of(model, lambda f: f.square().sum(), torch.randn(4, 2))
    assert source.name == "tanh" and source.root.count == 6
    columns, signs = source.root.form(0, 6)
    assert columns.shape == (6, 4, 2, 3) and signs.shape == (6, 4)
    for v, column in enumerate(columns.flatten(2)):
        assert torch.equal(column, F.one_hot(torch.tensor(v), 6).expand(4, 6).float())
    pieces = [source.root.form(begin, min(begin + 4, 6)) for begin in (0, 4)]
    assert torch.equal(torch.cat([c for c, _ in pieces]), columns)
    assert torch.equal(torch.cat([s for _, s in pieces]), signs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype):
    """Columns in the type of the tensor, the curvature in that of statistics."""
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.Sigmoid())
    x = torch.randn(5, 3)
    _, expected = sources_of(bp.extend(copy.deepcopy(model).double()), lambda f: f.square().sum(), x.double())
    _, actual = sources_of(bp.extend(model.to(dtype)), lambda f: f.square().sum(), x.to(dtype))
    for a, e in zip(actual, expected, strict=True):
        columns, signs = a.root.form(0, a.root.count)
        assert columns.dtype == dtype and signs.dtype == torch.float32 and a.name == e.name
        assert_close(a.name, signs, e.root.form(0, e.root.count)[1], 32 * torch.finfo(dtype).eps)


def test_autocast():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.Sigmoid()), torch.randn(5, 3)
    _, expected = sources_of(bp.extend(copy.deepcopy(model).double()), lambda f: f.square().sum(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        _, actual = sources_of(bp.extend(model), lambda f: f.float().square().sum(), x)
    for a, e in zip(actual, expected, strict=True):
        assert a.root.form(0, 1)[0].dtype == torch.bfloat16
        assert_close(a.name, a.root.form(0, a.root.count)[1], e.root.form(0, e.root.count)[1], 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def hessian_diagonals(model: nn.Module, x: Tensor, y: Tensor, loss: nn.Module | None = None) -> list[Tensor]:
    """`DiagHessian` of an extended copy of a model, checked to be the sum of `BatchDiagHessian`."""
    model = bp.extend(copy.deepcopy(model))
    loss = bp.extend(loss or nn.CrossEntropyLoss())
    with bp.backpack(DiagHessian(), BatchDiagHessian()):
        loss(model(x), y).backward()
    for parameter in model.parameters():
        total = parameter.diag_h_batch.sum(0)
        assert_close("sum", total, parameter.diag_h.cpu(), 1e-5, parameter.diag_h.abs().max().item() + 1e-3)
    return [parameter.diag_h for parameter in model.parameters()]


def checkpointed(layers, x: Tensor) -> Tensor:
    """Every kind of node that saves something, inside and outside of a segment."""

    def segment(h: Tensor) -> Tensor:
        h = layers["b"](torch.sin(h)).exp()
        h = F.elu(h) + h.abs() ** 1.5 + 1 / (1 + h) + 2 ** torch.tanh(h)
        return assigned(h, lambda c: c[:, 0].mul_(2))

    return layers["c"](checkpoint(segment, torch.sigmoid(layers["a"](x)), use_reentrant=False))


@named("forward", {"checkpointed": checkpointed} | some(ARCHITECTURES, "residual", "in place", "gated", "shared"))
def test_public_interface(forward, device):
    model, x, y = three_layers(forward).double(), torch.randn(4, 3).double(), torch.randint(3, (4,))
    expected = dense_diagonal(model, lambda f: F.cross_entropy(f, y), x)
    for actual, e in zip(hessian_diagonals(model.to(device), x.to(device), y.to(device)), expected, strict=True):
        assert_close("diagonal", actual, e, 1e-10)


class LanguageModel(nn.Module):
    """Predictions of all positions, flattened: one sample after the other, or one position after the other."""

    def __init__(self, positions_first: bool):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.hidden, self.output = nn.Linear(3, 4), nn.Linear(4, 5)
        self.positions_first = positions_first

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.sigmoid(self.output(torch.tanh(self.hidden(self.embedding(tokens).exp()))))
        return (h.transpose(0, 1) if self.positions_first else h).reshape(-1, 5)


def test_flattened_prediction():
    tokens, y = torch.randint(5, (3, 4)), torch.randint(5, (12,))
    model = LanguageModel(positions_first=False).double()
    expected = dense_diagonal(model, lambda f: F.cross_entropy(f, y), tokens)
    for actual, e in zip(hessian_diagonals(model, tokens, y), expected, strict=True):
        assert_close("diagonal", actual, e, 1e-10)
    with pytest.raises(ValueError, match="samples"):
        hessian_diagonals(LanguageModel(positions_first=True).double(), tokens, y)


@pytest.mark.parametrize("asked_for", [(0,), (1,), (2,), (5,), (0, 3), (2, 3, 4)])
def test_some_of_the_parameters(asked_for):
    """The others are constants, also for functions that change views in place."""

    def forward(layers, x: Tensor) -> Tensor:
        h = assigned(torch.tanh(layers["a"](x)), lambda c: c[:, 0].mul_(2))
        return layers["c"](torch.sigmoid(layers["b"](into_zeros(h))))

    model = Model(forward, a=nn.Linear(3, 3), b=nn.Linear(6, 3), c=nn.Linear(3, 3)).double()
    x, y = torch.randn(4, 3).double(), torch.randint(3, (4,))
    expected = dense_diagonal(model, lambda f: F.cross_entropy(f, y), x)
    for run in (torch.autograd.grad, lambda loss, inputs: loss.backward(inputs=inputs)):
        extended, loss = bp.extend(copy.deepcopy(model)), bp.extend(nn.CrossEntropyLoss())
        parameters = list(extended.parameters())
        with bp.backpack(DiagHessian()):
            run(loss(extended(x), y), [parameters[i] for i in asked_for])
        assert [i for i, p in enumerate(parameters) if hasattr(p, "diag_h")] == list(asked_for)
        for i in asked_for:
            assert_close("diagonal", parameters[i].diag_h, expected[i], 1e-10)


LAYERS = {  # a layer and the size of a sample
    "linear": (nn.Linear(3, 2), (3,)),
    "linear at positions": (nn.Linear(3, 2), (2, 2, 3)),
    "bias only": (nn.Linear(3, 2), (2, 3)),
    "weight only": (nn.Linear(3, 2), (2, 3)),
    "conv1d": (nn.Conv1d(2, 2, 2, stride=2, padding=1), (2, 5)),
    "conv2d": (nn.Conv2d(2, 4, (2, 3), dilation=(1, 2), padding=(1, 2), groups=2), (2, 3, 4)),
    "circular": (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 3, 2)),
    "same": (nn.Conv2d(1, 2, 3, padding="same"), (1, 3, 2)),
    "depthwise": (nn.Conv2d(2, 2, 2, groups=2), (2, 3, 3)),
    "conv3d": (nn.Conv3d(1, 2, (1, 2, 2), padding=(1, 0, 0)), (1, 2, 3, 2)),
    "transposed1d": (nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1, output_padding=1), (2, 3)),
    "transposed2d": (nn.ConvTranspose2d(2, 4, 2, dilation=2, groups=2), (2, 2, 3)),
    "transposed3d": (nn.ConvTranspose3d(1, 1, (2, 1, 2), stride=(1, 2, 1)), (1, 2, 1, 2)),
    "batch norm": (nn.BatchNorm1d(2).eval(), (2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_function_at_a_layer_output(name, device):
    """Without columns, and beside a layer further down; also sample by sample."""
    layer, size = copy.deepcopy(LAYERS[name])
    layer.weight.requires_grad_(name != "bias only")
    layer.bias.requires_grad_(name != "weight only")
    for below in (nn.Identity(), nn.Linear(size[-1], size[-1])):
        model = nn.Sequential(below, layer, nn.Sigmoid(), nn.Flatten()).double()
        x = torch.randn(2, *size, dtype=torch.float64)
        y = torch.randn(model(x).shape, dtype=torch.float64)
        extended, loss = bp.extend(copy.deepcopy(model).to(device)), bp.extend(nn.MSELoss(reduction="sum"))
        with bp.backpack(DiagHessian(), BatchDiagHessian()):
            loss(extended(x.to(device)), y.to(device)).backward()
        trained = [p for p in extended.parameters() if p.requires_grad]
        for n in range(2):
            expected = dense_diagonal(model, lambda f, y=y[n : n + 1]: (f - y).square().sum(), x[n : n + 1])
            for parameter, e in zip(trained, expected, strict=True):
                assert_close("sample", parameter.diag_h_batch[n], e, 1e-10)
        for parameter in trained:
            assert_close("sum", parameter.diag_h, parameter.diag_h_batch.sum(0).cpu(), 1e-12)


def test_two_losses():
    """Each brings its own gradients to the functions below."""
    trunk, heads = nn.Linear(3, 3).double(), nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]).double()
    x, y = torch.randn(4, 3).double(), torch.randint(2, (4,))

    def outputs(trunk, heads) -> list[Tensor]:
        h = torch.tanh(trunk(x))
        return [head(torch.sigmoid(h)) for head in heads]

    def total(trunk, heads, losses) -> Tensor:
        f, g = outputs(trunk, heads)
        return losses[0](f, y) + 3 * losses[1](g, f.detach())

    losses = [nn.CrossEntropyLoss(), nn.MSELoss()]
    whole = nn.ModuleList([trunk, heads])
    parameters = list(whole.parameters())
    gradients = torch.autograd.grad(total(trunk, heads, losses), parameters, create_graph=True)
    extended = bp.extend(copy.deepcopy(whole))
    with bp.backpack(DiagHessian()):
        total(*extended, [bp.extend(loss) for loss in losses]).backward()
    for parameter, gradient, actual in zip(parameters, gradients, extended.parameters(), strict=True):
        rows = [
            torch.autograd.grad(g, parameter, retain_graph=True)[0].flatten()[i]
            for i, g in enumerate(gradient.flatten())
        ]
        assert_close("diagonal", actual.diag_h, torch.stack(rows).view_as(parameter), 1e-10)


TWICE_DIFFERENTIABLE = {
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, 3.0, 2.0),
    "elu": F.elu,
    "x * x": lambda x: x * x,
    "atan": torch.atan,
}


@named("function", TWICE_DIFFERENTIABLE)
def test_differentiable(function):
    """The diagonal's gradient against triple backward, also where the curvature is zero."""
    model = nn.Sequential(nn.Linear(2, 3), Apply(function), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight[0] = model[0].bias[0] = 0.0
    x, y = torch.randn(3, 2).double(), torch.randint(2, (3,))
    parameters = list(model.parameters())
    weights = [torch.rand_like(p) for p in parameters]
    total = torch.zeros((), dtype=torch.float64)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    for parameter, gradient, weight in zip(parameters, gradients, weights, strict=True):
        for i, g in enumerate(gradient.flatten()):
            row = torch.autograd.grad(g, parameter, create_graph=True)[0]
            total = total + row.flatten()[i] * weight.flatten()[i]
    expected = torch.autograd.grad(total, parameters)

    model, loss = bp.extend(model), bp.extend(nn.CrossEntropyLoss())
    with bp.backpack(DiagHessian()):
        torch.autograd.grad(loss(model(x), y), parameters, create_graph=True)
    total = sum((p.diag_h * weight).sum() for p, weight in zip(parameters, weights, strict=True))
    for name, a, e in zip("ABCD", torch.autograd.grad(total, parameters), expected, strict=True):
        assert_close(name, a, e, 1e-9)


@pytest.mark.parametrize("seed", range(examples(60)))
def test_right_or_refused(seed):
    """Architectures of everything there is: normalisation, attention, gates, recurrence, shared weights."""
    case = random_case(seed)
    model, loss = bp.extend(copy.deepcopy(case.model)), bp.extend(copy.deepcopy(case.loss))
    try:
        with bp.backpack(DiagHessian()):
            loss(model(case.inputs), case.targets).backward()
    except NotImplementedError:
        assert not any(hasattr(p, "diag_h") for p in model.parameters())
        return
    expected = dense_diagonal(case.model, case.loss_of, case.inputs)
    scale = max(e.abs().max().item() for e in expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, e in zip(trained, expected, strict=True):
        if parameter.grad is not None:
            assert_close("diagonal", parameter.diag_h, e, 1e-9, scale)


BACKPACK = {  # what BackPACK knows, and gets right
    "mlp": nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
    "activations": nn.Sequential(
        nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 5), nn.SELU(), nn.Linear(5, 4), nn.LogSigmoid(), nn.Linear(4, 3)
    ),
    "convolutions": nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 2, 2, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
}


@named("model", BACKPACK)
def test_against_backpack(model):
    reference = pytest.importorskip("backpack")
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    if isinstance(model[0], nn.Unflatten):
        model, x = model[1:], x.view(4, 1, 2, 3)
    actual = hessian_diagonals(model, x, y)
    twin, loss = reference.extend(copy.deepcopy(model)), reference.extend(nn.CrossEntropyLoss())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        with reference.backpack(reference.extensions.DiagHessian()):
            loss(twin(x), y).backward()
    for a, parameter in zip(actual, twin.parameters(), strict=True):
        assert_close("diagonal", a, parameter.diag_h.double(), 1e-5)

"""Products with the Hessian, the GGN and the positive-curvature Hessian."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from curvature_tools import BODIES, LOSSES, targets_for
from helpers import assert_close, named
from model_cases import MODELS, ModelCase
from products_oracle import Products, ggn_products, hessian_products, loss_hessian, sandwich_products
from random_models import random_case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backpack_cuda import backpack, extend
from backpack_cuda.curvature import register_loss
from backpack_cuda.extensions import GGNMP, HMP, PCHMP, BatchGrad, DiagGGNExact, DiagHessian

TOLERANCE = 1e-9


def assert_products(
    model: nn.Module, savefield: str, expected: Products, tolerance: float = TOLERANCE, count: int = 3
) -> None:
    """The callables of all trained parameters, for [V, *P] and [*P], against the oracle's."""
    generator = torch.Generator().manual_seed(3)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == expected.keys()
    vectors, references = {}, {}
    for name, p in parameters.items():
        vectors[name] = torch.randn(count, *p.shape, generator=generator, dtype=torch.float64)
        references[name] = torch.stack([expected[name](v) for v in vectors[name]])
    largest = max(r.abs().max().item() for r in references.values())
    for name, p in parameters.items():
        product, mat = getattr(p, savefield), vectors[name].to(p.dtype)
        size = max(references[name].abs().max().item(), 1e-3 * largest)
        together, single = product(mat), product(mat[1])
        assert together.dtype == single.dtype == p.dtype and not together.requires_grad
        assert_close(f"{name}.{savefield}", together, references[name], tolerance, size)
        assert_close(f"{name}.{savefield}, one vector", single, references[name][1], tolerance, size)


def run(model: nn.Module, loss: nn.Module, x: Tensor, targets: Tensor, *extensions, scale: float = 1.0, **options):
    """Extends model and loss in place; one forward and backward pass."""
    with backpack(*extensions):
        (scale * extend(loss)(extend(model)(x), targets)).backward(**options)


def of_targets(loss: nn.Module, targets: Tensor, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda prediction: scale * loss(prediction, targets)


def drop_products(model: nn.Module) -> None:
    """Those that hold the model's graph make a cycle through C++, which nobody would collect."""
    for p in model.parameters():
        for savefield in ("hmp", "ggnmp", "pchmp"):
            delattr(p, savefield)


@pytest.fixture
def math_attention():
    """Attention by operations that torch differentiates twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


# torch does not differentiate the backward pass of nn.EmbeddingBag, and that of a transposed convolution with output
# padding only once, where its weight is tied.
EVERY = {name: case for name, case in MODELS.items() if name not in ("embedding bag", "tied weights of unlike layers")}


@named("case", EVERY)
def test_every_layer(case: ModelCase, math_attention):
    inputs, targets = case.data()
    model, stock, loss = case.stock(), case.stock(), of_targets(case.loss, targets)
    run(model, copy.deepcopy(case.loss), inputs, targets, HMP(), GGNMP())
    assert_products(model, "hmp", hessian_products(stock, loss, inputs))
    assert_products(model, "ggnmp", ggn_products(stock, loss, inputs))
    stock_loss = case.loss(stock(inputs), targets)
    for p, gradient in zip(model.parameters(), torch.autograd.grad(stock_loss, list(stock.parameters())), strict=True):
        assert_close("grad", p.grad, gradient, 1e-12)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: str, body: str):
    torch.manual_seed(0)
    build, shape = BODIES[body]
    model, inputs = build().double(), torch.randn(shape, dtype=torch.float64)
    module, kind = LOSSES[loss]
    targets = targets_for(kind, model(inputs))
    value, stock = of_targets(module, targets, 2.5), copy.deepcopy(model)
    run(model, copy.deepcopy(module), inputs, targets, HMP(), GGNMP(), scale=2.5)
    assert_products(model, "hmp", hessian_products(stock, value, inputs))
    assert_products(model, "ggnmp", ggn_products(stock, value, inputs))


@pytest.mark.parametrize("seed", range(8))
def test_random_models(seed: int, math_attention):
    case = random_case(seed)
    model, stock, loss = case.model, copy.deepcopy(case.model), of_targets(case.loss, case.targets)
    run(model, copy.deepcopy(case.loss), case.inputs, case.targets, HMP(), GGNMP())
    assert_products(model, "hmp", hessian_products(stock, loss, case.inputs), 1e-8)
    assert_products(model, "ggnmp", ggn_products(stock, loss, case.inputs), 1e-8)


# ---- the positive-curvature Hessian


def positive_products(model: nn.Sequential, loss: Callable, inputs: Tensor, modify: str) -> Products:
    """The oracle of `PCHMP` for a chain of layers and elementwise modules."""
    curvatures, x, steps = [], inputs, []
    for module in model:
        y = module(x)
        if not list(module.parameters()) and x.requires_grad and type(module) in ELEMENTWISE:
            steps.append((module, x, y))
        x = y
    curvatures.append((x, loss_hessian(loss, x)))
    for module, x_s, y_s in steps:
        (gradient,) = torch.autograd.grad(loss(x), y_s, retain_graph=True)
        point = x_s.detach().requires_grad_()
        (first,) = torch.autograd.grad(module(point).sum(), point, create_graph=True)
        second = torch.zeros_like(point)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), point)
        residual = second * gradient
        positive = residual.clamp(min=0) if modify == "clip" else residual.abs()
        curvatures.append((x_s, positive.flatten().diag()))
    return sandwich_products(model, curvatures)


ELEMENTWISE = {nn.Sigmoid, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus}
CHAINS = {
    "sigmoid, tanh": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh()), (4, 4)),
    "two in a row": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.SiLU(), nn.Linear(5, 3)), (4, 4)),
    "at the prediction": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 3), nn.Softplus()), (3, 4)),
    "relu": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4, 4)),
    "convolution": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 2, 2), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2, bias=False), nn.Sigmoid()),
            *(nn.Flatten(), nn.Linear(3, 3)),
        ),
        (3, 1, 5, 5),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3).eval(), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
        (3, 2, 4),
    ),
}


@pytest.mark.parametrize("modify", ["clip", "abs"])
@named("chain", CHAINS)
def test_positive_curvature(chain: tuple, modify: str):
    torch.manual_seed(0)
    build, shape = chain
    model, inputs = build().double(), torch.randn(shape, dtype=torch.float64)
    loss, targets = nn.CrossEntropyLoss(), torch.randint(3, shape[:1])
    expected = positive_products(copy.deepcopy(model), of_targets(loss, targets, 3.0), inputs, modify)
    run(model, loss, inputs, targets, PCHMP(modify=modify), scale=3.0)
    assert_products(model, "pchmp", expected)


def test_positive_curvature_is_neither_the_hessian_nor_the_ggn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), GGNMP(), PCHMP(), PCHMP("pch_abs", "abs"))
    weight = model[0].weight
    basis = torch.eye(20, dtype=torch.float64).view(20, 5, 4)
    blocks = {name: getattr(weight, name)(basis).flatten(1) for name in ("hmp", "ggnmp", "pchmp", "pch_abs")}
    smallest = {name: torch.linalg.eigvalsh(block)[0] for name, block in blocks.items()}
    assert smallest["hmp"] < -1e-3 and smallest["pchmp"] > -1e-12 and smallest["pch_abs"] > -1e-12
    # abs(r) = 2 clip(r) - r: |H| - GGN = 2 (PCH - GGN) - (H - GGN)
    combined = 2 * blocks["pchmp"] - blocks["hmp"]
    assert_close("abs", blocks["pch_abs"], combined, 1e-12)
    for name in ("hmp", "ggnmp", "pchmp"):
        torch.testing.assert_close(blocks[name], blocks[name].T)


@pytest.mark.parametrize("seed", range(8))
def test_positive_curvature_of_random_models(seed: int):
    """2 clip(r) - abs(r) = r, so that the same sum of the products is the Hessian's."""
    case = random_case(seed, elementwise_only=True)
    model, stock = case.model, copy.deepcopy(case.model)
    run(model, copy.deepcopy(case.loss), case.inputs, case.targets, PCHMP("clipped"), PCHMP("absolute", "abs"))
    for p in model.parameters():
        if p.requires_grad:
            p.combined = partial(lambda p, v: 2 * p.clipped(v) - p.absolute(v), p)
    expected = hessian_products(stock, of_targets(case.loss, case.targets), case.inputs)
    assert_products(model, "combined", expected, 1e-8)


def test_positive_curvature_names_what_it_does_not_know():
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2)), torch.randn(5, 3)
    with pytest.raises(NotImplementedError, match="no positive-curvature Hessian.*softmax.*GGNMP allows it"):
        run(model, nn.MSELoss(), inputs, torch.randn(5, 2), PCHMP())
    assert not hasattr(model[0].weight, "pchmp")
    case = MODELS["lstm"]
    with pytest.raises(NotImplementedError, match="no positive-curvature Hessian"):
        run(case.stock(), nn.CrossEntropyLoss(), *case.data(), PCHMP())
    case = MODELS["tied weights"]
    with pytest.raises(NotImplementedError, match="no positive-curvature Hessian of Linear.weight: it is used again"):
        run(case.stock(), nn.CrossEntropyLoss(), *case.data(), PCHMP())


def test_positive_curvature_needs_a_convex_loss():
    model, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ValueError, match="non-negative factor"):
        run(model, nn.MSELoss(), inputs, targets, PCHMP(), scale=-1.0)
    factor = torch.tensor(-1.0, requires_grad=True)  # whose value is not looked at
    value = factor * extend(nn.MSELoss())(extend(model)(inputs), targets)
    with backpack(HMP(), GGNMP(), PCHMP()):
        torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    assert model.bias.pchmp(torch.ones(2)).isnan().all() and (model.bias.ggnmp(torch.ones(2)) < 0).all()
    drop_products(model)
    with pytest.raises(ValueError, match="modify: expected one of clip, abs, got 'square'"):
        PCHMP(modify="square")


# ---- what they are products of


def small(*shape: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A model with its inputs [*shape, 4] and targets of three classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(*shape, 4, dtype=torch.float64), torch.randint(3, shape)


def test_a_factor_may_be_negative():
    model, inputs, targets = small(5)
    stock, loss = copy.deepcopy(model), nn.CrossEntropyLoss()
    run(model, loss, inputs, targets, HMP(), GGNMP(), scale=-2.0)
    assert_products(model, "hmp", hessian_products(stock, of_targets(nn.CrossEntropyLoss(), targets, -2.0), inputs))
    assert_products(model, "ggnmp", ggn_products(stock, of_targets(nn.CrossEntropyLoss(), targets, -2.0), inputs))


@named("loss", {"huber": nn.HuberLoss(), "l1": nn.L1Loss(), "smooth": nn.SmoothL1Loss(reduction="sum")})
def test_hessian_of_any_loss(loss: nn.Module):
    model, inputs, _ = small(5)
    targets = torch.randn(5, 3, dtype=torch.float64)
    stock = copy.deepcopy(model)
    run(model, copy.deepcopy(loss), inputs, targets, HMP())
    assert_products(model, "hmp", hessian_products(stock, of_targets(loss, targets), inputs))
    with pytest.raises(NotImplementedError, match="no Hessian is known for the loss"):
        run(model, copy.deepcopy(loss), inputs, targets, GGNMP())


class Quartic(nn.Module):
    """Mean of fourth powers."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).pow(4).sum()


def test_registered_loss():
    def root(module: nn.Module, prediction: Tensor, target: Tensor) -> Tensor:
        return ((prediction - target).abs() * 12**0.5).T.unsqueeze(2) * torch.eye(3).double()[:, None]

    register_loss(Quartic, root)
    model, inputs, _ = small(5)
    targets, stock = torch.randn(5, 3, dtype=torch.float64), copy.deepcopy(model)
    run(model, Quartic(), inputs, targets, HMP(), GGNMP())
    assert_products(model, "hmp", hessian_products(stock, of_targets(Quartic(), targets), inputs))
    assert_products(model, "ggnmp", ggn_products(stock, of_targets(Quartic(), targets), inputs))


def test_several_losses_add_up():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classes, self.values = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.tanh(self.body(x))
            return self.classes(x), self.values(torch.sin(x))

    torch.manual_seed(0)
    model = Heads().double()
    inputs, labels = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    numbers, stock = torch.randn(5, 2, dtype=torch.float64), copy.deepcopy(model)
    ce, mse = extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    extend(model)
    classes, values = model(inputs)
    with backpack(HMP(), GGNMP()):
        (ce(classes, labels) + 0.5 * mse(values, numbers)).backward()

    def total(prediction: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(prediction[0], labels) + 0.5 * F.mse_loss(prediction[1], numbers)

    assert_products(model, "hmp", hessian_products(stock, total, inputs))
    both = stock(inputs)
    expected = sandwich_products(
        stock,
        [
            (both[0], loss_hessian(of_targets(nn.CrossEntropyLoss(), labels), both[0])),
            (both[1], loss_hessian(of_targets(nn.MSELoss(), numbers, 0.5), both[1])),
        ],
    )
    assert_products(model, "ggnmp", expected)


@pytest.mark.parametrize("dimensions", [0, 1, 2])
def test_batch_norm_in_train_mode(dimensions: int):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5) if dimensions == 2 else nn.BatchNorm1d(5)
    layers = [nn.Linear(4, 5), nn.Conv1d(2, 5, 2), nn.Conv2d(2, 5, 2)][dimensions]
    shape = [(6, 4), (6, 2, 3), (6, 2, 3, 3)][dimensions]
    model = nn.Sequential(layers, norm, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(shape))
    model.double()
    with torch.no_grad():
        norm.weight.normal_()
    inputs, targets = torch.randn(shape, dtype=torch.float64), torch.randint(3, (6,))
    stock, loss = copy.deepcopy(model), of_targets(nn.CrossEntropyLoss(), targets)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), GGNMP())
    assert_products(model, "hmp", hessian_products(stock, loss, inputs))
    assert_products(model, "ggnmp", ggn_products(stock, loss, inputs))
    with pytest.raises(NotImplementedError, match="train"):
        run(model, nn.CrossEntropyLoss(), inputs, targets, PCHMP())


def test_frozen_parameters_and_inputs():
    model, inputs, targets = small(5)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    stock, loss = copy.deepcopy(model), of_targets(nn.CrossEntropyLoss(), targets)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), GGNMP())
    assert_products(model, "hmp", hessian_products(stock, loss, inputs))
    assert_products(model, "ggnmp", ggn_products(stock, loss, inputs))
    assert not hasattr(model[0].weight, "hmp")
    model, inputs, targets = small(5)
    stock = copy.deepcopy(model)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), inputs=[model[2].weight, model[0].bias])
    expected = hessian_products(stock, loss, inputs)
    assert_close("hmp", model[0].bias.hmp(torch.ones(5).double()), expected["0.bias"](torch.ones(5).double()), 1e-12)
    assert hasattr(model[2].weight, "hmp")
    assert not hasattr(model[0].weight, "hmp") and not hasattr(model[2].bias, "hmp")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_sample_none_and_no_batch_dimension(reduction: str):
    for shape in ((1,), (0,), ()):
        model, inputs, _ = small(*shape)
        targets = torch.randn(*shape, 3, dtype=torch.float64)
        stock, loss = copy.deepcopy(model), nn.MSELoss(reduction=reduction)
        run(model, copy.deepcopy(loss), inputs, targets, HMP(), GGNMP(), PCHMP())
        if shape == (0,):
            for p in model.parameters():
                for savefield in ("hmp", "ggnmp", "pchmp"):
                    assert (
                        torch.count_nonzero(getattr(p, savefield)(torch.ones(2, *p.shape).double()).nan_to_num()) == 0
                    )
            continue
        assert_products(model, "hmp", hessian_products(stock, of_targets(loss, targets), inputs))
        assert_products(model, "ggnmp", ggn_products(stock, of_targets(loss, targets), inputs))


def test_a_confident_softmax_does_not_cancel():
    """1 - p is 1e-9 here: its Hessian is of that size, and right to single precision."""
    model = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[21.0, 0.0], [0.0, 0.2], [0.1, 0.0]]))
    inputs, targets = torch.tensor([[1.0, 0.5]]), torch.tensor([0])
    stock = copy.deepcopy(model).double()
    run(model, nn.CrossEntropyLoss(), inputs, targets, GGNMP())
    loss = of_targets(nn.CrossEntropyLoss(), targets)
    assert_products(model, "ggnmp", ggn_products(stock, loss, inputs.double()), 1e-5)


# ---- beside other quantities, and in other types


def test_beside_other_quantities():
    model, inputs, targets = small(5)
    run(model, nn.CrossEntropyLoss(), inputs, targets, BatchGrad(), DiagGGNExact(), DiagHessian(), HMP(), GGNMP())
    for p in model.parameters():
        basis = torch.eye(p.numel(), dtype=torch.float64).view(-1, *p.shape)
        assert_close("diag", p.ggnmp(basis).flatten(1).diagonal().view_as(p), p.diag_ggn_exact, 1e-12)
        assert_close("diag", p.hmp(basis).flatten(1).diagonal().view_as(p), p.diag_h, 1e-9)
        assert_close("grad", p.grad_batch.sum(0), p.grad, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision(dtype: torch.dtype):
    model, inputs, targets = small(5)
    stock, tolerance = copy.deepcopy(model), {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    run(model.to(dtype), nn.CrossEntropyLoss(), inputs.to(dtype), targets, HMP(), GGNMP(), PCHMP())
    loss = of_targets(nn.CrossEntropyLoss(), targets)
    assert_products(model, "hmp", hessian_products(stock, loss, inputs), tolerance)
    assert_products(model, "ggnmp", ggn_products(stock, loss, inputs), tolerance)
    assert_products(model, "pchmp", positive_products(stock, loss, inputs, "clip"), tolerance)


def test_autocast():
    model, inputs, targets = small(5)
    stock = copy.deepcopy(model)
    model, single = model.float(), inputs.float()
    with torch.autocast("cpu", torch.bfloat16):
        value = extend(nn.CrossEntropyLoss())(extend(model)(single), targets)
    with backpack(HMP(), GGNMP(), PCHMP()):
        value.backward()
    loss = of_targets(nn.CrossEntropyLoss(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert_products(model, "hmp", hessian_products(stock, loss, inputs), 0.1)
        assert_products(model, "ggnmp", ggn_products(stock, loss, inputs), 0.1)
        assert_products(model, "pchmp", positive_products(stock, loss, inputs, "clip"), 0.1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool):
    model, inputs, targets = small(5)
    stock, loss = copy.deepcopy(model), of_targets(nn.CrossEntropyLoss(), targets)
    extend(model)
    prediction = torch.utils.checkpoint.checkpoint(model, inputs.requires_grad_(), use_reentrant=use_reentrant)
    value = extend(nn.CrossEntropyLoss())(prediction, targets)
    with backpack(HMP(), GGNMP(), PCHMP()):
        if use_reentrant:
            with pytest.raises(NotImplementedError, match="use_reentrant=False"):
                value.backward()
            return
        value.backward()
    assert_products(model, "hmp", hessian_products(stock, loss, inputs))
    assert_products(model, "ggnmp", ggn_products(stock, loss, inputs))
    assert_products(model, "pchmp", positive_products(stock, loss, inputs.detach(), "clip"))
    (gradient,) = torch.autograd.grad(loss(stock(inputs)), stock[0].weight)
    assert_close("grad", model[0].weight.grad, gradient, 1e-12)
    drop_products(model)


def test_functions_that_torch_differentiates_once():
    case = MODELS["attention"]
    inputs, targets = case.data()
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.raises(NotImplementedError, match=r"attention.*SDPBackend.MATH"),
    ):
        run(case.stock(), nn.CrossEntropyLoss(), inputs, targets, HMP())


def test_weight_norm():
    """torch's double backward of it leaves out terms: gradgradcheck fails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    stock, loss = copy.deepcopy(model), of_targets(nn.CrossEntropyLoss(), targets)
    run(model, nn.CrossEntropyLoss(), inputs, targets, GGNMP())
    assert_products(model, "ggnmp", ggn_products(stock, loss, inputs))
    with pytest.raises(NotImplementedError, match="weight normalisation are wrong"):
        run(model, nn.CrossEntropyLoss(), inputs, targets, HMP())
    v = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    g = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.gradgradcheck(torch._weight_norm, (v, g), raise_exception=False)  # else allow it


def test_embedding_bag():
    case = MODELS["embedding bag"]
    model, (inputs, targets) = case.stock(), case.data()
    with pytest.raises(NotImplementedError, match="backward pass of _embedding_bag; replace it .* or freeze"):
        run(model, nn.CrossEntropyLoss(), inputs, targets, HMP())
    model[0].weight.requires_grad_(False)
    stock, loss = copy.deepcopy(model), of_targets(nn.CrossEntropyLoss(), targets)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP())
    assert_products(model, "hmp", hessian_products(stock, loss, inputs))


@named("build", {"sigmoid": nn.Sigmoid, "relu": lambda: nn.ReLU(inplace=True), "elu": lambda: nn.ELU(inplace=True)})
def test_changes_in_place(build: Callable):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.activation = build()

        def forward(self, x: Tensor) -> Tensor:
            x = self.activation(self.first(x))
            y = self.second(x)
            y += x
            y[:, :2] *= 2.0
            return self.out(y.tanh_())

    torch.manual_seed(0)
    model = Model().double()
    inputs, targets = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    stock, loss = copy.deepcopy(model), of_targets(nn.CrossEntropyLoss(), targets)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), GGNMP())
    assert_products(model, "hmp", hessian_products(stock, loss, inputs))
    assert_products(model, "ggnmp", ggn_products(stock, loss, inputs))


# ---- life


def test_differentiable_products():
    model, inputs, targets = small(5)
    stock, loss = copy.deepcopy(model), of_targets(nn.CrossEntropyLoss(), targets)
    value = extend(nn.CrossEntropyLoss())(extend(model)(inputs), targets)
    with backpack(HMP(), GGNMP(), PCHMP()):
        grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    weight, v = model[0].weight, torch.randn(5, 4, dtype=torch.float64)
    for savefield in ("hmp", "ggnmp", "pchmp"):
        product = getattr(weight, savefield)(v)
        assert product.requires_grad
        third = torch.autograd.grad((product * v).sum(), list(model.parameters()), retain_graph=True)
        for name, found in zip(dict(model.named_parameters()), third, strict=True):
            step, parts = 1e-5, []
            for sign in (1, -1):
                shifted = copy.deepcopy(stock)
                with torch.no_grad():
                    shifted.get_parameter(name).view(-1)[0] += sign * step
                of = {
                    "hmp": lambda m: hessian_products(m, loss, inputs),
                    "ggnmp": lambda m: ggn_products(m, loss, inputs),
                    "pchmp": lambda m: positive_products(m, loss, inputs, "clip"),
                }[savefield](shifted)
                parts.append((of["0.weight"](v) * v).sum())
            assert abs((parts[0] - parts[1]) / (2 * step) - found.view(-1)[0]) < 1e-6, (savefield, name)
    assert all(g.requires_grad for g in grads)
    drop_products(model)


def test_products_of_vectors_that_need_a_gradient():
    model, inputs, targets = small(5)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), GGNMP())
    for p in model.parameters():
        for product in (p.hmp, p.ggnmp):
            v = torch.randn(2, *p.shape, dtype=torch.float64, requires_grad=True)
            w = torch.randn(2, *p.shape, dtype=torch.float64)
            (gradient,) = torch.autograd.grad((product(v) * w).sum(), v)
            assert_close("symmetric", gradient, product(w), 1e-12)


def test_later_forwards_and_steps_change_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3).eval(), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
    ).double()
    inputs, targets = torch.randn(4, 2, 4, dtype=torch.float64), torch.randint(3, (4,))
    extend(model)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), GGNMP(), PCHMP())
    vectors = [torch.randn(2, *p.shape, dtype=torch.float64) for p in model.parameters()]

    def products() -> list[Tensor]:
        fields = ("hmp", "ggnmp", "pchmp")
        return [getattr(p, f)(v) for p, v in zip(model.parameters(), vectors, strict=True) for f in fields]

    before = products()
    model(torch.randn_like(inputs))
    torch.optim.SGD(model.parameters(), 1.0).step()
    for p in model.parameters():
        p.data.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, products(), strict=True))
    model.train()(torch.randn_like(inputs))  # changes the running statistics
    assert all(torch.equal(a, b) for a, b in zip(before, products(), strict=True))


def test_an_input_that_was_changed_in_place_is_an_error():
    model, inputs, targets = small(5)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), GGNMP())
    inputs.add_(1.0)
    for product in (model[0].weight.hmp, model[0].weight.ggnmp):
        for mat in (torch.ones(5, 4).double(), torch.ones(2, 5, 4).double()):
            with pytest.raises(RuntimeError, match=r"size \[5, 4\] that it needs was changed in place"):
                product(mat)


def test_several_backward_passes_through_one_graph():
    model, inputs, targets = small(5)
    stock, loss = copy.deepcopy(model), of_targets(nn.CrossEntropyLoss(), targets)
    value = extend(nn.CrossEntropyLoss())(extend(model)(inputs), targets)
    for retain_graph in (True, False):
        with backpack(HMP(), PCHMP()):
            value.backward(retain_graph=retain_graph)
        assert_products(model, "hmp", hessian_products(stock, loss, inputs))
        assert_products(model, "pchmp", positive_products(stock, loss, inputs, "clip"))


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_memory():
    model, inputs, targets = small(5)
    counts, kept = [], []
    for _ in range(3):
        run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), GGNMP(), PCHMP())
        kept[:] = [weakref.ref(p.hmp) for p in model.parameters()]
        counts.append(live_tensors())
    assert len(set(counts[1:])) == 1
    for p in model.parameters():
        del p.hmp, p.ggnmp, p.pchmp
    assert all(reference() is None for reference in kept)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP(), GGNMP(), PCHMP())
    parameters = [weakref.ref(p) for p in model.parameters()]
    del model, p
    gc.collect()
    assert all(reference() is None for reference in parameters)  # although the products hang on them


def test_copies_and_files():
    model, inputs, targets = small(5)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP())
    loaded = pickle.loads(pickle.dumps(model))
    with pytest.raises(RuntimeError, match="not copied or saved"):
        loaded[0].weight.hmp(torch.ones(5, 4).double())
    copied = copy.deepcopy(model)
    assert not hasattr(copied[0].weight, "hmp")
    assert model[0].weight.hmp(torch.ones(5, 4).double()).shape == (5, 4)


def test_arguments():
    model, inputs, targets = small(5)
    run(model, nn.CrossEntropyLoss(), inputs, targets, HMP("products"), GGNMP(savefield="ggn"))
    product = model[0].weight.products
    assert "savefield='products'" in repr(product) and model[0].weight.ggn is not product
    with pytest.raises(TypeError, match="expected a Tensor, got list"):
        product([1.0])
    with pytest.raises(ValueError, match=r"\[V, \*P\] or \[\*P\] with P = \[5, 4\], got \[4, 5\]"):
        product(torch.ones(4, 5).double())
    with pytest.raises(ValueError, match="float64 on cpu, got torch.float32"):
        product(torch.ones(5, 4))
    assert product(torch.ones(0, 5, 4).double()).shape == (0, 5, 4)
    transposed = torch.randn(2, 4, 5, dtype=torch.float64).mT  # not contiguous
    assert_close("strides", product(transposed), product(transposed.contiguous()), 1e-14)
    with torch.inference_mode():
        assert_close("inference", product(torch.ones(5, 4).double()), product(torch.ones(1, 5, 4).double())[0], 1e-14)


def test_a_loss_that_was_not_extended():
    model, inputs, targets = small(5)
    with backpack(HMP()), pytest.raises(RuntimeError, match=r"call extend\(loss_function\)"):
        F.cross_entropy(extend(model)(inputs), targets).backward()
    with pytest.raises(ValueError, match="output must be scalar"), backpack(HMP()):
        extend(nn.MSELoss(reduction="none"))(extend(model)(inputs), torch.randn(5, 3)).backward(torch.ones(5, 3))


@pytest.mark.parametrize("extension", [HMP, GGNMP, PCHMP])
def test_no_parameter_is_reached(extension: type):
    """A model that is not extended, a frozen one, and a backward pass for its inputs alone: the error says so."""
    for extended, frozen in ((False, False), (True, True), (True, False)):
        model, inputs, targets = small(5)
        model, loss_function = extend(model) if extended else model, extend(nn.CrossEntropyLoss())
        model.requires_grad_(not frozen)
        inputs.requires_grad_()
        loss = loss_function(model(inputs), targets)
        with backpack(extension()), pytest.raises(RuntimeError, match=r"call extend\(model\).*not frozen"):
            loss.backward(inputs=[inputs] if extended else None)


def test_hooks_and_retained_gradients():
    """The model's own hooks see one gradient, and extension hooks run once per module, with the products there."""
    model, inputs, targets = small(5)
    seen, visited = [], []
    extend(model)
    prediction = model(inputs)
    prediction.retain_grad()
    value = extend(nn.CrossEntropyLoss())(prediction, targets)

    def hook(module: nn.Module) -> None:
        visited.append(type(module).__name__)
        seen.extend(hasattr(p, "hmp") for p in module.parameters())

    with backpack(HMP(), GGNMP(), extension_hook=hook):
        value.backward()
    assert visited.count("Linear") == 2 and all(seen)
    plain = copy.deepcopy(model)
    f = plain(inputs)
    assert_close("prediction", prediction.grad, torch.autograd.grad(F.cross_entropy(f, targets), f)[0], 1e-12)

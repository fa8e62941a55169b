"""How passes with second-order quantities are started, combined and interrupted, and what is refused."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from curvature_oracle import Curvature, curvature, hessian_diagonals, outputs_of, trained
from curvature_tools import (
    EXACT,
    SECOND_ORDER,
    assert_exact_ggn,
    assert_nothing_saved,
    assert_same,
    backward,
    saved,
)
from helpers import assert_close, named, some
from model_cases import MODELS, SAVED, all_extensions, assert_quantities, mlp
from random_models import random_case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from backpack_cuda import CTX, backpack, disable, extend
from backpack_cuda.extensions import (
    GGNMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
)

PLAIN = MODELS["mlp"]
SEVERAL = some(MODELS, "mlp", "cnn", "shared modules", "tied weights", "layer norm", "recurrent use")


def exact_extensions():
    return [make() for make in EXACT.values()]


def prepare(case, device):
    """(model, extended loss, inputs, targets, expected curvature) of a case."""
    inputs, targets = case.data()
    expected = curvature(case.stock(), lambda outputs: case.loss(outputs, targets), inputs)
    return case.prepared().to(device), extend(copy.deepcopy(case.loss)), inputs.to(device), targets.to(device), expected


def added(first: Curvature, second: Curvature, factor: float = 1.0) -> Curvature:
    """The curvature of l_1 + factor * l_2, as that of one loss of both outputs."""
    names = first.jacobian | second.jacobian
    jacobian = {
        name: torch.cat([c.jacobian.get(name, other_zeros(c, names[name])) for c in (first, second)], 1)
        for name in names
    }
    rows = [torch.block_diag(a, factor * b) for a, b in zip(first.hessian, second.hessian, strict=True)]
    return Curvature(jacobian, torch.stack(rows))


def other_zeros(c: Curvature, like: Tensor) -> Tensor:
    return like.new_zeros(len(c.hessian), c.hessian.shape[1], *like.shape[2:])


# ---------------------------------------------------------------------------------------------------------------------
# Starting a pass
# ---------------------------------------------------------------------------------------------------------------------


@named("case", SEVERAL)
def test_autograd_grad(case, device):
    """torch.autograd.grad forms quantities too, and leaves `.grad` alone."""
    model, loss, inputs, targets, expected = prepare(case, device)
    with backpack(*exact_extensions()):
        torch.autograd.grad(loss(model(inputs), targets), list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert_exact_ggn(model, expected)


def test_gradients_of_some_parameters(device):
    """Quantities of the parameters that the backward pass differentiates, and no wrong others."""
    for chosen in (["4.weight"], ["0.weight", "2.bias"], ["2.weight", "2.bias"]):
        for start in (
            lambda value, some: torch.autograd.grad(value, some),
            lambda value, some: value.backward(inputs=some),
        ):
            model, loss, inputs, targets, expected = prepare(PLAIN, device)
            parameters = dict(model.named_parameters())
            with backpack(DiagGGNExact()):
                start(loss(model(inputs), targets), [parameters[name] for name in chosen])
            for name, parameter in parameters.items():
                if name in chosen or hasattr(parameter, "diag_ggn_exact"):
                    assert_close(name, parameter.diag_ggn_exact, expected.diag(name), 1e-9)


@named("case", SEVERAL)
def test_backward_twice_through_one_graph(case, device):
    """retain_graph=True: the second pass gives the same again."""
    model, loss, inputs, targets, expected = prepare(case, device)
    value = loss(model(inputs), targets)
    for _ in range(2):
        with backpack(*exact_extensions(), KFLR(fail_mode="SILENT"), retain_graph=True):
            value.backward(retain_graph=True)
        assert_exact_ggn(model, expected)
        for parameter in model.parameters():
            for name in (*EXACT, "kflr"):
                parameter.__dict__.pop(name, None)


def test_results_are_overwritten(device):
    """Nothing accumulates, with the same extension objects and batches of changing size."""
    extensions = [*exact_extensions(), KFLR()]
    model, loss = PLAIN.prepared().to(device), extend(copy.deepcopy(PLAIN.loss))
    for samples in (4, 1, 6):
        inputs, targets = PLAIN.data(samples)
        expected = curvature(PLAIN.stock(), lambda f, y=targets: PLAIN.loss(f, y), inputs)
        with backpack(*extensions):
            loss(model(inputs.to(device)), targets.to(device)).backward()
        assert_exact_ggn(model, expected)


def test_only_the_backward_pass_needs_the_context(device):
    model, loss, inputs, targets, expected = prepare(PLAIN, device)
    value = loss(model(inputs), targets)
    with backpack(*exact_extensions()):
        value.backward()
    assert_exact_ggn(model, expected)
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    with backpack(*exact_extensions()):
        value = loss(model(inputs), targets)
    value.backward()
    assert_nothing_saved(model)


def test_forward_under_no_grad_inside_the_context(device):
    """Evaluating the loss without a graph, between steps, is nothing special."""
    model, loss, inputs, targets, expected = prepare(PLAIN, device)
    with backpack(*exact_extensions()):
        with torch.no_grad():
            loss(model(inputs[:2]), targets[:2])
        with torch.inference_mode():
            loss(model(inputs[:1]), targets[:1])
        loss(model(inputs[:2]), targets[:2])  # and a graph that is dropped
        loss(model(inputs), targets).backward()
    assert_exact_ggn(model, expected)


@named("case", some(MODELS, "mlp", "tied weights", "layer norm"))
def test_frozen_parameters(case, device):
    """Nothing on frozen parameters, and what lies before them is still reached."""
    for frozen in ([0], [1, 2], [0, 1]):
        inputs, targets = case.data()
        stock, model = case.stock(), case.prepared().to(device)
        for one in (stock, model):
            for i, parameter in enumerate(one.parameters()):
                parameter.requires_grad_(i not in frozen)
        expected = curvature(stock, lambda f, y=targets: case.loss(f, y), inputs)
        backward(model, copy.deepcopy(case.loss), inputs.to(device), targets.to(device), *exact_extensions())
        assert_exact_ggn(model, expected)
        for parameter in model.parameters():
            assert parameter.requires_grad or not hasattr(parameter, "diag_ggn_exact")


def test_frozen_model_below_a_trained_head(device):
    """The usual last-layer setting: features under no_grad."""
    model, loss, inputs, targets, expected = prepare(PLAIN, device)
    with torch.no_grad():
        features = model[:4](inputs)
    with backpack(*exact_extensions(), KFLR(), DiagHessian()):
        loss(model[4](features), targets).backward()
    for name in ("4.weight", "4.bias"):
        parameter = model.get_parameter(name)
        assert_close(name, parameter.diag_ggn_exact, expected.diag(name), 1e-9)
        assert_close(name, parameter.diag_h, expected.diag(name), 1e-9)
    assert_nothing_saved(model[:4])


# ---------------------------------------------------------------------------------------------------------------------
# Several losses, several graphs
# ---------------------------------------------------------------------------------------------------------------------


@named("case", SEVERAL)
def test_two_losses_of_one_backward_pass(case, device):
    """l = l_1(f) + 3 l_2(f'): the sum of both matrices; the columns of both square roots."""
    model, loss, inputs, targets, first = prepare(case, device)
    others = inputs.flip(0) * 0.5
    second = curvature(case.stock(), lambda outputs: case.loss(outputs, targets.cpu()), others.cpu())
    with backpack(*exact_extensions()):
        (loss(model(inputs), targets) + 3 * loss(model(others), targets)).backward()
    assert_exact_ggn(model, added(first, second, 3.0))


def test_two_losses_of_batches_of_different_size(device):
    """Sums over the samples add up; results per sample do not belong together."""
    model, loss, inputs, targets, first = prepare(PLAIN, device)
    few, their_targets = inputs[:1] * 0.5, targets[:1]
    second = curvature(PLAIN.stock(), lambda f: PLAIN.loss(f, their_targets.cpu()), few.cpu())
    with backpack(DiagGGNExact()):
        (loss(model(inputs), targets) + loss(model(few), their_targets)).backward()
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.diag_ggn_exact, first.diag(name) + second.diag(name), 1e-9)
        del parameter.diag_ggn_exact
    for make in (BatchDiagGGNExact, SqrtGGNExact):
        with backpack(DiagGGNExact(), make()), pytest.raises(ValueError, match="samples|batch size"):
            (loss(model(inputs), targets) + loss(model(few), their_targets)).backward()
        assert_nothing_saved(model)


def test_two_kinds_of_losses(device):
    """Two heads, cross-entropy and MSE, each with its own extended loss."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classes, self.values = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.body(x))
            return torch.cat([self.classes(x), self.values(x)], 1)

    stock, inputs = Heads().double(), torch.randn(4, 4, dtype=torch.float64)
    classes, values = torch.randint(3, (4,)), torch.randn(4, 2, dtype=torch.float64)

    def total(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, :3], classes) + 0.1 * F.mse_loss(outputs[:, 3:], values)

    expected = curvature(stock, total, inputs)
    hessian = hessian_diagonals(stock, total, inputs)
    model, entropy, square = extend(stock).to(device), extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    outputs = model(inputs.to(device))
    with backpack(*exact_extensions(), DiagHessian(), KFLR()):
        value = entropy(outputs[:, :3], classes.to(device)) + 0.1 * square(outputs[:, 3:], values.to(device))
        value.backward()
    assert_exact_ggn(model, expected)
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.diag_h, hessian[name].sum(0), 1e-9)
        if parameter.dim() == 1:  # the block of a Linear layer's bias
            assert_close(name, parameter.kflr[0], expected.blocks(name).sum(0), 1e-9)


def test_two_graphs_two_backwards(device):
    """Two losses, each with its own backward pass: the quantities of the last one, unmixed."""
    model, loss, inputs, targets, expected = prepare(PLAIN, device)
    first, second = loss(model(inputs[:2]), targets[:2]), loss(model(inputs), targets)
    with backpack(*exact_extensions()):
        first.backward()
        second.backward()
    assert_exact_ggn(model, expected)


def test_a_regulariser_does_not_enter(device):
    """A penalty on the weights is no curvature of the loss module, as with BackPACK."""
    model, loss, inputs, targets, expected = prepare(PLAIN, device)
    penalty = sum(p.square().sum() for p in model.parameters())
    with backpack(*exact_extensions()):
        (loss(model(inputs), targets) + 0.1 * penalty).backward()
    assert_exact_ggn(model, expected)


def test_the_factor_of_a_loss_may_come_late(device):
    """Division for gradient accumulation, and a gradient handed to backward()."""
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    expected = curvature(PLAIN.stock(), lambda f: PLAIN.loss(f, targets.cpu()) / 8, inputs.cpu())
    with backpack(*exact_extensions()):
        (loss(model(inputs), targets) / 2).backward(torch.tensor(0.25, dtype=torch.float64, device=device))
    assert_exact_ggn(model, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Whole-batch shapes
# ---------------------------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Logits [N, T, C] of token embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.out = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.out(torch.tanh(self.mix(x) + x.mean(1, keepdim=True)))


FLATTENINGS = {
    "flatten": lambda f: f.flatten(0, 1),
    "view": lambda f: f.view(-1, f.shape[-1]),
    "reshape": lambda f: f.reshape(-1, 5),
}


@named("flattened", FLATTENINGS)
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "ignored"])
def test_flattened_logits(flattened, ignored, device):
    """The loss sees [N T, C], the layers [N, T, ...]: one block per sample, exact with all positions' interactions."""
    stock, tokens = LanguageModel().double(), torch.randint(6, (3, 4))
    targets = torch.randint(5, (12,))
    if ignored:
        targets[[0, 5, 6]] = -100
    expected = curvature(stock, lambda f: F.cross_entropy(f.flatten(0, 1), targets), tokens)
    model, loss = extend(stock).to(device), extend(nn.CrossEntropyLoss())
    with backpack(*exact_extensions(), DiagGGNMC(400), KFLR(fail_mode="SILENT")):
        loss(flattened(model(tokens.to(device))), targets.to(device)).backward()
    assert_exact_ggn(model, expected)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "diag_ggn_mc"):
            assert_close(name, parameter.diag_ggn_mc, expected.diag(name), 0.5)


def test_the_hessian_of_flattened_logits(device):
    """With a linear mixture of positions in between, which the Hessian's diagonal may pass."""
    stock, inputs = nn.Sequential(nn.Linear(3, 4), Positions(), nn.Linear(4, 5)).double(), torch.randn(3, 4, 3).double()
    targets = torch.randint(5, (12,))
    expected = hessian_diagonals(stock, lambda f: F.cross_entropy(f.flatten(0, 1), targets), inputs)
    model, loss = extend(stock).to(device), extend(nn.CrossEntropyLoss())
    with backpack(DiagHessian()):
        loss(model(inputs.to(device)).flatten(0, 1), targets.to(device)).backward()
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.diag_h, expected[name].sum(0), 1e-9)


@pytest.mark.parametrize("samples", [1, 3])
def test_flattened_logits_where_normalisations_alone_are_trained(samples, device):
    """No layer with a rule tells how many samples there are."""
    stock = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), Positions(), nn.LayerNorm(4), nn.Linear(4, 5)).double()
    for layer in (stock[0], stock[4]):
        layer.requires_grad_(False)
    inputs, targets = torch.randn(samples, 4, 3).double(), torch.randint(5, (4 * samples,))
    expected = curvature(stock, lambda f: F.cross_entropy(f.flatten(0, 1), targets), inputs)
    model, loss = extend(stock).to(device), extend(nn.CrossEntropyLoss())
    with backpack(*exact_extensions()):
        loss(model(inputs.to(device)).flatten(0, 1), targets.to(device)).backward()
    assert_exact_ggn(model, expected)


class Positions(nn.Module):
    """Sigmoid, and the mean over the positions added to each."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        return x + x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    "flattened", [lambda f: f.transpose(0, 1).flatten(0, 1), lambda f: f.flatten(0, 1).flip(0)], ids=["t-major", "flip"]
)
def test_logits_flattened_in_another_order(flattened, device):
    """Which rows belong to which sample is not the batch's order: refused, not guessed."""
    model, loss = extend(LanguageModel()).to(device), extend(nn.CrossEntropyLoss())
    tokens, targets = torch.randint(6, (3, 4), device=device), torch.randint(5, (12,), device=device)
    with backpack(DiagGGNExact()), pytest.raises((ValueError, NotImplementedError), match="sample"):
        loss(flattened(model(tokens)), targets).backward()
    assert_nothing_saved(model)


@pytest.mark.parametrize("shift", [slice(None, -1), slice(1, None), slice(1, 3)], ids=str)
def test_logits_of_some_positions(shift, device):
    """Next-token prediction: logits[:, :-1] against tokens[:, 1:]."""
    stock, tokens = LanguageModel().double(), torch.randint(5, (3, 4))
    targets = torch.randint(5, (3, 4))[:, shift]
    expected = curvature(stock, lambda f: F.cross_entropy(f[:, shift].flatten(0, 1), targets.flatten()), tokens)
    model, loss = extend(stock).to(device), extend(nn.CrossEntropyLoss())
    with backpack(*exact_extensions()):
        loss(model(tokens.to(device))[:, shift].flatten(0, 1), targets.to(device).flatten()).backward()
    assert_exact_ggn(model, expected)


class InnerFlattening(nn.Module):
    """Folds positions into the batch inside the model, as vision models do with patches."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, 4]
        return self.out(torch.tanh(self.inner(x.flatten(0, 1))).view(len(x), -1))


def test_positions_folded_into_the_batch_inside(device):
    """The layer's dimension 0 is no longer the samples: right, or refused."""
    stock, inputs, targets = InnerFlattening().double(), torch.randn(3, 2, 4).double(), torch.randint(3, (3,))
    expected = curvature(stock, lambda f: F.cross_entropy(f, targets), inputs)
    model, loss = extend(stock).to(device), extend(nn.CrossEntropyLoss())
    with backpack(*exact_extensions()):
        try:
            loss(model(inputs.to(device)), targets.to(device)).backward()
        except (ValueError, NotImplementedError):
            assert_nothing_saved(model)
        else:
            assert_exact_ggn(model, expected)


class Between(nn.Module):
    """A function between two Linear layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function, self.last = nn.Linear(4, 4), function, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(torch.tanh(self.first(x))))


MIXING = {
    "batch mean": lambda x: x - x.mean(0),
    "softmax over the batch": lambda x: x.softmax(0),
    "Gram matrix": lambda x: x @ x.T @ x,
    "roll": lambda x: x.roll(1, 0),
    "sort": lambda x: x.sort(0).values,
    "cumulative sum": lambda x: x.cumsum(0),
    "a single sample for all": lambda x: x + x[-1],
}


@pytest.mark.parametrize("make", [DiagGGNExact, KFAC])
@named("function", MIXING)
def test_functions_that_mix_samples(function, make, device):
    """The curvature would have blocks of two samples: refused, every time."""
    model, loss = extend(Between(function)).to(device), extend(nn.CrossEntropyLoss())
    inputs, targets = torch.randn(4, 4, device=device), torch.randint(3, (4,), device=device)
    for _ in range(2):
        with pytest.raises(ValueError, match="samples"):
            step(model, loss, inputs, targets, make())
        assert_nothing_saved(model)
    step(model, loss, inputs[:1], targets[:1], make())  # one sample may do what it likes with itself


class Switch(nn.Module):
    """A mean over the positions of each sample, or over the samples."""

    def __init__(self, dim: int):
        super().__init__()
        self.layer, self.dim = nn.Linear(3, 2), dim

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(self.dim)


@pytest.mark.parametrize("make", [DiagGGNExact, KFLR, DiagHessian, KFRA])
@pytest.mark.parametrize("other", [0, -3])
def test_another_dimension_is_another_function(other, make, device):
    """As many positions as samples: the sizes are the same."""
    model, loss = extend(Switch(1)).to(device), extend(nn.MSELoss())
    inputs, targets = torch.randn(4, 4, 3, device=device), torch.zeros(4, 2, device=device)
    step(model, loss, inputs, targets, make())
    model.dim = other
    with pytest.raises(ValueError, match="samples"):
        step(model, loss, inputs, targets, make())


class FunctionalUse(nn.Module):
    """A weight that also acts outside of its module."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) + F.linear(x, self.first.weight))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_weight_that_acts_outside_of_its_module(autocast, device):
    """Half of its curvature would be missing: refused, unless it is frozen."""
    model, loss = extend(FunctionalUse()).to(device), extend(nn.CrossEntropyLoss())
    inputs, targets = torch.randn(3, 4, device=device), torch.randint(3, (3,), device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        with pytest.raises(NotImplementedError, match="Linear.weight .*outside of its module"):
            step(model, loss, inputs, targets, DiagGGNExact())
        assert_nothing_saved(model)
        model.first.weight.requires_grad_(False)
        step(model, loss, inputs, targets, DiagGGNExact())
    assert hasattr(model.last.weight, "diag_ggn_exact")


class ScaledTwice(nn.Module):
    """A normalisation's weight that also acts outside of it, and a parameter of the module around both."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x) + self.shift) * self.norm.weight - self.shift


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("extension", [DiagGGNExact, KFRA, DiagHessian])
def test_a_weight_of_a_module_without_a_rule_that_acts_outside(extension, checkpointed, device):
    model, loss = extend(ScaledTwice()).to(device), extend(nn.MSELoss())
    inputs, targets = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    run = (lambda x: checkpoint(model, x, use_reentrant=False)) if checkpointed else model
    with pytest.raises(NotImplementedError, match="LayerNorm.weight .*outside of its module"), backpack(extension()):
        loss(run(inputs), targets).backward()
    assert_nothing_saved(model)
    model.norm.weight.requires_grad_(False)
    with backpack(DiagGGNExact()):
        loss(run(inputs), targets).backward()
    assert hasattr(model.shift, "diag_ggn_exact")


class TimeFirst(nn.Module):
    """Linear layers on [T, N, F]."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.transpose(0, 1))).mean(0))


@pytest.mark.parametrize("positions", [3, 5])
def test_positions_before_samples(positions, device):
    """Dimension 0 of a layer's input is not the batch: refused, also where the sizes agree."""
    model, loss = extend(TimeFirst()).to(device), extend(nn.CrossEntropyLoss())
    inputs, targets = torch.randn(3, positions, 4, device=device), torch.randint(3, (3,), device=device)
    with pytest.raises(ValueError, match="samples"):
        step(model, loss, inputs, targets, DiagGGNExact())
    assert_nothing_saved(model)


class Wrapped(nn.Module):
    """A loss of the user that combines two of torch's."""

    def __init__(self):
        super().__init__()
        self.entropy, self.square = nn.CrossEntropyLoss(), nn.MSELoss()

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * self.entropy(input=outputs, target=targets) + 0.1 * self.square(outputs, torch.zeros_like(outputs))


def test_losses_inside_a_module(device):
    """extend() reaches the losses in a loss; they may get keyword arguments and divided logits."""
    stock, loss, inputs = PLAIN.stock(), Wrapped(), PLAIN.data()[0]
    targets = torch.randint(3, (len(inputs),))
    expected = curvature(stock, lambda f: loss(f / 2, targets), inputs)
    model, loss = PLAIN.prepared().to(device), extend(loss)
    with backpack(*exact_extensions()):
        loss(model(inputs.to(device)) / 2, targets.to(device)).backward()
    assert_exact_ggn(model, expected)


def test_a_prediction_without_features(device):
    """[N] logits of BCEWithLogitsLoss and values of MSELoss: one column."""
    stock = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    inputs, targets = torch.randn(5, 4).double(), torch.rand(5).double()
    for loss in (nn.BCEWithLogitsLoss(), nn.MSELoss()):
        expected = curvature(stock, lambda f, loss=loss: loss(f, targets), inputs)
        model = copy.deepcopy(stock).to(device)
        backward(model, loss, inputs.to(device), targets.to(device), *exact_extensions())
        assert_exact_ggn(model, expected)
        assert model[0].weight.sqrt_ggn_exact.shape[0] == 1


@pytest.mark.parametrize("make", [DiagGGNExact, BatchDiagGGNExact, SqrtGGNExact, KFLR, DiagGGNMC, KFAC, DiagHessian])
def test_mixed_samples(make, device):
    """BatchNorm in train mode couples the samples: refused."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).to(device)
    with pytest.raises(NotImplementedError, match="BatchNorm1d|batch normalisation in train mode"):
        backward(model, nn.MSELoss(), torch.randn(4, 4, device=device), torch.randn(4, 2, device=device), make())
    assert_nothing_saved(model)


def test_a_batch_of_none(device):
    model = mlp(nn).to(device)
    inputs, targets = torch.zeros(0, 6, device=device), torch.zeros(0, dtype=torch.long, device=device)
    backward(model, nn.CrossEntropyLoss(reduction="sum"), inputs, targets, *exact_extensions(), KFLR())
    for parameter in model.parameters():
        assert (parameter.diag_ggn_exact == 0).all() and parameter.diag_ggn_exact.shape == parameter.shape
        assert parameter.diag_ggn_exact_batch.shape == (0, *parameter.shape)
        assert parameter.sqrt_ggn_exact.shape == (3, 0, *parameter.shape)


def test_one_class(device):
    """Softmax of one class is constant: no curvature."""
    model = nn.Linear(4, 1).to(device)
    inputs, targets = torch.randn(3, 4, device=device), torch.zeros(3, dtype=torch.long, device=device)
    backward(model, nn.CrossEntropyLoss(), inputs, targets, *exact_extensions(), KFLR(), DiagHessian())
    for parameter in model.parameters():
        assert (parameter.diag_ggn_exact.abs() < 1e-12).all() and (parameter.diag_h.abs() < 1e-12).all()


# ---------------------------------------------------------------------------------------------------------------------
# torch's other features
# ---------------------------------------------------------------------------------------------------------------------


@named("case", some(MODELS, "cnn", "dense prediction", "batch norm 2d"))
def test_channels_last(case, device):
    model, loss, inputs, targets, expected = prepare(case, device)
    model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    with backpack(*exact_extensions()):
        loss(model(inputs), targets).backward()
    assert_exact_ggn(model, expected)


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@named("case", some(MODELS, "mlp", "cnn", "tied weights", "layer norm"))
def test_autocast(case, inside, device):
    """bfloat16 layers: float32 sums near the exact ones."""
    model, loss, inputs, targets, expected = prepare(case, device)
    model, inputs = model.float(), inputs.float()
    with torch.autocast(device.type, torch.bfloat16):
        value = loss(model(inputs), targets)
        if inside:
            with backpack(*exact_extensions(), KFLR(fail_mode="SILENT")):
                value.backward()
    if not inside:
        with backpack(*exact_extensions(), KFLR(fail_mode="SILENT")):
            value.backward()
    assert_exact_ggn(model, expected, 0.15)
    for parameter in model.parameters():
        assert parameter.diag_ggn_exact.dtype == torch.float32
        if hasattr(parameter, "kflr"):
            assert {f.dtype for f in parameter.kflr} == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing(reentrant, device):
    """use_reentrant=False recomputes inside the sweep; True has no graph to sweep through, and says so."""
    model, loss, inputs, targets, expected = prepare(MODELS["cnn"], device)
    inputs.requires_grad_()

    def step():
        with backpack(*exact_extensions(), KFLR()):
            outputs = checkpoint_sequential(list(model), 3, inputs, use_reentrant=reentrant)
            loss(outputs, targets).backward()

    if reentrant:
        with pytest.raises((NotImplementedError, RuntimeError), match="use_reentrant=False"):
            step()
        assert_nothing_saved(model)
    else:
        step()
        assert_exact_ggn(model, expected)


def test_checkpointing_of_a_part(device):
    model, loss, inputs, targets, expected = prepare(PLAIN, device)
    with backpack(*exact_extensions()):
        hidden = checkpoint(model[:3], inputs, use_reentrant=False)
        loss(model[3:](hidden), targets).backward()
    assert_exact_ggn(model, expected)


def test_in_place_activations(device):
    stock = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.LayerNorm(4), nn.ELU(inplace=True), nn.Linear(4, 2)
    )
    stock, inputs, targets = stock.double(), torch.randn(5, 3).double(), torch.randint(2, (5,))
    expected = curvature(stock, lambda f: F.cross_entropy(f, targets), inputs)
    backward(stock.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), *exact_extensions())
    assert_exact_ggn(stock, expected)


def test_the_functional_form_of_the_loss_is_not_seen(device):
    """F.cross_entropy instead of an extended module: an error that says so."""
    model, _, inputs, targets, _ = prepare(PLAIN, device)
    with backpack(DiagGGNExact()), pytest.raises(RuntimeError, match=r"extend\("):
        F.cross_entropy(model(inputs), targets).backward()
    assert_nothing_saved(model)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives of the results
# ---------------------------------------------------------------------------------------------------------------------


def weighted(value: Tensor, weights: Tensor) -> Tensor:
    """A number that depends on every entry of the value differently."""
    return (value * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape).to(weights)).sum()


def gradient_of(model: nn.Module, total: Tensor) -> list[Tensor]:
    parameters = list(trained(model).values())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


DIFFERENTIABLE = some(MODELS, "mlp", "cnn", "tokens, mse", "tied weights", "layer norm")


@pytest.mark.parametrize("budget", [None, 1])
@named("case", DIFFERENTIABLE)
def test_derivatives_of_exact_quantities(case, budget, device):
    """Under create_graph=True: gradients of functions of DiagGGNExact and BatchDiagGGNExact, against the oracle's."""
    inputs, targets = case.data()
    stock = case.stock()
    expected = curvature(stock, lambda outputs: case.loss(outputs, targets), inputs, create_graph=True)
    reference = sum(
        weighted(expected.batch_diag(name), inputs) + expected.diag(name).sin().sum() for name in expected.jacobian
    )
    model, loss = case.prepared().to(device), extend(copy.deepcopy(case.loss))
    with backpack(DiagGGNExact(), BatchDiagGGNExact(), memory_budget=budget):
        value = loss(model(inputs.to(device)), targets.to(device))
        torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    total = sum(
        weighted(p.diag_ggn_exact_batch, inputs.to(device)) + p.diag_ggn_exact.sin().sum() for p in model.parameters()
    )
    assert_close("value", total, reference.detach(), 1e-9)
    theirs = gradient_of(stock, reference)
    largest = max(g.abs().max().item() for g in theirs)
    for mine, gradient in zip(gradient_of(model, total), theirs, strict=True):
        assert_close("gradient", mine, gradient, 1e-8, largest)


DERIVATIVES = {
    "diag_ggn_exact": lambda: DiagGGNExact(),
    "sqrt_ggn_exact": lambda: SqrtGGNExact(),
    "kflr": lambda: KFLR(),
    "kflr, expand": lambda: KFLR(convention="expand"),
    "kflr, reduce": lambda: KFLR(convention="reduce"),
    "diag_h": lambda: DiagHessian(),
    "diag_ggn_mc": lambda: DiagGGNMC(2),
    "sqrt_ggn_mc": lambda: SECOND_ORDER["sqrt_ggn_mc"](2),
    "kfac": lambda: KFAC(2),
}
BATCHES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), (3, 4), nn.MSELoss()),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(24, 2)),
        (2, 2, 2, 3),
        nn.BCEWithLogitsLoss(),
    ),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 3)), (3, 4), nn.CrossEntropyLoss()),
}


SMOOTH_AT_FIXED_DRAWS = {  # the drawn targets of the other losses are steps of the parameters
    f"{batch}-{quantity}": (*BATCHES[batch], DERIVATIVES[quantity])
    for batch in BATCHES
    for quantity in DERIVATIVES
    if batch == "mlp" or quantity not in ("diag_ggn_mc", "sqrt_ggn_mc", "kfac")
}


@named("build, shape, loss, make", SMOOTH_AT_FIXED_DRAWS)
def test_derivatives_by_difference_quotients(build, shape, loss, make, device):
    """Of every quantity, sampled ones at fixed draws of the loss whose draws do not depend on the parameters (MSE)."""
    extension = make()
    point = build().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        outputs = point(inputs)
    targets = torch.zeros(len(inputs), dtype=torch.long) if "Cross" in repr(loss) else torch.rand_like(outputs)
    inputs, targets = inputs.to(device), targets.to(device)
    direction = [torch.randn_like(p) for p in point.parameters()]

    def objective(step: float) -> tuple[nn.Module, Tensor]:
        """A model that many steps along the direction, and a function of its quantities."""
        model = copy.deepcopy(point)
        with torch.no_grad():
            for parameter, d in zip(model.parameters(), direction, strict=True):
                parameter += step * d
        extend(model).to(device)
        torch.manual_seed(4)
        with backpack(extension):
            value = extend(loss)(model(inputs), targets)
            torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        results = [getattr(p, extension.savefield) for p in model.parameters()]
        return model, sum(weighted(f, inputs) for r in results for f in (r if isinstance(r, list) else [r]))

    gradients = [g.cpu() for g in gradient_of(*objective(0.0))]
    analytic = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    quotient = (objective(1e-5)[1] - objective(-1e-5)[1]).detach().cpu() / 2e-5
    size = sum(g.norm() * d.norm() for g, d in zip(gradients, direction, strict=True)).item()
    assert size > 1e-6
    assert_close(extension.savefield, analytic, quotient, 1e-6, size)


@pytest.mark.parametrize("make", [DiagGGNExact, BatchGrad])
def test_an_earlier_result_is_not_taken_for_a_new_one(make, device):
    """Differentiable results keep their graph alive, and torch.autograd.grad does not say what it was asked for."""
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    for factor in (1.0, 2.0):
        fresh = PLAIN.prepared().to(device)
        for one in (model, fresh):
            with backpack(make()):
                value = loss(one(factor * inputs), targets)
                torch.autograd.grad(value, list(one.parameters()), create_graph=True)
        for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            if hasattr(mine, make().savefield):
                theirs = getattr(theirs, make().savefield).detach().cpu()
                assert_close("result", getattr(mine, make().savefield), theirs, 1e-12)


def test_results_hold_no_graph_otherwise(device):
    model, loss, inputs, targets, _ = prepare(MODELS["cnn"], device)
    with backpack(*[make() for field, make in SECOND_ORDER.items() if "_h" not in field]):
        loss(model(inputs), targets).backward()
    for found in saved(model).values():
        for value in found.values():
            assert not any(v.requires_grad for v in (value if isinstance(value, list) else [value]))


def test_second_order_inside_create_graph_with_first_order(device):
    """First-order quantities of the same differentiable pass stay differentiable."""
    model, loss, inputs, targets, expected = prepare(PLAIN, device)
    with backpack(*all_extensions(), *exact_extensions()):
        torch.autograd.grad(loss(model(inputs), targets), list(model.parameters()), create_graph=True)
    assert_exact_ggn(model, expected)
    for parameter in model.parameters():
        assert all(getattr(parameter, name).requires_grad for name in SAVED)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks, and what stays
# ---------------------------------------------------------------------------------------------------------------------


@named("case", some(MODELS, "mlp", "cnn", "shared modules"))
def test_extension_hook(case, device):
    """Every module with parameters has its results when its hook runs, and they may be deleted there."""
    model, loss, inputs, targets, expected = prepare(case, device)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {}

    def take(module):
        for parameter in module.parameters(recurse=False):
            assert hasattr(parameter, "batch_l2")
            taken[names[id(parameter)]] = parameter.diag_ggn_exact
            del parameter.diag_ggn_exact

    with backpack(*exact_extensions(), *all_extensions(), extension_hook=take):
        loss(model(inputs), targets).backward()
    assert set(taken) == set(names.values())
    for name, value in taken.items():
        assert_close(name, value, expected.diag(name), 1e-9)
    assert_exact_ggn(model, expected, fields=["diag_ggn_exact_batch", "sqrt_ggn_exact"])


def test_extension_hook_with_second_order_alone(device):
    """Each layer once, the last one first, with its input."""
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    seen = []

    def note(module):
        if isinstance(module, nn.Linear):
            seen.append((module, module.input0.shape))
            assert hasattr(module.weight, "kfac")

    with backpack(KFAC(), extension_hook=note):
        loss(model(inputs), targets).backward()
    assert [m for m, _ in seen] == [model[4], model[2], model[0]]
    assert seen[-1][1] == inputs.shape


@named("case", some(MODELS, "cnn", "residual", "shared modules", "layer norm"))
def test_nothing_is_kept_after_backward(case, device):
    """No activation outlives the backward pass, and no reference cycle holds any."""
    model, loss, inputs, targets, _ = prepare(case, device)
    references: list[weakref.ref] = []

    def note(module, args, output):
        references.extend(weakref.ref(t) for t in (*args, output) if isinstance(t, Tensor))

    for module in (*model.modules(), loss):
        module.register_forward_hook(note)
    gc.collect()
    gc.disable()
    try:
        with backpack(*exact_extensions(), KFLR(fail_mode="SILENT"), KFAC(fail_mode="SILENT")):
            loss(model(inputs.clone()), targets.clone()).backward()
        alive = [r().shape for r in references if r() is not None]
    finally:
        gc.enable()
    assert len(references) > 4 and not alive


def test_nothing_is_kept_of_graphs_that_are_dropped(device):
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    references = []
    loss.register_forward_hook(lambda m, args, output: references.append(weakref.ref(output)))
    model.register_forward_hook(lambda m, args, output: references.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        loss(model(inputs.clone()), targets.clone())
        assert not any(r() is not None for r in references)
    finally:
        gc.enable()


def test_an_error_in_the_hook_leaves_nothing_behind(device):
    """The next pass is right."""
    model, loss, inputs, targets, expected = prepare(PLAIN, device)

    def fail(module):
        raise KeyError("from the hook")

    with backpack(*exact_extensions(), extension_hook=fail), pytest.raises(KeyError):
        loss(model(inputs), targets).backward()
    assert CTX.get_active_exts() == ()
    model.zero_grad()
    with backpack(*exact_extensions(), *all_extensions()):
        loss(model(inputs), targets).backward()
    assert_exact_ggn(model, expected)
    assert_quantities(model, PLAIN.expected(*PLAIN.data()))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def step(model, loss, inputs, targets, *extensions):
    with backpack(*extensions):
        loss(model(inputs), targets).backward()


@pytest.mark.parametrize("make", list(SECOND_ORDER.values()))
def test_a_loss_that_is_not_extended(make, device):
    model, _, inputs, targets, _ = prepare(PLAIN, device)
    with pytest.raises(RuntimeError, match=r"extend\("):
        step(model, nn.CrossEntropyLoss(), inputs, targets, make())
    assert_nothing_saved(model)


@pytest.mark.parametrize("make", list(SECOND_ORDER.values()))
def test_a_loss_without_known_hessian(make, device):
    model, inputs = PLAIN.prepared().to(device), PLAIN.data()[0].to(device)
    loss = extend(nn.L1Loss())
    with pytest.raises(NotImplementedError, match="L1Loss.*register_loss"):
        step(model, loss, inputs, torch.zeros(len(inputs), 3, device=device), make())
    assert_nothing_saved(model)


@pytest.mark.parametrize("make", list(SECOND_ORDER.values()))
def test_a_loss_that_is_no_scalar(make, device):
    model, _, inputs, targets, _ = prepare(PLAIN, device)
    loss = extend(nn.CrossEntropyLoss(reduction="none"))
    with backpack(make()), pytest.raises(ValueError, match="scalar"):
        loss(model(inputs), targets).sum().backward()
    assert_nothing_saved(model)


def test_known_losses_without_second_order_quantities(device):
    """What cannot be swept through is nothing to first-order quantities and plain passes."""
    model, _, inputs, targets, _ = prepare(PLAIN, device)
    loss = extend(nn.CrossEntropyLoss(reduction="none"))
    with backpack(*all_extensions()):
        loss(model(inputs), targets).mean().backward()
    assert_quantities(model, PLAIN.expected(*PLAIN.data()))
    extend(nn.L1Loss())(model(inputs), torch.zeros(len(inputs), 3, device=device)).backward()


def test_a_prediction_without_a_model(device):
    """The loss' first argument is a leaf, not what an extended model returned."""
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    with backpack(DiagGGNExact()), pytest.raises(RuntimeError, match="extended model"):
        loss(model(inputs).detach().requires_grad_(), targets).backward()
    assert_nothing_saved(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("make", [DiagGGNExact, KFLR, DiagGGNMC, KFAC, DiagHessian, KFRA, GGNMP])
def test_a_prediction_without_entries(make, device):
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 0)).to(device)
    empty = torch.zeros(2, 0, device=device)
    with pytest.raises(ValueError, match=r"MSELoss: expected a prediction with at least one entry .* got \[2, 0\]"):
        backward(model, nn.MSELoss(reduction="sum"), torch.randn(2, 4, device=device), empty, make())
    assert_nothing_saved(model)


def test_a_graph_that_was_freed(device):
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    value = loss(model(inputs), targets)
    value.backward()
    with backpack(*exact_extensions()), pytest.raises(RuntimeError, match="second time|freed|retain_graph"):
        value.backward()
    assert_nothing_saved(model)


def test_other_terms_of_the_loss_do_not_enter(device):
    """A penalty on activations, or any term beside the extended losses, is part of `.grad` alone."""
    model, loss, inputs, targets, expected = prepare(PLAIN, device)
    hidden = model[:3](inputs)
    with backpack(DiagGGNExact()):
        (loss(model[3:](hidden), targets) + hidden.square().sum()).backward()
    assert_exact_ggn(model, expected, fields=["diag_ggn_exact"])


@pytest.mark.parametrize("make", [*SECOND_ORDER.values(), KFRA, GGNMP, PCHMP])
def test_a_target_that_depends_on_parameters(make, device):
    """It has curvature too, of which nothing is known."""
    model, inputs = PLAIN.prepared().to(device), PLAIN.data()[0].to(device)
    loss = extend(nn.MSELoss())
    with backpack(make()), pytest.raises(NotImplementedError, match=r"MSELoss.*depends on .*\.weight.*detach\(\)"):
        loss(model(inputs), 2 * model(inputs + 1)).backward()
    assert_nothing_saved(model)
    step(model, loss, inputs, 2 * model(inputs + 1).detach(), make())
    constant = extend(copy.deepcopy(model)).requires_grad_(False)
    variable = torch.ones_like(inputs).requires_grad_()  # the target depends on it, and on no parameter
    step(model, loss, inputs, constant(inputs * variable), make())
    assert variable.grad is not None


def test_a_layer_outside_of_the_losss_graph(device):
    """An auxiliary head with a plain loss."""
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    other = extend(nn.Linear(6, 2).double()).to(device)
    with backpack(DiagGGNExact()), pytest.raises(RuntimeError, match=r"extend\("):
        (loss(model(inputs), targets) + other(inputs).square().mean()).backward()
    assert_nothing_saved(model)
    assert_nothing_saved(other)


def test_a_model_that_is_not_extended(device):
    model, loss = PLAIN.stock().to(device), extend(nn.CrossEntropyLoss())
    inputs, targets = (t.to(device) for t in PLAIN.data())
    with pytest.raises(RuntimeError, match=r"extend\("):
        step(model, loss, inputs, targets, DiagGGNExact())


def test_a_forward_pass_inside_disable(device):
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    with disable():
        outputs = model(inputs)
    with backpack(DiagGGNExact()), pytest.raises(RuntimeError, match="disable"):
        loss(outputs, targets).backward()
    assert_nothing_saved(model)


def test_errors_leave_earlier_results_alone_or_remove_them(device):
    """After a failed pass no mixture of two passes: all of one, or nothing."""
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    step(model, loss, inputs, targets, DiagGGNExact(), KFLR())
    before = copy.deepcopy(saved(model))
    with pytest.raises(RuntimeError):
        step(model, nn.CrossEntropyLoss(), inputs * 2, targets, DiagGGNExact(), KFLR())
    after = saved(model)
    if any(found for found in after.values()):
        assert_same(after, before)


NONLINEAR = {
    "layer norm": (lambda: nn.LayerNorm(4), "LayerNorm|layer_norm|layernorm"),
    "softmax": (lambda: nn.Softmax(1), "[Ss]oftmax"),
    "normalize": (lambda: Normalize(), "."),
    "product": (lambda: SelfProduct(), "[Mm]ul"),
}


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class SelfProduct(nn.Module):
    """Entries times their neighbours: not elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.roll(1, 1)


@named("build, named_by", NONLINEAR)
def test_the_hessian_of_functions_that_are_not_elementwise(build, named_by, device):
    """An error that names the operation, and nothing saved."""
    model = nn.Sequential(nn.Linear(3, 4), build(), nn.Linear(4, 2)).double().to(device)
    inputs, targets = torch.randn(3, 3).double().to(device), torch.randn(3, 2).double().to(device)
    with pytest.raises(NotImplementedError, match=named_by):
        backward(model, nn.MSELoss(), inputs, targets, DiagGGNExact(), DiagHessian())
    assert_nothing_saved(model)


@pytest.mark.parametrize("seed", range(150))
def test_the_hessian_of_any_architecture(seed, device):
    """Whatever is drawn: the right diagonal, or an error and nothing saved; never a wrong number."""
    case = random_case(seed)
    model, targets = case.model, case.targets.to(device)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        expected = hessian_diagonals(model, case.loss_of, case.inputs)
    try:
        backward(model.to(device), case.loss.to(device), case.inputs.to(device), targets, DiagHessian())
    except NotImplementedError:
        assert_nothing_saved(model)
    else:
        largest = max(rows.sum(0).abs().max().item() for rows in expected.values())
        for name, parameter in trained(model).items():
            assert_close(name, parameter.diag_h, expected[name].sum(0), 1e-8, max(largest, 1e-300))


class SerialSharing(nn.Module):
    """A weight whose uses follow each other: the second derivative has a term of both."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.inner(torch.relu(self.inner(x)))))


def test_the_hessian_of_a_weight_used_in_series(device):
    model = SerialSharing().double()
    inputs, targets = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    expected = hessian_diagonals(model, lambda f: F.mse_loss(f, targets), inputs)
    try:
        backward(model.to(device), nn.MSELoss(), inputs.to(device), targets.to(device), DiagHessian())
    except NotImplementedError as error:
        assert "inner" in str(error) or "Linear" in str(error) or "several" in str(error)
        assert_nothing_saved(model)
    else:
        for name, parameter in model.named_parameters():
            assert_close(name, parameter.diag_h, expected[name].sum(0), 1e-9)


def test_outputs_one_sample_at_a_time(device):
    """The oracle's premise: samples do not depend on each other in any of the random architectures."""
    for seed in range(100):
        case = random_case(seed)
        with torch.no_grad():
            assert torch.allclose(case.model(case.inputs), outputs_of(case.model, case.inputs), rtol=1e-9, atol=1e-12)


def test_batch_grad_next_to_a_sweep_keeps_its_own_batch(device):
    """The sweep's backward passes are not the loss': they leave no first-order results."""
    model, loss, inputs, targets, _ = prepare(PLAIN, device)
    with backpack(SqrtGGNExact(), BatchGrad(subsampling=[1])):
        loss(model(inputs), targets).backward()
    expected = PLAIN.expected(*PLAIN.data())
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad_batch, expected[name].batch_grad[1:2], 1e-9)


@pytest.mark.parametrize("budget", [1, None])
@pytest.mark.parametrize("extensions", [[DiagGGNExact], [DiagGGNExact, KFLR, lambda: DiagGGNMC(3)], [DiagHessian]])
def test_retained_gradient_of_the_prediction(extensions, budget):
    """`prediction.retain_grad()` holds the gradient, not the sum of it and the columns."""
    torch.manual_seed(0)
    model, loss_function = extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))), extend(nn.MSELoss())
    x, y = torch.randn(3, 4), torch.randn(3, 2)
    prediction = model(x)
    prediction.retain_grad()
    value = loss_function(prediction, y)
    for passes in (1, 2):
        with backpack(*[extension() for extension in extensions], memory_budget=budget):
            value.backward(retain_graph=True)
        torch.testing.assert_close(prediction.grad, passes * (prediction.detach() - y) / 3)


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)])
def test_batch_normalisation_of_positions_in_train_mode(shape):
    """Also of a flattened batch: the samples are mixed all the same."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)

        def forward(self, x):
            hidden = self.first(x)
            return self.last(self.norm(hidden.flatten(0, -2)).view_as(hidden))

    model, loss_function = extend(Flat()), extend(nn.MSELoss())
    with pytest.raises(NotImplementedError, match="train mode"), backpack(DiagGGNExact()):
        loss_function(model(torch.randn(shape)), torch.zeros(*shape[:-1], 2)).backward()
    assert not any(hasattr(p, "diag_ggn_exact") for p in model.parameters())

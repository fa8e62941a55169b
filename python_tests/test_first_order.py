"""BatchGrad, BatchL2Grad, SumGradSquared and Variance on whole models, against a loop over samples."""

import itertools

import pytest
import torch
from helpers import assert_close, named, some
from model_cases import (
    LAYERS,
    MODELS,
    SAVED,
    ModelCase,
    all_extensions,
    assert_no_quantities,
    assert_quantities,
    mlp,
)
from oracle import from_per_sample, per_sample_gradients
from property_testing import HealthCheck, given, settings, st
from torch import nn

from backpack_cuda import CTX, backpack, extend
from backpack_cuda.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance

EXTENSIONS = dict(zip(SAVED, (BatchGrad, BatchL2Grad, SumGradSquared, Variance), strict=True))
PLAIN = MODELS["mlp"]


def backward(case: ModelCase, model: nn.Module, *extensions, **options) -> None:
    """One forward and backward pass of the case's data with the given extensions active."""
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    inputs, targets = (t.to(device) for t in case.data())
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    with backpack(*extensions, **options):
        case.loss(model(inputs), targets).backward()


@pytest.mark.parametrize("how", list(LAYERS))
@named("case", MODELS)
def test_models(case, how, device):
    model = case.prepared(how).to(device)
    backward(case, model, *all_extensions())
    assert_quantities(model, case.expected(*case.data()))


@named("case", MODELS)
def test_models_in_float32(case, device):
    """The oracle is float64 throughout; the float32 forward pass adds its own rounding."""
    model = case.prepared().float().to(device)
    backward(case, model, *all_extensions())
    assert_quantities(model, case.expected(*case.data()), 1e-4)
    for parameter in model.parameters():
        assert {getattr(parameter, name).dtype for name in SAVED} == {torch.float32}


@pytest.mark.parametrize("names", [c for r in (1, 2, 3) for c in itertools.combinations(SAVED, r)], ids="-".join)
@named("case", some(MODELS, "cnn", "shared modules", "layer norm"))
def test_only_what_is_asked_for(case, names, device):
    model = case.prepared().to(device)
    backward(case, model, *[EXTENSIONS[name]() for name in names])
    assert_quantities(model, case.expected(*case.data()), attributes=names)


def test_nothing_asked_for(device):
    model = PLAIN.prepared().to(device)
    backward(PLAIN, model)
    inputs, targets = PLAIN.data()
    PLAIN.loss(model(inputs.to(device)), targets.to(device)).backward()  # outside of any context
    assert_no_quantities(model)
    expected = PLAIN.expected(inputs, targets)
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, 2 * expected[name].grad, 1e-9)


@pytest.mark.parametrize("how", list(LAYERS))
@named("case", some(MODELS, "cnn", "tied weights", "layer norm", "lstm"))
def test_ordinary_gradients_do_not_change(case, how, device):
    """`.grad` with everything asked for is `.grad` of the stock model, also with respect to the input."""
    inputs, targets = (t.to(device) for t in case.data())
    stock, model = case.stock().to(device), case.prepared(how).to(device)
    x, stock_x = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    case.loss(stock(stock_x), targets).backward()
    with backpack(*all_extensions()):
        case.loss(model(x), targets).backward()
    assert torch.allclose(x.grad, stock_x.grad, rtol=1e-10, atol=1e-14)
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


def test_results_are_overwritten_and_gradients_accumulate(device):
    """Two backward passes: quantities of the second, the sum of both gradients; zero_grad leaves quantities alone."""
    model = PLAIN.prepared().to(device)
    backward(PLAIN, model, *all_extensions())
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    inputs, targets = PLAIN.data()
    inputs = inputs.flip(0)[:3] * 2
    expected = PLAIN.expected(inputs, targets[:3])
    with backpack(*all_extensions()):
        PLAIN.loss(model(inputs.to(device)), targets[:3].to(device)).backward()
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, expected[name].grad + first[name].cpu(), 1e-9)
        parameter.grad = expected[name].grad.to(device)
    assert_quantities(model, expected)
    model.zero_grad()
    assert all(hasattr(p, name) for p in model.parameters() for name in SAVED)


def test_reusing_the_extension_objects(device):
    """One set of extension objects for batches of changing size: nothing is remembered."""
    model, extensions = PLAIN.prepared().to(device), all_extensions()
    for samples in (4, 1, 6):
        inputs, targets = PLAIN.data(samples)
        model.zero_grad()
        with backpack(*extensions):
            PLAIN.loss(model(inputs.to(device)), targets.to(device)).backward()
        assert_quantities(model, PLAIN.expected(inputs, targets))


@pytest.mark.parametrize(
    "subsampling", [[0], [2, 1], [2, 2, 0, 2], [0, 1, 2], [], (1, 0), torch.tensor([1, 2])], ids=str
)
@named("case", some(MODELS, "cnn", "tied weights", "layer norm", "tokens, mse"))
def test_subsampling(case, subsampling, device):
    """Rows of the full result in the given order; the other extensions still see the whole batch."""
    model = case.prepared().to(device)
    backward(case, model, BatchGrad(subsampling=subsampling), Variance(), BatchL2Grad())
    rows = torch.as_tensor(subsampling, dtype=torch.long)
    expected = case.expected(*case.data())
    for name, parameter in model.named_parameters():
        stats = expected[name]
        size = stats.batch_grad.abs().max().item()
        assert_close(name, parameter.grad_batch, stats.batch_grad[rows], 1e-9, size)
        assert_close(name, parameter.variance, stats.variance, 1e-9, size**2)
        assert_close(name, parameter.batch_l2, stats.batch_l2, 1e-9)
        assert_close(name, parameter.grad, stats.grad, 1e-9, size)


@pytest.mark.parametrize("subsampling", [[5], [0, 17]], ids=str)
def test_subsampling_beyond_the_batch(subsampling, device):
    with pytest.raises((ValueError, IndexError), match="subsampling"):
        backward(PLAIN, PLAIN.prepared().to(device), BatchGrad(subsampling=subsampling))


@pytest.mark.parametrize(
    "subsampling", [[-1], [0.5], ["0"], 3, [True, False, True], torch.tensor([True, False, True])], ids=str
)
def test_bad_subsampling(subsampling):
    with pytest.raises((ValueError, TypeError), match="subsampling"):
        BatchGrad(subsampling=subsampling)


@pytest.mark.parametrize("extension", [BatchL2Grad, SumGradSquared, Variance])
def test_subsampling_exists_for_batch_grad_only(extension):
    with pytest.raises(TypeError, match="subsampling"):
        extension(subsampling=[0])


@pytest.mark.parametrize("wrong", [BatchGrad, "batch_grad", None, nn.Linear(1, 1)], ids=repr)
def test_extensions_are_instances(wrong):
    with pytest.raises(ValueError, match="backpack expects instances of BackpropExtension"):
        backpack(BatchL2Grad(), wrong)


def test_nested_contexts_replace(device):
    """The inner context's extensions only; the outer ones again after it."""
    outer = BatchGrad()
    with backpack(outer) as entered:
        assert entered is None
        assert CTX.get_active_exts() == (outer,)
        model = PLAIN.prepared().to(device)
        backward(PLAIN, model, BatchL2Grad())
        assert_quantities(model, PLAIN.expected(*PLAIN.data()), attributes=["batch_l2"])
        with pytest.raises(KeyError), backpack():
            assert CTX.get_active_exts() == ()
            raise KeyError
        assert CTX.get_active_exts() == (outer,)
        inputs, targets = (t.to(device) for t in PLAIN.data())
        PLAIN.loss(model(inputs), targets).backward()
        assert hasattr(next(model.parameters()), "grad_batch")
    assert CTX.get_active_exts() == ()


def test_only_the_backward_pass_needs_the_context(device):
    """Forward outside, backward inside; and the other way round, which forms nothing."""
    inputs, targets = PLAIN.data()
    model = PLAIN.prepared().to(device)
    loss = PLAIN.loss(model(inputs.to(device)), targets.to(device))
    with backpack(*all_extensions()):
        loss.backward()
    assert_quantities(model, PLAIN.expected(inputs, targets))
    model = PLAIN.prepared().to(device)
    with backpack(*all_extensions()):
        loss = PLAIN.loss(model(inputs.to(device)), targets.to(device))
    loss.backward()
    assert_no_quantities(model)


NOISY_LAYERS = {  # builder, input shape, number of positions that a per-sample gradient sums over
    "linear": (lambda: nn.Linear(20, 9), (64, 20), 1),
    "linear, tokens": (lambda: nn.Linear(20, 9), (64, 5, 20), 5),
    "conv": (lambda: nn.Conv2d(3, 8, 3), (32, 3, 7, 6), 20),
    "conv, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (32, 4, 7, 6), 20),
    "conv, transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=3), (32, 3, 4, 4), 16),
    "batch norm": (lambda: nn.BatchNorm2d(6).eval(), (32, 6, 4, 4), 16),
}


@pytest.mark.parametrize("mean_over_spread", [1, 10, 100])
@named("build, shape, positions", NOISY_LAYERS)
def test_variance_in_float32(build, shape, positions, mean_over_spread, device):
    """Not negative, and within 1 % where the mean is up to 100 times the spread."""
    layer = extend(build()).to(device)
    noise = positions**0.5 / mean_over_spread
    output = layer(1 + noise * torch.randn(shape, device=device))
    with backpack(Variance(), BatchGrad()):
        output.backward(1 + noise * torch.randn_like(output))
    for parameter in (layer.weight, layer.bias):
        exact = from_per_sample(parameter.grad_batch.cpu().double())
        assert (parameter.variance >= 0).all()
        counts = exact.sum_grad_squared <= 1.0001e4 * exact.sum_grad_centered_squared
        error = (parameter.variance.cpu() / exact.variance - 1).abs()
        assert counts.any() or parameter is layer.bias
        assert (error[counts] < 1e-2).all()


LOSSES = {
    "scaled": lambda output, target: 3 * nn.functional.cross_entropy(output, target),
    "label smoothing": lambda output, target: nn.functional.cross_entropy(output, target, label_smoothing=0.1),
    "weighted, sum": lambda output, target: nn.functional.cross_entropy(
        output, target, weight=torch.tensor([0.2, 1.0, 3.0]).to(output), reduction="sum"
    ),
    "written by hand": lambda output, target: (output.logsumexp(1) - output[:, 0] * target).sum() / 7,
    "entropy of softmax": lambda output, target: -(output.softmax(1) * output.log_softmax(1)).sum(),
}
PER_SAMPLE = {"scaled": 5, "label smoothing": 5}  # means over the five samples


@named("name", {name: name for name in LOSSES})
def test_losses(name, device):
    """Nothing is known of the loss, and nothing needs to be."""
    loss = LOSSES[name]
    inputs, targets = PLAIN.data()
    model, stock = PLAIN.prepared().to(device), PLAIN.stock()
    with backpack(*all_extensions()):
        loss(model(inputs.to(device)), targets.to(device)).backward()
    scale = 1 / PER_SAMPLE.get(name, 1)
    gradients = per_sample_gradients(
        lambda n: scale * loss(stock(inputs[n : n + 1]), targets[n : n + 1]), list(stock.parameters()), len(inputs)
    )
    names = [name for name, _ in stock.named_parameters()]
    assert_quantities(model, dict(zip(names, map(from_per_sample, gradients), strict=True)))


def test_ignored_targets(device):
    """Samples with ignore_index contribute nothing, and the mean is over the others."""
    inputs, targets = PLAIN.data()
    targets[1] = targets[3] = -100
    model = PLAIN.prepared().to(device)
    with backpack(*all_extensions()):
        nn.functional.cross_entropy(model(inputs.to(device)), targets.to(device)).backward()
    stock = PLAIN.stock()
    gradients = per_sample_gradients(
        lambda n: nn.functional.cross_entropy(stock(inputs[n : n + 1]), targets[n : n + 1], reduction="sum") / 3,
        list(stock.parameters()),
        len(inputs),
    )
    names = [name for name, _ in stock.named_parameters()]
    assert_quantities(model, dict(zip(names, map(from_per_sample, gradients), strict=True)))
    assert (model[0].weight.batch_l2[[1, 3]] == 0).all()


@st.composite
def random_networks(draw) -> tuple[nn.Module, tuple[int, ...]]:
    """(a chain of layers, some of them used again, tied or frozen; its input shape)."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    size = shape = draw(st.sampled_from([(4,), (2, 6), (2, 5, 4)]))  # without the batch dimension
    layers: list[tuple[nn.Module, tuple[int, ...]]] = []  # with their input sizes
    for _ in range(draw(st.integers(1, 5))):
        dims = len(size) - 1
        groups = draw(st.sampled_from((1, size[0])))
        options = {"groups": groups, "bias": draw(st.booleans()), "stride": draw(st.integers(1, 2))}
        choices = [nn.Linear(size[-1], draw(st.sampled_from((size[-1], 3, 1)))), nn.Tanh(), nn.LayerNorm(size)]
        choices += [module for module, its_size in layers if its_size == size]
        if dims:
            padding = {"padding": 1, "padding_mode": draw(st.sampled_from(("zeros", "circular")))}
            channels = size[0], groups * draw(st.integers(1, 3))
            kernel_size = draw(st.integers(1, min(3, *size[1:])))
            choices.append(getattr(nn, f"Conv{dims}d")(*channels, kernel_size, **options, **padding))
            choices.append(getattr(nn, f"ConvTranspose{dims}d")(*channels, kernel_size, **options))
        layers.append((draw(st.sampled_from(choices)), size))
        size = tuple(layers[-1][0](torch.zeros(2, *size)).shape[1:])
    layers.append((nn.Linear(size[-1], 2), size))
    linear = [module for module, _ in layers if isinstance(module, nn.Linear)]
    for first, second in itertools.combinations(linear, 2):
        if first.weight.shape == second.weight.shape and draw(st.booleans()):
            second.weight = first.weight
    model = nn.Sequential(*[module for module, _ in layers]).double()
    for parameter in list(model.parameters())[:-1]:
        parameter.requires_grad_(draw(st.integers(0, 5)) > 0)
    return model, (draw(st.integers(1, 4)), *shape)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(network=random_networks(), names=st.sets(st.sampled_from(sorted(SAVED)), min_size=1))
def test_random_networks(network, names, device):
    stock, shape = network
    inputs = torch.randn(shape, dtype=torch.float64)
    weights = torch.linspace(1, 2, stock(inputs)[0].numel(), dtype=torch.float64).to(device)

    def loss(model, x):
        return (model(x).flatten(1) * weights.to(x.device)).sin().sum() / shape[0]

    trained = {name: p for name, p in stock.named_parameters() if p.requires_grad}
    rows = per_sample_gradients(lambda n: loss(stock, inputs[n : n + 1]), list(trained.values()), shape[0])
    model = extend(stock).to(device)
    with backpack(*[EXTENSIONS[name]() for name in sorted(names)]):
        loss(model, inputs.to(device)).backward()
    assert_quantities(model, dict(zip(trained, map(from_per_sample, rows), strict=True)), 1e-8, names)


def test_extending_a_loss_is_accepted(device):
    loss = extend(nn.CrossEntropyLoss())
    inputs, targets = PLAIN.data()
    model = PLAIN.prepared().to(device)
    with backpack(*all_extensions()):
        loss(model(inputs.to(device)), targets.to(device)).backward()
    assert_quantities(model, PLAIN.expected(inputs, targets))


def test_frozen_parameters(device):
    """No quantity on a frozen parameter; those of the others stay right."""
    for frozen in (["0.weight"], ["2.bias"], ["0.weight", "0.bias"], ["4.weight", "4.bias", "2.weight"]):
        model = PLAIN.prepared().to(device)
        parameters = dict(model.named_parameters())
        for name in frozen:
            parameters[name].requires_grad_(False)
        backward(PLAIN, model, *all_extensions())
        expected = {name: s for name, s in PLAIN.expected(*PLAIN.data()).items() if name not in frozen}
        assert_quantities(model, expected)
        for name in frozen:
            assert parameters[name].grad is None
            assert not any(hasattr(parameters[name], attribute) for attribute in SAVED)


def test_a_batch_of_none(device):
    model = extend(mlp(nn)).to(device)
    with backpack(*all_extensions()):
        model(torch.zeros(0, 6, device=device)).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad_batch.shape == (0, *parameter.shape)
        assert parameter.batch_l2.shape == (0,)
        assert (parameter.sum_grad_squared == 0).all() and (parameter.variance == 0).all()

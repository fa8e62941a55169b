"""How backward passes are started, repeated, combined and interrupted: which contributions belong to a quantity."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, named, some
from model_cases import (
    LAYERS,
    MODELS,
    SAVED,
    all_extensions,
    assert_no_quantities,
    assert_quantities,
    mlp,
)
from oracle import from_per_sample, per_sample_gradients
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from backpack_cuda import CTX, backpack, disable, extend, memory_cleanup
from backpack_cuda.extensions import BatchGrad, BatchL2Grad

SEVERAL = some(MODELS, "mlp", "cnn", "shared modules", "tied weights", "layer norm", "recurrent use")


def prepare(case, device, how="extended"):
    """(model, inputs, targets, expected statistics) of a case."""
    inputs, targets = case.data()
    return case.prepared(how).to(device), inputs.to(device), targets.to(device), case.expected(inputs, targets)


def expected_of(model: nn.Module, sample_loss, samples: int):
    """Statistics by name of `sample_loss(n)`, sample n's contribution, for the parameters of a stock model."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, map(from_per_sample, per_sample_gradients(sample_loss, parameters, samples)), strict=True))


@named("case", SEVERAL)
def test_autograd_grad(case, device):
    """torch.autograd.grad forms quantities too, and leaves `.grad` alone."""
    model, inputs, targets, expected = prepare(case, device)
    with backpack(*all_extensions()):
        gradients = torch.autograd.grad(case.loss(model(inputs), targets), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is None
        parameter.grad = gradient
    assert_quantities(model, expected)


def test_gradients_of_some_parameters(device):
    """Quantities of the parameters that the backward pass differentiates: no less, and no wrong others."""
    case = MODELS["mlp"]
    for chosen in (["4.weight"], ["0.weight", "2.bias"], ["2.weight", "2.bias"]):
        for start in (
            lambda loss, some: torch.autograd.grad(loss, some),
            lambda loss, some: loss.backward(inputs=some),
        ):
            model, inputs, targets, expected = prepare(case, device)
            parameters = dict(model.named_parameters())
            with backpack(*all_extensions()):
                start(case.loss(model(inputs), targets), [parameters[name] for name in chosen])
            for name, parameter in parameters.items():
                for attribute, statistic in SAVED.items():
                    if name in chosen or hasattr(parameter, attribute):
                        reference = getattr(expected[name], statistic)
                        assert_close(f"{name}.{attribute}", getattr(parameter, attribute), reference, 1e-9)


@named("case", SEVERAL)
def test_gradient_of_the_input_alone(case, device):
    """Nothing is asked of the parameters: nothing may be wrong there."""
    model, inputs, targets, expected = prepare(case, device)
    inputs.requires_grad_()
    with backpack(*all_extensions()):
        torch.autograd.grad(case.loss(model(inputs), targets), inputs)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "batch_l2"):
            assert_close(name, parameter.batch_l2, expected[name].batch_l2, 1e-9)


@named("case", SEVERAL)
def test_backward_twice_through_one_graph(case, device):
    """retain_graph=True: the second pass gives the same again."""
    model, inputs, targets, expected = prepare(case, device)
    loss = case.loss(model(inputs), targets)
    for _ in range(2):
        model.zero_grad()
        with backpack(*all_extensions(), retain_graph=True):
            loss.backward(retain_graph=True)
        assert_quantities(model, expected)
        for parameter in model.parameters():
            for name in SAVED:
                delattr(parameter, name)


@named("case", SEVERAL)
def test_several_forwards_before_one_backward(case, device):
    """Contributions of the same batch index add up."""
    model, inputs, targets, _ = prepare(case, device)
    others = inputs.flip(0) * 0.5
    with backpack(*all_extensions()):
        (case.loss(model(inputs), targets) + 2 * case.loss(model(others), targets)).backward()
    stock, x, y = case.stock(), inputs.cpu(), targets.cpu()
    z = others.cpu()

    def sample_loss(n: int):
        one = slice(n, n + 1)
        return (case.loss(stock(x[one]), y[one]) + 2 * case.loss(stock(z[one]), y[one])) / len(x)

    assert_quantities(model, expected_of(stock, sample_loss, len(x)))


@named("case", SEVERAL)
def test_forwards_with_different_batch_sizes_before_one_backward(case, device):
    """Which samples belong together is unknown: an error, not a number."""
    model, inputs, targets, _ = prepare(case, device)
    with backpack(*all_extensions()), pytest.raises(ValueError, match=r"batch sizes? .*\d.*\d"):
        (case.loss(model(inputs), targets) + case.loss(model(inputs[:2]), targets[:2])).backward()


@named("case", SEVERAL)
def test_two_graphs_two_backwards(case, device):
    """Two losses, each with its own backward pass: the quantities of the last one, unmixed."""
    model, inputs, targets, expected = prepare(case, device)
    first = case.loss(model(inputs[:2]), targets[:2])
    second = case.loss(model(inputs), targets)
    with backpack(*all_extensions()):
        first.backward()
        model.zero_grad()
        second.backward()
    assert_quantities(model, expected)


@named("case", SEVERAL)
def test_graphs_that_are_never_differentiated(case, device):
    """Forward passes without backward, alive or dropped, do not count."""
    model, inputs, targets, expected = prepare(case, device)
    kept = case.loss(model(inputs[:2]), targets[:2])
    model(inputs[:1])
    with backpack(*all_extensions()):
        case.loss(model(inputs), targets).backward()
    assert_quantities(model, expected)
    assert kept.requires_grad


def test_a_branch_that_the_loss_does_not_see(device):
    """A module used twice, once in a dead branch: the live use is all there is."""
    torch.manual_seed(0)
    linear = extend(nn.Linear(3, 3)).double().to(device)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    dead = linear(x)
    output = linear(x.tanh())
    with backpack(BatchGrad()):
        output.square().sum().backward()
    expected = torch.einsum("no,ni->noi", 2 * output, x.tanh()).detach().cpu()
    assert_close("grad_batch", linear.weight.grad_batch, expected, 1e-12)
    assert dead.requires_grad


def test_part_of_a_graph(device):
    """inputs=[...] cuts a shared module's earlier use off: the quantities are those of what was differentiated."""
    torch.manual_seed(0)
    linear = extend(nn.Linear(3, 3)).double().to(device)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    hidden = linear(x)
    loss = linear(hidden).square().sum()
    with backpack(BatchGrad()):
        (partial,) = torch.autograd.grad(loss, linear.weight, retain_graph=True)
    assert_close("both uses", linear.weight.grad_batch.sum(0), partial.cpu(), 1e-12)


@named("case", {name: MODELS[name] for name in MODELS if MODELS[name].vocabulary == 0})
def test_results_are_differentiable_under_create_graph(case, device):
    """The gradient of a function of all quantities, by double backward through a per-sample loop."""
    model, inputs, targets, _ = prepare(case, device)
    weights = torch.linspace(0.5, 1.5, len(inputs), dtype=torch.float64)

    def objective(quantities):  # of (batch_grad, batch_l2, sum_grad_squared, variance)
        rows, norms, squares, variance = quantities
        rows = torch.einsum("n,n...->...", weights.to(rows), rows)
        return (
            rows.sin().sum()
            + (weights.to(norms) * norms).sum()
            + (1 + squares).log().sum()
            + (variance * squares).sum()
        )

    with backpack(*all_extensions()), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        torch.autograd.grad(case.loss(model(inputs), targets), list(model.parameters()), create_graph=True)
    total = sum(objective([getattr(p, name) for name in SAVED]) for p in model.parameters() if p.requires_grad)
    actual = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)

    stock, x, y = case.stock(), inputs.cpu(), targets.cpu()
    parameters = list(stock.parameters())
    scale = 1 / len(x) if case.loss.reduction == "mean" else 1
    rows = []
    for n in range(len(x)):
        with sdpa_kernel(SDPBackend.MATH):
            loss = scale * case.loss(stock(x[n : n + 1]), y[n : n + 1])
        rows.append(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))
    stats = [from_per_sample(torch.stack(r)) for r in zip(*rows, strict=True)]
    reference = sum(objective([s.batch_grad, s.batch_l2, s.sum_grad_squared, s.variance]) for s in stats)
    assert_close("objective", total.detach(), reference, 1e-9)
    gradients = torch.autograd.grad(reference, parameters, allow_unused=True)
    largest = max(g.abs().max().item() for g in gradients if g is not None)
    for (name, parameter), gradient, mine in zip(stock.named_parameters(), gradients, actual, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        mine = torch.zeros_like(parameter) if mine is None else mine
        assert_close(name, mine, gradient, 1e-8, largest)


def test_results_hold_no_graph_otherwise(device):
    model, inputs, targets, _ = prepare(MODELS["cnn"], device)
    with backpack(*all_extensions()):
        MODELS["cnn"].loss(model(inputs), targets).backward(retain_graph=True)
    for parameter in model.parameters():
        assert not any(getattr(parameter, name).requires_grad for name in SAVED)


CHECKPOINTED = {
    "whole model": lambda model, x, reentrant: checkpoint(model, x, use_reentrant=reentrant),
    "two segments": lambda model, x, reentrant: checkpoint_sequential(model, 2, x, use_reentrant=reentrant),
    "nested": lambda model, x, reentrant: checkpoint(
        lambda z: model[-1](checkpoint(model[:-1], z, use_reentrant=reentrant)), x, use_reentrant=reentrant
    ),
}


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@named("run", CHECKPOINTED)
@named("case", some(MODELS, "mlp", "cnn", "decoder", "layer norm", "attention without bias"))
def test_gradient_checkpointing(case, run, reentrant, device):
    model, inputs, targets, expected = prepare(case, device)
    sequence = model if isinstance(model, nn.Sequential) else nn.Sequential(model)
    if len(sequence) == 1 and run is not CHECKPOINTED["whole model"]:
        pytest.skip("one module")
    inputs.requires_grad_(reentrant)  # that kind needs an input with a graph
    with backpack(*all_extensions()):
        case.loss(run(sequence, inputs, reentrant), targets).backward()
    assert_quantities(model, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_checkpointing_a_shared_module(reentrant, device):
    """Its uses in different segments add up, or there is an error."""
    torch.manual_seed(0)
    shared, out = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    stock = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), out)
    expected = expected_of(stock, lambda n: stock(x[n : n + 1]).square().sum(), 3)
    model = extend(stock).to(device)
    x = x.to(device).requires_grad_()

    def step():
        hidden = checkpoint(nn.Sequential(shared, nn.Tanh()), x, use_reentrant=reentrant)
        hidden = checkpoint(nn.Sequential(shared, nn.Tanh()), hidden, use_reentrant=reentrant)
        with backpack(*all_extensions()):
            out(hidden).square().sum().backward()

    if reentrant:
        with pytest.raises(NotImplementedError, match="use_reentrant=False"):
            step()
    else:
        step()
        assert_quantities(model, expected)


@named("case", some(MODELS, "mlp", "cnn", "tied weights", "layer norm"))
def test_autocast(case, device):
    """bfloat16 layers: quantities in float32, near the exact ones; the backward pass inside autocast or outside."""
    inputs, targets = case.data()
    expected = case.expected(inputs, targets)
    for inside in (True, False):
        model = case.prepared().float().to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = case.loss(model(inputs.float().to(device)), targets.to(device))
            if inside:
                with backpack(*all_extensions()):
                    loss.backward()
        if not inside:
            with backpack(*all_extensions()):
                loss.backward()
        largest = max(stats.batch_grad.abs().max().item() for stats in expected.values())
        for name, parameter in model.named_parameters():
            stats = expected[name]
            size = max(stats.batch_grad.abs().max().item(), 0.1 * largest)
            assert parameter.grad.dtype == torch.float32
            assert_close(name, parameter.grad, stats.grad, 0.1, size)
            for attribute, statistic in SAVED.items():
                value, reference = getattr(parameter, attribute), getattr(stats, statistic)
                if attribute != "grad_batch":
                    assert value.dtype == torch.float32
                own = max(size, size * size if attribute != "grad_batch" else 0, reference.abs().max().item())
                assert_close(f"{name}.{attribute}", value.float(), reference, 0.1, own)


def test_autocast_quantities_belong_to_the_gradients(device):
    """Under autocast the per-sample gradients sum to the gradient, within bfloat16's rounding."""
    model, inputs, targets, _ = prepare(MODELS["cnn"], device)
    model, inputs = model.float(), inputs.float()
    with torch.autocast(device.type, torch.bfloat16), backpack(*all_extensions()):
        MODELS["cnn"].loss(model(inputs), targets).backward()
    for name, parameter in model.named_parameters():
        rows = parameter.grad_batch.double()
        assert_close(name, rows.sum(0), parameter.grad.double(), 2e-2, rows.abs().sum(0).max().item())
        norms = rows.flatten(1).square().sum(1)
        assert_close(name, parameter.batch_l2, norms, 2e-2)


def test_regularisers_do_not_enter(device):
    """A penalty on the weights is part of `.grad`, and of no sample's contribution (as in BackPACK)."""
    model, inputs, targets, expected = prepare(MODELS["mlp"], device)
    penalty = sum(p.square().sum() for p in model.parameters())
    with backpack(*all_extensions()):
        (MODELS["mlp"].loss(model(inputs), targets) + 0.1 * penalty).backward()
    for parameter in model.parameters():
        parameter.grad -= 0.2 * parameter.detach()
    assert_quantities(model, expected)


def test_gradient_hooks_change_the_gradient_alone(device):
    """Hooks on parameters see `.grad`; hooks on activations change what reaches the layers before."""
    model, inputs, targets, expected = prepare(MODELS["mlp"], device)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 3 * gradient)
    with backpack(*all_extensions()):
        MODELS["mlp"].loss(model(inputs), targets).backward()
    for parameter in model.parameters():
        parameter.grad /= 3
    assert_quantities(model, expected)

    model, inputs, targets, expected = prepare(MODELS["mlp"], device)
    hidden = model[:2](inputs)
    hidden.register_hook(lambda gradient: 2 * gradient)
    with backpack(BatchGrad()):
        MODELS["mlp"].loss(model[2:](hidden), targets).backward()
    assert_close("after", model[2].weight.grad_batch, expected["2.weight"].batch_grad, 1e-9)
    assert_close("before", model[0].weight.grad_batch, 2 * expected["0.weight"].batch_grad, 1e-9)


def test_an_error_in_the_backward_pass_leaves_nothing_behind(device):
    """The next backward pass is right, also for a module whose first use had been seen already."""
    case = MODELS["shared modules"]
    model, inputs, targets, expected = prepare(case, device)

    def fail(module):
        raise KeyError("from the hook")

    for how in ("hook", "graph"):
        with backpack(*all_extensions(), extension_hook=fail if how == "hook" else None):
            x = inputs.clone().requires_grad_()
            if how == "graph":
                x.register_hook(lambda gradient: 1 / 0)
            with pytest.raises((KeyError, ZeroDivisionError)):
                case.loss(model(x), targets).backward()
        assert CTX.get_active_exts() == ()
        model.zero_grad()
        with backpack(*all_extensions()):
            case.loss(model(inputs), targets).backward()
        assert_quantities(model, expected)


def test_a_backward_pass_inside_a_backward_pass(device):
    """A gradient hook that differentiates another extended model: both get their own quantities."""
    model, inputs, targets, expected = prepare(MODELS["mlp"], device)
    other = MODELS["mlp"].prepared().to(device)

    def differentiate_other(gradient):
        with torch.enable_grad():
            MODELS["mlp"].loss(other(inputs), targets).backward()

    hidden = model[0](inputs)
    hidden.register_hook(differentiate_other)
    with backpack(*all_extensions()):
        MODELS["mlp"].loss(model[1:](hidden), targets).backward()
    assert_quantities(model, expected)
    assert_quantities(other, expected)


def collected(reference: weakref.ref) -> bool:
    gc.collect()
    return reference() is None


def remember(model: nn.Module) -> list[weakref.ref]:
    """Weak references to the inputs and outputs of every module in the next forward pass."""
    references: list[weakref.ref] = []

    def note(module, inputs, output):
        references.extend(weakref.ref(t) for t in (*inputs, output) if isinstance(t, torch.Tensor))

    for module in model.modules():
        module.register_forward_hook(note)
    return references


@pytest.mark.parametrize("how", list(LAYERS))
@named("case", some(MODELS, "cnn", "residual", "shared modules", "layer norm", "lstm"))
def test_nothing_is_kept_after_backward(case, how, device):
    """No activation, no graph and no attribute outlives the backward pass, and no reference cycle holds any."""
    model, inputs, targets, _ = prepare(case, device, how)
    references = remember(model)
    gc.disable()
    try:
        with backpack(*all_extensions(), extension_hook=lambda module: None):
            case.loss(model(inputs.clone()), targets).backward()
        alive = [r().shape for r in references if r() is not None]
    finally:
        gc.enable()
    assert len(references) > 4 and not alive
    for module in model.modules():
        assert not {"input0", "input1", "output"} & set(vars(module))


@pytest.mark.parametrize("context", [torch.no_grad, disable, torch.inference_mode])
@named("case", some(MODELS, "cnn", "shared modules", "layer norm", "lstm"))
def test_nothing_is_kept_without_a_graph(case, context, device):
    model, inputs, _, _ = prepare(case, device)
    references = remember(model)
    with context():
        model(inputs.clone())
    assert references and all(collected(r) for r in references)


def test_nothing_is_kept_by_graphs_that_are_dropped(device):
    """A forward pass whose loss is dropped frees everything at once."""
    case = MODELS["shared modules"]
    model, inputs, _, _ = prepare(case, device)
    references = remember(model)
    gc.disable()
    try:
        model(inputs.clone())
        assert not any(r() is not None for r in references)
    finally:
        gc.enable()


def test_models_are_freed(device):
    """Extended models, used or not, go with their last reference."""
    for name in ("cnn", "layer norm", "tied weights"):
        model, inputs, targets, _ = prepare(MODELS[name], device)
        with backpack(*all_extensions()):
            MODELS[name].loss(model(inputs), targets).backward()
        reference = weakref.ref(next(model.parameters()))
        del model
        assert collected(reference)


def test_disable(device):
    """Layers run as torch's own inside `disable()`; a later backward pass forms nothing for them."""
    model, inputs, targets, expected = prepare(MODELS["mlp"], device)
    assert disable.should_store_io()
    with disable():
        assert not disable.should_store_io()
        with disable():
            pass
        assert not disable.should_store_io()
        loss = MODELS["mlp"].loss(model(inputs), targets)
    assert disable.should_store_io()
    with backpack(*all_extensions()):
        loss.backward()
    assert_no_quantities(model)
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, expected[name].grad, 1e-9)


@pytest.mark.parametrize("kept", [False, True], ids=["freed", "retain_graph"])
def test_store_io(kept, device):
    """`extend(..., store_io=True)`: BackPACK's input0 and output, from the forward pass to the backward pass."""
    case = MODELS["mlp"]
    inputs, targets = (t.to(device) for t in case.data())
    model = extend(case.stock().to(device), store_io=True)
    outputs = model(inputs)
    assert torch.equal(model[0].input0, inputs)
    assert torch.equal(model[1].output, model[2].input0)
    assert torch.equal(model[4].output, outputs)
    seen = []
    with backpack(*all_extensions(), retain_graph=kept, extension_hook=lambda m: seen.append(m.input0.shape)):
        case.loss(outputs, targets).backward(retain_graph=kept)
    assert len(seen) >= len(model)
    for module in model:
        assert hasattr(module, "input0") == kept and hasattr(module, "output") == kept
        memory_cleanup(module)
        assert not hasattr(module, "input0") and not hasattr(module, "output")
    assert_quantities(model, case.expected(*case.data()))
    with torch.no_grad():
        model(inputs)
    assert not hasattr(model[0], "input0")


def test_extension_hook(device):
    """Called as soon as a module's results are there, last layer first; results may be taken and deleted there."""
    case = MODELS["mlp"]
    model, inputs, targets, expected = prepare(case, device)
    order, taken = [], {}
    activations = [inputs]
    for module in model:
        activations.append(module(activations[-1]))
    names = {module: name for name, module in model.named_modules()}

    def take(module):
        order.append(names[module])
        if isinstance(module, nn.Linear):
            assert torch.equal(module.input0, activations[int(names[module])])
        for name, parameter in module.named_parameters(recurse=False):
            taken[f"{names[module]}.{name}"] = parameter.grad_batch
            del parameter.grad_batch

    with backpack(BatchGrad(), BatchL2Grad(), extension_hook=take):
        case.loss(model(inputs), targets).backward()
    assert [name for name in order if name] == ["4", "3", "2", "1", "0"]
    assert_quantities(model, expected, attributes=["batch_l2"])
    for name, rows in taken.items():
        assert_close(name, rows, expected[name].batch_grad, 1e-9)
    assert len(taken) == len(expected)
    assert not any(hasattr(module, "input0") for module in model.modules())


def test_extension_hook_without_extensions(device):
    """The hook runs for every layer although nothing is formed."""
    case = MODELS["mlp"]
    model, inputs, targets, _ = prepare(case, device)
    seen = []
    with backpack(extension_hook=seen.append):
        case.loss(model(inputs), targets).backward()
    assert [m for m in seen if isinstance(m, nn.Linear)] == [model[4], model[2], model[0]]
    assert_no_quantities(model)


def test_extension_hook_of_a_shared_module(device):
    """Once, when the results of all of its uses are there."""
    case = MODELS["shared modules"]
    model, inputs, targets, expected = prepare(case, device)
    seen = []

    def check(module):
        if list(module.parameters(recurse=False)):
            seen.append(module)
            for name, parameter in module.named_parameters():
                full = {id(p): n for n, p in model.named_parameters()}[id(parameter)]
                assert_close(name, parameter.batch_l2, expected[full].batch_l2, 1e-9)

    with backpack(*all_extensions(), extension_hook=check):
        case.loss(model(inputs), targets).backward()
    assert sorted(map(id, seen)) == sorted(map(id, (model.conv, model.linear, model.out)))


INPUTS = {
    "circular": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (4, 2, 7)),
    "same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (4, 2, 5, 6)),
    "tokens": (lambda: nn.Linear(3, 2), (4, 5, 3)),
    "norm": (lambda: nn.LayerNorm(3), (4, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(3).eval(), (4, 3)),
}


@named("build, shape", INPUTS)
def test_input0_is_what_the_module_got(build, shape, device):
    """Not the padded tensor that the layer works on."""
    layer = extend(build()).to(device)
    x = torch.randn(shape, device=device)
    seen = []
    with backpack(BatchL2Grad(), extension_hook=lambda module: seen.append(module.input0.clone())):
        layer(x).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], x)


def test_debug_prints(device, capsys):
    model, inputs, targets, _ = prepare(MODELS["mlp"], device)
    with backpack(BatchGrad(), debug=True):
        MODELS["mlp"].loss(model(inputs), targets).backward()
    assert "[DEBUG]" in capsys.readouterr().out
    extend(mlp(nn), debug=True)
    assert "[DEBUG] Extending Linear" in capsys.readouterr().out


def test_differentiable_output_changed_in_place(device):
    """Activations in place, right after layers with a rule and without."""
    for second in (nn.Linear(4, 4), nn.LayerNorm(4)):
        stock = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), second, nn.ELU(inplace=True), nn.Linear(4, 2))
        stock = stock.double()
        x = torch.randn(5, 3, dtype=torch.float64)
        expected = expected_of(stock, lambda n: stock(x[n : n + 1]).square().sum(), 5)  # noqa: B023
        model = extend(stock).to(device)
        with backpack(*all_extensions()):
            model(x.to(device)).square().sum().backward()
        assert_quantities(model, expected)


def test_loss_of_several_outputs(device):
    """Losses on hidden activations as well: everything that reaches a layer counts once."""
    stock = mlp(nn).double()
    x = torch.randn(4, 6, dtype=torch.float64)

    def loss(model, x):
        hidden = model[:3](x)
        output = model[3:](hidden)
        return output.square().sum() + hidden.sin().sum() + F.softplus(output).sum()

    expected = expected_of(stock, lambda n: loss(stock, x[n : n + 1]), 4)
    model = extend(stock).to(device)
    with backpack(*all_extensions()):
        loss(model, x.to(device)).backward()
    assert_quantities(model, expected)

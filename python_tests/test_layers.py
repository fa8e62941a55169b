"""The layers against torch.nn's: results, gradients, copies, transforms; and `extend` on stock modules."""

import copy
import inspect
import io
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, named, some
from model_cases import LAYERS, MODELS, SAVED, all_extensions, assert_no_quantities, assert_quantities
from oracle import from_per_sample, per_sample_gradients
from torch import Tensor, nn

import backpack_cuda as bp
from backpack_cuda import backpack, extend
from backpack_cuda.extensions import BatchGrad

# torch's own warnings: about a copy for even kernels, and about its use of its own old compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:DeprecationWarning"),
]

OWN = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")

# name of the layer, its arguments, keyword arguments, shape of the input, further arguments of the call
CALLS = {
    "linear": ("Linear", (3, 4), {}, (5, 3), ()),
    "linear without bias": ("Linear", (3, 4), {"bias": False}, (5, 3), ()),
    "linear, tokens": ("Linear", (3, 4), {}, (5, 2, 3), ()),
    "linear, one token": ("Linear", (3, 4), {}, (5, 1, 3), ()),
    "linear, unbatched": ("Linear", (3, 4), {}, (3,), ()),
    "linear of one feature": ("Linear", (1, 1), {}, (4, 1), ()),
    **{
        f"conv{dims}d, {mode}, {padding}": (
            f"Conv{dims}d",
            (4, 6, (3, 2, 2)[:dims]),
            {"padding": padding, "padding_mode": mode, "groups": 2},
            (3, 4, *(7, 5, 4)[:dims]),
            (),
        )
        for dims in (1, 2, 3)
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in (1, "same", "valid")
    },
    "conv same with even kernel": ("Conv2d", (2, 3, (4, 2)), {"padding": "same", "dilation": (1, 3)}, (2, 2, 7, 8), ()),
    "conv uneven circular": (
        "Conv2d",
        (2, 3, 3),
        {"padding": (2, 0), "padding_mode": "circular", "stride": (2, 1), "dilation": (1, 2)},
        (2, 2, 7, 8),
        (),
    ),
    "conv depthwise": ("Conv2d", (4, 8, 3), {"groups": 4, "bias": False, "padding": 1}, (3, 4, 5, 6), ()),
    "conv, unbatched": ("Conv2d", (2, 3, 3), {"padding": 1}, (2, 5, 6), ()),
    "conv circular, unbatched": ("Conv1d", (2, 3, 3), {"padding": 2, "padding_mode": "circular"}, (2, 5), ()),
    "conv3d, unbatched": ("Conv3d", (2, 3, 2), {}, (2, 3, 4, 3), ()),
    "conv of one pixel": ("Conv2d", (2, 3, 1), {}, (4, 2, 1, 1), ()),
    **{
        f"transposed {dims}d": (
            f"ConvTranspose{dims}d",
            (4, 6, (3, 2, 2)[:dims]),
            {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
            (3, 4, *(4, 3, 2)[:dims]),
            (),
        )
        for dims in (1, 2, 3)
    },
    "transposed, dilated": ("ConvTranspose2d", (2, 3, 3), {"dilation": (1, 3), "bias": False}, (2, 2, 3, 4), ()),
    "transposed, output_size": ("ConvTranspose2d", (2, 3, 3), {"stride": 3}, (2, 2, 3, 4), ((10, 13),)),
    "transposed, full output_size": ("ConvTranspose1d", (2, 3, 3), {"stride": 3}, (2, 2, 3), ((2, 3, 11),)),
    "transposed, torch.Size": (
        "ConvTranspose1d",
        (2, 3, 3),
        {"stride": 2},
        (2, 2, 3),
        (torch.Size([8]),),
    ),
    "transposed, unbatched": ("ConvTranspose2d", (2, 3, 2), {"stride": 2}, (2, 3, 4), ()),
}


def pair(name: str, arguments: tuple, options: dict, dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    """(stock layer, ours) with the same parameters."""
    torch.manual_seed(0)
    stock = getattr(nn, name)(*arguments, **options, dtype=dtype)
    ours = getattr(bp, name)(*arguments, **options, dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def results(layer: nn.Module, x: Tensor, extra: tuple) -> list[Tensor]:
    """Output and all gradients of a fixed scalar of it."""
    x = x.clone().requires_grad_()
    output = layer(x, *extra)
    (output.sin() * torch.linspace(1, 2, output.numel(), dtype=x.dtype).view(output.shape)).sum().backward()
    return [output, x.grad, *[p.grad for p in layer.parameters()]]


@pytest.mark.parametrize("extensions", [(), all_extensions()], ids=["plain", "quantities"])
@named("name, arguments, options, shape, extra", CALLS)
def test_outputs_and_gradients(name, arguments, options, shape, extra, extensions, device):
    """Ours and extended stock layers against stock ones, with and without quantities asked for."""
    stock, ours = pair(name, arguments, options)
    x = torch.randn(shape, dtype=torch.float64)
    expected = results(stock, x, extra)
    for layer in (ours, extend(copy.deepcopy(stock))):
        layer.zero_grad()
        with backpack(*extensions):
            for actual, reference in zip(results(layer, x, extra), expected, strict=True):
                assert actual.shape == reference.shape
                assert torch.allclose(actual, reference, rtol=1e-10, atol=1e-12)


@named("name, arguments, options, shape, extra", CALLS)
def test_quantities(name, arguments, options, shape, extra, device):
    """One layer against the loop over samples; an input without batch dimension is a batch of one."""
    stock, ours = pair(name, arguments, options)
    x = torch.randn(shape, dtype=torch.float64)
    unbatched = len(shape) < (2 if name == "Linear" else 2 + len(stock.kernel_size))
    samples = 1 if unbatched else len(x)

    def sample_loss(n: int) -> Tensor:
        one = x if unbatched else x[n : n + 1]
        size = (extra[0] if len(extra[0]) != x.dim() else (1, *extra[0][1:]),) if extra else ()
        return stock(one, *size).sin().sum()

    rows = per_sample_gradients(sample_loss, list(stock.parameters()), samples)
    expected = dict(zip([n for n, _ in stock.named_parameters()], map(from_per_sample, rows), strict=True))
    for layer in (ours, extend(copy.deepcopy(stock))):
        layer.zero_grad()
        with backpack(*all_extensions()):
            layer(x, *extra).sin().sum().backward()
        assert_quantities(layer, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@named("name, arguments, options, shape, extra", CALLS)
def test_forward_is_bitwise_the_stock_one(name, arguments, options, shape, extra, dtype, device):
    stock, ours = pair(name, arguments, options, dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = stock(x, *extra)
    for layer in (ours, extend(copy.deepcopy(stock))):
        assert torch.equal(layer(x, *extra), expected)
        with torch.no_grad():
            assert torch.equal(layer(x, *extra), expected)


@named(
    "name, arguments, options, shape, extra",
    some(CALLS, "linear", "conv2d, circular, 1", "transposed 3d"),
)
def test_channels_last_and_strides(name, arguments, options, shape, extra, device):
    stock, ours = pair(name, arguments, options)
    x = torch.randn(*shape, 2, dtype=torch.float64)[..., 0]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for operand in (x, x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format)), x[:1].expand(shape)):
        stock.zero_grad()
        ours.zero_grad()
        expected = results(stock, operand, extra)
        with backpack(*all_extensions()):
            for actual, reference in zip(results(ours, operand, extra), expected, strict=True):
                assert torch.allclose(actual, reference, rtol=1e-10, atol=1e-12)


BAD_CALLS = {
    "linear features": ("Linear", (3, 4), (5, 2)),
    "conv channels": ("Conv2d", (3, 4, 2), (5, 2, 4, 4)),
    "conv rank": ("Conv2d", (3, 4, 2), (5, 3, 4, 4, 4)),
    "conv rank too low": ("Conv2d", (3, 4, 2), (3, 4)),
    "conv kernel too large": ("Conv2d", (3, 4, 5), (5, 3, 4, 4)),
    "transposed channels": ("ConvTranspose1d", (3, 4, 5), (5, 2, 4)),
    "transposed rank": ("ConvTranspose1d", (3, 4, 5), (5, 3, 4, 4)),
}


@named("name, arguments, shape", BAD_CALLS)
def test_bad_inputs_raise_as_in_torch(name, arguments, shape):
    stock, ours = pair(name, arguments, {})
    x = torch.randn(shape, dtype=torch.float64)
    with pytest.raises(Exception) as expected:  # noqa: B017, PT011
        stock(x)
    for layer in (ours, extend(copy.deepcopy(stock))):
        with pytest.raises(type(expected.value)):
            layer(x)


@pytest.mark.parametrize("name", OWN)
def test_own_layers_are_torch_layers(name):
    """Subclasses with the same constructor, the same representation and exchangeable state."""
    own, stock = getattr(bp, name), getattr(nn, name)
    assert issubclass(own, stock) and own.__name__ == name
    assert inspect.signature(own) == inspect.signature(stock)
    arguments = (3, 4) if name == "Linear" else (3, 4, 2)
    layer, reference = own(*arguments, bias=False), stock(*arguments, bias=False)
    assert repr(layer) == repr(reference)
    assert layer.state_dict().keys() == reference.state_dict().keys()
    layer.load_state_dict(reference.state_dict())
    reference.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, reference.weight)


def copied_by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def copied_by_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def copied_by_state(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": copied_by_pickle,
    "torch.save": copied_by_save,
    "state_dict": copied_by_state,
    "deepcopy of a copy": lambda model: copy.deepcopy(copied_by_pickle(model)),
}


@pytest.mark.parametrize("how", list(LAYERS))
@named("copier", COPIES)
@named("case", some(MODELS, "cnn", "residual", "shared modules", "tied weights", "layer norm", "lstm"))
def test_copies(case, copier, how, device):
    """A copy has its own quantities; the original's stay untouched, before and after it was used itself."""
    inputs, targets = (t.to(device) for t in case.data())
    expected = case.expected(*case.data())
    original = case.prepared(how).to(device)
    for used in (False, True):
        model = copier(original)
        model.zero_grad()
        for parameter in model.parameters():
            for name in SAVED:
                vars(parameter).pop(name, None)
        with backpack(*all_extensions()):
            case.loss(model(inputs), targets).backward()
        assert_quantities(model, expected)
        if not used:
            assert_no_quantities(original)
            with backpack(*all_extensions()):
                case.loss(original(inputs), targets).backward()
            assert_quantities(original, expected)


def test_state_dict_keys_do_not_change():
    for name in ("cnn", "layer norm", "lstm"):
        stock = MODELS[name].stock()
        keys = list(stock.state_dict())
        assert list(extend(stock).state_dict()) == keys
        assert list(MODELS[name].prepared("own layers").state_dict()) == keys


def test_extend_is_idempotent_and_in_place(device):
    model = MODELS["residual"].stock().to(device)
    classes = {name: type(module) for name, module in model.named_modules()}
    assert extend(model) is model
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    assert extend(extend(model)) is model
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert {name: type(module) for name, module in model.named_modules()} == classes
    inputs, targets = MODELS["residual"].data()
    with backpack(*all_extensions()):
        MODELS["residual"].loss(model(inputs.to(device)), targets.to(device)).backward()
    assert_quantities(model, MODELS["residual"].expected(inputs, targets))


@pytest.mark.parametrize(
    "wrong", [None, torch.nn.Linear, torch.ones(2), [nn.Linear(1, 1)]], ids=lambda v: type(v).__name__
)
def test_extend_takes_modules(wrong):
    with pytest.raises((TypeError, ValueError), match="module"):
        extend(wrong)


def test_extending_parts(device):
    """Only what was extended gets results; own layers need no extension."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), bp.Linear(4, 4), nn.ReLU(), extend(nn.Linear(4, 2))).to(device)
    with backpack(*all_extensions()):
        model(torch.randn(5, 3, device=device)).sum().backward()
    assert not hasattr(model[0].weight, "grad_batch")
    for index in (2, 4):
        assert model[index].weight.grad_batch.shape == (5, *model[index].weight.shape)


def test_layers_added_after_extend(device):
    """A module put in later is extended by another `extend` of the whole."""
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.ReLU())).to(device)
    model.append(nn.Linear(4, 2).to(device))
    extend(model)
    with backpack(*all_extensions()):
        model(torch.randn(5, 3, device=device)).sum().backward()
    assert model[0].weight.grad_batch.shape == (5, 4, 3) and model[2].weight.grad_batch.shape == (5, 2, 4)


def test_changed_layers(device):
    """Hyperparameters, parameters and devices may change after `extend`."""
    torch.manual_seed(0)
    layer = extend(nn.Conv2d(2, 3, 3)).to(device)
    x = torch.randn(4, 2, 7, 6, dtype=torch.float64, device=device)
    layer.double()
    layer.padding, layer.stride = (1, 2), (2, 1)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    with backpack(*all_extensions()):
        layer(x).square().sum().backward()
    stock = nn.Conv2d(2, 3, 3, padding=(1, 2), stride=(2, 1)).double()
    stock.load_state_dict(layer.state_dict())
    x = x.cpu()
    rows = per_sample_gradients(lambda n: stock(x[n : n + 1]).square().sum(), list(stock.parameters()), 4)
    assert_quantities(layer, dict(zip(("weight", "bias"), map(from_per_sample, rows), strict=True)))


def test_parameter_replaced_between_forward_and_backward(device):
    """Results belong to the parameter that was used, or to none; not to another one of the same name."""
    layer = bp.Linear(3, 2).to(device)
    used = layer.weight
    output = layer(torch.randn(4, 3, device=device))
    layer.weight = nn.Parameter(torch.zeros_like(used))
    with backpack(BatchGrad()):
        output.sum().backward()
    assert used.grad is not None and layer.weight.grad is None
    assert not hasattr(layer.weight, "grad_batch")


@pytest.mark.parametrize("how", list(LAYERS))
def test_functional_call(how, device):
    """torch.func.functional_call with other tensors: `.grad` of those, and no result on the module's own parameters."""
    model = MODELS["mlp"].prepared(how).to(device)
    inputs, targets = (t.to(device) for t in MODELS["mlp"].data())
    others = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    with backpack(*all_extensions()):
        MODELS["mlp"].loss(torch.func.functional_call(model, others, (inputs,)), targets).backward()
    stock = MODELS["mlp"].stock()
    stock.load_state_dict({name: p.detach().cpu() for name, p in others.items()})
    MODELS["mlp"].loss(stock(inputs.cpu()), targets.cpu()).backward()
    for name, parameter in stock.named_parameters():
        assert_close(name, others[name].grad, parameter.grad, 1e-9)
    assert_no_quantities(model)


@pytest.mark.parametrize("how", list(LAYERS))
def test_module_hooks(how, device):
    """Forward and full backward hooks see what they see on stock modules, and may change it."""
    seen = {}
    for kind in ("stock", how):
        model = MODELS["mlp"].stock() if kind == "stock" else MODELS["mlp"].prepared(kind)
        model = model.to(device)
        seen[kind] = log = []
        model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        model[2].register_forward_hook(lambda m, args, output: output + 1)
        for module in model:
            module.register_full_backward_hook(lambda m, gi, go, log=log: log.append((gi[0], go[0])))
            module.register_full_backward_pre_hook(lambda m, go, log=log: log.append((go[0],)))
        inputs, targets = (t.to(device) for t in MODELS["mlp"].data())
        inputs.requires_grad_()
        with backpack(*all_extensions()):
            MODELS["mlp"].loss(model(inputs), targets).backward()
        log.append((inputs.grad, *[p.grad for p in model.parameters()]))
    assert len(seen["stock"]) == len(seen[how])
    for expected, actual in zip(seen["stock"], seen[how], strict=True):
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(actual, expected, strict=True))


FUNCTIONAL = some(MODELS, "mlp", "cnn", "decoder", "layer norm", "conv1d same, circular", "shared modules")


@pytest.mark.parametrize("how", list(LAYERS))
@named("case", FUNCTIONAL)
def test_func_transforms(case, how, device):
    """grad, vmap(grad), jvp and grad(grad) through the layers, against stock ones."""
    inputs, targets = (t.to(device) for t in case.data())
    outcomes = []
    for model in (case.stock().to(device), case.prepared(how).to(device)):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, x=inputs, y=targets, model=model):
            return case.loss(torch.func.functional_call(model, parameters, (x,)), y)

        def sample_loss(parameters, x, y, loss=loss):
            return loss(parameters, x[None], y[None])

        def slope(parameters, loss=loss):
            return sum(g.sum() for g in torch.func.grad(loss)(parameters).values())

        whole = torch.func.grad(loss)(parameters)
        rows = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0))(parameters, inputs, targets)
        tangent = {name: torch.ones_like(p) for name, p in parameters.items()}
        jvp = torch.func.jvp(loss, (parameters,), (tangent,))[1]
        second = torch.func.grad(slope)(parameters)
        outcomes.append([*whole.values(), *rows.values(), jvp, *second.values()])
        assert_no_quantities(model)
    for stock, ours in zip(*outcomes, strict=True):
        assert torch.allclose(stock, ours, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", list(LAYERS))
@named("case", FUNCTIONAL)
def test_forward_mode(case, how, device):
    """torch.autograd.forward_ad through the layers, inside and outside of a context."""
    inputs, _ = (t.to(device) for t in case.data())
    tangents = []
    for model in (case.stock().to(device), case.prepared(how).to(device)):
        with backpack(*all_extensions()), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs, torch.ones_like(inputs))
            tangents.append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent)
    assert torch.allclose(*tangents, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", list(LAYERS))
@named("case", FUNCTIONAL)
def test_second_derivatives(case, how, device):
    """Double backward through the layers, without any quantity."""
    inputs, targets = (t.to(device) for t in case.data())
    outcomes = []
    for model in (case.stock().to(device), case.prepared(how).to(device)):
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(case.loss(model(inputs), targets), parameters, create_graph=True)
        outcomes.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters))
    for stock, ours in zip(*outcomes, strict=True):
        assert torch.allclose(stock, ours, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", list(LAYERS))
@named("case", some(MODELS, "cnn", "decoder", "residual", "layer norm", "conv1d same, circular"))
def test_compile(case, how, device):
    """One graph without a break; same outputs and gradients."""
    torch._dynamo.reset()
    inputs, targets = (t.to(device) for t in case.data())
    model, stock = case.prepared(how).to(device), case.stock().to(device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    case.loss(compiled(inputs), targets).backward()
    case.loss(stock(inputs), targets).backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert_no_quantities(model)


@pytest.mark.parametrize("how", list(LAYERS))
def test_export(how, device):
    """torch.export of a model sees torch's own operators."""
    inputs, _ = (t.to(device) for t in MODELS["cnn"].data())
    model = MODELS["cnn"].prepared(how).to(device)
    program = torch.export.export(model, (inputs,))
    assert torch.allclose(program.module()(inputs), model(inputs))


@named(
    "name, arguments, options, shape, extra",
    some(CALLS, "linear", "conv2d, zeros, 1", "transposed 2d"),
)
def test_autocast_outputs(name, arguments, options, shape, extra, device):
    """Same types and, bit for bit, the same numbers as torch's layers under autocast."""
    stock, ours = pair(name, arguments, options, torch.float32)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        expected = stock(x, *extra)
        for layer in (ours, extend(copy.deepcopy(stock))):
            output = layer(x, *extra)
            assert output.dtype == expected.dtype == torch.bfloat16
            assert torch.equal(output, expected)


def test_keyword_call(device):
    """`layer(input=x)` works (BackPACK: AttributeError)."""
    for layer in (bp.Linear(3, 2), extend(nn.Linear(3, 2)), extend(nn.LayerNorm(3)), bp.ConvTranspose1d(3, 2, 2)):
        x = torch.randn(4, 3, 5) if isinstance(layer, nn.ConvTranspose1d) else torch.randn(4, 3)
        with backpack(*all_extensions()):
            layer(input=x).sum().backward()
        assert layer.weight.grad_batch.shape == (4, *layer.weight.shape)


def test_functional_use_of_a_layer_weight(device):
    """A weight that is also used outside of its module: the module's uses are what quantities are formed of."""
    torch.manual_seed(0)
    layer = bp.Linear(3, 3).double().to(device)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    with backpack(BatchGrad()):
        (layer(x).sum() + 0 * F.linear(x, layer.weight).sum()).backward()
    assert_close("grad_batch", layer.weight.grad_batch.sum(0), layer.weight.grad.cpu(), 1e-12)


def test_threads(device):
    """Backward passes of different models in several threads."""
    case = MODELS["shared modules"]
    inputs, targets = (t.to(device) for t in case.data())
    expected = case.expected(*case.data())
    models = [case.prepared().to(device) for _ in range(8)]

    def step(model):
        for _ in range(5):
            model.zero_grad()
            with backpack(*all_extensions()):
                case.loss(model(inputs), targets).backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(step, models))
    for model in models:
        assert_quantities(model, expected)


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "ConvTranspose1d"])
def test_complex_layers(name, device):
    """Ordinary gradients are torch's; quantities are not defined, and asking for them raises or warns."""
    arguments = (3, 4) if name == "Linear" else (3, 4, 2)
    stock, ours = pair(name, arguments, {}, torch.complex128)
    x = torch.randn(2, 3, *(5,) * (stock.weight.dim() - 2), dtype=torch.complex128)
    outcomes = []
    for layer in (stock, ours, extend(copy.deepcopy(stock))):
        operand = x.clone().requires_grad_()
        layer(operand).abs().sum().backward()
        outcomes.append([operand.grad, layer.weight.grad, layer.bias.grad])
    for actual in outcomes[1:]:
        assert all(torch.allclose(a, b) for a, b in zip(actual, outcomes[0], strict=True))
    with backpack(BatchGrad()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ours(x).abs().sum().backward()
        except (NotImplementedError, TypeError) as error:
            caught.append(error)
    assert caught and not hasattr(ours.weight, "grad_batch")


@pytest.mark.parametrize("prepare", [bp.Linear, lambda *sizes: extend(nn.Linear(*sizes))], ids=["own", "extended"])
def test_nested_tensors(prepare, device):
    """Jagged sequences run as in torch."""
    sequences = [torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)]
    layer = prepare(3, 2).to(device)
    jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    layer(jagged).values().sin().sum().backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    layer(torch.cat(sequences)).sin().sum().backward()
    assert torch.allclose(gradient, layer.weight.grad)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)], ids=["no inputs", "no outputs"])
@pytest.mark.parametrize("exts", [(), (BatchGrad(),)], ids=["plain", "batch_grad"])
def test_linear_without_features(sizes, exts, device):
    """Gradients as of torch's layer, with no entries or zeros."""
    layer = bp.Linear(*sizes).to(device)
    with backpack(*exts):
        layer(torch.randn(2, 4, sizes[0], device=device, requires_grad=True)).sum().backward()
    assert layer.weight.grad.shape == (sizes[1], sizes[0])
    assert torch.equal(layer.bias.grad, torch.full((sizes[1],), 8.0, device=device))


@pytest.mark.parametrize("prepare", [bp.Linear, lambda *sizes: extend(nn.Linear(*sizes))], ids=["own", "extended"])
def test_no_more_is_saved_than_by_torch(prepare, device):
    """A frozen Linear keeps no input; one whose input needs no gradient keeps no weight."""
    frozen = prepare(4, 4).to(device).requires_grad_(False)
    hidden = torch.randn(3, 4, device=device, requires_grad=True) * 2
    reference = weakref.ref(hidden)
    output = frozen(hidden)
    del hidden
    assert reference() is None
    output.sum().backward()
    first = prepare(4, 2).to(device)
    output = first(torch.randn(3, 4, device=device))
    with torch.no_grad():
        first.weight.mul_(2)
    output.sum().backward()
    assert first.weight.grad is not None


@pytest.mark.parametrize("how", list(LAYERS))
def test_symbolic_tracing(how, device):
    """torch.fx.symbolic_trace gives a graph module with the same outputs."""
    for name in ("mlp", "cnn", "decoder", "layer norm"):
        model = MODELS[name].prepared(how).to(device)
        inputs = MODELS[name].data()[0].to(device)
        assert torch.allclose(torch.fx.symbolic_trace(model)(inputs), model(inputs))


def test_biases_tied_between_unlike_layers(device):
    """One bias of two Linear layers with different inputs, and of a Linear layer and a normalisation."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)
    for second in (nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1))):
        stock = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), second).double()
        (second[1] if isinstance(second, nn.Sequential) else second).bias = stock[0].bias
        rows = per_sample_gradients(lambda n: stock(x[n : n + 1]).sin().sum(), list(stock.parameters()), 5)  # noqa: B023
        names = [name for name, _ in stock.named_parameters()]
        model = extend(stock).to(device)
        with backpack(*all_extensions()):
            model(x.to(device)).sin().sum().backward()
        assert_quantities(model, dict(zip(names, map(from_per_sample, rows), strict=True)))

"""Layers and quantities that others write: in BackPACK's way, through both libraries, and in the shorter one."""

import gc
import importlib
import importlib.util
import re
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import backpack_cuda
from backpack_cuda import authored, backpack, extend, extensions
from backpack_cuda.extensions.backprop_extension import InvalidFailMode
from backpack_cuda.rules import registered

ROOT = Path(__file__).resolve().parents[1]
BACKPACK = pytest.param(
    "backpack",
    marks=pytest.mark.skipif(importlib.util.find_spec("backpack") is None, reason="BackPACK is not installed"),
)
LIBRARIES = [BACKPACK, "backpack_cuda"]

# What authors wrote for BackPACK; {library} is all that changes.
AUTHORS = """
import torch
from torch import nn
import {library}
from {library} import backpack, extend, extensions
from {library}.custom_module.branching import SumModule
from {library}.extensions.backprop_extension import FAIL_ERROR, FAIL_SILENT, FAIL_WARN, BackpropExtension
from {library}.extensions.firstorder.base import FirstOrderModuleExtension
from {library}.extensions.module_extension import ModuleExtension
from {library}.extensions.secondorder.diag_ggn import DiagGGNExact
from {library}.extensions.secondorder.diag_ggn.losses import DiagGGNLoss

events = []


class Scale(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, features))

    def forward(self, input):
        return input * self.weight


class Residual(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.inner = nn.Linear(features, features)
        self.activation = nn.Tanh()
        self.sum = SumModule()

    def forward(self, input):
        return self.sum(input, self.activation(self.inner(input)))


class LinearGradients(FirstOrderModuleExtension):
    def __init__(self):
        super().__init__(params=["weight", "bias"])

    def check_hyperparameters_module_extension(self, ext, module, g_inp, g_out):
        shapes = [None if g is None else tuple(g.shape) for g in (*g_inp, *g_out)]
        events.append((type(ext).__name__, type(module).__name__, shapes))

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        assert bpQuantities is None
        return torch.einsum("no,ni->noi", g_out[0], module.input0)

    def bias(self, ext, module, g_inp, g_out, bpQuantities):
        assert module.output.shape == g_out[0].shape
        return g_out[0]


class Gradients(BackpropExtension):
    def __init__(self, module_exts=None, fail_mode=FAIL_WARN, savefield="mine"):
        super().__init__(savefield, {{nn.Linear: LinearGradients()}} if module_exts is None else module_exts, fail_mode)

    def expects_backpropagation_quantities(self):
        return False


class Start(ModuleExtension):
    def backpropagate(self, ext, module, g_inp, g_out, bpQuantities):
        assert bpQuantities is None and module.input1.dtype == torch.long
        p = module.input0.softmax(1)
        root = torch.diag_embed(p.sqrt()) - torch.einsum("nc,nd->ncd", p, p.sqrt())
        return root.permute(2, 0, 1) / p.shape[0] ** 0.5


class Activation(ModuleExtension):
    def backpropagate(self, ext, module, g_inp, g_out, bpQuantities):
        return bpQuantities * (1 - module.output**2)


class Same(ModuleExtension):
    def backpropagate(self, ext, module, g_inp, g_out, bpQuantities):
        return bpQuantities


class LinearDiagonal(ModuleExtension):
    def __init__(self):
        super().__init__(["weight", "bias"])

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return torch.einsum("vno,ni->vnoi", bpQuantities, module.input0).square().sum((0, 1))

    def bias(self, ext, module, g_inp, g_out, bpQuantities):
        return bpQuantities.square().sum((0, 1))

    def backpropagate(self, ext, module, g_inp, g_out, bpQuantities):
        return bpQuantities @ module.weight.detach()


class Diagonal(BackpropExtension):
    def __init__(self, fail_mode=FAIL_ERROR, savefield="mine"):
        modules = {{nn.Linear: LinearDiagonal(), nn.Tanh: Activation(), nn.CrossEntropyLoss: Start()}}
        super().__init__(savefield, {{SumModule: Same(), **modules}}, fail_mode)

    def expects_backpropagation_quantities(self):
        return True


class BranchingDiagonal(Diagonal):
    def accumulate_backpropagated_quantities(self, existing, other):
        return existing + other


class BatchGradScale(FirstOrderModuleExtension):
    def __init__(self):
        super().__init__(params=["weight"])

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return g_out[0] * module.input0


class BatchL2Scale(BatchGradScale):
    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return (g_out[0] * module.input0).square().sum(1)


class SumGradSquaredScale(BatchGradScale):
    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return (g_out[0] * module.input0).square().sum(0)


class DiagGGNScale(ModuleExtension):
    calls = []

    def __init__(self):
        super().__init__(params=["weight"])

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        assert bpQuantities.shape[1:] == module.output.shape == g_out[0].shape
        return (module.input0 * bpQuantities).square().sum((0, 1))

    def backpropagate(self, ext, module, g_inp, g_out, bpQuantities):
        self.calls.append(module)
        return bpQuantities * module.weight


class BatchDiagGGNScale(DiagGGNScale):
    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return (module.input0 * bpQuantities).square().sum(0)


class SqrtGGNScale(DiagGGNScale):
    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return module.input0 * bpQuantities


class KFLRScale(DiagGGNScale):
    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        rows = module.input0 * bpQuantities
        return [torch.einsum("vni,vnj->ij", rows, rows)]

    def backpropagate(self, ext, module, g_inp, g_out, bpQuantities):
        return bpQuantities * module.weight


class WeightedLoss(nn.CrossEntropyLoss):
    pass


class WeightedLossRoot:
    def sqrt_hessian(self, module, g_inp, g_out):
        p = module.input0.softmax(1)
        root = torch.diag_embed(p.sqrt()) - torch.einsum("nc,nd->ncd", p, p.sqrt())
        weight = module.weight[module.input1]
        return root.permute(2, 0, 1) * (weight / weight.sum()).sqrt()[:, None]


class WeightedDiagGGNLoss(DiagGGNLoss):
    def __init__(self):
        super().__init__(derivatives=WeightedLossRoot())
"""


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """Other tests see modules that nobody wrote extensions for, and no registered layers."""
    monkeypatch.setattr(authored, "_module_classes", type(authored._module_classes)())
    monkeypatch.setattr(authored, "_unused", type(authored._unused)())
    monkeypatch.setattr(authored, "_anything", False)
    monkeypatch.setattr(registered, "_REGISTERED", {})


def authors(library: str) -> SimpleNamespace:
    """What the authors wrote, for a library."""
    names = {"__name__": "authors"}
    exec(AUTHORS.format(library=library), names)
    return SimpleNamespace(**names)


def problem(a, *modules, samples: int = 5, features: int = 4):
    """A model of `modules`, extended, a loss and data for it, all in float64."""
    torch.manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    model = a.extend(nn.Sequential(*modules).double())
    loss_function = a.extend(nn.CrossEntropyLoss())
    inputs = torch.randn(samples, features, dtype=torch.float64)
    return model, loss_function, inputs, torch.randint(0, 3, (samples,))


def mlp(a, **options):
    return problem(a, nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), **options)


def step(a, problem, *extensions, retain_graph=False, extension_hook=None, **options):
    """One backward pass; warnings that torch gives on BackPACK's hooks are its own affair."""
    model, loss_function, inputs, targets = problem
    loss = loss_function(model(inputs), targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        with a.backpack(*extensions, retain_graph=retain_graph, extension_hook=extension_hook):
            loss.backward(retain_graph=retain_graph, **options)
    return loss


def results(model: nn.Module, savefield: str = "mine") -> dict:
    return {name: getattr(p, savefield, None) for name, p in model.named_parameters()}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")


# ---- the same code through both libraries


@pytest.mark.parametrize("library", LIBRARIES)
def test_first_order_quantity(library):
    a = authors(library)
    hooked = []
    case = mlp(a)
    step(a, case, a.Gradients(), extension_hook=lambda module: hooked.append(type(module).__name__))
    for parameter in case[0].parameters():
        torch.testing.assert_close(parameter.mine.sum(0), parameter.grad)
    assert a.events == [("Gradients", "Linear", [(5, 6), (5, 3)]), ("Gradients", "Linear", [None, (5, 6)])]
    assert hooked == ["CrossEntropyLoss", "Linear", "Tanh", "Linear"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_second_order_quantity(library):
    """Handed back through the modules; the library's own quantity says what must come out."""
    a = authors(library)
    case, ext = mlp(a), a.Diagonal()
    step(a, case, ext, a.DiagGGNExact())
    assert_same(results(case[0]), results(case[0], "diag_ggn_exact"))
    assert ext.saved_quantities._saved_quantities == {}


@pytest.mark.parametrize("library", LIBRARIES)
def test_backward_hooks_of_users(library):
    """They stand between the modules in the graph, and do not stop what is handed back."""
    a = authors(library)
    case, ext = mlp(a), a.Diagonal()
    for module in case[0]:
        module.register_full_backward_hook(lambda module, grad_inputs, grad_outputs: None)
        module.register_full_backward_pre_hook(lambda module, grad_outputs: None)
    step(a, case, ext, a.DiagGGNExact())
    assert_same(results(case[0]), results(case[0], "diag_ggn_exact"))
    assert ext.saved_quantities._saved_quantities == {}


@pytest.mark.parametrize("library", LIBRARIES)
def test_branches(library):
    """What comes back from two modules is accumulated; not without a rule for it."""
    a = authors(library)
    case = problem(a, nn.Linear(4, 4), a.Residual(4), nn.Linear(4, 3))
    ext = a.BranchingDiagonal(a.FAIL_SILENT)  # of the container
    step(a, case, ext)
    found = results(case[0])
    assert ext.saved_quantities._saved_quantities == {}
    with pytest.raises(NotImplementedError):
        step(a, case, a.Diagonal(a.FAIL_SILENT))
    a = authors("backpack_cuda")  # where no container needs an extension
    case = problem(a, nn.Linear(4, 4), a.Residual(4), nn.Linear(4, 3))
    step(a, case, a.DiagGGNExact())
    assert_same(found, results(case[0], "diag_ggn_exact"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_was_handed_back(library):
    a = authors(library)

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, input):
            return self.second(torch.sin(self.first(input)))

    ext = a.Diagonal(a.FAIL_SILENT)
    with pytest.raises(AssertionError):
        step(a, problem(a, Functional()), ext)
    if library == "backpack_cuda":
        assert ext.saved_quantities._saved_quantities == {}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("fail_mode", ["ERROR", "WARNING", "SILENT"])
def test_fail_modes(library, fail_mode):
    a = authors(library)
    assert (a.FAIL_ERROR, a.FAIL_WARN, a.FAIL_SILENT) == ("ERROR", "WARNING", "SILENT")
    sentence = "Extension saving to mine does not have an extension for Module <class "
    case = problem(a, nn.Linear(4, 6), nn.Tanh(), nn.Conv1d(6, 6, 1), nn.Linear(6, 3))
    case[0][2].forward = lambda x: nn.Conv1d.forward(case[0][2], x[:, :, None])[:, :, 0]
    case = (a.extend(nn.Sequential(*case[0])), *case[1:])
    if fail_mode == "ERROR":
        with pytest.raises(NotImplementedError, match=f"{sentence}'torch.nn.modules.loss.CrossEntropyLoss'"):
            step(a, case, a.Gradients(fail_mode=fail_mode))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(a, case, a.Gradients(fail_mode=fail_mode))
    found = [str(w.message) for w in caught if "Full backward hook" not in str(w.message)]
    if fail_mode == "WARNING":  # of the module with parameters alone
        (message,) = found
        assert message == f"{sentence}'torch.nn.modules.conv.Conv1d'> although the module has parameters"
    else:
        assert not found
    saved = {name for name, value in results(case[0]).items() if value is not None}
    assert saved == {"0.weight", "0.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_errors_when_extensions_are_made(library):
    a = authors(library)
    with pytest.raises(AssertionError):
        a.Gradients(fail_mode="WARN")
    with pytest.raises(NotImplementedError):
        a.ModuleExtension(params=["weight"])
    ext = a.Gradients()
    with pytest.raises(ValueError):
        ext.set_module_extension(nn.Linear, a.LinearGradients())
    ext.set_module_extension(nn.Linear, a.LinearGradients(), overwrite=True)
    with pytest.raises(ValueError):
        a.extensions.BatchGrad().set_module_extension(nn.Linear, a.LinearGradients())
    assert ext.savefield == "mine" and ext._fail_mode == "WARNING" and ext.get_subsampling() is None
    assert not ext.expects_backpropagation_quantities() and a.DiagGGNExact().expects_backpropagation_quantities()
    with pytest.raises(NotImplementedError):
        ext.accumulate_backpropagated_quantities(1, 2)


QUANTITIES = {
    "BatchGrad": ("grad_batch", "BatchGradScale"),
    "BatchL2Grad": ("batch_l2", "BatchL2Scale"),
    "SumGradSquared": ("sum_grad_squared", "SumGradSquaredScale"),
    "DiagGGNExact": ("diag_ggn_exact", "DiagGGNScale"),
    "BatchDiagGGNExact": ("diag_ggn_exact_batch", "BatchDiagGGNScale"),
    "SqrtGGNExact": ("sqrt_ggn_exact", "SqrtGGNScale"),
    "KFLR": ("kflr", "KFLRScale"),
}


@pytest.mark.skipif(importlib.util.find_spec("backpack") is None, reason="BackPACK is not installed")
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_layer_for_a_quantity(quantity):
    """`set_module_extension` on a library's quantity: BackPACK's results, before and behind the layer as well."""
    savefield, name = QUANTITIES[quantity]
    found = {}
    for library in ("backpack", "backpack_cuda"):
        a = authors(library)
        ext = getattr(a.extensions, quantity)()
        ext.set_module_extension(a.Scale, getattr(a, name)())
        case = problem(a, nn.Linear(4, 6), nn.Tanh(), a.Scale(6), nn.Linear(6, 3))
        step(a, case, ext)
        found[library] = results(case[0], savefield)
        assert None not in found[library].values()
        # Ours are pushed back by autograd.
        assert not a.DiagGGNScale.calls or library == "backpack"
    assert_same(found["backpack_cuda"], found["backpack"])


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("budget", [1, None])
def test_a_layer_for_a_quantity_is_what_the_library_would_form(quantity, budget):
    a = authors("backpack_cuda")
    savefield, name = QUANTITIES[quantity]
    case = problem(a, nn.Linear(4, 6), a.Scale(6), nn.Tanh(), a.Scale(6), nn.Linear(6, 3), samples=4)
    own, ext = getattr(extensions, quantity)(), getattr(extensions, quantity)()
    model, loss_function, inputs, targets = case
    with backpack(own, memory_budget=budget):
        (loss_function(model(inputs), targets) * 3).backward()
    expected = results(model, savefield)
    ext.set_module_extension(a.Scale, getattr(a, name)())
    with backpack(extensions.Variance(), ext, memory_budget=budget):
        (loss_function(model(inputs), targets) * 3).backward()
    if quantity in ("KFLR", "SqrtGGNExact"):  # exact columns rather than fewer ones; the same products
        expected = {n: v for n, v in expected.items() if n in ("1.weight", "3.weight", "4.weight")}
    found = results(model, savefield)
    assert_same({n: found[n] for n in expected}, expected)


def test_subsampling_of_columns():
    a = authors("backpack_cuda")
    case = problem(a, a.Scale(4), nn.Linear(4, 3))
    ext = extensions.SqrtGGNExact(subsampling=[3, 1])
    step(a, case, ext)
    expected = case[0][0].weight.sqrt_ggn_exact

    class Subsampled(a.SqrtGGNScale):
        def weight(self, ext, module, g_inp, g_out, bpQuantities):
            return module.input0[ext.get_subsampling()] * bpQuantities

    ext.set_module_extension(a.Scale, Subsampled())
    step(a, case, ext)
    torch.testing.assert_close(case[0][0].weight.sqrt_ggn_exact, expected)


def test_two_losses():
    """A layer gets the columns of all losses that came before it."""
    a = authors("backpack_cuda")
    case = problem(a, nn.Linear(4, 6), a.Scale(6), nn.Linear(6, 3))
    model, loss_function, inputs, targets = case
    squared = extend(nn.MSELoss())

    def run(ext):
        outputs = model(inputs)
        with backpack(ext):
            (loss_function(outputs, targets) + 2 * squared(outputs, torch.zeros_like(outputs))).backward()
        return model[1].weight.diag_ggn_exact

    expected = run(extensions.DiagGGNExact())
    ext = extensions.DiagGGNExact()
    ext.set_module_extension(a.Scale, a.DiagGGNScale())
    torch.testing.assert_close(run(ext), expected)


@pytest.mark.parametrize(
    "make",
    [
        extensions.DiagHessian,
        extensions.BatchDiagHessian,
        extensions.KFRA,
        lambda: extensions.KFAC(fisher="empirical"),
        extensions.HMP,
        extensions.GGNMP,
        extensions.PCHMP,
    ],
)
def test_quantities_that_take_no_module_extensions(make):
    a = authors("backpack_cuda")
    with pytest.raises(NotImplementedError):
        make().set_module_extension(a.Scale, a.DiagGGNScale())


def test_a_loss_for_a_quantity():
    a = authors("backpack_cuda")
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    model, _, inputs, targets = mlp(a)
    for ext in (extensions.DiagGGNExact(), extensions.BatchDiagGGNExact()):
        known = extend(nn.CrossEntropyLoss(weight))
        with backpack(ext):
            (3 * known(model(inputs), targets)).backward()
        expected = results(model, ext.savefield)
        ext.set_module_extension(a.WeightedLoss, a.WeightedDiagGGNLoss())
        loss_function = extend(a.WeightedLoss(weight))
        with backpack(ext, extensions.KFLR()):
            (3 * loss_function(model(inputs), targets)).backward()
        assert_same(results(model, ext.savefield), expected)
    with pytest.raises(ValueError):
        ext.set_module_extension(nn.CrossEntropyLoss, a.WeightedDiagGGNLoss())


# ---- inputs and outputs of modules


@pytest.mark.parametrize("library", LIBRARIES)
def test_stored_tensors(library):
    a = authors(library)
    case = mlp(a)
    ext, diagonal = a.Gradients(), a.Diagonal(savefield="other")
    model, loss_function, inputs, targets = case
    outputs = model(inputs)
    loss = loss_function(outputs, targets)
    assert torch.equal(model[0].input0, inputs) and torch.equal(model[1].output, model[2].input0)
    assert torch.equal(loss_function.input0, outputs) and torch.equal(loss_function.input1, targets)
    assert torch.equal(loss_function.output, loss)
    seen = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        hook = lambda module: seen.append((module.input0.shape, module.output.shape))  # noqa: E731
        with a.backpack(ext, diagonal, retain_graph=True, extension_hook=hook):
            loss.backward(retain_graph=True)
        first = results(model)
        assert hasattr(model[0], "input0") and hasattr(model[2], "output")
        with a.backpack(ext, diagonal):
            loss.backward()
    assert seen[0] == ((5, 3), ()) and seen[1:] == [((5, 6), (5, 3)), ((5, 6), (5, 6)), ((5, 4), (5, 6))]
    assert_same(results(model), first)
    stored = {name for m in [*model.modules(), loss_function] for name in m.__dict__ if re.match("input|output", name)}
    assert not stored
    model(inputs)
    importlib.import_module(library).memory_cleanup(model[0])
    assert not hasattr(model[0], "input0") and not hasattr(model[0], "output")


def test_a_second_backward_pass_needs_nothing_else():
    """Unlike BackPACK, where the first one must have been told by `backpack(retain_graph=True)`."""
    a = authors("backpack_cuda")
    case, ext = mlp(a), a.Gradients()
    loss = case[1](case[0](case[2]), case[3])
    with backpack(ext):
        loss.backward(retain_graph=True)
        first = results(case[0])
        loss.backward()
    assert_same(results(case[0]), first)


def test_extension_made_after_the_forward_pass():
    a = authors("backpack_cuda")
    model, loss_function, inputs, targets = case = mlp(a)
    loss = loss_function(model(inputs), targets)
    with backpack(a.Gradients()):  # its classes were defined before
        loss.backward()
    assert model[0].weight.mine.shape == (5, 6, 4)
    for known in list(authored._unused):
        authored._unused.discard(known)
    authored._module_classes.clear()
    loss = loss_function(model(inputs), targets)

    class Late(a.ModuleExtension):
        pass

    late = a.Gradients(module_exts={nn.Linear: Late()})
    with pytest.raises(RuntimeError, match="before the forward pass"), backpack(late):
        loss.backward()
    step(a, case, late)
    with backpack_cuda.disable():
        loss = loss_function(model(inputs), targets)
    with backpack(a.Gradients()):
        loss.backward()  # as torch's own layers, without anything
    del model, late


def test_only_modules_that_are_asked_for_keep_tensors():
    model = extend(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), backpack_cuda.Linear(2, 2)))
    model(torch.ones(1, 2))
    assert not any("output" in module.__dict__ for module in model)
    a = authors("backpack_cuda")
    model(torch.ones(1, 2))
    assert all("output" in module.__dict__ for module in model)  # nobody knows yet for which classes
    kept = [a.Gradients(), a.Diagonal(), a.WeightedDiagGGNLoss(), a.extensions.SqrtGGNExact()]
    kept[3].set_module_extension(a.Scale, a.SqrtGGNScale())
    for name in ("BatchL2Scale", "SumGradSquaredScale", "BatchDiagGGNScale", "KFLRScale"):
        kept[3].set_module_extension(a.Scale, getattr(a, name)(), overwrite=True)
    kept[3].set_module_extension(a.WeightedLoss, kept[2])
    backpack_cuda.memory_cleanup(model[1])
    authored._module_classes.discard(nn.Tanh)
    model(torch.ones(1, 2))
    assert "output" not in model[1].__dict__ and "output" in model[2].__dict__  # our layers count as torch's
    with backpack(kept[0]):
        model(torch.ones(3, 2)).sum().backward()
    assert model[2].weight.mine.shape == (3, 2, 2)


def test_changes_in_place():
    a = authors("backpack_cuda")
    modules = [nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)]

    class WithoutOutput(a.LinearGradients):
        def bias(self, ext, module, g_inp, g_out, bpQuantities):
            return g_out[0]

    class WithInput(a.ModuleExtension):
        def check_hyperparameters_module_extension(self, ext, module, g_inp, g_out):
            assert module.output.min() == 0
            module.input0  # noqa: B018

    case = problem(a, *modules)
    step(a, case, a.Gradients({nn.Linear: WithoutOutput()}))
    torch.testing.assert_close(case[0][0].weight.mine.sum(0), case[0][0].weight.grad)
    with pytest.raises(RuntimeError, match="output of Linear was changed in place"):
        step(a, case, a.Gradients())
    with pytest.raises(RuntimeError, match="input0 of ReLU was changed in place"):
        step(a, case, a.Gradients({nn.ReLU: WithInput()}, fail_mode="SILENT"))


def test_keyword_inputs():
    a = authors("backpack_cuda")
    model, loss_function, inputs, targets = mlp(a)
    loss = loss_function(model[0](input=inputs)[:, :3], targets)
    with pytest.raises(NotImplementedError, match="keyword arguments input"), backpack(a.Gradients()):
        loss.backward()


class Looked(nn.Tanh):
    """Calls another module on its input on the side."""

    def __init__(self):
        super().__init__()
        self.part = nn.Tanh()

    def forward(self, input):
        with torch.no_grad():
            self.part(input)
        return super().forward(input)


def test_calls_without_a_graph_inside_of_a_module():
    a = authors("backpack_cuda")
    case, ext = problem(a, nn.Linear(4, 6), Looked(), nn.Linear(6, 3)), a.Diagonal()
    ext.set_module_extension(Looked, a.Activation())
    step(a, case, ext, a.DiagGGNExact())
    assert_same(results(case[0]), results(case[0], "diag_ggn_exact"))


def test_names_that_modules_have_taken():
    """A child called output, as in many transformers, is left alone."""
    a = authors("backpack_cuda")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.output = nn.Linear(4, 3)

        def forward(self, input):
            return self.output(input)

    case = problem(a, Block())
    step(a, case, a.Gradients())
    assert case[0][0].output.weight.mine.shape == (5, 3, 4)
    with pytest.raises(NotImplementedError, match="attribute output of its own"):
        step(a, case, a.Gradients({Block: a.Same()}, fail_mode="SILENT"))
    case = mlp(a)
    case[0][0].output = "an attribute"
    with pytest.raises(NotImplementedError, match="attribute output of its own"):
        step(a, case, a.Gradients())
    assert case[0][0].output == "an attribute"


# ---- order, several uses, several passes


@pytest.mark.parametrize("library", LIBRARIES)
def test_order(library):
    """Extensions in the order of the arguments, then the hook; the library's quantities are there before."""
    a = authors(library)
    order = []

    class Noted(a.LinearGradients):
        def weight(self, ext, module, g_inp, g_out, bpQuantities):
            order.append(ext.savefield)
            return module.weight.grad_batch.sum()

        def bias(self, ext, module, g_inp, g_out, bpQuantities):
            return 0

    case = mlp(a)
    exts = [a.extensions.BatchGrad(), *(a.Gradients({nn.Linear: Noted()}, savefield=name) for name in "ab")]
    hook = lambda module: order.append(type(module).__name__) if isinstance(module, nn.Linear) else None  # noqa: E731
    step(a, case, *exts, extension_hook=hook)
    assert order == ["a", "b", "Linear"] * 2


def test_modules_used_twice():
    a = authors("backpack_cuda")
    activation = nn.Tanh()
    case = problem(a, nn.Linear(4, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, 3))
    step(a, case, a.Diagonal(), a.DiagGGNExact())
    assert_same(results(case[0]), results(case[0], "diag_ggn_exact"))
    shared = nn.Linear(4, 4)
    case = problem(a, shared, nn.Tanh(), shared, nn.Linear(4, 3))
    with pytest.raises(NotImplementedError, match="Linear.weight is used several times"):
        step(a, case, a.Gradients())
    assert not hasattr(shared.weight, "mine")


@pytest.mark.parametrize("make", [extensions.BatchGrad, extensions.DiagGGNExact])
@pytest.mark.parametrize("first", [False, True])
def test_a_parameter_of_an_author_s_layer_and_another(make, first):
    """Neither of the two results alone is right."""
    a = authors("backpack_cuda")
    ext = make()
    ext.set_module_extension(a.Scale, a.BatchGradScale() if make is extensions.BatchGrad else a.DiagGGNScale())
    other, scale = nn.LayerNorm(4), a.Scale(4)
    other.weight = scale.weight
    modules = [scale, nn.Tanh(), other] if first else [other, nn.Tanh(), scale]
    case = problem(a, *modules, nn.Linear(4, 3))
    with pytest.raises(NotImplementedError, match="is used several times"):
        step(a, case, ext)
    gc.collect()
    assert not hasattr(scale.weight, ext.savefield)


def test_several_forward_passes():
    """Each backward pass sees the tensors of its own forward pass; one for both is refused."""
    a = authors("backpack_cuda")
    model, loss_function, inputs, targets = mlp(a)
    first = loss_function(model(inputs), targets)
    second = loss_function(model(2 * inputs), targets)
    for loss in (first, second):
        with backpack(a.Gradients(), extensions.BatchGrad()):
            loss.backward()
        assert_same(results(model), results(model, "grad_batch"))
    losses = [loss_function(model(x), targets) for x in (inputs, 2 * inputs)]
    with pytest.raises(NotImplementedError, match="is used several times"), backpack(a.Gradients()):
        sum(losses).backward()


def test_reentrant_checkpoint():
    a = authors("backpack_cuda")
    model, loss_function, inputs, targets = mlp(a)
    outputs = torch.utils.checkpoint.checkpoint(model, inputs.requires_grad_(), use_reentrant=True)
    with backpack(a.Gradients(), extensions.BatchGrad()):
        loss_function(outputs, targets).backward()
    assert_same(results(model), results(model, "grad_batch"))
    outputs = torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=True)
    with pytest.raises(RuntimeError, match="expects a backpropagated quantity"), backpack(a.Diagonal()):
        loss_function(outputs, targets).backward()


def test_an_author_s_error():
    a = authors("backpack_cuda")

    class Wrong(a.LinearDiagonal):
        def bias(self, ext, module, g_inp, g_out, bpQuantities):
            if module.in_features == 4:
                raise ZeroDivisionError("an author's error")
            return super().bias(ext, module, g_inp, g_out, bpQuantities)

    case, ext = mlp(a), a.Diagonal()
    ext.set_module_extension(nn.Linear, Wrong(), overwrite=True)
    with pytest.raises(ZeroDivisionError):
        step(a, case, ext, extensions.BatchGrad())
    gc.collect()
    assert not any(results(case[0]).values()) and ext.saved_quantities._saved_quantities == {}
    ext.set_module_extension(nn.Linear, a.LinearDiagonal(), overwrite=True)
    step(a, case, ext, a.DiagGGNExact())
    assert_same(results(case[0]), results(case[0], "diag_ggn_exact"))


def test_nothing_is_left_behind():
    """In BackPACK an entry for every input that requires a gradient, under an address that is used again."""
    a = authors("backpack_cuda")
    model, loss_function, inputs, targets = mlp(a)
    ext = a.Diagonal()
    for _ in range(3):
        x = inputs.clone().requires_grad_()
        with backpack(ext, a.Gradients(savefield="other")):
            loss_function(model(x), targets).backward()
        assert ext.saved_quantities._saved_quantities == {}
    assert a.events[-1] == ("Gradients", "Linear", [(5, 4), (5, 6)])  # its gradient is handed over


def test_a_backward_pass_for_some_parameters():
    """`backward(inputs=...)`: where no gradient of the input is formed, the extensions run without it."""
    a = authors("backpack_cuda")
    model, loss_function, inputs, targets = case = mlp(a)
    step(a, case, a.Gradients(), inputs=[model[2].weight])
    torch.testing.assert_close(model[2].weight.mine.sum(0), model[2].weight.grad)
    assert not hasattr(model[0].weight, "mine")
    loss = loss_function(model(inputs), targets)
    with backpack(a.Gradients()):
        (grad,) = torch.autograd.grad(loss, [model[0].weight])
    torch.testing.assert_close(model[0].weight.mine.sum(0), grad)


def test_frozen_parameters():
    a = authors("backpack_cuda")
    case = mlp(a)
    case[0][2].requires_grad_(False)
    case[0][0].bias.requires_grad_(False)
    step(a, case, a.Gradients(), a.Diagonal(savefield="other"))
    for savefield in ("mine", "other"):
        saved = {name for name, value in results(case[0], savefield).items() if value is not None}
        assert saved == {"0.weight"}


@pytest.mark.parametrize("samples", [0, 1])
def test_few_samples(samples):
    a = authors("backpack_cuda")
    case = mlp(a, samples=samples)
    case[1].reduction = "sum"
    step(a, case, a.Gradients())
    assert case[0][0].weight.mine.shape == (samples, 6, 4)
    torch.testing.assert_close(case[0][0].weight.mine.sum(0), case[0][0].weight.grad)


def test_create_graph():
    """Results are differentiable: the gradient of their squares is that of the library's own."""
    a = authors("backpack_cuda")
    found = []
    for make, savefield in ((a.Gradients, "mine"), (extensions.BatchGrad, "grad_batch")):
        case = mlp(a)
        loss = case[1](case[0](case[2]), case[3])
        with backpack(make()):
            torch.autograd.grad(loss, list(case[0].parameters()), create_graph=True)
        penalty = sum(value.square().sum() for value in results(case[0], savefield).values())
        found.append(torch.autograd.grad(penalty, list(case[0].parameters())))
        for parameter in case[0].parameters():
            delattr(parameter, savefield)  # its graph knows the parameter
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(dtype):
    a = authors("backpack_cuda")
    model, loss_function, inputs, targets = mlp(a)
    model.to(dtype)
    with backpack(a.Gradients()):
        loss_function(model(inputs.to(dtype)), targets).backward()
    assert model[0].weight.mine.dtype == dtype


def test_inside_of_an_extension_nothing_is_formed():
    """Authors may run and differentiate modules, which leaves the pass around it alone."""
    a = authors("backpack_cuda")

    class Own(a.LinearGradients):
        def weight(self, ext, module, g_inp, g_out, bpQuantities):
            with torch.enable_grad():
                x = module.input0.detach().requires_grad_()
                (pulled,) = torch.autograd.grad(module(x), x, g_out[0])
            _, pull_back = torch.func.vjp(module, module.input0)
            torch.testing.assert_close(pull_back(g_out[0])[0], pulled)
            if g_inp[0] is not None:
                torch.testing.assert_close(pulled, g_inp[0])
            return super().weight(ext, module, g_inp, g_out, bpQuantities)

    case, hooked = mlp(a), []
    step(a, case, extensions.BatchGrad(), a.Gradients({nn.Linear: Own()}), extension_hook=hooked.append)
    assert_same(results(case[0]), results(case[0], "grad_batch"))
    assert len(hooked) == 4


def test_containers_and_checkpoints():
    a = authors("backpack_cuda")

    class Outer(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.first, self.tanh, self.last = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)
            self.checkpointed = checkpointed

        def forward(self, input):
            if self.checkpointed:
                return torch.utils.checkpoint.checkpoint(self.inner, input, use_reentrant=False)
            return self.inner(input)

        def inner(self, input):
            return self.last(self.tanh(self.first(input)))

    for checkpointed in (False, True):
        case = problem(a, Outer(checkpointed))
        step(a, case, a.Gradients(), extensions.BatchGrad())
        assert_same(results(case[0]), results(case[0], "grad_batch"))
        step(a, case, a.Diagonal("SILENT"), a.DiagGGNExact())
        assert_same(results(case[0]), results(case[0], "diag_ggn_exact"))
        with pytest.raises(NotImplementedError, match="Outer"):
            step(a, case, a.Diagonal())


def live_tensors() -> int:
    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())


def test_memory():
    """No tensor outlives its step, and none waits for the garbage collector."""
    a = authors("backpack_cuda")
    case, exts = mlp(a), (a.Gradients(savefield="other"), a.Diagonal(), a.DiagGGNExact())
    exts[2].set_module_extension(a.Scale, a.DiagGGNScale())
    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(6):
            step(a, case, *exts)
            counts.append(live_tensors())
    finally:
        gc.enable()
    assert counts[1:] == counts[1:2] * 5


def test_a_forward_pass_without_backward():
    """Neither its graph nor its model waits for anything."""
    a = authors("backpack_cuda")
    model, loss_function, inputs, targets = mlp(a)
    references = [weakref.ref(module) for module in model.modules()]
    nodes = []
    for _ in range(2):
        outputs = model(inputs)
        nodes.append(weakref.ref(outputs.grad_fn.call))
        del outputs
    assert torch.equal(model[2].output, model(inputs)) and not any(node() for node in nodes)
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(reference() for reference in references)
    finally:
        gc.enable()


# ---- register_layer


class Affine(nn.Module):
    """[N, T, F] -> [N, T, F] and its negative."""

    def __init__(self, features: int):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(features))
        self.shift = nn.Parameter(torch.randn(features))

    def forward(self, input, *, factor=1.0):
        output = factor * input * self.scale + self.shift
        return output, -output


def affine_gradients(module, input, grad_output, factor=1.0):
    gradient = grad_output[0] - grad_output[1]
    return {"scale": (factor * input * gradient).sum(1), "shift": gradient.sum(1)}


class AffineNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.affine, self.last = nn.Linear(3, 4), Affine(4), nn.Linear(8, 2)

    def forward(self, input):
        first, second = self.affine(self.first(input), factor=2.0)
        return self.last(torch.cat([first.tanh(), second.sin()], -1).sum(1))


EVERY = [
    extensions.BatchGrad,
    extensions.BatchL2Grad,
    extensions.SumGradSquared,
    extensions.Variance,
    extensions.DiagGGNExact,
    extensions.BatchDiagGGNExact,
    extensions.SqrtGGNExact,
    extensions.DiagHessian,
    extensions.BatchDiagHessian,
    extensions.KFLR,
]


def all_results(model, x, y, make) -> dict:
    with backpack(*[m() for m in make]):
        extend(nn.MSELoss())(model(x), y).backward()
    return {n: {k: v for k, v in vars(p).items() if not k.startswith("_")} for n, p in model.named_parameters()}


@pytest.mark.parametrize("samples", [0, 1, 4])
def test_register_layer(samples):
    """All quantities are those without the registration, and the function is what forms them."""
    model = extend(AffineNet().double())
    x, y = torch.randn(samples, 5, 3, dtype=torch.float64), torch.randn(samples, 2, dtype=torch.float64)
    expected = all_results(model, x, y, EVERY)
    calls = []

    def noted(*args, **kwargs):
        calls.append(args)
        return affine_gradients(*args, **kwargs)

    backpack_cuda.register_layer(Affine, noted)
    found = all_results(model, x, y, EVERY)
    assert calls
    for name in expected:
        assert_same(found[name], expected[name])


def test_register_layer_for_a_subclass_and_frozen_parameters():
    class Derived(Affine):
        pass

    class Changed(Affine):
        def forward(self, input, *, factor=1.0):
            return super().forward(input, factor=3 * factor)

    backpack_cuda.register_layer(Affine, affine_gradients)
    for kind in (Derived, Changed):
        model = AffineNet().double()
        model.affine = kind(4).double()
        model.affine.shift.requires_grad_(False)
        extend(model)
        x, y = torch.randn(3, 5, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        all_results(model, x, y, [extensions.BatchGrad])
        torch.testing.assert_close(model.affine.scale.grad_batch.sum(0), model.affine.scale.grad)


def test_register_layer_is_differentiable():
    found = []
    for register in (False, True):
        torch.manual_seed(0)
        if register:
            backpack_cuda.register_layer(Affine, affine_gradients)
        model = extend(AffineNet().double())
        loss = model(torch.randn(3, 5, 3, dtype=torch.float64)).square().sum()
        with backpack(extensions.BatchGrad()):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        penalty = sum(p.grad_batch.square().sum() for p in model.parameters())
        found.append(torch.autograd.grad(penalty, list(model.parameters())))
        for parameter in model.parameters():
            del parameter.grad_batch  # its graph knows the parameter
    torch.testing.assert_close(*found)


WRONG = {
    "shape": (lambda found: found | {"scale": found["scale"].sum(0)}, ValueError, r"expected \[3, 4\]"),
    "samples": (lambda found: found | {"scale": found["scale"][:2]}, ValueError, r"got \[2, 4\]"),
    "missing": (lambda found: {"scale": found["scale"]}, ValueError, "expected an entry 'shift'"),
    "sum": (lambda found: found | {"scale": found["scale"] * 1.01}, ValueError, "do not sum to torch's gradient"),
    "nan": (lambda found: found | {"scale": found["scale"] + torch.nan}, ValueError, "do not sum to torch's gradient"),
    "order": (lambda found: found | {"scale": found["shift"]}, ValueError, "do not sum to torch's gradient"),
    "no dict": (lambda found: found["scale"], TypeError, "expected a dict"),
    "no tensor": (lambda found: found | {"scale": [1.0]}, TypeError, "expected a Tensor"),
    "type": (lambda found: found | {"scale": found["scale"].int()}, ValueError, "expected 'scale' as"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_per_sample_gradients(wrong, dtype):
    change, error, message = WRONG[wrong]
    backpack_cuda.register_layer(Affine, lambda *args, **kwargs: change(affine_gradients(*args, **kwargs)))
    model = extend(AffineNet().to(dtype))
    with pytest.raises(error, match=message), backpack(extensions.BatchGrad()):
        model(torch.randn(3, 5, 3, dtype=dtype)).square().sum().backward()
    assert not hasattr(model.affine.scale, "grad_batch")


def test_the_sum_is_checked_where_it_says_something():
    """For each parameter, at the first gradient of it that is not zero."""

    def wrong(module, *args, **kwargs):
        return {name: 2 * rows for name, rows in affine_gradients(module, *args, **kwargs).items()}

    backpack_cuda.register_layer(Affine, wrong)
    model = extend(AffineNet())
    for parameter in model.affine.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(3, 5, 3)
    for name in ("scale", "shift"):
        parameter = getattr(model.affine, name).requires_grad_(True)
        with backpack(extensions.BatchGrad()):
            (0 * model(x)).sum().backward()
        with pytest.raises(ValueError, match=name), backpack(extensions.BatchGrad()):
            model(x).square().sum().backward()
        parameter.requires_grad_(False)


@pytest.mark.parametrize("extension", [extensions.BatchGrad, extensions.DiagGGNExact])
def test_a_registered_function_that_runs_the_module(extension):
    """Its own passes form no quantities: they would call it again, and again."""

    def by_running(module, input, grad_output):
        with torch.enable_grad():
            rows = [
                torch.autograd.grad(module(x[None]), module.weight, g[None])[0]
                for x, g in zip(input.detach(), grad_output, strict=True)
            ]
        return {"weight": torch.stack(rows)}

    a = authors("backpack_cuda")
    backpack_cuda.register_layer(a.Scale, by_running)
    model, loss_function, inputs, targets = problem(a, nn.Linear(4, 4), nn.Tanh(), a.Scale(4), nn.Linear(4, 3))
    hooked = []
    with backpack(extension(), extension_hook=lambda module: hooked.append(type(module).__name__)):
        loss_function(model(inputs), targets).backward()
    assert hooked == ["CrossEntropyLoss", "Linear", "Scale", "Tanh", "Linear"]
    if extension is extensions.BatchGrad:
        torch.testing.assert_close(model[2].weight.grad_batch.sum(0), model[2].weight.grad)


class SparseTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, indices):
        return nn.functional.embedding(indices, self.weight, sparse=True)


def test_a_registered_layer_with_sparse_gradients():
    def table_gradients(module, indices, grad_output):
        rows = grad_output.new_zeros(len(indices), 6, 3)
        return {"weight": rows.scatter_add(1, indices[..., None].expand(grad_output.shape), grad_output)}

    backpack_cuda.register_layer(SparseTable, table_gradients)
    model = extend(SparseTable())
    with backpack(extensions.BatchGrad()):
        model(torch.randint(6, (4, 5))).square().sum().backward()
    torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad.to_dense())


def test_random_layers_are_registered_unchecked():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, input):
            self.noise = torch.rand_like(input)
            return input * self.noise * self.weight

    def gradients(module, input, grad_output):
        return {"weight": input * module.noise * grad_output}

    model = extend(nn.Sequential(Noisy()))
    backpack_cuda.register_layer(Noisy, gradients)
    backpack_cuda.register_layer(Noisy, gradients, check=False)
    with backpack(extensions.BatchGrad()):
        model(torch.randn(3, 4)).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad_batch.sum(0), model[0].weight.grad)


def test_errors_of_register_layer():
    with pytest.raises(TypeError, match="module_class"):
        backpack_cuda.register_layer(Affine(2), affine_gradients)
    with pytest.raises(TypeError, match="per_sample_gradient"):
        backpack_cuda.register_layer(Affine, None)
    for known in (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.MSELoss, backpack_cuda.Linear):
        with pytest.raises(ValueError, match="has a rule of its own"):
            backpack_cuda.register_layer(known, affine_gradients)


# ---- the rest of BackPACK's paths


@pytest.mark.parametrize(
    "line",
    [
        "from backpack_cuda.core.derivatives.linear import LinearDerivatives",
        "from backpack_cuda.core.derivatives.basederivatives import BaseDerivatives",
        "from backpack_cuda.core.derivatives.convnd import ConvNDDerivatives",
        "from backpack_cuda.core.derivatives import shape_check",
        "import backpack_cuda.core.derivatives.elementwise",
    ],
)
def test_derivatives(line):
    with pytest.raises(ImportError, match="register_layer.*torch.func.vjp"):
        exec(line)


def test_weight_jac_t_save_memory():
    from backpack_cuda.core.derivatives.convnd import weight_jac_t_save_memory

    with weight_jac_t_save_memory(), weight_jac_t_save_memory(save_memory=False):
        pass


def test_fail_mode_is_a_value_error_too():
    with pytest.raises(ValueError, match="fail_mode: expected one of ERROR, WARNING, SILENT, got 'WARN'"):
        extensions.KFLR(fail_mode="WARN")
    assert issubclass(InvalidFailMode, AssertionError)


def test_arguments_of_set_module_extension():
    a = authors("backpack_cuda")
    for module, extension in ((nn.Linear(1, 1), a.LinearGradients()), (nn.Linear, a.LinearGradients), (int, None)):
        with pytest.raises(TypeError, match="expected"):
            a.Gradients().set_module_extension(module, extension, overwrite=True)


def test_the_documentation():
    """Every example of docs/extending.md, in one program."""
    text = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 4
    names = {"__name__": "docs"}
    exec("\n".join(blocks), names)
    model = names["model"]
    assert model[2].weight.grad_batch.shape == (8, 4) and model[0].weight.max_grad.shape == (8,)

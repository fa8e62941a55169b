"""Programs that build on BackPACK: what Laplace and cockpit import and do, step by step, with either library.

Both libraries themselves were run, unchanged, with `backpack_cuda` under the name `backpack`; this keeps what they rely
on from breaking.
"""

import gc
import warnings
import weakref

import pytest
import torch
from backpack_names import Library
from helpers import assert_close
from torch import Tensor, nn

pytest.importorskip("backpack", reason="BackPACK is not installed")
LIBRARIES = Library("backpack"), Library("backpack_cuda")


@pytest.fixture(autouse=True)
def without_torchs_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing|Using backward\\(\\) with create_graph=True")
        yield


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))


def batches(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    make = [torch.randn(size, 1, 4, generator=generator) for _ in range(count)]
    return [(x, torch.randint(3, (size,), generator=generator)) for x in make]


class Posterior:
    """What laplace-torch does between a model and its BackPACK backend."""

    def __init__(self, library: Library):
        self.library = library
        self.model = library("extend")(network())
        self.loss_function = library("extend")(nn.CrossEntropyLoss(reduction="sum"))

    def curvature(self, name: str, data: list) -> list[Tensor]:
        """The sum over the batches of diagonals, or of Kronecker factors that are rescaled in place."""
        total, size = None, sum(len(y) for _, y in data)
        for x, y in data:
            self.model.zero_grad()
            outputs = self.model(x)
            loss = self.loss_function(outputs.view(-1, outputs.size(-1)), y.view(-1))
            ext = self.library(f"extensions.{name}")()
            with self.library("backpack")(ext):
                loss.backward()
            values = [getattr(p, ext.savefield) for p in self.model.parameters()]
            if name == "KFLR":
                for factors in values:
                    if len(factors) == 2:
                        factors[1] *= len(y) / size
                values = [factor for factors in values for factor in factors]
            else:
                values = [value.data.flatten() for value in values]
            total = values if total is None else [a + b for a, b in zip(total, values, strict=True)]
        return total

    def jacobians(self, x: Tensor, enable_backprop: bool = False) -> Tensor:
        """[N, C, P], by one backward pass per output; then the model is left as if it had never been extended."""
        model, rows = self.library("extend")(self.model), []
        for c in range(3):
            model.zero_grad()
            outputs = model(x)
            with self.library("backpack")(self.library("extensions.BatchGrad")()):
                outputs[:, c].sum().backward(create_graph=enable_backprop, retain_graph=enable_backprop)
                rows.append(torch.cat([p.grad_batch.reshape(len(x), -1) for p in model.parameters()], 1))
                for p in model.parameters():
                    del p.grad_batch
        model.zero_grad()
        self.library("context.CTX").remove_hooks()
        self.forget(model)
        return torch.stack(rows, 1)

    def forget(self, module: nn.Module) -> None:
        for child in module.children():
            self.forget(child)
        module._backpack_extend = False
        self.library("memory_cleanup")(module)


@pytest.mark.parametrize("name", ["DiagGGNExact", "KFLR", "SumGradSquared"])
def test_laplace_fits_and_predicts(name):
    data, x = batches(2, 5), batches(1, 4)[0][0]
    found = []
    for library in LIBRARIES:
        posterior = Posterior(library)
        found.append([*posterior.curvature(name, data), posterior.jacobians(x), posterior.jacobians(2 * x)])
    for theirs, ours in zip(*found, strict=True):
        assert_close(name, ours, theirs.detach().double(), 1e-5)


@pytest.mark.parametrize("name", ["DiagGGNExact", "KFLR"])
def test_laplace_fits_again_after_a_prediction(name):
    """BackPACK has lost its hooks then, and hands out the results of the last batch before without a word."""
    first, second = batches(4, 5)[:2], batches(4, 5)[2:]
    library = LIBRARIES[1]
    posterior = Posterior(library)
    posterior.curvature(name, first)
    posterior.jacobians(first[0][0])
    again, expected = posterior.curvature(name, second), Posterior(LIBRARIES[0]).curvature(name, second)
    for ours, theirs in zip(again, expected, strict=True):
        assert_close(name, ours, theirs.double(), 1e-5)

    stale = Posterior(LIBRARIES[0])
    stale.curvature(name, first)
    stale.jacobians(first[0][0])
    last = [getattr(p, "diag_ggn_exact" if name == "DiagGGNExact" else "kflr") for p in stale.model.parameters()]
    before = [[t.clone() for t in value] for value in last]
    stale.curvature(name, [second[0]])
    after = [getattr(p, "diag_ggn_exact" if name == "DiagGGNExact" else "kflr") for p in stale.model.parameters()]
    assert all(torch.equal(b[0], a[0]) for b, a in zip(before, after, strict=True))


def test_laplace_differentiates_jacobians():
    """`enable_backprop`: with respect to the inputs."""
    gradients = []
    for library in LIBRARIES:
        x = batches(1, 4)[0][0].requires_grad_()
        (gradient,) = torch.autograd.grad(Posterior(library).jacobians(x, True).square().sum(), x)
        gradients.append(gradient)
    assert_close("gradient", gradients[1], gradients[0].double(), 1e-5)


def cockpit_step(library: Library, create_graph: bool) -> dict[str, Tensor]:
    """One training step under cockpit's eyes; what its instruments show."""
    extend, backpack = library("extend"), library("backpack")
    save_memory = library("core.derivatives.convnd.weight_jac_t_save_memory")
    model, loss_function = extend(network()), extend(nn.CrossEntropyLoss())
    x, y = batches(1, 6)[0]
    seen = []

    def transform(module: nn.Module) -> None:
        """Compacts a module's gradients as soon as they are there."""
        for p in module.parameters(recurse=False):
            if hasattr(p, "grad_batch"):
                p.grad_batch._param_weakref = weakref.ref(p)
                flat = p.grad_batch.flatten(1)
                p.grad_batch_transforms = {"pairs": (flat @ flat.T).detach()}
                seen.append(type(module).__name__)
                del p.grad_batch

    extensions = [library(f"extensions.{name}")() for name in ("BatchGrad", "DiagHessian", "DiagGGNExact")]
    assert all(isinstance(e, library("extensions.backprop_extension.BackpropExtension")) for e in extensions)
    loss = loss_function(model(x), y)
    with backpack(*extensions, extension_hook=transform), save_memory(save_memory=True):
        loss.backward(create_graph=create_graph)
    shown = {"pairs": sum(p.grad_batch_transforms["pairs"] for p in model.parameters()), "modules": seen}
    for ext in extensions[1:]:
        shown[ext.savefield] = torch.cat([getattr(p, ext.savefield).flatten() for p in model.parameters()])
    if create_graph:  # the largest eigenvalue of the Hessian by power iteration
        parameters = list(model.parameters())
        product = library("hessianfree.hvp.hessian_vector_product")
        to_list = library("utils.convert_parameters.vector_to_parameter_list")
        vector = torch.ones(sum(p.numel() for p in parameters))
        for _ in range(20):
            vector = vector / vector.norm()
            rows = product(loss, parameters, to_list(vector, parameters), grad_params=[p.grad for p in parameters])
            vector = torch.cat([row.flatten() for row in rows])
        shown["eigenvalue"] = vector.norm()
    with library("disable")():
        shown["later loss"] = loss_function(model(x), y)
        assert not hasattr(model[0], "input0")
    for p in model.parameters():
        p.grad = None
        for field in ("grad_batch_transforms", *(ext.savefield for ext in extensions)):
            if hasattr(p, field):
                delattr(p, field)
    assert not any(vars(p) for p in model.parameters())
    gc.collect()
    return shown


@pytest.mark.parametrize("create_graph", [False, True])
def test_cockpit_sees_the_same(create_graph):
    theirs, ours = (cockpit_step(library, create_graph) for library in LIBRARIES)
    assert ours.pop("modules") == theirs.pop("modules")
    for name, expected in theirs.items():
        assert_close(name, ours[name], expected.detach().double(), 1e-4)

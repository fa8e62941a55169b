"""The libraries that are compared, behind one interface."""

import copy
import functools
import importlib
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import torch
from models import Recurrent
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# What is asked for -> the extensions that give it, under BackPACK's names.
FIRST_ORDER = {
    "none": (),
    "BatchGrad": ("BatchGrad",),
    "BatchL2Grad": ("BatchL2Grad",),
    "SumGradSquared": ("SumGradSquared",),
    "Variance": ("Variance",),
    "together": ("BatchL2Grad", "SumGradSquared", "Variance"),
}
SECOND_ORDER = {
    "DiagGGNExact": ("DiagGGNExact",),
    "DiagGGNMC": ("DiagGGNMC",),
    "BatchDiagGGNExact": ("BatchDiagGGNExact",),
    "BatchDiagGGNMC": ("BatchDiagGGNMC",),
    "SqrtGGNExact": ("SqrtGGNExact",),
    "SqrtGGNMC": ("SqrtGGNMC",),
    "KFAC": ("KFAC",),
    "KFLR": ("KFLR",),
    "curvature together": ("DiagGGNExact", "BatchDiagGGNExact", "KFLR"),
    "DiagHessian": ("DiagHessian",),
}
# Product -> (extension, vectors per parameter, whether the pass that prepares it is left out of the step).
PRODUCTS = {
    f"{extension} {count}{suffix}": (extension, count, bool(suffix))
    for extension in ("HMP", "GGNMP", "PCHMP")
    for count in (1, 10)
    for suffix in ("", " alone")
}
AVERAGED = {"KFRA": ("KFRA",)}
QUANTITIES = FIRST_ORDER | SECOND_ORDER | {name: product[:1] for name, product in PRODUCTS.items()} | AVERAGED
# Extension -> the parameters' attribute that holds its result.
RESULTS = {
    "BatchGrad": "grad_batch",
    "BatchL2Grad": "batch_l2",
    "SumGradSquared": "sum_grad_squared",
    "Variance": "variance",
    "DiagGGNExact": "diag_ggn_exact",
    "DiagGGNMC": "diag_ggn_mc",
    "BatchDiagGGNExact": "diag_ggn_exact_batch",
    "BatchDiagGGNMC": "diag_ggn_mc_batch",
    "SqrtGGNExact": "sqrt_ggn_exact",
    "SqrtGGNMC": "sqrt_ggn_mc",
    "KFAC": "kfac",
    "KFLR": "kflr",
    "DiagHessian": "diag_h",
    "HMP": "hmp",
    "GGNMP": "ggnmp",
    "PCHMP": "pchmp",
    "KFRA": "kfra",
}


def tensors(result: Any) -> list[Tensor]:
    """The tensors of one result: one, or a list of Kronecker factors."""
    return [result] if isinstance(result, Tensor) else list(result)


def vectors(model: nn.Module, count: int) -> dict[str, Tensor]:
    """[count, *P] by the parameter's name, to be multiplied with curvature; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(10, *p.shape, generator=generator).to(p.device) for name, p in model.named_parameters()}
    return {name: rows[:count] for name, rows in drawn.items()}


def title_of(quantity: str) -> str:
    """What a table calls it."""
    if quantity not in PRODUCTS:
        return " + ".join(QUANTITIES[quantity]) or "none"
    extension, count, alone = PRODUCTS[quantity]
    return f"{extension}, {count} vector{'s' if count > 1 else ''}{', without the pass' if alone else ''}"


class Peer:
    """A way to run a training step with statistics; this class is the plain one, without any."""

    title = "torch"
    package = "torch"
    quantities = ("none",)

    def __init__(self, model: nn.Module) -> None:
        """Adapt a copy of `model`."""
        self.model = copy.deepcopy(model)

    @classmethod
    def version(cls) -> str:
        """Version of the installed package; raises ImportError where there is none."""
        return importlib.import_module(cls.package).__version__

    def prepare(self, quantity: str, inputs: Tensor, labels: Tensor) -> None:
        """What a step with `quantity` needs, and is not part of it."""

    def step(self, quantity: str, inputs: Tensor, labels: Tensor) -> None:
        """Forward and backward pass that also computes `quantity`, one of `quantities`."""
        cross_entropy(self.model(inputs), labels).backward()

    def results(self, extension: str) -> dict[str, Any]:
        """What `extension` left behind, in BackPACK's form and scaling, by the parameter's name."""
        found = ((name, getattr(p, RESULTS[extension], None)) for name, p in self.model.named_parameters())
        return {name: result for name, result in found if result is not None}

    def result_bytes(self, quantity: str) -> int:
        """Memory that the results of the last step take, without the gradient."""
        results = (r for extension in QUANTITIES[quantity] for r in self.results(extension).values())
        return sum(tensor.nbytes for result in results for tensor in tensors(result))

    def drop(self) -> None:
        """Forget gradients and results, so that the next step starts like the first."""
        for p in self.model.parameters():
            p.grad = None
            for attribute in RESULTS.values():
                if hasattr(p, attribute):
                    delattr(p, attribute)


class BackpackStyle(Peer):
    """BackPACK's interface, which this product shares."""

    quantities = tuple(QUANTITIES)

    def __init__(self, model: nn.Module) -> None:
        library = importlib.import_module(self.package)
        super().__init__(model)
        self.model = library.extend(self.model, **self.extend_options())
        self.loss = library.extend(nn.CrossEntropyLoss())
        self.backpack = library.backpack
        self.extensions = importlib.import_module(self.package + ".extensions")
        self.vectors = functools.cache(lambda count: vectors(model, count))
        self.products: dict[str, dict[str, Tensor]] = {}  # extension -> name of the parameter -> [V, *P]

    def extend_options(self) -> dict[str, Any]:
        """Arguments of `extend` for this model."""
        return {}

    def prepare(self, quantity: str, inputs: Tensor, labels: Tensor) -> None:
        if quantity in PRODUCTS and PRODUCTS[quantity][2]:
            self.run_pass(quantity, inputs, labels)

    def step(self, quantity: str, inputs: Tensor, labels: Tensor) -> None:
        if quantity not in PRODUCTS:
            self.run_pass(quantity, inputs, labels)
            return
        extension, count, alone = PRODUCTS[quantity]
        if not alone:
            self.run_pass(quantity, inputs, labels)
        rows = self.vectors(count)
        self.products[extension] = {
            name: getattr(p, RESULTS[extension])(rows[name]) for name, p in self.model.named_parameters()
        }

    def results(self, extension: str) -> dict[str, Any]:
        return self.products[extension] if extension in self.products else super().results(extension)

    def drop(self) -> None:
        super().drop()
        self.products.clear()

    def run_pass(self, quantity: str, inputs: Tensor, labels: Tensor) -> None:
        """Forward and backward pass with the quantity's extensions."""
        extensions = [getattr(self.extensions, name)() for name in QUANTITIES[quantity]]
        # The first order needs no loss that is prepared.
        loss = (cross_entropy if quantity in FIRST_ORDER else self.loss)(self.model(inputs), labels)
        with self.backpack(*extensions) if extensions else nullcontext():
            loss.backward()


class BackpackCuda(BackpackStyle):
    """This product."""

    title = "backpack_cuda"
    package = "backpack_cuda"


class Backpack(BackpackStyle):
    """BackPACK as its own installation leaves it: torch.einsum contracts from left to right."""

    title = "BackPACK"
    package = "backpack"
    opt_einsum = False

    @classmethod
    def version(cls) -> str:
        importlib.import_module(cls.package)  # an ImportError names the package
        return version("backpack-for-pytorch")

    def extend_options(self) -> dict[str, Any]:
        # Its second order needs a module for everything; the converter makes them.
        return {"use_converter": isinstance(self.model, Recurrent)}

    def step(self, quantity: str, inputs: Tensor, labels: Tensor) -> None:
        # Opacus brings opt_einsum along, which torch then uses for everybody.
        with torch.backends.opt_einsum.flags(enabled=self.opt_einsum):
            super().step(quantity, inputs, labels)


class BackpackOptEinsum(Backpack):
    """BackPACK where the package opt_einsum is installed too, which chooses a better order of contraction."""

    title = "BackPACK + opt_einsum"
    opt_einsum = True

    @classmethod
    def version(cls) -> str:
        return f"{super().version()} + {version('opt_einsum')}"


class Opacus(Peer):
    """Opacus: per-sample gradients, and the norms of its "ghost clipping" (their computation, not the clipping)."""

    title = "Opacus"
    package = "opacus"
    quantities = ("BatchGrad", "BatchL2Grad")

    def __init__(self, model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = importlib.import_module("opacus.grad_sample")
        super().__init__(model)
        wrappers = library.GradSampleModule, library.GradSampleModuleFastGradientClipping
        self.wrapped = {q: wrap(copy.deepcopy(model)) for q, wrap in zip(self.quantities, wrappers, strict=True)}

    def step(self, quantity: str, inputs: Tensor, labels: Tensor) -> None:
        self.batch_size = len(labels)
        cross_entropy(self.wrapped[quantity](inputs), labels).backward()

    def results(self, extension: str) -> dict[str, Tensor]:
        attribute, power = {"BatchGrad": ("grad_sample", 1), "BatchL2Grad": ("_norm_sample", 2)}[extension]
        parameters = self.wrapped[extension]._module.named_parameters()
        return {name: (getattr(p, attribute) / self.batch_size) ** power for name, p in parameters}

    def drop(self) -> None:
        for wrapped in self.wrapped.values():
            for p in wrapped.parameters():
                p.grad = p.grad_sample = p._norm_sample = None


class TorchFunc(Peer):
    """Per-sample gradients by torch.func: vmap over the gradient of one sample's loss."""

    title = "torch.func"
    quantities = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance", "together")

    def step(self, quantity: str, inputs: Tensor, labels: Tensor) -> None:
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}

        def sample_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs = torch.func.functional_call(self.model, parameters, (x[None],))
            return cross_entropy(outputs, y[None]) / len(labels)

        gradients = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0, 0))(parameters, inputs, labels)
        for name, p in self.model.named_parameters():
            rows = gradients[name]
            p.grad = rows.sum(0)
            for extension in QUANTITIES[quantity]:
                setattr(p, RESULTS[extension], self.statistic(extension, rows))

    @staticmethod
    def statistic(extension: str, rows: Tensor) -> Tensor:
        """What `extension` gives, of per-sample gradients [N, *P]."""
        if extension == "BatchGrad":
            return rows
        if extension == "BatchL2Grad":
            return rows.flatten(1).square().sum(1)
        return rows.square().sum(0) if extension == "SumGradSquared" else rows.var(0, correction=0)


LIBRARIES = {
    "backpack_cuda": BackpackCuda,
    "backpack": Backpack,
    "backpack_opt_einsum": BackpackOptEinsum,
    "opacus": Opacus,
}
EVERY_LIBRARY = LIBRARIES | {"torch_func": TorchFunc}  # with that of gpu_report.py

"""One cell of BackPACK's support matrix, run through either library and held against the oracle."""

import functools
import importlib
import warnings
from functools import cached_property

import torch
from backpack_matrix import ANSWERS, COLUMNS, MISSING, RAISES, RIGHT, ROWS, WRONG, Row
from curvature_oracle import Curvature, curvature, hessian_diagonals, square_root
from curvature_tools import expected_factors
from oracle import Stats, from_per_sample
from recurrent_oracle import recurrent_factors
from sequential_oracle import averaged, output_factor, positive_blocks, steps
from torch import Tensor, nn


class Reference:
    """What the oracle says of a row, each part when it is asked for."""

    def __init__(self, row: Row):
        self.model = row.model("backpack")
        self.inputs, self.targets = row.data()
        self.loss_function = row.loss()
        self.parameters = dict(self.model.named_parameters())

    def loss(self, outputs: Tensor) -> Tensor:
        return self.loss_function(outputs, self.targets)

    @cached_property
    def statistics(self) -> dict[str, Stats]:
        outputs = self.model(self.inputs).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(outputs), outputs)
        rows = gradient.flatten(1)  # [N, D]
        jacobians = self.curvature.jacobian
        return {name: from_per_sample(torch.einsum("nd,nd...->n...", rows, j)) for name, j in jacobians.items()}

    @cached_property
    def curvature(self) -> Curvature:
        return curvature(self.model, self.loss, self.inputs)

    @cached_property
    def hessian_diagonals(self) -> dict[str, Tensor]:
        return hessian_diagonals(self.model, self.loss, self.inputs)

    @cached_property
    def factors(self) -> dict[str, list[Tensor]]:
        roots = square_root(self.curvature.hessian)
        factors = expected_factors(self.model, self.inputs, roots, "backpack")
        factors |= recurrent_factors(self.model, lambda n: self.model(self.inputs[n : n + 1]), roots)
        for name, parameter in self.parameters.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            if name not in factors and parameter.dim() == 1 and not isinstance(module, nn.RNNBase):
                factors[name] = [self.curvature.blocks(name).sum(0)]
        return factors

    @cached_property
    def steps(self):
        return steps(self.model, self.loss, self.inputs)

    @cached_property
    def averaged_factors(self) -> dict[str, list[Tensor]]:
        """KFRA's B of a layer, and the blocks of other modules' vectors; A is that of KFLR."""
        if any(isinstance(module, nn.RNNBase) for module in self.model.modules()):
            return {}
        chain, hessian = self.steps
        at_outputs, factors = averaged(chain, hessian), {}
        modules, jacobians = dict(self.model.named_modules()), {step.name: step.parameters for step in chain}
        for name, known in self.factors.items():
            layer, _, own_name = name.rpartition(".")
            module, mat = modules[layer], at_outputs[name.partition(".")[0]]
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                groups = getattr(module, "groups", 1) if own_name == "weight" else 1
                b = output_factor(module, mat, "backpack", groups)
                factors[name] = [b if groups > 1 else b[0], *known[1:]]
            else:
                jacobian = jacobians[layer][name]
                factors[name] = [(jacobian.mT @ mat @ jacobian).mean(0)]
        return factors

    @functools.cache  # noqa: B019
    def products(self, name: str, kind: str, modify: str = "clip") -> tuple[Tensor, Tensor]:
        """Two vectors [2, *P], and their products with the parameter's block of a curvature matrix."""
        parameter = self.parameters[name]
        generator = torch.Generator().manual_seed(len(name))
        vectors = torch.randn(2, *parameter.shape, dtype=torch.float64, generator=generator)
        if kind == "hmp":
            (gradient,) = torch.autograd.grad(self.loss(self.model(self.inputs)), parameter, create_graph=True)
            rows = [
                torch.autograd.grad(gradient, parameter, v, retain_graph=True, materialize_grads=True)[0]
                for v in vectors
            ]
            return vectors, torch.stack(rows)
        blocks = self.curvature.blocks(name).sum(0) if kind == "ggnmp" else positive_blocks(*self.steps, modify)[name]
        return vectors, (vectors.flatten(1) @ blocks).view_as(vectors)

    def is_right(self, name: str, savefield: str, value, dtype: torch.dtype) -> bool | None:
        """Whether a result on the parameter `name` is what it must be; None where this oracle does not know."""
        parameter = self.parameters[name]
        samples, tolerance = len(self.inputs), 1e-9 if dtype == torch.float64 else 2e-5
        close = functools.partial(is_close, tolerance)
        if savefield in ("grad_batch", "batch_l2", "sum_grad_squared", "variance"):
            field = "batch_grad" if savefield == "grad_batch" else savefield
            return close(value, getattr(self.statistics[name], field))
        if savefield == "diag_ggn_exact":
            return close(value, self.curvature.diag(name))
        if savefield == "diag_ggn_exact_batch":
            return close(value, self.curvature.batch_diag(name))
        if savefield == "sqrt_ggn_exact":
            rows = value.detach().double().flatten(2)  # [V, N, |P|]
            return value.shape[1:] == (samples, *parameter.shape) and close(
                torch.einsum("vnp,vnq->npq", rows, rows), self.curvature.blocks(name)
            )
        if savefield.startswith(("diag_ggn_mc", "sqrt_ggn_mc")):  # the draws differ
            leading = {"diag_ggn_mc": (), "diag_ggn_mc_batch": (samples,), "sqrt_ggn_mc": (1, samples)}[savefield]
            return value.shape == (*leading, *parameter.shape) and bool(value.isfinite().all())
        if savefield in ("kfac", "kflr", "kfra"):
            expected = (self.averaged_factors if savefield == "kfra" else self.factors).get(name)
            if expected is None:
                return None
            if [f.shape for f in value] != [f.shape for f in expected]:
                return False
            exact = slice(1 if savefield == "kfac" else 0, None)  # the draws differ
            return all(map(close, value[exact], expected[exact]))
        if savefield in ("diag_h", "diag_h_batch"):
            rows = self.hessian_diagonals[name]
            return close(value, rows if savefield == "diag_h_batch" else rows.sum(0), rows.abs().max().item())
        vectors, expected = self.products(name, savefield)
        return close(value(vectors.to(dtype)), expected)


def is_close(tolerance: float, value: Tensor, expected: Tensor, size: float = 0.0) -> bool:
    """Whether shapes are equal, and errors at most `tolerance` times the largest expected entry (or `size`)."""
    if value.shape != expected.shape:
        return False
    size = max(size, expected.abs().max().item(), 1e-3)
    return (value.detach().double() - expected).abs().max().item() <= tolerance * size


reference = functools.cache(lambda name: Reference(ROWS[name]))


def verdict(library: str, name: str, column: str, dtype: torch.dtype = torch.float64) -> tuple[str, object]:
    """One cell: right, wrong, missing (no attribute on some parameter) or raises; and the evidence."""
    row = ROWS[name]
    backpack = importlib.import_module(library)
    names = importlib.import_module(f"{library}.extensions")
    extensions = [getattr(names, extension)() for extension in COLUMNS[column]]
    model, loss_function = backpack.extend(row.model(library).to(dtype)), backpack.extend(row.loss().to(dtype))
    inputs, targets = (t.to(dtype) if t.is_floating_point() else t for t in row.data())
    found = []
    with warnings.catch_warnings():
        if library == "backpack":
            warnings.simplefilter("ignore")
        try:
            with backpack.backpack(*extensions):
                loss_function(model(inputs), targets).backward()
            for parameter_name, parameter in model.named_parameters():
                for ext in extensions:
                    if not hasattr(parameter, ext.savefield):
                        found.append((MISSING, f"{parameter_name}.{ext.savefield}"))
                        continue
                    value = getattr(parameter, ext.savefield)
                    right = reference(name).is_right(parameter_name, ext.savefield, value, dtype)
                    if not right:
                        found.append((WRONG if right is False else ANSWERS, f"{parameter_name}.{ext.savefield}"))
        except Exception as error:
            return RAISES, error
    return min(found, key=lambda f: (WRONG, MISSING, ANSWERS).index(f[0]), default=(RIGHT, None))


def after_one_step(
    library: str, build, inputs: Tensor, targets: Tensor, *names: str, loss=nn.CrossEntropyLoss, **options
):
    """The extended model after one step with the named extensions, in train mode."""
    backpack, extensions = (importlib.import_module(name) for name in (library, f"{library}.extensions"))
    torch.manual_seed(0)
    model, loss_function = backpack.extend(build().to(inputs.dtype)), backpack.extend(loss())
    with warnings.catch_warnings(), backpack.backpack(*[getattr(extensions, n)(**options) for n in names]):
        warnings.filterwarnings("ignore", "Full backward hook is firing|Encountered BatchNorm module in training")
        loss_function(model(inputs), targets).backward()
    return model

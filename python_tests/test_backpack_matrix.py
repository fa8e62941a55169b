"""BackPACK's support matrix, cell by cell: the same model, data and seed through BackPACK and through us.

Both are held against the oracle. Where BackPACK is right, we are, and so both are equal; where it raises or is wrong,
we are right or refuse. A test that fails because BackPACK got better is a line to change in backpack_matrix.py.
"""

import functools
import importlib
import warnings
from functools import cached_property

import pytest
import torch
from backpack_matrix import COLUMNS, LETTERS, MISSING, RAISES, RIGHT, ROWS, VERDICTS, WRONG, Row
from curvature_oracle import Curvature, curvature, hessian_diagonals, square_root
from curvature_tools import expected_factors
from oracle import Stats, from_per_sample
from sequential_oracle import averaged, positive_blocks, steps
from torch import Tensor, nn

import backpack_cuda as bp

pytest.importorskip("backpack", reason="BackPACK is not installed")


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
        factors = expected_factors(self.model, self.inputs, square_root(self.curvature.hessian), "backpack")
        for name, parameter in self.parameters.items():
            if name not in factors and parameter.dim() == 1:
                factors[name] = [self.curvature.blocks(name).sum(0)]
        return factors

    @cached_property
    def steps(self):
        return steps(self.model, self.loss, self.inputs)

    @cached_property
    def averaged_factors(self) -> dict[str, list[Tensor]]:
        """KFRA's B at a convolution is summed over both positions; A is that of KFLR."""
        chain, hessian = self.steps
        at_outputs, factors = averaged(chain, hessian), {}
        for name, known in self.factors.items():
            mat, out = at_outputs[name.partition(".")[0]], len(known[0])
            factors[name] = [mat.reshape(out, len(mat) // out, out, -1).sum((1, 3)), *known[1:]]
        return factors

    @functools.cache  # noqa: B019
    def products(self, name: str, kind: str) -> tuple[Tensor, Tensor]:
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
        blocks = self.curvature.blocks(name).sum(0) if kind == "ggnmp" else positive_blocks(*self.steps, "clip")[name]
        return vectors, (vectors.flatten(1) @ blocks).view_as(vectors)

    def is_right(self, name: str, savefield: str, value, dtype: torch.dtype) -> bool:
        """Whether a result on the parameter `name` is what it must be."""
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
            expected = (self.averaged_factors if savefield == "kfra" else self.factors)[name]
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
                    elif not reference(name).is_right(
                        parameter_name, ext.savefield, getattr(parameter, ext.savefield), dtype
                    ):
                        found.append((WRONG, f"{parameter_name}.{ext.savefield}"))
        except Exception as error:
            return RAISES, error
    return min(found, key=lambda f: f[0] != WRONG, default=(RIGHT, None))


def their_type(name: str, column: str) -> torch.dtype:
    """The type that BackPACK can run a cell in."""
    return torch.float32 if column in ROWS[name].float32 else torch.float64


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ROWS)
def test_cell(name, column):
    theirs, ours = (letters[list(COLUMNS).index(column)] for letters in VERDICTS[name])
    found, evidence = verdict("backpack", name, column, their_type(name, column))
    assert found == LETTERS[theirs], f"BackPACK: {evidence!r}"
    if not all(hasattr(bp.extensions, extension) for extension in COLUMNS[column]):
        pytest.skip(f"{column} is not there yet")
    found, evidence = verdict("backpack_cuda", name, column)
    assert found == LETTERS[ours], f"ours: {evidence!r}"
    if ours == "-":
        assert isinstance(evidence, NotImplementedError) and len(str(evidence)) > 40


def curvatures(library: str, build, inputs: Tensor, targets: Tensor, *names: str, loss=nn.CrossEntropyLoss, **options):
    """The extended model after one step with the named extensions, in train mode."""
    backpack, extensions = (importlib.import_module(name) for name in (library, f"{library}.extensions"))
    torch.manual_seed(0)
    model, loss_function = backpack.extend(build().to(inputs.dtype)), backpack.extend(loss())
    with warnings.catch_warnings(), backpack.backpack(*[getattr(extensions, n)(**options) for n in names]):
        warnings.filterwarnings("ignore", "Full backward hook is firing|Encountered BatchNorm module in training")
        loss_function(model(inputs), targets).backward()
    return model


def test_dropout_in_train_mode():
    """The same random mask in both libraries."""
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(4, (4,))

    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Dropout(0.4), nn.Linear(4, 4))

    names = ["BatchGrad", "DiagGGNExact", "SqrtGGNExact", "DiagHessian"]
    theirs, ours = (curvatures(library, build, x, y, *names) for library in ("backpack", "backpack_cuda"))
    for other, mine in zip(theirs.parameters(), ours.parameters(), strict=True):
        for field in ("grad", "grad_batch", "diag_ggn_exact", "sqrt_ggn_exact", "diag_h"):
            torch.testing.assert_close(getattr(mine, field), getattr(other, field))


@pytest.mark.parametrize("name", [e for column, names in COLUMNS.items() for e in names if not column.endswith("MP")])
def test_batch_norm_in_train_mode(name):
    """Samples depend on each other: the summands of the gradient with a warning, or an error."""
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))

    def build():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    if not hasattr(bp.extensions, name):
        pytest.skip(f"{name} is not there yet")
    if name == "BatchGrad":
        theirs = curvatures("backpack", build, x, y, name)
        with pytest.warns(UserWarning, match="mixes the samples"):
            ours = curvatures("backpack_cuda", build, x, y, name)
        for other, mine in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(mine.grad_batch, other.grad_batch)
    else:
        for library in ("backpack", "backpack_cuda"):
            with pytest.raises(NotImplementedError):
                curvatures(library, build, x, y, name)


@pytest.mark.parametrize("name", ["BatchGrad", "SqrtGGNExact", "SqrtGGNMC"])
@pytest.mark.parametrize("samples", [[0], [2, 0], [1, 1, 3], []], ids=str)
def test_subsampling(name, samples):
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))

    def build():
        return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))

    theirs, ours = (
        curvatures(library, build, x, y, name, subsampling=samples) for library in ("backpack", "backpack_cuda")
    )
    field = getattr(bp.extensions, name)().savefield
    for other, mine in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert getattr(mine, field).shape == getattr(other, field).shape
        if name != "SqrtGGNMC":  # the draws differ
            torch.testing.assert_close(getattr(mine, field), getattr(other, field))

"""Exact GGN quantities and the Hessian's diagonal on whole models, against dense per-sample Jacobians and Hessians."""

import copy
import itertools

import pytest
import torch
from curvature_oracle import curvature, hessian_diagonals, loss_hessian, square_root, trained
from curvature_tools import (
    BODIES,
    CONVENTIONS,
    EXACT,
    HESSIAN,
    LOSSES,
    MONTE_CARLO,
    SECOND_ORDER,
    assert_exact_ggn,
    assert_factors,
    assert_nothing_saved,
    assert_same,
    backward,
    expected_factors,
    saved,
    targets_for,
)
from helpers import assert_close, examples, named, some
from model_cases import LAYERS, MODELS, all_extensions, assert_quantities
from random_models import random_case
from torch import Tensor, nn

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import (
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
)

PLAIN = MODELS["mlp"]


def exact_extensions():
    return [make() for make in EXACT.values()]


def every_extension():
    """One of each, as far as they can be active together: all of them."""
    return [make() for make in SECOND_ORDER.values()]


def expected_of(case) -> object:
    """The dense curvature of a `ModelCase`."""
    inputs, targets = case.data()
    return curvature(case.stock(), lambda outputs: case.loss(outputs, targets), inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Against the oracle
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(examples(300)))
def test_random_architectures(seed, device):
    """All exact quantities at once, KFLR under one of the conventions; see random_models.py for what is drawn."""
    case = random_case(seed)
    expected = curvature(case.model, case.loss_of, case.inputs)
    convention = CONVENTIONS[seed % 3]
    factors = expected_factors(case.model, case.inputs, square_root(expected.hessian), convention)
    kflr = KFLR(convention=convention, fail_mode="SILENT")
    model, targets = case.model.to(device), case.targets.to(device)
    backward(model, case.loss.to(device), case.inputs.to(device), targets, *exact_extensions(), kflr)
    assert_exact_ggn(model, expected)
    assert_factors(model, "kflr", factors)


@pytest.mark.parametrize("seed", range(1000, 1000 + examples(60)))
def test_random_architectures_in_float32(seed, device):
    """Against float64 at the same rounded parameters and inputs; columns a few at a time."""
    case = random_case(seed)
    stock, inputs = case.model.float().double(), case.inputs.float().double()
    loss, targets = copy.deepcopy(case.loss).double(), case.targets
    expected = curvature(stock, lambda outputs: loss(outputs, targets), inputs)
    model, loss = stock.to(device, torch.float32), loss.to(device, torch.float32)
    targets = targets.to(device, torch.float32) if targets.is_floating_point() else targets.to(device)
    backward(model, loss, inputs.float().to(device), targets, *exact_extensions(), memory_budget=2000)
    largest = max(expected.batch_diag(name).abs().max().item() for name in expected.jacobian)
    for name, parameter in trained(model).items():
        size = max(largest, 1e-6)
        assert_close(name, parameter.diag_ggn_exact_batch, expected.batch_diag(name), 1e-4, size)
        assert_close(name, parameter.diag_ggn_exact, expected.diag(name), 1e-4, size)


@pytest.mark.parametrize("seed", range(examples(100)))
def test_random_architectures_of_elementwise_functions(seed, device):
    """The Hessian's diagonal, total and per sample."""
    case = random_case(seed, elementwise_only=True)
    expected = hessian_diagonals(case.model, case.loss_of, case.inputs)
    model, targets = case.model.to(device), case.targets.to(device)
    backward(model, case.loss.to(device), case.inputs.to(device), targets, DiagHessian(), BatchDiagHessian())
    assert_hessian(model, expected)


def assert_hessian(model: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    largest = max(rows.abs().max().item() for rows in expected.values())
    for name, parameter in trained(model).items():
        rows = expected[name]
        size = max(rows.abs().max().item(), 1e-3 * largest, 1e-300)
        assert_close(f"{name}.diag_h", parameter.diag_h, rows.sum(0), tolerance, size)
        assert_close(f"{name}.diag_h_batch", parameter.diag_h_batch, rows, tolerance, size)


@pytest.mark.parametrize("how", list(LAYERS))
@named("case", {name: case for name, case in MODELS.items() if "rnn" not in name})
def test_models(case, how, device):
    """Every model of the first-order tests, with torch's layers and with ours."""
    model = case.prepared(how).to(device)
    inputs, targets = (t.to(device) for t in case.data())
    backward(model, case.loss, inputs, targets, *exact_extensions())
    assert_exact_ggn(model, expected_of(case))


@named("build, shape", BODIES)
@named("loss, kind", LOSSES)
def test_losses(loss, kind, build, shape, device):
    """Every option of the losses; with extra dimensions, whose weights belong to dimension 1, too."""
    model = build().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        targets = targets_for(kind, model(inputs))
    expected = curvature(model, lambda outputs: loss(outputs, targets), inputs)
    hessian = hessian_diagonals(model, lambda outputs: loss(outputs, targets), inputs)
    factors = expected_factors(model, inputs, square_root(expected.hessian), "backpack")
    extensions = [*exact_extensions(), DiagHessian(), BatchDiagHessian(), KFLR()]
    backward(model.to(device), loss.to(device), inputs.to(device), targets.to(device), *extensions)
    assert_exact_ggn(model, expected)
    assert_hessian(model, hessian)
    assert_factors(model, "kflr", factors)


def test_a_loss_of_the_user(device):
    """`register_loss` with one function; subclasses with the same forward inherit it."""
    from backpack_cuda.curvature.losses import register_loss

    class Poisson(nn.Module):
        """The Poisson negative log-likelihood of log-rates, summed over features and averaged over samples."""

        def forward(self, log_rate: Tensor, target: Tensor) -> Tensor:
            return (log_rate.exp() - target * log_rate).sum() / len(log_rate)

    def hessian_sqrt(module, log_rate, target):
        entries = (0.5 * log_rate).exp() / len(log_rate) ** 0.5  # [N, D]
        return torch.diag_embed(entries).movedim(1, 0)  # [D, N, D]

    build, shape = BODIES["vectors"]
    model, inputs = build().double(), torch.randn(shape, dtype=torch.float64)
    targets, loss = torch.rand(len(inputs), 3, dtype=torch.float64), Poisson()
    expected = curvature(model, lambda outputs: loss(outputs, targets), inputs)
    extended = extend(loss)
    value = extended(extend(model)(inputs), targets)
    with backpack(DiagGGNExact()), pytest.raises((NotImplementedError, RuntimeError), match="register_loss"):
        value.backward()
    register_loss(Poisson, hessian_sqrt)
    backward(model.to(device), extended, inputs.to(device), targets.to(device), *exact_extensions(), DiagGGNMC(2000))
    assert_exact_ggn(model, expected)
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.diag_ggn_mc, expected.diag(name), 0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, types and what is there
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shapes_and_types(dtype, device):
    """Sums are float32 (float64 for float64), square roots are in the parameter's type."""
    model = PLAIN.prepared().to(device, dtype)
    inputs, targets = PLAIN.data()
    samples, classes = len(inputs), 3
    extensions = [make(mc_samples=2) for make in MONTE_CARLO.values()] + [
        *exact_extensions(),
        *[DiagHessian(), BatchDiagHessian(), KFAC(mc_samples=2), KFLR()],
    ]
    backward(model, nn.CrossEntropyLoss(), inputs.to(device, dtype), targets.to(device), *extensions)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    for parameter in model.parameters():
        shapes = {
            "diag_ggn_exact": (), "diag_ggn_mc": (), "diag_h": (),
            "diag_ggn_exact_batch": (samples,), "diag_ggn_mc_batch": (samples,), "diag_h_batch": (samples,),
            "sqrt_ggn_exact": (classes, samples), "sqrt_ggn_mc": (2, samples),
        }  # fmt: skip
        for field, leading in shapes.items():
            value = getattr(parameter, field)
            assert value.shape == (*leading, *parameter.shape), field
            assert value.dtype == (dtype if field.startswith("sqrt") else statistics), field
            assert not value.requires_grad and value.isfinite().all()
        for field in ("kfac", "kflr"):
            factors = getattr(parameter, field)
            assert [f.shape for f in factors] == [(size, size) for size in parameter.shape]
            assert {f.dtype for f in factors} == {statistics}
            factors[0] *= 2  # as Laplace does


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
@named("case", some(MODELS, "mlp", "cnn", "residual", "tokens, mse", "decoder", "layer norm", "tied weights"))
def test_types_of_less_precision(case, dtype, tolerance, device):
    """Against float64 at the same rounded parameters and inputs."""
    inputs, targets = case.data()
    stock = case.stock().to(dtype).double()
    inputs = inputs.to(dtype).double()
    targets = targets.to(dtype).double() if targets.is_floating_point() else targets
    expected = curvature(stock, lambda outputs: case.loss(outputs, targets), inputs)
    model = extend(stock.to(device, dtype))
    targets = targets.to(device, dtype) if targets.is_floating_point() else targets.to(device)
    backward(model, case.loss, inputs.to(device, dtype), targets, *exact_extensions())
    assert_exact_ggn(model, expected, tolerance)


SUBSETS = [c for r in (1, 2) for c in itertools.combinations(EXACT | HESSIAN, r)]


@pytest.mark.parametrize("fields", SUBSETS, ids="-".join)
def test_only_what_is_asked_for(fields, device):
    case = MODELS["residual"]
    model = case.prepared().to(device)
    inputs, targets = (t.to(device) for t in case.data())
    backward(model, case.loss, inputs, targets, *[SECOND_ORDER[field]() for field in fields])
    assert_exact_ggn(model, expected_of(case), fields=fields)
    assert all(set(found) == set(fields) for found in saved(model).values())


@named("case", some(MODELS, "mlp", "cnn", "tokens, mse", "tied weights", "shared modules"))
def test_several_extensions_equal_each_alone(case, device):
    """One sweep feeds all: the same numbers as of a sweep for each. Sampled quantities share their draws."""
    inputs, targets = (t.to(device) for t in case.data())
    fields = [f for f in SECOND_ORDER if f not in HESSIAN or case is PLAIN]

    def results(chosen):
        model = case.prepared().to(device)
        torch.manual_seed(3)
        backward(model, case.loss, inputs, targets, *[SECOND_ORDER[f]() for f in chosen])
        return saved(model)

    together = results(fields)
    for field in fields:
        alone = results([field])
        expected = {name: {field: found[field]} for name, found in together.items()}
        assert_same(alone, expected, 1e-12)


class Sums(nn.Module):
    """Two layers with one output gradient."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()], ids=repr)
def test_results_have_memory_of_their_own(loss, device):
    """Changing one in place changes no other, also where equal: of two extensions, or of layers with equal columns."""
    model = nn.Sequential(Sums(), nn.ReLU(), Sums()).double().to(device)
    inputs, targets = torch.randn(4, 3).double().to(device), torch.rand(4, 3).double().softmax(1).to(device)
    backward(model, loss, inputs, targets, *every_extension())
    results = [
        v for found in saved(model).values() for r in found.values() for v in (r if isinstance(r, list) else [r])
    ]
    for i, value in enumerate(results):
        value.fill_(i)
    assert all((value == i).all() for i, value in enumerate(results))
    assert len(results) == 10 * 4 + 12 * 4  # a bias has one Kronecker factor, a weight two


def test_a_quantity_given_twice(device):
    """Two instances of one extension, with different options: the later one's result stays, as with BackPACK."""
    model = PLAIN.prepared().to(device)
    inputs, targets = (t.to(device) for t in PLAIN.data())
    backward(model, PLAIN.loss, inputs, targets, KFLR(convention="expand"), DiagGGNExact(), DiagGGNExact(), KFLR())
    assert_exact_ggn(model, expected_of(PLAIN), fields=["diag_ggn_exact"])


@named("case", some(MODELS, "mlp", "cnn", "tied weights", "layer norm"))
def test_first_and_second_order_together(case, device):
    """Both from one backward pass, and `.grad` stays what it is."""
    model = case.prepared().to(device)
    inputs, targets = case.data()
    backward(model, case.loss, inputs.to(device), targets.to(device), *all_extensions(), *exact_extensions())
    assert_quantities(model, case.expected(inputs, targets))
    assert_exact_ggn(model, expected_of(case))


@named("case", some(MODELS, "mlp", "cnn", "layer norm", "shared modules"))
def test_ordinary_gradients_do_not_change(case, device):
    inputs, targets = (t.to(device) for t in case.data())
    stock, model = case.stock().to(device), case.prepared().to(device)
    x, stock_x = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    case.loss(stock(stock_x), targets).backward()
    extensions = [*exact_extensions(), KFLR(fail_mode="SILENT"), KFAC(fail_mode="SILENT"), DiagGGNMC(), SqrtGGNMC()]
    if case in (PLAIN, MODELS["cnn"]):
        extensions += [DiagHessian(), BatchDiagHessian()]
    backward(model, case.loss, x, targets, *extensions)
    assert torch.equal(x.grad, stock_x.grad)
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("subsampling", [[0], [2, 1], [2, 2, 0, 2], [0, 1, 2], [], (1, 0)], ids=str)
@named("case", some(MODELS, "mlp", "cnn", "tied weights", "layer norm", "tokens, mse"))
def test_subsampling(case, subsampling, device):
    """Rows of the full square root in the given order, with the same scaling; the others see the whole batch."""
    inputs, targets = (t.to(device) for t in case.data())
    full, part = case.prepared().to(device), case.prepared().to(device)
    torch.manual_seed(5)
    backward(full, case.loss, inputs, targets, SqrtGGNExact(), SqrtGGNMC(3))
    torch.manual_seed(5)
    chosen = SqrtGGNExact(subsampling=subsampling), SqrtGGNMC(3, subsampling=subsampling)
    backward(part, case.loss, inputs, targets, *chosen, DiagGGNExact())
    rows = torch.tensor(subsampling, dtype=torch.long, device=device)
    for (name, mine), theirs in zip(part.named_parameters(), full.parameters(), strict=True):
        for field in ("sqrt_ggn_exact", "sqrt_ggn_mc"):
            whole = getattr(theirs, field)
            assert_close(name, getattr(mine, field), whole[:, rows].cpu(), 1e-12, whole.abs().max().item())
    assert_exact_ggn(part, expected_of(case), fields=["diag_ggn_exact"])


def test_subsampling_beyond_the_batch(device):
    model = PLAIN.prepared().to(device)
    inputs, targets = (t.to(device) for t in PLAIN.data())
    with pytest.raises((ValueError, IndexError), match="subsampling"):
        backward(model, PLAIN.loss, inputs, targets, DiagGGNExact(), SqrtGGNExact(subsampling=[17]))
    assert_nothing_saved(model)


@pytest.mark.parametrize("make", [e for e in SECOND_ORDER.values() if e not in (SqrtGGNExact, SqrtGGNMC)])
def test_subsampling_exists_for_square_roots_only(make):
    with pytest.raises(TypeError, match="subsampling"):
        make(subsampling=[0])


# ---------------------------------------------------------------------------------------------------------------------
# How it is computed must not matter
# ---------------------------------------------------------------------------------------------------------------------

MANY_WAYS = some(MODELS, "mlp", "cnn", "dense prediction", "tied weights", "layer norm", "tokens, mse")


@named("case", MANY_WAYS)
def test_results_do_not_depend_on_the_memory_budget(case, device):
    inputs, targets = (t.to(device) for t in case.data())

    def results(budget):
        model = case.prepared().to(device)
        torch.manual_seed(7)
        extensions = [*exact_extensions(), DiagGGNMC(5), SqrtGGNMC(5)]
        extensions += [KFLR(fail_mode="SILENT"), KFAC(5, fail_mode="SILENT")]
        if case is PLAIN:
            extensions += [DiagHessian(), BatchDiagHessian()]
        backward(model, case.loss, inputs, targets, *extensions, memory_budget=budget)
        return saved(model)

    expected = results(None)
    for budget in (1, 10_000, 1 << 40):
        assert_same(results(budget), expected, 1e-12)


@pytest.mark.parametrize("budget", [0, -1, 0.5, "1 GB", True], ids=repr)
def test_bad_memory_budget(budget):
    with pytest.raises((ValueError, TypeError), match="memory_budget"):
        backpack(DiagGGNExact(), memory_budget=budget)


@named("case", MANY_WAYS)
def test_results_do_not_depend_on_the_number_of_threads(case, device):
    inputs, targets = (t.to(device) for t in case.data())

    def results(threads):
        torch.set_num_threads(threads)
        model = case.prepared().to(device)
        torch.manual_seed(7)
        backward(model, case.loss, inputs, targets, *exact_extensions(), DiagGGNMC(5), KFLR(fail_mode="SILENT"))
        return saved(model)

    assert_same(results(2), results(1), 1e-12)


@pytest.mark.parametrize("scale", [3.0, 0.125, 0.0])
def test_a_scaled_loss_scales_the_quantities(scale, device):
    """By c, square roots by its root; BackPACK only warns."""
    inputs, targets = (t.to(device) for t in PLAIN.data())
    model, reference = PLAIN.prepared().to(device), PLAIN.prepared().to(device)
    for one, c in ((model, scale), (reference, 1.0)):
        torch.manual_seed(1)
        backward(one, PLAIN.loss, inputs, targets, *every_extension(), scale=c)
    factor = {"sqrt_ggn_exact": scale**0.5, "sqrt_ggn_mc": scale**0.5}
    expected = saved(reference)
    for quantities in expected.values():
        for field, value in quantities.items():
            if isinstance(value, list):
                value[0] *= scale  # the reduction's factor is in B alone
            else:
                value *= factor.get(field, scale)
    actual = saved(model)
    for name, quantities in expected.items():
        for field, value in quantities.items():
            mine, theirs = (v if isinstance(v, list) else [v] for v in (actual[name][field], value))
            for a, b in zip(mine, theirs, strict=True):
                assert_close(f"{name}.{field}", a, b, 1e-12, max(b.abs().max().item(), 1e-300))


def test_a_negative_factor(device):
    """The GGN of -l is the negative one: it has a diagonal, and no square root."""
    inputs, targets = (t.to(device) for t in PLAIN.data())
    for extensions in ([SqrtGGNExact()], [SqrtGGNMC()], [DiagGGNExact()], [KFLR()], [DiagHessian()]):
        model = PLAIN.prepared().to(device)
        try:
            backward(model, PLAIN.loss, inputs, targets, *extensions, scale=-2.0)
        except (ValueError, NotImplementedError) as error:
            assert "negative" in str(error) or "positive" in str(error)
            assert_nothing_saved(model)
        else:
            assert isinstance(extensions[0], DiagGGNExact | DiagHessian)
            if isinstance(extensions[0], DiagGGNExact):
                for name, parameter in model.named_parameters():
                    assert_close(name, parameter.diag_ggn_exact, -2 * expected_of(PLAIN).diag(name), 1e-9)


def test_the_loss_hessian_of_the_oracle():
    """The oracle against formulas: of MSE 2/(N D) I, of cross-entropy (diag(p) - p p^T)/N."""
    outputs = torch.randn(3, 4, dtype=torch.float64)
    targets = torch.randint(4, (3,))
    p = outputs.softmax(1)
    hessian = loss_hessian(lambda f: nn.functional.cross_entropy(f, targets), outputs)
    assert torch.allclose(hessian, (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / 3)
    hessian = loss_hessian(lambda f: nn.functional.mse_loss(f, torch.zeros_like(f)), outputs)
    assert torch.allclose(hessian, 2 / 12 * torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


def test_columns_of_the_square_root(device):
    """BackPACK's: column v of S_n is sqrt(p_v) (e_v - p) for cross-entropy, sqrt(2/(N D)) e_v for MSE."""
    inputs, classes = PLAIN.data()
    n, c = len(inputs), 3
    with torch.no_grad():
        outputs = PLAIN.stock()(inputs)
    p = outputs.softmax(1)
    of_softmax = torch.zeros(c, n, c, dtype=torch.float64)
    of_square = torch.zeros(c, n, c, dtype=torch.float64)
    for v in range(c):
        of_softmax[v] = -p[:, v : v + 1].sqrt() * p
        of_softmax[v, :, v] += p[:, v].sqrt()
        of_square[v, :, v] = (2 / (n * c)) ** 0.5
    s = outputs.sigmoid()
    cases = {
        nn.CrossEntropyLoss(): (classes, of_softmax / n**0.5),
        nn.MSELoss(): (torch.zeros_like(outputs), of_square),
        nn.BCEWithLogitsLoss(reduction="sum"): (s, torch.diag_embed((s * (1 - s)).sqrt()).movedim(1, 0)),
    }
    for loss, (targets, roots) in cases.items():
        model = PLAIN.prepared().to(device)
        backward(model, loss, inputs.to(device), targets.to(device), SqrtGGNExact())
        expected = curvature(PLAIN.stock(), lambda f, loss=loss, y=targets: loss(f, y), inputs)
        for name, parameter in model.named_parameters():
            assert_close(name, parameter.sqrt_ggn_exact, expected.columns(roots, name), 1e-9)


@pytest.mark.parametrize("make", [DiagGGNMC, BatchDiagGGNMC, SqrtGGNMC, KFAC])
@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", None, True], ids=repr)
def test_bad_number_of_samples(make, wrong):
    with pytest.raises((ValueError, TypeError), match="mc_samples"):
        make(mc_samples=wrong)


def test_names_and_representations():
    assert [e.savefield for e in every_extension()] == list(SECOND_ORDER)
    assert repr(BatchDiagGGNMC(3)) == "BatchDiagGGNMC(mc_samples=3)"
    assert repr(SqrtGGNExact(subsampling=[1])) == "SqrtGGNExact(subsampling=[1])"
    assert repr(BatchDiagGGNExact()) == "BatchDiagGGNExact()"
    assert DiagGGNMC(4).get_num_mc_samples() == 4

"""torch.nn.RNN, LSTM and GRU in every shape: against loops over single samples in stock modules.

The oracle runs torch's own module on one sample at a time, in its own layout; only the layouts, the sums over samples
and the products with the loss' Hessian are written here.
"""

import copy
import gc
import importlib
import pickle
import weakref
from typing import NamedTuple

import pytest
import torch
from curvature_oracle import Curvature, loss_hessian, square_root
from curvature_tools import assert_exact_ggn, assert_factors
from helpers import assert_close, examples
from oracle import from_per_sample, per_sample_gradients
from property_testing import given, settings, st
from recurrent_oracle import recurrent_factors
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from backpack_cuda import backpack, disable, extend
from backpack_cuda.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

KINDS = {"tanh": nn.RNN, "relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
LAYOUTS = ("batch first", "time first", "unbatched", "packed", "packed, unsorted")
FIRST_ORDER = (BatchGrad, BatchL2Grad, SumGradSquared, Variance)
EXACT = (DiagGGNExact, BatchDiagGGNExact, SqrtGGNExact)


class Case(NamedTuple):
    """A recurrent module, and how it is called."""

    kind: str = "lstm"
    layout: str = "batch first"
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    projected: bool = False  # LSTM only
    states: bool = False  # whether initial states are given, which require gradients then
    read: str = "all"  # what the loss depends on: "output", "last" (h_n), "cell" (c_n) or "all"
    samples: int = 3
    length: int = 4

    def module(self, input_size: int = 2, hidden_size: int = 3, dropout: float = 0.0) -> nn.RNNBase:
        options = {"batch_first": self.layout == "batch first", "bias": self.bias, "dropout": dropout}
        if self.kind in ("tanh", "relu"):
            options["nonlinearity"] = self.kind
        if self.projected and self.kind == "lstm":
            options["proj_size"] = 2
        return KINDS[self.kind](input_size, hidden_size, self.layers, bidirectional=self.bidirectional, **options)

    @property
    def lengths(self) -> Tensor | None:
        """[N] of packed sequences."""
        if not self.layout.startswith("packed"):
            return None
        lengths = self.length - torch.arange(self.samples) % self.length
        lengths = lengths.sort(descending=True).values
        return lengths if self.layout == "packed" else lengths.roll(1)


class Reader(nn.Module):
    """A Linear layer, a recurrent module and a readout: x [N, T, I], states [L * D, N, *] -> [N, 3]."""

    def __init__(self, case: Case, dropout: float = 0.0):
        super().__init__()
        self.case = case
        self.front = nn.Linear(2, 2)
        self.recurrent = case.module(dropout=dropout)
        directions = 1 + case.bidirectional
        size = directions * (2 if case.projected and case.kind == "lstm" else 3)
        rows = {"output": case.length * size, "last": case.layers * size, "cell": case.layers * directions * 3}
        for name, count in rows.items():
            self.register_buffer(name, torch.randn(count, 3))

    def forward(self, x: Tensor, states: tuple[Tensor, ...] | None = None, lengths: Tensor | None = None) -> Tensor:
        case = self.case
        x = self.front(x)
        if states is not None and case.layout == "unbatched":
            states = tuple(state.squeeze(1) for state in states)
        hx = states if states is None or case.kind == "lstm" else states[0]
        if lengths is not None:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=case.layout == "packed")
            output, last = self.recurrent(packed, hx)
            output, _ = pad_packed_sequence(output, True, total_length=case.length)
        elif case.layout == "batch first":
            output, last = self.recurrent(x, hx)
        elif case.layout == "time first":
            output, last = self.recurrent(x.transpose(0, 1), hx)
            output = output.transpose(0, 1)
        else:
            output, last = self.recurrent(x.squeeze(0), hx)
            output = output.unsqueeze(0)
        last, cell = last if case.kind == "lstm" else (last, None)
        found = 0
        for name, value in (("output", output), ("last", last), ("cell", cell)):
            if value is not None and case.read in (name, "all"):
                if name != "output":
                    value = (value.unsqueeze(1) if case.layout == "unbatched" else value).transpose(0, 1)
                found = found + value.flatten(1) @ getattr(self, name)
        return found


def inputs_of(case: Case, dtype=torch.float64) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """x [N, T, 2], and states that require gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.samples, case.length, 2, generator=generator, dtype=torch.float64).to(dtype)
    if not case.states:
        return x, None
    sizes = [2 if case.projected and case.kind == "lstm" else 3] + [3] * (case.kind == "lstm")
    count = case.layers * (1 + case.bidirectional)
    states = [torch.randn(count, case.samples, s, generator=generator, dtype=torch.float64) for s in sizes]
    return x, tuple(state.to(dtype).requires_grad_() for state in states)


def build(case: Case) -> Reader:
    torch.manual_seed(0)
    return Reader(case).double()


def one(case: Case, model: Reader, x: Tensor, states, n: int) -> Tensor:
    """[1, 3]: the stock model on sample n alone."""
    states = None if states is None else tuple(state[:, n : n + 1] for state in states)
    return model(x[n : n + 1], states, None if case.lengths is None else case.lengths[n : n + 1])


def cases(kinds=tuple(KINDS)):
    """Random cases of all options."""

    def consistent(case: Case) -> Case:
        case = case._replace(samples=1) if case.layout == "unbatched" else case
        if case.kind != "lstm":
            case = case._replace(projected=False, read="last" if case.read == "cell" else case.read)
        return case

    return st.builds(
        Case,
        kind=st.sampled_from(kinds),
        layout=st.sampled_from(LAYOUTS),
        layers=st.integers(1, 2),
        bidirectional=st.booleans(),
        bias=st.booleans(),
        projected=st.booleans(),
        states=st.booleans(),
        read=st.sampled_from(["output", "last", "cell", "all"]),
        samples=st.integers(1, 4),
        length=st.integers(1, 4),
    ).map(consistent)


def check_first_order(case: Case) -> None:
    """All first-order quantities and all ordinary gradients, also those of the initial states."""
    model, (x, states) = build(case), inputs_of(case)
    leaves = [*model.parameters(), *(states or ())]
    expected = [
        from_per_sample(rows)
        for rows in per_sample_gradients(lambda n: one(case, model, x, states, n).sin().sum(), leaves, len(x))
    ]
    with backpack(*[extension() for extension in FIRST_ORDER]):
        extend(model)(x, states, case.lengths).sin().sum().backward()
    for (name, parameter), stats in zip(model.named_parameters(), expected, strict=False):
        size = max(stats.batch_grad.abs().max().item(), 1e-3)
        assert_close(f"{name}.grad", parameter.grad, stats.grad, 1e-10, size)
        assert_close(f"{name}.grad_batch", parameter.grad_batch, stats.batch_grad, 1e-10, size)
        assert_close(f"{name}.batch_l2", parameter.batch_l2, stats.batch_l2, 1e-10, size**2)
        assert_close(f"{name}.sum_grad_squared", parameter.sum_grad_squared, stats.sum_grad_squared, 1e-10, size**2)
        assert_close(f"{name}.variance", parameter.variance, stats.variance, 1e-10, size**2)
    for state, stats in zip(states or (), expected[-len(states or ()) :], strict=False):
        assert_close("state", state.grad, stats.grad, 1e-10)


@settings(max_examples=examples(60))
@given(case=cases())
def test_first_order(case):
    check_first_order(case)


def stock_curvature(case: Case, model: Reader, x: Tensor, states, loss) -> Curvature:
    """Jacobians of the stock model, entry by entry and sample by sample."""
    parameters = dict(model.named_parameters())
    outputs = [one(case, model, x, states, n) for n in range(len(x))]
    rows = [
        torch.autograd.grad(entry, list(parameters.values()), retain_graph=True, allow_unused=True)
        for output in outputs
        for entry in output.flatten()
    ]
    jacobian = {}
    for name, column in zip(parameters, zip(*rows, strict=True), strict=True):
        column = [torch.zeros_like(parameters[name]) if entry is None else entry for entry in column]
        jacobian[name] = torch.stack(column).reshape(len(x), -1, *parameters[name].shape)
    return Curvature(jacobian, loss_hessian(loss, torch.cat(outputs)))


@settings(max_examples=examples(30))
@given(case=cases())
def test_second_order(case):
    """Exact GGN quantities, also of the layer before, whose columns come through the recurrence."""
    model, (x, states) = build(case), inputs_of(case)
    targets = torch.arange(len(x)) % 3
    expected = stock_curvature(case, model, x, states, lambda f: nn.functional.cross_entropy(f, targets))
    leaves = [*model.parameters(), *(states or ())]
    value = nn.functional.cross_entropy(model(x, states, case.lengths), targets)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    with backpack(*[extension() for extension in EXACT]):
        extend(nn.CrossEntropyLoss())(extend(model)(x, states, case.lengths), targets).backward()
    assert_exact_ggn(model, expected, 1e-8)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            assert_close("grad", leaf.grad, gradient, 1e-10)


@pytest.mark.parametrize("convention", ["backpack", "expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["batch first", "packed, unsorted"])
def test_kronecker_factors(kind, layout, convention):
    """Positions behind a sample's end do not count."""
    case = Case(kind, layout, layers=2, bidirectional=kind != "lstm")
    model, (x, _) = build(case), inputs_of(case)
    targets = torch.randn(3, 3, dtype=torch.float64)
    outputs = torch.cat([one(case, model, x, None, n) for n in range(3)]).detach()
    roots = square_root(loss_hessian(lambda f: nn.functional.mse_loss(f, targets), outputs))  # [V, N, 3]
    expected = recurrent_factors(model, lambda n: one(case, model, x, None, n), roots, convention)
    with backpack(KFLR(convention=convention)):
        extend(nn.MSELoss())(extend(model)(x, None, case.lengths), targets).backward()
    assert len(expected) == len(list(model.recurrent.parameters()))
    assert_factors(model, "kflr", expected)


@pytest.mark.parametrize("layout", ["batch first", "packed, unsorted"])
def test_empirical_factors(layout):
    """KFAC(fisher="empirical") takes the ordinary gradients' rows."""
    case = Case("gru", layout)
    model, (x, _) = build(case), inputs_of(case)
    targets = torch.randn(3, 3, dtype=torch.float64)
    outputs = torch.cat([one(case, model, x, None, n) for n in range(3)]).detach()
    roots = 2 * (outputs - targets)[None] / 9
    expected = recurrent_factors(model, lambda n: one(case, model, x, None, n), roots)
    expected = {name: [b * 9, *a] for name, (b, *a) in expected.items()}  # the mean over 9 entries enters once
    with backpack(KFAC(fisher="empirical")):
        extend(nn.MSELoss())(extend(model)(x, None, case.lengths), targets).backward()
    assert_factors(model, "kfac", expected)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_packed_sequences(kind):
    """torch packs and unpacks on no level of its function transforms."""
    case = Case(kind, "packed, unsorted", bidirectional=True)
    model, (x, _) = build(case), inputs_of(case)
    targets = torch.arange(3)
    expected = stock_curvature(case, model, x, None, lambda f: nn.functional.cross_entropy(f, targets))
    value = nn.functional.cross_entropy(model(x, None, case.lengths), targets)
    gradients = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    with backpack(HMP(), GGNMP()):
        extend(nn.CrossEntropyLoss())(extend(model)(x, None, case.lengths), targets).backward()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        v = torch.randn_like(parameter)
        (product,) = torch.autograd.grad(gradient, parameter, v, retain_graph=True)
        assert_close(f"{name}.hmp", parameter.hmp(v), product, 1e-9)
        jacobian, hessian = expected.jacobian[name], expected.hessian  # [N, C, *P], [N, C, C]
        product = torch.einsum("nc...,nck,nk->...", jacobian, hessian, jacobian.flatten(2) @ v.flatten())
        assert_close(f"{name}.ggnmp", parameter.ggnmp(v), product, 1e-9)


# ---- dropout ----


@pytest.mark.parametrize("layout", ["batch first", "time first", "packed, unsorted"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind, layout):
    """Torch's numbers from torch's seed; per-sample gradients with the same masks."""
    case = Case(kind, layout, layers=3, bidirectional=True, states=True)
    torch.manual_seed(0)
    model, (x, states) = Reader(case, dropout=0.4).double(), inputs_of(case)
    leaves = [*model.parameters(), *(states or ())]
    torch.manual_seed(5)
    expected = model(x, states, case.lengths)
    gradients = torch.autograd.grad(expected.sin().sum(), leaves)
    extend(model)
    torch.manual_seed(5)
    output = model(x, states, case.lengths)
    assert_close("output", output, expected, 1e-12)
    after = torch.rand(1)
    with backpack(BatchGrad(), BatchDiagGGNExact()):
        loss = output.sin().sum()
        with pytest.raises(RuntimeError, match="no loss"):
            loss.backward()
    torch.manual_seed(5)
    output = model(x, states, case.lengths)
    torch.rand(1)
    with backpack(BatchGrad()):
        output.sin().sum().backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert_close("grad", leaf.grad, gradient, 1e-10)
    # One sample's gradient: that of the same forward pass, of its output alone.
    for n in range(3):
        torch.manual_seed(5)
        rows = torch.autograd.grad(model(x, states, case.lengths)[n].sin().sum(), list(model.parameters()))
        for parameter, row in zip(model.parameters(), rows, strict=True):
            assert_close("grad_batch", parameter.grad_batch[n], row, 1e-9, max(row.abs().max().item(), 1e-3))
    torch.manual_seed(5)
    model(x, states, case.lengths)
    assert torch.equal(torch.rand(1), after), "the random state after a forward pass is torch's"


def test_dropout_of_one_and_in_eval_mode():
    for dropout, training in ((1.0, True), (0.5, False)):
        module = nn.LSTM(2, 3, 2, dropout=dropout, batch_first=True).double().train(training)
        x = torch.randn(4, 3, 2, dtype=torch.float64)
        rows = per_sample_gradients(
            lambda n, module=module, x=x: module(x[n : n + 1])[0].sin().sum(), list(module.parameters()), 4
        )
        with backpack(BatchGrad()):
            extend(module)(x)[0].sin().sum().backward()
        for parameter, row in zip(module.parameters(), rows, strict=True):
            assert_close("grad_batch", parameter.grad_batch, row, 1e-10, 1.0)


def test_dropout_second_order():
    """The sweep meets the same masks."""
    case = Case("gru", layers=2)
    torch.manual_seed(0)
    model, (x, _) = Reader(case, dropout=0.5).double(), inputs_of(case)
    targets = torch.randn(3, 3, dtype=torch.float64)
    torch.manual_seed(3)
    output = model(x)
    names = [name for name, _ in model.named_parameters()]
    jacobian = {name: torch.zeros(3, 3, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    for n in range(3):
        for i in range(3):
            rows = torch.autograd.grad(output[n, i], list(model.parameters()), retain_graph=True)
            for name, row in zip(names, rows, strict=True):
                jacobian[name][n, i] = row
    expected = Curvature(jacobian, loss_hessian(lambda f: nn.functional.mse_loss(f, targets), output.detach()))
    extend(model)
    torch.manual_seed(3)
    with backpack(*[extension() for extension in EXACT]):
        extend(nn.MSELoss())(model(x), targets).backward()
    assert_exact_ggn(model, expected)


# ---- further uses ----


def test_called_twice_and_two_modules_in_a_row():
    """One module for two inputs, the second starting from the first's states; and another one behind it."""
    for quantities in ((BatchGrad, BatchL2Grad, Variance), (BatchDiagGGNExact, DiagGGNExact)):
        torch.manual_seed(0)
        first, second = nn.LSTM(2, 3).double(), nn.GRU(3, 2, bidirectional=True).double()
        extend(nn.ModuleList([first, second]))
        x, y = (torch.randn(t, 4, 2, dtype=torch.float64) for t in (3, 5))
        parameters = [*first.parameters(), *second.parameters()]

        def predict(x, y, first=first, second=second):
            _, states = first(x)
            output, (_, c) = first(y, states)
            return second(torch.cat([output, output.sin()]))[0].sum(0) + c[0].sum(1, keepdim=True)  # [N, 4]

        with disable():
            rows = [
                [
                    torch.autograd.grad(entry, parameters, retain_graph=True)
                    for entry in predict(x[:, n : n + 1], y[:, n : n + 1])[0]
                ]
                for n in range(4)
            ]
        prediction = predict(x, y)
        with backpack(*[quantity() for quantity in quantities]):
            extend(nn.MSELoss(reduction="sum"))(prediction, torch.zeros_like(prediction)).backward()
        for i, parameter in enumerate(parameters):
            jacobian = torch.stack([torch.stack([row[i] for row in sample]) for sample in rows])  # [N, 4, *P]
            if BatchGrad in quantities:
                expected = torch.einsum("nc,nc...->n...", 2 * prediction.detach(), jacobian)
                assert_close("grad", parameter.grad, expected.sum(0), 1e-10)
                assert_close("grad_batch", parameter.grad_batch, expected, 1e-10)
                assert_close("batch_l2", parameter.batch_l2, expected.flatten(1).square().sum(1), 1e-10)
                assert_close("variance", parameter.variance, expected.var(0, correction=0), 1e-10)
            else:
                expected = 2 * jacobian.square().sum(1)
                assert_close("diag", parameter.diag_ggn_exact, expected.sum(0), 1e-9)
                assert_close("batch", parameter.diag_ggn_exact_batch, expected, 1e-9)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_results_are_differentiable(kind):
    case = Case(kind, "packed, unsorted", layers=2, states=True)
    model, (x, states) = build(case), inputs_of(case)
    rows = []
    for n in range(3):
        rows.append(
            torch.autograd.grad(one(case, model, x, states, n).sin().sum(), list(model.parameters()), create_graph=True)
        )
    total = sum((row[i] ** 3).sum() for row in rows for i in range(len(row)))
    expected = torch.autograd.grad(total, [*model.parameters(), *states])
    with backpack(BatchGrad()):
        extend(model)(x, states, case.lengths).sin().sum().backward(create_graph=True)
    total = sum((parameter.grad_batch**3).sum() for parameter in model.parameters())
    actual = torch.autograd.grad(total, [*model.parameters(), *states])
    for mine, reference in zip(actual, expected, strict=True):
        assert_close(kind, mine, reference, 1e-9)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_diagonal_is_differentiable():
    """The pull-back to the layer before, column by column with a graph."""
    case = Case("lstm", bidirectional=True)
    model, (x, _) = build(case), inputs_of(case)
    targets = torch.zeros(3, 3, dtype=torch.float64)
    jacobian = [
        torch.autograd.grad(entry, list(model.parameters()), create_graph=True)
        for n in range(3)
        for entry in one(case, model, x, None, n)[0]
    ]
    diagonals = [sum(2 / 9 * row[i] ** 2 for row in jacobian) for i in range(len(jacobian[0]))]
    expected = torch.autograd.grad(sum((d**2).sum() for d in diagonals), list(model.parameters()))
    with backpack(DiagGGNExact()):
        extend(nn.MSELoss())(extend(model)(x), targets).backward(create_graph=True)
    total = sum((p.diag_ggn_exact**2).sum() for p in model.parameters())
    for mine, reference in zip(torch.autograd.grad(total, list(model.parameters())), expected, strict=True):
        assert_close("diagonal", mine, reference, 1e-8)


def test_subsampling():
    case = Case("gru", "packed, unsorted", layers=2)
    model, (x, _) = build(case), inputs_of(case)
    rows = per_sample_gradients(lambda n: one(case, model, x, None, n).sum(), list(model.parameters()), 3)
    with backpack(BatchGrad(subsampling=[2, 0, 2])):
        extend(model)(x, None, case.lengths).sum().backward()
    for parameter, row in zip(model.parameters(), rows, strict=True):
        assert_close("grad_batch", parameter.grad_batch, row[[2, 0, 2]], 1e-10, 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_sampled_columns_agree_with_exact_ones(kind, layout):
    """With many draws, roughly; and exactly when the draws are the columns of one class."""
    case = Case(kind, layout, samples=1 if layout == "unbatched" else 3)
    model, (x, _) = build(case), inputs_of(case)
    targets = torch.zeros(case.samples, 3, dtype=torch.float64)
    with backpack(DiagGGNExact(), DiagGGNMC(2000), BatchDiagGGNMC(2000), KFAC()):
        extend(nn.MSELoss())(extend(model)(x, None, case.lengths), targets).backward()
    for parameter in model.parameters():
        assert_close("mc", parameter.diag_ggn_mc, parameter.diag_ggn_exact, 0.2)
        assert_close("batch", parameter.diag_ggn_mc_batch.sum(0), parameter.diag_ggn_mc, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_types(kind, dtype):
    """Results in the parameters' type, statistics in float32."""
    case = Case(kind, layers=2, bidirectional=True, states=kind != "gru", samples=4)
    model, (x, states) = build(case), inputs_of(case)
    rows = per_sample_gradients(lambda n: one(case, model, x, states, n).sum(), list(model.parameters()), 4)
    x, states = inputs_of(case, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    targets = torch.zeros(4, 3, dtype=dtype)
    value = extend(nn.MSELoss())(extend(model.to(dtype))(x, states), targets)
    with backpack(BatchGrad(), DiagGGNExact(), KFLR()):
        value.backward()
    assert all(p.grad_batch.dtype == dtype and p.diag_ggn_exact.dtype == torch.float32 for p in model.parameters())
    with backpack(BatchGrad(), BatchL2Grad()):
        model(x, states).sum().backward()
    for parameter, row in zip(model.parameters(), rows, strict=True):
        assert parameter.grad_batch.dtype == dtype and parameter.batch_l2.dtype == torch.float32
        assert_close("grad_batch", parameter.grad_batch, row, tolerance, max(row.abs().max().item(), 0.1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["batch first", "packed"])
def test_autocast(kind, layout):
    case = Case(kind, layout, layers=2)
    model, (x, _) = build(case), inputs_of(case)
    rows = per_sample_gradients(lambda n: one(case, model, x, None, n).sum(), list(model.parameters()), 3)
    extend(model.float())
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(x.float(), None, case.lengths)
        value = extend(nn.MSELoss())(prediction, torch.zeros_like(prediction))
    with backpack(DiagGGNExact(), KFLR()):
        value.backward(retain_graph=True)
    model.zero_grad()
    with backpack(BatchGrad()):
        prediction.sum().backward()
    for parameter, row in zip(model.recurrent.parameters(), list(rows)[2:], strict=True):
        assert parameter.grad_batch.dtype == torch.float32
        assert_close("grad_batch", parameter.grad_batch, row, 0.1, max(row.abs().max().item(), 0.1))
        assert_close("grad", parameter.grad, parameter.grad_batch.sum(0).double(), 1e-5)


# ---- life ----


def test_plain_passes_are_torchs():
    """Without quantities the numbers are torch's to the bit, of outputs and gradients."""
    for kind in KINDS:
        case = Case(kind, layers=2, bidirectional=True)
        model, (x, _) = build(case), inputs_of(case)
        expected = model(x)
        gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
        output = extend(model)(x)
        assert torch.equal(output, expected)
        for mine, reference in zip(torch.autograd.grad(output.sum(), list(model.parameters())), gradients, strict=True):
            assert torch.equal(mine, reference)


def test_plain_second_derivatives_are_torchs():
    module = nn.GRU(2, 3).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def penalty():
        (grad,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(module.parameters()))

    expected = penalty()
    extend(module)
    for mine, reference in zip(penalty(), expected, strict=True):
        assert_close("penalty", mine, reference, 1e-12)


def test_frozen_parameters_and_inputs():
    """Only what requires gradients gets results; a frozen module still passes columns on."""
    case = Case("lstm", layers=2, states=True)
    for trained in (["recurrent.weight_hh_l0", "recurrent.bias_ih_l1"], ["front.weight"], ["recurrent.bias_hh_l1"]):
        model, (x, states) = build(case), inputs_of(case)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        states = tuple(state.detach() for state in states)
        parameters = [p for p in model.parameters() if p.requires_grad]
        outputs = [one(case, model, x, states, n) for n in range(3)]
        entries = [entry for output in outputs for entry in output[0]]
        jacobian = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in entries]
        rows = per_sample_gradients(lambda n, outputs=outputs: outputs[n].sum(), parameters, 3)
        with backpack(BatchGrad()):
            extend(model)(x, states).sum().backward()
        for parameter, row in zip(parameters, rows, strict=True):
            assert_close("grad_batch", parameter.grad_batch, row, 1e-10)
            assert_close("grad", parameter.grad, row.sum(0), 1e-10)
        with backpack(DiagGGNExact()):
            prediction = model(x, states)
            extend(nn.MSELoss(reduction="sum"))(prediction, torch.zeros_like(prediction)).backward()
        for i, parameter in enumerate(parameters):
            assert_close("diag", parameter.diag_ggn_exact, 2 * sum(row[i] ** 2 for row in jacobian), 1e-9)
        assert all(not hasattr(p, "grad_batch") for p in model.parameters() if not p.requires_grad)


def test_gradients_of_some_inputs_only():
    module = extend(nn.LSTM(2, 3).double())
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    with disable():
        expected = torch.autograd.grad(module(x)[0].sum(), [x, module.weight_hh_l0])
    with backpack(BatchGrad()):
        actual = torch.autograd.grad(module(x)[0].sum(), [x, module.weight_hh_l0])
        module(x)[0].sum().backward(inputs=[module.bias_ih_l0])
    for mine, reference in zip(actual, expected, strict=True):
        assert_close("grad", mine, reference, 1e-12)
    assert_close("bias", module.bias_ih_l0.grad_batch.sum(0), module.bias_ih_l0.grad, 1e-12)
    assert module.weight_ih_l0.grad is None and x.grad is None


def test_both_orders_in_one_pass_and_several_passes():
    case = Case("lstm", layers=2)
    model, (x, _) = build(case), inputs_of(case)
    targets = torch.zeros(3, 3, dtype=torch.float64)
    value = extend(nn.MSELoss())(extend(model)(x), targets)
    first = {}
    for _ in range(2):
        with backpack(BatchGrad(), Variance(), DiagGGNExact(), SqrtGGNExact(), KFLR()):
            value.backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            results = (parameter.grad_batch, parameter.diag_ggn_exact, parameter.kflr[0])
            for mine, reference in zip(results, first.setdefault(name, results), strict=True):
                assert_close(name, mine, reference, 1e-12)
    value.backward()
    for parameter in model.parameters():
        assert_close("grad", parameter.grad, 3 * parameter.grad_batch.sum(0), 1e-10)


def test_outputs_may_be_changed_in_place():
    """As torch allows after its layers, where these keep nothing of their output."""
    module, x = nn.GRU(2, 3).double(), torch.randn(4, 2, 2, dtype=torch.float64)
    rows = per_sample_gradients(lambda n: (2 * module(x[:, n : n + 1])[0]).sin().sum(), list(module.parameters()), 2)
    output, _ = extend(module)(x)
    output.mul_(2)
    with backpack(BatchGrad()):
        output.sin().sum().backward()
    for parameter, row in zip(module.parameters(), rows, strict=True):
        assert_close("grad_batch", parameter.grad_batch, row, 1e-10)


def test_changed_weights_are_noticed():
    module, x = extend(nn.GRU(2, 3)), torch.randn(4, 2, 2)
    output, _ = module(x)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with backpack(BatchGrad()), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_copies_and_pickles():
    module, x = extend(nn.LSTM(2, 3, 2, batch_first=True)), torch.randn(3, 4, 2)
    results = []
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with backpack(BatchGrad()):
            each(x)[0].sum().backward()
        results.append([p.grad_batch for p in each.parameters()])
    for other in results[1:]:
        assert all(torch.equal(mine, reference) for mine, reference in zip(other, results[0], strict=True))


def test_nothing_stays_alive():
    model = extend(Reader(Case("lstm", layers=2, bidirectional=True)))
    loss = extend(nn.MSELoss())

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(3):
        with backpack(BatchL2Grad(), DiagGGNExact(), KFLR()):
            x = torch.randn(3, 4, 2)
            output = model(x)
            loss(output, torch.zeros_like(output)).backward()
        reference = weakref.ref(x)
        del x, output
        assert reference() is None
        counts.append(live())
    assert counts[1] == counts[2]


def test_hook_sees_all_results_once():
    model, seen = extend(Reader(Case("gru", layers=2))), []

    def hook(module):
        if isinstance(module, nn.GRU):
            seen.append([hasattr(p, "grad_batch") for p in module.parameters()])
            assert module.input0.shape == (3, 4, 2)

    with backpack(BatchGrad(), extension_hook=hook):
        model(torch.randn(3, 4, 2)).sum().backward()
    assert seen == [[True] * 8]


def test_empty_batch():
    module = extend(nn.LSTM(2, 3, batch_first=True))
    with backpack(BatchGrad(), BatchL2Grad()):
        module(torch.randn(0, 4, 2))[0].sum().backward()
    assert module.weight_ih_l0.grad_batch.shape == (0, 12, 2)
    assert module.weight_ih_l0.batch_l2.shape == (0,)


def test_parametrised_and_tied_weights_take_the_general_way():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrised, tied = nn.GRU(3, 3, 2).double(), nn.GRU(3, 3, 2).double()
    parametrize.register_parametrization(parametrised, "weight_hh_l0", Double())
    tied.weight_hh_l1 = tied.weight_hh_l0
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for module in (parametrised, tied):
        parameters = list(module.parameters())
        rows = per_sample_gradients(lambda n, m=module: m(x[:, n : n + 1])[0].sin().sum(), parameters, 2)
        with backpack(BatchGrad()):
            extend(module)(x)[0].sin().sum().backward()
        for parameter, row in zip(parameters, rows, strict=True):
            assert_close("grad_batch", parameter.grad_batch, row, 1e-10)


def test_a_weight_that_acts_outside_of_its_module():
    """A part of its curvature would be missing: refused, unless it is frozen."""
    module, loss = extend(nn.GRU(2, 3, batch_first=True)), extend(nn.MSELoss())
    head, x, targets = extend(nn.Linear(3, 1)), torch.randn(2, 4, 2), torch.zeros(2, 1)
    prediction = head(module(x)[0][:, -1] * module.weight_hh_l0.sum())
    with backpack(DiagGGNExact()), pytest.raises(NotImplementedError, match="GRU.weight_hh_l0 .*outside of its module"):
        loss(prediction, targets).backward()
    module.weight_hh_l0.requires_grad_(False)
    prediction = head(module(x)[0][:, -1] * module.weight_hh_l0.sum())
    with backpack(DiagGGNExact()):
        loss(prediction, targets).backward()
    assert hasattr(module.weight_ih_l0, "diag_ggn_exact")


@pytest.mark.parametrize("read", ["output", "last"])
@pytest.mark.parametrize("layout", ["batch first", "time first", "packed, unsorted"])
def test_samples_that_are_mixed_behind_the_first_layer(layout, read):
    """Also where that is recurrent: refused, unless the samples have only another order there."""
    case = Case("gru", layout, read=read)
    model, (x, _), loss = extend(build(case)), inputs_of(case), extend(nn.MSELoss(reduction="sum"))
    model.front = nn.Identity()
    weight, targets = model.recurrent.weight_hh_l0, torch.zeros(3, 3, dtype=torch.float64)
    for mix in (lambda p: p - p.mean(0), lambda p: p + p.roll(1, 0)):
        for extension in (DiagGGNExact, KFRA):
            with pytest.raises(ValueError, match="samples that are not apart"), backpack(extension()):
                loss(mix(model(x, None, case.lengths)), targets).backward()
    with backpack(DiagGGNExact()):
        loss(model(x, None, case.lengths), targets).backward()
        expected = weight.diag_ggn_exact
        order = torch.tensor([2, 0, 1])
        lengths = None if case.lengths is None else case.lengths[order]
        loss(model(x[order], None, lengths)[order.argsort()], targets).backward()
    assert_close("diag", weight.diag_ggn_exact, expected, 1e-10)


def test_errors_are_torchs():
    for module in (nn.LSTM(2, 3, 2, dropout=0.5), nn.LSTM(2, 3), nn.GRU(2, 3, 2, dropout=0.5)):
        calls = ((torch.randn(4, 2, 5),), (torch.randn(4),))
        for call in calls:
            with pytest.raises((RuntimeError, ValueError)) as expected:
                module(*call)
            with pytest.raises(type(expected.value)) as actual:
                extend(copy.deepcopy(module))(*call)
            assert str(actual.value) == str(expected.value)


def test_no_hessian_diagonal():
    model, x = extend(nn.Sequential(nn.GRU(2, 3, batch_first=True))), torch.randn(2, 3, 2)
    prediction = model(x)[0].sum(1)
    with backpack(DiagHessian()), pytest.raises(NotImplementedError, match="no Hessian diagonal"):
        extend(nn.MSELoss())(prediction, torch.zeros_like(prediction)).backward()


@pytest.mark.parametrize("frozen", [True, False])
def test_hessian_diagonal_before_a_module_without_results(frozen):
    """It contains the curvature of the functions inside of a recurrent module that is frozen or not asked for."""
    model, (x, _) = build(Case("tanh")), inputs_of(Case("tanh"))
    model.recurrent.requires_grad_(not frozen)
    targets, parameters = torch.randn(3, 3, dtype=torch.float64), list(model.front.parameters())
    gradients = torch.autograd.grad(nn.functional.mse_loss(model(x), targets), parameters, create_graph=True)
    with backpack(DiagHessian(), BatchDiagHessian(), DiagGGNExact()):
        extend(nn.MSELoss())(extend(model)(x), targets).backward(inputs=parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        rows = [torch.autograd.grad(entry, parameter, retain_graph=True)[0].flatten() for entry in gradient.flatten()]
        expected = torch.stack(rows).diagonal().view_as(parameter)
        assert_close("grad", parameter.grad, gradient.detach(), 1e-10)
        assert_close("diag_h", parameter.diag_h, expected, 1e-9)
        assert_close("diag_h_batch", parameter.diag_h_batch.sum(0), expected, 1e-9)


# ---- BackPACK ----


def step(library: str, module: nn.RNNBase, x: Tensor, names: list[str]) -> dict[str, nn.Parameter]:
    """One step of the same program under either library."""
    reduce_tuple = importlib.import_module("backpack.custom_module.reduce_tuple").ReduceTuple(0)
    extensions = importlib.import_module(f"{library}.extensions")
    library = importlib.import_module(library)
    torch.manual_seed(2)
    tail = nn.Linear(20, 3)
    model = library.extend(nn.Sequential(copy.deepcopy(module), reduce_tuple, nn.Flatten(), tail))
    loss = library.extend(nn.CrossEntropyLoss())
    with library.backpack(*[getattr(extensions, name)() for name in names]):
        loss(model(x), torch.arange(len(x)) % 3).backward()
    return dict(model.named_parameters())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_same_as_backpack(kind):
    """Where BackPACK is right: one layer, batch_first, no initial state, the output alone."""
    pytest.importorskip("backpack", reason="BackPACK is not installed")
    module, x = getattr(nn, kind)(3, 4, batch_first=True), torch.randn(6, 5, 3)
    names = ["BatchGrad", "DiagGGNExact", "BatchDiagGGNExact"]
    theirs, ours = step("backpack", module, x, names), step("backpack_cuda", module, x, names)
    for name, reference in theirs.items():
        for field in ("grad", "grad_batch", "diag_ggn_exact", "diag_ggn_exact_batch"):
            expected = getattr(reference, field)
            assert_close(f"{name}.{field}", getattr(ours[name], field), expected.double(), 2e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_right_where_backpack_is_wrong():
    """With an initial state, whose part its rule of the LSTM leaves out."""
    original = pytest.importorskip("backpack", reason="BackPACK is not installed")
    extensions = pytest.importorskip("backpack.extensions")
    module = nn.LSTM(3, 4, batch_first=True)
    x, states = torch.randn(2, 5, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    theirs, ours = original.extend(copy.deepcopy(module)), extend(copy.deepcopy(module))
    module.double()

    def alone(n):
        hx = tuple(state[:, n : n + 1].double() for state in states)
        return module(x[n : n + 1].double(), hx)[0].sin().sum()

    rows = per_sample_gradients(alone, list(module.parameters()), 2)
    with original.backpack(extensions.BatchGrad()):
        theirs(x, states)[0].sin().sum().backward()
    with backpack(BatchGrad()):
        ours(x, states)[0].sin().sum().backward()
    wrong = max((p.grad_batch - row).abs().max() for p, row in zip(theirs.parameters(), rows, strict=True))
    assert wrong > 0.01
    for parameter, row in zip(ours.parameters(), rows, strict=True):
        assert_close("grad_batch", parameter.grad_batch, row, 1e-5)


def test_packed_output_stays_packed():
    packed = pack_padded_sequence(torch.randn(3, 4, 2), torch.tensor([2, 4, 1]), True, enforce_sorted=False)
    for module in (nn.GRU(2, 3), nn.GRU(2, 3, 2, dropout=0.5)):
        stock, _ = copy.deepcopy(module)(packed)
        output, _ = extend(module)(packed)
        assert isinstance(output, PackedSequence)
        for mine, reference in zip(output[1:], stock[1:], strict=True):
            assert torch.equal(mine, reference)

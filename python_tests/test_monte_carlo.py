"""Sampled curvature: unbiased, reproducible, and the exact one in the limit."""

import pytest
import torch
from curvature_oracle import curvature
from curvature_tools import BODIES, LOSSES, MONTE_CARLO, assert_same, backward, saved, targets_for
from helpers import assert_close, named
from model_cases import MODELS
from random_models import random_case
from torch import nn

from backpack_cuda.extensions import KFAC, BatchDiagGGNMC, DiagGGNExact, DiagGGNMC, SqrtGGNMC

PLAIN = MODELS["mlp"]


@named("build, shape", BODIES)
@named("loss, kind", LOSSES)
def test_unbiased(loss, kind, build, shape, device):
    """The squares of M sampled columns have the exact diagonal as their mean: within 5 standard errors."""
    mc_samples = 2000
    model, inputs = build().double(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        targets = targets_for(kind, model(inputs))
    expected = curvature(model, lambda outputs: loss(outputs, targets), inputs)
    loss, inputs, targets = loss.to(device), inputs.to(device), targets.to(device)
    backward(model.to(device), loss, inputs, targets, SqrtGGNMC(mc_samples))
    for name, parameter in model.named_parameters():
        squares = mc_samples * parameter.sqrt_ggn_mc.cpu().square()  # [M, N, *P]
        exact = expected.batch_diag(name)
        error = (squares.mean(0) - exact).abs()
        bound = 5 * squares.std(0) / mc_samples**0.5 + 1e-12
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} times the bound"
        assert (parameter.sqrt_ggn_mc.cpu().mean(0).abs() <= bound.sqrt() + 1e-6).all(), "the columns' mean is zero"


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()], ids=repr)
def test_the_samples_are_gradients_at_drawn_targets(loss, device):
    """Softmax and Bernoulli: every column is (p - onehot) / sqrt(M) of some class, scaled; a bias shows it as it is."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(inputs)
    targets = torch.randint(3, (6,)) if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(6, 3, dtype=torch.float64)
    backward(model.to(device), loss, inputs.to(device), targets.to(device), SqrtGGNMC(50))
    divided_by = len(inputs) if isinstance(loss, nn.CrossEntropyLoss) else outputs.numel()
    drawn = model[0].bias.sqrt_ggn_mc.cpu() * (50 * divided_by) ** 0.5  # [M, N, 3]
    if isinstance(loss, nn.CrossEntropyLoss):
        onehot = outputs.softmax(1) - drawn
        assert torch.allclose(onehot.sort(2).values, torch.tensor([0.0, 0.0, 1.0]).double())
    elif isinstance(loss, nn.BCEWithLogitsLoss):
        bits = outputs.sigmoid() - drawn
        assert torch.allclose(bits, bits.round(), atol=1e-9)
    else:  # 2 (f - y) with y ~ Normal(f, 1/2): variance 2
        assert abs(drawn.std().item() - 2**0.5) < 0.1


@named("make", MONTE_CARLO | {"kfac": KFAC})
def test_reproducible_by_seed(make, device):
    """torch.manual_seed decides; without it every pass draws anew."""
    inputs, targets = (t.to(device) for t in PLAIN.data())

    model, results = PLAIN.prepared().to(device), []
    for seed in (0, 0, 1, None, None):
        if seed is not None:
            torch.manual_seed(seed)
        backward(model, PLAIN.loss, inputs, targets, make(mc_samples=4))
        results.append(saved(model))
    assert_same(results[0], results[1])
    for first, second in ((1, 2), (2, 3), (3, 4)):
        with pytest.raises(AssertionError, match="error"):
            assert_same(results[first], results[second], 1e-3)


def test_exact_quantities_draw_nothing(device):
    """A model without random numbers leaves torch's generator as it was."""
    inputs, targets = (t.to(device) for t in PLAIN.data())
    model = PLAIN.prepared().to(device)
    before = torch.get_rng_state()
    backward(model, PLAIN.loss, inputs, targets, DiagGGNExact())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(20))
def test_approaches_the_exact_diagonal(seed, device):
    """Random architectures: with M samples the error of the whole diagonal is some 1/sqrt(M) of its size."""
    case = random_case(seed)
    expected = curvature(case.model, case.loss_of, case.inputs)
    model, mc_samples = case.model.to(device), 400
    extensions = DiagGGNMC(mc_samples), BatchDiagGGNMC(mc_samples)
    backward(model, case.loss.to(device), case.inputs.to(device), case.targets.to(device), *extensions)
    exact = {name: expected.batch_diag(name) for name in expected.jacobian}
    parameters = dict(model.named_parameters())
    rows = torch.cat([parameters[n].diag_ggn_mc_batch.cpu().flatten(1) for n in exact], 1)
    reference = torch.cat([exact[n].flatten(1) for n in exact], 1)
    assert_close("rows", rows, reference, 0.6, reference.abs().max().item())
    sums = torch.cat([parameters[n].diag_ggn_mc.cpu().flatten() for n in exact])
    assert_close("sums", sums, rows.sum(0), 1e-9, reference.abs().max().item())
    assert (sums - reference.sum(0)).norm() <= 0.4 * reference.sum(0).norm() + 1e-15


def test_quantities_of_as_many_samples_share_the_draws(device):
    """Equal numbers of samples: one sweep, so that the square root's columns are those of the diagonal."""
    inputs, targets = (t.to(device) for t in PLAIN.data())
    model = PLAIN.prepared().to(device)
    backward(model, PLAIN.loss, inputs, targets, DiagGGNMC(3), BatchDiagGGNMC(3), SqrtGGNMC(3), KFAC(3))
    for parameter in model.parameters():
        squares = parameter.sqrt_ggn_mc.square()
        assert_close("batch", parameter.diag_ggn_mc_batch, squares.sum(0).cpu(), 1e-12)
        assert_close("diag", parameter.diag_ggn_mc, squares.sum((0, 1)).cpu(), 1e-12)
        if parameter.dim() == 1:
            block = torch.einsum("vnp,vnq->pq", parameter.sqrt_ggn_mc, parameter.sqrt_ggn_mc)
            assert_close("kfac", parameter.kfac[0], block.cpu(), 1e-12)


def test_different_numbers_of_samples_together(device):
    inputs, targets = (t.to(device) for t in PLAIN.data())
    model = PLAIN.prepared().to(device)
    backward(model, PLAIN.loss, inputs, targets, DiagGGNMC(1), SqrtGGNMC(4), KFAC(2), DiagGGNExact())
    for parameter in model.parameters():
        assert parameter.sqrt_ggn_mc.shape[0] == 4
        assert not torch.allclose(parameter.diag_ggn_mc, parameter.diag_ggn_exact)

"""The demo finds wrong labels, its formulas are right, and the benchmark runs."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import subprocess_environment
from torch import Tensor, nn

import backpack_cuda as bp
from backpack_cuda import backpack, extend
from backpack_cuda.extensions import BatchGrad, BatchL2Grad, Variance

ROOT = Path(__file__).resolve().parent.parent


def example(name: str):
    """examples/<name>.py as a module."""
    for needed in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(needed)
    path = ROOT / f"examples/{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    return example("find_mislabelled_digits")


@pytest.fixture(scope="module")
def kfac_training():
    return example("kfac_training")


@pytest.fixture(scope="module")
def laplace_digits():
    return example("laplace_digits")


def is_picture(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_demo_finds_wrong_labels(demo, tmp_path, device):
    """A short run on a third of the data: many times better than chance, and a picture."""
    settings = demo.Settings(
        epochs=4, train_samples=500, timing_rounds=2, device=device.type, out=str(tmp_path / "report.png")
    )
    report = demo.run(settings)
    chance = report.flipped.float().mean().item()
    assert chance == pytest.approx(0.05, abs=0.01)
    assert report.precision[10] > 4 * chance
    assert report.test_accuracy > 0.5
    assert report.suspicion.shape == (500,) and (report.suspicion > 0).all()
    assert len(report.noise_scale) == 4 and min(report.milliseconds) > 0
    assert is_picture(tmp_path / "report.png")


def test_demo_labels(demo):
    """Wrong labels are wrong, the fraction is what was asked for, and nothing depends on the global seed."""
    digits = demo.load_data(demo.Settings(device="cpu"))
    assert digits.flipped.sum() == round(0.05 * 1437)
    assert set(digits.labels.tolist()) == set(range(10))
    torch.manual_seed(5)
    assert torch.equal(demo.load_data(demo.Settings(device="cpu")).labels, digits.labels)


def test_demo_formulas(demo):
    """Norms and noise scale from explicit per-sample gradients of the samples' own losses."""
    model = nn.Sequential(bp.Linear(4, 5), nn.Tanh(), bp.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    parameters = list(model.parameters())
    rows = []
    for n in range(6):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    rows = torch.stack(rows)
    with backpack(BatchL2Grad(), Variance()):
        nn.functional.cross_entropy(model(x), y).backward()
    assert torch.allclose(demo.per_sample_norms(model, 6), rows.norm(dim=1))
    trace = rows.var(0, correction=1).sum()
    expected = trace.item(), (rows.mean(0).square().sum() - trace / 6).item()
    assert demo.noise_estimates(model, 6) == pytest.approx(expected)


def test_demo_refuses_bad_settings(demo):
    with pytest.raises(ValueError, match="batch"):
        demo.Settings(batch_size=1)
    with pytest.raises(ValueError, match="train_samples"):
        demo.Settings(train_samples=5000)


def test_kfac_needs_fewer_steps(kfac_training, tmp_path, device):
    """On half of the data: a training loss that SGD and Adam reach later or not at all, and a good network."""
    settings = kfac_training.Settings(
        epochs=6, train_samples=700, target_loss=0.1, device=device.type, out=str(tmp_path / "kfac.png")
    )
    curves = kfac_training.run(settings)
    steps, _ = curves["KFAC"].reached(0.1)
    for name in ("SGD", "Adam"):
        reached = curves[name].reached(0.1)
        assert reached is None or reached[0] > steps, (name, reached, steps)
    assert curves["KFAC"].accuracy[-1] > 0.9
    assert is_picture(tmp_path / "kfac.png")


def test_kfac_preconditioner(kfac_training):
    """Against the inverse of the dense Kronecker product; the second time with averaged factors."""
    model = nn.Sequential(bp.Conv2d(2, 3, 2), nn.Flatten(), bp.Linear(12, 2)).double()
    preconditioner = kfac_training.Preconditioner(model, damping=0.01, largest_change=1e9)
    averages = {}
    for _ in range(2):
        for p in model.parameters():
            sides = (p.shape[0], p[0].numel()) if p.dim() > 1 else (len(p),)
            roots = [torch.randn(side, side + 1, dtype=torch.float64) for side in sides]
            p.kfac, p.grad = [root @ root.T for root in roots], torch.randn_like(p)
            old = averages.get(p, p.kfac)
            averages[p] = [0.95 * before + 0.05 * now for before, now in zip(old, p.kfac, strict=True)]
        preconditioner.renew()
    gradients = [p.grad.clone() for p in model.parameters()]
    preconditioner.precondition(learning_rate=0.1)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        damped = [factor + 0.01 * torch.eye(len(factor)) for factor in averages[p]]
        if len(damped) == 2:
            b, a = averages[p]
            pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()  # Martens and Grosse
            damped = [b + 0.1 / pi * torch.eye(len(b)), a + 0.1 * pi * torch.eye(len(a))]
            damped = [torch.kron(*damped)]
        expected = torch.linalg.solve(damped[0], gradient.flatten())
        torch.testing.assert_close(p.grad.flatten(), expected)


def test_laplace_doubts_turned_digits(laplace_digits, tmp_path, device):
    """Its entropy grows more than that of the plain network, the digits as they are stay recognised."""
    settings = laplace_digits.Settings(device=device.type, out=str(tmp_path / "laplace.png"))
    report = laplace_digits.run(settings)
    upright, turned = 0, slice(2, 5)  # 30 to 60 degrees
    plain, laplace = report.map, report.laplace
    growth = [quality.entropy[turned].mean() - quality.entropy[upright] for quality in (plain, laplace)]
    assert growth[1] > 1.1 * growth[0]
    assert plain.accuracy[upright] > 0.95 and laplace.accuracy[upright] > plain.accuracy[upright] - 0.01
    assert laplace.negative_log_likelihood[turned].mean() < 0.8 * plain.negative_log_likelihood[turned].mean()
    assert is_picture(tmp_path / "laplace.png")


def test_laplace_formulas(laplace_digits):
    """Evidence and variance of the logits against the dense precision of the last layer's weight."""
    digits = laplace_digits.load_data(laplace_digits.Settings(device="cpu"))
    images, labels = digits.images[:40].double(), digits.labels[:40]
    model = laplace_digits.digit_cnn().double()
    posterior = laplace_digits.LastLayerLaplace(model, images, labels)
    weight = model[-1].weight
    precision = torch.kron(*weight.kflr) + posterior.prior_precision * torch.eye(weight.numel())
    delta, size = posterior.prior_precision, weight.numel()
    expected = 0.5 * (size * delta.log() - delta * weight.square().sum() - precision.logdet())
    expected = expected - nn.functional.cross_entropy(model(images), labels, reduction="sum")
    torch.testing.assert_close(posterior.log_evidence(delta), expected.detach())

    features = model[:-1](images)
    jacobian = torch.stack([torch.kron(row, features) for row in torch.eye(10, dtype=torch.float64)])  # [C, M, C * D]
    variance = (jacobian @ precision.inverse() * jacobian).sum(-1).T
    smoothed = model(images) / (1 + torch.pi / 8 * variance).sqrt()
    torch.testing.assert_close(posterior.predict(images)[1], smoothed.softmax(1).detach())


# Tutorial -> arguments of a short run.
TUTORIALS = {
    "every_quantity": {},
    "optimisers": {"epochs": 1},
    "several_backward_passes": {},
    "gradient_of_variance": {"steps": 12},
    "digits_as_sequences": {"epochs": 1},
}


def numbers(result, path: str = "") -> dict[str, Tensor]:
    """All numbers of a nested result, by their path in it."""
    if isinstance(result, dict | list | tuple):
        items = result.items() if isinstance(result, dict) else enumerate(result)
        return {name: number for key, value in items for name, number in numbers(value, f"{path}/{key}").items()}
    return {} if callable(result) else {path: torch.as_tensor(result, dtype=torch.float64)}


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_gives_backpacks_numbers(name):
    """The same program with the import changed."""
    pytest.importorskip("backpack", reason="BackPACK is not installed")
    source = (ROOT / f"examples/{name}.py").read_text()
    found = []
    for library in ("backpack_cuda", "backpack"):
        program = {"__name__": name}
        exec(compile(source.replace("backpack_cuda", library), name, "exec"), program)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # BackPACK's hooks
            found.append(numbers(program["run"](**TUTORIALS[name])))
    ours, theirs = found
    assert len(ours) > 1 and ours.keys() == theirs.keys()
    for path, number in ours.items():
        assert number.shape == theirs[path].shape
        if not any(drawn in path for drawn in ("_mc", "/kfac/")):
            torch.testing.assert_close(number, theirs[path], rtol=2e-3, atol=2e-3)


def test_every_quantity():
    """The roads to the same number lead there; KFLR's is an approximation."""
    _, roads = example("every_quantity").run()
    for title, values in roads.items():
        assert values == pytest.approx([values[0]] * len(values), rel=0.02 if "Gauss" in title else 1e-4), title


def test_optimisers_learn():
    """Each of them, within three epochs."""
    results = example("optimisers").run()
    for name, (losses, accuracy) in results.items():
        assert losses[-1] < 0.5 * losses[0] and accuracy > 0.85, name


def test_variance_adapted_factor():
    """The estimated variance of the mini-batch gradient is that of all batches drawn with replacement."""
    optimisers = example("optimisers")
    torch.manual_seed(0)
    model = extend(nn.Linear(3, 1).double())
    x, start = torch.randn(8, 3, dtype=torch.float64), model.weight.detach().clone()
    with backpack(Variance()):
        model(x).square().mean().backward()
    rows = 2 * (x @ start.T + model.bias.detach()) * x  # [N, 3]
    variance = rows.var(0) / 8
    optimisers.VarianceAdapted(model.parameters(), 1.0).step(8)
    gradient = rows.mean(0)
    expected = start - gradient**3 / (gradient.square() + variance)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_tangent_kernel():
    """Against Jacobians of single samples; the kernel recognises digits."""
    program = example("several_backward_passes")
    _, accuracy = program.run()
    assert accuracy > 0.85
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    rows = program.jacobian(model, x)
    for n, c in ((0, 0), (4, 1)):
        expected = torch.autograd.grad(model(x[n : n + 1])[0, c], list(model.parameters()))
        torch.testing.assert_close(rows[c, n], torch.cat([g.flatten() for g in expected]))


def test_gradient_of_variance():
    """The penalty works, and its gradient is that of finite differences."""
    program = example("gradient_of_variance")
    plain, penalised = program.run(steps=30).values()
    assert penalised[-1][1] < 0.8 * plain[10][1] and penalised[-1][0] < plain[0][0]
    model = extend(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 0, 1, 1])

    def noise() -> Tensor:
        return program.noise(model, nn.functional.cross_entropy(model(x), y))

    (gradient,) = torch.autograd.grad(noise(), model[0].weight)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            model[0].weight[1, 2] += step
        values.append(noise().item())
    assert gradient[1, 2].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_custom_layer():
    """The three ways agree with a loop over samples, and each is taken."""
    program = example("custom_layer")
    gradients, norms, curvature, accuracy = program.run(epochs=4)
    assert accuracy > 0.9 and (norms > 0).all() and (curvature > 0).all()
    assert gradients.keys() == {"nothing registered", "register_layer", "ModuleExtension"}
    for found in gradients.values():
        torch.testing.assert_close(found, gradients["nothing registered"], rtol=1e-4, atol=1e-6)

    model = extend(nn.Sequential(program.RadialBasis(torch.randn(3, 2), 3.0), nn.Linear(3, 2)))
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 0])
    losses = [nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for n in range(5)]
    expected = torch.stack([torch.autograd.grad(loss, model[0].centres)[0] for loss in losses])
    called, extension = [], BatchGrad()
    rule = program.CentreBatchGrad()
    rule.centres = lambda *arguments: called.append("ModuleExtension") or type(rule).centres(rule, *arguments)
    extension.set_module_extension(program.RadialBasis, rule)
    bp.register_layer(
        program.RadialBasis,
        lambda *a, **k: called.append("register_layer") or program.centre_gradients(*a, **k),
        check=False,
    )
    for ext in (BatchGrad(), extension):
        torch.testing.assert_close(program.batch_grad(model, x, y, ext), expected)
    assert called == ["register_layer", "ModuleExtension"]


def test_custom_layer_with_backpack():
    """Its module extension alone, in BackPACK."""
    backpack_original = pytest.importorskip("backpack", reason="BackPACK is not installed")
    source = (ROOT / "examples/custom_layer.py").read_text()
    program = {"__name__": "custom_layer"}
    source = source.replace("backpack_cuda", "backpack").replace(", register_layer\n", "\n")
    exec(compile(source, "custom_layer", "exec"), program)
    ours, found = example("custom_layer"), []
    x, y = torch.randn(5, 64), torch.arange(5)
    for names in (vars(ours), program):
        torch.manual_seed(0)
        model = names["network"](torch.randn(60, 64))
        extension = names["BatchGrad"]()
        extension.set_module_extension(names["RadialBasis"], names["CentreBatchGrad"]())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            found.append(names["batch_grad"](model, x, y, extension))
    assert isinstance(extension, backpack_original.extensions.BatchGrad)
    torch.testing.assert_close(*found)


def test_digits_as_sequences():
    before, after, accuracy = example("digits_as_sequences").run(epochs=5)
    assert accuracy > 0.7
    assert all(norm > 0 and trace > 0 for measured in (before, after) for norm, trace in measured.values())


def test_benchmark_runs(tmp_path):
    """`benchmarks/run.py --quick` measures this product, and every other library that is installed."""
    out = tmp_path / "quick.json"
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--quick", "--out", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, env=subprocess_environment(), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(out.read_text())
    expected = {"first": {"none", "BatchL2Grad", "together"}, "second": {"KFAC"}, "more": {"GGNMP 1"}}
    assert results.keys() == expected.keys()
    for order, quantities in expected.items():
        cells = results[order]["models"]["mlp"]["cells"]
        assert {cell["quantity"] for cell in cells if cell["library"] == "backpack_cuda"} == quantities
        assert not any({"error", "refused"} & cell.keys() for cell in cells)
    assert "BatchL2Grad" in finished.stdout and "WRONG" not in finished.stdout


@pytest.fixture
def benchmarks(monkeypatch):
    """benchmarks/run.py and report.py as modules, which import their neighbours by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("run"), importlib.import_module("report")


def test_benchmark_of_one_order_keeps_the_other(benchmarks, monkeypatch, tmp_path):
    """Together with the targets: a sweep for several quantities is held against the dearest of them."""
    run, report = benchmarks
    ratios = {"DiagGGNExact": 2.0, "BatchDiagGGNExact": 5.0, "KFLR": 6.0, report.SWEEP: 7.0}

    def measure_model(model, cells, options, memory):
        numbers = {"quartiles": [1.0, 9.0], "milliseconds": 1.0, "relative_error": 0.0, "missing": 0}
        measured = [{"library": lib, "quantity": q, "ratio": ratios.get(q, 1.0)} | numbers for lib, q in cells]
        return {"plain": {"milliseconds": 1.0}, "cells": measured}

    monkeypatch.setattr(run, "measure_model", measure_model)
    out = tmp_path / "results.json"
    for order in ("first", "second", "second"):
        run.main(["--order", order, "--models", "3c3d,mlp", "--libraries", "backpack_cuda", "--out", str(out)])
    results = json.loads(out.read_text())
    assert {order: list(run["models"]) for order, run in results.items()} == {
        "first": ["3c3d", "mlp"],
        "second": ["3c3d", "mlp"],
    }
    table = report.result_section("second", results["second"])
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert "≤ 7.80" in rows["DiagGGNExact + BatchDiagGGNExact + KFLR"] and "missed" not in rows["DiagGGNExact"]
    assert "missed" in rows["KFLR"]  # of both models

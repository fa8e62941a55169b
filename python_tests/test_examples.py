"""The demo finds wrong labels, its formulas are right, and the benchmark runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import subprocess_environment
from torch import nn

import backpack_cuda as bp
from backpack_cuda import backpack
from backpack_cuda.extensions import BatchL2Grad, Variance

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo():
    """examples/find_mislabelled_digits.py as a module."""
    for needed in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(needed)
    path = ROOT / "examples/find_mislabelled_digits.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


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


def test_benchmark_runs(tmp_path):
    """`benchmarks/run.py --quick` measures this product, and every other library that is installed."""
    out = tmp_path / "quick.json"
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--quick", "--out", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, env=subprocess_environment(), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(out.read_text())
    expected = {"first": {"none", "BatchL2Grad", "together"}, "second": {"KFAC"}}
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

"""benchmarks/gpu_report.py by a dry run on the CPU, and what its table of layers says."""

import importlib
import json
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import named, subprocess_environment

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("gpu_shapes", "gpu_kernels", "gpu_second_order", "gpu_tables", "gpu_report", "peers", "sanitizer_program")
PRECISIONS = ("bf16", "tf32", "highest")


@pytest.fixture(scope="module")
def benchmarks():
    """The report's modules, importable by their names as they import each other."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> Path:
    """The folder that a dry run of everything leaves; it finds the package by itself."""
    out = tmp_path_factory.mktemp("report")
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--device", "cpu", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out)
    assert finished.returncode == 0, finished.stderr
    return out


def test_a_dry_run_has_every_part(dry_run):
    report = json.loads((dry_run / "gpu_report.json").read_text())
    facts, parts = report["conditions"], report["parts"]
    assert facts["dry_run"] and facts["torch"] == torch.__version__ and facts["date"] and facts["device"]
    assert list(parts) == ["tests", "sanitizer", "kernels", "columns", "factors", "steps"]
    assert not [part for part in parts if "error" in parts[part]]
    assert parts["tests"]["passed"] > 50 and parts["tests"]["failed"] == 0 and parts["tests"]["exit_status"] == 0
    assert parts["sanitizer"]["plain"]["exit_status"] == 0
    assert "all right" in parts["sanitizer"]["plain"]["last_lines"][-1]


def test_a_dry_run_measures_every_quantity(dry_run, benchmarks):
    kernels = json.loads((dry_run / "gpu_report.json").read_text())["parts"]["kernels"]
    assert {row["family"] for row in kernels["rows"]} == set(benchmarks.gpu_shapes.FAMILIES)
    assert {row["precision"] for row in kernels["rows"]} == set(PRECISIONS)
    assert any("channels-last" in row["layer"] for row in kernels["rows"])
    for row in kernels["rows"]:
        assert row["library"]["milliseconds"] > 0
        assert tuple(row["cells"]) == benchmarks.gpu_kernels.quantities(row["precision"])
        for quantity, cell in row["cells"].items():
            if quantity == benchmarks.gpu_kernels.HOPPER:
                assert not cell, "no CPU has that path"
                continue
            assert not [field for field in cell if "error" in field or field == "skipped"], (row["layer"], cell)
            assert cell["right"], f"{row['layer']}, {row['precision']}, {quantity}: off by {cell['difference']}"
            assert cell["milliseconds"] > 0 and cell["composed"]["milliseconds"] > 0 and cell["gbytes"] > 0
    assert kernels["ceilings"]["copy_gbytes"] > 0 and not kernels["dropped"]
    assert all(row["difference"] < 1e-6 for row in kernels["outer_norm"])


def test_a_dry_run_measures_second_order(dry_run, benchmarks):
    """Column statistics of every family, Kronecker factors in both modes of float32."""
    parts = json.loads((dry_run / "gpu_report.json").read_text())["parts"]
    columns, factors = parts["columns"]["rows"], parts["factors"]["rows"]
    assert len(columns) == len(benchmarks.gpu_shapes.FAMILIES) * len(PRECISIONS)
    assert {row["precision"] for row in factors} == {"tf32", "highest"} and len(factors) == 8
    cells = [(row["layer"], cell) for row in columns for cell in row["cells"].values()]
    for layer, cell in cells + [(row["layer"], row["cell"]) for row in factors]:
        assert not [field for field in cell if "error" in field or field == "skipped"], (layer, cell)
        assert cell["right"], f"{layer}: off by {cell['difference']}"
        assert cell["milliseconds"] > 0 and cell["composed"]["milliseconds"] > 0
    text = (dry_run / "gpu_report.md").read_text()
    assert "batch_diag" in text and "unfold + matmul" in text and "WRONG" not in text


def test_a_dry_run_has_whole_steps(dry_run, benchmarks):
    steps = json.loads((dry_run / "gpu_report.json").read_text())["parts"]["steps"]
    assert len(steps["models"]) == 3 and not steps["dropped"]
    for name, model in steps["models"].items():
        assert all("error" not in run for run in model["runs"]), (name, model)
        cells = {(cell["library"], cell["quantity"]): cell for run in model["runs"] for cell in run["cells"]}
        for library in ("backpack_cuda", "torch_func"):
            assert cells[library, "together"]["relative_error"] < 1e-4
            assert cells[library, "together"]["missing"] == 0
        own = {quantity: cell for (library, quantity), cell in cells.items() if library == "backpack_cuda"}
        wanted = (
            (benchmarks.peers.FIRST_ORDER | benchmarks.peers.SECOND_ORDER)
            if name == "3c3d-small"
            else benchmarks.gpu_report.LEADING_QUANTITIES
        )
        assert set(own) == set(wanted)
        assert all(cell["milliseconds"] > 0 and cell["missing"] == 0 for cell in own.values())
    assert {"backpack_cuda", "torch_func"} <= set(steps["versions"])


def test_a_dry_run_says_that_it_is_one(dry_run):
    text = (dry_run / "gpu_report.md").read_text()
    assert "DRY RUN" in text and "no number below says anything about a GPU" in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == 6 and all("(dry run)" in line for line in headings)
    assert "### Targets" not in text


def test_files_fit_what_a_run_may_leave(dry_run):
    files = [path for path in dry_run.iterdir() if path.is_file()]
    assert len(files) <= 8 and sum(path.stat().st_size for path in files) < 16 << 20


def test_layers_of_the_networks(benchmarks):
    """Counts, and sizes against torch's own layers."""
    shapes = benchmarks.gpu_shapes
    counts = {name: len(set(layers)) for name, layers in shapes.FAMILIES.items()}
    assert counts == {"mlp": 1, "gpt2": 4, "resnet50": 23, "mobilenetv2": 10}
    for layers in shapes.FAMILIES.values():
        for layer in (*layers, *(layer.small() for layer in layers)):
            with torch.device("meta"):
                if layer.linear:
                    module = torch.nn.Linear(layer.inputs, layer.outputs, bias=False)
                else:
                    sizes = (layer.kernel, layer.stride, layer.padding, 1, layer.groups, False)
                    module = torch.nn.Conv2d(layer.inputs, layer.outputs, *sizes)
                output = module(torch.empty(layer.shapes[0]))
            assert (tuple(output.shape), tuple(module.weight.shape)) == (layer.shapes[1], layer.weight_shape)


def resnet50_convolutions():
    """(inputs, outputs, size, kernel, stride) by the rules of the architecture."""
    yield 3, 64, 224, 7, 2
    channels, size = 64, 56
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            stride = 2 if stage and block == 0 else 1
            yield channels, width, size, 1, 1
            yield width, width, size, 3, stride
            if block == 0:
                yield channels, 4 * width, size, 1, stride
            size //= stride
            yield width, 4 * width, size, 1, 1
            channels = 4 * width


def test_resnet50_has_these_convolutions(benchmarks):
    layers = benchmarks.gpu_shapes.RESNET50
    listed = {(layer.inputs, layer.outputs, layer.size, layer.kernel, layer.stride): layer.count for layer in layers}
    assert listed == Counter(resnet50_convolutions()) and sum(listed.values()) == 53


def test_the_order_in_which_groups_are_dropped(benchmarks):
    """Every one is there once; what leads every family comes first, in every precision."""
    shapes = benchmarks.gpu_shapes
    groups = shapes.groups(list(shapes.FAMILIES), list(shapes.PRECISIONS))
    assert len(set(groups)) == len(groups) == 3 * (5 + 2 * 33)
    head = groups[: 3 * 11]
    assert {(group.family, group.precision) for group in head} == {(f, p) for f in shapes.FAMILIES for p in PRECISIONS}
    assert not any(group.layer.channels_last for group in head)


def test_kernels_stop_when_time_is_up(benchmarks, tmp_path):
    """Later groups are dropped and named; what is measured is kept."""
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--part", "kernels", "--budget", "0"]
    benchmarks.gpu_report.main([*arguments, "--families", "gpt2", "--precisions", "tf32,highest"])
    kernels = json.loads((tmp_path / "gpu_report.json").read_text())["parts"]["kernels"]
    assert len(kernels["rows"]) + len(kernels["dropped"]) == 2
    assert kernels["dropped"] and all(name in (tmp_path / "gpu_report.md").read_text() for name in kernels["dropped"])


def test_a_program_that_takes_too_long_is_stopped(benchmarks, tmp_path):
    sleep = [sys.executable, "-c", "print('started', flush=True); import time; time.sleep(60)"]
    result = benchmarks.gpu_report.finish(sleep, tmp_path / "log", tmp_path, 1.0, subprocess_environment())
    assert "incomplete" in result["stopped"] and "started" in (tmp_path / "log").read_text()


WORK = {  # layer's arguments -> quantity -> (flops, bytes) in float32
    "T = 1": (
        {"samples": 8, "inputs": 3, "outputs": 5},
        {"grad": (240, 4 * (64 + 15)), "grad + squared": (480, 4 * 94)},
    ),
    "T = 2": (
        {"samples": 8, "inputs": 3, "outputs": 5, "positions": 2},
        {"grad + l2 + squared": (480, 4 * (128 + 15 + 8 + 15)), "grad + batch_grad": (480, 4 * (128 + 15 + 120))},
    ),
    "conv": (
        {"samples": 2, "inputs": 4, "outputs": 6, "size": 5, "kernel": 3, "padding": 1, "groups": 2},
        {"grad": (2 * 2 * 25 * 6 * 2 * 9, 4 * (2 * 25 * 10 + 108))},
    ),
}


@named("arguments, expected", WORK)
def test_flops_and_bytes(arguments, expected, benchmarks):
    layer = benchmarks.gpu_shapes.Layer("test", **arguments)
    for quantity, numbers in expected.items():
        assert benchmarks.gpu_kernels.work(layer, quantity, 4) == numbers


def test_a_wrong_result_is_called_wrong(benchmarks, monkeypatch):
    kernels, shapes = benchmarks.gpu_kernels, benchmarks.gpu_shapes
    original = kernels.operator

    def wrong(*arguments):
        results = original(*arguments)
        return 1.01 * results if isinstance(results, torch.Tensor) else tuple(1.01 * t for t in results)

    monkeypatch.setattr(kernels, "operator", wrong)
    group = shapes.Group("gpt2", shapes.GPT2[0].small(), "highest")
    row = kernels.measure_group(
        group, kernels.Device("cpu"), kernels.Ceilings(1e10, dict.fromkeys(PRECISIONS, 1e10)), 1
    )
    assert not row["cells"]["grad + l2"]["right"]
    assert "WRONG" in benchmarks.gpu_tables.cell_text(row["cells"]["grad + l2"])


def test_targets(benchmarks):
    """What misses a target is named."""
    row = {"layer": "x", "precision": "tf32", "positions": 100}
    cell = {"ratio": 1.5, "extra_bytes": 100 << 20}
    norms = [{"layer": "y", "share": 0.9}]
    lines = benchmarks.gpu_tables.target_lines(
        {"rows": [row | {"cells": {benchmarks.gpu_tables.ONE_PASS: cell}}], "outer_norm": norms}
    )
    assert [line.rpartition(": ")[2] for line in lines if not line.startswith("  ")] == [
        "0 of 1 rows",
        "1 of 1 rows",
        "0 of 1 rows",
    ]
    assert sum("missed" in line for line in lines) == 2


def test_junit_counts(benchmarks, tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="ok"/><testcase classname="a" name="no"><failure '
        'message="assert 1 == 2&#10;more"/></testcase><testcase classname="a" name="later"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert benchmarks.gpu_report.junit_summary(path) == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "failures": [{"test": "a::no", "message": "assert 1 == 2"}],
    }

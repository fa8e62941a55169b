"""Everything that is to be known on a GPU, in one command: are the kernels right, and how fast are they?

    python benchmarks/gpu_report.py --out OUT                  all parts in under ten minutes on one H100
    python benchmarks/gpu_report.py --out OUT --part kernels   some of the parts below
    python benchmarks/gpu_report.py --out OUT --device cpu     dry run of the same on a CPU, with small shapes

Needs torch, pytest and a built backpack_cuda/_C.so, not an installation. Writes gpu_report.json, gpu_report.md and the
logs to OUT, after every part and while a long one runs, so that a run that is stopped leaves what it has.

tests      the Python tests with --device cuda
sanitizer  sanitizer_program.py under compute-sanitizer's memcheck and racecheck
kernels    gpu_kernels.py: time, rates, memory of every quantity of the layers in gpu_shapes.py
columns    gpu_second_order.py: sums of squares over ten columns of per-sample gradients, of the leading layers
factors    gpu_second_order.py: the input Kronecker factors of all 53 convolutions of ResNet-50, N = 128
steps      measure.py: whole training steps with every extension against plain torch, BackPACK, Opacus and torch.func,
           if installed; the leading extensions of all models come first

A part that would overrun its share of --budget stops: kernels, columns and factors drop layers from the last, the steps
drop extensions from the last. What was dropped is listed.
"""

import source_tree  # noqa: F401 (first, so that the package is found)

# isort: split

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import Ceilings, Device, measure_ceilings, measure_group, measure_outer_norm
from gpu_second_order import measure_columns, measure_factor
from gpu_shapes import FAMILIES, PRECISIONS, RESNET50, Group, groups, leading_groups
from gpu_tables import markdown
from measure import Options, in_new_process, time_model
from models import EVERY_CASE, GPU_CASES, SMALL_GPU_CASES
from peers import EVERY_LIBRARY, FIRST_ORDER, SECOND_ORDER
from run import commit, cpu_name, names

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
# Share of the budget that a part may use; what it leaves goes to those after it.
SHARES = {"tests": 0.30, "sanitizer": 0.20, "kernels": 0.55, "columns": 0.3, "factors": 0.3, "steps": 1.0}
CPU_TESTS = ["python_tests/test_ops_dtypes.py"]  # of a dry run
# Of the steps: what is measured of every model first, the one process after the other.
LEADING_QUANTITIES = ("none", "BatchL2Grad", "together", "DiagGGNMC", "KFAC")


class Report:
    """The results so far, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.cuda, self.device = args.device == "cuda", args.device
        self.started = time.monotonic()
        self.part_ends = self.started + args.budget
        self.results: dict[str, Any] = {"conditions": conditions(args), "parts": {}}

    def left(self, until: float | None = None) -> float:
        """Seconds until the end of the part under way."""
        return (self.part_ends if until is None else until) - time.monotonic()

    def run(self, part: str, measure: Callable[["Report", dict[str, Any]], None]) -> None:
        """Runs one part within its share of what is left; an exception is a result too."""
        begin = time.monotonic()
        self.part_ends = begin + SHARES[part] * (self.started + self.args.budget - begin)
        results = self.results["parts"][part] = {}
        try:
            measure(self, results)
        except Exception as error:
            results["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        results["seconds"] = time.monotonic() - begin
        self.write()

    def write(self) -> None:
        """The two files."""
        self.results["seconds"] = time.monotonic() - self.started
        (self.out / "gpu_report.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.out / "gpu_report.md").write_text(markdown(self.results))


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to know about the run."""
    cuda = args.device == "cuda"
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "dry_run": not cuda,
        "device": torch.cuda.get_device_name() if cuda else f"CPU: {cpu_name()}",
        "multiprocessors": properties.multi_processor_count if properties else None,
        "memory_bytes": properties.total_memory if properties else None,
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": args.commit or commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "budget_seconds": args.budget,
        "rounds": args.rounds,
        "command": " ".join(sys.argv[1:]),
    }


def finish(command: list[str], log: Path, folder: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a program, its output in `log`, and all that it started; interrupts it when its time is up."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        return {"exit_status": process.wait(max(1.0, seconds))}
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest still sums up
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {"stopped": f"after {seconds:.0f} s: incomplete"}


# --- tests ----------------------------------------------------------------------------------------------------


def junit_summary(path: Path) -> dict[str, Any]:
    """Counts, and the first line of every failure, of pytest's XML."""
    cases = list(xml.etree.ElementTree.parse(path).getroot().iter("testcase"))
    failures, skipped = [], 0
    for case in cases:
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                message = (found.get("message") or "").partition("\n")[0]
                failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "message": message})
        skipped += case.find("skipped") is not None
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures[:100],
    }


def run_tests(report: Report, results: dict[str, Any]) -> None:
    """pytest in a process of its own."""
    xml_file, log = report.out / "tests.xml", report.out / "tests.log"
    command = [sys.executable, "-m", "pytest", "-q", "--device", report.device, f"--junitxml={xml_file}"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *([] if report.cuda else CPU_TESTS)]
    if report.cuda and installed("xdist"):
        command += ["-n", "8"]
    results["command"] = " ".join(command[2:])
    results |= finish(command, log, ROOT, report.left(), dict(os.environ))
    lines = log.read_text(errors="replace").strip().splitlines()
    results["last_line"] = lines[-1] if lines else ""
    if xml_file.exists():
        results |= junit_summary(xml_file)


# --- sanitizer ------------------------------------------------------------------------------------------------


def sanitizer() -> str | None:
    """compute-sanitizer, where there is one."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def run_sanitizer(report: Report, results: dict[str, Any]) -> None:
    """The program by itself, then under each tool."""
    program = [sys.executable, str(FOLDER / "sanitizer_program.py"), "--device", report.device]
    tools: dict[str, list[str]] = {"plain": program}
    if not report.cuda:
        results["skipped"] = "compute-sanitizer watches GPUs; the program ran by itself"
    elif sanitizer() is None:
        results["skipped"] = "compute-sanitizer is not on this machine; the program ran by itself"
    else:
        watch = [sanitizer(), "--error-exitcode", "9", "--print-limit", "20", "--tool"]
        tools["memcheck"] = [*watch, "memcheck", *program, "--few"]
        tools["racecheck"] = [*watch, "racecheck", *program, "--few"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an allocation per tensor
    for number, (tool, command) in enumerate(tools.items()):
        log = report.out / f"sanitizer_{tool}.log"
        limit = report.left() / (len(tools) - number)
        results[tool] = finish(command, log, FOLDER, limit, {**os.environ, **environment})
        lines = log.read_text(errors="replace").strip().splitlines()
        results[tool] |= {"last_lines": lines[-3:]}


# --- kernels --------------------------------------------------------------------------------------------------


def run_kernels(report: Report, results: dict[str, Any]) -> None:
    """Groups in the order of their importance until the time is up."""
    device = Device(report.device)
    if report.cuda:
        torch.backends.cudnn.benchmark = True  # the library at its best
    ceilings: Ceilings = measure_ceilings(device)
    results["ceilings"] = {"copy_gbytes": ceilings.copy / 1e9}
    results["ceilings"] |= {f"{name}_tflops": rate / 1e12 for name, rate in ceilings.products.items()}
    results["outer_norm"] = measure_outer_norm(device, ceilings, small=not report.cuda)
    due = wanted_groups(report, groups(report.args.families, report.args.precisions))
    measure_rows(report, results, due, lambda group: measure_group(group, device, ceilings, report.args.rounds))


def measure_rows(
    report: Report, results: dict[str, Any], due: list[Group], measure: Callable[[Group], dict[str, Any]]
) -> None:
    """A row of each group until the time is up, and the names of those that were dropped then."""
    results["rows"], results["dropped"] = [], []
    longest: float = 0.0
    for number, group in enumerate(due):
        if report.left() < 1.5 * longest:
            results["dropped"] = [f"{g.layer.text()} ({g.precision})" for g in due[number:]]
            break
        begin = time.monotonic()
        try:
            row = measure(group)
        except Exception as error:
            row = {
                "layer": group.layer.text(),
                "precision": group.precision,
                "error": f"{type(error).__name__}: {error}",
            }
            traceback.print_exc()
        results["rows"].append(row)
        if report.cuda:
            torch.cuda.empty_cache()
        longest = max(0.9 * longest, time.monotonic() - begin)
        if number % 10 == 9:
            report.write()


def wanted_groups(report: Report, due: list[Group]) -> list[Group]:
    """Those of `due` that the command line asks for; on a CPU one layer of every kind, shrunk."""
    if report.args.match:
        due = [group for group in due if re.search(report.args.match, group.layer.text())]
    if report.cuda:
        return due
    few: dict[tuple, Group] = {}
    for group in due:
        kind = group.family, group.precision, group.layer.channels_last
        few.setdefault(kind, Group(group.family, group.layer.small(), group.precision))
    return list(few.values())


# --- second order ---------------------------------------------------------------------------------------------


def run_columns(report: Report, results: dict[str, Any]) -> None:
    """Column statistics of the leading layers."""
    device = Device(report.device)
    due = wanted_groups(report, leading_groups(report.args.families, report.args.precisions))
    measure_rows(report, results, due, lambda group: measure_columns(group, device, report.args.rounds))


def run_factors(report: Report, results: dict[str, Any]) -> None:
    """Input factors of ResNet-50 in float32; on a CPU of four of its convolutions, shrunk."""
    device = Device(report.device)
    precisions = [precision for precision in report.args.precisions if precision != "bf16"]
    layers = RESNET50 if report.cuda else [layer.small() for layer in RESNET50[::6]]
    due = [Group("resnet50", layer, precision) for precision in precisions for layer in layers]
    measure_rows(
        report,
        results,
        due,
        lambda group: measure_factor(group.layer, group.precision, device, report.args.rounds),
    )


# --- steps ----------------------------------------------------------------------------------------------------


def run_steps(report: Report, results: dict[str, Any]) -> None:
    """Whole training steps, model by model, each in a process of its own."""
    versions: dict[str, str] = {}
    results["missing"] = {}
    for name, library in EVERY_LIBRARY.items():
        try:
            versions[name] = library.version()
        except ImportError as error:
            results["missing"][library.title] = str(error)
    results["versions"], results["models"], results["dropped"] = versions, {}, []
    options = Options(
        rounds=7 if report.cuda else 1,
        slow_rounds=2 if report.cuda else 1,
        device=report.device,
        precision="high",
        memory=report.cuda,
        threads=torch.get_num_threads() if report.cuda else 1,
    )
    longest = 0.0
    for name, quantities in due_steps(report):
        if report.left() < longest:
            results["dropped"].append(f"{name}: {', '.join(quantities)}")
            continue
        cells = [(lib, q) for lib in versions for q in quantities if q in EVERY_LIBRARY[lib].quantities]
        begin = time.monotonic()
        measured = results["models"].setdefault(name, {"description": EVERY_CASE[name].description, "runs": []})
        try:
            measured["runs"].append(in_new_process(time_model, name, cells, options))
        except Exception as error:
            measured["runs"].append({"error": f"{', '.join(quantities)}: {type(error).__name__}: {error}"})
            traceback.print_exc()
        longest = max(longest, time.monotonic() - begin)
        report.write()


def due_steps(report: Report) -> list[tuple[str, tuple[str, ...]]]:
    """Models with the quantities that are measured together, the most important first."""
    models = list(GPU_CASES if report.cuda else SMALL_GPU_CASES)
    others = tuple(q for q in FIRST_ORDER | SECOND_ORDER if q not in LEADING_QUANTITIES)
    leading = [(name, LEADING_QUANTITIES) for name in models]
    if not report.cuda:  # one process is enough to see that they run
        return [*leading, (models[0], others)]
    return leading + [(name, (quantity,)) for quantity in others for name in models]


PARTS = {
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "kernels": run_kernels,
    "columns": run_columns,
    "factors": run_factors,
    "steps": run_steps,
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for all files")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--part", type=names(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--families", type=names(FAMILIES), default=list(FAMILIES), help=f"of {','.join(FAMILIES)}")
    parser.add_argument(
        "--precisions", type=names(PRECISIONS), default=list(PRECISIONS), help=f"of {','.join(PRECISIONS)}"
    )
    parser.add_argument("--match", help="regular expression for the layers' texts")
    parser.add_argument("--rounds", type=int, default=None, help="of the kernels (default: 9, on a CPU 1)")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything (default 540)")
    parser.add_argument("--commit", help="of the sources, where they are no git repository")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (9 if args.device == "cuda" else 1)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device; --device cpu is a dry run")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The report that the command line describes."""
    args = parse_arguments(arguments)
    if args.device == "cpu":
        torch.set_num_threads(1)  # nothing that is measured counts
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args)
    for part in PARTS:
        if part in args.part:
            print(f"{part} ...", file=sys.stderr, flush=True)
            report.run(part, PARTS[part])
    print((args.out / "gpu_report.md").read_text())


if __name__ == "__main__":
    main()

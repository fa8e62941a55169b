"""Benchmark against BackPACK and Opacus (`make bench`).

    python benchmarks/run.py                    everything; rewrites benchmarks/results/ and docs/benchmarks.md
    python benchmarks/run.py --order second     one part of it anew; the others' results are kept
    python benchmarks/run.py --models mlp,seq   a part of it; printed, and written only with --out
    python benchmarks/run.py --quick            a smoke test of a few seconds

Times are medians, as ratio to a forward and backward pass of plain torch measured in the same rounds; memory is the
peak over that of a plain step, measured in a process per cell. A library that is not installed is skipped.
"""

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from measure import Options, in_new_process, measure_memory, time_model
from models import CASES
from peers import AVERAGED, FIRST_ORDER, LIBRARIES, PRODUCTS, QUANTITIES, SECOND_ORDER

FOLDER = Path(__file__).resolve().parent
# The smoke test: one thread, since two wait for each other on a machine that is busy with other tests.
QUICK = {
    "models": ["mlp"],
    "quantities": ["none", "BatchL2Grad", "together", "KFAC", "GGNMP 1"],
    "rounds": 2,
    "threads": 1,
}


@dataclass(frozen=True)
class Order:
    """Cells that are measured together, in one process per model."""

    quantities: dict[str, Collection[str]]  # by the model
    rounds: int
    once_seconds: float = Options.once_seconds
    libraries: Collection[str] = tuple(LIBRARIES)


NETWORKS = ("mlp", "3c3d", "seq", "encoder")
# What BackPACK has of recurrent layers and embeddings, in as many forms.
LAYERS = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "DiagGGNExact", "DiagGGNMC"]
LARGE = ["HMP 1", "GGNMP 1", "GGNMP 10", "GGNMP 10 alone", "PCHMP 1"]  # all products would take a minute more
ORDERS = {
    "first": Order(dict.fromkeys(NETWORKS, FIRST_ORDER), 15),
    # Where all activations are piecewise linear, the Hessian's diagonal is that of the GGN; attention refuses it.
    "second": Order(
        dict.fromkeys(NETWORKS, SECOND_ORDER.keys() - {"DiagHessian"}) | {"curved": SECOND_ORDER},
        5,
        once_seconds=3.0,  # some ten minutes in all
        libraries=LIBRARIES.keys() - {"opacus"},
    ),
    "more": Order(
        {"mlp": PRODUCTS | AVERAGED, "3c3d": LARGE, "curved": PRODUCTS | AVERAGED}
        | dict.fromkeys(("rnn", "lstm", "embedding"), LAYERS),
        5,
        once_seconds=3.0,
        libraries=LIBRARIES.keys() - {"opacus"},
    ),
}


def installed(libraries: list[str]) -> dict[str, str]:
    """Versions of those `libraries` that can be imported; the others are named on stderr."""
    versions = {}
    for library in libraries:
        try:
            versions[library] = LIBRARIES[library].version()
        except ImportError as error:
            print(f"{LIBRARIES[library].title} is skipped: {error}", file=sys.stderr)
    return versions


def cpu_name() -> str:
    """Model of the processor as the kernel names it."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.processor()


def commit() -> str | None:
    """Commit of the working tree, marked if it has changes; None outside of a repository."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def conditions(options: Options, versions: dict[str, str], commit: str | None) -> dict[str, Any]:
    """What a reader needs to know about a run."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "torch": torch.__version__,
        "versions": versions,
        "options": vars(options),
    }


def measure_model(model: str, cells: list[tuple[str, str]], options: Options, memory: bool) -> dict[str, Any]:
    """Memory, then time, of all `cells` of one model; a cell whose process dies is left out of the timing."""
    peaks: dict[tuple[str, str], dict[str, Any]] = {}
    for library, quantity in cells if memory else []:
        if quantity in PRODUCTS and PRODUCTS[quantity][1:] != (10, False):
            continue  # what is left out of the step is in memory too
        show(f"{model}: memory of {LIBRARIES[library].title}, {quantity}")
        try:
            peaks[library, quantity] = in_new_process(measure_memory, model, library, quantity, options)
        except BrokenProcessPool:
            peaks[library, quantity] = {"error": "the process died, probably out of memory"}
    show(f"{model}: timing")
    alive = [cell for cell in cells if not {"error", "refused"} & peaks.get(cell, {}).keys()]
    result = in_new_process(time_model, model, alive, options)
    timed = {(cell["library"], cell["quantity"]): cell for cell in result["cells"]}
    result["cells"] = [
        {"library": cell[0], "quantity": cell[1]} | timed.get(cell, {}) | peaks.get(cell, {}) for cell in cells
    ]
    show("")
    return result


def show(progress: str) -> None:
    """What is going on, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argument's type: some of the known names, joined by commas."""

    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
        return text.split(",")

    return parse


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""

    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=names(ORDERS), default=list(ORDERS), help=f"of {','.join(ORDERS)}")
    parser.add_argument("--models", type=names(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument("--libraries", type=names(LIBRARIES), help=f"of {','.join(LIBRARIES)}")
    parser.add_argument("--quantities", type=names(QUANTITIES), help=f"of {','.join(QUANTITIES)}")
    parser.add_argument("--rounds", type=int, help="timed steps per cell (default: 15, beyond the first order 5)")
    parser.add_argument("--warm-steps", type=int, default=default.warm_steps, help="untimed steps before each")
    parser.add_argument("--threads", type=int, help=f"of torch (default {default.threads})")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the order within a round")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default.device)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="two rounds of a few cells, without --out not written")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark that the command line describes."""
    args = parse_arguments(arguments)
    complete = not (args.quick or args.no_memory or args.models or args.libraries or args.quantities)
    preset = QUICK if args.quick else {}
    versions = installed(args.libraries or list(LIBRARIES))
    out = args.out or (FOLDER / "results" / f"{args.device}.json" if complete else None)
    results = json.loads(out.read_text()) if out and out.exists() else {}
    measured = commit()  # before the results of the first part change the working tree
    for name in args.order:
        order = ORDERS[name]
        options = Options(
            rounds=args.rounds or preset.get("rounds", order.rounds),
            once_seconds=order.once_seconds,
            warm_steps=args.warm_steps,
            threads=args.threads or preset.get("threads", Options.threads),
            device=args.device,
            seed=args.seed,
        )
        chosen = args.quantities or preset.get("quantities", QUANTITIES)
        taking_part = {library: version for library, version in versions.items() if library in order.libraries}
        run = conditions(options, taking_part, measured) | {"models": {}}
        for model in args.models or preset.get("models", CASES):
            quantities = [q for q in chosen if q in order.quantities.get(model, ())]
            cells = [(lib, q) for lib in taking_part for q in quantities if q in LIBRARIES[lib].quantities]
            if cells:
                run["models"][model] = measure_model(model, cells, options, memory=not args.no_memory)
                print(report.model_table(model, run), flush=True)
        if run["models"]:
            results[name] = run
        if out:  # also while the next order runs
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
    if complete and not args.out:
        report.main()


if __name__ == "__main__":
    main()

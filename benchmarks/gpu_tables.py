"""The Markdown of gpu_report.py's results."""

from typing import Any

# Targets on an H100.
ONE_PASS = "grad + l2 + squared"
LARGEST_RATIO = 1.3  # of one pass to the library's gradient, bf16 and tf32, from 64 positions on
LEAST_OUTER_NORM_SHARE = 0.85  # of the measured copy bandwidth
LARGEST_EXTRA_BYTES = 64 << 20
MISSED_LINES = 40
MIB = 1 << 20


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / MIB:.0f}"


def tests_section(results: dict[str, Any]) -> str:
    """Counts and failures."""
    lines = [f"`{results.get('command', '')}`: {results.get('last_line', 'no output')}"]
    if "stopped" in results:
        lines.append(f"STOPPED {results['stopped']}; the counts are incomplete.")
    if "passed" in results:
        lines.append(f"{results['passed']} passed, {results['failed']} failed, {results['skipped']} skipped.")
    lines += [f"* {failure['test']}: {failure['message']}" for failure in results.get("failures", [])]
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def sanitizer_section(results: dict[str, Any]) -> str:
    """One line per tool."""
    lines = [results["skipped"] + "."] if "skipped" in results else []
    for tool in ("plain", "memcheck", "racecheck"):
        if tool in results:
            found = results[tool]
            state = found.get("stopped") or (
                "clean" if found["exit_status"] == 0 else f"FAILED ({found['exit_status']})"
            )
            lines.append(f"* {tool}: {state}: {' / '.join(found['last_lines'])}")
    return "\n".join(lines)


def cell_text(cell: dict[str, Any]) -> str:
    """Ratio to the library's gradient, and in brackets that of the composed result."""
    if "ratio" not in cell:
        return "too large" if "skipped" in cell else "ERROR" if "error" in cell else "–"
    composed = number(cell["composed"]["ratio"]) if "composed" in cell else "–"
    wrong = "" if cell.get("right", True) else " WRONG"
    return f"{number(cell['ratio'])} ({composed}){wrong}"


def kernel_tables(results: dict[str, Any]) -> list[str]:
    """Ratios and rates, one table of each per precision."""
    parts = []
    rows = [row for row in results["rows"] if "library" in row]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        chosen = [row for row in rows if row["precision"] == precision]
        quantities = list(chosen[0]["cells"])
        ratios = [
            [row["layer"], number(1e3 * row["library"]["milliseconds"])]
            + [cell_text(row["cells"][quantity]) for quantity in quantities]
            for row in chosen
        ]
        rates = []
        for row in chosen:
            cell = row["cells"][ONE_PASS]
            composed = cell.get("composed", {})
            rates.append(
                [
                    row["layer"],
                    number(1e3 * cell["milliseconds"]) if "milliseconds" in cell else "–",
                    number(cell.get("tflops")),
                    number(cell.get("gbytes")),
                    number(cell.get("share")),
                    number(row["library"]["share"]),
                    mebibytes(cell.get("extra_bytes")),
                    mebibytes(composed.get("extra_bytes")),
                    scientific(cell.get("difference")),
                ]
            )
        parts += [
            f"### {precision}: time as ratio to the library's weight gradient alone (in brackets: of torch calls)",
            table(["layer", "library, µs", *quantities], ratios),
            f"### {precision}: {ONE_PASS} in one pass",
            table(
                [
                    "layer",
                    "µs",
                    "TFLOP/s",
                    "GB/s",
                    "share of ceiling",
                    "library's share",
                    "extra MiB",
                    "composed",
                    "diff.",
                ],
                rates,
            ),
        ]
    parts += [f"* {row['layer']} ({row['precision']}): {row['error']}" for row in results["rows"] if "error" in row]
    for row in rows:
        for quantity, cell in row["cells"].items():
            for kind in ("error", "composed_error"):
                if kind in cell:
                    parts.append(f"* {row['layer']} ({row['precision']}), {quantity}, {kind}: {cell[kind]}")
    return parts


def target_lines(results: dict[str, Any]) -> list[str]:
    """How many rows meet each target, and those that do not."""
    one_pass, memory = [], []
    for row in results["rows"]:
        for quantity, cell in row.get("cells", {}).items():
            name = f"{row['layer']} ({row['precision']}, {quantity})"
            if quantity == ONE_PASS and row["precision"] != "highest" and row["positions"] >= 64 and "ratio" in cell:
                one_pass.append((name, cell["ratio"], cell["ratio"] <= LARGEST_RATIO))
            if cell.get("extra_bytes") is not None:
                memory.append((name, cell["extra_bytes"] / MIB, cell["extra_bytes"] < LARGEST_EXTRA_BYTES))
    norms = [(row["layer"], row["share"], row["share"] >= LEAST_OUTER_NORM_SHARE) for row in results["outer_norm"]]
    lines = []
    for title, found in (
        (f"{ONE_PASS} at most {LARGEST_RATIO} times the library's gradient (bf16 and tf32, T ≥ 64)", one_pass),
        (f"outer_norm at {LEAST_OUTER_NORM_SHARE:.0%} of the copy bandwidth", norms),
        (f"extra memory below {LARGEST_EXTRA_BYTES // MIB} MiB", memory),
    ):
        missed = [f"{name}: {number(value)}" for name, value, met in found if not met]
        lines.append(f"* {title}: {len(found) - len(missed)} of {len(found)} rows")
        lines += [f"  * missed: {text}" for text in missed[:MISSED_LINES]]
        if len(missed) > MISSED_LINES:
            lines.append(f"  * missed: {len(missed) - MISSED_LINES} more, in the JSON")
    return lines


def kernels_section(results: dict[str, Any], dry_run: bool) -> str:
    """Ceilings, targets and tables."""
    if "ceilings" not in results:
        return "Nothing was measured."
    units = {"gbytes": "GB/s", "tflops": "TFLOP/s"}
    named = [(*name.split("_"), rate) for name, rate in results["ceilings"].items()]
    ceilings = ", ".join(f"{name} {number(rate)} {units[unit]}" for name, unit, rate in named)
    parts = [
        f"Ceilings measured in this run: {ceilings} (copy: read plus written). The share of a ceiling is the time that "
        "flops and bytes need at least at these rates, over the time taken; for highest the rate is a third of tf32's.",
    ]
    norms = [
        [row["layer"], row["dtype"], number(1e3 * row["milliseconds"]), number(row["gbytes"]), number(row["share"])]
        + [mebibytes(row["extra_bytes"]), scientific(row["difference"])]
        for row in results.get("outer_norm", [])
    ]
    if not dry_run and "rows" in results:
        parts += ["### Targets", "\n".join(target_lines(results))]
    parts += ["### outer_norm", table(["rows", "type", "µs", "GB/s", "share of copy", "extra MiB", "error"], norms)]
    if "rows" in results:
        parts += kernel_tables(results)
    if results.get("dropped"):
        parts += ["Dropped for lack of time:", "\n".join(f"* {name}" for name in results["dropped"])]
    return "\n\n".join(parts)


def dropped_lines(results: dict[str, Any]) -> list[str]:
    """What a part had no time for, and what failed."""
    lines = [f"* {row['layer']} ({row['precision']}): {row['error']}" for row in results["rows"] if "error" in row]
    if results["dropped"]:
        lines += ["Dropped for lack of time:", "\n".join(f"* {name}" for name in results["dropped"])]
    return lines


def columns_section(results: dict[str, Any]) -> str:
    """One table; ratios are to the gradient of ONE column."""
    rows = [row for row in results["rows"] if "cells" in row]
    names = list(rows[0]["cells"]) if rows else []
    head = ["layer", "precision", "library, µs", *names, *(f"{name}, extra MiB" for name in names), "largest diff."]
    lines = [
        [row["layer"], row["precision"], number(1e3 * row["library"]["milliseconds"])]
        + [cell_text(row["cells"][name]) for name in names]
        + [mebibytes(row["cells"][name].get("extra_bytes")) for name in names]
        + [scientific(max(cell.get("difference", 0.0) for cell in row["cells"].values()))]
        for row in rows
    ]
    text = (
        "Squares of the per-sample gradients of ten columns, summed over columns and samples (diag) or over columns "
        "(batch_diag): time as ratio to the library's weight gradient of one column (in brackets: of torch calls)."
    )
    return "\n\n".join([text, table(head, lines), *dropped_lines(results)])


def factors_section(results: dict[str, Any]) -> str:
    """Every convolution, and the sums over the network."""
    parts = []
    for precision in dict.fromkeys(row["precision"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["precision"] == precision and "cell" in row]
        lines, sums = [], {"forward": 0.0, "own": 0.0, "composed": 0.0}
        complete = [row for row in rows if "composed" in row["cell"] and "milliseconds" in row["cell"]]
        for row in rows:
            cell = row["cell"]
            own, unfolded = cell.get("milliseconds"), cell.get("composed", {}).get("milliseconds")
            lines.append(
                [row["layer"], str(row["count"]), number(1e3 * row["library"]["milliseconds"])]
                + [number(1e3 * own) if own else "ERROR", number(1e3 * unfolded) if unfolded else "–"]
                + [number(unfolded / own) if own and unfolded else "–"]
                + [number(row["flops"] / own / 1e9) if own else "–"]
                + [mebibytes(cell.get("extra_bytes")), mebibytes(cell.get("composed", {}).get("extra_bytes"))]
                + [scientific(cell.get("difference")) + ("" if cell.get("right", True) else " WRONG")]
            )
        for row in complete:
            times = row["library"], row["cell"], row["cell"]["composed"]
            for name, figures in zip(sums, times, strict=True):
                sums[name] += row["count"] * figures["milliseconds"]
        convolutions = sum(row["count"] for row in complete)
        head = ["convolution", "count", "forward, µs", "factor, µs", "unfold + matmul, µs", "quotient"]
        head += ["TFLOP/s of the full product", "extra MiB", "unfold + matmul, extra MiB", "diff."]
        parts += [f"### {precision}", table(head, lines)]
        parts.append(
            f"All {convolutions} convolutions: {number(sums['own'])} ms; unfold + matmul {number(sums['composed'])} "
            f"ms, {number(sums['composed'] / sums['own'])} times as long; forward {number(sums['forward'])} ms."
            if complete
            else "No convolution has both times."
        )
    return "\n\n".join(parts + dropped_lines(results))


def steps_section(results: dict[str, Any]) -> str:
    """One table per model."""
    parts = [f"Not installed: {name} ({reason})." for name, reason in results.get("missing", {}).items()]
    for name, measured in results.get("models", {}).items():
        parts.append(f"### {name}: {measured['description']}")
        runs = [run for run in measured["runs"] if "error" not in run]
        parts += [run["error"] for run in measured["runs"] if "error" in run]
        if not runs:
            continue
        rows = [
            [cell["library"], cell["quantity"], "refused", *4 * ["–"]]
            if "refused" in cell
            else [cell["library"], cell["quantity"], number(cell["milliseconds"]), number(cell["ratio"])]
            + [
                mebibytes(cell.get("extra_bytes")),
                "–" if cell["relative_error"] is None else f"{cell['relative_error']:.1e}",
            ]
            + [str(cell["missing"])]
            for run in runs
            for cell in run["cells"]
        ]
        plain = ", ".join(number(run["plain"]["milliseconds"]) for run in runs)
        parts.append(f"Plain step, in each process of this model: {plain} ms.")
        head = [
            "library",
            "quantity",
            "ms",
            "ratio to plain",
            "extra MiB",
            "relative error",
            "parameters without result",
        ]
        parts.append(table(head, rows))
    if parts:
        parts.append("The relative error of sampled quantities (MC, KFAC) is the noise of one column.")
    parts += [f"Dropped for lack of time: {name}." for name in results.get("dropped", [])]
    return "\n\n".join(parts)


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    facts, parts = results["conditions"], results["parts"]
    text = [f"# Report: {facts['device']}"]
    if facts["dry_run"]:
        text.append("**DRY RUN on a CPU with small shapes: no number below says anything about a GPU.**")
    text.append(
        f"{facts['date']}, commit {facts['commit'] or 'unknown'}; torch {facts['torch']}, CUDA {facts['cuda']}, cuDNN "
        f"{facts['cudnn']}, Python {facts['python']}; {results.get('seconds', 0):.0f} s."
    )
    sections = {
        "tests": ("Tests", tests_section),
        "sanitizer": ("compute-sanitizer", sanitizer_section),
        "kernels": ("Kernels", lambda part: kernels_section(part, facts["dry_run"])),
        "columns": ("Column statistics", columns_section),
        "factors": ("Kronecker factors of ResNet-50, N = 128", factors_section),
        "steps": ("Training steps (TF32)", steps_section),
    }
    for name, (title, section) in sections.items():
        if name in parts:
            text.append(f"## {title}" + (" (dry run)" if facts["dry_run"] else ""))
            if "error" in parts[name]:
                text.append(f"FAILED: {parts[name]['error']}")
            else:
                text.append(section(parts[name]))
    return "\n\n".join(part for part in text if part.strip()) + "\n"

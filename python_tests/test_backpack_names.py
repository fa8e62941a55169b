"""Every public name of BackPACK is imported and called in both libraries, and docs/backpack.md must say what came out.

`python -m pytest python_tests/test_backpack_names.py --update-readme` writes the page's table.
"""

import functools
from pathlib import Path

import pytest
import torch
from backpack_matrix import COLUMNS, LETTERS, RAISES, VERDICTS
from backpack_names import SECTIONS, Library, derivative_classes, quietly
from torch import Tensor

pytest.importorskip("backpack", reason="BackPACK is not installed")
PAGE = Path(__file__).parents[1] / "docs/backpack.md"
OURS, THEIRS = Library("backpack_cuda"), Library("backpack")
HBP_ARGUMENTS = ("ggn", "exact", "sqrt", "E[J^T E(H) J]")
REFUSED = "autograd serves their users; the import says how"
NAMES = {name.path: name for names in SECTIONS.values() for name in names}


def equal(first, second) -> bool:
    """Whether two results of a call are the same numbers, strings, and so on."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.allclose(first.double(), second.double(), 1e-5, 1e-7)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@functools.cache
def verdict(path: str) -> tuple[str, str]:
    """ "same", "better", "refused" or "not compared", and a remark."""
    name = NAMES[path]
    try:
        ours = quietly(name.call, OURS)
    except (NotImplementedError, ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) or not deliberate(error):
            raise
        return "refused", str(error).partition(". ")[0]
    if path.startswith("utils.examples"):
        return "not compared", name.remark or "BackPACK's needs torchvision"
    theirs = quietly(name.call, THEIRS)
    assert equal(ours, theirs), f"{path}: {ours}, not {theirs}"
    column = next((c for c, names in COLUMNS.items() if path.removeprefix("extensions.") in names), None)
    more, fewer = (count(column, which, "ra") for which in (1, 0)) if column else (0, 0)
    return "better" if more > fewer else "same", name.remark


def count(column: str, which: int, letters: str) -> int:
    """How many models of the support matrix have one of the letters, for BackPACK (0) or us (1)."""
    place = list(COLUMNS).index(column)
    return sum(verdicts[which][place] in letters for verdicts in VERDICTS.values())


def deliberate(error: Exception) -> bool:
    """Whether an error is one of ours that says what to do instead, rather than a name that is missing."""
    return len(str(error)) > 60 and "has no attribute" not in str(error)


@pytest.mark.parametrize("path", NAMES)
def test_name(path):
    verdict(path)


BASES = [
    "BackpropExtension",
    "extensions.firstorder.base.FirstOrderBackpropExtension",
    "extensions.secondorder.base.SecondOrderBackpropExtension",
    "extensions.HBP",
]


@pytest.mark.parametrize("path", [name.path for name in SECTIONS["Quantities"]])
def test_bases(path):
    """`issubclass`, and `isinstance` through `is_extension_active`, as in BackPACK; and what a base decides."""

    def relations(library: Library):
        quantity = library(path)
        extension = quantity(*HBP_ARGUMENTS) if path.endswith("HBP") else quantity()
        with library("backpack")(extension):
            active = [library("context.CTX").is_extension_active(library(base)) for base in BASES]
        return [issubclass(quantity, library(base)) for base in BASES], active, extension._fail_mode

    assert relations(OURS) == relations(THEIRS)


@pytest.mark.parametrize("path", derivative_classes())
def test_classes_of_derivatives_are_refused(path):
    """BackPACK's internals, which autograd serves: the import says what to use."""
    THEIRS(path)
    with pytest.raises(ImportError, match="autograd") as error:
        OURS(path)
    assert deliberate(error.value)


def table() -> str:
    """All names in Markdown, section by section."""
    lines = []
    for section, names in SECTIONS.items():
        lines += [f"### {section}", "", "| name | ours | remark |", "| --- | --- | --- |"]
        for name in names:
            lines.append(f"| `{name.path}` | " + " | ".join(verdict(name.path)) + " |")
        if section == "Derivatives":
            lines.append(f"| the {len(derivative_classes())} classes of `core.derivatives` | refused | {REFUSED} |")
        lines.append("")
    return "\n".join(lines)


def matrix() -> str:
    """How often either library is right in the support matrix, and the cells in which we raise an error."""
    lines = [
        f"Of {len(VERDICTS)} models, BackPACK gives the right numbers, wrong or missing ones, or an error, for",
        "",
        "| quantity | BackPACK right | wrong or missing | error | ours right | wrong or missing | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for column, names in COLUMNS.items():
        counts = [count(column, which, letters) for which in (0, 1) for letters in ("ra", "Wm", "-")]
        lines.append(" | ".join([f"| {', '.join(f'`{name}`' for name in names)}", *map(str, counts)]) + " |")
    rows: dict[str, list[str]] = {}
    for name, (_, ours) in VERDICTS.items():
        columns = [f"`{column}`" for column, letter in zip(COLUMNS, ours, strict=True) if LETTERS[letter] == RAISES]
        if columns:
            rows.setdefault(", ".join(columns), []).append(name)
    refused = [f"* {columns} of {'; '.join(names)}" for columns, names in rows.items()]
    return "\n".join([*lines, "", "Our errors:", "", *refused])


def test_page_is_what_runs(request):
    parts = {"matrix": matrix(), "names": table()}
    page = text = PAGE.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{part.strip()}\n{end}{rest.partition(end)[2]}"
    if request.config.getoption("--update-readme"):
        PAGE.write_text(text)
    else:
        assert page == text, "docs/backpack.md is out of date: run this test with --update-readme"

"""BackPACK's support matrix, cell by cell: the same model, data and seed through BackPACK and through us.

Both are held against the oracle. Where BackPACK is right, we are, and so both are equal; where it raises or is wrong,
we are right or refuse. A test that fails because BackPACK got better is a line to change in backpack_matrix.py.
"""

import pytest
import torch
from backpack_matrix import COLUMNS, LETTERS, RAISES, ROWS, VERDICTS
from backpack_verdicts import after_one_step, reference, verdict
from torch import nn

import backpack_cuda as bp

pytest.importorskip("backpack", reason="BackPACK is not installed")


def their_type(name: str, column: str) -> torch.dtype:
    """The type that BackPACK can run a cell in."""
    return torch.float32 if column in ROWS[name].float32 else torch.float64


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ROWS)
def test_cell(name, column):
    theirs, ours = (letters[list(COLUMNS).index(column)] for letters in VERDICTS[name])
    found, evidence = verdict("backpack", name, column, their_type(name, column))
    assert found == LETTERS[theirs], f"BackPACK: {evidence!r}"
    found, evidence = verdict("backpack_cuda", name, column)
    assert found == LETTERS[ours], f"ours: {evidence!r}"
    if ours == "-":
        assert isinstance(evidence, NotImplementedError) and len(str(evidence)) > 40


@pytest.mark.parametrize("name", ROWS)
def test_all_quantities_at_once(name):
    """In one backward pass, in few columns at a time: each as if it were alone."""
    row, expected = ROWS[name], reference(name)
    columns = [column for column, ours in zip(COLUMNS, VERDICTS[name][1], strict=True) if LETTERS[ours] != RAISES]
    extensions = [getattr(bp.extensions, extension)() for column in columns for extension in COLUMNS[column]]
    model, loss_function = bp.extend(row.model("backpack_cuda")), bp.extend(row.loss().double())
    with bp.backpack(*extensions, memory_budget=300):
        loss_function(model(expected.inputs), expected.targets).backward()
    for parameter_name, parameter in model.named_parameters():
        for ext in extensions:
            value = getattr(parameter, ext.savefield)
            assert expected.is_right(parameter_name, ext.savefield, value, torch.float64) is not False, ext


def test_dropout_in_train_mode():
    """The same random mask in both libraries."""
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(4, (4,))

    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Dropout(0.4), nn.Linear(4, 4))

    names = ["BatchGrad", "DiagGGNExact", "SqrtGGNExact", "DiagHessian"]
    theirs, ours = (after_one_step(library, build, x, y, *names) for library in ("backpack", "backpack_cuda"))
    for other, mine in zip(theirs.parameters(), ours.parameters(), strict=True):
        for field in ("grad", "grad_batch", "diag_ggn_exact", "sqrt_ggn_exact", "diag_h"):
            torch.testing.assert_close(getattr(mine, field), getattr(other, field))


@pytest.mark.parametrize("name", [e for column, names in COLUMNS.items() for e in names if not column.endswith("MP")])
def test_batch_norm_in_train_mode(name):
    """Samples depend on each other: the summands of the gradient with a warning, or an error."""
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))

    def build():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    if name == "BatchGrad":
        theirs = after_one_step("backpack", build, x, y, name)
        with pytest.warns(UserWarning, match="mixes the samples"):
            ours = after_one_step("backpack_cuda", build, x, y, name)
        for other, mine in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(mine.grad_batch, other.grad_batch)
    else:
        for library in ("backpack", "backpack_cuda"):
            with pytest.raises(NotImplementedError):
                after_one_step(library, build, x, y, name)


@pytest.mark.parametrize("name", ["BatchGrad", "SqrtGGNExact", "SqrtGGNMC"])
@pytest.mark.parametrize("samples", [[0], [2, 0], [1, 1, 3], []], ids=str)
def test_subsampling(name, samples):
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))

    def build():
        return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))

    theirs, ours = (
        after_one_step(library, build, x, y, name, subsampling=samples) for library in ("backpack", "backpack_cuda")
    )
    field = getattr(bp.extensions, name)().savefield
    for other, mine in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert getattr(mine, field).shape == getattr(other, field).shape
        if name != "SqrtGGNMC":  # the draws differ
            torch.testing.assert_close(getattr(mine, field), getattr(other, field))

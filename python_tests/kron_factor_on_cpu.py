"""Runs the CUDA kernels of kron_factor on the CPU (csrc/harness) and compares them with float64 numpy.

A program, so that a fault cannot take the tests down and a sanitizer can be preloaded:

    kron_factor_on_cpu.py LIBRARY PRECISION LOADERS (full|small|faults) [--exact] [--small-tile]

PRECISION: tf32, tf32x3, bfloat16 or float16; LOADERS, joined by commas: channels, positions, elements; cases whose plan
wants another are left out. Exit status: 0 all right, 3 a wrong result, 4 an error reported by the harness. With --exact
buffers end where the operands end, for AddressSanitizer; otherwise NaN surrounds the operands, so that a read too far
changes the result. Prints how many cases ran, how many paths they took, and a checksum of all results.
"""

import ctypes
import hashlib
import sys
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
from contract_on_cpu import SENTINEL, aligned_buffer, patches, place, to_tf32
from outer_norm_on_cpu import decode, encode
from stats_on_cpu import Operand, Options

PATCHES, LAGS = 1, 2  # Options::way
LOADERS = {"channels": 2, "positions": 3, "elements": 4}  # Options::loader
CHANNELS, POSITIONS, ELEMENTS = LOADERS.values()
# Of KronPlan, as the entry points report them.
PLAN = ("way", "loader", "tile", "whole_copies", "final", "groups_per_tile", "items", "slabs", "workspace_bytes")
GEOMETRY = ("positions", "size", "kernel", "step", "padding", "dilation")
GUARD = 16


class Problem(ctypes.Structure):
    """KronProblem of csrc/cuda/kron_factor/kron_factor.h."""

    _fields_ = [
        ("element", ctypes.c_int),
        ("tf32", ctypes.c_bool),
        ("N", ctypes.c_int64),
        *[(name, ctypes.c_int) for name in ("groups", "channels")],
        *[(name, ctypes.c_int * 3) for name in GEOMETRY],
        ("x", Operand),
        ("homogeneous", ctypes.c_bool),
        *[(name, ctypes.c_float) for name in ("scale", "decay")],
        ("out", ctypes.c_void_p),
    ]


@dataclass
class Case:
    N: int
    C: int  # of one group
    size: tuple = (1, 1, 1)
    kernel: tuple = (1, 1, 1)
    step: tuple = (1, 1, 1)
    padding: tuple = (0, 0, 0)
    dilation: tuple = (1, 1, 1)
    positions: tuple = ()  # by default those of a convolution
    groups: int = 1
    layout: str = "channels_last"  # as in contract_on_cpu
    homogeneous: bool = False
    scale: float = 0.25
    decay: float = 0.0
    data: str = "normal"  # or integers, exact in every precision; positive, whose sums truncation would bias; special
    options: dict = field(default_factory=dict)
    sm_count: int = 1
    expect: dict = field(default_factory=dict)  # of the plan

    def __post_init__(self):
        if not self.positions:
            spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
            self.positions = tuple(
                (s + 2 * p - span) // t + 1
                for s, p, span, t in zip(self.size, self.padding, spans, self.step, strict=True)
            )

    @property
    def D(self):
        return self.C * prod(self.kernel)


def problem_of(case, precision, operand):
    elements = {"tf32": 0, "tf32x3": 0, "bfloat16": 1, "float16": 2}
    problem = Problem(elements[precision], precision == "tf32", case.N, case.groups, case.C)
    for name in GEOMETRY:
        setattr(problem, name, (ctypes.c_int * 3)(*getattr(case, name)))
    problem.x, problem.homogeneous, problem.scale, problem.decay = operand, case.homogeneous, case.scale, case.decay
    return problem


def draw(case, rng):
    shape = (case.N, case.groups * case.C, *case.size)
    if case.data == "integers":
        return rng.integers(-2, 3, shape).astype(np.float64)
    values = rng.standard_normal(shape)
    if case.data == "positive":
        return np.abs(values) + 0.5
    if case.data == "special":
        values.flat[3], values.flat[-1] = np.nan, np.inf
    return values


def rows_of(x, case):
    """[groups, N T, D] of x [N, groups C, 3 dims]."""
    if x.size == 0 or prod(case.positions) == 0:
        return np.zeros((case.groups, case.N * prod(case.positions), case.D))
    columns = patches(x.reshape(case.N, case.groups, case.C, *case.size), case)  # [N, groups, C, volume, T]
    return np.moveaxis(columns, (1, 4), (0, 2)).reshape(case.groups, -1, case.D)


def moments(rows, unrounded, homogeneous, inside=None):
    """[groups, D', D']: sum over the rows of x x^T; the homogeneous column sums entries as they are.

    inside: where entries are the input's, [groups, N T, D], if nothing is multiplied by the zeros outside.
    """
    groups, count, D = rows.shape
    result = np.full((groups, D + homogeneous, D + homogeneous), float(count), rows.dtype)
    if inside is None:
        result[:, :D, :D] = np.swapaxes(rows, 1, 2) @ rows
    else:
        both = inside[..., :, None] & inside[..., None, :]
        result[:, :D, :D] = np.where(both, rows[..., :, None] * rows[..., None, :], 0).sum(1)
    if homogeneous:
        result[:, D, :D] = result[:, :D, D] = unrounded.sum(1)
    return result


def plan_of(library, case, precision, operand):
    """What the plan chooses for a case, {name: value}."""
    chosen, options = (ctypes.c_int64 * len(PLAN))(), Options(**case.options)
    problem = problem_of(case, precision, operand)
    if library.run_kron_factor_plan(ctypes.byref(problem), case.sm_count, ctypes.byref(options), chosen):
        raise RuntimeError(library.cuda_on_cpu_last_error().decode())
    return dict(zip(PLAN, chosen, strict=True))


def check_case(library, precision, loaders, case, rng, exact, checksum, seen):
    """Runs one case; returns (exit status, explanation)."""
    dtype = precision if precision.endswith("float16") else "float32"
    x = draw(case, rng)
    x_buffer, operand = place(x, case.layout, dtype, exact)
    plan = plan_of(library, case, precision, operand)
    if plan["items"] and plan["loader"] not in loaders:
        return 0, ""
    problem = problem_of(case, precision, operand)
    size = case.D + case.homogeneous
    count = case.groups * size * size
    out_buffer, view = aligned_buffer(count + (0 if exact else GUARD), "float32", SENTINEL, exact)
    out = view[:count].reshape(case.groups, size, size)
    old = np.triu(rng.integers(-8, 9, out.shape) / 4.0)
    out[...] = np.nan  # what must not be read
    if case.decay:
        upper = np.triu_indices(size)
        out[(slice(None), *upper)] = old[(slice(None), *upper)]
    problem.out = view.ctypes.data
    chosen = (ctypes.c_int64 * len(PLAN))()
    options = Options(**case.options)
    if library.run_kron_factor(ctypes.byref(problem), case.sm_count, ctypes.byref(options), chosen):
        return 4, f"{case}: {library.cuda_on_cpu_last_error().decode()}"
    seen.add((plan["way"], plan["loader"], plan["tile"], plan["whole_copies"], plan["final"]))
    if any(plan[name] != value for name, value in case.expect.items()):
        return 3, f"{case}: the plan is {plan}"
    checksum.update(view.tobytes())
    before = (view.ctypes.data - out_buffer.ctypes.data) // 4
    if np.any(np.concatenate([out_buffer[:before], out_buffer[before + count :]]) != SENTINEL):
        return 3, f"{case} {plan}: written outside of the result"
    if not np.array_equal(out, np.swapaxes(out, 1, 2), equal_nan=True):
        return 3, f"{case} {plan}: got a result that is not symmetric"

    x = decode(encode(x, dtype), dtype)
    unrounded = rows = rows_of(x, case)
    if precision == "tf32":
        rows = rows_of(to_tf32(x).astype(np.float64), case)
    with np.errstate(invalid="ignore"):
        inside = None
        if case.data == "special" and plan["way"] == LAGS:
            inside = rows_of(np.ones_like(x), case) > 0
        sums = moments(rows, unrounded, case.homogeneous, inside)
        magnitude = moments(np.abs(rows), np.abs(unrounded), case.homogeneous, inside)
        old = old + np.swapaxes(np.triu(old, 1), 1, 2)
        expected = case.scale * sums + (case.decay * old if case.decay else 0)
        count_of_rows = rows.shape[1]
        # A term of the tensor cores is truncated some eight times; there is one per 64 rows (128 of 2 bytes).
        relative = 2.0**-23 * (8 + count_of_rows / 64) if case.data != "positive" else 6e-7
        if precision == "tf32x3":
            relative = 2.0**-20 + 2.0**-24 * count_of_rows / 8 if case.data != "positive" else 6e-7
        tolerance = case.scale * relative * magnitude + 2.0**-22 * np.abs(expected)
        if case.data == "integers":
            expected, tolerance = expected.astype(np.float32), 0 * tolerance
        wrong = ~(np.abs(out - expected) <= tolerance) & (np.isfinite(expected) | np.isfinite(out))
    if np.any(wrong):
        at = tuple(map(int, np.argwhere(wrong)[0]))
        return 3, f"{case} {plan}{list(at)}: {wrong.sum()} wrong, got {out[at]}, expected {expected[at]}"
    if precision == "tf32x3" and case.data == "normal" and case.scale * magnitude.max() > 0:
        x32 = unrounded.astype(np.float32)
        plain = case.scale * moments(x32, x32, case.homogeneous) + (case.decay * old if case.decay else 0)
        floor = 2.0**-20 * np.abs(expected).max()
        error, plain_error = np.abs(out - expected).max(), np.abs(plain - expected).max()
        if error > 2 * plain_error + floor:
            return 3, f"{case} {plan}: error {error}, but {plain_error} in plain float32"
    return 0, ""


# ---- the cases ----

LAST, LAST_ODD, FIRST, FIRST_ODD = "channels_last", "channels_last_odd", "channels_first", "channels_first_odd"


def geometries():
    """What distinguishes convolutions, and the segments of their lags; C is left to the cases."""

    def conv(size, kernel, padding=0, step=1, dilation=1, **more):
        def three(value, missing):
            values = value if isinstance(value, tuple) else (value,) * len(size)
            return (missing,) * (3 - len(size)) + values

        return dict(
            size=three(size, 1),
            kernel=three(kernel, 1),
            padding=three(padding, 0),
            step=three(step, 1),
            dilation=three(dilation, 1),
            **more,
        )

    yield conv((6, 7), 3, padding=1)
    yield conv((7, 6), 3, padding=1, step=2)
    yield conv((8, 9), 3, padding=2, dilation=2)
    yield conv((9, 8), 3, padding=(2, 1), step=2, dilation=(2, 1))
    yield conv((5, 6), (3, 2))
    yield conv((9,), 7, padding=3)
    yield conv((14,), 5, padding=2, step=3)
    yield conv((5, 6), 5, padding=2)
    yield conv((4, 3, 5), (2, 3, 2), padding=(0, 1, 1))
    yield conv((2, 2), 3, padding=2)  # patches that miss the input
    yield conv((5, 4), 3, padding=(-1, 1), positions=(1, 1, 4))
    yield conv((5, 4), 2, padding=(-1, 3), positions=(1, 6, 2))
    yield conv((6, 5), 3, padding=1, step=(2, 1), positions=(1, 3, 3))
    yield conv((6, 7), 1, step=2)
    yield conv((5, 4), 1, padding=1)


def cases(precision, size):
    half = precision.endswith("float16")
    large = 0 if precision == "tf32x3" else 2

    def linear(N, D, **more):
        return Case(1, D, size=(1, 1, N), **more)

    square = {"kernel": (1, 3, 3), "padding": (0, 1, 1)}
    if size != "full":
        yield linear(37, 72, homogeneous=True, decay=0.5)
        yield linear(150, 24, options={"splits": 2}, homogeneous=True)
        yield linear(700, 35, layout=LAST_ODD, options={"splits": 21}, homogeneous=True)
        yield linear(90, 69, layout=LAST_ODD, decay=0.75)
        yield Case(2, 16, (1, 6, 7), **square, options={"way": LAGS}, homogeneous=True)
        yield Case(2, 5, (1, 6, 5), **square, layout=FIRST, options={"way": LAGS, "splits": 2}, decay=0.5)
        yield Case(3, 8, (1, 7, 6), (1, 3, 2), (1, 2, 1), (0, 1, 1), groups=2, options={"way": PATCHES})
        yield Case(2, 8, (1, 1, 8), layout=FIRST, homogeneous=True, expect={"whole_copies": 1})
        yield Case(3, 1, (1, 2, 5), layout="channels_first_padded", expect={"whole_copies": 0})
        yield Case(2, 3, (1, 5, 4), (1, 2, 3), groups=4, layout=FIRST, data="integers", homogeneous=True)
        yield Case(3, 3, (1, 5, 4), (1, 3, 3), (1, 2, 2), (0, 1, 1), layout=FIRST_ODD, options={"way": LAGS})
        if size == "small":
            yield linear(40, 136, options={"tile": large})
            yield Case(2, 40, (1, 4, 4), **square, layout=FIRST, options={"tile": large, "way": PATCHES})
        else:
            yield linear(9000, 5, data="positive", options={"splits": 1})
            yield linear(600, 68, options={"splits": 1}, layout=LAST_ODD)
            yield linear(200, 65, layout=FIRST, options={"splits": 3}, homogeneous=True)
            yield linear(35, 8, data="special", options={"loader": ELEMENTS})
        return

    # Every geometry, both ways, every loader and what goes with the results.
    for j, geometry in enumerate(geometries()):
        for way in (PATCHES, LAGS):
            for k, (C, layout, loader) in enumerate(
                [(8, LAST, CHANNELS), (5, FIRST, POSITIONS), (3, FIRST_ODD, ELEMENTS), (8, LAST_ODD, 0)]
            ):
                case = Case(1 + (j + k) % 3, C, **geometry, layout=layout, groups=1 + (j + k) % 2)
                case.homogeneous, case.decay = (j + k + way) % 2 == 0, (0, 0.5, 1.25)[(j + way) % 3]
                case.data = ("normal", "integers")[(j + k) // 2 % 2]
                case.options = {"way": way, "loader": loader, "splits": (0, 2, 5)[(j + 2 * k) % 3]}
                case.expect = {"way": way if prod(case.kernel) > 1 else PATCHES}
                yield case
    # Linear layers: tiles, splits, depths of a slab.
    for j, N in enumerate([1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65, 129]):
        for k, D in enumerate([1 + 17 * j % 70, 8 * (1 + 3 * j % 18)]):
            layout = (LAST, LAST_ODD, FIRST, FIRST_ODD)[(j + k) % 4]
            options = {"tile": (1, 2)[(j + k) % 2], "splits": (0, 1, 3)[j % 3]}
            yield linear(N, D, layout=layout, homogeneous=j % 2 == 0, decay=(0, 0.9)[k], options=options)
            yield linear(N, D, layout=layout, homogeneous=j % 2 == 1, options=options, data="integers")
    for tile in (1, 2):
        for layout in (LAST, LAST_ODD, FIRST, FIRST_ODD):
            for splits in (1, 2):
                yield Case(3, 12, (1, 5, 6), **square, layout=layout, options={"tile": tile, "splits": splits})
        yield Case(2, 136, (1, 4, 3), **square, options={"tile": tile, "way": LAGS})
        yield Case(2, 70, (1, 4, 3), **square, layout=FIRST, options={"tile": tile, "way": LAGS}, homogeneous=True)
        yield linear(70, 200, options={"tile": tile, "splits": 1}, homogeneous=True, expect={"final": 1})
        yield linear(70, 200, options={"tile": tile, "splits": 3}, homogeneous=True, decay=0.5, layout=FIRST)
    for splits in (9, 20, 40, 300):  # ways of adding them
        yield linear(5000, 33, layout=FIRST_ODD, options={"splits": splits}, homogeneous=True, decay=0.5)
    # Samples whose positions are copied whole, and samples where they are not.
    for T in (8, 24, 12, 10):
        for C in (3, 66):
            whole = T % (8 if half else 4) == 0
            yield Case(3, C, (1, 2, T // 2), layout=FIRST, homogeneous=True, expect={"whole_copies": whole})
    # Groups: many in a tile, a last tile with fewer, too large for that.
    for groups, C, layout in [(9, 1, FIRST), (40, 1, LAST), (5, 4, LAST), (3, 8, LAST), (17, 3, FIRST_ODD)]:
        for homogeneous in (False, True):
            case = Case(2, C, (1, 4, 5), **square, groups=groups, layout=layout, homogeneous=homogeneous)
            yield replace(case, decay=0.5 * homogeneous)
            yield replace(case, data="integers", options={"way": LAGS if C > 4 else PATCHES, "splits": 2})
    # Operands far apart, and long sums.
    yield Case(2, 8, (1, 3, 4), **square, layout="channels_last_far", options={"way": LAGS})
    yield Case(2, 3, (1, 3, 4), **square, layout="channels_first_far")
    for layout in (LAST, FIRST):
        yield linear(9000, 5, data="positive", layout=layout, options={"splits": 1}, homogeneous=True)
    yield linear(9000, 8, data="positive", sm_count=8)
    for way in (PATCHES, LAGS):
        yield Case(3, 8, (1, 5, 6), **square, data="special", options={"way": way}, homogeneous=True)
    # Nothing to sum over.
    for nothing in ({"N": 0}, {"positions": (1, 0, 4)}, {"size": (1, 0, 4), "positions": (1, 2, 2)}):
        for decay in (0, 0.5):
            case = {"N": 2, "C": 3, "size": (1, 3, 4), **square, "homogeneous": True, "data": "integers", **nothing}
            yield Case(**case, decay=decay, expect={"items": 0})


def main():
    path, precision, loaders, size = sys.argv[1:5]
    loaders = [LOADERS[name] for name in loaders.split(",")]
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    checksum, count, seen, rng = hashlib.sha256(), 0, set(), np.random.default_rng(0)
    for case in cases(precision, size):
        if "--small-tile" in sys.argv:
            case.options = {**case.options, "tile": 1}
        status, explanation = check_case(library, precision, loaders, case, rng, "--exact" in sys.argv, checksum, seen)
        if status:
            print(explanation)
            sys.exit(status)
        count += 1
    print(count, "cases", len(seen), "paths", checksum.hexdigest())


if __name__ == "__main__":
    main()

"""Runs the CUDA kernel of depthwise_stats on the CPU (csrc/harness) and compares it with float64 numpy.

    depthwise_on_cpu.py LIBRARY DTYPE (small|full) [--exact]

Exit status: 0 all right, 3 a wrong result, 4 an error reported by the harness, 5 a part of the kernel that no case
reached. With --exact buffers end where the operands end, for AddressSanitizer.
"""

import ctypes
import itertools
import sys
from dataclasses import dataclass, replace

import numpy as np
from stats_on_cpu import (
    BATCH_GRAD,
    BATCH_L2,
    CENTERED,
    ELEMENTS,
    EVERYTHING,
    GRAD,
    SQUARES,
    WEIGHTED,
    Operand,
    Options,
    OuterProblem,
    Outputs,
    StatsOutputs,
    decode,
    place,
    place_apart,
)

THREE_INTS = ctypes.c_int * 3


N_DIM, C_DIM, D_DIM, H_DIM, W_DIM = range(5)
# (dims from the outermost to the innermost in memory, elements between neighbours)
LAYOUTS = {
    "nchw": ((0, 1, 2, 3, 4), 1),
    "channels_last": ((0, 2, 3, 4, 1), 1),
    "spread": ((0, 1, 2, 3, 4), 2),
    "samples_last": ((1, 4, 3, 2, 0), 1),
    "channels_last_spread": ((2, 0, 3, 4, 1), 3),
    "one_column": ((0, 1, 2, 3), 1),  # stride 0 along w
}
# Strides beyond 32 bits: of samples and channels, of rows, of columns. For bfloat16.
APART = {
    "samples_apart": ((1 << 31) + 9, (1 << 32) + 5, 1, 9, 1),
    "rows_apart": (1, 7, 1, (1 << 31) + 9, 99),
    "columns_apart": (7, 1, 1, 99, (1 << 31) + 9),
}


@dataclass
class Case:
    N: int
    groups: int
    O: int  # noqa: E741
    channels: int
    positions: tuple
    kernel: tuple
    step: tuple = (1, 1, 1)
    padding: tuple = (0, 0, 0)
    dilation: tuple = (1, 1, 1)
    more: int = 0  # elements of a behind the last window
    layouts: tuple = ("nchw", "nchw")  # of a and b
    want: int = EVERYTHING
    splits: int = 0
    sm_count: int = 2
    values: str = "normal"
    seed: int = 0

    def size(self):
        """Of a."""
        dims = zip(self.positions, self.kernel, self.step, self.padding, self.dilation, strict=True)
        return tuple(max(1, (p - 1) * s + (k - 1) * d + 1 - 2 * pad + self.more) for p, k, s, pad, d in dims)


def cases(dtype, size):
    """Yields the cases; together they reach every part of the kernel."""
    last, first = ("channels_last", "channels_last"), ("nchw", "nchw")
    square = Case(3, 5, 1, 1, (1, 6, 9), (1, 3, 3), padding=(0, 1, 1))
    yield square
    yield replace(square, layouts=last, splits=2)
    yield replace(square, kernel=(1, 5, 5), padding=(0, 2, 2), layouts=last, groups=9)
    yield replace(square, kernel=(1, 7, 7), padding=(0, 3, 3), splits=3, N=4)
    yield replace(square, step=(1, 2, 2), want=GRAD | SQUARES | BATCH_L2, O=2)
    yield Case(2, 40, 1, 1, (1, 1, 13), (1, 1, 4), padding=(0, 0, 3), want=SQUARES | CENTERED)
    yield replace(square, want=WEIGHTED, splits=2, values="integers")
    yield replace(square, N=35, positions=(1, 2, 2), want=GRAD | BATCH_L2, layouts=last)
    yield replace(square, N=1, groups=1, positions=(1, 37, 41), sm_count=132)  # more than a warp of slots
    yield replace(square, N=2, groups=40, layouts=last, positions=(1, 9, 8), values="integers")
    if size == "small":
        return
    kernels = [
        (1, 3, 3),
        (1, 5, 5),
        (1, 7, 7),
        (1, 1, 1),
        (1, 1, 9),
        (1, 2, 5),
        (1, 4, 2),
        (1, 6, 1),
        (1, 9, 3),
        (3, 3, 3),
    ]
    kernels += [(2, 1, 3), (1, 3, 1), (1, 8, 8)]
    positions = [(1, 7, 7), (1, 1, 1), (1, 13, 5), (1, 1, 50), (1, 3, 33), (3, 4, 5), (1, 20, 2), (2, 1, 6)]
    groups = [(1, 1, 1), (3, 2, 1), (2, 1, 3), (33, 1, 1), (2, 3, 2), (1, 8, 8), (7, 1, 1)]
    layouts = list(LAYOUTS)
    pairs = [first, last, ("spread", "channels_last"), ("samples_last", "one_column"), ("one_column", "spread")]
    pairs += [("channels_last_spread", "nchw"), ("nchw", "channels_last_spread"), last, first]
    assert {layout for pair in pairs for layout in pair} == set(layouts)
    wants = [EVERYTHING, GRAD, BATCH_GRAD, BATCH_L2, SQUARES, CENTERED, GRAD | CENTERED, BATCH_L2 | SQUARES, WEIGHTED]
    for j, kernel in enumerate(kernels * 8):
        rng = np.random.default_rng(j)
        pick = lambda *values, rng=rng: values[rng.integers(len(values))]  # noqa: E731
        yield Case(
            N=pick(1, 2, 3, 5),
            **dict(zip(("groups", "O", "channels"), groups[j % len(groups)], strict=True)),
            positions=positions[(j + j // 13) % len(positions)],
            kernel=kernel,
            step=tuple(pick(1, 1, 1, 2, 3) for _ in range(3)),
            padding=tuple(int(rng.integers(k + 2)) for k in kernel),
            dilation=tuple(pick(1, 1, 2, 3) for _ in range(3)),
            more=pick(0, 0, 1, 4),
            layouts=pairs[(j + j // 9) % len(pairs)],
            want=pick(*wants, EVERYTHING, EVERYTHING),
            splits=pick(0, 0, 1, 2, 4),
            sm_count=pick(1, 2, 132) if j % 13 else 2,
            values=pick("normal", "normal", "integers"),
            seed=j,
        )
    if dtype == "bfloat16":
        for layout in APART:
            yield Case(2, 2, 1, 1, (1, 3, 3), (1, 3, 2), padding=(0, 1, 0), layouts=(layout, layout))
    for layout in (first, last):
        yield replace(square, layouts=layout, values="special", N=4)
        yield replace(square, layouts=layout, values="special", N=4, splits=2, want=SQUARES | GRAD | BATCH_L2)
        yield replace(square, layouts=layout, values="offset", N=9, want=SQUARES | CENTERED | GRAD, splits=2)
    yield replace(square, N=70, positions=(1, 1, 1), kernel=(1, 1, 1), padding=(0, 0, 0), splits=1)
    yield replace(square, positions=(1, 17, 19), groups=34, N=1, sm_count=1)
    yield replace(square, positions=(1, 64, 60), groups=2, N=1, dilation=(1, 2, 1), sm_count=132)
    yield replace(square, positions=(1, 64, 60), groups=2, N=1, layouts=last, sm_count=132, kernel=(2, 4, 7))


def draw(case, shape, rng):
    if case.values == "integers":
        return rng.integers(-3, 4, shape).astype(np.float64)
    return rng.standard_normal(shape)


def per_sample_gradients(a, b, case):
    """[N, groups * O, channels, *kernel] in float64, one position of the kernel after the other."""
    N, size, positions = case.N, a.shape[2:], case.positions
    G = np.zeros((N, case.groups, case.O, case.channels, *case.kernel))
    b = b.reshape(N, case.groups, case.O, -1)
    for k in itertools.product(*map(range, case.kernel)):
        at = [np.arange(positions[d]) * case.step[d] + k[d] * case.dilation[d] - case.padding[d] for d in range(3)]
        window = a
        for d in range(3):
            inside = (at[d] >= 0) & (at[d] < size[d])
            window = np.take(window, np.where(inside, at[d], 0), axis=2 + d)
            mask = inside.reshape([-1 if axis == 2 + d else 1 for axis in range(5)])
            window = np.where(mask, window, 0)
        window = window.reshape(N, case.groups, case.channels, -1)
        G[(..., *k)] = (b[:, :, :, None] * window[:, :, None]).sum(-1)
    return G.reshape(N, -1)


def check_case(library, dtype, case, exact):
    """Runs one case; returns (exit status, explanation, choices of the plan)."""
    rng = np.random.default_rng(case.seed)
    a = draw(case, (case.N, case.groups * case.channels, *case.size()), rng)
    b = draw(case, (case.N, case.groups * case.O, *case.positions), rng)
    if case.values == "special":
        a[1, 0, 0, 0, 0], b[2, 1, 0, 0, 0], b[3, 2, 0, -1, -1] = np.nan, np.inf, -np.inf
    if case.values == "offset":  # samples alike: plain squares minus N mean^2 would cancel
        a, b = 8 + a[:1] + 0.01 * a, 3 + b[:1] + 0.01 * b
    placed = []
    for values, layout in zip((a, b), case.layouts, strict=True):
        if layout in APART:
            placed.append(place_apart(values, APART[layout]))
            continue
        order, spread = LAYOUTS[layout]
        if W_DIM not in order:
            values[...] = values[..., :1]
        placed.append(place(values, order, spread, dtype, exact))
    with np.errstate(invalid="ignore"):
        operands = [decode(view, dtype) for _, view, _ in placed]
        G = per_sample_gradients(*operands, case)
        magnitude = per_sample_gradients(*map(np.abs, operands), case)
    outputs = Outputs(*G.shape, dtype, case.want, weights=rng.integers(-2, 3, case.N))
    structures = [
        Operand(buffer.ctypes.data, strides[0], strides[1], (ctypes.c_int64 * 3)(*strides[2:]))
        for buffer, _, strides in placed
    ]
    dims = [case.positions, case.size(), case.kernel, case.step, case.padding, case.dilation]
    problem = OuterProblem(
        *(ELEMENTS[dtype], False, case.N, case.groups, case.O, case.channels),
        *[THREE_INTS(*values) for values in dims],
        *structures,
    )
    chosen = (ctypes.c_int64 * 8)()
    options = Options(splits=case.splits)
    arguments = [ctypes.byref(x) for x in (problem, outputs.structure)] + [case.sm_count, ctypes.byref(options), chosen]
    if library.run_depthwise(*arguments):
        return 4, f"{case}: {library.cuda_on_cpu_last_error().decode()}", None
    wrong = outputs.wrong(G, magnitude, exact=case.values == "integers")
    return (3, f"{case}, plan {list(chosen)}: {wrong}", None) if wrong else (0, "", tuple(chosen))


def not_reached(plans):
    """What no plan has chosen."""
    boxes = {(box, bool(along_units)) for box, along_units, *_ in plans}
    missing = [
        f"box {box}, lanes along units: {along}" for box in range(5) for along in (0, 1) if (box, along) not in boxes
    ]
    columns = dict(zip(("along", "slots", "units", "unit_blocks", "chunk_blocks", "splits"), range(1, 7), strict=True))
    for name, low, high in [
        ("slots", 4, 16),
        ("slots", 32, 32),
        ("slots", 64, 256),
        ("units", 1, 1),
        ("units", 64, 64),
        ("unit_blocks", 2, 99),
        ("chunk_blocks", 2, 99),
        ("splits", 2, 99),
    ]:
        if not any(low <= plan[columns[name]] <= high for plan in plans):
            missing.append(f"{name} from {low} to {high}")
    return missing


def main():
    path, dtype, size = sys.argv[1:4]
    assert ctypes.sizeof(StatsOutputs) == 48
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    plans = []
    for case in cases(dtype, size):
        status, explanation, plan = check_case(library, dtype, case, "--exact" in sys.argv)
        if status:
            print(explanation)
            sys.exit(status)
        plans.append(plan)
    missing = not_reached(plans) if size == "full" else []
    print(len(plans), "cases", *missing)
    sys.exit(5 if missing else 0)


if __name__ == "__main__":
    main()

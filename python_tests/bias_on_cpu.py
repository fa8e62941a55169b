"""Runs the CUDA kernels of bias_stats on the CPU (csrc/harness) and compares them with float64 numpy.

    bias_on_cpu.py LIBRARY DTYPE (small|full) [--exact]

Exit status: 0 all right, 3 a wrong result, 4 an error reported by the harness, 5 a part of the kernels that no case
reached. With --exact buffers end where the operand ends, for AddressSanitizer.
"""

import ctypes
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
    Options,
    Outputs,
    decode,
    place,
    place_apart,
)


class BiasProblem(ctypes.Structure):
    """Of csrc/cuda/bias/bias.h."""

    _fields_ = [
        ("element", ctypes.c_int),
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("N",)],
        ("O", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("stride_n", "stride_o")],
        *[(name, ctypes.c_int64 * 3) for name in ("size", "stride")],
    ]


# Dims (n, o, three of positions): (from the outermost to the innermost in memory, elements between neighbours)
LAYOUTS = {
    "nchw": ((0, 1, 2, 3, 4), 1),
    "channels_last": ((0, 2, 3, 4, 1), 1),
    "spread": ((0, 1, 2, 3, 4), 2),
    "samples_last": ((1, 4, 3, 2, 0), 1),
    "positions_first": ((2, 3, 4, 0, 1), 1),
    "turned": ((0, 4, 1, 3, 2), 1),
    "expanded": ((0, 1, 2, 3), 1),  # stride 0 along the last position dim
}
# Strides beyond 32 bits, of each dim in turn. For bfloat16.
APART = {
    "samples_apart": ((1 << 32) + 9, 1, 50, 7, 5),
    "outputs_apart": (1, (1 << 31) + 9, 50, 7, 5),
    "positions_apart": (3, 1, 1 << 32, 7, (1 << 31) + 8),
}


@dataclass
class Case:
    N: int
    O: int  # noqa: E741
    positions: tuple
    layout: str = "nchw"
    offset: int = 0  # elements before the operand
    want: int = EVERYTHING
    splits: int = 0
    t_splits: int = 0
    sm_count: int = 2
    values: str = "normal"
    seed: int = 0


def cases(dtype, size):
    """Yields the cases; together they reach every part of the kernels."""
    yield Case(9, 16, (1, 1, 1), splits=2)
    yield Case(35, 37, (1, 1, 1), want=GRAD | BATCH_L2 | SQUARES, splits=1)
    yield Case(3, 24, (1, 2, 3), layout="channels_last")
    yield Case(3, 40, (1, 6, 8), layout="nchw", want=GRAD | CENTERED, splits=2)
    yield Case(2, 40, (1, 1, 33), layout="channels_last", splits=1)
    yield Case(2, 3, (1, 1, 700), t_splits=3)
    yield Case(1, 8, (1, 1, 300), layout="channels_last", t_splits=3, sm_count=64, values="integers")
    yield Case(2, 16, (3, 4, 5), layout="spread", want=WEIGHTED)
    yield Case(2, 2, (1, 9, 99), sm_count=132)
    if size == "small":
        return
    yield Case(3, 1000, (1, 1, 1), sm_count=132)
    yield Case(1, 2200, (1, 1, 1))
    yield Case(2, 300, (1, 1, 20), layout="channels_last")
    yield Case(2, 1, (40, 5, 50), layout="turned", sm_count=132)
    yield Case(1, 2, (1, 1, 40000))
    yield Case(1, 16, (1, 1, 9000), layout="channels_last", sm_count=132)
    yield Case(1, 17, (1, 1, 5000), layout="channels_last", sm_count=8)
    for seed in range(150):
        rng = np.random.default_rng(seed)
        pick = lambda *values, rng=rng: values[rng.integers(len(values))]  # noqa: E731
        yield Case(
            N=pick(1, 2, 3, 5, 37),
            O=pick(1, 2, 3, 8, 16, 31, 33, 64, 72),
            positions=pick(
                (1, 1, 1), (1, 1, 2), (2, 2, 2), (1, 1, 9), (1, 7, 7), (1, 8, 8), (3, 5, 7), (2, 1, 64), (1, 1, 515)
            ),
            layout=pick("nchw", "channels_last", *LAYOUTS),
            offset=pick(0, 0, 1),
            want=pick(
                EVERYTHING, EVERYTHING, GRAD, BATCH_GRAD, BATCH_L2, SQUARES, CENTERED, SQUARES | BATCH_L2, WEIGHTED
            ),
            splits=pick(0, 0, 1, 2, 4),
            t_splits=pick(0, 0, 0, 2, 5),
            sm_count=pick(1, 2, 132) if seed % 9 == 0 else pick(1, 2),
            values=pick("normal", "normal", "integers"),
            seed=seed,
        )
    if dtype == "bfloat16":
        for layout in APART:
            yield Case(2, 3, (2, 1, 2), layout=layout)
            yield Case(3, 2, (2, 3, 3), layout=layout)
    for layout in ("nchw", "channels_last"):
        for positions in ((1, 1, 1), (1, 1, 40)):
            special = Case(6, 8, positions, layout=layout, values="special")
            yield special
            yield replace(special, t_splits=2, splits=2, want=GRAD | SQUARES | BATCH_L2)
            yield replace(special, values="offset", splits=2, want=SQUARES | CENTERED | GRAD)


def draw(case, shape, rng):
    if case.values == "integers":
        return rng.integers(-3, 4, shape).astype(np.float64)
    values = rng.standard_normal(shape)
    if case.values == "special":
        values[1, 0, 0, 0, 0], values[2, 1, 0, 0, 0], values[3, 2, 0, 0, -1] = np.nan, np.inf, -np.inf
        values[4, 3, 0, 0, 0], values[4, 4, 0, 0, -1] = np.inf, -np.inf
    if case.values == "offset":  # samples alike: plain squares minus N mean^2 would cancel
        values = 8 + values[:1] + 0.01 * values
    return values


def run(library, dtype, case, values, exact):
    """Runs one case; returns (error or None, the stored operand in float64, the outputs, choices of the plan)."""
    if case.layout in APART:
        buffer, view, strides = place_apart(values, APART[case.layout])
    else:
        order, spread = LAYOUTS[case.layout]
        if 4 not in order:
            values[...] = values[..., :1]
        buffer, view, strides = place(values, order, spread, dtype, exact, case.offset)
    rng = np.random.default_rng(case.seed)
    outputs = Outputs(case.N, case.O, dtype, case.want, weights=rng.integers(-2, 3, case.N))
    problem = BiasProblem(
        ELEMENTS[dtype],
        buffer.ctypes.data + case.offset * buffer.itemsize,
        *(case.N, case.O, *strides[:2]),
        (ctypes.c_int64 * 3)(*case.positions),
        (ctypes.c_int64 * 3)(*strides[2:]),
    )
    chosen = (ctypes.c_int64 * 9)()
    options = Options(splits=case.splits, t_splits=case.t_splits)
    arguments = [ctypes.byref(x) for x in (problem, outputs.structure)] + [case.sm_count, ctypes.byref(options), chosen]
    error = library.cuda_on_cpu_last_error().decode() if library.run_bias(*arguments) else None
    return error, decode(view, dtype), outputs, tuple(chosen)


def check_case(library, dtype, case, exact):
    """Returns (exit status, explanation, choices of the plan)."""
    values = draw(case, (case.N, case.O, *case.positions), np.random.default_rng(case.seed))
    error, operand, outputs, chosen = run(library, dtype, case, values, exact)
    if error:
        return 4, f"{case}: {error}", None
    with np.errstate(invalid="ignore"):
        G, magnitude = operand.sum((2, 3, 4)), np.abs(operand).sum((2, 3, 4))
    wrong = outputs.wrong(G, magnitude, exact=case.values == "integers")
    return (3, f"{case}, plan {list(chosen)}: {wrong}", None) if wrong else (0, "", chosen)


def check_accuracy(library, dtype, exact):
    """Long sums of float32 must be about as accurate as numpy's pairwise ones; returns (exit status, explanation)."""
    errors = []
    for layout in ("nchw", "channels_last"):
        for positions, N, options in (
            ((1, 1, 65536), 1, {}),
            ((1, 181, 179), 2, {"sm_count": 1}),
            ((1, 1, 9999), 3, {}),
        ):
            case = Case(N, 8, positions, layout=layout, want=BATCH_GRAD, **options)
            values = 1 + np.random.default_rng(0).standard_normal((N, 8, *positions))
            error, operand, outputs, _ = run(library, dtype, case, values, exact)
            if error:
                return 4, f"{case}: {error}"
            G = operand.sum((2, 3, 4))
            got = outputs.buffers["batch_grad"][: G.size].reshape(G.shape)
            rows = np.ascontiguousarray(operand.astype(np.float32)).reshape(N, 8, -1)
            pairwise = rows.sum(-1)
            errors.append([np.sqrt(np.mean((x.astype(np.float64) - G) ** 2)) for x in (got, pairwise)])
            if errors[-1][0] > 2 * errors[-1][1]:
                return 3, f"{case}: error {errors[-1][0]}, of numpy's sum {errors[-1][1]}"
    return 0, f"root mean square errors against numpy's: {[f'{a / b:.2f}' for a, b in errors]}"


def not_reached(plans):
    """What no plan has chosen."""
    names = ("along", "vector_outputs", "vector_positions", "slots", "units", "unit_blocks", "splits", "t_splits")
    records = [dict(zip(names, plan[:8], strict=True)) for plan in plans]
    wanted = [
        *[{"slots": slots, "along": 1} for slots in (1, 8, 32)],
        *[{"slots": slots, "along": 0} for slots in (2, 32, 256)],
        *[{"slots": 1, "vector_outputs": vector} for vector in (0, 1)],
        *[{"slots": 8, "along": 1, "vector_outputs": vector} for vector in (0, 1)],
        *[{"along": 0, "vector_positions": vector} for vector in (0, 1)],
        *[{"unit_blocks": 2}, {"splits": 2}, {"t_splits": 2}, {"slots": 8, "units": 4}],
    ]
    return [str(w) for w in wanted if not any(w.items() <= record.items() for record in records)]


def main():
    path, dtype, size = sys.argv[1:4]
    exact = "--exact" in sys.argv
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    plans, text = [], ""
    for case in cases(dtype, size):
        status, explanation, plan = check_case(library, dtype, case, exact)
        if status:
            print(explanation)
            sys.exit(status)
        plans.append(plan)
    if dtype == "float32" and size == "full":
        status, text = check_accuracy(library, dtype, exact)
        if status:
            print(text)
            sys.exit(status)
    missing = not_reached(plans) if size == "full" else []
    print(len(plans), "cases", text, *missing)
    sys.exit(5 if missing else 0)


if __name__ == "__main__":
    main()

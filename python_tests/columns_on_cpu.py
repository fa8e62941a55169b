"""Runs the CUDA kernels of columns on the CPU (csrc/harness) and compares them with float64 numpy.

    columns_on_cpu.py LIBRARY PRECISION LOADERS (full|small) [--exact] [--small-tile]

As contract_on_cpu.py, whose problems, memory and exit status these are, for G_vn of V columns in the place of G_n.
LOADERS may also name `depthwise`, the kernel without tensor cores, and `sums`, the pass over gradients in memory.
"""

import ctypes
import hashlib
import sys
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from contract_on_cpu import (
    DEPTH,
    LOADERS,
    SENTINEL,
    Case,
    aligned_buffer,
    draw,
    geometries,
    outer_problem,
    per_sample_gradients,
    place,
    result_buffer,
    shape,
    to_tf32,
)
from outer_norm_on_cpu import decode, encode
from stats_on_cpu import ELEMENTS, ColumnOutputs, Options

RESULTS = ["factor", "batch_diag", "diag"]
WANTS = [("diag",), ("batch_diag",), ("factor",), ("batch_diag", "diag"), tuple(RESULTS)]
COLUMNS_PLAN = ("loader", "tile", "splits", "t_splits", "packed", "keep_a", "keep_b", "workspace_bytes")


class GradientsInMemory(ctypes.Structure):
    """Of csrc/cuda/columns/column_sums.h."""

    _fields_ = [
        ("element", ctypes.c_int),
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("N", "count")],
        ("parts", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("stride_v", "stride_n", "stride_element", "stride_part")],
    ]


@dataclass
class ColumnCase(Case):
    V: int = 2
    of: str = "b"  # the operand that has columns; b for layers, a for transposed convolutions, both, or neither
    n_major: bool = False  # in memory
    signs: bool = False
    depthwise: bool = False


def spread_columns(values, case):
    """[V, N, ...] -> [V N, ...] in the order of memory."""
    return (
        np.swapaxes(values, 0, 1).reshape(-1, *values.shape[2:])
        if case.n_major
        else values.reshape(-1, *values.shape[2:])
    )


def place_operand(values, name, case, dtype, exact):
    """Stores values [V, N, channels, 3 dims], those of v = 0 where it has no columns: (buffer, Operand, stride_v)."""
    if case.of not in (name, "both"):
        return *place(values[0], case.layout, dtype, exact), 0
    buffer, operand = place(spread_columns(values, case), case.layout, dtype, exact)
    inner = operand.stride_n
    if case.n_major:
        operand.stride_n = case.V * inner
        return buffer, operand, inner
    return buffer, operand, case.N * inner


def column_statistics(G, signs):
    """Of G [V, N, R, I] and signs [V, N]."""
    squares = signs[:, :, None, None] * G**2
    return {"factor": G, "batch_diag": squares.sum(0), "diag": squares.sum((0, 1))}


def error_bounds(G, S, signs, case, precision):
    """Of each result: what the roundings of the kernel may add up to. S = sum_t |b| |a|."""
    u = 2.0**-23  # products truncate
    g = (prod(case.positions) / (1 if case.depthwise else DEPTH[precision]) + 2) * u * S + 1e-37
    if precision == "tf32x3":
        g = g + 2.0**-20 * S
    signs = np.abs(signs)[:, :, None, None]
    squares = signs * ((2 * np.abs(G) + g) * g + (case.V + case.N + 4) * u * G**2)
    return {"factor": g, "batch_diag": squares.sum(0), "diag": squares.sum((0, 1))}


def results_of(case, dtype, shapes, exact):
    """(buffers, ColumnOutputs, what must stay alive, signs [V, N])."""
    rng = np.random.default_rng(case.V + case.N)
    signs = rng.integers(-2, 3, (case.V, case.N)) / 2.0 if case.signs else np.ones((case.V, case.N))
    dtypes = {"factor": dtype, "batch_diag": "float32", "diag": "float32"}
    buffers = {name: (*result_buffer(shapes[name], dtypes[name], exact), dtypes[name]) for name in case.want}
    outputs = ColumnOutputs(V=case.V, **{name: view.ctypes.data for name, (_, view, _) in buffers.items()})
    buffer, view = aligned_buffer(signs.size, "float32", np.nan, exact)
    view[...] = signs.ravel()
    if case.signs:
        outputs.signs = view.ctypes.data
    return buffers, outputs, buffer, signs


def compare(buffers, shapes, expected, bounds, exactly, checksum):
    """What is wrong, or None."""
    for name, (buffer, view, dtype) in buffers.items():
        count = prod(shapes[name])
        got, want = decode(view[:count], dtype).reshape(shapes[name]), expected[name]
        checksum.update(view.tobytes())
        before = (view.ctypes.data - buffer.ctypes.data) // view.itemsize
        around = np.concatenate([buffer[:before], buffer[before + count :]])
        if np.any(decode(around, dtype) != SENTINEL):
            return f"{name}: written outside of the result"
        rounding = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype] * np.abs(want)
        rounding = rounding + (2.0**-24 if dtype == "float16" else 0)
        stored = decode(encode(want, dtype), dtype)
        wrong = got != stored if exactly else ~(np.abs(got - want) <= bounds[name] + rounding)
        if np.any(wrong):
            at = tuple(np.argwhere(wrong)[0])
            return f"{name}{list(map(int, at))}: {wrong.sum()} wrong, got {got[at]}, expected {want[at]}"
    return None


def check_case(library, precision, case, rng, exact, checksum, reached):
    """Runs one case; returns (exit status, explanation)."""
    dtype = precision if precision.endswith("float16") else "float32"
    operands, placed = {}, {}
    for name, channels, dims in (("a", case.C, case.size), ("b", case.O, case.positions)):
        columns = case.V if case.of in (name, "both") else 1
        values = draw((columns, case.N, case.groups * channels, *dims), case, rng)
        operands[name] = np.broadcast_to(values, (case.V, *values.shape[1:]))
        placed[name] = place_operand(operands[name], name, case, dtype, exact)

    problem = outer_problem(case, precision, placed["a"][1], placed["b"][1])
    R, I = case.groups * case.O, case.C * prod(case.kernel)  # noqa: E741
    shapes = dict(zip(RESULTS, [(case.V, case.N, R, I), (case.N, R, I), (R, I)], strict=True))
    buffers, outputs, _alive, signs = results_of(case, dtype, shapes, exact)
    outputs.a_stride_v, outputs.b_stride_v = placed["a"][2], placed["b"][2]
    options, chosen = Options(**case.options), (ctypes.c_int64 * len(COLUMNS_PLAN))()
    arguments = [*map(ctypes.byref, (problem, outputs)), case.sm_count, ctypes.byref(options)]
    run = library.run_depthwise_columns if case.depthwise else library.run_contract_columns
    if run(*arguments, *(() if case.depthwise else (chosen,))):
        return 4, f"{case}: {library.cuda_on_cpu_last_error().decode()}"
    plan = dict(zip(COLUMNS_PLAN, chosen, strict=True))
    reached.add((plan["packed"], plan["keep_a"], plan["keep_b"], min(plan["splits"], 2), min(plan["t_splits"], 2)))
    if any(plan[name] != value for name, value in case.expect.items()):
        return 3, f"{case}: the plan is {plan}"

    # What the kernel works with: operands as stored, or as rounded by it.
    flat = replace(case, N=case.V * case.N)
    a, b = (decode(encode(x.reshape(-1, *x.shape[2:]), dtype), dtype) for x in (operands["a"], operands["b"]))
    if precision == "tf32" and not case.depthwise:
        a, b = (to_tf32(x).astype(np.float64) for x in (a, b))
    G = per_sample_gradients(a, b, flat).reshape(shapes["factor"])
    S = per_sample_gradients(np.abs(a), np.abs(b), flat).reshape(G.shape)
    bounds = error_bounds(G, S, signs, case, precision)
    wrong = compare(buffers, shapes, column_statistics(G, signs), bounds, case.data == "integers", checksum)
    return (3, f"{case} {plan}: {wrong}") if wrong else (0, "")


# ---- the cases ----


def problems(loader, depth):
    yield from geometries(loader, depth)
    if loader == "rows":  # the most slabs that are kept, and one more
        yield shape(N=3, O=16, C=8, size=(1, 1, 8 * depth))
        yield shape(N=2, O=8, C=16, size=(1, 1, 8 * depth + 1))


def cases(precision, loaders, amount, tiles):
    depth, turn = DEPTH[precision], 0
    for loader in loaders:
        force = {"loader": 1 + LOADERS.index(loader)}
        for number, problem in enumerate(problems(loader, depth)):
            T = prod(ColumnCase(**problem).positions)
            slabs = -(-T // (2 * depth))
            wants = WANTS if amount == "full" else [WANTS[-1], WANTS[number % 4]]
            for want in wants:
                turn += 1
                V = (2, 3, 1, 4, 5)[turn % 5]
                more = {"V": V, "want": want, "signs": turn % 3 > 0, "n_major": turn % 4 == 3}
                more |= {"of": "a" if turn % 4 == 1 else "b", "data": ["normal", "integers"][turn % 2]}
                choice = {**force, "tile": tiles[turn // 2 % len(tiles)]}
                splits = {"splits": 1 + turn % problem["N"]} if turn % 7 in (1, 3, 4) else {}
                more["sm_count"] = 1 + turn % 3
                yield ColumnCase(
                    **problem, **more, options={**choice, **splits}, expect={**choice, **splits, "t_splits": 1}
                )
                if "batch_diag" not in want:  # splits within a sample's columns
                    yield ColumnCase(**problem, **more, options={**choice, "splits": 2 * V}, expect=choice)
                if slabs > 1 and turn % 2:
                    yield ColumnCase(**problem, **more, options={**choice, "t_splits": 2}, expect=choice)
        problem = next(geometries(loader, depth))
        for of in ("both", "neither"):
            yield ColumnCase(**problem, V=4, of=of, want=tuple(RESULTS), options=force, expect=force)
        if loader == "rows":  # two samples in a slab, of one n or not
            for V in (3, 4):
                choice = {**force, "splits": 1, "t_splits": 1}
                few = shape(N=3, O=16, C=8, size=(1, 1, depth - 1), options=choice, expect={**choice, "packed": 1})
                yield ColumnCase(**few, V=V, want=tuple(RESULTS))
        if amount == "full":
            far = {**problem, "layout": problem["layout"] + "_far"}
            yield ColumnCase(**far, V=2, want=tuple(RESULTS), options=force, expect=force)


def depthwise_cases(precision, amount):
    problems = [
        *geometries("elements", DEPTH[precision]),
        shape(N=3, O=1, C=1, groups=5, size=(1, 9, 8), kernel=(1, 3, 3), padding=(0, 1, 1)),
        shape(N=2, O=2, C=1, groups=3, size=(1, 7, 7), kernel=(1, 5, 5), padding=(0, 2, 2), layout="channels_first"),
        shape(N=4, O=1, C=2, groups=2, size=(1, 1, 40), kernel=(1, 1, 3), layout="channels_first"),
    ]
    for turn, problem in enumerate(problems * (len(WANTS) if amount == "full" else 1)):
        V, want = (2, 3, 1, 4, 5)[turn % 5], WANTS[(turn + turn // len(problems)) % 5]
        more = {"V": V, "want": want, "signs": turn % 3 > 0, "n_major": turn % 4 == 3, "sm_count": 1 + turn % 3}
        more |= {"of": "a" if turn % 4 == 1 else "b", "data": ["normal", "integers"][turn % 2]}
        splits = turn % 4 if "batch_diag" in want else 2 * V  # these within a sample's columns
        yield ColumnCase(**problem, **more, depthwise=True, options={"splits": splits})


# ---- gradients in memory ----


def check_sums(library, dtype, output, rng, exact, checksum):
    """All shapes of one pair of element types; returns (exit status, explanation)."""
    turn = 0
    for V, N, count, parts, sm_count in [
        (1, 5, 33, 1, 1),
        (3, 4, 70, 1, 1),
        (9, 2, 32, 3, 1),
        (20, 7, 10, 2, 1),
        (2, 1, 129, 5, 132),
        (16, 40, 3, 1, 4),
    ]:
        for want in WANTS:
            turn += 1
            case = ColumnCase(N, 1, 1, V=V, want=want, signs=turn % 3 > 0, data=["normal", "integers"][turn % 2])
            values = draw((V, N, count, parts), case, rng)
            order = [(0, 1, 2, 3), (1, 0, 3, 2), (1, 2, 0, 3)][turn % 3]  # from the outermost
            memory = encode(np.ascontiguousarray(values.transpose(order)), dtype)
            strides = dict(zip(order, (s // memory.itemsize for s in memory.strides), strict=True))
            stored = decode(memory, dtype).transpose(np.argsort(order))
            G = stored.sum(3)[..., None]
            shapes = dict(zip(RESULTS, [G.shape, G.shape[1:], G.shape[2:]], strict=True))
            buffers, outputs, _alive, signs = results_of(case, output, shapes, exact)
            gradients = GradientsInMemory(ELEMENTS[dtype], memory.ctypes.data, N, count, parts)
            gradients.stride_v, gradients.stride_n, gradients.stride_element, gradients.stride_part = (
                strides[d] for d in range(4)
            )
            splits = ctypes.c_int64()
            where = f"sums of {dtype} [{V}, {N}, {count}, {parts}] to {output}, {case}"
            arguments = map(ctypes.byref, (gradients, outputs))
            if library.run_column_sums(*arguments, ELEMENTS[output], sm_count, ctypes.byref(splits)):
                return 4, f"{where}: {library.cuda_on_cpu_last_error().decode()}"
            S = np.abs(stored).sum(3)[..., None]
            bounds = error_bounds(G, parts * S, signs, case, "tf32")
            integers = case.data == "integers"
            wrong = compare(buffers, shapes, column_statistics(G, signs), bounds, integers, checksum)
            if wrong:
                return 3, f"{where}, {splits.value} splits: {wrong}"
    return 0, ""


def main():
    path, precision, loaders, amount = sys.argv[1:5]
    loaders = loaders.split(",")
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    rng, checksum, reached, count = np.random.default_rng(0), hashlib.sha256(), set(), 0
    exact = "--exact" in sys.argv
    tiles = [1] if precision == "tf32x3" or "--small-tile" in sys.argv else [1, 2]

    def check(status, explanation):
        if status:
            print(explanation)
            sys.exit(status)

    if "sums" in loaders:
        dtype = precision if precision.endswith("float16") else "float32"
        for pair in dict.fromkeys([("float32", dtype), (dtype, dtype)]):
            check(*check_sums(library, *pair, rng, exact, checksum))
            count += 1
    chosen = [*cases(precision, [loader for loader in loaders if loader in LOADERS], amount, tiles)]
    if "depthwise" in loaders:
        chosen += depthwise_cases(precision, amount)
    for case in chosen:
        check(*check_case(library, precision, case, rng, exact, checksum, reached))
        count += 1
    if amount == "full" and "rows" in loaders:  # (packed, keep_a, keep_b, splits, t_splits)
        wanted = {(0, 1, 0, 1, 1), (0, 1, 0, 2, 1), (1, 1, 0, 1, 1), (1, 0, 0, 1, 1), (0, 0, 1, 1, 1), (0, 0, 0, 2, 2)}
        assert wanted <= reached, wanted - reached
    print(count, checksum.hexdigest())


if __name__ == "__main__":
    main()

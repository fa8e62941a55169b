"""Runs the CUDA kernel of contract on the CPU (csrc/harness) and compares it with float64 numpy.

A program, so that a fault cannot take the tests down and a sanitizer can be preloaded:

    contract_on_cpu.py LIBRARY PRECISION LOADERS (full|small) [--exact] [--small-tile]

PRECISION: tf32, tf32x3, bfloat16 or float16; LOADERS: rows, channels_last, positions and elements, joined by commas.
Exit status: 0 all right, 3 a wrong result, 4 an error reported by the harness. With --exact buffers end where the
operands end, for AddressSanitizer; otherwise NaN surrounds the operands, so that a read too far changes the result.
Prints how many cases ran and a checksum of all results.
"""

import ctypes
import hashlib
import itertools
import mmap
import sys
from dataclasses import dataclass, field
from math import prod

import numpy as np
from outer_norm_on_cpu import STORAGE, decode, encode
from stats_on_cpu import Operand, Options, OuterProblem, StatsOutputs

LOADERS = ["rows", "channels_last", "positions", "elements"]  # in the order of ContractLoader, from 1
DEPTH = {"tf32": 8, "tf32x3": 8, "bfloat16": 16, "float16": 16}  # of one mma
RESULTS = ["grad", "batch_grad", "batch_l2", "sum_grad_squared", "sum_grad_centered_squared"]
# Of ContractPlan, as the entry points report them.
PLAN = ("loader", "tile", "splits", "t_splits", "packed", "squares", "copy_bytes", "workspace_bytes")


@dataclass
class Case:
    N: int
    O: int  # noqa: E741
    C: int
    groups: int = 1
    size: tuple = (1, 1, 1)  # of a
    kernel: tuple = (1, 1, 1)
    step: tuple = (1, 1, 1)
    padding: tuple = (0, 0, 0)
    dilation: tuple = (1, 1, 1)
    positions: tuple = ()  # of b; by default those of a convolution
    # channels_last or channels_first, and _odd (misaligned, with gaps), _padded (aligned rows), _far (64-bit offsets)
    layout: str = "channels_last"
    want: tuple = ("grad",)
    weighted: bool = False
    data: str = "normal"  # or integers, or shifted: a small variance beside a large mean
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


def linear(N, T, O, I, **more):  # noqa: E741
    return Case(N, O, I, size=(1, 1, T), **more)


# ---- operands and results in memory ----


def aligned_buffer(count, dtype, fill, exact, misalignment=0):
    """(buffer, view of `count` elements) of fill; the view begins `misalignment` elements past 16 bytes."""
    storage = np.dtype(STORAGE[dtype])
    vector = 16 // storage.itemsize
    buffer = encode(np.full(count + misalignment + (0 if exact else 4 * vector), fill), dtype)
    if exact:
        return buffer, buffer[misalignment:]
    first = vector + (-buffer.ctypes.data // storage.itemsize) % vector + misalignment
    return buffer, buffer[first : first + count]


def memory_order(shape, layout):
    """(strides, elements from the first to the last) of a layout of [N, channels, 3 dims]."""
    odd = "_odd" in layout
    order = (0, 2, 3, 4, 1) if layout.startswith("channels_last") else (0, 1, 2, 3, 4)  # outermost first
    strides, extent = [0] * 5, 1
    for dim in reversed(order):
        strides[dim] = extent
        extent *= shape[dim]
        if odd and dim == (1 if order[-1] == 1 else 2) or odd and dim == order[1]:  # after a row, and a sample
            extent += 1
        if dim == 1 and "_padded" in layout:
            extent += -extent % 8
    if layout.endswith("_far"):
        strides[0] = FAR
    return strides, sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1


def operand(address, strides):
    return Operand(address, strides[0], strides[1], (ctypes.c_int64 * 3)(*strides[2:]))


def place_nowhere(shape, layout):
    """The Operand of an aligned tensor that is not there, for plans."""
    return operand(256, memory_order(shape, layout)[0])


def place(values, layout, dtype, exact):
    """Stores values [N, channels, 3 dims] among NaN; returns (buffer, Operand)."""
    strides, count = memory_order(values.shape, layout)
    if layout.endswith("_far"):  # address space, of which only what is touched takes memory
        storage = np.dtype(STORAGE[dtype])
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        buffer = view = np.frombuffer(mmap.mmap(-1, count * storage.itemsize, flags=flags), storage)
    else:
        buffer, view = aligned_buffer(count, dtype, np.nan, exact, misalignment=int("_odd" in layout))
        view[...] = encode(np.full(count, np.nan), dtype)
    strided = np.lib.stride_tricks.as_strided(view, values.shape, [s * view.itemsize for s in strides])
    strided[...] = encode(values, dtype)
    return buffer, operand(view.ctypes.data, strides)


FAR = 2**31 + 64  # elements between samples
MAP_NORESERVE = 0x4000  # of Linux

SENTINEL, GUARD = -7.0, 16


def result_buffer(shape, dtype, exact):
    guard = 0 if exact else GUARD
    buffer, view = aligned_buffer(prod(shape) + guard, dtype, SENTINEL, exact)
    return buffer, view


# ---- the reference ----


def to_tf32(x):
    """As to_tf32 of csrc/cuda/common/ptx.cuh, and then the bits that the tensor cores drop."""
    nudged = (x.astype(np.float64) * (1 + 1.375 / 4096)).astype(np.float32)
    return (nudged.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def patches(a, case):
    """a [N, groups, C, 3 dims] -> [N, groups, C, kernel volume, T], zeros outside."""
    columns = []
    for k in itertools.product(*map(range, case.kernel)):
        patch, inside = a, np.ones((), bool)
        for d in range(3):
            index = np.arange(case.positions[d]) * case.step[d] + k[d] * case.dilation[d] - case.padding[d]
            valid = (index >= 0) & (index < case.size[d])
            patch = np.take(patch, np.where(valid, index, 0), axis=3 + d)
            inside = inside[..., None] & valid
        columns.append(np.where(inside, patch, 0).reshape(*a.shape[:3], -1))
    return np.stack(columns, 3)


def per_sample_gradients(a, b, case):
    """[N, R, I], R = groups * O and I = C * kernel volume, in the type of a and b."""
    x = patches(a.reshape(case.N, case.groups, case.C, *case.size), case)
    x = x.reshape(case.N, case.groups, -1, x.shape[-1])  # [N, groups, I, T]
    y = b.reshape(case.N, case.groups, case.O, -1)  # [N, groups, O, T]
    return np.matmul(y, np.swapaxes(x, 2, 3)).reshape(case.N, case.groups * case.O, -1)


def statistics(G, weights):
    squares = np.square(G)
    return {
        "grad": (G * weights[:, None, None]).sum(0) if weights is not None else G.sum(0),
        "batch_grad": G,
        "batch_l2": squares.sum((1, 2)),
        "sum_grad_squared": squares.sum(0),
        "sum_grad_centered_squared": np.square(G - G.mean(0)).sum(0),
    }


def error_bounds(G, S, case, precision, weights):
    """Of each result: what the roundings of the kernel may add up to. S = sum_t |b| |a|."""
    u = 2.0**-23  # products truncate
    T = prod(case.positions)
    g = (T / DEPTH[precision] + 2) * u * S + 1e-37
    if precision == "tf32x3":
        g = g + 2.0**-20 * S  # the last bits of both rests, and their product
    w = np.abs(weights)[:, None, None] if weights is not None else 1.0
    sums, squares = (w * (g + case.N * u * np.abs(G))).sum(0), (2 * np.abs(G) + g) * g + (case.N + 2) * u * G**2
    deviation = 2 * np.abs(G - G.mean(0)).max(0)
    centered = case.N * (2 * deviation + g.max(0)) * (g.max(0) + 8 * u * np.abs(G).max(0)) + 16 * u * deviation**2
    return {
        "grad": sums,
        "batch_grad": g,
        "batch_l2": squares.sum((1, 2)) + 16 * u * np.square(G).sum((1, 2)),
        "sum_grad_squared": squares.sum(0) + (centered if "sum_grad_centered_squared" in case.want else 0),
        "sum_grad_centered_squared": centered,
    }


def draw(shape, case, rng):
    if case.data == "integers":
        return rng.integers(-1, 2, shape).astype(np.float64)
    values = rng.standard_normal(shape)
    return 30 + values if case.data == "shifted" else values


# ---- one case ----


def outer_problem(case, precision, a, b):
    elements = {"tf32": 0, "tf32x3": 0, "bfloat16": 1, "float16": 2}
    problem = OuterProblem(elements[precision], precision == "tf32", case.N, case.groups, case.O, case.C)
    for name in ("positions", "size", "kernel", "step", "padding", "dilation"):
        setattr(problem, name, (ctypes.c_int * 3)(*getattr(case, name)))
    problem.a, problem.b = a, b
    return problem


def check_case(library, precision, case, rng, exact, checksum, copies):
    """Runs one case; returns (exit status, explanation)."""
    dtype = precision if precision.endswith("float16") else "float32"
    a = draw((case.N, case.groups * case.C, *case.size), case, rng)
    b = draw((case.N, case.groups * case.O, *case.positions), case, rng)
    if case.data == "shifted":
        b = np.ones_like(b)
    weights = rng.integers(-2, 3, case.N) / 2.0 if case.weighted else None
    a_buffer, a_operand = place(a, case.layout, dtype, exact)
    b_buffer, b_operand = place(b, case.layout, dtype, exact)

    problem = outer_problem(case, precision, a_operand, b_operand)
    R, I = case.groups * case.O, case.C * prod(case.kernel)  # noqa: E741
    shapes = dict(zip(RESULTS, [(R, I), (case.N, R, I), (case.N,), (R, I), (R, I)], strict=True))
    dtypes = {name: dtype if name in ("grad", "batch_grad") else "float32" for name in RESULTS}
    buffers = {name: result_buffer(shapes[name], dtypes[name], exact) for name in case.want}
    outputs = StatsOutputs(**{name: view.ctypes.data for name, (_, view) in buffers.items()})
    if case.weighted:
        weight_buffer, weight_view = aligned_buffer(case.N, "float32", np.nan, exact)
        weight_view[...] = weights
        outputs.weights = weight_view.ctypes.data
    options, chosen = Options(**case.options), (ctypes.c_int64 * 8)()
    status = library.run_contract(
        ctypes.byref(problem), ctypes.byref(outputs), case.sm_count, ctypes.byref(options), chosen
    )
    if status:
        return 4, f"{case}: {library.cuda_on_cpu_last_error().decode()}"
    plan = dict(zip(PLAN, chosen, strict=True))
    copies.add((plan["loader"], plan["copy_bytes"]))
    if any(plan[name] != value for name, value in case.expect.items()):
        return 3, f"{case}: the plan is {plan}"

    # What the kernel works with: operands as stored, or as rounded by it.
    a, b = (decode(encode(x, dtype), dtype) for x in (a, b))
    if precision == "tf32":
        a, b = (to_tf32(x).astype(np.float64) for x in (a, b))
    G = per_sample_gradients(a, b, case)
    expected = statistics(G, weights)
    bounds = error_bounds(G, per_sample_gradients(np.abs(a), np.abs(b), case), case, precision, weights)
    if precision == "tf32x3":
        plain = per_sample_gradients(a.astype(np.float32), b.astype(np.float32), case)
        plain = statistics(plain, None if weights is None else weights.astype(np.float32))
    for name, (buffer, view) in buffers.items():
        where = f"{case} {plan}: {name}"
        count = prod(shapes[name])
        got, want = decode(view[:count], dtypes[name]).reshape(shapes[name]), expected[name]
        checksum.update(view.tobytes())
        before = (view.ctypes.data - buffer.ctypes.data) // view.itemsize
        around = np.concatenate([buffer[:before], buffer[before + count :]])
        if np.any(decode(around, dtypes[name]) != SENTINEL):
            return 3, f"{where}: written outside of the result"
        stored = decode(encode(want, dtypes[name]), dtypes[name])
        rounding = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtypes[name]] * np.abs(want)
        rounding = rounding + (2.0**-24 if dtypes[name] == "float16" else 0)
        exactly = case.data == "integers" and "sum_grad_centered_squared" not in (name, *case.want)
        wrong = got != stored if exactly else ~(np.abs(got - want) <= bounds[name] + rounding)
        if np.any(wrong):
            at = tuple(np.argwhere(wrong)[0])
            return 3, f"{where}{list(map(int, at))}: {wrong.sum()} wrong, got {got[at]}, expected {want[at]}"
        if precision == "tf32x3" and case.data == "normal":  # float32 accuracy; one product has 2^-20
            floor = 2.0 ** (-20 if "grad" in name.split("_")[-1:] else -19) * np.abs(want).max()
            error, plain_error = np.abs(got - want).max(), np.abs(plain[name] - want).max()
            if error > 2 * plain_error + floor:
                return 3, f"{where}: error {error}, but {plain_error} in plain float32"
    return 0, ""


# ---- the cases ----

WANTS = [  # (results, weighted)
    (("grad",), False),
    (("grad",), True),
    (("batch_l2",), False),
    (("batch_grad",), False),
    (("grad", "batch_grad", "batch_l2"), False),
    (("sum_grad_squared",), False),
    (("grad", "batch_l2", "sum_grad_squared"), False),
    (("sum_grad_centered_squared",), False),
    (("grad", "sum_grad_squared", "sum_grad_centered_squared"), False),
    (tuple(RESULTS), False),
]


def shape(**arguments):
    return arguments


def geometries(loader, depth):
    """Problems for a loader, as keyword arguments; `depth` positions are one mma."""
    rows = 2 * depth
    last, odd, first, first_odd = "channels_last", "channels_last_odd", "channels_first", "channels_first_odd"
    if loader == "rows":
        yield shape(N=3, O=16, C=8, size=(1, 1, 5), layout="channels_last_padded")
        yield shape(N=2, O=72, C=136, size=(1, 1, 2 * rows + 3), layout=last)
        yield shape(N=5, O=64, C=64, size=(1, 1, depth), layout=last)
        yield shape(N=5, O=24, C=40, size=(1, 1, 1), layout=last)
        yield shape(N=2, O=16, C=32, size=(1, 3, rows - 1), groups=3, layout=last)
        yield shape(N=2, O=8, C=16, size=(2, 7, 5), step=(1, 2, 1), positions=(1, 4, 1), layout=last)
    if loader == "channels_last":
        yield shape(N=3, O=16, C=8, size=(1, 7, 6), kernel=(1, 3, 3), padding=(0, 1, 1), layout=last)
        yield shape(N=2, O=72, C=16, size=(1, 9, 8), kernel=(1, 3, 2), step=(1, 2, 2), padding=(0, 1, 1), groups=2)
        yield shape(N=3, O=8, C=24, size=(1, 1, 2), kernel=(1, 1, 3), padding=(0, 0, 1))
        yield shape(N=2, O=8, C=8, size=(3, 4, 5), kernel=(2, 3, 2), padding=(1, 2, 0), dilation=(2, 1, 3))
        yield shape(
            N=2, O=16, C=16, size=(1, 5, 4), kernel=(1, 2, 3), step=(1, 2, 1), padding=(0, 1, 0), positions=(1, 3, 3)
        )
    if loader == "positions":
        yield shape(N=3, O=5, C=3, size=(1, 7, 6), kernel=(1, 3, 3), padding=(0, 1, 1), layout=first)
        yield shape(
            N=2, O=70, C=5, size=(1, 9, 8), kernel=(1, 3, 2), step=(1, 2, 1), padding=(0, 1, 1), groups=2, layout=first
        )
        yield shape(N=3, O=9, C=4, size=(1, 1, depth - 1), layout=first_odd)
        yield shape(N=3, O=66, C=33, size=(1, 2, rows), kernel=(1, 1, 3), padding=(0, 0, 1), layout=first)
        yield shape(
            N=2, O=4, C=3, size=(3, 4, 5), kernel=(2, 3, 2), padding=(1, 2, 0), dilation=(2, 1, 3), layout=first
        )
        yield shape(
            N=2,
            O=3,
            C=5,
            size=(1, 8, 7),
            kernel=(1, 3, 3),
            step=(1, 2, 2),
            padding=(0, 1, 1),
            positions=(1, 4, 4),
            layout=first,
        )
    if loader == "elements":
        yield shape(N=3, O=5, C=9, size=(1, 1, 7), layout=odd)
        yield shape(N=2, O=70, C=33, size=(1, 1, 2 * rows + 1), layout=odd)
        yield shape(N=5, O=10, C=35, size=(1, 1, 1), layout=odd)
        yield shape(N=2, O=6, C=3, size=(1, 6, 5), kernel=(1, 3, 3), padding=(0, 2, 1), groups=2, layout=last)
        yield shape(N=2, O=4, C=3, size=(3, 4, 5), kernel=(2, 3, 2), padding=(1, 2, 0), step=(2, 1, 1), layout=odd)
        yield shape(N=1, O=1, C=1, layout=first)


def combinations(loader, depth, amount, tiles):
    """(problem, want, weighted, data, tile): full has every (problem, want), small every want twice."""
    problems = list(geometries(loader, depth))
    turn = 0
    for number, (want, weighted) in enumerate(WANTS):
        chosen = problems if amount == "full" else [problems[(2 * number + j) % len(problems)] for j in range(2)]
        for problem in chosen:
            turn += 1
            data = ["normal", "integers"][(turn + turn // len(chosen)) % 2]
            yield problem, want, weighted, data, tiles[(turn // 2 + number) % len(tiles)]


def cases(precision, loaders, amount, tiles):
    slab_rows = 2 * DEPTH[precision]
    for loader in loaders:
        force = {"loader": 1 + LOADERS.index(loader)}
        for count, (problem, want, weighted, data, tile) in enumerate(
            combinations(loader, DEPTH[precision], amount, tiles)
        ):
            N, more = problem["N"], {"want": want, "weighted": weighted, "data": data, "sm_count": 1 + count % 3}
            expect = {**force, "tile": tile}
            splits = {"splits": 1 + count % N} if count % 5 in (1, 3) else {}
            yield Case(**problem, **more, options={**expect, **splits}, expect={**expect, **splits})
            t_splits = 2 + count % 2
            case = Case(**problem, **more, options={**expect, "t_splits": t_splits}, expect=expect)
            slabs = -(-prod(case.positions) // slab_rows)
            if slabs > 1:
                case.expect["t_splits"] = -(-slabs // -(-slabs // t_splits))
                yield case
        everything = {**next(geometries(loader, DEPTH[precision])), "want": RESULTS}
        for splits in (1, 2):
            choice = {**force, "splits": splits}
            yield Case(**{**everything, "N": 6}, data="shifted", options=choice, expect=choice)
        if amount == "full":
            problem = next(geometries(loader, DEPTH[precision]))
            yield Case(**{**problem, "layout": problem["layout"] + "_far"}, want=RESULTS, options=force, expect=force)
        if loader == "rows" and amount == "full":  # roundings add up
            yield linear(2, 700, 16, 24, want=RESULTS, options=force)


def main():
    path, precision, loaders, amount = sys.argv[1:5]
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    rng, checksum, copies, count = np.random.default_rng(0), hashlib.sha256(), set(), 0
    tiles = [1] if precision == "tf32x3" or "--small-tile" in sys.argv else [1, 2]
    for case in cases(precision, loaders.split(","), amount, tiles):
        status, explanation = check_case(library, precision, case, rng, "--exact" in sys.argv, checksum, copies)
        if status:
            print(explanation)
            sys.exit(status)
        count += 1
    if amount == "full" and "positions" in loaders:
        widths = [2, 4, 8, 16] if precision.endswith("float16") else [4, 8, 16]
        assert sorted(width for loader, width in copies if loader == 3) == widths, copies
    print(count, checksum.hexdigest())


if __name__ == "__main__":
    main()

"""Runs the contract kernel for Hopper on the CPU (csrc/harness) and compares it with float64 numpy.

A program, so that a fault cannot take the tests down and a sanitizer can be preloaded:

    contract_sm90_on_cpu.py LIBRARY DTYPE (full|short|small|refusals) [--exact]

Exit status: 0 all right, 3 a wrong result, 4 an error reported by the harness. With --exact buffers end where the
operands end, for AddressSanitizer; otherwise NaN follows, so that a read too far changes the result.
"""

import ctypes
import sys

import numpy as np
from outer_norm_on_cpu import decode, encode
from stats_on_cpu import ELEMENTS, SENTINEL, Operand, Options, OuterProblem, StatsOutputs

I32, I64, FLOATS = ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_float)


class Plan(ctypes.Structure):
    """ContractSm90Plan"""

    _fields_ = [
        *[(name, I32) for name in ("tiles_o", "tiles_i", "splits")],
        *[(name, I64) for name in ("norms_at", "sums_at", "squares_at", "workspace_bytes")],
    ]


def triple(*values):
    return (I32 * 3)(*values)


def aligned(count, dtype, alignment=64):
    """An array whose data is aligned; it ends where its allocation ends."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + alignment, np.uint8)
    offset = -raw.ctypes.data % alignment
    # The slack goes in front: shrink the allocation's tail by choosing the last aligned begin.
    return raw[offset : offset + size].view(dtype)


def place(values, padding, dtype, exact):
    """Stores values [N, T, C]; all else is NaN. Returns (buffer, its values, strides of samples and rows).

    With padding there are more elements in a row, and more rows in a sample.
    """
    n, t, c = values.shape
    row = c + padding - (c + padding) % 8 if padding else c
    sample = (t + (2 if padding else 0)) * row
    extent = (n - 1) * sample + (t - 1) * row + c
    stored = encode(np.full(extent if exact else extent + 4096, np.nan), dtype)
    if exact:  # malloc'd blocks are aligned to 16 bytes, which is what the kernel needs
        buffer = stored
    else:
        buffer = aligned(stored.size, stored.dtype)
        buffer[...] = stored
    assert buffer.ctypes.data % 16 == 0
    view = np.lib.stride_tricks.as_strided(buffer, (n, t, c), [2 * sample, 2 * row, 2])
    view[...] = encode(values, dtype)
    return buffer, decode(view, dtype), (sample, row)


def make_problem(dtype, a, b, a_strides, b_strides, shape):
    n, t, i, o = shape
    ones, zeros = triple(1, 1, 1), triple(0, 0, 0)
    operands = [
        Operand(data.ctypes.data, sample, 1, (I64 * 3)(row * t, row * t, row))
        for data, (sample, row) in ((a, a_strides), (b, b_strides))
    ]
    positions = triple(1, 1, t)
    return OuterProblem(ELEMENTS[dtype], False, n, 1, o, i, positions, positions, ones, ones, zeros, ones, *operands)


NAMES = ["grad", "batch_grad", "batch_l2", "sum_grad_squared", "sum_grad_centered_squared"]
EVERYTHING = tuple(NAMES)


def reference(a, b, weights):
    """float64 results of operands [N, T, I], [N, T, O]."""
    with np.errstate(all="ignore"):
        per_sample = np.einsum("nto,nti->noi", b, a)
        mean = per_sample.mean(0)
        return {
            "grad": np.einsum("n,noi->oi", weights, per_sample),
            "batch_grad": per_sample,
            "batch_l2": np.square(per_sample).sum((1, 2)),
            "sum_grad_squared": np.square(per_sample).sum(0),
            "sum_grad_centered_squared": np.square(per_sample - mean).sum(0),
        }


class Case:
    def __init__(self, shape, wanted=EVERYTHING, splits=0, kind="normal", padding=0, weights=False):
        self.shape, self.wanted, self.splits, self.kind = shape, wanted, splits, kind
        self.padding, self.weights = padding, weights

    def __str__(self):
        n, t, o, i = self.shape
        return (
            f"N={n} T={t} O={o} I={i} {'+'.join(self.wanted)} splits={self.splits} {self.kind}"
            f" padding={self.padding} weights={self.weights}"
        )

    def operands(self):
        n, t, o, i = self.shape
        rng = np.random.default_rng(n * 1000 + t * 100 + o * 10 + i)
        if self.kind == "integers":
            return rng.integers(-2, 3, (n, t, i)).astype(float), rng.integers(-2, 3, (n, t, o)).astype(float)
        a, b = rng.standard_normal((n, t, i)), rng.standard_normal((n, t, o))
        if self.kind == "mean":  # samples that differ little: squares must not cancel
            a, b = a[:1] + 0.01 * a, b[:1] + 0.01 * b
        if self.kind == "infinite":
            a[0], b[0, t // 2, o - 1] = np.abs(a[0]) + 1, np.inf
            b[n - 1, 0, 0] = np.nan
        return a, b


def compare(name, got, expected, dtype, case):
    """None, or what is wrong."""
    exact = case.kind == "integers" and not case.weights
    half = name in ("grad", "batch_grad")
    if exact and half:
        same = np.array_equal(got, encode(expected, dtype))
    elif exact and name == "sum_grad_squared" and "sum_grad_centered_squared" not in case.wanted:
        same = np.array_equal(got, expected.astype(np.float32))
    else:
        exact = False
    if half:
        got = decode(got, dtype)
    with np.errstate(invalid="ignore"):
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
        rounding = {"bfloat16": 2**-8, "float16": 2**-10}[dtype] if half else 0
        # float32 sums, each of 16 products truncated; squares have twice the relative error. Small differences
        # of large samples keep some bits less, but would have none left as differences of squares.
        tolerance = 5e-5 if case.kind == "mean" else 6e-6
        close = np.isclose(got, expected, rtol=rounding, atol=tolerance * scale, equal_nan=True)
    if same if exact else close.all():
        return None
    where = np.argwhere(~close if not close.all() else got != expected)
    first = tuple(where[0])
    return f"{name}: {len(where)} wrong, at {first} got {got[first]}, expected {expected[first]}; largest {scale}"


def run_case(library, dtype, case, exact):
    """Returns (exit status, explanation)."""
    n, t, o, i = case.shape
    a_values, b_values = case.operands()
    a, a_values, a_strides = place(a_values, case.padding, dtype, exact)
    b, b_values, b_strides = place(b_values, case.padding, dtype, exact)
    problem = make_problem(dtype, a, b, a_strides, b_strides, (n, t, i, o))
    if not library.contract_sm90_applies_to(ctypes.byref(problem)):
        return 3, f"{case}: the kernel should apply"
    weights = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    half = np.uint16 if dtype == "bfloat16" else np.float16
    shapes = {"grad": (o, i), "batch_grad": (n, o, i), "batch_l2": (n,)}
    results, outputs = {}, StatsOutputs()
    for name in case.wanted:
        shape = shapes.get(name, (o, i))
        size = int(np.prod(shape))
        kind = half if name in ("grad", "batch_grad") else np.float32
        results[name] = aligned(size + (0 if exact else 300), kind), shape
        results[name][0][...] = SENTINEL if kind != np.uint16 else 0x7777
        setattr(outputs, name, results[name][0].ctypes.data)
    if case.weights:
        outputs.weights = weights.ctypes.data
    plan, options = Plan(), Options(splits=case.splits)
    if library.plan_contract_sm90_for(*map(ctypes.byref, (problem, outputs)), 4, *map(ctypes.byref, (options, plan))):
        return 4, f"{case}: {library.cuda_on_cpu_last_error().decode()}"
    if case.splits and plan.splits != min(case.splits, n):
        return 3, f"{case}: {plan.splits} splits planned"
    workspace = aligned(plan.workspace_bytes + 64, np.uint8)
    workspace[...] = 0xFF
    arguments = [ctypes.byref(argument) for argument in (problem, outputs, plan)]
    if library.run_contract_sm90(*arguments, ctypes.c_void_p(workspace.ctypes.data)):
        return 4, f"{case}: {library.cuda_on_cpu_last_error().decode()}"
    if not np.all(workspace[plan.workspace_bytes :] == 0xFF):
        return 3, f"{case}: wrote past the workspace"
    expected = reference(a_values, b_values, weights.astype(float) if case.weights else np.ones(n))
    for name, (buffer, shape) in results.items():
        size = int(np.prod(shape))
        if not np.all(buffer[size:] == (0x7777 if buffer.dtype == np.uint16 else SENTINEL)):
            return 3, f"{case}: {name} was written past its end"
        wrong = compare(name, buffer[:size].reshape(shape), expected[name], dtype, case)
        if wrong:
            return 3, f"{case}: {wrong}"
    return 0, str(case)


def cases(size):
    if size == "small":
        yield Case((3, 70, 136, 72), splits=2)
        yield Case((2, 200, 64, 136), ("batch_l2", "grad"), kind="integers")
        yield Case((7, 20, 8, 8), ("sum_grad_squared",), splits=3, kind="integers")
        return
    if size == "short":
        yield Case((3, 150, 72, 136), splits=2)
        yield Case((3, 400, 136, 72), splits=1)
        yield Case((9, 20, 24, 136), splits=4)
        yield Case((5, 70, 40, 144), ("grad",), weights=True, splits=2)
        yield Case((3, 40, 72, 24), kind="infinite", splits=1)
        yield Case((70, 5, 16, 136), ("batch_l2",), splits=1)
        yield Case((3, 66, 131, 13), padding=15)
        return
    for t in (1, 15, 16, 17, 63, 64, 65, 130):
        yield Case((2, t, 72, 136), splits=1)
    for shape in ((1, 1, 8, 8), (1, 65, 8, 264), (3, 64, 136, 8), (4, 33, 128, 128), (5, 300, 64, 64)):
        yield Case(shape)
        yield Case(shape, kind="integers")
    # Every single result and some sets, with and without splits.
    sets = [(name,) for name in NAMES]
    sets += [("grad", "batch_l2"), ("grad", "sum_grad_squared"), ("sum_grad_squared", "sum_grad_centered_squared")]
    sets += [("grad", "batch_grad", "batch_l2", "sum_grad_squared"), EVERYTHING]
    for k, wanted in enumerate(sets):
        yield Case((5, 70, 40, 144), wanted, splits=1 + k % 2, kind="integers")
        yield Case((5, 70, 40, 144), wanted, splits=3 - k % 2)
    for splits in (1, 4, 9):
        yield Case((9, 20, 24, 136), splits=splits)
    yield Case((70, 5, 16, 16), ("batch_l2", "sum_grad_centered_squared"))  # more samples than norms wait for
    yield Case((70, 5, 16, 136), ("batch_l2",), splits=2)
    yield Case((6, 40, 72, 24), kind="mean", splits=2)
    yield Case((3, 40, 72, 24), kind="infinite", splits=1)
    yield Case((5, 70, 40, 144), ("grad",), weights=True, splits=2)
    yield Case((3, 17, 136, 40), ("grad",), weights=True, splits=1)
    # Rows of 16 bytes' multiples that hold fewer columns: edges within a 16-byte piece.
    yield Case((3, 66, 131, 13), padding=15)
    yield Case((2, 30, 5, 133), padding=15, splits=2)


def refusals(dtype):
    """Yields (name, whether it applies, problem)."""
    n, t, o, i = 2, 6, 24, 16
    a, b = (aligned(4 * n * t * c, np.uint16) for c in (i, o))

    image = {"positions": triple(1, 2, 3), "size": triple(1, 2, 3), "b__stride": (I64 * 3)(144, 72, 24)}

    def problem(**changes):
        result = make_problem(dtype, a, b, (t * i, i), (t * o, o), (n, t, i, o))
        for path, value in changes.items():
            target, names = result, path.split("__")
            for name in names[:-1]:
                target = getattr(target, name)
            setattr(target, names[-1], value)
        return result

    yield "dense", True, problem()
    yield "float32", False, problem(element=0)
    yield "groups", False, problem(groups=2)
    yield "kernel", False, problem(kernel=triple(1, 1, 3), positions=triple(1, 1, 4))
    yield "padding", False, problem(padding=triple(0, 0, 1))
    yield "beyond a", False, problem(size=triple(1, 1, 5))
    yield "image", True, problem(**image, a__stride=(I64 * 3)(96, 48, 16))
    yield "image with gaps", False, problem(**image, a__stride=(I64 * 3)(128, 64, 16))
    yield "step", True, problem(positions=triple(1, 1, 3), step=triple(1, 1, 2), a__stride_n=i * 6)
    stepped = image | {"size": triple(1, 4, 6), "step": triple(1, 2, 2)}
    yield "step in both dims", False, problem(**stepped, a__stride=(I64 * 3)(0, 96, 16))
    yield "O not a multiple of 8", False, problem(O=20, b__stride_n=t * 20, b__stride=(I64 * 3)(0, 0, 20))
    yield "I not a multiple of 8", False, problem(channels=20, a__stride_n=t * 20, a__stride=(I64 * 3)(0, 0, 20))
    yield "misaligned", False, problem(a__data=a.ctypes.data + 8)
    yield "channels apart", False, problem(b__stride_c=2)
    yield "rows expanded", False, problem(a__stride=(I64 * 3)(0, 0, 0))
    yield "samples expanded", False, problem(a__stride_n=0)
    yield "positions before samples", False, problem(a__stride_n=i, a__stride=(I64 * 3)(0, 0, n * i))
    yield "one sample, any stride", True, problem(N=1, a__stride_n=3, b__stride_n=0)
    strides = {"a__stride": (I64 * 3)(5, 5, 5), "b__stride": (I64 * 3)(0, 0, 0)}
    yield "one position, any stride", True, problem(positions=triple(1, 1, 1), **strides)


def main():
    path, dtype, size = sys.argv[1:4]
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    if size == "refusals":
        hopper = "--another-device" not in sys.argv
        for name, applies, problem in refusals(dtype):
            if bool(library.contract_sm90_applies_to(ctypes.byref(problem))) != (applies and hopper):
                print(f"{name}: applies should be {applies and hopper}")
                sys.exit(3)
        return
    for case in cases(size):
        status, explanation = run_case(library, dtype, case, "--exact" in sys.argv)
        if status:
            print(explanation)
            sys.exit(status)


if __name__ == "__main__":
    main()

"""Runs the CUDA kernel of gram_norm on the CPU (csrc/harness) and compares it with float64 numpy.

A program, so that a fault cannot take the tests down and a sanitizer can be preloaded:

    gram_norm_on_cpu.py LIBRARY (tf32|tf32x3|bfloat16|float16) (full|small|faults) [--exact]

Exit status: 0 all right, 3 a wrong result, 4 an error reported by the harness. With --exact buffers end where the
operands end, for AddressSanitizer; otherwise NaN surrounds the operands, so that a read too far changes the result.
Prints how many cases ran and a checksum of all results.
"""

import ctypes
import hashlib
import sys
from typing import NamedTuple

import numpy as np
from outer_norm_on_cpu import STORAGE, decode, encode
from stats_on_cpu import ELEMENTS, GUARD, SENTINEL, Options

PRECISIONS = ["tf32", "tf32x3", "bfloat16", "float16"]
TILES = {64: 1, 128: 2, 32: 3}  # Options::tile
PLAN = ("tile", "slot", "pairs", "units", "splits", "copy_a", "copy_b", "workspace_bytes")


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *[(name, ctypes.c_int64) for name in ("stride_n", "stride_t", "stride_c")]]


class Params(ctypes.Structure):
    """GramNormParams of csrc/cuda/gram_norm/gram_norm.h."""

    _fields_ = [
        ("element", ctypes.c_int),
        ("tf32", ctypes.c_bool),
        ("N", ctypes.c_int64),
        *[(name, ctypes.c_int) for name in ("T", "I", "O")],
        *[(name, Operand) for name in ("a", "b")],
        ("out", ctypes.c_void_p),
    ]


def dtype_of(precision):
    return precision if precision in ("bfloat16", "float16") else "float32"


def to_tf32(values):
    """As to_tf32 of csrc/cuda/common/ptx.cuh, and then the bits that the tensor cores drop."""
    nudged = (values.astype(np.float32).astype(np.float64) * (1 + 1.375 / 4096)).astype(np.float32)
    return (nudged.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64)


LAYOUTS = ("wide", "padded", "dense", "even", "odd", "spread", "first_fastest", "middle_fastest")


def place(values, layout, dtype, exact):
    """Stores values [.., K] in a buffer full of NaN; returns (buffer, view, strides in elements).

    wide: rows at multiples of 16 bytes, that end where the values end or, padded, with NaN between; dense: no
    gaps; even: rows at multiples of 4 bytes, not of 16; odd: at odd elements; spread: every third element;
    first_fastest, middle_fastest: that dim is the adjacent one.
    """
    *outer, K = values.shape
    lanes = 16 // np.dtype(STORAGE[dtype]).itemsize
    up = -(-K // lanes) * lanes
    row = {"wide": up, "padded": up + lanes, "dense": K, "even": K + K % 2 + (up == K) * 2, "odd": K + 1 - K % 2}
    order = list(range(values.ndim))
    if layout == "first_fastest":
        order = [*order[1:], 0]
    if layout == "middle_fastest":
        order = [order[0], *order[2:], *order[1:2]] if values.ndim > 2 else [*order[1:], 0]
    strides, step = [0] * values.ndim, 3 if layout == "spread" else 1
    for dim in reversed(order):
        strides[dim] = step
        step *= row.get(layout, values.shape[dim]) if dim == values.ndim - 1 else values.shape[dim]
    offset = {"even": lanes // 2, "odd": 1, "spread": 5}.get(layout, 0)
    extent = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    buffer = encode(np.full(offset + extent + (0 if exact else 64), np.nan), dtype)
    view = np.lib.stride_tricks.as_strided(buffer[offset:], values.shape, [s * buffer.itemsize for s in strides])
    view[...] = encode(values, dtype)
    return buffer, view, strides, offset


class Case(NamedTuple):
    name: str
    a: np.ndarray  # [N, T, I]
    b: np.ndarray  # [N, T, O]
    layouts: tuple = ("wide", "wide")
    options: dict = {}  # of Options; tile is that in rows
    integers: bool = False  # exact in every precision


def cases(precision, size):
    rng = np.random.default_rng(0)

    def normal(N, T, inputs, results, tile=0, splits=0, layouts=("wide", "wide"), scale=(1, 1)):
        a, b = rng.standard_normal((N, T, inputs)) * scale[0], rng.standard_normal((N, T, results)) * scale[1]
        name = f"N={N} T={T} I={inputs} O={results} tile={tile} splits={splits} {layouts}"
        return Case(name, a, b, layouts, {"tile": tile, "splits": splits})

    def integers(N, T, inputs, results, tile=0, splits=0):
        a, b = rng.integers(-2, 3, (N, T, inputs)), rng.integers(-2, 3, (N, T, results))
        options = {"tile": tile, "splits": splits}
        return Case(f"integers N={N} T={T} I={inputs} O={results} {options}", a, b, ("dense", "wide"), options, True)

    def cancelling(N, T, tile=0):
        """Sum_t b_t a_t^T is zero but for rounding."""
        a, b = rng.standard_normal((N, 1, 19)) + np.zeros((1, T, 1)), rng.standard_normal((N, T, 11))
        b[:, -1] -= b.sum(1)
        return Case(f"cancelling N={N} T={T} tile={tile}", a, b, options={"tile": tile})

    def long_sums():
        """Sums of squares of one sign, which truncation would bias."""
        values = np.abs(rng.standard_normal((2, 2, 6000))) + 0.5
        return Case("long sums", values, values[:, :, ::-1][:, :, :4000], ("wide", "dense"))

    def special_values(T, tile):
        case = normal(6, T, 20, 20, tile)
        case.a[1, 0, 3], case.b[3, T - 1, 5] = np.nan, np.inf
        return case._replace(name=f"special values T={T}")

    if size != "full":
        yield normal(5, 3, 37, 20)
        yield normal(1, 1, 1, 1, layouts=("dense", "odd"))
        yield normal(3, 16, 70, 33, layouts=("even", "odd"))
        yield normal(2, 40, 40, 130, layouts=("padded", "middle_fastest"))
        yield normal(2, 40, 40, 130, tile=32, layouts=("spread", "padded"))
        yield normal(1, 70, 100, 64, tile=64, splits=2, layouts=("first_fastest", "dense"))
        yield integers(3, 35, 40, 24, tile=32, splits=3)
        if size == "small":
            yield normal(1, 140, 20, 67, tile=128)
        else:  # every kind of case on which some fault shows, without the large tile
            yield normal(2, 37, 100, 200, 32, splits=7)
            yield cancelling(40, 5)
            yield cancelling(12, 35, 32)
            yield special_values(3, 32)
            yield long_sums()
        return

    for T in range(1, 71):  # a tile of 128 is slow here: now and then
        tile = 0 if T % 2 else 32 if T % 4 else 64
        layouts = LAYOUTS[T % 8], LAYOUTS[(T // 8 + 3 * T) % 8]
        yield normal(1 + T % 5 if T > 20 else T % 45, T, 5 + 13 * T % 90, 1 + 31 * T % 70, tile, layouts=layouts)
    for j, layout in enumerate(LAYOUTS):  # every layout of both, across more than one slab
        yield normal(3, 9, 150, 71, layouts=(layout, LAYOUTS[-j]))
        yield normal(2, 33, 64, 128, layouts=(layout, layout))
    for tile in (0, 32, 64, 128):  # 128 is slow here
        for splits in (1, 3) if tile == 128 else (1, 2, 3, 7):
            yield normal(2, 37, 100, 200, tile, splits)
        yield normal(1, 1, 3, 2, tile)
        yield normal(1, 150 if tile == 128 else 70, 65, 33, tile, layouts=("dense", "padded"))
        for T in (2, 33, 130) if tile == 128 else (1, 2, 7, 16, 33):
            yield integers(3 if T < 100 else 1, T, 20, 50, tile, splits=T % 3 + 1)
        if tile != 128:
            yield cancelling(40, 5, tile)
            yield cancelling(12, 35, tile)
    yield normal(1, 200, 40, 24, 32)  # 28 pairs
    yield normal(1, 40, 700, 300)._replace(name="splits itself")
    if precision != "float16":
        yield normal(4, 6, 50, 30, scale=(1e-9, 1e8))
    yield long_sums()
    for T, tile in ((3, 32), (33, 64), (40, 32)):
        yield special_values(T, tile)


def expected_norms(a, b, precision):
    """(norms [N], magnitudes to which errors are in proportion [N]) in float64."""
    if precision == "tf32":
        a, b = to_tf32(a), to_tf32(b)
    with np.errstate(all="ignore"):
        products = np.einsum("nti,nsi->nts", a, a) * np.einsum("nto,nso->nts", b, b)
        a, b = np.abs(a), np.abs(b)
        magnitudes = np.einsum("nti,nsi->nts", a, a) * np.einsum("nto,nso->nts", b, b)
        return products.sum((1, 2)), magnitudes.sum((1, 2))


def sum_of_steps(terms):
    """What rounding may do to a sum of the products of eight terms at a time, as steps of a random walk."""
    return 2.0**-25 * (terms / 8) ** 0.5


def float32_error(a, b):
    """The largest error, in proportion to the magnitude, of the same formula in numpy's float32."""
    expected, magnitudes = expected_norms(a, b, "")
    a, b = a.astype(np.float32), b.astype(np.float32)
    got = ((a @ a.swapaxes(1, 2)) * (b @ b.swapaxes(1, 2))).sum((1, 2))
    return (np.abs(got - expected) / magnitudes).max()


def check_case(library, precision, case, exact, digest):
    """Runs one case; returns (exit status, explanation)."""
    dtype = dtype_of(precision)
    placed = [
        place(values, layout, dtype, exact) for values, layout in zip((case.a, case.b), case.layouts, strict=True)
    ]
    N, T, inputs = case.a.shape
    out = np.full(N + (0 if exact else GUARD), SENTINEL, np.float32)
    operands = [
        Operand(buffer.ctypes.data + offset * buffer.itemsize, *strides) for buffer, _, strides, offset in placed
    ]
    params = Params(ELEMENTS[dtype], precision == "tf32", N, T, inputs, case.b.shape[2], *operands, out.ctypes.data)
    wanted = {**case.options, "tile": TILES.get(case.options.get("tile"), 0)}
    chosen = (ctypes.c_int64 * len(PLAN))()
    # One multiprocessor: few units fill it, and hardly anything is split unless the case wants it.
    sm_count = 8 if case.name == "splits itself" else 1
    if library.run_gram_norm(ctypes.byref(params), sm_count, ctypes.byref(Options(**wanted)), chosen):
        return 4, f"{case.name}: {library.cuda_on_cpu_last_error().decode()}"
    plan = dict(zip(PLAN, chosen, strict=True))
    for name, value in case.options.items():
        most = sum(-(-values.shape[2] * values.itemsize // 128) for _, values, *_ in placed)
        if value and plan[name] != (min(value, most) if name == "splits" else value):
            return 4, f"{case.name}: {name} {value} was asked for, the plan is {plan}"
    if sm_count > 1 and plan["splits"] == 1:
        return 4, f"{case.name}: the plan is {plan}"
    digest.update(out.tobytes())

    a, b = (decode(view, dtype) for _, view, *_ in placed)
    expected, magnitudes = expected_norms(a, b, precision)
    got = out[:N].astype(np.float64)
    if case.integers:
        right = got == expected
    else:
        # The tensor cores' truncation takes some 2^-24 of every Gram matrix, whatever the number of columns.
        tolerance = 5e-7
        if precision == "tf32x3" and np.isfinite(magnitudes).all():
            tolerance = 2 * max(float32_error(a, b), 2.0**-22)
        tolerance += sum_of_steps(max(a.shape[2], b.shape[2]))
        with np.errstate(invalid="ignore"):
            right = (np.abs(got - expected) <= tolerance * magnitudes) & (got >= 0)
        right |= ~np.isfinite(magnitudes) & ~np.isfinite(got)
    if not right.all() or np.any(out[N:] != SENTINEL):
        n = np.flatnonzero(~right)[:1]
        with np.errstate(all="ignore"):
            errors = (got - expected) / magnitudes
        return 3, f"{case.name}: sample {n}, got {got}, expected {expected}, errors {errors}, {plan}"
    return 0, case.name


def main():
    path, precision, size = sys.argv[1:4]
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    digest, count = hashlib.sha256(), 0
    for case in cases(precision, size):
        status, explanation = check_case(library, precision, case, "--exact" in sys.argv, digest)
        if status:
            print(explanation)
            sys.exit(status)
        count += 1
    print(count, "cases", digest.hexdigest())


if __name__ == "__main__":
    main()

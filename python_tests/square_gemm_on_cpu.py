"""Runs the CUDA kernels of square_gemm on the CPU (csrc/harness) and compares them with float64 numpy.

A program, so that a fault cannot take the tests down and a sanitizer can be preloaded:

    square_gemm_on_cpu.py LIBRARY (tf32|tf32x3|bfloat16|float16) (full|small|faults) [--exact]

Exit status: 0 all right, 3 a wrong result, 4 an error reported by the harness. With --exact buffers end where the
operands end, for AddressSanitizer; otherwise NaN surrounds the operands, so that a read too far changes the result.
Prints how many cases ran and a checksum of all results.
"""

import ctypes
import hashlib
import sys
from typing import NamedTuple

import numpy as np
from gram_norm_on_cpu import LAYOUTS, dtype_of, place, sum_of_steps, to_tf32
from outer_norm_on_cpu import decode, encode
from stats_on_cpu import CENTERED, ELEMENTS, GRAD, GUARD, HALF_ULP, SENTINEL, SQUARES, Options, StatsOutputs

TILES = {64: 1, 128: 2}  # Options::tile
PLAN = ("tile", "sums", "tiles", "splits", "copy_a", "copy_b", "workspace_bytes")
EVERYTHING = GRAD | SQUARES | CENTERED
WANTS = [EVERYTHING, SQUARES, GRAD | SQUARES, CENTERED, GRAD | CENTERED, SQUARES | CENTERED]
RESULTS = {"grad": GRAD, "sum_grad_squared": SQUARES, "sum_grad_centered_squared": CENTERED}


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *[(name, ctypes.c_int64) for name in ("stride_n", "stride_c")]]


class Params(ctypes.Structure):
    """SquareGemmParams of csrc/cuda/square_gemm/square_gemm.h."""

    _fields_ = [
        ("element", ctypes.c_int),
        ("tf32", ctypes.c_bool),
        ("N", ctypes.c_int64),
        *[(name, ctypes.c_int) for name in ("O", "I")],
        *[(name, Operand) for name in ("a", "b")],
    ]


class Case(NamedTuple):
    name: str
    a: np.ndarray  # [N, I]
    b: np.ndarray  # [N, O]
    want: int
    layouts: tuple = ("wide", "wide")
    options: dict = {}  # of Options; tile is that in rows
    integers: bool = False  # exact in every precision
    misaligned: bool = False  # results


def cases(size):
    rng = np.random.default_rng(0)

    def normal(N, rows, inputs, want, tile=0, splits=0, layouts=("wide", "wide"), mean=0.0, misaligned=False):
        a, b = rng.standard_normal((N, inputs)), rng.standard_normal((N, rows))
        if mean:
            a, b = 1 + a / mean, 1 + b / mean
        name = f"N={N} O={rows} I={inputs} want={want} tile={tile} splits={splits} mean={mean} {layouts}"
        return Case(name, a, b, want, layouts, {"tile": tile, "splits": splits}, misaligned=misaligned)

    def integers(N, rows, inputs, want, tile=0, splits=0):
        options = {"tile": tile, "splits": splits}
        a, b = rng.integers(-2, 3, (N, inputs)), rng.integers(-2, 3, (N, rows))
        return Case(f"integers N={N} O={rows} I={inputs} {options}", a, b, want, ("dense", "wide"), options, True)

    def long_sums():
        """Sums of one sign, which truncation would bias."""
        values = [np.abs(rng.standard_normal((4000, columns))) + 0.5 for columns in (5, 6)]
        return Case("long sums", *values, GRAD | SQUARES)

    def special_values(N, splits):
        case = normal(N, 40, 30, EVERYTHING, splits=splits)
        case.a[1, 3], case.b[3, 5], case.b[5, 7] = np.nan, np.inf, -np.inf
        return case._replace(name=f"special values N={N}")

    if size != "full":
        yield normal(5, 7, 9, EVERYTHING, layouts=("dense", "odd"))
        yield normal(70, 68, 40, EVERYTHING, tile=64, splits=2, layouts=("even", "padded"))
        yield normal(40, 33, 70, GRAD | SQUARES, layouts=("first_fastest", "spread"))
        yield normal(33, 20, 70, SQUARES, misaligned=True)
        yield normal(65, 10, 12, CENTERED, splits=2, mean=100)
        yield integers(48, 65, 66, GRAD | SQUARES)
        if size == "small":
            yield normal(40, 33, 132, GRAD | SQUARES, tile=128, layouts=("first_fastest", "spread"))
        else:  # every kind of case on which some fault shows, without the large tile
            yield normal(200, 12, 40, EVERYTHING, mean=10000)
            yield normal(1, 9, 40, EVERYTHING)
            yield special_values(20, 1)
            yield long_sums()
        return

    for j, N in enumerate([1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 100, 129]):
        for k in range(2):
            want, tile = WANTS[(j + k) % len(WANTS)], (0, 64, 0, 128)[(j + 2 * k) % 4]
            layouts = LAYOUTS[j % 8], LAYOUTS[(j // 8 + 3 * j + k) % 8]
            rows, inputs = (1 + 13 * j % 70, 5 + 37 * j % 130) if k else (3 + 41 * j % 140, 1 + 17 * j % 66)
            yield normal(N, rows, inputs, want, tile, j % 4, layouts)
    for j, layout in enumerate(LAYOUTS):  # every layout of both
        yield normal(37, 66, 33, EVERYTHING, layouts=(layout, LAYOUTS[-j]))
        yield normal(35, 40, 72, GRAD | SQUARES, layouts=(layout, layout))
    for tile in (0, 64, 128):
        for splits in (1, 2, 5):
            yield normal(161, 70, 68, EVERYTHING, tile, splits)
            yield integers(161, 33, 20, SQUARES | GRAD, tile, splits)
        for want in WANTS:
            yield normal(40, 20, 12, want, tile)
            yield normal(40, 21, 12, want, tile, 2, misaligned=True)
        yield integers(1, 3, 2, EVERYTHING, tile)
        yield integers(70, 130, 129, EVERYTHING, tile)
    for mean in (2, 6, 30, 100, 10000):  # of the factors, in units of their spread
        for splits in (1, 3):
            yield normal(200, 12, 40, EVERYTHING, 0, splits, mean=mean)
        yield normal(97, 5, 33, CENTERED, layouts=("odd", "first_fastest"), mean=mean)
    yield normal(2000, 30, 30, EVERYTHING)._replace(name="splits itself")
    yield long_sums()
    for N, splits in ((20, 1), (70, 2)):
        yield special_values(N, splits)


def references(a, b, precision):
    """{name: (values [O, I], tolerances)} in float64, of what the kernel's products are exact for."""
    squares_a, squares_b = a * a, b * b
    if precision != "tf32x3":
        squares_a, squares_b = to_tf32(squares_a), to_tf32(squares_b)
    sum_a, sum_b = (to_tf32(a), to_tf32(b)) if precision == "tf32" else (a, b)
    with np.errstate(all="ignore"):
        grad, grad_magnitude = sum_b.T @ sum_a, np.abs(b).T @ np.abs(a)
        squares = squares_b.T @ squares_a
        error = {"grad": 4e-7, "squares": 4e-7}
        if precision == "tf32x3" and np.isfinite(squares).all():
            a32, b32 = a.astype(np.float32), b.astype(np.float32)
            float32_errors = {
                "grad": (np.abs(b32.T @ a32 - grad) / (grad_magnitude + 1e-30)).max(),
                "squares": (np.abs((b32 * b32).T @ (a32 * a32) - squares) / (squares + 1e-30)).max(),
            }
            # The tensor cores' truncation takes some 2^-24 of every sum, and a single product of three terms may err by
            # 2^-22: more than float32 arithmetic, but only where there are few samples.
            error = {name: 2 * max(value, 2.0**-22) for name, value in float32_errors.items()}
        error = {name: value + sum_of_steps(len(a)) for name, value in error.items()}
    return {
        "grad": (grad, error["grad"] * grad_magnitude),
        "sum_grad_squared": (squares, error["squares"] * squares),
    }


def right_centered(got, a, b, precision, results):
    """Which centered sums are right: by the difference of the sums, or by deviations where that cancels."""
    N = len(a)
    (grad, grad_error), (squares, squares_error) = results["grad"], results["sum_grad_squared"]
    with np.errstate(all="ignore"):
        left = squares - grad * grad / N
        left_error = squares_error + (2 * np.abs(grad) * grad_error) / N + 3e-7 * squares
        G = b[:, :, None] * a[:, None, :]
        centered = ((G - G.mean(0)) ** 2).sum(0)
        tolerance = 3e-6 * centered + 2.0**-60 * squares
        by_difference, by_deviations = np.abs(got - left) <= left_error, np.abs(got - centered) <= tolerance
        limit = (1 / 64 if precision == "tf32x3" else 1 / 4) * squares
        right = np.where(left > limit, by_difference, by_deviations)
        right |= (np.abs(left - limit) <= left_error) & (by_difference | by_deviations)
        right &= got >= 0
        return right | (~np.isfinite(centered) & ~np.isfinite(got))


def check_case(library, precision, case, exact, digest):
    """Runs one case; returns (exit status, explanation)."""
    dtype = dtype_of(precision)
    placed = [
        place(values, layout, dtype, exact) for values, layout in zip((case.a, case.b), case.layouts, strict=True)
    ]
    (N, inputs), rows = case.a.shape, case.b.shape[1]
    operands = [
        Operand(buffer.ctypes.data + offset * buffer.itemsize, *strides) for buffer, _, strides, offset in placed
    ]
    params = Params(ELEMENTS[dtype], precision == "tf32", N, rows, inputs, *operands)
    begin = int(case.misaligned)
    size = begin + rows * inputs + (0 if exact else GUARD)
    buffers = {
        name: encode(np.full(size, SENTINEL), dtype if name == "grad" else "float32")
        for name, bit in RESULTS.items()
        if case.want & bit
    }
    outputs = StatsOutputs(**{name: x.ctypes.data + begin * x.itemsize for name, x in buffers.items()})
    wanted = {**case.options, "tile": TILES.get(case.options.get("tile"), 0)}
    chosen = (ctypes.c_int64 * len(PLAN))()
    sm_count = 8 if case.name == "splits itself" else 1
    references_to = [ctypes.byref(x) for x in (params, outputs, Options(**wanted))]
    if library.run_square_gemm(*references_to[:2], sm_count, references_to[2], chosen):
        return 4, f"{case.name}: {library.cuda_on_cpu_last_error().decode()}"
    plan = dict(zip(PLAN, chosen, strict=True))
    tile, splits = case.options.get("tile"), case.options.get("splits")
    if tile and plan["tile"] != (64 if precision == "tf32x3" or plan["sums"] else tile):
        return 4, f"{case.name}: the plan is {plan}"
    most = -(-N // (16 if dtype == "float32" else 32))
    if splits and plan["splits"] != min(splits, most) or (sm_count > 1 and plan["splits"] == 1):
        return 4, f"{case.name}: the plan is {plan}"

    a, b = (decode(view, dtype) for _, view, *_ in placed)
    results = references(a, b, precision)
    for name, buffer in buffers.items():
        digest.update(buffer.tobytes())
        element = dtype if name == "grad" else "float32"
        stored = decode(buffer, element)
        got = stored[begin : begin + rows * inputs].reshape(rows, inputs)
        if name == "sum_grad_centered_squared":
            right, expected = right_centered(got, a, b, precision, results), "below"
        else:
            expected, tolerance = results[name]
            if case.integers:
                tolerance = 0 * tolerance
                expected = decode(encode(expected, element), element)
            else:
                tolerance = tolerance + 1.01 * HALF_ULP[element] * np.abs(expected) + (element == "float16") * 6e-8
            with np.errstate(invalid="ignore"):
                right = (np.abs(got - expected) <= tolerance) | (~np.isfinite(expected) & ~np.isfinite(got))
        if not right.all():
            o, i = np.argwhere(~right)[0]
            if isinstance(expected, str):
                G = b[:, o] * a[:, i]
                expected = np.full((rows, inputs), ((G - G.mean()) ** 2).sum())
            value = expected[o, i]
            return 3, f"{case.name}: {name}[{o}, {i}], {(~right).sum()} wrong: got {got[o, i]}, not {value}; {plan}"
        if np.any(np.delete(stored, range(begin, begin + rows * inputs)) != SENTINEL):
            return 3, f"{case.name}: {name}: got values outside of it"
    return 0, case.name


def main():
    path, precision, size = sys.argv[1:4]
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    digest, count = hashlib.sha256(), 0
    for case in cases(size):
        status, explanation = check_case(library, precision, case, "--exact" in sys.argv, digest)
        if status:
            print(explanation)
            sys.exit(status)
        count += 1
    print(count, "cases", digest.hexdigest())


if __name__ == "__main__":
    main()

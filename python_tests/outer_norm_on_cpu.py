"""Runs the CUDA kernel of outer_norm on the CPU (csrc/harness) and compares it with float64 numpy.

A program, so that a fault cannot take the tests down and a sanitizer can be preloaded:

    outer_norm_on_cpu.py LIBRARY DTYPE (small|full) [--exact]

Exit status: 0 all right, 3 a wrong result, 4 an error reported by the harness. With --exact buffers end where the
operands end, for AddressSanitizer; otherwise NaN follows, so that a read too far changes the result.
"""

import ctypes
import sys

import numpy as np

STORAGE = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "float16": np.float16}


class Params(ctypes.Structure):
    """OuterNormParams of csrc/ops/outer_norm.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("input", "grad_output", "out")],
        *[(name, ctypes.c_int64) for name in ("N", "I", "O")],
        *[(name, ctypes.c_int64 * 2) for name in ("input_strides", "grad_output_strides")],
    ]


def encode(values, dtype):
    """float64 values -> the storage of `dtype`; bfloat16 is kept as its bits."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return values.astype(STORAGE[dtype])
        bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def decode(stored, dtype):
    """The inverse of `encode`, exactly."""
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


def place(values, layout, dtype, exact):
    """Stores values [N, K] in a buffer full of NaN; returns (buffer, view [N, K], offset, strides), in elements.

    layout: dense; padded (odd row stride, so that rows are misaligned) by an offset of 1, 2 or 3; transposed;
    every second element; one row or one column expanded.
    """
    n, k = values.shape
    offset = int(layout[-1]) if layout.startswith("padded") else 0
    strides = {
        "dense": (k, 1),
        "transposed": (1, max(n, 1)),
        "spread": (2 * k + 1, 2),
        "one_row": (0, 1),
        "one_column": (1, 0),
    }.get(layout, (k + 3, 1))
    extent = (n - 1) * strides[0] + (k - 1) * strides[1] + 1 if n and k else 0
    buffer = encode(np.full(offset + extent + (0 if exact else 64), np.nan), dtype)
    view = np.lib.stride_tricks.as_strided(buffer[offset:], (n, k), [stride * buffer.itemsize for stride in strides])
    view[...] = encode(values, dtype)
    return buffer, view, offset, strides


def cases(dtype, size):
    """Yields (name, input [N, I], grad_output [N, O], layout of each), as float64."""
    rng = np.random.default_rng(0)
    lengths = [1, 3, 31, 32, 33, 127, 128, 1000, 1025, 4100] if size == "full" else [1, 33, 130, 2100]
    layouts = ["dense", "padded1", "transposed", "padded2", "spread", "one_row", "padded3", "one_column"]
    counts = [0, 1, 2, 9, 17] if size == "full" else [1, 9]
    shapes = [(counts[j % len(counts)], i, lengths[(j * 3 + 1) % len(lengths)]) for j, i in enumerate(lengths * 2)]
    shapes += [(3, 0, 5), (2, 5, 0), (0, 0, 0)]
    for j, (n, i, o) in enumerate(shapes):
        pair = layouts[j % len(layouts)], layouts[(j + 1 + j // len(layouts)) % len(layouts)]
        if size == "full":
            pair = pair if j % 3 else ("dense", "dense")
        values = rng.standard_normal((n, i)), rng.standard_normal((n, o))
        yield f"N={n} I={i} O={o} {pair}", *values, pair
    yield "an empty row, Inf in the other: I=0", np.zeros((2, 0)), np.full((2, 5), np.inf), ("dense", "dense")
    for i, o in ((40, 7), (2200, 40)):  # a warp, a block per sample
        a, b = rng.standard_normal((8, i)), rng.standard_normal((8, o))
        a[0] = 0
        a[1], b[1] = 0, 0
        a[2, i // 2] = np.nan
        b[3, o - 1] = np.inf
        a[4], b[4, 0] = 0, -np.inf
        if dtype != "float16":  # |a|^2 overflows or underflows in float32, the product does not
            a[5], b[5] = a[5] * 1e-25, b[5] * 1e25
            a[6], b[6] = a[6] * 1e30, b[6] * 1e-22
            a[7], b[7] = 0, b[7] * 1e30
        yield f"special values I={i} O={o}", a, b, ("padded1", "dense")


def check_case(library, dtype, case, exact):
    """Runs one case; returns (exit status, explanation)."""
    name, a, b, layouts = case
    result_type = np.float64 if dtype == "float64" else np.float32
    input_buffer, input_view, input_offset, input_strides = place(a, layouts[0], dtype, exact)
    grad_buffer, grad_view, grad_offset, grad_strides = place(b, layouts[1], dtype, exact)
    n = a.shape[0]
    out = np.full(n if exact else n + 8, -7, result_type)
    params = Params(
        input_buffer.ctypes.data + input_offset * input_buffer.itemsize,
        grad_buffer.ctypes.data + grad_offset * grad_buffer.itemsize,
        out.ctypes.data,
        *(n, a.shape[1], b.shape[1]),
        (ctypes.c_int64 * 2)(*input_strides),
        (ctypes.c_int64 * 2)(*grad_strides),
    )
    if library.run_outer_norm(ctypes.byref(params)):
        return 4, f"{name}: {library.cuda_on_cpu_last_error().decode()}"
    with np.errstate(all="ignore"):
        norms = [np.square(decode(view, dtype)).sum(1) for view in (input_view, grad_view)]
        expected = (norms[0] * norms[1]).astype(result_type)
    if not a.shape[1] or not b.shape[1]:
        expected[:] = 0
    tolerance = 1e-13 if dtype == "float64" else 2e-6
    if not np.allclose(out[:n], expected, rtol=tolerance, atol=0, equal_nan=True) or np.any(out[n:] != -7):
        return 3, f"{name}: got {out}, expected {expected}"
    return 0, name


def main():
    path, dtype, size = sys.argv[1:4]
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    for case in cases(dtype, size):
        status, explanation = check_case(library, dtype, case, "--exact" in sys.argv)
        if status:
            print(explanation)
            sys.exit(status)


if __name__ == "__main__":
    main()

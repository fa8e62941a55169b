"""What the programs share that run kernels of statistics on the CPU (csrc/harness): numpy and ctypes alone.

`Outputs` are the buffers of one launch and their comparison with float64 per-sample gradients.
"""

import ctypes
import mmap

import numpy as np
from outer_norm_on_cpu import decode, encode

ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2}
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
GRAD, BATCH_GRAD, BATCH_L2, SQUARES, CENTERED, WEIGHTED = 1, 2, 4, 8, 16, 32  # what may be wanted
EVERYTHING = GRAD | BATCH_GRAD | BATCH_L2 | SQUARES | CENTERED
SENTINEL, GUARD = -7.0, 8
MAP_NORESERVE = 0x4000  # of Linux; Python's mmap has it from 3.13 on


class Operand(ctypes.Structure):
    """Of csrc/cuda/common/outer_problem.h, as the two that follow."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("stride_n", "stride_c")],
        ("stride", ctypes.c_int64 * 3),
    ]


class OuterProblem(ctypes.Structure):
    _fields_ = [
        ("element", ctypes.c_int),
        ("tf32", ctypes.c_bool),
        ("N", ctypes.c_int64),
        *[(name, ctypes.c_int) for name in ("groups", "O", "channels")],
        *[(name, ctypes.c_int * 3) for name in ("positions", "size", "kernel", "step", "padding", "dilation")],
        *[(name, Operand) for name in ("a", "b")],
    ]


class StatsOutputs(ctypes.Structure):
    NAMES = ("grad", "batch_grad", "batch_l2", "sum_grad_squared", "sum_grad_centered_squared", "weights")
    _fields_ = [(name, ctypes.c_void_p) for name in NAMES]


class ColumnOutputs(ctypes.Structure):
    NAMES = ("signs", "factor", "batch_diag", "diag")
    _fields_ = [
        ("V", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("a_stride_v", "b_stride_v")],
        *[(name, ctypes.c_void_p) for name in NAMES],
    ]


class Options(ctypes.Structure):
    """Of csrc/cuda/common/options.h."""

    NAMES = ("way", "tile", "loader", "splits", "t_splits", "sm_count")
    _fields_ = [(name, ctypes.c_int64) for name in NAMES]


def place(values, order, spread, dtype, exact, offset=0):
    """Stores values in a buffer full of NaN; returns (buffer, view, strides), in elements.

    order: the dims from the outermost to the innermost in memory; a dim left out has stride 0, and the values
    must be constant along it. spread: elements between neighbours of the innermost dim; if more than 1, rows
    are padded too. exact: no slack behind, for AddressSanitizer.
    """
    strides = [0] * values.ndim
    step = spread
    for dim in reversed(order):
        strides[dim] = step
        step = step * values.shape[dim] + (spread > 1)
    extent = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    buffer = encode(np.full(offset + extent + (0 if exact else 64), np.nan), dtype)
    view = np.lib.stride_tricks.as_strided(buffer[offset:], values.shape, [s * buffer.itemsize for s in strides])
    view[...] = encode(values, dtype)
    return buffer, view, strides


def place_apart(values, strides):
    """Stores values as bfloat16 at strides of gigabytes, in memory that is only reserved; returns what `place` does."""
    extent = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    buffer = np.frombuffer(mmap.mmap(-1, 2 * extent, flags=flags), np.uint16)
    view = np.lib.stride_tricks.as_strided(buffer, values.shape, [2 * stride for stride in strides])
    view[...] = encode(values, "bfloat16")
    return buffer, view, list(strides)


class Outputs:
    """Buffers for what is wanted of per-sample gradients [N, count]."""

    def __init__(self, N, count, dtype, want, weights=None):
        self.want, self.dtype, self.weights = want, dtype, None
        shapes = {
            "grad": (GRAD | WEIGHTED, count, dtype),
            "batch_grad": (BATCH_GRAD, N * count, dtype),
            "batch_l2": (BATCH_L2, N, "float32"),
            "sum_grad_squared": (SQUARES, count, "float32"),
            "sum_grad_centered_squared": (CENTERED, count, "float32"),
        }
        self.buffers = {
            name: encode(np.full(size + GUARD, SENTINEL), element)
            for name, (bit, size, element) in shapes.items()
            if want & bit
        }
        if want & WEIGHTED:
            self.weights = np.asarray(weights, np.float32)
        self.structure = StatsOutputs(**{name: buffer.ctypes.data for name, buffer in self.buffers.items()})
        self.structure.weights = self.weights.ctypes.data if self.weights is not None else None

    def wrong(self, G, magnitude, exact=False):
        """A description of the first wrong result, or None.

        G [N, count] in float64; magnitude: the same with absolute values in place of all products, in proportion to
        which G may err. exact: all sums are small integers.
        """
        with np.errstate(all="ignore"):
            error = (0 if exact else 1e-6) * magnitude
            N, weights = len(G), self.weights if self.weights is not None else np.ones(len(G))
            mean = G.mean(0)
            deviation, deviation_error = np.abs(G - mean), error + error.mean(0) + 1e-7 * np.abs(G).max(0)
            relative = 0 if exact else 4e-6
            expected = {
                "grad": ((weights[:, None] * G).sum(0), (np.abs(weights)[:, None] * error).sum(0) * 2),
                "batch_grad": (G, error),
                "batch_l2": ((G**2).sum(1), (2 * np.abs(G) * error).sum(1) + relative * (G**2).sum(1)),
                "sum_grad_squared": (
                    (G**2).sum(0),
                    (2 * np.abs(G) * error).sum(0) + (relative + (1e-6 if self.want & CENTERED else 0)) * (G**2).sum(0),
                ),
                "sum_grad_centered_squared": (
                    (deviation**2).sum(0),
                    (2 * deviation * deviation_error + deviation_error**2).sum(0) + 4e-6 * (deviation**2).sum(0),
                ),
            }
        for name, buffer in self.buffers.items():
            element = self.dtype if name in ("grad", "batch_grad") else "float32"
            got = decode(buffer, element)
            got, guard = got[:-GUARD], got[-GUARD:]
            values, tolerance = (x.reshape(-1) for x in expected[name])
            if exact and name != "sum_grad_centered_squared":
                values, tolerance = decode(encode(values, element), element), 0 * tolerance
                if name == "sum_grad_squared" and self.want & CENTERED:
                    tolerance = 4e-6 * values
            else:
                tolerance = tolerance + 1.01 * HALF_ULP[element] * np.abs(values) + (element == "float16") * 6e-8
            with np.errstate(invalid="ignore"):
                right = np.abs(got - values) <= tolerance
            right |= got == values  # infinities
            right |= np.isnan(got) & np.isnan(values)
            if not right.all():
                worst = np.flatnonzero(~right)[0]
                return f"{name}[{worst}] of {N} samples: got {got[worst]}, expected {values[worst]}"
            if np.any(guard != SENTINEL):
                return f"{name}: written past its end"
        return None

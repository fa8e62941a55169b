"""`python memory_probe.py DTYPE [columns]`: bytes of peak memory that large calls take beyond operands and results.

A program of its own, because only a process without a history has a clean heap. Prints {case: bytes} as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
from op_cases import LAYOUTS, Case, conv, linear, want_bits

WEIGHTED = ("weighted",)  # sum_n weights[n] G_n
STATISTICS = ("grad", "batch_l2", "sum_grad_squared", "sum_grad_centered_squared")
LARGE: dict[str, tuple[Case, tuple[str, ...]]] = {  # operands of 20 to 60 MB in float32
    "linear": (linear((12000, 700), 300), STATISTICS),
    "linear_norms": (linear((12000, 700), 300), ("batch_l2",)),
    "linear_weighted": (linear((12000, 700), 300), WEIGHTED),
    "linear_tokens": (linear((4, 4000, 500), 300), STATISTICS),
    "linear_tokens_weighted": (linear((4, 4000, 500), 300), WEIGHTED),
    "linear_tokens_norms": (linear((2000, 6, 500), 600), ("batch_l2",)),
    "linear_few_tokens": (linear((2000, 6, 400), 200), ("grad", "batch_l2")),
    "linear_tokens_time_major": (
        linear((4, 4000, 500), 300, input_layout="batch_inside", grad_output_layout="batch_inside"),
        STATISTICS,
    ),
    "linear_one_long_sequence": (linear((1, 50000, 120), 100), STATISTICS),
    "linear_many_features": (linear((2, 4, 5000), 3000), STATISTICS),
    "linear_one_output": (linear((50, 300, 800), 1), STATISTICS),
    "conv": (conv((16, 32, 80, 80), 24, 3, padding=1), STATISTICS),
    "conv_norms": (conv((16, 32, 80, 80), 24, 3, padding=1), ("batch_l2",)),
    "conv_weighted": (conv((16, 32, 80, 80), 24, 3, padding=1), WEIGHTED),
    "conv_channels_last": (
        conv((16, 32, 80, 80), 24, 3, input_layout="channels_last", grad_output_layout="channels_last"),
        STATISTICS,
    ),
    "conv_1x1": (conv((24, 96, 60, 60), 32, 1), STATISTICS),
    "conv_many_channels": (conv((2, 1500, 6, 6), 600, 3, padding=1), STATISTICS),
    "conv_large_image": (conv((1, 4, 1500, 1200), 3, 3, padding=1), STATISTICS),
    "conv_wide_image": (conv((1, 40, 5, 30000), 7, 3, padding=1), STATISTICS),
    "conv_large_strided_image": (conv((1, 8, 1500, 1200), 20, 5, stride=3), STATISTICS),
    "conv_dilated_image": (conv((1, 4, 1200, 1200), 4, 3, padding=30, dilation=30), STATISTICS),
    "conv_depthwise": (conv((4, 32, 300, 300), 32, 3, padding=1, groups=32), STATISTICS),
    "conv_large_depthwise_image": (conv((1, 4, 1500, 1300), 8, 5, padding=2, groups=4), STATISTICS),
    "conv_grouped": (conv((8, 64, 100, 100), 64, 3, padding=1, groups=8), STATISTICS),
    "conv1d_long": (conv((1, 12, 500000), 10, 9, padding=4), STATISTICS),
    "conv3d_volume": (conv((1, 4, 100, 120, 130), 3, 3, padding=1), STATISTICS),
    "conv_transpose": (conv((4, 16, 150, 150), 8, 3, stride=2, output_padding=1), STATISTICS),
    "conv_transpose_large_image": (conv((1, 4, 800, 900), 4, 4, stride=2, padding=1, output_padding=0), STATISTICS),
}
DIAG, DIAGS = 4, 6  # want bits of the *_column_stats operators: diag; batch_diag too
LARGE_COLUMNS: dict[str, tuple[Case, int, int]] = {  # case, V, want; gradients of 30 MB or more, or large samples
    "linear": (linear((3000, 700), 300), 4, DIAG),
    "linear_tokens": (linear((150, 20, 300), 300), 3, DIAG),
    "linear_tokens_of_each_sample": (linear((20, 40, 300), 300), 6, DIAGS),
    "linear_one_long_sequence": (linear((1, 20000, 40), 50), 4, DIAGS),
    "linear_many_columns": (linear((1, 4, 2000), 3000), 20, DIAG),
    "conv": (conv((128, 64, 9, 9), 96, 3), 3, DIAG),
    "conv_of_each_sample": (conv((32, 64, 9, 9), 96, 3), 6, DIAGS),
    "conv_many_channels": (conv((1, 1500, 5, 5), 300, 3, padding=1), 6, DIAG),
    "conv_large_image": (conv((1, 4, 800, 700), 3, 3, padding=1), 5, DIAGS),
    "conv_large_image_of_many_channels": (conv((1, 64, 130, 140), 100, 1), 3, DIAGS),
    "conv_depthwise": (conv((1, 32, 200, 200), 32, 3, padding=1, groups=32), 4, DIAGS),
    "conv_transpose": (conv((128, 96, 5, 5), 64, 3, stride=2, output_padding=1), 3, DIAG),
    "conv_transpose_large_image": (conv((1, 16, 90, 90), 8, 3, stride=2, output_padding=1), 5, DIAGS),
}
WARM_UP = {case.family: case for case in (linear((4, 9, 20), 30), conv((4, 3, 9, 9), 8, 3))}
WARM_UP["conv_transpose"] = conv((4, 3, 9, 9), 8, 3, output_padding=0)


def status(field: str) -> int:
    """Bytes of a memory line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def extra_of_call(call) -> int:
    """Peak resident memory of one call above what was resident before and what its results hold."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts at what is resident now
    before = status("VmRSS")
    results = call()
    return status("VmHWM") - before - sum(t.untyped_storage().nbytes() for t in results)


def extra_bytes(case: Case, want: tuple[str, ...], dtype: torch.dtype) -> int:
    """Those of a case of LARGE."""
    WARM_UP[case.family].raw(*WARM_UP[case.family].operands(dtype=dtype))  # loads code and starts threads
    shapes = (case.input_shape, case.input_layout), (case.output_shape(), case.grad_output_layout)
    operands = [LAYOUTS[layout](torch.full(shape, 0.5, dtype=dtype)) for shape, layout in shapes]
    weights = torch.ones(case.input_shape[0])
    if want == WEIGHTED:
        return extra_of_call(lambda: (case.raw_weighted(*operands, weights),))
    return extra_of_call(lambda: sum(case.raw(*operands, want_bits(*want), want_bits(*want)), ()))


def extra_column_bytes(case: Case, count: int, want: int, dtype: torch.dtype) -> int:
    """Those of a case of LARGE_COLUMNS."""
    WARM_UP[case.family].raw(*WARM_UP[case.family].operands(dtype=dtype))
    input = torch.full(case.input_shape, 0.5, dtype=dtype)
    columns = torch.full((count, *case.output_shape()), 0.5, dtype=dtype)
    operator = getattr(torch.ops.backpack_cuda, f"{case.family}_column_stats")
    return extra_of_call(lambda: operator(input, columns, None, *case.geometry_arguments(), want, want))


def in_a_fork(function, *arguments) -> int:
    """The result of a call made by a forked copy of this process, so that each call finds the same clean heap."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(function(*arguments)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        result = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, arguments
    return int(result)


if __name__ == "__main__":
    torch.set_num_threads(2)
    dtype = getattr(torch, sys.argv[1])
    function, cases = (extra_column_bytes, LARGE_COLUMNS) if sys.argv[2:] == ["columns"] else (extra_bytes, LARGE)
    print(json.dumps({name: in_a_fork(function, *case, dtype) for name, case in cases.items()}))

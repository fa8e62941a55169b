"""`python kron_memory_probe.py`: bytes of peak memory that large Kronecker factors take beyond operand and result.

Prints {case: bytes} as JSON; see memory_probe.py.
"""

import json
from pathlib import Path

import torch
from memory_probe import in_a_fork, status
from op_cases import LAYOUTS

import backpack_cuda as bp

LARGE = {  # shape, layout, arguments of conv_kron_factor; the unfolded matrix would take from 60 MB to 3 GB
    "linear": ((12000, 700), "contiguous", None),
    "linear_transposed": ((8000, 700), "reversed_dims", None),
    "linear_many_features": ((300, 3000), "contiguous", None),
    "linear_few_features": ((16, 100000, 7), "contiguous", None),
    "conv": ((16, 32, 80, 80), "contiguous", {"kernel_size": 3, "padding": 1}),
    "conv_channels_last": ((16, 32, 80, 80), "channels_last", {"kernel_size": 3}),
    "conv_many_channels": ((2, 200, 14, 14), "contiguous", {"kernel_size": 3, "padding": 1}),
    "conv_stem": ((4, 3, 224, 224), "contiguous", {"kernel_size": 7, "stride": 2, "padding": 3}),
    "conv_large_image": ((1, 4, 1500, 1200), "contiguous", {"kernel_size": 5, "padding": 2}),
    "conv_strided": ((1, 8, 1500, 1200), "contiguous", {"kernel_size": 5, "stride": 3}),
    "conv_dilated": ((1, 4, 1200, 1200), "contiguous", {"kernel_size": 3, "padding": 30, "dilation": 30}),
    "conv_depthwise": ((4, 32, 300, 300), "contiguous", {"kernel_size": 3, "padding": 1, "groups": 32}),
    "conv_grouped": ((8, 64, 100, 100), "contiguous", {"kernel_size": 3, "padding": 1, "groups": 4}),
    "conv1d_long": ((1, 12, 500000), "contiguous", {"kernel_size": 9, "padding": 4}),
    "conv3d_volume": ((1, 4, 100, 120, 130), "contiguous", {"kernel_size": 3, "padding": 1}),
}


def call(x: torch.Tensor, arguments: dict | None) -> torch.Tensor:
    return bp.ops.linear_kron_factor(x) if arguments is None else bp.ops.conv_kron_factor(x, **arguments)


def extra_bytes(shape: tuple[int, ...], layout: str, arguments: dict | None) -> int:
    """Peak resident memory of one call above what was resident before and what its result holds."""
    call(torch.ones(4, 9), None)  # loads code and starts threads
    x = LAYOUTS[layout](torch.full(shape, 0.5))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts at what is resident now
    before = status("VmRSS")
    result = call(x, arguments)
    return status("VmHWM") - before - result.untyped_storage().nbytes()


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps({name: in_a_fork(extra_bytes, *case) for name, case in LARGE.items()}))

"""How much memory there is, and how much of it to take for what is formed piece by piece."""

import os

import torch

LARGEST = 1 << 30  # bytes, beyond which pieces are no faster
CACHED = 16 << 20  # bytes that stay in a CPU's caches, where pieces are the fastest
_UNKNOWN = 4 << 30  # taken for what is free where the system does not say


def free_memory(device: torch.device) -> int:
    """Bytes of a device's memory that nothing uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return _UNKNOWN


def default_budget(device: torch.device, largest: int = LARGEST) -> int:
    """A quarter of the free bytes, at most `largest`."""
    return min(free_memory(device) // 4, largest)

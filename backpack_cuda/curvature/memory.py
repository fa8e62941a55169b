"""How much memory there is."""

import os

import torch

_UNKNOWN = 4 << 30  # taken for what is free where the system does not say


def free_memory(device: torch.device) -> int:
    """Bytes of a device's memory that nothing uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return _UNKNOWN

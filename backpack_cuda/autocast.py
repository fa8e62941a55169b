"""Autocast: per-sample statistics are formed in the types of their operands, wherever they are asked for."""

import contextlib

import torch


def autocast_enabled(device_type: str) -> bool:
    """Whether operations on such a device run in autocast's type now."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context in which operations on such a device run in the types of their operands."""
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()

"""The caller's autocast: what it makes of attention's inputs, and how our own arithmetic stays out of it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace it
def _available(kind: str) -> bool:
    """Whether devices of a kind know autocast."""
    return torch.amp.is_autocast_available(kind)


def active(device: torch.device) -> bool:
    """Whether the caller's autocast is on for the device."""
    return _available(device.type) and torch.is_autocast_enabled(device.type)


def attended_dtype(states: Tensor) -> torch.dtype:
    """The dtype in which attention reads `states`, and in which its result comes: autocast spares float64 alone."""
    if states.dtype != torch.float64 and active(states.device):
        return torch.get_autocast_dtype(states.device.type)
    return states.dtype


def suspended(device: torch.device) -> AbstractContextManager[None]:
    """Operations on the device compute in the dtypes of their arguments, whatever the caller's autocast."""
    return torch.autocast(device.type, enabled=False) if active(device) else nullcontext()

"""Apply the caller's autocast to attention's inputs, and keep our own arithmetic out of it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace it
def _available(kind: str) -> bool:
    """Return whether devices of this type support autocast."""
    return torch.amp.is_autocast_available(kind)


def active(device: torch.device) -> bool:
    """Return whether the caller's autocast is on for the device."""
    return _available(device.type) and torch.is_autocast_enabled(device.type)


def attended_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype of attention's inputs and result for `states`; autocast leaves only float64 unchanged."""
    if states.dtype != torch.float64 and active(states.device):
        return torch.get_autocast_dtype(states.device.type)
    return states.dtype


def suspended(device: torch.device) -> AbstractContextManager[None]:
    """Compute on the device in the dtypes of the arguments, whatever the caller's autocast."""
    return torch.autocast(device.type, enabled=False) if active(device) else nullcontext()

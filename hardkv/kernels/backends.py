"""Choose the kernels: Triton on GPUs that it supports, the PyTorch references everywhere else."""

import os
import warnings
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# The oldest GPU that Triton supports since 3.4; older GPUs run the references.
MIN_CAPABILITY = (8, 0)
# With larger head dimensions, kernels that hold a tile of whole keys exceed shared memory (Gemma 4: 512, latents: 576).
MAX_SCORED_DIM = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether Triton's interpreter is on; it runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str | None:
    """Return why Triton kernels cannot run on tensors of this device and dtype, or None when they can.

    Args:
        head_dim: head dimension of the keys, for kernels that score; 0 for other kernels.
    """
    if not has_triton():
        return "Triton is not installed: pip install 'hardkv[triton]'"
    if dtype not in KERNEL_DTYPES:
        return f"{dtype} is not one of {', '.join(str(d).removeprefix('torch.') for d in KERNEL_DTYPES)}"
    if head_dim > MAX_SCORED_DIM:
        return f"a head_dim of {head_dim} is larger than the {MAX_SCORED_DIM} that scoring takes"
    if interpreted():
        return "Triton's interpreter multiplies bfloat16 as if it were integers" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"Triton kernels run on GPUs, not on {device.type!r}"
    if not _new_enough(device):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {MIN_CAPABILITY[0]}.0"
    return None


@cache
def _new_enough(device: torch.device) -> bool:
    """Return whether Triton supports a GPU; every layer of every step asks, so cache the driver's answer."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


@torch.compiler.assume_constant_result
def kernels_for(device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str:
    """Return the kernels to use, "triton" or "torch", by `why_not_triton`; warn once on a GPU without Triton."""
    reason = why_not_triton(device, dtype, head_dim)
    if reason is None:
        return "triton"
    if device.type == "cuda":
        _warn_once(reason)
    return "torch"


def current(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's device the current one, because Triton launches on the current device."""
    return torch.cuda.device_of(tensor)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"hardkv runs its slower PyTorch kernels: {reason}", stacklevel=2)

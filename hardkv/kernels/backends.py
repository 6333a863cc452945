"""Which kernels run where: Triton on GPUs it supports, the PyTorch references everywhere else."""

import os
import warnings
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# What Triton supports since 3.4; older GPUs run the references.
MIN_CAPABILITY = (8, 0)
# Beyond this, kernels that hold whole keys of a tile exceed the shared memory of a GPU: Gemma 4 has 512, latents 576.
MAX_SCORED_DIM = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str | None:
    """Why Triton kernels cannot run on tensors of this device and dtype; None when they can.

    Args:
        head_dim: of the keys, for kernels that score; 0 for others.
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
    """Whether Triton supports a GPU; asked in every layer of every step, so the driver is asked once."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


@torch.compiler.assume_constant_result
def kernels_for(device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str:
    """The kernels for tensors, "triton" or "torch", as `why_not_triton`; a GPU without Triton is told of once."""
    reason = why_not_triton(device, dtype, head_dim)
    if reason is None:
        return "triton"
    if device.type == "cuda":
        _warn_once(reason)
    return "torch"


def current(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device_of(tensor)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"hardkv runs its slower PyTorch kernels: {reason}", stacklevel=2)

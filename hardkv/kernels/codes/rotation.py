"""The fixed rotation that makes the coordinates of keys and values nearly Gaussian before they are quantised."""

import random
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def sign_matrix(dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `rotation`, times the square root of its blocks' size: 1, -1, and 0 outside the blocks."""
    block = dim & -dim
    hadamard = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while hadamard.shape[0] < block:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    draw = random.Random(dim)
    signs = torch.tensor([1.0 - 2.0 * draw.getrandbits(1) for _ in range(dim)], dtype=torch.float64, device="cpu")
    with torch.inference_mode(False):
        return (signs[:, None] * torch.block_diag(*[hadamard] * (dim // block))).to(device, dtype)


@lru_cache(maxsize=64)
def pairs_matrix(dim: int, fields: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `sign_matrix` with each field's even columns before its odd ones, for codes read two bytes at a time."""
    with torch.inference_mode(False):
        columns = torch.arange(dim, device=device).view(fields, -1, 2).transpose(1, 2).flatten()
        return sign_matrix(dim, device, dtype)[:, columns].contiguous()


@lru_cache(maxsize=64)
def rotation(dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the orthogonal matrix M `[dim, dim]`: random signs, then a Hadamard transform. Rows of states times M.

    The Hadamard transform runs within blocks of the largest power of two that divides `dim`. The signs depend on `dim`
    only, so that a stored cache can be read anywhere.
    """
    with torch.inference_mode(False):
        return sign_matrix(dim, device, dtype) * (dim & -dim) ** -0.5

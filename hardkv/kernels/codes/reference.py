"""Quantise keys and values to a few bits per coordinate, and back: the PyTorch reference.

A token at rest is a code per coordinate of (x - centre) M / s. M is a fixed rotation (`rotation`), after which the
coordinates are nearly Gaussian. The scale s, one per token, keeps the vector's norm. A code of 4, 3 or 2 bits is a sign
(the highest bit) and the index of one of the levels that quantise a Gaussian with the least mean square error (Lloyd
1982, Max 1960), rounded to integers; a code of 8 bits is an integer plus 128. Rotating before quantising is QuaRot's
idea (Ashkboos et al., 2024).
"""

from functools import lru_cache

import torch
from torch import Tensor

from hardkv.kernels.codes.rotation import rotation
from hardkv.kernels.dtypes import accumulation_dtype

# The positive levels by bits, in units of `UNIT`; the negative ones mirror them. They are integers, because kernels
# read integers fast, in the ratio of the best levels for a Gaussian: the mean square error is theirs within .3 %.
LEVELS = {2: (36, 120), 3: (10, 31, 55, 88), 4: (3, 9, 15, 21, 28, 36, 46, 61)}
# A Gaussian's standard deviation, in the same units.
DEVIATION = {2: 1 / 0.01258600, 3: 1 / 0.02444702, 4: 1 / 0.04480806}
LARGEST = 127  # the largest level of 8 bits; a token's largest coordinate becomes it
UNIT = 1 / 64  # of a level, so that a float16 holds the scales of small and large states
LARGEST_SCALE = 65504.0  # of a float16


@lru_cache(maxsize=32)
def levels(bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the level of every code of 4, 3 or 2 bits, `[2 ** bits]`."""
    with torch.inference_mode(False):
        return torch.tensor([*LEVELS[bits], *(-level for level in LEVELS[bits])], device=device, dtype=dtype) * UNIT


def code_width(dim: int, bits: int) -> int:
    """Return the bytes of a token's codes."""
    return dim * bits // 8


def encode(states: Tensor, centre: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise states.

    Args:
        states: `[N, D]`, D a multiple of 8. centre: `[N, D]`, subtracted first. bits: 8, 4, 3 or 2.

    Returns:
        Codes, uint8 `[N, D * bits / 8]`, and scales, float16 `[N]`.
    """
    dtype, dim = accumulation_dtype(states.dtype), states.shape[-1]
    rotated = (states.to(dtype) - centre.to(dtype)) @ rotation(dim, states.device, dtype)
    norm = torch.linalg.vector_norm(rotated, dim=-1, keepdim=True)
    tiny = torch.finfo(dtype).tiny
    if bits == 8:
        largest = rotated.abs().amax(-1, keepdim=True)
        codes = ((rotated / largest.clamp_min(tiny) * LARGEST).round() + 128).to(torch.uint8)
    else:
        unit = rotated / norm.clamp_min(tiny) * (dim**0.5 * DEVIATION[bits] * UNIT)
        positive = levels(bits, states.device, dtype)[: 1 << (bits - 1)]
        index = torch.bucketize(unit.abs(), (positive[1:] + positive[:-1]) / 2)
        codes = (index | ((unit < 0).long() << (bits - 1))).to(torch.uint8)
    kept = torch.linalg.vector_norm(_levels_of(codes, bits, dtype), dim=-1, keepdim=True)
    scale = (norm / kept.clamp_min(tiny)).clamp_max(LARGEST_SCALE)[:, 0]  # kept is 0 at the centre, for 8 bits
    return pack(codes, bits), scale.half()


def decode(codes: Tensor, scale: Tensor, centre: Tensor, bits: int) -> Tensor:
    """Return the states that codes stand for, `[N, D]`, in the dtype of `centre [N, D]`; see `encode`."""
    dtype = accumulation_dtype(centre.dtype)
    rotated = unpack_levels(codes, bits, dtype) * scale.to(dtype)[:, None]
    return (rotated @ rotation(rotated.shape[-1], codes.device, dtype).mT + centre.to(dtype)).to(centre.dtype)


def unpack_levels(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the level of every coordinate, `[..., D]` in `dtype`, from packed codes, uint8 `[..., D * bits / 8]`."""
    return _levels_of(unpack(codes, bits), bits, dtype)


def _levels_of(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the level of every code, uint8 `[..., D]`, one per byte."""
    if bits == 8:
        return (codes.to(dtype) - 128) * UNIT
    return levels(bits, codes.device, dtype)[codes.long()]


def num_fields(bits: int) -> int:
    """Return how many codes a byte of `pack` holds; of 3 bits, how many lower two bits."""
    return {8: 1, 4: 2, 3: 4, 2: 4}[bits]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack one code per byte, uint8 `[..., D]`, into `[..., D * bits / 8]`.

    With W = D * bits / 8, code d lies in byte d mod W, in the field of that many bits numbered d // W. 3 bits are the
    lower two of all codes, packed so into W = D / 4 bytes, and then the highest of all in D / 8 bytes: that of field
    2 f + g of byte w is bit 4 f + g + 2 (w // (D / 8)) of byte w mod D / 8. So a kernel that shifts by two in the first
    half of the W bytes finds it at bit 4 f + g + 2 of all.
    """
    if bits == 8:
        return codes
    if bits == 3:
        high = (codes >> 2).unflatten(-1, (2, 2, 2, -1)).transpose(-3, -2).flatten(-4)
        return torch.cat([pack(codes & 3, 2), pack(high, 1)], -1)
    fields = codes.unflatten(-1, (8 // bits, -1))
    return (fields << _shift(bits, codes.device)).sum(-2, dtype=torch.uint8)


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Undo `pack`."""
    if bits == 8:
        return codes
    if bits == 3:
        low, high = codes.split([codes.shape[-1] * 2 // 3, codes.shape[-1] // 3], -1)
        high = unpack(high, 1).unflatten(-1, (2, 2, 2, -1)).transpose(-3, -2).flatten(-4)
        return unpack(low, 2) | (high << 2)
    return ((codes[..., None, :] >> _shift(bits, codes.device)) & ((1 << bits) - 1)).flatten(-2)


def _shift(bits: int, device: torch.device) -> Tensor:
    """Return where the fields of a byte begin, uint8 `[8 / bits, 1]`."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)[:, None]

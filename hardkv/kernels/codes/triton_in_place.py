"""Compact rows of codes in place: move chosen tokens of a row to its front, and quantise those of the dense tier."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.codes.triton import gather_into
from hardkv.kernels.compaction.triton import padded_width
from hardkv.kernels.compaction.triton_in_place import move
from hardkv.kernels.gpu import cdiv

# Bytes of a token that one program moves at most, and tokens that it moves at a time: more where these are narrow.
PART_BYTES, TILE_BYTES, MAX_TOKENS = 128, 16384, 256


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["index"])
def _move_codes_kernel(
    keys,
    values,
    scales,
    cu,
    address,
    index,
    n,
    W: tl.constexpr,
    WV: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Move some bytes of one row's keys or values, or its scales, from front to back."""
    row, part = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(cu + row), tl.load(cu + row + 1)
    for first in range(begin, end, BLOCK):
        token = (first + tl.arange(0, BLOCK)).to(tl.int64)
        live = token < end
        merged = tl.load(index + token, mask=live, other=0)
        where = tl.load(address + merged, mask=live, other=0)
        moved = live & (where < n) & (where != token)
        if part < KEY_PARTS:
            move(keys + where * W, keys + token * W, moved, part * PART + tl.arange(0, PART), W)
        elif part < PARTS:
            move(values + where * WV, values + token * WV, moved, (part - KEY_PARTS) * PART + tl.arange(0, PART), WV)
        else:
            move(scales + where * 2, scales + token * 2, moved, tl.arange(0, 2), 2)


def compact_codes(
    tokens: tuple[Tensor, ...],
    dense: tuple[Tensor, Tensor],
    centres: tuple[Tensor, Tensor],
    bits: tuple[int, int],
    cu_seqlens: Tensor,
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> None:
    """Run `hardkv.kernels.codes.compact_codes` in two launches: the first moves, the second quantises."""
    keys, values, _, _, scales = tokens
    n = index.shape[0]
    if not n:
        return
    octets = keys.view(torch.uint8), values.view(torch.uint8)
    width, value_width = (each.shape[1] for each in octets)
    part = min(padded_width(max(width, value_width)), PART_BYTES)
    key_parts, value_parts = cdiv(width, part), cdiv(value_width, part)
    _move_codes_kernel[(cu_seqlens.shape[0] - 1, key_parts + value_parts + 1)](
        *octets,
        scales,
        cu_seqlens,
        address,
        index,
        n,
        W=width,
        WV=value_width,
        BLOCK=min(TILE_BYTES // part, MAX_TOKENS),
        PART=part,
        KEY_PARTS=key_parts,
        PARTS=key_parts + value_parts,
        num_warps=4,
    )
    sources = [(keys, values), (keys[:0], values[:0]), dense]
    chosen = address, index, positions, misses
    gather_into(tokens, sources, (scales, scales[:0]), centres, bits, *chosen, only_dense=True)

"""Measure the redundancy of keys within a row (R-KV) as in `hardkv.kernels.similarity`, without `n x n` cosines.

Three launches: norms and sums of unit vectors; the last near-duplicate of every token, in tiles from the row's end;
the result. The search stops once every token of a tile has its match, or at the end of the reach. Nothing
depends on the order in which programs run, because the spared cosines are summed as integers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.gpu import cdiv, next_power_of_2
from hardkv.kernels.similarity.reference import REACH

# One program sums the unit vectors of a chunk: this many chunks in the longest row, but at least the least tokens each.
CHUNKS = 64
MIN_CHUNK = 128
SUM_TILE = 32
# Fixed-point scale of the spared cosines, which are in [-1, 1]: 40 binary places leave room to sum 4 million of them.
ONE = tl.constexpr(float(1 << 40))


@triton.jit
def _first_sum(row, start, chunk_size):
    """Return where a row's sums begin; rows of any lengths share `N // chunk_size + R` places without overlap."""
    return start // chunk_size + row


@triton.jit(do_not_specialize=["chunk_size"])
def _sums_kernel(
    keys,
    cu_seqlens,
    inverse_norm,
    spared,
    sums,
    eps,
    chunk_size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + row).to(tl.int64)
    length = (tl.load(cu_seqlens + row + 1) - start).to(tl.int32)
    if chunk * chunk_size >= length:
        return
    stop = tl.minimum((chunk + 1) * chunk_size, length)
    column = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    for first in range(chunk * chunk_size, stop, BLOCK):
        token = first + tl.arange(0, BLOCK)
        live = token < stop
        mask = live[:, None] & (column < D)[None, :]
        key = tl.load(keys + (start + token)[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(key * key, 1)), eps)
        total += key * inverse[:, None]
        tl.store(inverse_norm + start + token, inverse, mask=live)
        tl.store(spared + start + token, tl.zeros([BLOCK], dtype=tl.int64), mask=live)
    place = _first_sum(row, start, chunk_size) + chunk
    tl.store(sums + place * D + column, tl.sum(total, 0), mask=column < D)


@triton.jit(do_not_specialize=["reach"])
def _spare_kernel(
    keys,
    cu_seqlens,
    inverse_norm,
    spared,
    threshold,
    reach,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, tile = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + row).to(tl.int64)
    length = (tl.load(cu_seqlens + row + 1) - start).to(tl.int32)
    if tile * BLOCK_I >= length:
        return
    keys += start * D
    inverse_norm += start
    part = tl.arange(0, BLOCK_K)
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    live = i < length
    inverse_i = tl.load(inverse_norm + i, mask=live, other=1.0)
    # test cos > threshold as key_i . key_j / |key_j| > threshold * |key_i|, which saves one product per pair
    least = threshold / inverse_i
    key_i = keys + i.to(tl.int64)[:, None] * D + part[None, :]
    if BLOCK_K == BLOCK_D:
        whole_i = tl.load(key_i, mask=live[:, None] & (part < D)[None, :], other=0.0)

    last = tl.full([BLOCK_I], -1, dtype=tl.int32)
    first_j = tl.maximum(length - reach, 0)  # the reach begins here
    end = length
    unmatched = length
    while (end > first_j) & (unmatched > 0):
        j = end - BLOCK_J + tl.arange(0, BLOCK_J)
        within = j >= 0  # only the last tile has a j before the reach or the row; a match there counts as none
        inverse_j = tl.load(inverse_norm + j, mask=within, other=0.0)
        key_j = keys + j.to(tl.int64)[:, None] * D + part[None, :]
        if BLOCK_K == BLOCK_D:
            whole_j = tl.load(key_j, mask=within[:, None] & (part < D)[None, :], other=0.0)
            product = tl.dot(whole_i, tl.trans(whole_j), input_precision="ieee")
        else:
            product = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.float32)
            for first in range(0, D, BLOCK_K):
                inside = (first + part < D)[None, :]
                part_i = tl.load(key_i + first, mask=live[:, None] & inside, other=0.0)
                part_j = tl.load(key_j + first, mask=within[:, None] & inside, other=0.0)
                product = tl.dot(part_i, tl.trans(part_j), product, input_precision="ieee")
        match = (product * inverse_j[None, :] > least[:, None]) & (i[:, None] != j[None, :])
        last = tl.maximum(last, tl.max(tl.where(match, j[None, :], -1), 1))  # matches of later tiles stay larger
        unmatched = tl.max((live & (last < 0)).to(tl.int32), 0)
        end -= BLOCK_J

    found = live & (last >= first_j)
    few = tl.arange(0, 16)
    pair = tl.zeros([BLOCK_I, 16], dtype=tl.float32)
    for first in range(0, D, 16):
        column = first + few
        mask = found[:, None] & (column < D)[None, :]
        part_i = tl.load(keys + i.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0)
        part_last = tl.load(keys + last.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0)
        pair += part_i.to(tl.float32) * part_last.to(tl.float32)
    cosine = tl.sum(pair, 1)
    cosine *= inverse_i * tl.load(inverse_norm + last, mask=found, other=0.0)
    amount = (cosine * ONE).to(tl.int64)
    # Most tokens of a tile share their last match, so add these at once.
    newest = tl.max(tl.where(found, last, -1), 0)
    shared = tl.sum(tl.where(found & (last == newest), amount, 0), 0)
    spared += start
    tl.atomic_add(spared + newest, shared, mask=newest >= 0, sem="relaxed")
    tl.atomic_add(spared + last, amount, mask=found & (last != newest), sem="relaxed")


@triton.jit(do_not_specialize=["chunk_size"])
def _column_kernel(
    keys,
    cu_seqlens,
    inverse_norm,
    spared,
    sums,
    out,
    chunk_size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + row).to(tl.int64)
    length = (tl.load(cu_seqlens + row + 1) - start).to(tl.int32)
    if chunk * chunk_size >= length:
        return
    stop = tl.minimum((chunk + 1) * chunk_size, length)
    column = tl.arange(0, BLOCK_D)
    inside = (column < D)[None, :]
    sums += _first_sum(row, start, chunk_size) * D
    chunks = tl.cdiv(length, chunk_size)
    partial = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    for first in range(0, chunks, BLOCK):
        place = first + tl.arange(0, BLOCK)
        mask = (place < chunks)[:, None] & inside
        partial += tl.load(sums + place[:, None] * D + column[None, :], mask=mask, other=0.0)
    total = tl.sum(partial, 0)
    for first in range(chunk * chunk_size, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        live = place < stop
        token = start + place
        mask = live[:, None] & inside
        key = tl.load(keys + token[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        unit = key * tl.load(inverse_norm + token, mask=live, other=0.0)[:, None]
        others = tl.sum(unit * total[None, :], 1) - tl.sum(unit * unit, 1)
        less = tl.load(spared + token, mask=live, other=0).to(tl.float32) / ONE
        tl.store(out + token, (others - less) / length.to(tl.float32), mask=live)


def mean_cosine(
    keys: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    *,
    threshold: float = 0.5,
    eps: float = 1e-8,
    reach: int = REACH,
) -> Tensor:
    """Return for every token j the mean of `cos(key_i, key_j)` over the row's tokens i, as `mean_cosine` defines it.

    Args:
        keys: `[N, D]`, contiguous, float16, bfloat16 or float32. cu_seqlens: int32 `[R + 1]`.
        longest: tokens of the longest row, or the host's upper bound.
        threshold: cosine above which two keys are near-duplicates. eps: lower bound on a key's norm.
        reach: tokens at a row's end among which near-duplicates are spared, at least 1.

    Returns:
        Float32 `[N]`.
    """
    total, dim = keys.shape
    rows = cu_seqlens.shape[0] - 1
    if not keys.is_contiguous():
        raise ValueError(f"keys {tuple(keys.shape)} has strides {keys.stride()}: it must be contiguous")
    out = torch.empty(total, dtype=torch.float32, device=keys.device)
    if not (total and rows and longest):
        return out
    block_d = max(next_power_of_2(dim), 16)  # a matrix product needs at least 16
    chunk_size = max(next_power_of_2(longest) // CHUNKS, MIN_CHUNK)
    inverse_norm = torch.empty(total, dtype=torch.float32, device=keys.device)
    spared = torch.empty(total, dtype=torch.int64, device=keys.device)
    sums = torch.empty(total // chunk_size + rows, dim, dtype=torch.float32, device=keys.device)
    by_chunk = (rows, cdiv(longest, chunk_size))
    sizes = {"D": dim, "BLOCK": SUM_TILE, "BLOCK_D": block_d, "num_warps": 4}
    _sums_kernel[by_chunk](keys, cu_seqlens, inverse_norm, spared, sums, eps, chunk_size, **sizes)
    # without tensor cores, operands go through registers, which hold few columns at a time
    block_i, block_k, warps = (64, 32, 4) if keys.dtype == torch.float32 else (128, block_d, 8)
    _spare_kernel[(rows, cdiv(longest, block_i))](
        keys,
        cu_seqlens,
        inverse_norm,
        spared,
        threshold,
        reach,
        D=dim,
        BLOCK_I=block_i,
        BLOCK_J=64,
        BLOCK_D=block_d,
        BLOCK_K=min(block_k, block_d),
        num_warps=warps,
    )
    _column_kernel[by_chunk](keys, cu_seqlens, inverse_norm, spared, sums, out, chunk_size, **sizes)
    return out

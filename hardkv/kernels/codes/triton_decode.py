"""Gather tokens of a layer's tiers and decode those that are codes, in one launch.

A token's levels are integers, and the rotation is a matrix of signs but for a factor. So a product of float16 numbers,
summed in float32, rotates without an error. A token's scale and the factor follow, and then the centre of its row.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.codes import reference
from hardkv.kernels.codes.reference import code_width, num_fields
from hardkv.kernels.codes.rotation import sign_matrix
from hardkv.kernels.codes.triton_fields import KEY_BIAS_4, KEY_BIAS_8, key_fields
from hardkv.kernels.compaction.triton import copy_rows, dense_slot
from hardkv.kernels.gpu import cdiv, next_power_of_2
from hardkv.kernels.rows import Rows

# Coordinates that a program makes at most, and tokens; bytes of a token's codes that it reads at a time.
COORDINATES, MAX_TOKENS, MAX_BYTES = 1 << 13, 128, 32
UNIT = tl.constexpr(reference.UNIT)


@triton.jit
def _add(found, level, signs, inside):
    """Add what the levels of some coordinates, `[BLOCK, BYTES]`, give all rotated back: float32 `[BLOCK, BD]`."""
    return tl.dot(level, tl.load(signs, mask=inside, other=0.0), found)


@triton.jit
def _rotated_back(source, held, signs, D: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, BD: tl.constexpr):
    """Return the levels of tokens times the transposed matrix of signs, float32 `[BLOCK, BD]`.

    Args:
        source: pointers to the codes of the tokens. held: whether to read each. signs: `[D, D]`.
    """
    # The first W bytes hold fields, each of a range of W coordinates; see `reference.pack`.
    FIELDS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
    W: tl.constexpr = D // FIELDS
    dim = tl.arange(0, BD)
    found = tl.zeros([held.shape[0], BD], tl.float32)
    for first in range(0, W, BYTES):
        byte = first + tl.arange(0, BYTES)
        here = held[:, None] & (byte < W)[None, :]
        codes = tl.load(source[:, None] + byte[None, :], mask=here, other=0)
        at = signs + dim[None, :] * D + byte[:, None]
        inside = (byte < W)[:, None] & (dim < D)[None, :]
        first_high = codes
        second_high = codes
        if BITS == 3:
            high = source[:, None] + (W + byte % (W // 2))[None, :]
            first_high = tl.load(high, mask=here & (byte < W // 2)[None, :], other=0)
            second_high = tl.load(high, mask=here & (byte >= W // 2)[None, :], other=0)
        levels = key_fields(codes, first_high, second_high, BITS)
        for i in tl.static_range(FIELDS):
            found = _add(found, levels[i] - (KEY_BIAS_4 if BITS == 4 else KEY_BIAS_8), at + i * W, inside)
    return found


@triton.jit(
    do_not_specialize=["n_first", "n_second", "heads", "capacity"],
    do_not_specialize_on_alignment=["address"],  # address may be a slice of another tensor
)
def _gather_states_kernel(
    out,
    cu,
    address,
    first,
    second,
    first_scales,
    second_scales,
    last,
    centre,
    signs,
    n_first,
    n_second,
    heads,
    capacity,
    stride_b,
    stride_h,
    stride_c,
    KIND: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    BD: tl.constexpr,
):
    """Gather a block of tokens of one row."""
    row = tl.program_id(0)
    start, stop = tl.load(cu + row) + tl.program_id(1) * BLOCK, tl.load(cu + row + 1)
    if start >= stop:
        return
    token = (start + tl.arange(0, BLOCK)).to(tl.int64)
    live = token < stop
    where = tl.load(address + token, mask=live, other=0)
    held = live & (where < n_first + n_second)
    if tl.max(held.to(tl.int32), 0) > 0:
        is_first = where < n_first
        scales = tl.where(is_first, first_scales + where * 2, second_scales + (where - n_first) * 2)
        scale = tl.load(scales + KIND, mask=held, other=0.0).to(tl.float32)
        source = tl.where(is_first, first + where * WIDTH, second + (where - n_first) * WIDTH)
        state = _rotated_back(source, held, signs, D, BITS, BYTES, BD)
        FACTOR: tl.constexpr = UNIT * (1.0 / (D & -D)) ** 0.5
        dim = tl.arange(0, BD)
        mean = tl.load(centre + row.to(tl.int64) * D + dim, mask=dim < D, other=0.0).to(tl.float32)
        state = state * (scale * FACTOR)[:, None] + mean[None, :]
        mask = held[:, None] & (dim < D)[None, :]
        tl.store(out + token[:, None] * D + dim[None, :], state.to(out.dtype.element_ty), mask=mask)
    dense = live & (where >= n_first + n_second)
    if tl.max(dense.to(tl.int32), 0) > 0:
        _, offset = dense_slot(where - n_first - n_second, heads, capacity, stride_b, stride_h, stride_c)
        copy_rows(out, token, dense, last + offset, D, BD)


def gather_states(
    sources: Sequence[Tensor],
    scales: Sequence[Tensor],
    centre: Tensor,
    kind: int,
    bits: int,
    address: Tensor,
    rows: Rows,
    out: Tensor,
) -> None:
    """Run `hardkv.kernels.codes.gather_states` in one launch."""
    if not rows.total:
        return
    first, second, dense = sources
    if dense.stride(-1) != 1:
        dense = dense.contiguous()
    dim = dense.shape[-1]
    padded = max(next_power_of_2(dim), 16)
    block = min(COORDINATES // padded, MAX_TOKENS)
    fields = num_fields(bits)
    _gather_states_kernel[(rows.cu_seqlens.shape[0] - 1, cdiv(rows.longest, block))](
        out,
        rows.cu_seqlens,
        address,
        first,
        second,
        *scales,
        dense,
        centre,
        sign_matrix(dim, dense.device, torch.float16),
        first.shape[0],
        second.shape[0],
        *dense.shape[1:3],
        *dense.stride()[:3],
        KIND=kind,
        D=dim,
        WIDTH=code_width(dim, bits),
        BITS=bits,
        BLOCK=block,
        BYTES=min(max(padded // fields, 16), MAX_BYTES if padded <= 128 else MAX_BYTES // 2),
        BD=padded,
        num_warps=4 if padded <= 256 else 8,
        num_stages=1,
    )

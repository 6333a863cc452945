"""Compact ragged rows in place: write chosen held and dense tokens of a layer over its held tokens."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.compaction.triton import padded_width, rows_at, three_buffers
from hardkv.kernels.gpu import cdiv

# Bytes per token that one program moves, and tokens that it moves at a time. A batch of one then has some dozens of
# programs.
PART_BYTES, COMPACT_TOKENS = 128, 128


@triton.jit(
    do_not_specialize=["key_heads", "key_capacity", "value_heads", "value_capacity", "n"],
    do_not_specialize_on_alignment=["index"],
)
def _compact_kernel(
    keys,
    values,
    positions_out,
    misses_out,
    cu,
    address,
    index,
    positions,
    misses,
    last_keys,
    last_values,
    key_heads,
    key_capacity,
    key_stride_b,
    key_stride_h,
    key_stride_c,
    value_heads,
    value_capacity,
    value_stride_b,
    value_stride_h,
    value_stride_c,
    n,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    KEYS_FLAT: tl.constexpr,
    VALUES_FLAT: tl.constexpr,
):
    """Move some columns of one row's keys or values, from front to back, so that nothing unread is overwritten."""
    row, part = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(cu + row), tl.load(cu + row + 1)
    for first in range(begin, end, BLOCK):
        token = (first + tl.arange(0, BLOCK)).to(tl.int64)
        live = token < end
        merged = tl.load(index + token, mask=live, other=0)
        where = tl.load(address + merged, mask=live, other=0)
        if part == 0:
            tl.store(positions_out + token, tl.load(positions + merged, mask=live), mask=live)
            tl.store(misses_out + token, tl.load(misses + merged, mask=live), mask=live)
        moved = live & (where != token)
        if part < KEY_PARTS:
            source = rows_at(
                where, keys, keys, last_keys, key_heads, key_capacity, key_stride_b, key_stride_h, key_stride_c,
                n, 0, D, KEYS_FLAT,
            )  # fmt: skip
            move(source, keys + token * D, moved, part * WIDTH + tl.arange(0, WIDTH), D)
        else:
            source = rows_at(
                where, values, values, last_values,
                value_heads, value_capacity, value_stride_b, value_stride_h, value_stride_c,
                n, 0, DV, VALUES_FLAT,
            )  # fmt: skip
            move(source, values + token * DV, moved, (part - KEY_PARTS) * WIDTH + tl.arange(0, WIDTH), DV)


@triton.jit
def move(source, target, moved, column, D: tl.constexpr):
    """Copy some columns of a tile of tokens to pointers that may point into the same tile."""
    mask = moved[:, None] & (column < D)[None, :]
    data = tl.load(source[:, None] + column[None, :], mask=mask)
    tl.debug_barrier()  # read the whole tile first: a token's new place may be the old place of another
    tl.store(target[:, None] + column[None, :], data, mask=mask)


def compact(
    tokens: Sequence[Tensor],
    dense: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> None:
    """Run `hardkv.kernels.compaction.compact` in one launch."""
    keys, values, positions_out, misses_out = tokens
    n, dim, value_dim = index.shape[0], keys.shape[1], values.shape[1]
    (_, _, last_keys), (n_first, _) = three_buffers([keys, dense[0]])
    (_, _, last_values), _ = three_buffers([values, dense[1]])
    if n_first != n:
        raise ValueError(f"{n} tokens to keep where {n_first} are held: rows compacted in place keep their lengths")
    width = min(max(PART_BYTES // keys.element_size(), 1), padded_width(max(dim, value_dim)))
    key_parts, value_parts = cdiv(dim, width), cdiv(value_dim, width)
    if not n:
        return
    _compact_kernel[(cu_seqlens.shape[0] - 1, key_parts + value_parts)](
        *(keys, values, positions_out, misses_out, cu_seqlens, address, index, positions, misses),
        *(last_keys, last_values),
        *last_keys.shape[1:3],
        *last_keys.stride()[:3],
        *last_values.shape[1:3],
        *last_values.stride()[:3],
        n,
        D=dim,
        DV=value_dim,
        BLOCK=COMPACT_TOKENS,
        WIDTH=width,
        KEY_PARTS=key_parts,
        KEYS_FLAT=last_keys.is_contiguous(),
        VALUES_FLAT=last_values.is_contiguous(),
        num_warps=4,
    )

"""Compute where every held token of a layer is stored, and which tier it goes to, in one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.gpu import cdiv
from hardkv.kernels.rows import Rows

BLOCK = 1024


@triton.jit(do_not_specialize=["capacity", "offset", "window", "sinks", "pinned", "front"])
def _layout_kernel(
    positions_out,
    misses_out,
    address_out,
    stays_out,
    window_mask_out,
    protected_out,
    cu_ptr,
    older_ptr,
    order_ptr,
    positions_ptr,
    misses_ptr,
    dense_positions_ptr,
    fill_ptr,
    position_stride_b,
    heads,
    capacity,
    offset,
    window,
    sinks,
    pinned,
    front,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    begin = tl.load(cu_ptr + row)
    length = tl.load(cu_ptr + row + 1) - begin
    first = tl.program_id(1) * BLOCK
    if first >= length:
        return
    token = first + tl.arange(0, BLOCK)
    live = token < length
    older_begin = tl.load(older_ptr + row)
    older = tl.load(older_ptr + row + 1) - older_begin
    sequence = row // heads
    fill = tl.load(fill_ptr + sequence).to(tl.int32)

    ahead = tl.minimum(front, fill)
    slot = tl.where(token < ahead, token, token - older)  # slot in the dense tier
    is_dense = live & ((token < ahead) | (slot >= ahead))
    is_old = live & (token >= ahead) & (slot < ahead)
    place = (older_begin + token - ahead).to(tl.int64)
    if ORDERED:
        place = tl.load(order_ptr + place, mask=is_old, other=0)
    dense = dense_positions_ptr + sequence.to(tl.int64) * position_stride_b + slot
    position = tl.where(
        is_old, tl.load(positions_ptr + place, mask=is_old, other=0), tl.load(dense, mask=is_dense, other=0)
    )
    misses = tl.load(misses_ptr + place, mask=is_old, other=0)
    address = tl.where(is_old, place, offset + row.to(tl.int64) * capacity + slot)
    stays = is_dense & ((slot < ahead) | (slot >= fill - window))
    window_mask = token >= length - window
    protected = window_mask | (token < sinks) | (position < pinned)

    at = begin.to(tl.int64) + token
    tl.store(positions_out + at, position, mask=live)
    tl.store(misses_out + at, misses, mask=live)
    tl.store(address_out + at, address, mask=live)
    tl.store(stays_out + at, stays.to(tl.int8), mask=live)
    tl.store(window_mask_out + at, window_mask.to(tl.int8), mask=live)
    tl.store(protected_out + at, protected.to(tl.int8), mask=live)


def layout(
    rows: Rows,
    older: Tensor,
    order: Tensor | None,
    positions: Tensor,
    misses: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    capacity: int,
    window: int,
    sinks: int,
    pinned: int,
    front: int,
) -> tuple[Tensor, ...]:
    """See `hardkv.kernels.layout.layout`."""
    n, count = rows.total, rows.cu_seqlens.shape[0] - 1
    device = rows.cu_seqlens.device
    outs = (
        torch.empty(n, dtype=torch.int32, device=device),
        torch.empty(n, dtype=torch.uint8, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
        *(torch.empty(n, dtype=torch.bool, device=device) for _ in range(3)),
    )
    if n:
        _layout_kernel[(count, cdiv(rows.longest, BLOCK))](
            *outs[:3],
            *(out.view(torch.int8) for out in outs[3:]),
            rows.cu_seqlens,
            older,
            positions if order is None else order,
            positions,
            misses,
            dense_positions,
            fill,
            dense_positions.stride(0),
            count // fill.shape[0],
            capacity,
            positions.shape[0],
            window,
            sinks,
            pinned,
            front,
            ORDERED=order is not None,
            BLOCK=BLOCK,
        )
    return outs


@triton.jit(do_not_specialize=["patience"])
def _assign_kernel(
    misses_out,
    condensed_out,
    sparse_out,
    condensed_count,
    sparse_count,
    keep_ptr,
    stays_ptr,
    misses_ptr,
    cu_ptr,
    patience,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    begin = tl.load(cu_ptr + row)
    length = tl.load(cu_ptr + row + 1) - begin
    first = tl.program_id(1) * BLOCK
    if first >= length:
        return
    token = first + tl.arange(0, BLOCK)
    live = token < length
    at = begin.to(tl.int64) + token
    keep = tl.load(keep_ptr + at, mask=live, other=0) != 0
    stays = tl.load(stays_ptr + at, mask=live, other=0) != 0
    misses = tl.where(keep, 0, tl.load(misses_ptr + at, mask=live, other=0).to(tl.int32) + 1)
    condensed = live & keep & (stays == 0)
    sparse = live & (keep == 0) & (misses <= patience)
    tl.store(misses_out + at, misses.to(tl.uint8), mask=live)
    tl.store(condensed_out + at, condensed.to(tl.int8), mask=live)
    tl.store(sparse_out + at, sparse.to(tl.int8), mask=live)
    tl.atomic_add(condensed_count + row, tl.sum(condensed.to(tl.int32), 0))
    tl.atomic_add(sparse_count + row, tl.sum(sparse.to(tl.int32), 0))


def assign(
    keep: Tensor, stays: Tensor, misses: Tensor, rows: Rows, patience: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `hardkv.kernels.layout.assign`."""
    count = rows.cu_seqlens.shape[0] - 1
    counted = torch.empty_like(misses)
    condensed, sparse = torch.empty_like(keep), torch.empty_like(keep)
    lengths = torch.zeros(2, count, dtype=torch.int32, device=keep.device)
    if rows.total:
        _assign_kernel[(count, cdiv(rows.longest, BLOCK))](
            counted,
            condensed.view(torch.int8),
            sparse.view(torch.int8),
            lengths[0],
            lengths[1],
            keep.view(torch.int8),
            stays.view(torch.int8),
            misses,
            rows.cu_seqlens,
            patience,
            BLOCK=BLOCK,
        )
    return counted, condensed, sparse, lengths

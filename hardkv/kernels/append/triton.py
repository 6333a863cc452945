"""Append new tokens to a layer's dense tier in place: keys, values, positions and the fill in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.gpu import cdiv, next_power_of_2

# Maximum bytes of keys that one program writes.
TILE_BYTES = 16384
# Validity flags that a program counts at a time, to find how many valid tokens precede its own.
SCAN = tl.constexpr(1024)


@triton.jit(do_not_specialize=["start", "q_len", "heads", "capacity"])
def _append_kernel(
    dense_keys,
    dense_values,
    dense_positions,
    fill,
    new_fill,
    keys,
    values,
    valid,
    start,
    q_len,
    heads,
    capacity,
    dense_key_stride_b,
    dense_key_stride_h,
    dense_key_stride_c,
    dense_value_stride_b,
    dense_value_stride_h,
    dense_value_stride_c,
    position_stride_b,
    key_stride_b,
    key_stride_h,
    key_stride_q,
    value_stride_b,
    value_stride_h,
    value_stride_q,
    valid_stride_b,
    valid_stride_q,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    tile = tl.program_id(0)
    sequence = tl.program_id(2).to(tl.int64)
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    written = token < q_len
    first_slot = tl.load(fill + sequence)
    if HAS_VALID:
        flags = valid + sequence * valid_stride_b
        for scanned in range(0, tile * BLOCK_T, SCAN):
            earlier = scanned + tl.arange(0, SCAN)
            marks = tl.load(flags + earlier.to(tl.int64) * valid_stride_q, mask=earlier < tile * BLOCK_T, other=0)
            first_slot += tl.sum(marks.to(tl.int32), 0)
        marks = tl.load(flags + token.to(tl.int64) * valid_stride_q, mask=written, other=0).to(tl.int32)
        written = marks != 0
        slot = first_slot + tl.cumsum(marks, 0) - marks
    else:
        first_slot += tile * BLOCK_T
        slot = first_slot + tl.arange(0, BLOCK_T)
    stored = written & (slot < capacity)  # the caller ensures capacity; this check protects other memory

    # [BLOCK_H, BLOCK_T, BLOCK_D]; load both tiles before writing either, to wait for memory once
    mask = (head < heads)[:, None, None] & stored[None, :, None]
    column, value_column = tl.arange(0, BLOCK_D)[None, None, :], tl.arange(0, BLOCK_DV)[None, None, :]
    key_mask, value_mask = mask & (column < D), mask & (value_column < DV)
    head, source, target = head[:, None, None], token.to(tl.int64)[None, :, None], slot[None, :, None]
    key_source = keys + sequence * key_stride_b + head * key_stride_h + source * key_stride_q
    value_source = values + sequence * value_stride_b + head * value_stride_h + source * value_stride_q
    key_tile = tl.load(key_source + column, mask=key_mask)
    value_tile = tl.load(value_source + value_column, mask=value_mask)
    key_target = dense_keys + sequence * dense_key_stride_b + head * dense_key_stride_h + target * dense_key_stride_c
    value_target = (
        dense_values + sequence * dense_value_stride_b + head * dense_value_stride_h + target * dense_value_stride_c
    )
    tl.store(key_target + column, key_tile, mask=key_mask)
    tl.store(value_target + value_column, value_tile, mask=value_mask)

    if tl.program_id(1) == 0:
        position = start + token
        tl.store(dense_positions + sequence * position_stride_b + slot, position.to(tl.int32), mask=stored)
        if tile == tl.num_programs(0) - 1:
            tl.store(new_fill + sequence, first_slot + tl.sum(written.to(tl.int32), 0))


def append(
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    valid: Tensor | None = None,
) -> Tensor:
    """Write the valid new tokens in order after the filled slots of every sequence; change nothing else.

    Strides are free, but the last dimension must be contiguous. The tokens must fit: the fill is on the device, which
    this function cannot check, so it drops a token without a slot.

    Args:
        dense_keys: `[B, H, C, D]`; dense_values: `[B, H, C, Dv]`; dense_positions: int32 `[B, C]`; written in place.
        fill: int64 `[B]`. keys: `[B, H, q, D]`. values: `[B, H, q, Dv]`.
        start: position of column 0. valid: bool `[B, q]`, the tokens to write; None means all.

    Returns:
        The new fill, int64 `[B]`.
    """
    batch, heads, q_len, dim = keys.shape
    value_dim = values.shape[-1]
    named = {
        "dense_keys": dense_keys,
        "dense_values": dense_values,
        "dense_positions": dense_positions,
        "keys": keys,
        "values": values,
    }
    for name, tensor in named.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: its last dimension must be contiguous")
    if not q_len or not batch:
        return fill.clone()

    block_d, block_dv = next_power_of_2(dim), next_power_of_2(max(value_dim, 1))
    row = max(block_d, block_dv) * keys.element_size()
    block_h = min(next_power_of_2(heads), max(TILE_BYTES // row, 1))
    block_t = min(next_power_of_2(q_len), max(TILE_BYTES // (row * block_h), 1))
    grid = (cdiv(q_len, block_t), cdiv(heads, block_h), batch)
    new_fill = torch.empty_like(fill)
    _append_kernel[grid](
        dense_keys,
        dense_values,
        dense_positions,
        fill,
        new_fill,
        keys,
        values,
        fill if valid is None else valid.view(torch.uint8),
        start,
        q_len,
        heads,
        dense_keys.shape[2],
        *dense_keys.stride()[:3],
        *dense_values.stride()[:3],
        dense_positions.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        *((0, 0) if valid is None else valid.stride()),
        D=dim,
        DV=value_dim,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        HAS_VALID=valid is not None,
        num_warps=4,
    )
    return new_fill


@triton.jit
def _append_step_kernel(
    dense_keys,
    dense_values,
    dense_positions,
    fill,
    ring,
    column,
    query,
    keys,
    values,
    ring_capacity,
    dense_key_stride_b,
    dense_key_stride_h,
    dense_key_stride_c,
    dense_value_stride_b,
    dense_value_stride_h,
    dense_value_stride_c,
    position_stride_b,
    ring_stride_b,
    ring_stride_h,
    ring_stride_c,
    query_stride_b,
    query_stride_h,
    key_stride_b,
    key_stride_h,
    value_stride_b,
    value_stride_h,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(fill + sequence)
    position = tl.load(column)
    _copy_heads(
        query + sequence * query_stride_b,
        ring + sequence * ring_stride_b + (position % ring_capacity) * ring_stride_c,
        query_stride_h, ring_stride_h, HEADS, D, BLOCK_H, BLOCK_D,
    )  # fmt: skip
    _copy_heads(
        keys + sequence * key_stride_b,
        dense_keys + sequence * dense_key_stride_b + slot * dense_key_stride_c,
        key_stride_h, dense_key_stride_h, KV_HEADS, D, BLOCK_H, BLOCK_D,
    )  # fmt: skip
    _copy_heads(
        values + sequence * value_stride_b,
        dense_values + sequence * dense_value_stride_b + slot * dense_value_stride_c,
        value_stride_h, dense_value_stride_h, KV_HEADS, DV, BLOCK_H, BLOCK_DV,
    )  # fmt: skip
    tl.store(dense_positions + sequence * position_stride_b + slot, position.to(tl.int32))
    tl.debug_barrier()  # every warp has read the fill
    tl.store(fill + sequence, slot + 1)


@triton.jit
def _copy_heads(
    source,
    target,
    source_stride,
    target_stride,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.arange(0, BLOCK_D)[None, :]
    for first in tl.static_range(0, HEADS, BLOCK_H):
        head = (first + tl.arange(0, BLOCK_H))[:, None].to(tl.int64)
        mask = (head < HEADS) & (column < D)
        tl.store(
            target + head * target_stride + column,
            tl.load(source + head * source_stride + column, mask=mask),
            mask=mask,
        )


def append_step(
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    ring: Tensor,
    column: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Write one token per sequence in one launch; see `hardkv.kernels.append.append_step`."""
    batch, heads, _, dim = query.shape
    kv_heads, value_dim = keys.shape[1], values.shape[-1]
    query, keys, values = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, keys, values))
    block_d, block_dv = next_power_of_2(dim), next_power_of_2(max(value_dim, 1))
    rows = max(TILE_BYTES // (max(block_d, block_dv) * keys.element_size()), 1)
    _append_step_kernel[(batch,)](
        dense_keys,
        dense_values,
        dense_positions,
        fill,
        ring,
        column,
        query,
        keys,
        values,
        ring.shape[2],
        *dense_keys.stride()[:3],
        *dense_values.stride()[:3],
        dense_positions.stride(0),
        *ring.stride()[:3],
        *query.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=dim,
        DV=value_dim,
        BLOCK_H=min(next_power_of_2(heads), rows),
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=8,
    )

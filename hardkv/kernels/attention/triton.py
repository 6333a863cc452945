"""Attend a few new queries to ragged condensed rows and the dense tail: one launch, or three over codes.

The tokens of all rows form one line: for each row its condensed tokens, then its dense slots. The line is cut into
equal shares, one per program (`Schedule`). A program attends a row's queries to its part of the row, then goes on to
the next row. When several programs share a row, the last to finish combines their results. The line depends on the
condensed tier only: the program at a row's end takes all its dense slots and reads their number on the device. So a
schedule and a captured graph stay valid until the next event.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.attention.triton_codes import attend_coded, occupancy
from hardkv.kernels.attention.triton_schedule import (
    OCCUPANCY,
    UNIT,
    Schedule,
    queries_per_block,
    query_blocks,
    schedule_for,
)
from hardkv.kernels.attention.triton_states import LOG2_E, attend
from hardkv.kernels.codes import Coding
from hardkv.kernels.gpu import next_power_of_2
from hardkv.kernels.rows import Rows


@triton.jit
def _ragged_attention(
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    arrived_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    cu_ptr,
    dense_keys_ptr,
    dense_values_ptr,
    dense_positions_ptr,
    fill_ptr,
    mask_ptr,
    sinks_ptr,
    row_start_ptr,
    first_row_ptr,
    share_ptr,
    rows,
    start_column,
    q_len,
    scale,
    softcap,
    query_b,
    query_h,
    query_q,
    out_b,
    out_h,
    out_q,
    keys_n,
    values_n,
    dense_keys_b,
    dense_keys_h,
    dense_keys_c,
    dense_values_b,
    dense_values_h,
    dense_values_c,
    positions_b,
    mask_b,
    mask_q,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.load(first_row_ptr + program)
    share = tl.load(share_ptr)
    begin = program * share
    here, end = begin, begin + share

    m = block * BM + tl.arange(0, BM)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    member, column = m % G, m // G  # query head within the group, new token
    exists = m < G * q_len
    whole = exists[:, None] & (dv < DV)[None, :]

    while (here < end) & (row < rows):
        batch, head = row // H, row % H
        fill = tl.load(fill_ptr + batch).to(tl.int32)
        row_begin, row_end = tl.load(row_start_ptr + row), tl.load(row_start_ptr + row + 1)
        offset = tl.load(cu_ptr + row)
        length = tl.load(cu_ptr + row + 1) - offset
        at_head = head * G + member
        at_query = batch.to(tl.int64) * query_b + at_head * query_h + column * query_q
        query = tl.load(query_ptr + at_query[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
        stop_here = tl.minimum(end, row_end)
        start, stop = (here - row_begin) * UNIT, (stop_here - row_begin) * UNIT
        stop = tl.where(stop_here == row_end, length + fill, stop)

        top = tl.full([BM], -float("inf"), tl.float32)
        norm = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BDV], tl.float32)
        acc, top, norm = attend(
            acc, top, norm, query,
            keys_ptr + offset.to(tl.int64) * keys_n, values_ptr + offset.to(tl.int64) * values_n, keys_n, values_n,
            start, stop, length, m, cu_ptr, cu_ptr, m, False, False,
            scale, softcap, SOFTCAP, D, DV, BD, BDV, BN, STAGES, PRECISION,
        )  # fmt: skip
        if stop > length:
            acc, top, norm = attend(
                acc, top, norm, query,
                dense_keys_ptr + batch.to(tl.int64) * dense_keys_b + head.to(tl.int64) * dense_keys_h,
                dense_values_ptr + batch.to(tl.int64) * dense_values_b + head.to(tl.int64) * dense_values_h,
                dense_keys_c, dense_values_c,
                tl.maximum(start - length, 0), stop - length, fill,
                start_column + column, dense_positions_ptr + batch * positions_b,
                mask_ptr + batch.to(tl.int64) * mask_b, column.to(tl.int64) * mask_q, CAUSAL, MASKED,
                scale, softcap, SOFTCAP, D, DV, BD, BDV, BN, STAGES, PRECISION,
            )  # fmt: skip
        acc = tl.where(norm[:, None] > 0, acc / norm[:, None], 0.0)
        lse = tl.where(norm > 0, top + tl.log2(norm), -float("inf"))  # base 2

        done = True
        if (here > row_begin) | (stop_here < row_end):
            # a program has at most two partial rows: the row where its share begins, and the row where it ends
            slot = ((program * 2 + (here > begin).to(tl.int32)) * blocks + block).to(tl.int64) * BM
            slot += tl.arange(0, BM)
            tl.store(partial_ptr + slot[:, None] * DV + dv[None, :], acc, mask=whole)
            tl.store(partial_lse_ptr + slot, lse, mask=exists)
            tl.debug_barrier()  # all of this program's stores come before its arrival
            first, last = row_begin // share, (row_end - 1) // share
            counter = arrived_ptr + row * blocks + block
            done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == last - first
            if done:
                tl.store(counter, 0)
                top = tl.full([BM], -float("inf"), tl.float32)
                norm = tl.zeros([BM], tl.float32)
                acc = tl.zeros([BM, BDV], tl.float32)
                for other in tl.range(first, last + 1, num_stages=STAGES):
                    slot = ((other * 2 + (row_begin > other * share).to(tl.int32)) * blocks + block).to(tl.int64) * BM
                    slot += tl.arange(0, BM)
                    part_lse = tl.load(partial_lse_ptr + slot, mask=exists, other=-float("inf"), cache_modifier=".cg")
                    part = tl.load(
                        partial_ptr + slot[:, None] * DV + dv[None, :],
                        mask=whole,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    new_top = tl.maximum(top, part_lse)
                    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
                    decay, weight = tl.exp2(top - shift), tl.exp2(part_lse - shift)
                    acc = acc * decay[:, None] + part * weight[:, None]
                    norm = norm * decay + weight
                    top = new_top
                acc = tl.where(norm[:, None] > 0, acc / norm[:, None], 0.0)
                lse = tl.where(norm > 0, top + tl.log2(norm), -float("inf"))
        if done:
            if SINKS:
                sink = tl.load(sinks_ptr + at_head, mask=exists, other=0.0).to(tl.float32) * LOG2_E
                new_top = tl.maximum(lse, sink)
                total = tl.exp2(lse - new_top) + tl.exp2(sink - new_top)
                acc = acc * (tl.exp2(lse - new_top) / total)[:, None]
                lse = new_top + tl.log2(total)
            at_out = batch.to(tl.int64) * out_b + at_head * out_h + column * out_q
            tl.store(
                out_ptr + at_out[:, None] + dv[None, :],
                acc.to(out_ptr.dtype.element_ty),
                mask=whole,
            )
            at_lse = (batch.to(tl.int64) * H * G + at_head) * q_len + column
            tl.store(lse_ptr + at_lse, lse / LOG2_E, mask=exists)
        here = stop_here
        row += 1


# Warps per program, and pipeline stages of about 16 KB. Fastest on an H200 for 60 MB of keys and values and more
# (eval/speed), with `triton_schedule.OCCUPANCY`.
WARPS, STAGES, STAGE_BYTES = 4, 3, 16 << 10


def block_tokens(head_dim: int, itemsize: int) -> tuple[int, int]:
    """Return tokens per step and pipeline stages that need at most 64 KB of shared memory per program."""
    bytes_per_token = 2 * next_power_of_2(max(head_dim, 16)) * itemsize  # key and value
    tokens = max(16, min(64, STAGE_BYTES // bytes_per_token))
    return tokens, STAGES if tokens * bytes_per_token * STAGES <= 48 << 10 else 2


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    *,
    bound: int,
    start: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    new_mask: Tensor | None = None,
    coding: Coding | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to a condensed ragged tier and the dense tier; see `hardkv.kernels.attention.attend_tiers`.

    The schedule is built once and kept with the rows.

    Args:
        query: `[B, Hq, q, D]`. keys, values: `[N, D]`, `[N, Dv]`. rows: of the condensed tier.
        dense_keys, dense_values: `[B, H, C, D]` and `[B, H, C, Dv]`, any strides with the last 1.
        dense_positions: int32 `[B, C]`. fill: int `[B]`, valid slots, at most `bound`.
        start: column of the first new query.
        sinks: `[Hq]`. new_mask: bool `[B, q, C]`, the dense slots that each query sees; replaces the causal mask.
        coding: how to read `keys` and `values` that are codes; None: they are states.

    Returns:
        `out [B, Hq, q, Dv]` in the query's dtype and `lse`, float32 `[B, Hq, q]`.
    """
    size = max(query.shape[3], dense_values.shape[3]), query.element_size()
    blocks = query_blocks(query.shape[1] // dense_keys.shape[1], query.shape[2], *size)
    queries = query.shape[1] // dense_keys.shape[1] * query.shape[2]
    programs = OCCUPANCY if coding is None else occupancy(queries, dense_values.shape[3], coding.bits)
    schedule = schedule_for(rows, bound, dense_keys.shape[2], blocks, programs)
    tensors = query, keys, values, rows.cu_seqlens, dense_keys, dense_values, dense_positions, fill
    return launch(
        *tensors,
        schedule,
        start=start,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        new_mask=new_mask,
        coding=coding,
    )


def launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    schedule: Schedule,
    *,
    start: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    new_mask: Tensor | None = None,
    coding: Coding | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `ragged_attention` with a schedule made for `query_blocks(...)` blocks."""
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, value_dim = dense_keys.shape[1], dense_values.shape[-1]
    group = num_heads // num_kv_heads
    if query.stride(-1) != 1:
        query = query.contiguous()
    # out is laid out in memory as [B, q, Hq, Dv], the order that models need next
    out = query.new_empty(batch, q_len, num_heads, value_dim).transpose(1, 2)
    lse = query.new_empty(batch, num_heads, q_len, dtype=torch.float32)
    size = max(head_dim, value_dim), query.element_size()
    queries, blocks = queries_per_block(group, q_len, *size), query_blocks(group, q_len, *size)
    tokens, stages = block_tokens(*size)
    mask = new_mask.view(torch.uint8) if new_mask is not None else None
    if coding is not None:
        tensors = query, keys, values, cu_seqlens, dense_keys, dense_values, dense_positions, fill
        attend_coded(
            *tensors, schedule, out, lse, coding, start=start, scale=scale, softcap=softcap, sinks=sinks,
            mask=mask, queries=queries, blocks=blocks, tokens=max(tokens // 2, 16),
        )  # fmt: skip
        return out, lse
    programs = schedule.first_row.shape[0]
    partial = query.new_empty(2 * programs * blocks * queries, value_dim, dtype=torch.float32)
    partial_lse = query.new_empty(2 * programs * blocks * queries, dtype=torch.float32)
    _ragged_attention[(programs, blocks)](
        out, lse, partial, partial_lse, schedule.arrived,
        query, keys, values, cu_seqlens,
        dense_keys, dense_values, dense_positions, fill,
        fill if mask is None else mask, sinks if sinks is not None else fill,
        schedule.row_start, schedule.first_row, schedule.share,
        batch * num_kv_heads, start, q_len, scale, softcap or 0.0,
        *query.stride()[:3], *out.stride()[:3], keys.stride(0), values.stride(0),
        *dense_keys.stride()[:3], *dense_values.stride()[:3], dense_positions.stride(0),
        *((0, 0) if mask is None else mask.stride()[:2]),
        H=num_kv_heads, G=group, D=head_dim, DV=value_dim, BM=queries, BN=tokens, UNIT=UNIT,
        BD=next_power_of_2(max(head_dim, 16)), BDV=next_power_of_2(max(value_dim, 16)),
        CAUSAL=q_len > 1 and mask is None, MASKED=mask is not None,
        SOFTCAP=softcap is not None, SINKS=sinks is not None,
        STAGES=stages, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=WARPS,
    )  # fmt: skip
    return out, lse

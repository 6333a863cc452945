"""Attend to rows of codes and the dense tier in three launches: rotate the queries, attend to parts of rows, combine.

Attention needs no decoded tokens (`triton_code_rows`). Parts of rows are those of `hardkv.kernels.attention.triton`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.attention.triton_code_rows import attend_codes
from hardkv.kernels.attention.triton_rotation import combine, rotate_queries
from hardkv.kernels.attention.triton_schedule import UNIT as LINE_UNIT
from hardkv.kernels.attention.triton_schedule import Schedule
from hardkv.kernels.attention.triton_states import LOG2_E, attend
from hardkv.kernels.codes import Coding
from hardkv.kernels.codes.reference import num_fields
from hardkv.kernels.codes.rotation import pairs_matrix, sign_matrix
from hardkv.kernels.gpu import next_power_of_2


@triton.jit
def _attend_parts(
    partial_ptr,
    partial_lse_ptr,
    dense_partial_ptr,
    dense_lse_ptr,
    query_ptr,
    rotated_ptr,
    terms_ptr,
    keys_ptr,
    values_ptr,
    scales_ptr,
    cu_ptr,
    dense_keys_ptr,
    dense_values_ptr,
    dense_positions_ptr,
    fill_ptr,
    mask_ptr,
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
    BC: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    LINE_UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    CODE_TOKENS: tl.constexpr,
    CODE_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the results over the codes and the dense tokens of every part of a row, at number row + program."""
    program, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.load(first_row_ptr + program)
    share = tl.load(share_ptr)
    here, end = program * share, program * share + share
    few = block * BM + tl.arange(0, BC)
    few_exist = few < G * q_len
    while (here < end) & (row < rows):
        batch, head = row // H, row % H
        fill = tl.load(fill_ptr + batch).to(tl.int32)
        row_begin, row_end = tl.load(row_start_ptr + row), tl.load(row_start_ptr + row + 1)
        offset = tl.load(cu_ptr + row)
        length = tl.load(cu_ptr + row + 1) - offset
        stop_here = tl.minimum(end, row_end)
        start, stop = (here - row_begin) * LINE_UNIT, (stop_here - row_begin) * LINE_UNIT
        if stop_here == row_end:
            stop = length + fill
        at_few = batch.to(tl.int64) * query_b + (head * G + few % G) * query_h + few // G * query_q
        slot = ((row + program) * blocks + block).to(tl.int64) * BC
        if start < length:
            block_of_row = (row * blocks + block).to(tl.int64) * BC
            attend_codes(
                partial_ptr + slot * DV, partial_lse_ptr + slot, query_ptr + at_few, few_exist,
                rotated_ptr + block_of_row * D, terms_ptr + block_of_row * 3,
                keys_ptr + offset.to(tl.int64) * keys_n, values_ptr + offset.to(tl.int64) * values_n,
                keys_n, values_n, scales_ptr + offset.to(tl.int64), start, tl.minimum(stop, length),
                scale if SOFTCAP else scale * LOG2_E, softcap, SOFTCAP,
                KEY_BITS, VALUE_BITS, D, DV, BC, BD, BDV, CODE_TOKENS, CODE_STAGES, PRECISION,
            )  # fmt: skip
        else:
            tl.store(partial_lse_ptr + slot + tl.arange(0, BC), tl.full([BC], -float("inf"), tl.float32))
        if stop > length:
            m, d, dv = block * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
            column, exists = m // G, m < G * q_len
            at_query = batch.to(tl.int64) * query_b + (head * G + m % G) * query_h + column * query_q
            mask = exists[:, None] & (d < D)[None, :]
            query = tl.load(query_ptr + at_query[:, None] + d[None, :], mask=mask, other=0.0)
            top = tl.full([BM], -float("inf"), tl.float32)
            norm = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, BDV], tl.float32)
            acc, top, norm = attend(
                acc, top, norm, query,
                dense_keys_ptr + batch.to(tl.int64) * dense_keys_b + head.to(tl.int64) * dense_keys_h,
                dense_values_ptr + batch.to(tl.int64) * dense_values_b + head.to(tl.int64) * dense_values_h,
                dense_keys_c, dense_values_c, tl.maximum(start - length, 0), stop - length, fill,
                start_column + column, dense_positions_ptr + batch * positions_b,
                mask_ptr + batch.to(tl.int64) * mask_b, column.to(tl.int64) * mask_q, CAUSAL, MASKED,
                scale, softcap, SOFTCAP, D, DV, BD, BDV, BN, STAGES, PRECISION,
            )  # fmt: skip
            acc = tl.where(norm[:, None] > 0, acc / norm[:, None], 0.0)
            at = ((row + program) * blocks + block).to(tl.int64) * BM + tl.arange(0, BM)
            tl.store(dense_partial_ptr + at[:, None] * DV + dv[None, :], acc, mask=exists[:, None] & (dv < DV)[None, :])
            tl.store(dense_lse_ptr + at, tl.where(norm > 0, top + tl.log2(norm), -float("inf")), mask=exists)
        else:
            at = ((row + program) * blocks + block).to(tl.int64) * BM + tl.arange(0, BM)
            tl.store(dense_lse_ptr + at, tl.full([BM], -float("inf"), tl.float32))
        here = stop_here
        row += 1


# Tokens per step, and stages. Then warps of a multiprocessor with the most registers of a thread: for few queries,
# small heads and 4 or 2 bits, and else. Fastest on an H200 (`python -m eval.speed.codes`).
TOKENS, STAGES = 64, 3
NARROW, WIDE = (12, 168), (8, 255)
# Dims of a program that combines.
COMBINED = 32


def warps_for(queries: int, value_dim: int, value_bits: int) -> int:
    """Return warps per program: each needs 16 rows of values, of two bytes where they are codes, or more queries."""
    parts = 1 if value_bits == 16 else 2 * num_fields(value_bits)
    return 2 if queries > 8 or next_power_of_2(value_dim) // parts >= 32 else 1


def residents(queries: int, value_dim: int, bits: tuple[int, int]) -> tuple[int, int]:
    """Return warps per multiprocessor, and the most registers of a thread."""
    return NARROW if queries <= 8 and value_dim <= 128 and {*bits} <= {4, 2} else WIDE


def occupancy(queries: int, value_dim: int, bits: tuple[int, int]) -> int:
    """Return programs per multiprocessor for `queries` per row, and these bits of keys and values."""
    return residents(queries, value_dim, bits)[0] // warps_for(queries, value_dim, bits[1])


def attend_coded(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    schedule: Schedule,
    out: Tensor,
    lse: Tensor,
    coding: Coding,
    *,
    start: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    mask: Tensor | None,
    queries: int,
    blocks: int,
    tokens: int,
) -> None:
    """Write `out` and `lse` of `hardkv.kernels.attention.triton.launch` for keys or values that are codes.

    Args:
        mask: `new_mask` as bytes. queries, blocks: queries per block, and blocks. tokens: dense tokens per step.
    """
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, value_dim = dense_keys.shape[1], dense_values.shape[-1]
    group, rows = num_heads // num_kv_heads, batch * num_kv_heads
    programs = schedule.first_row.shape[0]
    key_bits, value_bits = coding.bits
    few = 8 if group * q_len <= 8 else queries
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    shape = {"H": num_kv_heads, "G": group, "BM": queries, "BC": few, "PRECISION": precision}
    dims = {"BD": next_power_of_2(max(head_dim, 16)), "BDV": next_power_of_2(max(value_dim, 16))}
    rotated = query.new_empty(rows * blocks, head_dim, few, dtype=torch.float16)
    partial = query.new_empty((rows + programs) * blocks * few, value_dim, dtype=torch.float32)
    dense_partial = query.new_empty((rows + programs) * blocks * queries, value_dim, dtype=torch.float32)
    terms, partial_lse, dense_lse = (
        query.new_empty(size, dtype=torch.float32)
        for size in (rows * blocks * 3 * few, partial.shape[0], dense_partial.shape[0])
    )
    if key_bits < 16:
        signs = sign_matrix(head_dim, query.device, query.dtype)
        unit = scale if softcap is not None else scale * LOG2_E.value
        rotate_queries[(rows, blocks)](
            rotated, terms, query, coding.key_centres, signs, q_len, unit, *query.stride()[:3],
            D=head_dim, BITS=key_bits, BD=dims["BD"], **shape, num_warps=4,
        )  # fmt: skip
    limit = {} if torch.version.hip is not None else {"maxnreg": residents(group * q_len, value_dim, coding.bits)[1]}
    _attend_parts[(programs, blocks)](
        partial, partial_lse, dense_partial, dense_lse, query, rotated, terms,
        keys, values, coding.scales.view(torch.int32), cu_seqlens,
        dense_keys, dense_values, dense_positions, fill, fill if mask is None else mask,
        schedule.row_start, schedule.first_row, schedule.share,
        rows, start, q_len, scale, softcap or 0.0,
        *query.stride()[:3], keys.stride(0), values.stride(0),
        *dense_keys.stride()[:3], *dense_values.stride()[:3], dense_positions.stride(0),
        *((0, 0) if mask is None else mask.stride()[:2]),
        D=head_dim, DV=value_dim, BN=tokens, LINE_UNIT=LINE_UNIT, **dims,
        CAUSAL=q_len > 1 and mask is None, MASKED=mask is not None, SOFTCAP=softcap is not None,
        KEY_BITS=key_bits, VALUE_BITS=value_bits, CODE_STAGES=STAGES,
        CODE_TOKENS=TOKENS if max(head_dim, value_dim) <= 128 and 16 not in coding.bits else TOKENS // 2,
        STAGES=2, **shape,
        num_warps=warps_for(group * q_len, value_dim, value_bits), **limit,
    )  # fmt: skip
    combined = min(COMBINED, dims["BDV"])
    signs = coding.scales
    if value_bits < 16:
        signs = pairs_matrix(value_dim, num_fields(value_bits), query.device, query.dtype)
    combine[(rows, blocks, dims["BDV"] // combined)](
        out, lse, partial, partial_lse, dense_partial, dense_lse,
        out if sinks is None else sinks, coding.value_centres, signs,
        schedule.row_start, schedule.share, q_len, *out.stride()[:3],
        DV=value_dim, BW=dims["BDV"] if value_bits < 16 else combined, BDV=combined,
        SINKS=sinks is not None, CODES=value_bits < 16, **shape, num_warps=4,
    )  # fmt: skip

"""Rotate queries before attention over codes; afterwards combine parts of rows, and rotate their values back."""

import triton
import triton.language as tl

from hardkv.kernels.attention.triton_states import LOG2_E
from hardkv.kernels.codes import reference
from hardkv.kernels.codes.triton_fields import KEY_BIAS_4, KEY_BIAS_8

UNIT = tl.constexpr(reference.UNIT)


@triton.jit
def rotate_queries(
    rotated_ptr,
    terms_ptr,
    query_ptr,
    centres_ptr,
    signs_ptr,
    q_len,
    unit,
    query_b,
    query_h,
    query_q,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a block's rotated queries, float16 `[D, BC]`, and the terms that make logits of their products.

    Logits are (levels . query + shift) * factor * the token's scale + offset: three terms per query, float32 `[3, BC]`.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    batch, head = row // H, row % H
    few, d = tl.arange(0, BC), tl.arange(0, BD)
    m = block * BM + few
    at = batch.to(tl.int64) * query_b + (head * G + m % G) * query_h + m // G * query_q
    exists = (few < BM) & (m < G * q_len)
    query = tl.load(query_ptr + at[None, :] + d[:, None], mask=exists[None, :] & (d < D)[:, None], other=0.0)
    centre = tl.load(centres_ptr + row.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    offset = tl.sum(query.to(tl.float32) * centre[:, None], 0) * unit
    signs = tl.load(signs_ptr + d[None, :] * D + d[:, None], mask=(d < D)[None, :] & (d < D)[:, None], other=0.0)
    rotated = tl.dot(signs, query, input_precision=PRECISION)
    largest = tl.max(tl.abs(rotated), 0)
    largest = tl.where(largest > 0, largest, 1.0)
    part = (rotated / largest[None, :]).to(tl.float16)
    BIAS: tl.constexpr = KEY_BIAS_4 if BITS == 4 else KEY_BIAS_8
    shift = -BIAS * tl.sum(part.to(tl.float32), 0)
    SPREAD: tl.constexpr = (1.0 / (D & -D)) ** 0.5
    slot = (row * tl.num_programs(1) + block).to(tl.int64) * BC
    tl.store(rotated_ptr + slot * D + d[:, None] * BC + few[None, :], part, mask=(d < D)[:, None] & (few < BC)[None, :])
    tl.store(terms_ptr + slot * 3 + few, shift)
    tl.store(terms_ptr + slot * 3 + BC + few, largest * (unit * UNIT * SPREAD))
    tl.store(terms_ptr + slot * 3 + 2 * BC + few, offset)


@triton.jit
def _add(acc, top, norm, part_at, lse_at, exists, inside):
    """Add a part's mean, `[BM, W]`, with its lse, `[BM]`, to sums times 2^-top."""
    lse = tl.load(lse_at, mask=exists, other=-float("inf"))
    part = tl.load(part_at, mask=(lse > -float("inf"))[:, None] & inside, other=0.0)
    new_top = tl.maximum(top, lse)
    origin = tl.where(new_top == -float("inf"), 0.0, new_top)
    decay, weight = tl.exp2(top - origin), tl.exp2(lse - origin)
    return acc * decay[:, None] + part * weight[:, None], new_top, norm * decay + weight


@triton.jit
def combine(
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    dense_partial_ptr,
    dense_lse_ptr,
    sinks_ptr,
    centres_ptr,
    signs_ptr,
    row_start_ptr,
    share_ptr,
    q_len,
    out_b,
    out_h,
    out_q,
    H: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
    BDV: tl.constexpr,
    SINKS: tl.constexpr,
    CODES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Combine the parts of a row, rotate what is of codes back, and write `BDV` dims of the result.

    Args:
        CODES: whether values are codes; BW: dims of a part that are read, then all, else `BDV`.
    """
    row, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    dv = tl.program_id(2) * BDV + tl.arange(0, BDV)
    w = tl.arange(0, BW) if CODES else dv
    m = tl.arange(0, BM)
    member, column = (block * BM + m) % G, (block * BM + m) // G
    exists = block * BM + m < G * q_len
    share = tl.load(share_ptr)
    first = tl.load(row_start_ptr + row) // share
    last = (tl.load(row_start_ptr + row + 1) - 1) // share
    whole = exists[:, None] & (dv < DV)[None, :]
    top = tl.full([BM], -float("inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BW], tl.float32)
    dense_top, dense_norm, dense = top, norm, tl.zeros([BM, BDV], tl.float32)
    for program in tl.range(first, last + 1, num_stages=1):
        place = ((row + program) * blocks + block).to(tl.int64)
        acc, top, norm = _add(
            acc, top, norm, partial_ptr + (place * BC + m[:, None]) * DV + w[None, :], partial_lse_ptr + place * BC + m,
            exists, (w < DV)[None, :],
        )  # fmt: skip
        dense, dense_top, dense_norm = _add(
            dense, dense_top, dense_norm, dense_partial_ptr + (place * BM + m[:, None]) * DV + dv[None, :],
            dense_lse_ptr + place * BM + m, exists, (dv < DV)[None, :],
        )  # fmt: skip
    if CODES:
        # The mean fits whatever the rotation is computed in.
        acc = tl.where(norm[:, None] > 0, acc / norm[:, None], 0.0)
        inside = (w < DV)[:, None] & (dv < DV)[None, :]
        signs = tl.load(signs_ptr + dv[None, :] * DV + w[:, None], mask=inside, other=0.0).to(tl.float32)
        centre = tl.load(centres_ptr + row.to(tl.int64) * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
        acc = (tl.dot(acc, signs, input_precision=PRECISION) + centre[None, :]) * norm[:, None]
    at_head = row % H * G + member
    new_top = tl.maximum(top, dense_top)
    if SINKS:
        sink = tl.load(sinks_ptr + at_head, mask=exists, other=0.0).to(tl.float32) * LOG2_E
        new_top = tl.maximum(new_top, sink)
    origin = tl.where(new_top == -float("inf"), 0.0, new_top)
    decay, weight = tl.exp2(top - origin), tl.exp2(dense_top - origin)
    acc = acc * decay[:, None] + dense * weight[:, None]
    norm = norm * decay + dense_norm * weight
    if SINKS:
        norm += tl.exp2(sink - origin)
    acc = tl.where(norm[:, None] > 0, acc / norm[:, None], 0.0)
    batch = row // H
    at_out = batch.to(tl.int64) * out_b + at_head * out_h + column * out_q
    tl.store(out_ptr + at_out[:, None] + dv[None, :], acc.to(out_ptr.dtype.element_ty), mask=whole)
    if tl.program_id(2) == 0:
        lse = tl.where(norm > 0, origin + tl.log2(norm), -float("inf"))
        tl.store(lse_ptr + (batch.to(tl.int64) * H * G + at_head) * q_len + column, lse / LOG2_E, mask=exists)

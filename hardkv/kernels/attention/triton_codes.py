"""Attend to rows of codes and the dense tier in three launches: rotate the queries, attend to parts of rows, combine.

Attention needs no decoded tokens. With a key (M c) s + centre, where M is the rotation, c the levels and s the scale,
q . key is (q M) . c s + q . centre; and the sum of weighted values is rotated back and shifted once, at the end. See
`hardkv.kernels.codes`. Parts of rows are those of `hardkv.kernels.attention.triton`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.attention.triton_schedule import UNIT as LINE_UNIT
from hardkv.kernels.attention.triton_schedule import Schedule
from hardkv.kernels.attention.triton_states import LOG2_E, attend
from hardkv.kernels.codes import Coding, reference
from hardkv.kernels.codes.rotation import pairs_matrix, sign_matrix
from hardkv.kernels.codes.triton_fields import KEY_BIAS_4, KEY_BIAS_8, key_fields, value_fields
from hardkv.kernels.gpu import next_power_of_2

UNIT = tl.constexpr(reference.UNIT)


@triton.jit
def _rotate_queries(
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
def _half(word):
    """Return the float16 in the lower half of words, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _pairs(at, pair, valid, least: tl.constexpr, limit: tl.constexpr, ALIGNED: tl.constexpr):
    """Load bytes `2 * pair` and `2 * pair + 1` after `at`, if they are `least` to `limit`, else 0; as int16.

    Args:
        ALIGNED: whether `at`, `least` and `limit` are even.
    """
    if ALIGNED:
        inside = (pair >= least // 2) & (pair < limit // 2)
        found = tl.load(at.to(tl.pointer_type(tl.int16), bitcast=True) + pair, mask=valid & inside, other=0)
    else:
        byte = 2 * pair
        first = tl.load(at + byte, mask=valid & (byte >= least) & (byte < limit), other=0)
        second = tl.load(at + byte + 1, mask=valid & (byte + 1 >= least) & (byte + 1 < limit), other=0)
        found = (first.to(tl.int32) | (second.to(tl.int32) << 8)).to(tl.int16)
    return found


@triton.jit
def _attend_codes(
    partial,
    partial_lse,
    query_base,
    query_exists,
    rotated,
    terms,
    key_base,
    value_base,
    key_stride,
    value_stride,
    scales_base,
    start,
    stop,
    unit,
    softcap,
    SOFTCAP: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run the online softmax over tokens `start` to `stop`, at least one, of a row; write the rotated mean and its lse.

    The codes of a byte lie in fields, each a range of dims. A field's dims of the rotated queries are multiplied with
    its levels, and a field's levels of the values make its dims of the rotated output. Values are read two bytes at a
    time, and what first bytes and second bytes make is summed apart. Products are of float16 and summed in float32.
    All tiles are transposed, tokens or dims by queries: queries are few, and a product's second factor may have 8
    columns where its first has 16 rows.

    Args:
        partial: float32 `[BC, DV]`, dims in the order of `pairs_matrix`. partial_lse: float32 `[BC]`, base 2.
        query_base: pointers to the queries, `[BC]`; query_exists: which of them there are.
        rotated, terms: from `_rotate_queries`, if keys are codes.
    """
    KEY_FIELDS: tl.constexpr = 1 if KEY_BITS >= 8 else (2 if KEY_BITS == 4 else 4)
    VALUE_FIELDS: tl.constexpr = 1 if VALUE_BITS >= 8 else (2 if VALUE_BITS == 4 else 4)
    PARTS: tl.constexpr = 1 if VALUE_BITS == 16 else 2 * VALUE_FIELDS
    WK: tl.constexpr = D // KEY_FIELDS
    WV: tl.constexpr = DV // PARTS
    BWK: tl.constexpr = 16 if BD // KEY_FIELDS < 16 else BD // KEY_FIELDS
    BWV: tl.constexpr = 16 if BDV // PARTS < 16 else BDV // PARTS
    ALIGNED: tl.constexpr = VALUE_BITS != 3 or DV % 16 == 0
    few, n = tl.arange(0, BC), tl.arange(0, BN)
    wk, wv = tl.arange(0, BWK), tl.arange(0, BWV)
    queries = ()
    if KEY_BITS == 16:
        mask = query_exists[None, :] & (wk < D)[:, None]
        queries += (tl.load(query_base[None, :] + wk[:, None], mask=mask, other=0.0),)
        factor = tl.zeros([BC], tl.float32) + unit
        offset = tl.zeros([BC], tl.float32)
        begun = tl.zeros([BN, BC], tl.float32)
    else:
        for i in tl.static_range(KEY_FIELDS):
            at = (i * WK + wk)[:, None] * BC + few[None, :]
            mask = (wk < WK)[:, None] & (few < BC)[None, :]
            queries += (tl.load(rotated + at, mask=mask, other=0.0),)
        shift = tl.load(terms + few)
        factor = tl.load(terms + BC + few)
        offset = tl.load(terms + 2 * BC + few)
        begun = tl.zeros([BN, BC], tl.float32) + shift[None, :]

    top = tl.full([BC], -float("inf"), tl.float32)
    norm = tl.zeros([BC], tl.float32)
    accs = ()
    for _ in tl.static_range(PARTS):
        accs += (tl.zeros([BWV, BC], tl.float32),)
    for first in tl.range(start, stop, BN, num_stages=STAGES):
        token = first + n
        valid = token < stop
        place = token.to(tl.int64)
        # both scales of a token as one word, the least that is fetched ahead
        scales = tl.load(scales_base + place, mask=valid, other=0)
        key_at, key_here = key_base + place[:, None] * key_stride, valid[:, None] & (wk < WK)[None, :]
        key = tl.load(key_at + wk[None, :], mask=key_here, other=0)
        value_at = value_base + place[None, :] * value_stride
        if VALUE_BITS == 16:
            value = tl.load(value_at + wv[:, None], mask=valid[None, :] & (wv < WV)[:, None], other=0)
        else:
            value = _pairs(value_at, wv[:, None], valid[None, :], 0, 2 * WV, ALIGNED)

        if KEY_BITS == 16:
            logits = tl.dot(key, queries[0], input_precision=PRECISION)
        else:
            if KEY_BITS == 3:
                first_half = (wk < WK // 2)[None, :]
                first_high = tl.load(key_at + (WK + wk)[None, :], mask=key_here & first_half, other=0)
                second_high = tl.load(key_at + (WK - WK // 2 + wk)[None, :], mask=key_here & ~first_half, other=0)
                levels = key_fields(key, first_high, second_high, KEY_BITS)
            else:
                levels = key_fields(key, key, key, KEY_BITS)
            logits = begun
            for i in tl.static_range(KEY_FIELDS):
                logits = tl.dot(levels[i], queries[i], logits)
        each = factor[None, :]
        if KEY_BITS < 16:
            each = each * _half(scales)[:, None]
        logits = logits * each + offset[None, :]
        if SOFTCAP:
            logits = softcap * (LOG2_E - 2.0 * LOG2_E / (tl.exp2(logits * (2 * LOG2_E) / softcap) + 1.0))
        if VALUE_BITS < 16:
            # A weight includes the value's scale, so that a float16 holds it beside the largest weight: as the scale's
            # exponent before the softmax, and its fraction, 1 to 2, after it.
            size = _half(scales >> 16).to(tl.int32, bitcast=True)
            exponent = tl.maximum(size & 0x7F800000, 0x33800000)  # 2^-24 for 0, the least scale but 0
            fraction = (size - exponent + 0x3F800000).to(tl.float32, bitcast=True)
            shrink = (0x7F000000 - exponent).to(tl.float32, bitcast=True)  # 2^-exponent
            logits += ((exponent >> 23) - 127).to(tl.float32)[:, None]
        logits = tl.where(valid[:, None], logits, -float("inf"))
        # a part of a row has a token, so its top is finite
        new_top = tl.maximum(top, tl.max(logits, 0))
        weight = tl.exp2(logits - new_top[None, :])
        decay = tl.exp2(top - new_top)
        if VALUE_BITS < 16:
            norm = norm * decay + tl.sum(weight * shrink[:, None], 0)
            weight = weight * fraction[:, None]
        else:
            norm = norm * decay + tl.sum(weight, 0)
        top = new_top
        sums = ()
        if VALUE_BITS == 16:
            acc = tl.dot(value, weight.to(value.dtype), accs[0] * decay[None, :], input_precision=PRECISION)
            sums += (acc,)
        else:
            if VALUE_BITS == 3:
                first_high = _pairs(value_at + 2 * WV, wv[:, None], valid[None, :], 0, WV, ALIGNED)
                second_high = _pairs(value_at + WV, wv[:, None], valid[None, :], WV, 2 * WV, ALIGNED)
                levels = value_fields(value, first_high, second_high, VALUE_BITS)
            else:
                levels = value_fields(value, value, value, VALUE_BITS)
            weight = weight.to(tl.float16)
            for i in tl.static_range(PARTS):
                sums += (tl.dot(levels[i], weight, accs[i] * decay[None, :]),)
        accs = sums

    share = tl.where(norm > 0, (1.0 if VALUE_BITS == 16 else UNIT * (1.0 / (DV & -DV)) ** 0.5) / norm, 0.0)
    for i in tl.static_range(PARTS):
        at = few[None, :] * DV + (i * WV + wv)[:, None]
        tl.store(partial + at, accs[i] * share[None, :], mask=query_exists[None, :] & (wv < WV)[:, None])
    tl.store(partial_lse + few, tl.where(norm > 0, top + tl.log2(norm), -float("inf")))


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
            _attend_codes(
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
def _combine(
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


# Tokens per step, and stages. Then warps of a multiprocessor with the most registers of a thread: for few queries,
# small heads and 4 or 2 bits, and else. Fastest on an H200 (`python -m eval.speed.codes`).
TOKENS, STAGES = 64, 3
NARROW, WIDE = (12, 168), (8, 255)
# Dims of a program that combines.
COMBINED = 32


def warps_for(queries: int, value_dim: int, value_bits: int) -> int:
    """Return warps per program: each needs 16 rows of values, of two bytes where they are codes, or more queries."""
    parts = {16: 1, 8: 2, 4: 4}.get(value_bits, 8)
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
        _rotate_queries[(rows, blocks)](
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
        signs = pairs_matrix(value_dim, {8: 1, 4: 2}.get(value_bits, 4), query.device, query.dtype)
    _combine[(rows, blocks, dims["BDV"] // combined)](
        out, lse, partial, partial_lse, dense_partial, dense_lse,
        out if sinks is None else sinks, coding.value_centres, signs,
        schedule.row_start, schedule.share, q_len, *out.stride()[:3],
        DV=value_dim, BW=dims["BDV"] if value_bits < 16 else combined, BDV=combined,
        SINKS=sinks is not None, CODES=value_bits < 16, **shape, num_warps=4,
    )  # fmt: skip

"""The online softmax over a part of one row of codes.

Attention needs no decoded tokens. With a key (M c) s + centre, where M is the rotation, c the levels and s the scale,
q . key is (q M) . c s + q . centre; and the sum of weighted values is rotated back and shifted once, at the end. See
`hardkv.kernels.codes`.
"""

import triton
import triton.language as tl

from hardkv.kernels.attention.triton_states import LOG2_E
from hardkv.kernels.codes import reference
from hardkv.kernels.codes.triton_fields import KEY_BIAS_4, KEY_BIAS_8, fields_2, fields_3, fields_4, fields_8

UNIT = tl.constexpr(reference.UNIT)


@triton.jit
def _rotated(query, matrix, at, inside, SPREAD: tl.constexpr, PRECISION: tl.constexpr):
    """Return some dims of the rotated queries, float32 `[W, BC]`. matrix, at, inside: their rows of signs."""
    signs = tl.load(matrix + at, mask=inside, other=0.0)
    return tl.dot(signs, query, input_precision=PRECISION) * SPREAD


@triton.jit
def _half(word):
    """Return the float16 in the lower half of words, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _rotated_back(found, part, share, matrix, at, inside, PRECISION: tl.constexpr):
    """Add what some rotated dims add to the result. part: float32 `[W, BC]`, times share, float32 `[BC]`."""
    signs = tl.load(matrix + at, mask=inside, other=0.0).to(tl.float32)
    return tl.dot(signs, part * share[None, :], found, input_precision=PRECISION)


@triton.jit
def attend_codes(
    query_base,
    query_exists,
    key_base,
    value_base,
    key_stride,
    value_stride,
    scales_base,
    key_centre,
    value_centre,
    key_signs,
    value_signs,
    start,
    stop,
    limit,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run the online softmax over tokens `start` to `min(stop, limit)` of one row of codes, from nothing.

    The codes of a byte lie in fields, each a range of dims. A field's dims of the rotated queries are multiplied with
    its levels, and a field's levels of the values make its dims of the rotated output. Products are of float16 and
    summed in float32. All tiles are transposed, tokens or dims by queries: queries are few, and a product's second
    factor may have 8 columns where its first has 16 rows.

    Args:
        query_base: pointers to the queries, `[BC]`; query_exists: which of them there are.

    Returns:
        The weighted sum of values `[BM, BDV]` and the sum of weights `[BM]`, both times 2^-top, and top `[BM]`. If BM
        is twice BC, all queries are there twice.
    """
    KEY_FIELDS: tl.constexpr = 1 if KEY_BITS >= 8 else (2 if KEY_BITS == 4 else 4)
    VALUE_FIELDS: tl.constexpr = 1 if VALUE_BITS >= 8 else (2 if VALUE_BITS == 4 else 4)
    WK: tl.constexpr = D // KEY_FIELDS
    WV: tl.constexpr = DV // VALUE_FIELDS
    BWK: tl.constexpr = 16 if BD // KEY_FIELDS < 16 else BD // KEY_FIELDS
    BWV: tl.constexpr = 16 if BDV // VALUE_FIELDS < 16 else BDV // VALUE_FIELDS
    BIAS: tl.constexpr = KEY_BIAS_4 if KEY_BITS == 4 else KEY_BIAS_8
    d, dv, n = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, BN)
    wk, wv = tl.arange(0, BWK), tl.arange(0, BWV)
    query = tl.load(query_base[None, :] + d[:, None], mask=query_exists[None, :] & (d < D)[:, None], other=0.0)

    # logits = (levels . query + shift) * factor * the token's scale + offset, in units of log2
    unit = scale if SOFTCAP else scale * LOG2_E
    offset = tl.zeros([BC], tl.float32)
    shift = tl.zeros([BC], tl.float32)
    factor = tl.zeros([BC], tl.float32) + unit
    if KEY_BITS == 16:
        query0 = query
    else:
        centre = tl.load(key_centre + d, mask=d < D, other=0.0).to(tl.float32)
        offset = tl.sum(query.to(tl.float32) * centre[:, None], 0) * unit
        SPREAD: tl.constexpr = (1.0 / (D & -D)) ** 0.5
        at = d[None, :] * D + wk[:, None]
        inside = (d < D)[None, :] & (wk < WK)[:, None]
        part0 = _rotated(query, key_signs, at, inside, SPREAD, PRECISION)
        largest = tl.max(tl.abs(part0), 0)
        if KEY_FIELDS > 1:
            part1 = _rotated(query, key_signs + WK, at, inside, SPREAD, PRECISION)
            largest = tl.maximum(largest, tl.max(tl.abs(part1), 0))
        if KEY_FIELDS > 2:
            part2 = _rotated(query, key_signs + 2 * WK, at, inside, SPREAD, PRECISION)
            part3 = _rotated(query, key_signs + 3 * WK, at, inside, SPREAD, PRECISION)
            largest = tl.maximum(largest, tl.maximum(tl.max(tl.abs(part2), 0), tl.max(tl.abs(part3), 0)))
        largest = tl.where(largest > 0, largest, 1.0)
        factor *= largest * UNIT
        query0 = (part0 / largest[None, :]).to(tl.float16)
        total = tl.sum(query0.to(tl.float32), 0)
        if KEY_FIELDS > 1:
            query1 = (part1 / largest[None, :]).to(tl.float16)
            total += tl.sum(query1.to(tl.float32), 0)
        if KEY_FIELDS > 2:
            query2 = (part2 / largest[None, :]).to(tl.float16)
            query3 = (part3 / largest[None, :]).to(tl.float16)
            total += tl.sum(query2.to(tl.float32), 0) + tl.sum(query3.to(tl.float32), 0)
        shift = -BIAS * total

    top = tl.full([BC], -float("inf"), tl.float32)
    norm = tl.zeros([BC], tl.float32)
    acc0 = tl.zeros([BWV, BC], tl.float32)
    if VALUE_FIELDS > 1:
        acc1 = tl.zeros([BWV, BC], tl.float32)
    if VALUE_FIELDS > 2:
        acc2 = tl.zeros([BWV, BC], tl.float32)
        acc3 = tl.zeros([BWV, BC], tl.float32)
    begun = tl.zeros([BN, BC], tl.float32) + shift[None, :]
    stop = tl.minimum(stop, limit)
    for first in tl.range(start, stop, BN, num_stages=STAGES):
        token = first + n
        valid = token < stop
        place = token.to(tl.int64)
        # both scales of a token as one word, the least that is fetched ahead
        scales = tl.load(scales_base + place, mask=valid, other=0)
        key_at, key_here = key_base + place[:, None] * key_stride, valid[:, None] & (wk < WK)[None, :]
        value_at, value_here = value_base + place[None, :] * value_stride, valid[None, :] & (wv < WV)[:, None]
        key = tl.load(key_at + wk[None, :], mask=key_here, other=0)
        value = tl.load(value_at + wv[:, None], mask=value_here, other=0)

        if KEY_BITS == 16:
            logits = tl.dot(key, query0, input_precision=PRECISION)
        elif KEY_BITS == 8:
            logits = tl.dot(fields_8(key, False), query0, begun)
        elif KEY_BITS == 4:
            key0, key1 = fields_4(key, False)
            logits = tl.dot(key1, query1, tl.dot(key0, query0, begun))
        else:
            if KEY_BITS == 3:
                high = tl.load(key_at + (WK + wk % (WK // 2))[None, :], mask=key_here, other=0)
                unshifted = tl.where((wk >= WK // 2)[None, :] & (n >= 0)[:, None], 255, 0).to(tl.uint8)
                key0, key1, key2, key3 = fields_3(key, high, unshifted, False)
            else:
                key0, key1, key2, key3 = fields_2(key, False)
            logits = tl.dot(key1, query1, tl.dot(key0, query0, begun))
            logits = tl.dot(key3, query3, tl.dot(key2, query2, logits))
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
            logits = logits + ((exponent >> 23) - 127).to(tl.float32)[:, None]
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
        acc0 = acc0 * decay[None, :]
        if VALUE_FIELDS > 1:
            acc1 = acc1 * decay[None, :]
        if VALUE_FIELDS > 2:
            acc2 = acc2 * decay[None, :]
            acc3 = acc3 * decay[None, :]
        if VALUE_BITS == 16:
            acc0 = tl.dot(value, weight.to(value.dtype), acc0, input_precision=PRECISION)
        elif VALUE_BITS == 8:
            acc0 = tl.dot(fields_8(value, True), weight.to(tl.float16), acc0)
        elif VALUE_BITS == 4:
            value0, value1 = fields_4(value, True)
            acc0 = tl.dot(value0, weight.to(tl.float16), acc0)
            acc1 = tl.dot(value1, weight.to(tl.float16), acc1)
        else:
            if VALUE_BITS == 3:
                high = tl.load(value_at + (WV + wv % (WV // 2))[:, None], mask=value_here, other=0)
                unshifted = tl.where((wv >= WV // 2)[:, None] & (n >= 0)[None, :], 255, 0).to(tl.uint8)
                value0, value1, value2, value3 = fields_3(value, high, unshifted, True)
            else:
                value0, value1, value2, value3 = fields_2(value, True)
            acc0 = tl.dot(value0, weight.to(tl.float16), acc0)
            acc1 = tl.dot(value1, weight.to(tl.float16), acc1)
            acc2 = tl.dot(value2, weight.to(tl.float16), acc2)
            acc3 = tl.dot(value3, weight.to(tl.float16), acc3)

    if VALUE_BITS == 16:
        acc = acc0
    else:
        # The mean fits whatever the rotation is computed in; the sum of weights may not.
        share = tl.where(norm > 0, UNIT * (1.0 / (DV & -DV)) ** 0.5 / norm, 0.0)
        at = dv[:, None] * DV + wv[None, :]
        inside = (dv < DV)[:, None] & (wv < WV)[None, :]
        acc = tl.zeros([BDV, BC], tl.float32)
        acc = _rotated_back(acc, acc0, share, value_signs, at, inside, PRECISION)
        if VALUE_FIELDS > 1:
            acc = _rotated_back(acc, acc1, share, value_signs + WV, at, inside, PRECISION)
        if VALUE_FIELDS > 2:
            acc = _rotated_back(acc, acc2, share, value_signs + 2 * WV, at, inside, PRECISION)
            acc = _rotated_back(acc, acc3, share, value_signs + 3 * WV, at, inside, PRECISION)
        centre = tl.load(value_centre + dv, mask=dv < DV, other=0.0).to(tl.float32)
        acc = (acc + centre[:, None]) * norm[None, :]
    acc = tl.trans(acc)
    if BM > BC:
        acc = tl.reshape(tl.broadcast_to(acc[None], [2, BC, BDV]), [BM, BDV])
        top = tl.reshape(tl.broadcast_to(top[None], [2, BC]), [BM])
        norm = tl.reshape(tl.broadcast_to(norm[None], [2, BC]), [BM])
    return acc, top, norm

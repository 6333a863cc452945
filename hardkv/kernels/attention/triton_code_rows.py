"""Attend rotated queries to the codes of a row, in a kernel.

With a key (M c) s + centre, where M is the rotation, c the levels and s the scale, q . key is (q M) . c s + q . centre.
Values are summed as levels, and rotated back once, at the end (`triton_rotation`). See `hardkv.kernels.codes`.
"""

import triton
import triton.language as tl

from hardkv.kernels.attention.triton_states import LOG2_E
from hardkv.kernels.codes import reference
from hardkv.kernels.codes.triton_fields import key_fields, value_fields

UNIT = tl.constexpr(reference.UNIT)


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
def attend_codes(
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
        rotated, terms: from `rotate_queries`, if keys are codes.
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

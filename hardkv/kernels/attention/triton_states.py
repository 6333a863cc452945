"""The online softmax over a part of one row of keys and values."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    acc,
    top,
    norm,
    query,
    key_base,
    value_base,
    key_stride,
    value_stride,
    start,
    stop,
    limit,
    last_seen,
    position_base,
    mask_base,
    mask_stride,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run the online softmax over tokens `start` to `min(stop, limit)` of one contiguous row."""
    d, dv, n = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, BN)
    stop = tl.minimum(stop, limit)
    for first in tl.range(start, stop, BN, num_stages=STAGES):
        token = first + n
        valid = token < stop
        place = token.to(tl.int64)
        key = tl.load(
            key_base + place[None, :] * key_stride + d[:, None], mask=valid[None, :] & (d < D)[:, None], other=0.0
        )
        value = tl.load(
            value_base + place[:, None] * value_stride + dv[None, :],
            mask=valid[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        logits = tl.dot(query, key, input_precision=PRECISION) * scale
        if SOFTCAP:
            logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2 * LOG2_E) / softcap) + 1.0))
        logits = logits * LOG2_E
        seen = valid[None, :]
        if CAUSAL:
            position = tl.load(position_base + token, mask=valid, other=0)
            seen = seen & (position[None, :] <= last_seen[:, None])
        if MASKED:
            seen = seen & (tl.load(mask_base + mask_stride[:, None] + token[None, :], mask=seen, other=0) != 0)
        logits = tl.where(seen, logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(top - shift)
        norm = norm * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, norm

"""Load a tile of tokens and a block of queries for the window attention, and compute their logits.

Sizes are named as in `triton`: G query heads of C columns each, in blocks of BG and BC; D is the head dimension, BD the
next power of two.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
# A position after every query, for tokens that no query sees.
LATEST = tl.constexpr(2**31 - 1)


@triton.jit
def load_vectors(base, index, valid, D: tl.constexpr, BD: tl.constexpr):
    """Load rows of a matrix `[..., D]` as `[len(index), BD]`, with zeros where not `valid` and from column D on."""
    d = tl.arange(0, BD)
    pointers = base + index.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(pointers, mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_positions(positions, exclude, begin, stop, TILE: tl.constexpr):
    """Load the positions of a tile of tokens; place tokens from `stop` on and excluded ones after every query."""
    index = tl.arange(0, TILE)
    mask = index < stop - begin
    position = tl.load(positions + begin + index, mask=mask, other=LATEST)
    if exclude is not None:
        position = tl.where(tl.load(exclude + begin + index, mask=mask, other=1) != 0, LATEST, position)
    return position


@triton.jit
def load_query_block(
    base, offsets, group, column, G: tl.constexpr, C: tl.constexpr, BG, BC, D: tl.constexpr, BD: tl.constexpr, SHARED
):
    """Load a row's queries from (group, column) on, `[BG * BC, BD]`; repeat the last ones where none exist.

    With `offsets`, load zeros for queries whose offset is infinite, so that they contribute nothing.
    """
    index = tl.arange(0, BG * BC)
    group = tl.minimum(group + index // BC, G - 1)
    column = tl.minimum(column + index % BC, C - 1)
    if offsets is None:
        valid = index >= 0
    else:
        valid = tl.load(offsets + (column if SHARED else group * C + column)) < float("inf")
    return load_vectors(base, group * C + column, valid, D, BD)


@triton.jit
def causal(logits, positions, exclude, begin, stop, query_positions, column, W: tl.constexpr, AXIS: tl.constexpr):
    """Set logits of tokens from `begin` on to -inf where the token comes after the query; AXIS: the tokens' axis."""
    position = load_positions(positions, exclude, begin, stop, logits.shape[AXIS])
    last = tl.load(query_positions + column % W).to(tl.int32)
    seen = tl.expand_dims(position, 1 - AXIS) <= tl.expand_dims(last, AXIS)
    return tl.where(seen, logits, -float("inf"))


@triton.jit
def earliest_of(query_positions, W: tl.constexpr, BW: tl.constexpr):
    """Return the position up to which all queries see the tokens."""
    w = tl.arange(0, BW)
    return tl.min(tl.load(query_positions + w, mask=w < W, other=LATEST)).to(tl.int32)


@triton.jit
def logits_of(left, right, scale, cap, PRECISION: tl.constexpr):
    """Compute logits of `left [m, BD]` against `right [n, BD]`, in units of log(2) like `scale` and `cap`."""
    logits = tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale
    if cap is not None:
        x = tl.abs(logits)
        square = x * x
        # tanh; near 0 the quotient loses precision
        series = x * (1 - square * (0.33333333 - square * (0.13333333 - square * (0.053968254 - square * 0.021869489))))
        decay = tl.exp2(x * (-2 * LOG2_E))
        tanh = tl.where(x < 0.25, series, (1 - decay) / (1 + decay))
        logits = tl.where(logits < 0, -tanh, tanh) * cap
    return logits


@triton.jit
def group_logits(
    k, q, base, offsets, column, scale, cap, G: tl.constexpr, C: tl.constexpr, BG, BC, D: tl.constexpr, PRECISION
):
    """Return the group's largest logit for tokens k and columns from `column` on; q: the queries, if in one block."""
    logits = tl.full([k.shape[0], BC], -float("inf"), tl.float32)
    for group in range(0, G, BG):
        if G > BG or C > BC:
            block = load_query_block(base, offsets, group, column, G, C, BG, BC, D, k.shape[1], True)
        else:
            block = q
        each = tl.reshape(logits_of(k, block, scale, cap, PRECISION), [k.shape[0], BG, BC])
        logits = tl.maximum(logits, tl.max(each, 1))
    return logits

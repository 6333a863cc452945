"""Compute one number per token from window queries and ragged keys, in two passes, without storing `[N, G * W]`.

Every row is cut into chunks. The chunks of all rows are numbered so that `R + N // chunk` programs suffice however
uneven the rows are: row r, whose first token is s, owns the slots from `r + s // chunk` on. The grid then depends on
shapes only, every program finds its own row, and nothing is read on the host.

The first pass stores the logarithm of the softmax denominator for every (chunk, query). A small kernel combines those
of each row. The second pass turns logits into probabilities and sums them over the queries. Logarithms have base 2.

Names in the kernels: G query heads of C columns each, in blocks of BG and BC (for means, one head of G * W columns);
columns); D is the head dimension and BD the next power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.gpu import cdiv, next_power_of_2
from hardkv.kernels.scoring.reference import Reduce
from hardkv.kernels.scoring.triton_tiles import (
    LOG2_E,
    causal,
    earliest_of,
    group_logits,
    load_positions,
    load_query_block,
    load_vectors,
    logits_of,
)

# Rows that a program compares at a time to find its own row.
ROWS = tl.constexpr(1024)


@triton.jit
def chunk_of(slot, cu_seqlens, num_rows, chunk):
    """Return a slot's row, the row's bounds, and the chunk's first token, which is past the row if there is no work."""
    row = -1
    for first_row in range(0, num_rows, ROWS):
        index = first_row + tl.arange(0, ROWS)
        starts = tl.load(cu_seqlens + index, mask=index < num_rows, other=0)
        row += tl.sum(((index < num_rows) & (index + starts // chunk <= slot)).to(tl.int32))
    start = tl.load(cu_seqlens + row)
    return row, start, tl.load(cu_seqlens + row + 1), start + (slot - row - start // chunk) * chunk


@triton.jit
def _denominator_of_chunk(
    partial,  # float32 [slots, C]
    queries,
    query_positions,
    keys,
    positions,
    exclude,
    cu_seqlens,
    num_rows,
    chunk,
    scale,
    cap,
    W: tl.constexpr,
    BW: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BG: tl.constexpr,
    BC: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the logarithm of the sum of exponentials over one chunk of a row, for a block of columns."""
    blocks = tl.cdiv(C, BC)
    slot = tl.program_id(0) // blocks
    first_column = tl.program_id(0) % blocks * BC
    row, _, end, first = chunk_of(slot, cu_seqlens, num_rows, chunk)
    if first >= end:
        return
    stop = tl.minimum(first + chunk, end)
    column = first_column + tl.arange(0, BC)
    earliest = earliest_of(query_positions, W, BW)
    base = queries + row.to(tl.int64) * (G * C * D)
    q = load_query_block(base, None, 0, first_column, G, C, BG, BC, D, BD, False)
    top = tl.full([BC], -float("inf"), tl.float32)
    total = tl.zeros([BC], tl.float32)
    for begin in tl.range(first, stop, TILE):
        token = begin + tl.arange(0, TILE)
        k = load_vectors(keys, token, token < stop, D, BD)
        late = tl.max(load_positions(positions, exclude, begin, stop, TILE)) > earliest
        if G > 1:
            each = group_logits(k, q, base, None, first_column, scale, cap, G, C, BG, BC, D, PRECISION)
            logits = tl.trans(each)
        else:
            logits = logits_of(q, k, scale, cap, PRECISION)
        if late:
            logits = causal(logits, positions, exclude, begin, stop, query_positions, column, W, AXIS=1)
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        top = new_top
    shift = tl.where(top == -float("inf"), 0.0, top)
    tl.store(partial + slot.to(tl.int64) * C + column, shift + tl.log2(total), mask=column < C)


@triton.jit
def _denominator_of_row(
    offsets,  # float32 [R, C]
    partial,  # float32 [slots, C]
    query_valid,
    sinks,
    cu_seqlens,
    chunk,
    HEADS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BW: tl.constexpr,
    GROUP: tl.constexpr,
    POWER: tl.constexpr,
    DIVISOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Compute the offset to subtract from POWER * logit: the log of the denominator plus the log of the query count."""
    row = tl.program_id(0)
    start = tl.load(cu_seqlens + row)
    slot = (row + start // chunk).to(tl.int64)
    chunks = tl.cdiv(tl.load(cu_seqlens + row + 1) - start, chunk)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if sinks is not None:
        head = row % HEADS * GROUP + column // W
        top = tl.load(sinks + head, mask=column < C, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full([COLUMNS], 1.0, tl.float32)
    else:
        top = tl.full([COLUMNS], -float("inf"), tl.float32)
        total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        index = first + tl.arange(0, CHUNKS)
        mask = (index < chunks)[:, None] & (column < C)[None, :]
        logs = tl.load(partial + (slot + index)[:, None] * C + column[None, :], mask=mask, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(logs, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logs - shift[None, :]), 0)
        top = new_top
    query_valid += row // HEADS * W
    w = tl.arange(0, BW)
    divisor = tl.maximum(tl.sum(tl.load(query_valid + w, mask=w < W, other=0).to(tl.int32)), 1) * DIVISOR
    # queries that are invalid, that see nothing (0) or that overflowed (NaN) contribute nothing
    given = (tl.load(query_valid + column % W) != 0) & (total > 0)
    offset = tl.where(given, (top + tl.log2(total)) * POWER + tl.log2(divisor.to(tl.float32)), float("inf"))
    tl.store(offsets + row.to(tl.int64) * C + column, offset, mask=column < C)


@triton.jit
def _load_offsets(offsets, group, column, G: tl.constexpr, C: tl.constexpr, BG, BC):
    """Load the offsets of a block of a row's queries; nonexistent queries get infinity."""
    index = tl.arange(0, BG * BC)
    group += index // BC
    column += index % BC
    return tl.load(offsets + group * C + column, mask=(group < G) & (column < C), other=float("inf"))


@triton.jit
def _received(
    out,
    offsets,  # float32 [R, G * C], [R, C] when SHARED
    queries,
    query_positions,
    keys,
    positions,
    exclude,
    cu_seqlens,
    num_rows,
    chunk,
    scale,
    cap,
    SHARED: tl.constexpr,
    POWER: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BG: tl.constexpr,
    BC: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum the probabilities of one chunk of a row over columns; store the largest sum among the group's heads."""
    row, _, end, first = chunk_of(tl.program_id(0), cu_seqlens, num_rows, chunk)
    if first >= end:
        return
    stop = tl.minimum(first + chunk, end)
    base = queries + row.to(tl.int64) * (G * C * D)
    # SHARED: one softmax per group
    GS: tl.constexpr = 1 if SHARED else G
    BGS: tl.constexpr = 1 if SHARED else BG
    offsets += row.to(tl.int64) * (GS * C)
    earliest = earliest_of(query_positions, W, BW)
    # load the data of a single block once
    ONE: tl.constexpr = G <= BG and C <= BC
    q = load_query_block(base, offsets, 0, 0, G, C, BG, BC, D, BD, SHARED)
    offset = _load_offsets(offsets, 0, 0, GS, C, BGS, BC)
    for begin in tl.range(first, stop, TILE):
        token = begin + tl.arange(0, TILE)
        k = load_vectors(keys, token, token < stop, D, BD)
        late = tl.max(load_positions(positions, exclude, begin, stop, TILE)) > earliest
        received = tl.zeros([TILE], tl.float32)
        for group in range(0, GS, BGS):
            share = tl.zeros([TILE, BGS], tl.float32)
            for column in range(0, C, BC):
                if SHARED:
                    logits = group_logits(k, q, base, offsets, column, scale, cap, G, C, BG, BC, D, PRECISION)
                elif ONE:
                    logits = logits_of(k, q, scale, cap, PRECISION)
                else:
                    block = load_query_block(base, offsets, group, column, G, C, BG, BC, D, BD, False)
                    logits = logits_of(k, block, scale, cap, PRECISION)
                if late:
                    index = column + tl.arange(0, BGS * BC) % BC
                    logits = causal(logits, positions, exclude, begin, stop, query_positions, index, W, AXIS=0)
                if not ONE:
                    offset = _load_offsets(offsets, group, column, GS, C, BGS, BC)
                weight = tl.exp2(logits * POWER - offset[None, :])
                share += tl.sum(tl.reshape(weight, [TILE, BGS, BC]), 2)
            received = tl.maximum(received, tl.max(share, 1))
        tl.store(out + token, tl.where(received == received, received, 0.0), mask=token < stop)


def _blocks(dim: int, keys: Tensor) -> tuple[int, int, int, int]:
    """Return tokens per tile, queries per block, warps and pipeline stages that fit in 99 KB of shared memory."""
    if keys.dtype == torch.float32:  # no tensor cores
        return (32, 32, 4, 2)
    if dim > 128:
        return (64, 64, 4, 2)
    # Hopper's matrix units are fastest with wide tiles; on other GPUs the operands would not fit the registers
    hopper = keys.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(keys.device)[0] == 9
    return (128 if hopper else 64, 128, 8, 2 if dim > 64 else 3)


def _chunk(tokens: int, tile: int) -> int:
    """Return tokens per program: enough programs for a large GPU, but few enough to amortise loading the queries."""
    return min(max(next_power_of_2(tokens // 512), tile), 1024)


def _cut(heads: int, columns: int, most: int) -> dict[str, int]:
    """Return the sizes G, C, BG and BC, for blocks of at most `most` queries."""
    block = min(max(next_power_of_2(columns), 16), most)
    return {"G": heads, "C": columns, "BG": min(next_power_of_2(heads), most // block), "BC": block}


def window_attention(
    queries: Tensor,
    query_positions: Tensor,
    query_valid: Tensor,
    keys: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
    softcap: float | None = None,
    reduce: Reduce = "mean",
    exclude: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Run `hardkv.kernels.scoring.window_attention` on a GPU; float16, bfloat16 or float32, one dtype for all inputs.

    Args:
        cu_seqlens: int32 `[R + 1]`.

    Returns:
        `[N]`, float32.

    Raises:
        ValueError: learned sinks of several heads together with one softmax for all of them.
    """
    batch, num_heads, window, dim = queries.shape
    num_rows = batch * num_kv_heads
    group = num_heads // num_kv_heads
    if group == 1 and reduce in ("max", "max_logits"):
        reduce = "mean"  # the same
    if reduce == "max_logits" and sinks is not None:
        raise ValueError(
            f"sinks {tuple(sinks.shape)} hold a logit a query head, reduce='max_logits' has one softmax for {group} of "
            "them: leave out sinks or choose another reduce"
        )
    out = torch.empty(keys.shape[0], dtype=torch.float32, device=keys.device)
    if not keys.shape[0] or not window:
        return out.zero_()
    tile, most_queries, num_warps, stages = _blocks(dim, keys)
    chunk = _chunk(keys.shape[0], tile)
    slots = num_rows + keys.shape[0] // chunk
    inner, cap = (scale * LOG2_E.value, None) if softcap is None else (scale / softcap, softcap * LOG2_E.value)
    query_valid = query_valid.contiguous().view(torch.uint8)
    inputs = (
        queries.contiguous(),
        query_positions.contiguous(),
        keys.contiguous(),
        positions.contiguous(),
        None if exclude is None else exclude.contiguous().view(torch.uint8),
        cu_seqlens,
        num_rows,
        chunk,
        inner,
        cap,
    )
    settings = {
        "W": window,
        "BW": next_power_of_2(window),
        "D": dim,
        "BD": max(next_power_of_2(dim), 16),
        "TILE": tile,
        "PRECISION": "ieee" if keys.dtype == torch.float32 else None,
        "num_warps": num_warps,
        "num_stages": stages,
    }
    if not torch.version.hip:
        settings["maxnreg"] = min(1024 // num_warps, 255)  # leave room for two programs per multiprocessor
    shared, power = reduce == "max_logits", 2 if reduce == "mean_square" else 1
    columns = window if shared else group * window
    flat, grouped = _cut(1, group * window, most_queries), _cut(group, window, most_queries)

    partial = torch.empty(slots, columns, dtype=torch.float32, device=keys.device)
    first = grouped if shared else flat
    _denominator_of_chunk[(slots * cdiv(columns, first["BC"]),)](partial, *inputs, **first, **settings)
    offsets = torch.empty(num_rows, columns, dtype=torch.float32, device=keys.device)
    _denominator_of_row[(num_rows, cdiv(columns, 32))](
        offsets,
        partial,
        query_valid,
        None if sinks is None else sinks.contiguous(),
        cu_seqlens,
        chunk,
        HEADS=num_kv_heads,
        W=window,
        C=columns,
        BW=settings["BW"],
        GROUP=group,
        POWER=power,
        DIVISOR=group if reduce in ("mean", "mean_square") else 1,
        COLUMNS=32,
        CHUNKS=32,
    )
    second = grouped if reduce in ("max", "max_logits") else flat
    _received[(slots,)](out, offsets, *inputs, SHARED=shared, POWER=power, **second, **settings)
    return out

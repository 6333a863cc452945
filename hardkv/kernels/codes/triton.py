"""Gather quantised tokens of a layer's tiers, and quantise those of the dense tier, in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.codes import reference
from hardkv.kernels.codes.reference import DEVIATION, LARGEST, LARGEST_SCALE, LEVELS, code_width
from hardkv.kernels.codes.rotation import rotation
from hardkv.kernels.compaction.triton import copy_rows, dense_slot, padded_width, rows_at
from hardkv.kernels.gpu import cdiv

# Tokens of a program, and the most bytes of their codes that it makes at a time.
BLOCK, MAX_BYTES = 64, 32
# Coordinates that one step of a product sums over.
DEPTH = tl.constexpr(32)
# Smaller than the norm of any vector but 0, in float32.
SMALLEST = tl.constexpr(1e-30)
LIMIT, UNIT = tl.constexpr(LARGEST_SCALE), tl.constexpr(reference.UNIT)


@triton.jit
def _centred(source, centre, coded, first, D: tl.constexpr):
    """Load coordinates of states from `first` on and subtract the centres: float32 `[BLOCK, DEPTH]`."""
    d = first + tl.arange(0, DEPTH)
    mask = coded[:, None] & (d < D)[None, :]
    state = tl.load(source[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return state - tl.load(centre[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rotated(source, centre, coded, matrix, column, inside, BYTES: tl.constexpr, D: tl.constexpr):
    """Return some coordinates of the rotated, centred states, float32 `[BLOCK, BYTES]`."""
    rotated = tl.zeros([coded.shape[0], BYTES], tl.float32)
    for first in range(0, D, DEPTH):
        d = (first + tl.arange(0, DEPTH))[:, None]
        part = tl.load(matrix + d * D + column[None, :], mask=(d < D) & inside, other=0.0)
        state = _centred(source, centre, coded, first, D)
        rotated = tl.dot(state, part, rotated, input_precision="ieee")
    return rotated


@triton.jit
def _integer(size):
    """Round float32 numbers of at least 0 to integers, half to even: int32."""
    return ((size + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 times 2^23, whose last bit is 1


@triton.jit
def _nearest(size, LEVELS: tl.constexpr):
    """Return the index of the level nearest to each number of at least 0, int32, and that level, float32."""
    index = tl.zeros(size.shape, tl.int32)
    level = tl.zeros(size.shape, tl.float32) + LEVELS[0]
    for i in tl.static_range(1, len(LEVELS)):
        beyond = size > (LEVELS[i - 1] + LEVELS[i]) / 2
        index += beyond.to(tl.int32)
        level = tl.where(beyond, LEVELS[i], level)
    return index, level


@triton.jit
def _quantise(
    out,
    source,
    centre,
    coded,
    matrix,
    D: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    DEVIATION: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Write the codes of the states at `source`, where `coded`, to `out`, as `reference.pack` lays them out.

    Return the scales, float32 `[BLOCK]`.
    """
    square = tl.zeros(coded.shape, tl.float32)
    for first in range(0, D, DEPTH):
        state = _centred(source, centre, coded, first, D)
        square += tl.sum(state * state, 1)
    norm = tl.sqrt_rn(square)
    # The first W bytes hold the LOW lowest bits of all codes. With 3 bits, W / 2 bytes follow with the highest bits: 4
    # of the codes in the first half of the W bytes, and 4 of those in the second half.
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    W: tl.constexpr = D * LOW // 8
    STEP: tl.constexpr = W // HALVES
    if BITS == 8:
        largest = tl.zeros(coded.shape, tl.float32)
        for begin in range(0, W, BYTES):
            byte = begin + tl.arange(0, BYTES)
            rotated = _rotated(source, centre, coded, matrix, byte, (byte < W)[None, :], BYTES, D)
            largest = tl.maximum(largest, tl.max(tl.abs(rotated), 1))
        to_unit = LEVELS[0] / tl.where(largest < SMALLEST, SMALLEST, largest)
    else:
        to_unit = DEVIATION * D**0.5 / tl.where(norm < SMALLEST, SMALLEST, norm)
    squares = tl.zeros([coded.shape[0], BYTES], tl.float32)
    for begin in range(0, STEP, BYTES):
        byte = begin + tl.arange(0, BYTES)
        inside = (byte < STEP)[None, :]
        mask = coded[:, None] & inside
        high = tl.zeros(squares.shape, tl.int32)
        for half in range(HALVES):
            low = tl.zeros(squares.shape, tl.int32)
            for field in range(8 // LOW):
                column = field * W + half * STEP + byte
                unit = _rotated(source, centre, coded, matrix, column, inside, BYTES, D) * to_unit[:, None]
                if BITS == 8:
                    code = _integer(tl.abs(unit))
                    level = code.to(tl.float32)
                    code = 128 + tl.where(unit < 0, -code, code)
                else:
                    code, level = _nearest(tl.abs(unit), LEVELS)
                    code |= (unit < 0).to(tl.int32) << (BITS - 1)
                squares += tl.where(inside, level * level, 0.0)
                low |= (code & ((1 << LOW) - 1)) << (LOW * field)
                high |= (code >> LOW) << (4 * (field // 2) + 2 * half + field % 2)
            tl.store(out[:, None] + (half * STEP + byte)[None, :], low.to(tl.uint8), mask=mask)
        if BITS == 3:
            tl.store(out[:, None] + (W + byte)[None, :], high.to(tl.uint8), mask=mask)
    kept = tl.sqrt_rn(tl.sum(squares, 1)) * UNIT
    scale = norm / tl.where(kept < SMALLEST, SMALLEST, kept)  # kept is 0 at the centre, for 8 bits
    return tl.where(scale > LIMIT, LIMIT, scale)


@triton.jit
def _gather(
    token,
    live,
    where,
    n_first,
    n_second,
    scales_out,
    first_scales,
    second_scales,
    out,
    first,
    second,
    last,
    centre,
    matrix,
    heads,
    capacity,
    stride_b,
    stride_h,
    stride_c,
    KIND: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BYTES: tl.constexpr,
    LEVELS: tl.constexpr,
    DEVIATION: tl.constexpr,
):
    """Gather the keys (KIND 0) or values (KIND 1) of a block of tokens, and their scales."""
    is_first = where < n_first
    held = live & (where < n_first + n_second)
    scales = tl.where(is_first, first_scales + where * 2, second_scales + (where - n_first) * 2)
    scale = tl.load(scales + KIND, mask=held, other=0.0)
    if BITS == 16:
        source = rows_at(
            where, first, second, last, heads, capacity, stride_b, stride_h, stride_c, n_first, n_second, D, FLAT
        )
        copy_rows(out, token, live, source, D, BLOCK_W)
    else:
        W: tl.constexpr = D * BITS // 8
        source = tl.where(is_first, first + where * W, second + (where - n_first) * W)
        copy_rows(out, token, held, source, W, BLOCK_W)
        coded = live & ~held
        if tl.max(coded.to(tl.int32), 0) > 0:
            row, offset = dense_slot(where - n_first - n_second, heads, capacity, stride_b, stride_h, stride_c)
            mean = centre + row.to(tl.int64) * D
            new = _quantise(out + token * W, last + offset, mean, coded, matrix, D, BITS, LEVELS, DEVIATION, BYTES)
            scale = tl.where(coded, new.to(tl.float16), scale)
    tl.store(scales_out + token * 2 + KIND, scale, mask=live)


@triton.jit(
    do_not_specialize=["n", "n_first", "n_second", "key_heads", "key_capacity", "value_heads", "value_capacity"],
    do_not_specialize_on_alignment=["index"],  # index is a slice of another tensor
)
def _gather_codes_kernel(
    positions_out,
    misses_out,
    scales_out,
    address,
    index,
    positions,
    misses,
    first_scales,
    second_scales,
    n,
    n_first,
    n_second,
    keys_out,
    first_keys,
    second_keys,
    last_keys,
    key_centre,
    key_matrix,
    key_heads,
    key_capacity,
    key_stride_b,
    key_stride_h,
    key_stride_c,
    values_out,
    first_values,
    second_values,
    last_values,
    value_centre,
    value_matrix,
    value_heads,
    value_capacity,
    value_stride_b,
    value_stride_h,
    value_stride_c,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_LEVELS: tl.constexpr,
    VALUE_LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONLY_DENSE: tl.constexpr,
):
    """Gather the keys (axis 1 of the grid: 0) or values (1) of a block of tokens. KEYS, VALUES: from `_constants`.

    ONLY_DENSE: whether to leave out keys, values and scales of tokens that are not in the dense tier.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = token < n
    merged = tl.load(index + token, mask=live, other=0)
    where = tl.load(address + merged, mask=live, other=0)
    if tl.program_id(1) == 0:
        tl.store(positions_out + token, tl.load(positions + merged, mask=live), mask=live)
        tl.store(misses_out + token, tl.load(misses + merged, mask=live), mask=live)
    if ONLY_DENSE:
        live = live & (where >= n_first + n_second)
    if tl.program_id(1) == 0:
        _gather(
            token, live, where, n_first, n_second, scales_out, first_scales, second_scales,
            keys_out, first_keys, second_keys, last_keys, key_centre, key_matrix,
            key_heads, key_capacity, key_stride_b, key_stride_h, key_stride_c,
            0, KEYS[0], KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEY_LEVELS, KEYS[5],
        )  # fmt: skip
    else:
        _gather(
            token, live, where, n_first, n_second, scales_out, first_scales, second_scales,
            values_out, first_values, second_values, last_values, value_centre, value_matrix,
            value_heads, value_capacity, value_stride_b, value_stride_h, value_stride_c,
            1, VALUES[0], VALUES[1], VALUES[2], VALUES[3], VALUES[4], VALUE_LEVELS, VALUES[5],
        )  # fmt: skip


def _constants(dense: Tensor, bits: int) -> tuple[int, int, bool, int, int, float | None]:
    """Return what the kernel is compiled for, from the keys or values of the dense tier, `[B, H, C, D]`."""
    dim = dense.shape[-1]
    width = dim if bits == 16 else code_width(dim, bits)
    made = code_width(dim, 1 if bits == 3 else bits)
    flat = bits == 16 and dense.is_contiguous()
    return dim, bits, flat, padded_width(width), min(padded_width(made), MAX_BYTES), DEVIATION.get(bits)


def gather_codes(
    sources: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[Tensor],
    centres: tuple[Tensor, Tensor],
    bits: tuple[int, int],
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `hardkv.kernels.codes.gather_codes` in one launch."""
    n, first = index.shape[0], sources[0]
    keys, values = (states.new_empty(n, states.shape[1]) for states in first)
    outs = keys, values, positions.new_empty(n), misses.new_empty(n), scales[0].new_empty(n, 2)
    gather_into(outs, sources, scales, centres, bits, address, index, positions, misses, only_dense=False)
    return outs


def gather_into(
    outs: Sequence[Tensor],
    sources: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[Tensor],
    centres: tuple[Tensor, Tensor],
    bits: tuple[int, int],
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
    *,
    only_dense: bool,
) -> None:
    """Write what `gather_codes` returns to `outs`.

    Args:
        only_dense: whether to leave keys, values and scales as they are where a token is not in the dense tier.
    """
    n = index.shape[0]
    if not n:
        return
    arguments, constants = [], []
    for kind in (0, 1):
        first, second, dense = (source[kind] for source in sources)
        if dense.stride(-1) != 1:
            dense = dense.contiguous()
        matrix = None if bits[kind] == 16 else rotation(dense.shape[-1], dense.device, torch.float32)
        shape = (*dense.shape[1:3], *dense.stride()[:3])
        arguments += [outs[kind], first, second, dense, centres[kind], matrix, *shape]
        constants.append(_constants(dense, bits[kind]))
    _gather_codes_kernel[(cdiv(n, BLOCK), 2)](
        *outs[2:],
        address,
        index,
        positions,
        misses,
        *scales,
        n,
        *(keys.shape[0] for keys, _ in sources[:2]),
        *arguments,
        KEYS=constants[0],
        VALUES=constants[1],
        KEY_LEVELS=LEVELS.get(bits[0], (LARGEST,)),
        VALUE_LEVELS=LEVELS.get(bits[1], (LARGEST,)),
        BLOCK=BLOCK,
        ONLY_DENSE=only_dense,
        num_warps=4,
    )

"""Gather keys, values, positions and misses of chosen tokens from a layer's tiers in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.gpu import cdiv, next_power_of_2

# Bytes of keys that one program copies. With as many bytes of values, enough loads are in flight for full bandwidth.
TILE_BYTES = 8192
MAX_TILE_TOKENS = 256
# Counts change at every event, and compiling a variant for each gains nothing.
COUNTS = ["n", "n_first", "n_second"]


@triton.jit
def dense_slot(slot, heads, capacity, stride_b, stride_h, stride_c):
    """Return the row of a slot of the dense tier, and the offset of its token."""
    slot = slot.to(tl.int32)  # a 64-bit division costs several times more; rows count their tokens in int32 too
    row = slot // capacity
    offset = (row // heads).to(tl.int64) * stride_b + (row % heads).to(tl.int64) * stride_h
    return row, offset + (slot - row * capacity).to(tl.int64) * stride_c


@triton.jit
def rows_at(
    address,
    first,
    second,
    last,
    heads,
    capacity,
    stride_b,
    stride_h,
    stride_c,
    n_first,
    n_second,
    D: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Return pointers to the tokens at `address`."""
    slot = address - n_first - n_second
    offset = slot * D if FLAT else dense_slot(slot, heads, capacity, stride_b, stride_h, stride_c)[1]
    source = tl.where(slot < 0, second + (address - n_first) * D, last + offset)
    return tl.where(address < n_first, first + address * D, source)  # one load instead of three masked ones


@triton.jit
def copy_rows(out, token, live, source, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy a tile of tokens from the pointers in `source` to `out[token]`, `[n, D]`."""
    column = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (column < D)[None, :]
    data = tl.load(source[:, None] + column[None, :], mask=mask)
    tl.store(out + token[:, None] * D + column[None, :], data, mask=mask)


@triton.jit(
    do_not_specialize=[*COUNTS, "key_heads", "key_capacity", "value_heads", "value_capacity"],
    do_not_specialize_on_alignment=["index"],  # index is a slice of another tensor
)
def _gather_tiers_kernel(
    keys_out,
    values_out,
    positions_out,
    misses_out,
    address,
    index,
    positions,
    misses,
    first_keys,
    second_keys,
    last_keys,
    key_heads,
    key_capacity,
    key_stride_b,
    key_stride_h,
    key_stride_c,
    first_values,
    second_values,
    last_values,
    value_heads,
    value_capacity,
    value_stride_b,
    value_stride_h,
    value_stride_c,
    n,
    n_first,
    n_second,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KEYS_FLAT: tl.constexpr,
    VALUES_FLAT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = token < n
    merged = tl.load(index + token, mask=live, other=0)
    where = tl.load(address + merged, mask=live, other=0)
    tl.store(positions_out + token, tl.load(positions + merged, mask=live), mask=live)
    tl.store(misses_out + token, tl.load(misses + merged, mask=live), mask=live)
    key_source = rows_at(
        where, first_keys, second_keys, last_keys,
        key_heads, key_capacity, key_stride_b, key_stride_h, key_stride_c,
        n_first, n_second, D, KEYS_FLAT,
    )  # fmt: skip
    copy_rows(keys_out, token, live, key_source, D, BLOCK_D)
    value_source = rows_at(
        where, first_values, second_values, last_values,
        value_heads, value_capacity, value_stride_b, value_stride_h, value_stride_c,
        n_first, n_second, DV, VALUES_FLAT,
    )  # fmt: skip
    copy_rows(values_out, token, live, value_source, DV, BLOCK_DV)


@triton.jit(do_not_specialize=[*COUNTS, "heads", "capacity"], do_not_specialize_on_alignment=["address"])
def _gather_keys_kernel(
    out,
    address,
    first,
    second,
    last,
    heads,
    capacity,
    stride_b,
    stride_h,
    stride_c,
    n,
    n_first,
    n_second,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLAT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = token < n
    where = tl.load(address + token, mask=live, other=0)
    source = rows_at(
        where, first, second, last, heads, capacity, stride_b, stride_h, stride_c, n_first, n_second, D, FLAT
    )
    copy_rows(out, token, live, source, D, BLOCK_D)


def three_buffers(sources: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int]]:
    """Return exactly three buffers, the last `[B, H, C, D]`, and the token counts of the first two."""
    *flat, last = sources
    last = last if last.dim() == 4 else last[None, None]
    if len(flat) > 2 or any(source.dim() != 2 or not source.is_contiguous() for source in flat):
        shapes = [tuple(source.shape) for source in sources]
        raise ValueError(
            f"sources of shapes {shapes} are not understood: at most three, contiguous [n, D], of which the last may "
            "be [B, H, C, D] with any strides; make the others contiguous"
        )
    if last.shape[-1] > 1 and last.stride(-1) != 1:
        raise ValueError(f"the last source has strides {last.stride()}: its last dimension must be contiguous")
    if any(source.dtype != last.dtype or source.shape[-1] != last.shape[-1] for source in flat):
        kinds = [(source.dtype, source.shape[-1]) for source in sources]
        raise ValueError(f"sources must agree in dtype and in their last dimension, got {kinds}")
    first, second = [*flat, last, last][:2]
    n_first, n_second = [*(source.shape[0] for source in flat), 0, 0][:2]
    return (first, second, last), (n_first, n_second)


def padded_width(width: int) -> int:
    """Return the columns of a tile; values may have none."""
    return next_power_of_2(max(width, 1))


def _tile(*buffers: Tensor) -> int:
    """Return the tokens that one program copies."""
    row = max(padded_width(buffer.shape[-1]) * buffer.element_size() for buffer in buffers)
    return min(max(TILE_BYTES // row, 1), MAX_TILE_TOKENS)


def gather_tiers(
    sources: Sequence[tuple[Tensor, Tensor]],
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gather tokens with their positions and misses, in one launch.

    Args:
        sources: up to three pairs of keys `[n_i, D]` and values `[n_i, Dv]`, contiguous. The last may be `[B, H, C, D]`
            and `[B, H, C, Dv]`, any strides except the last; slot c of row b * H + h is its token (b * H + h) * C + c.
        address: int64 `[N]`, index of each token in the sources' concatenation.
        index: int64 `[n]`, which of the N tokens to take, in this order; may repeat and skip tokens.
        positions: int32 `[N]`. misses: uint8 `[N]`.

    Returns:
        Keys `[n, D]`, values `[n, Dv]`, positions `[n]` and misses `[n]`.
    """
    keys, (n_first, n_second) = three_buffers([keys for keys, _ in sources])
    values, _ = three_buffers([values for _, values in sources])
    n, dim, value_dim = index.shape[0], keys[-1].shape[-1], values[-1].shape[-1]
    outs = (
        keys[-1].new_empty(n, dim),
        values[-1].new_empty(n, value_dim),
        positions.new_empty(n),
        misses.new_empty(n),
    )
    if n:
        tile = _tile(keys[-1], values[-1])
        _gather_tiers_kernel[(cdiv(n, tile),)](
            *outs,
            address,
            index,
            positions,
            misses,
            *keys,
            *keys[-1].shape[1:3],
            *keys[-1].stride()[:3],
            *values,
            *values[-1].shape[1:3],
            *values[-1].stride()[:3],
            n,
            n_first,
            n_second,
            D=dim,
            DV=value_dim,
            BLOCK=tile,
            BLOCK_D=padded_width(dim),
            BLOCK_DV=padded_width(value_dim),
            KEYS_FLAT=keys[-1].is_contiguous(),
            VALUES_FLAT=values[-1].is_contiguous(),
            num_warps=4,
        )
    return outs


def gather_keys(sources: Sequence[Tensor], address: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Gather tokens from buffers of one kind, keys or values.

    Args:
        sources: the keys or the values, as in `gather_tiers`. address: int64 `[n]`, index into their concatenation.
        out: contiguous buffer to write to; None allocates it.

    Returns:
        `[n, D]`.
    """
    buffers, (n_first, n_second) = three_buffers(sources)
    n, dim = address.shape[0], buffers[-1].shape[-1]
    shape, dtype = (n, dim), buffers[-1].dtype
    if out is None:
        out = buffers[-1].new_empty(shape)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        given = f"{out.dtype} {tuple(out.shape)} with strides {out.stride()}"
        raise ValueError(f"out is {given}: it must be {dtype} {shape} and contiguous")
    if n:
        tile = _tile(buffers[-1])
        _gather_keys_kernel[(cdiv(n, tile),)](
            out,
            address,
            *buffers,
            *buffers[-1].shape[1:3],
            *buffers[-1].stride()[:3],
            n,
            n_first,
            n_second,
            D=dim,
            BLOCK=tile,
            BLOCK_D=padded_width(dim),
            FLAT=buffers[-1].is_contiguous(),
            num_warps=4,
        )
    return out

"""Quantise keys and values to a few bits per coordinate, and read them."""

from collections.abc import Sequence

from torch import Tensor

from hardkv.kernels.backends import current, kernels_for
from hardkv.kernels.codes.coding import Coding
from hardkv.kernels.codes.gather_reference import (
    compact_codes_reference,
    gather_codes_reference,
    gather_states_reference,
)
from hardkv.kernels.codes.reference import code_width, decode, encode
from hardkv.kernels.rows import Rows

__all__ = ["BITS", "Coding", "code_width", "compact_codes", "decode", "encode", "gather_codes", "gather_states"]

# Bits per coordinate that states can have; 16 stands for states that are not quantised.
BITS = (16, 8, 4, 3, 2)


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
    """Gather chosen tokens of two quantised tiers and a dense tier. Codes move as they are; states are quantised.

    On a GPU with Triton, this is one launch, and the host waits for nothing.

    Args:
        sources: keys and values of three tiers: codes, uint8 `[n_i, W]`, of two, and then states `[B, H, C, D]` and
            `[B, H, C, Dv]` in the dense tier. With 16 bits, all of them are states.
        scales: float16 `[n_i, 2]`, of the keys and values of the first two tiers.
        centres: of keys `[B * H, D]` and values `[B * H, Dv]`, subtracted from states.
        bits: of keys and values: 8, 4, 3 or 2, for dims that are multiples of 8; or 16, which copies states.
        address: int64 `[N]`, index of each token in the first two tiers and then the dense slots: slot c of row
            b * H + h is (b * H + h) * C + c.
        index: int64 `[n]`, which of the N tokens to take, in this order.
        positions: int32 `[N]`. misses: uint8 `[N]`.

    Returns:
        Keys `[n, W]`, values `[n, Wv]`, positions `[n]`, misses `[n]` and scales float16 `[n, 2]`, 0 with 16 bits: new,
        exactly sized buffers.
    """
    chosen = address, index, positions, misses
    states = sources[-1][0]
    if kernels_for(states.device, states.dtype) == "triton":
        from hardkv.kernels.codes import triton as kernel

        with current(address):
            return kernel.gather_codes(sources, scales, centres, bits, *chosen)
    return gather_codes_reference(sources, scales, centres, bits, *chosen)


def compact_codes(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    dense: tuple[Tensor, Tensor],
    centres: tuple[Tensor, Tensor],
    bits: tuple[int, int],
    cu_seqlens: Tensor,
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> None:
    """Rewrite ragged rows of codes in place with chosen tokens of their own and of the dense tier, as `compact` does.

    A row's own codes move as they are; tokens of the dense tier are quantised. Row lengths do not change.

    Args:
        tokens: of the rows, contiguous: keys `[n, W]` and values `[n, Wv]`, codes or, with 16 bits, states; int32
            positions `[n]`; uint8 misses `[n]`; float16 scales `[n, 2]`.
        dense: keys `[B, H, C, D]` and values `[B, H, C, Dv]` of the newest tokens, in separate memory.
        centres, bits: as in `gather_codes`.
        cu_seqlens: int32 `[R + 1]`, the same before and after.
        address: int64 `[N]`, index of every token in the rows and then the dense slots, as in `gather_codes`.
        index: int64 `[n]`, which of the N tokens to take; a row's own tokens must ascend, so that none is
            stored before its new place.
        positions: int32 `[N]`. misses: uint8 `[N]`.
    """
    if kernels_for(dense[0].device, dense[0].dtype) == "triton":
        from hardkv.kernels.codes import triton_in_place as kernel

        with current(address):
            kernel.compact_codes(tokens, dense, centres, bits, cu_seqlens, address, index, positions, misses)
    else:
        compact_codes_reference(tokens, dense, centres, bits, address, index, positions, misses)


def gather_states(
    sources: Sequence[Tensor],
    scales: Sequence[Tensor],
    centre: Tensor,
    kind: int,
    bits: int,
    address: Tensor,
    rows: Rows,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Gather the keys or the values of tokens of two quantised tiers and a dense tier, decoded.

    On a GPU with Triton, this is one launch, which reads codes and writes states.

    Args:
        sources: of three tiers: codes, uint8 `[n_i, W]`, of two, and then states `[B, H, C, D]` in the dense tier.
        scales: float16 `[n_i, 2]`, of the keys and values of the first two tiers.
        centre: `[R, D]`, added to what the codes of a row stand for.
        kind: 0 for keys, 1 for values. bits: of the codes: 8, 4, 3 or 2.
        address: int64 `[N]`, index of each token in the first two tiers and then the dense slots, as in `gather_codes`.
        rows: of these N tokens; row b * H + h is of head h of sequence b.
        out: `[N, D]`, contiguous, written to; None allocates it.

    Returns:
        `[N, D]`, in the dense tier's dtype.
    """
    dense = sources[-1]
    if out is None:
        out = dense.new_empty(address.shape[0], dense.shape[-1])
    if kernels_for(dense.device, dense.dtype) == "triton":
        from hardkv.kernels.codes import triton_decode as kernel

        with current(address):
            kernel.gather_states(sources, scales, centre, kind, bits, address, rows, out)
    else:
        gather_states_reference(sources, scales, centre, kind, bits, address, rows, out)
    return out

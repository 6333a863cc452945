"""Ragged gather: tokens picked from several buffers, written to one contiguous buffer."""

from collections.abc import Sequence

from torch import Tensor

from hardkv.kernels.backends import current, kernels_for
from hardkv.kernels.compaction.reference import (
    compact_reference,
    gather_tiers_reference,
    gather_tokens_reference,
)


def gather_tokens(sources: Sequence[Tensor], address: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Collect tokens by address over the concatenation of several buffers.

    Args:
        sources: up to three buffers `[n_i, D]` of one dtype, contiguous; the last may be `[B, H, C, D]` with any
            strides but the last: slot c of row b * H + h is its token (b * H + h) * C + c.
        address: int64 `[N]`, into their concatenation.
        out: `[N, D]`, contiguous, to write to; made when None.

    Returns:
        `[N, D]`.
    """
    if kernels_for(sources[-1].device, sources[-1].dtype) == "triton":
        from hardkv.kernels.compaction import triton as kernel

        with current(address):
            return kernel.gather_keys(sources, address, out=out)
    return gather_tokens_reference(sources, address, out)


def gather_tiers(
    sources: Sequence[tuple[Tensor, Tensor]], address: Tensor, index: Tensor, positions: Tensor, misses: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Collect chosen tokens of several tiers and what is known of them.

    Args:
        sources: keys and values of each tier, as in `gather_tokens`. address: int64 `[N]`, of all tokens.
        index: int64 `[n]`, which of the N to take, in that order.
        positions: int32 `[N]`. misses: uint8 `[N]`.

    Returns:
        Keys `[n, D]`, values `[n, Dv]`, positions `[n]` and misses `[n]`: new, exactly sized buffers.
    """
    first = sources[-1][0]
    if kernels_for(first.device, first.dtype) == "triton":
        from hardkv.kernels.compaction import triton as kernel

        with current(address):
            return kernel.gather_tiers(sources, address, index, positions, misses)
    return gather_tiers_reference(sources, address, index, positions, misses)


def compact(
    tokens: Sequence[Tensor],
    dense: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> None:
    """Ragged rows that keep their lengths, of their own tokens and the dense tier's: written over themselves.

    Args:
        tokens: keys `[n, D]`, values `[n, Dv]`, int32 positions `[n]` and uint8 misses `[n]` of the rows, contiguous.
        dense: keys `[B, H, C, D]` and values `[B, H, C, Dv]` of the newest tokens, other memory.
        cu_seqlens: int32 `[R + 1]`, before and after.
        address: int64 `[N]`, of all tokens over the rows' and the dense slots', as in `gather_tokens`.
        index: int64 `[n]`, which of the N to take; in every row the places of its own tokens ascend, so that none lies
            before its new one.
        positions: int32 `[N]`. misses: uint8 `[N]`.
    """
    if kernels_for(tokens[0].device, tokens[0].dtype) == "triton":
        from hardkv.kernels.compaction import triton_in_place as kernel

        with current(address):
            kernel.compact(tokens, dense, cu_seqlens, address, index, positions, misses)
    else:
        compact_reference(tokens, dense, address, index, positions, misses)

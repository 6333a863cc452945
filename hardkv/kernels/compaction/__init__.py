"""Gather chosen tokens from several buffers into one contiguous buffer."""

from collections.abc import Sequence

from torch import Tensor

from hardkv.kernels.backends import current, kernels_for
from hardkv.kernels.compaction.reference import (
    compact_reference,
    gather_tiers_reference,
    gather_tokens_reference,
)


def gather_tokens(sources: Sequence[Tensor], address: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Gather tokens by their address in the concatenation of several buffers.

    Args:
        sources: up to three contiguous buffers `[n_i, D]` of one dtype; the last may be `[B, H, C, D]` with any
            strides except the last; slot c of row b * H + h is its token (b * H + h) * C + c.
        address: int64 `[N]`, index into their concatenation.
        out: `[N, D]`, contiguous, written to; None allocates it.

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
    """Gather chosen tokens of several tiers, with their positions and misses.

    Args:
        sources: keys and values of each tier, as in `gather_tokens`. address: int64 `[N]`, address of every token.
        index: int64 `[n]`, which of the N tokens to take, in this order.
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
    """Rewrite ragged rows in place with chosen tokens of their own and of the dense tier; row lengths do not change.

    Args:
        tokens: keys `[n, D]`, values `[n, Dv]`, int32 positions `[n]` and uint8 misses `[n]` of the rows; contiguous.
        dense: keys `[B, H, C, D]` and values `[B, H, C, Dv]` of the newest tokens, in separate memory.
        cu_seqlens: int32 `[R + 1]`, the same before and after.
        address: int64 `[N]`, address of every token in the rows and then the dense slots, as in `gather_tokens`.
        index: int64 `[n]`, which of the N tokens to take; a row's own tokens must ascend, so that none is
            stored before its new place.
        positions: int32 `[N]`. misses: uint8 `[N]`.
    """
    if kernels_for(tokens[0].device, tokens[0].dtype) == "triton":
        from hardkv.kernels.compaction import triton_in_place as kernel

        with current(address):
            kernel.compact(tokens, dense, cu_seqlens, address, index, positions, misses)
    else:
        compact_reference(tokens, dense, address, index, positions, misses)

"""Ragged gather: tokens picked from several buffers, written to one contiguous buffer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hardkv.kernels.backends import current, kernels_for


def gather_tokens(sources: Sequence[Tensor], address: Tensor) -> Tensor:
    """Collect tokens by address over the concatenation of several buffers.

    Args:
        sources: up to three buffers `[n_i, D]` of one dtype, contiguous; the last may be `[B, H, C, D]` with any
            strides but the last: slot c of row b * H + h is its token (b * H + h) * C + c.
        address: int64 `[N]`, into their concatenation.

    Returns:
        A new, exactly sized buffer `[N, D]`.
    """
    if kernels_for(sources[-1].device, sources[-1].dtype) == "triton":
        from hardkv.kernels.triton import compaction as kernel
        from hardkv.kernels.triton import ops

        run = ops.gather_tokens if torch.compiler.is_compiling() else kernel.gather_keys
        with current(address):
            return run(list(sources), address)
    flat = [source.flatten(0, 2) if source.dim() == 4 else source for source in sources]
    filled = [source for source in flat if source.shape[0]]
    if len(filled) == 1:
        return filled[0].index_select(0, address)
    return torch.cat(flat).index_select(0, address)


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
        from hardkv.kernels.triton import compaction as kernel
        from hardkv.kernels.triton import ops

        with current(address):
            if torch.compiler.is_compiling():
                tiers = [keys for keys, _ in sources], [values for _, values in sources]
                return ops.gather_tiers(*tiers, address, index, positions, misses)
            return kernel.gather_tiers(sources, address, index, positions, misses)
    chosen = address[index]
    keys = gather_tokens([keys for keys, _ in sources], chosen)
    values = gather_tokens([values for _, values in sources], chosen)
    return keys, values, positions[index], misses[index]

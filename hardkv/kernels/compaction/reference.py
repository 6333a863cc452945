"""The PyTorch references of `gather_tokens`, `gather_tiers` and `compact`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_tokens_reference(sources: Sequence[Tensor], address: Tensor, out: Tensor | None = None) -> Tensor:
    """The PyTorch reference of `gather_tokens`."""
    flat = [source.flatten(0, 2) if source.dim() == 4 else source for source in sources]
    filled = [source for source in flat if source.shape[0]]
    source = filled[0] if len(filled) == 1 else torch.cat(flat)
    return torch.index_select(source, 0, address, out=out)


def gather_tiers_reference(
    sources: Sequence[tuple[Tensor, Tensor]], address: Tensor, index: Tensor, positions: Tensor, misses: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch reference of `gather_tiers`."""
    chosen = address[index]
    keys = gather_tokens_reference([keys for keys, _ in sources], chosen)
    values = gather_tokens_reference([values for _, values in sources], chosen)
    return keys, values, positions[index], misses[index]


def compact_reference(
    tokens: Sequence[Tensor],
    dense: tuple[Tensor, Tensor],
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> None:
    """The PyTorch reference of `compact`; it gathers before it writes, so it does not use the row boundaries."""
    sources = [(tokens[0], tokens[1]), dense]
    for held, new in zip(tokens, gather_tiers_reference(sources, address, index, positions, misses), strict=True):
        held.copy_(new)

"""Ragged gather: tokens picked from several buffers, written to one contiguous buffer."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_tokens(sources: Sequence[Tensor], address: Tensor) -> Tensor:
    """Collect tokens by address over the concatenation of several buffers.

    Args:
        sources: buffers `[n_i, ...]` of one dtype. address: int64 `[N]`, into their concatenation.

    Returns:
        A new, exactly sized buffer `[N, ...]`.
    """
    filled = [source for source in sources if source.shape[0]]
    if len(filled) == 1:
        return filled[0].index_select(0, address)
    return torch.cat(list(sources)).index_select(0, address)

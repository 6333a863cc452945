"""Select tokens of ragged rows: sort within rows, and count each head's share of a sequence's best tokens.

At ties the newer position wins, then the lower head, so that every backend keeps the same tokens.
"""

import torch
from torch import Tensor

from hardkv.kernels.rows import padded_index


def sort_rows(values: Tensor, eligible: Tensor, cu_seqlens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Sort the eligible tokens of each row by value, largest first, newer first among equals.

    Args:
        values: `[N]`; eligible: bool `[N]`; cu_seqlens: int32 `[R + 1]`; rows ascend in position.
        width: at least the length of the longest row.

    Returns:
        `(sorted_values [R, width], token [R, width])`, with -inf and unspecified tokens after the eligible ones.
    """
    index, valid = padded_index(cu_seqlens[:-1], cu_seqlens.diff(), width)
    if not values.shape[0]:
        return values.new_full(index.shape, -torch.inf), index
    padded = torch.where(valid & eligible[index], values[index], -torch.inf)
    # put the newest first; the stable sort keeps this order among equal values
    newest_first = torch.sort(padded.flip(1), dim=1, descending=True, stable=True)
    return newest_first.values, index.flip(1).gather(1, newest_first.indices)


def keep_best(token: Tensor, counts: Tensor, total: int) -> Tensor:
    """Return bool `[N]`: True for the first `counts [R]` tokens of every sorted row `token [R, width]`."""
    chosen = torch.arange(token.shape[1], device=token.device) < counts[:, None]
    keep = torch.zeros(total + 1, dtype=torch.bool, device=token.device)
    # unchosen slots may repeat token 0, so they write to an extra place
    keep.scatter_(0, torch.where(chosen, token, total).flatten(), True)
    return keep[:total]


def share_of_best(values: Tensor, positions: Tensor, total: Tensor) -> Tensor:
    """Count how many of a sequence's `total` largest values each head holds.

    Args:
        values: `[B, H, n]`, -inf where there is no token. positions: int `[B, H, n]`, for ties.
        total: int64 `[B]`.

    Returns:
        Counts, int64 `[B, H]`, summing to `min(total, finite values)`.
    """
    batch, num_heads, width = values.shape
    flat, age = values.flatten(1), positions.flatten(1)
    newest = torch.argsort(age, dim=1, descending=True, stable=True)  # equal positions keep the head order
    best = newest.gather(1, torch.argsort(flat.gather(1, newest), dim=1, descending=True, stable=True))
    rank = torch.arange(num_heads * width, device=values.device)
    taken = (rank < total[:, None]) & (flat.gather(1, best) > -torch.inf)
    counts = torch.zeros(batch, num_heads, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(1, best // width, taken.long())

"""The PyTorch reference of `mean_cosine`."""

import torch
from torch import Tensor

from hardkv.kernels.dtypes import accumulation_dtype
from hardkv.kernels.rows import Rows

# How far from a row's end to look for near-duplicates. Rows of at most this many tokens are compared completely, like
# those of the default budget at an event. For longer rows, an unlimited search keeps the same tokens (eval.reach,
# docs/methods.md), but the limit makes the work grow with the length, not with its square.
REACH = 1536
# Cosines per tile, on a CPU (where they should stay in its cache) and on other devices; fewer where
# the keys themselves are few.
CPU_COSINES, MAX_COSINES = 1 << 19, 1 << 24
# Newest tokens to compare a long row with first, because most tokens find their last match there; the rest is then
# compared with this many at a time.
BLOCK, WIDE = 64, 512


def mean_cosine_reference(keys: Tensor, rows: Rows, threshold: float, eps: float, reach: int) -> Tensor:
    """The PyTorch reference of `mean_cosine`; temporaries need at most the memory of the keys, or of one row."""
    dtype = accumulation_dtype(keys.dtype)
    redundancy = torch.zeros(keys.shape[0], dtype=dtype, device=keys.device)
    cosines = max(1, min(CPU_COSINES if keys.device.type == "cpu" else MAX_COSINES, keys.numel() // 4))
    # all cosines of the rows in one bucket fit in one tile
    together = min(keys.shape[0] // 4, cosines // max(1, min(reach, rows.longest)))
    for bucket in rows.buckets_of(together):
        index, valid = bucket.index()
        unit = keys[index].to(dtype)
        unit /= torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(eps)  # [r, n, D]
        unit.masked_fill_(~valid[..., None], 0.0)  # do not multiply: 0 * NaN is NaN
        column = torch.bmm(unit, unit.sum(1)[..., None])[..., 0]  # [r, n]
        column -= torch.linalg.vector_norm(unit, dim=-1).square()
        _spare(column, unit, bucket.lengths, threshold, reach, cosines)
        redundancy[index[valid]] = (column / bucket.lengths[:, None])[valid]
    return redundancy


def _spare(column: Tensor, unit: Tensor, lengths: Tensor, threshold: float, reach: int, cosines: int) -> None:
    """Subtract from the column sums, `[r, n]`, every token's cosine to its last near-duplicate.

    Args:
        unit: `[r, n, D]`, 0 after a row's end. lengths: int64 `[r]`; a single row has length n.
        cosines: maximum per tile, but at least those of one token; the cosines of several rows must fit in one tile.
    """
    count, width, dim = unit.shape
    near = min(reach, width)
    end = lengths[:, None] - 1
    back = end - torch.arange(near, device=unit.device)  # [r, near], newest first; negative before a row's start
    recent = unit.gather(1, back.clamp_min(0)[..., None].expand(-1, -1, dim))
    place = torch.arange(near, dtype=torch.int32, device=unit.device)
    left = torch.arange(width, device=unit.device)  # tokens of a single row without a match so far
    begin, block = 0, near if count > 1 else BLOCK
    while begin < near and left.numel():
        size = min(max(block, cosines // left.numel()), near - begin)  # larger when fewer tokens are left
        rest = []
        for slot in left.split(width if count > 1 else max(1, cosines // size)):
            own = unit if slot.numel() == width else unit[:, slot]
            cosine = torch.bmm(own, recent[:, begin : begin + size].mT)  # [r, t, size]
            itself = end - slot - begin  # [r, t], where a token is compared with itself
            elsewhere, at = (itself < 0) | (itself >= size), itself.clamp(0, size - 1)[..., None]
            cosine.scatter_(2, at, cosine.gather(2, at).masked_fill(~elsewhere[..., None], -torch.inf))
            found = cosine.amax(-1) > threshold  # [r, t]
            matched = cosine[found]  # [m, size]
            newest = torch.where(matched > threshold, place[:size], size).amin(-1).long()
            row = found.nonzero()[:, 0]
            last = back[row, begin + newest]
            spared = matched.gather(1, newest[:, None])[:, 0].masked_fill(last < 0, 0.0)
            column.index_put_((row, last.clamp_min(0)), -spared, accumulate=True)
            rest.append(slot[~found[0]])
        left, begin, block = torch.cat(rest), begin + size, WIDE

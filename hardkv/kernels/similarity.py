"""Redundancy of keys within a row (R-KV): mean cosine to the other keys, the newest near-duplicate spared."""

import torch
from torch import Tensor

from hardkv.kernels.attention import accumulation_dtype
from hardkv.kernels.backends import current, kernels_for
from hardkv.kernels.rows import Rows

# Cosines that one tile of the reference holds at a time (float32: 128 MB).
MAX_COSINES = 1 << 25


def mean_cosine(keys: Tensor, rows: Rows, *, threshold: float = 0.5, eps: float = 1e-8) -> Tensor:
    """Mean over the row's tokens i of `cos(key_i, key_j)` for every token j, without the `n x n` matrix.

    The diagonal counts 0, and for every i the last j whose cosine exceeds `threshold` counts 0, so that the newest of
    near-duplicates is not blamed (R-KV, arXiv 2505.24133). The column sum over i of unit vectors is
    `n_j . sum_i n_i - |n_j|^2`; only the search for the last match needs cosines, and it runs by tiles.

    Args:
        keys: `[N, D]`. rows: their rows.
        threshold: cosine above which two keys are near-duplicates. eps: lower bound on a key's norm.

    Returns:
        `[N]` in the accumulation dtype.
    """
    if kernels_for(keys.device, keys.dtype, keys.shape[1]) == "triton":
        from hardkv.kernels.triton import similarity as kernel

        with current(keys):
            return kernel.mean_cosine(keys, rows.cu_seqlens, rows.longest, threshold=threshold, eps=eps)
    return mean_cosine_reference(keys, rows, threshold, eps)


def mean_cosine_reference(keys: Tensor, rows: Rows, threshold: float, eps: float) -> Tensor:
    """The PyTorch reference of `mean_cosine`."""
    dtype = accumulation_dtype(keys.dtype)
    redundancy = torch.zeros(keys.shape[0], dtype=dtype, device=keys.device)
    for bucket in rows.buckets:
        index, valid = bucket.index()
        unit = keys[index].to(dtype)
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(eps)  # [r, n, D]
        unit = unit.masked_fill(~valid[..., None], 0.0)  # not a product: 0 * NaN is NaN
        column = (unit * unit.sum(1, keepdim=True)).sum(-1) - unit.square().sum(-1)  # [r, n]
        slot = torch.arange(bucket.width, device=keys.device)
        tile = max(1, MAX_COSINES // (bucket.rows.shape[0] * bucket.width))
        for first in range(0, bucket.width, tile):
            part = slot[first : first + tile]
            cosine = torch.einsum("rtd,rnd->rtn", unit[:, part], unit)
            match = (cosine > threshold) & (part[:, None] != slot)
            last = torch.where(match, slot, -1).amax(-1)  # [r, t], -1 where nothing is similar
            spared = cosine.gather(2, last.clamp_min(0)[..., None])[..., 0] * (last >= 0)
            column.scatter_add_(1, last.clamp_min(0), -spared)
        redundancy[index[valid]] = (column / bucket.lengths[:, None])[valid]
    return redundancy

"""Measure the redundancy of keys within a row (R-KV): mean cosine to the other keys, sparing the newest duplicate."""

from torch import Tensor

from hardkv.kernels.autocast import suspended
from hardkv.kernels.backends import current, kernels_for
from hardkv.kernels.rows import Rows
from hardkv.kernels.similarity.reference import REACH, mean_cosine_reference


def mean_cosine(keys: Tensor, rows: Rows, *, threshold: float = 0.5, eps: float = 1e-8, reach: int = REACH) -> Tensor:
    """Return for every token j the mean of `cos(key_i, key_j)` over the row's tokens i, without the `n x n` matrix.

    The diagonal counts as 0. For every i, the last j with a cosine above `threshold` counts as 0, so that the newest of
    near-duplicates is not penalised (R-KV, arXiv 2505.24133), if that j is among the row's newest `reach` tokens. The
    column sum over i of unit vectors is `n_j . sum_i n_i - |n_j|^2`; only the search for the last match needs cosines,
    which runs in tiles from the row's end until every token has its match.

    Args:
        keys: `[N, D]`. rows: rows of the keys.
        threshold: cosine above which two keys are near-duplicates. eps: lower bound on a key's norm.
        reach: tokens at a row's end among which near-duplicates are spared, at least 1.

    Returns:
        `[N]` in the accumulation dtype.
    """
    if kernels_for(keys.device, keys.dtype, keys.shape[1]) == "triton":
        from hardkv.kernels.similarity import triton as kernel

        with current(keys):
            bounds = rows.cu_seqlens, rows.longest
            return kernel.mean_cosine(keys, *bounds, threshold=threshold, eps=eps, reach=reach)
    with suspended(keys.device):
        return mean_cosine_reference(keys, rows, threshold, eps, reach)

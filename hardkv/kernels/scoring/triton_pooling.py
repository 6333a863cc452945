"""Smooth scores along the rows: mean or maximum over every token's neighbours."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardkv.kernels.scoring.triton import chunk_of


@triton.jit
def _pool(
    out,
    score,
    exclude,
    cu_seqlens,
    num_rows,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    AVERAGE: tl.constexpr,
):
    """Compute the mean or maximum over the neighbours of every token in one block of a row."""
    _, start, end, first = chunk_of(tl.program_id(0), cu_seqlens, num_rows, BLOCK)
    if first >= end:
        return
    token = first + tl.arange(0, BLOCK)
    pooled = tl.zeros([BLOCK], tl.float32)
    for shift in range(-(SIZE // 2), SIZE // 2 + 1):
        near = token + shift
        inside = (near >= start) & (near < end)
        value = tl.load(score + near, mask=inside, other=0.0)
        value = tl.where(tl.load(exclude + near, mask=inside, other=1) != 0, 0.0, value)
        pooled = pooled + value if AVERAGE else tl.maximum(pooled, value)
    if AVERAGE:
        pooled = pooled / SIZE
    mask = token < end
    pooled = tl.where(tl.load(exclude + token, mask=mask, other=1) != 0, 0.0, pooled)
    tl.store(out + token, pooled, mask=mask)


def pool_rows(
    score: Tensor,
    exclude: Tensor,
    cu_seqlens: Tensor,
    *,
    kernel_size: int,
    pooling: str,
) -> Tensor:
    """Smooth scores along each row over the tokens not excluded: `hardkv.kernels.scoring.pool_rows` on a GPU.

    Args:
        score: float32 `[N]`, >= 0. exclude: bool `[N]`, the last tokens of their rows. cu_seqlens: int32 `[R + 1]`.
        kernel_size: odd. pooling: "max" or "avg" (zeros beyond the ends of the row count).

    Returns:
        `[N]`, float32; 0 at excluded tokens.
    """
    out = torch.empty_like(score)
    if score.shape[0]:
        block = 512
        num_rows = cu_seqlens.shape[0] - 1
        _pool[(num_rows + score.shape[0] // block,)](
            out,
            score.contiguous(),
            exclude.contiguous().view(torch.uint8),
            cu_seqlens,
            num_rows,
            BLOCK=block,
            SIZE=kernel_size,
            AVERAGE=pooling == "avg",
        )
    return out

"""The PyTorch references of `window_attention` and `pool_rows`."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hardkv.kernels.dtypes import accumulation_dtype
from hardkv.kernels.rows import Rows, padded_index

Reduce = Literal["mean", "max", "max_logits", "mean_square"]


def window_attention_reference(
    queries: Tensor,
    query_positions: Tensor,
    query_valid: Tensor,
    keys: Tensor,
    positions: Tensor,
    rows: Rows,
    num_kv_heads: int,
    scale: float,
    softcap: float | None,
    reduce: Reduce,
    exclude: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """The PyTorch reference of `window_attention`."""
    dtype = accumulation_dtype(queries.dtype)
    batch, num_heads, window, head_dim = queries.shape
    group = num_heads // num_kv_heads
    grouped = queries.reshape(batch * num_kv_heads, group, window, head_dim)  # [R, G, W, D]
    received = torch.zeros(keys.shape[0], dtype=dtype, device=keys.device)
    for bucket in rows.buckets_of(keys.shape[0] // 4):
        index, valid = bucket.index()
        key, position = keys[index].to(dtype), positions[index][:, None]
        counted = query_valid[bucket.rows // num_kv_heads]  # [r, W]
        share = torch.zeros(1, dtype=dtype, device=keys.device)
        # process this many queries at a time, so that the logits are no larger than the keys of all rows
        block = max(1, keys.numel() // (4 * group * index.numel()))
        for first in range(0, window, block):
            part = slice(first, first + block)
            visible = valid[:, None] & (position <= query_positions[part, None]) & counted[:, part, None]
            if exclude is not None:
                visible &= ~exclude[index][:, None]  # [r, W, n]
            logits = torch.einsum("rgwd,rnd->rgwn", grouped[bucket.rows, :, part].to(dtype), key).mul_(scale)
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            if reduce == "max_logits":
                logits = logits.amax(1, keepdim=True)
            logits = logits.masked_fill_(~visible[:, None], -torch.inf)
            if sinks is not None:
                row = bucket.rows % num_kv_heads
                sink = sinks.to(logits).view(num_kv_heads, -1, 1, 1)[row].expand(*logits.shape[:-1], 1)
                logits = torch.cat([logits, sink], -1)
            # a query that sees nothing has an all -inf row: its softmax is NaN and counts as 0
            probability = torch.softmax(logits, -1).nan_to_num_(0.0)
            if sinks is not None:
                probability = probability[..., :-1]
            if reduce == "mean_square":
                probability = probability.square()
            share = share + probability.sum(2)  # [r, G or 1, n]
        share = share / counted.sum(-1).clamp_min(1)[:, None, None]
        received[index[valid]] = (share.amax(1) if reduce == "max" else share.mean(1))[valid]
    return received


def pool_rows_reference(score: Tensor, exclude: Tensor, rows: Rows, kernel_size: int, pooling: str) -> Tensor:
    """The PyTorch reference of `pool_rows`."""
    if rows.longest == 0:
        return score
    index, valid = padded_index(rows.cu_seqlens[:-1], rows.lengths, rows.longest)
    padded = torch.where(valid & ~exclude[index], score[index], 0.0)[:, None]  # [R, 1, n]; 0 is neutral
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    pooled = pool(padded, kernel_size, stride=1, padding=kernel_size // 2)[:, 0]
    row = rows.ids
    slot = torch.arange(score.shape[0], device=score.device) - rows.cu_seqlens[:-1].long()[row]
    return pooled[row, slot].masked_fill(exclude, 0.0)

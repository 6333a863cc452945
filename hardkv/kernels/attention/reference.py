"""The PyTorch reference of `attend_tiers` and its parts: attention over a padded block, and merging by log-sum-exp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hardkv.kernels.codes import Coding
from hardkv.kernels.dtypes import accumulation_dtype
from hardkv.kernels.rows import Rows

# Logits that one block of the reference holds at a time (256 MB in float32); keys or queries may also be this large.
MAX_LOGITS = 1 << 26


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention over one padded block, and its log-sum-exp.

    Args:
        query: `[r, G, q, D]`; key: `[r, n, D]`; value: `[r, n, Dv]`.
        allowed: bool, broadcastable to `[r, G, q, n]`; False hides a token.
        scale: factor on the dot products. softcap: `tanh(logit / softcap) * softcap` when given (Gemma 2).
        offset: `[r, G, q]`, added to every dot product of a query.

    Returns:
        `out [r, G, q, Dv]` and `lse [r, G, q]` in the accumulation dtype; a query that sees nothing gets 0 and -inf.
    """
    dtype = accumulation_dtype(query.dtype)
    # A token that no query sees may hold anything (unwritten slot, padding, another row's overflow); 0 * NaN is NaN.
    key, value = key.to(dtype), value.to(dtype).masked_fill(~allowed.any((1, 2))[..., None], 0.0)
    rows, group, q_len, _ = query.shape
    held = min(MAX_LOGITS, max(key.numel(), query.numel()))
    block = max(1, held // max(1, rows * group * key.shape[1]))
    outs, lses = [], []
    for first in range(0, q_len, block):
        part = slice(first, first + block)
        logits = torch.einsum("rgqd,rnd->rgqn", query[:, :, part].to(dtype), key)
        logits = (logits if offset is None else logits + offset[:, :, part, None].to(dtype)) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        seen = allowed if allowed.shape[-2] == 1 else allowed[..., part, :]
        logits = logits.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(logits, -1)
        weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        outs.append(torch.einsum("rgqn,rnd->rgqd", weights, value))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint token sets: each part is `(out [..., Dv], lse [...])`."""
    lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), 0)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    out = sum(part_out * torch.exp(part_lse - finite)[..., None] for part_out, part_lse in parts)
    return out, lse  # type: ignore[return-value]


def dense_allowed(positions: Tensor, fill: Tensor, start: int, q_len: int, new_mask: Tensor | None) -> Tensor:
    """Return which dense tokens each new query sees, bool `[B, q, C]`.

    Args:
        positions: int32 `[B, C]`, column of every slot. fill: `[B]`, valid slots of every batch row.
        start: column of the first new query. new_mask: bool `[B, q, q]`, mask among the new tokens; None means causal.
    """
    valid = torch.arange(positions.shape[1], device=positions.device) < fill[:, None]
    offset = positions.long() - start  # [B, C], negative for tokens older than this call
    if new_mask is None:
        among_new = offset[:, None] <= torch.arange(q_len, device=positions.device)[:, None]
    else:
        column = offset.clamp(0, q_len - 1)[:, None].expand(-1, q_len, -1)
        among_new = (offset < 0)[:, None] | new_mask.expand(positions.shape[0], -1, -1).gather(2, column)
    return valid[:, None] & among_new


def tiered_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    coding: Coding | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the PyTorch reference of `attend_tiers` on any device, with any dtype and any mask.

    Args:
        query: `[B, Hq, q, D]`, after RoPE.
        keys, values: condensed tier, `[N, D]` and `[N, Dv]`; row b * H + h holds head h of sequence b.
        rows: of the condensed tier.
        dense_keys, dense_values: `[B, H, C, D]` and `[B, H, C, Dv]`.
        dense_mask: bool `[B, q, C]`, from `dense_allowed`.
        scale: factor on the dot products. softcap: as in `attend`.
        sinks: `[Hq]`, learned logits that take part in the softmax with zero output (GPT-OSS).
        coding: how to read `keys` and `values` that are codes; None: they are states.

    Returns:
        `out [B, Hq, q, Dv]` in the query's dtype and `lse [B, Hq, q]` in the accumulation dtype.
    """
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, value_dim = dense_keys.shape[1], dense_values.shape[-1]
    group = num_heads // num_kv_heads
    queries = query.reshape(batch * num_kv_heads, group, q_len, head_dim)
    seen = dense_mask[:, None, None].expand(-1, num_kv_heads, -1, -1, -1).flatten(0, 1)  # [R, 1, q, C]
    parts = [attend(queries, dense_keys.flatten(0, 1), dense_values.flatten(0, 1), seen, scale=scale, softcap=softcap)]
    if rows.total:
        dtype = parts[0][0].dtype
        out = torch.zeros(queries.shape[0], group, q_len, value_dim, dtype=dtype, device=query.device)
        lse = torch.full(out.shape[:-1], -torch.inf, dtype=dtype, device=query.device)
        for bucket in rows.buckets:
            index, valid = bucket.index()
            asked, key, value, offset = queries[bucket.rows], keys[index], values[index], None
            if coding is not None:
                asked, offset = coding.query(asked.to(dtype), bucket.rows)
                key, value = coding.rotated(key, value, index, dtype)
            found, lse[bucket.rows] = attend(
                asked, key, value, valid[:, None, None], scale=scale, softcap=softcap, offset=offset
            )
            out[bucket.rows] = found if coding is None else coding.result(found, bucket.rows)
        parts.append((out, lse))
    if sinks is not None:
        logit = sinks.to(parts[0][1]).reshape(1, num_kv_heads, group, 1).expand(batch, -1, -1, q_len).flatten(0, 1)
        parts.append((torch.zeros_like(parts[0][0]), logit))
    out, lse = merge(parts)
    return out.reshape(batch, num_heads, q_len, value_dim).to(query.dtype), lse.reshape(batch, num_heads, q_len)

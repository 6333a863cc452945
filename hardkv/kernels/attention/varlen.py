"""Attend to both tiers with an installed package's variable-length FlashAttention; merge the results by log-sum-exp.

Every row is one sequence with one KV head and G query heads. The package is called once for the condensed rows and once
for the dense tier, whose rows have gaps after their filled slots. A gap is a separate sequence without queries, so that
the buffer is read without a copy and no length is read on the host.
"""

import torch
from torch import Tensor

from hardkv.kernels.attention.packages import PACKAGES, Package, resolve_package
from hardkv.kernels.attention.reference import attend, dense_allowed, merge


def varlen_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    *,
    bound: int,
    start: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    new_mask: Tensor | None = None,
    padded: bool = False,
    package: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to a condensed ragged tier and the dense tier; see `hardkv.kernels.attention.tiered_attention`.

    Args:
        query: `[B, Hq, q, D]`, fp16 or bf16. keys, values: `[N, D]`, `[N, Dv]`. cu_seqlens: int32 `[R + 1]`.
        longest: upper bound on the condensed rows' lengths, known on the host.
        dense_keys, dense_values: `[B, H, C, D]` and `[B, H, C, Dv]`. Contiguous buffers are read without a copy;
            the first `bound` slots are copied for other buffers, and for packages that read after a row's end.
        dense_positions: int32 `[B, C]`. fill: int `[B]`, valid slots. bound: upper bound on fill.
        start: column of the first new query. scale, softcap, sinks: as in `tiered_attention`.
        new_mask: bool `[B, q, C]` or `[B, q, bound]`, dense slots that each query sees; replaces the causal mask.
        padded: True when some of several new tokens may be padding, which is not stored. Otherwise they are the last q
            slots of every sequence, as the packages' causal mask assumes. With `padded`, and with
            `new_mask`, the PyTorch reference attends the dense tier.
        package: one of `PACKAGES`, or None for the first of `installed()` that supports the inputs.

    Returns:
        `out [B, Hq, q, Dv]` in the query's dtype and `lse [B, Hq, q]`, float32.

    Raises:
        ValueError: the package is not installed or does not support the inputs.
    """
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, value_dim = dense_keys.shape[1], dense_values.shape[-1]
    group, rows = num_heads // num_kv_heads, batch * num_kv_heads
    chosen = PACKAGES[resolve_package(package, query.dtype, head_dim, value_dim, softcap)]
    bound = min(bound, dense_keys.shape[2])

    q = query.unflatten(1, (num_kv_heads, group)).transpose(2, 3).reshape(rows * q_len, group, head_dim).contiguous()
    parts = []  # each out [R, q, G, Dv] and lse [R, q, G], float32
    if longest and keys.shape[0]:
        cu_q = _multiples(rows + 1, q_len, q)
        found = chosen.attend(
            q, keys[:, None], values[:, None], cu_q, cu_seqlens, q_len, longest, scale, False, softcap
        )
        parts.append(_where_seen(*found, group, (cu_seqlens.diff() > 0)[:, None].expand(-1, q_len)))
    if bound and (new_mask is not None or (padded and q_len > 1)):
        if new_mask is None:
            seen = dense_allowed(dense_positions[:, :bound], fill, start, q_len, None)
        else:
            seen = new_mask[..., :bound] & (torch.arange(bound, device=fill.device) < fill[:, None])[:, None]
        out, lse = attend(
            query.reshape(rows, group, q_len, head_dim),
            dense_keys[:, :, :bound].flatten(0, 1),
            dense_values[:, :, :bound].flatten(0, 1),
            seen[:, None, None].expand(-1, num_kv_heads, -1, -1, -1).flatten(0, 1),
            scale=scale,
            softcap=softcap,
        )
        parts.append((out.transpose(1, 2), lse.transpose(1, 2)))
    elif bound:
        parts.append(_attend_dense(chosen, q, dense_keys, dense_values, fill, bound, q_len, scale, softcap))
    if not parts:
        nothing = torch.zeros(rows, q_len, group, value_dim, dtype=torch.float32, device=query.device)
        parts.append((nothing, torch.full_like(nothing[..., 0], -torch.inf)))
    if sinks is not None:
        logit = sinks.float().view(1, num_kv_heads, 1, group).expand(batch, -1, q_len, -1).flatten(0, 1)
        parts.append((torch.zeros_like(parts[0][0]), logit))
    out, lse = merge(parts)
    out = out.to(query.dtype).unflatten(0, (batch, num_kv_heads)).transpose(2, 3)
    lse = lse.unflatten(0, (batch, num_kv_heads)).transpose(2, 3)
    return out.reshape(batch, num_heads, q_len, value_dim), lse.reshape(batch, num_heads, q_len)


def _attend_dense(
    package: Package,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    fill: Tensor,
    bound: int,
    q_len: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend causally to the dense tier: `q [R * q, G, D]` and the tier as in `varlen_attention`."""
    num_kv_heads, group = keys.shape[1], q.shape[1]
    if package.whole_tiles:
        behind = torch.arange(bound, device=fill.device) >= fill[:, None]
        values = values[:, :, :bound].masked_fill(behind[:, None, :, None], 0.0).contiguous()
        keys = keys[:, :, :bound].contiguous()
    elif not (keys.is_contiguous() and values.is_contiguous()):
        keys, values = keys[:, :, :bound].contiguous(), values[:, :, :bound].contiguous()
    capacity = keys.shape[2]
    fill = fill[:, None].expand(-1, num_kv_heads).reshape(-1)  # per row, [R]
    rows = fill.shape[0]
    # A row, its gap, the next row, its gap, ...; only rows have queries.
    starts = _multiples(rows + 1, capacity, q)
    cu_k = torch.cat([torch.stack([starts[:-1], starts[:-1] + fill.to(torch.int32)], 1).flatten(), starts[-1:]])
    # A single query sees everything, so its group can be a sequence of G queries with one head. It must be, because
    # FlashAttention-2 treats a sequence of at most one query with several heads as a sequence of exactly one.
    per_row = group if q_len == 1 else q_len
    if q_len == 1:
        q = q.reshape(rows * group, 1, -1)
    cu_q = torch.arange(1, 2 * rows + 2, dtype=torch.int32, device=q.device) // 2 * per_row
    out, lse = package.attend(
        q, keys.flatten(0, 2)[:, None], values.flatten(0, 2)[:, None],
        cu_q, cu_k, per_row, capacity, scale, q_len > 1, softcap,
    )  # fmt: skip
    last_seen = fill[:, None] - torch.arange(q_len - 1, -1, -1, device=fill.device)  # [R, q], slots that a query sees
    return _where_seen(out, lse, group, last_seen > 0)


def _multiples(count: int, step: int, like: Tensor) -> Tensor:
    """Return 0, step, 2 * step, ...: int32 `[count]` on the device of `like`."""
    return torch.arange(0, count * step, step, dtype=torch.int32, device=like.device)


def _where_seen(out: Tensor, lse: Tensor, group: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return a package's `out` and `lse` as float32 `[R, q, G, Dv]` and `[R, q, G]`.

    Queries that see no token (`seen [R, q]` False) get 0 and -inf, because packages write different values for them.
    """
    out, lse = out.reshape(*seen.shape, group, -1).float(), lse.reshape(*seen.shape, group)
    return out.masked_fill(~seen[..., None, None], 0.0), lse.masked_fill(~seen[..., None], -torch.inf)

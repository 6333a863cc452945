"""The table of held tokens that an event works on: the tokens of some layers, in one row order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hardkv.cache.storage.tiers import Tiers
from hardkv.kernels.layout import layout
from hardkv.kernels.rows import Rows, cumulative


@dataclass(frozen=True)
class HeldTokens:
    """The held tokens of L layers of one shape. Rows are (l * B + b) * H + h; a row is sorted by position."""

    positions: Tensor  # int32 [N]
    misses: Tensor  # uint8 [N]
    address: Tensor  # int64 [N], index over the condensed, sparse and dense slots of the token's layer
    stays: Tensor  # bool [N], tokens that stay in the dense tier: the newest, and with codes the sinks
    window_mask: Tensor  # bool [N], the row's newest `window` tokens
    protected: Tensor  # bool [N], tokens that are kept whatever their score
    rows: Rows
    layers: list[Rows]  # rows of each layer

    @classmethod
    def of(cls, layers: Sequence[Tiers], window: int, sinks: int, pinned: int) -> "HeldTokens":
        """Build the table for the given layers; see `lay_out`."""
        found = [lay_out(tiers, window, sinks, pinned) for tiers in layers]
        tokens, rows = [tokens for tokens, _ in found], [rows for _, rows in found]
        columns = tokens[0] if len(layers) == 1 else [torch.cat(parts) for parts in zip(*tokens, strict=True)]
        positions, misses, address, stays, window_mask, protected = columns
        whole = rows[0] if len(layers) == 1 else concatenated(rows)
        return cls(positions, misses, address, stays, window_mask, protected, whole, rows)

    @property
    def totals(self) -> list[int]:
        """Tokens of each layer."""
        return [rows.total for rows in self.layers]

    def gather(self, layers: Sequence[Tiers], kind: int) -> Tensor:
        """Return keys (kind 0) or values (kind 1) of all tokens, `[N, D]`, decoded."""
        dense = layers[0].sources[-1][kind]
        out = dense.new_empty(self.rows.total, dense.shape[-1])
        parts = zip(layers, self.address.split(self.totals), self.layers, out.split(self.totals), strict=True)
        for tiers, address, rows, place in parts:
            tiers.gather(kind, address, rows, out=place)
        return out


def concatenated(rows: Sequence[Rows]) -> Rows:
    """Join the rows of several tables, one after the other."""
    first, *others = rows
    bounds, total = [first.cu_seqlens], first.total
    for part in others:
        bounds.append(part.cu_seqlens[1:] + total)
        total += part.total
    return Rows(torch.cat(bounds), total, max(part.longest for part in rows))


def lay_out(tiers: Tiers, window: int, sinks: int, pinned: int) -> tuple[tuple[Tensor, ...], Rows]:
    """Lay out every token of one layer by row and position.

    Args:
        tiers: of the layer.
        window, sinks: how many newest and first tokens per row are protected. pinned: columns below it are too.

    Returns:
        What `kernels.layout.layout` returns for every token, and the rows.
    """
    dense, device = tiers.dense, tiers.dense.fill.device
    _, num_kv_heads = tiers.shape
    # ragged tokens come first in every row, because they are older than the dense tier, apart from its sinks
    ragged = [tier for tier in (tiers.condensed, tiers.sparse) if tier.rows.total] or [tiers.condensed]
    positions, misses, older, order = ragged[0].positions, ragged[0].misses, ragged[0].cu_seqlens, None
    if len(ragged) == 2:
        positions = torch.cat([tier.positions for tier in ragged])
        misses = torch.cat([tier.misses for tier in ragged])
        older = ragged[0].cu_seqlens + ragged[1].cu_seqlens
        order = torch.argsort((torch.cat([tier.rows.ids for tier in ragged]) << 32) + positions)
    if dense.even:
        bounds = torch.add(older, _numbers(older.shape[0], device), alpha=dense.bound)
        total = positions.shape[0] + (older.shape[0] - 1) * dense.bound
    else:
        bounds = older + cumulative(dense.fill.repeat_interleave(num_kv_heads))
        ragged_total = positions.shape[0]
        total = int(bounds[-1]) if dense.total is None else ragged_total + dense.total * num_kv_heads
    rows = Rows(bounds, total, sum(tier.rows.longest for tier in ragged) + dense.bound)
    tokens = layout(
        *(rows, older, order, positions, misses, dense.positions, dense.fill),
        capacity=dense.capacity,
        window=window,
        sinks=sinks,
        pinned=pinned,
        front=tiers.dense_sinks,
    )
    return tokens, rows


@lru_cache(maxsize=16)
def _numbers(count: int, device: torch.device) -> Tensor:
    """Return 0, 1, ..., int32. The tensor is cached by count and device."""
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.int32, device=device)

"""Everything that one layer stores, as one immutable value."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.ragged import RaggedTier

# The places that hold tokens. Attention reads "condensed" and "dense".
TIERS = ("condensed", "sparse", "dense")


def sequences_of(indices: Tensor, device: torch.device) -> Tensor:
    """Return the sequences of a batch that `indices` selects, int64. `indices` holds ints, or bools over the batch."""
    indices = torch.as_tensor(indices, device=device)
    return indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices.long()


def rows_of(sequences: Tensor, heads: int) -> Tensor:
    """Return the rows b * H + h of all heads of the given sequences, int64 `[sequences * H]`, in their order."""
    return (sequences[:, None] * heads + torch.arange(heads, device=sequences.device)).flatten()


@dataclass(frozen=True)
class Tiers:
    """Everything a layer stores, as one immutable value: if a step or an event fails, the old value is intact."""

    condensed: RaggedTier
    sparse: RaggedTier
    dense: DenseTier
    tokens: Tensor  # int64 [B], tokens of each sequence so far; evicted ones count, pads do not
    seen: int = 0  # logical length: columns stored; pads and evicted tokens count
    compressed_at: int | None = None  # logical length at the last event
    events: int = 0
    temperatures: Tensor | None = None  # [R], events divide scores by them; 1 for rows without a fit yet
    # per sequence, the event that first fitted its temperatures online, or None; empty if no sequence was fitted
    fitted: tuple[int | None, ...] = ()
    # bool [B, columns] of one layer: which of the first columns hold or held tokens, by the masks; later columns all do
    shown: Tensor | None = None
    hidden: Tensor | None = None  # bool [B], sequences whose step mask changed since the last event; None: no sequence

    @classmethod
    def of(cls, dense: DenseTier, seen: int) -> "Tiers":
        """Return tiers with only a dense tier."""
        rows = dense.keys.shape[0] * dense.keys.shape[1]
        empty = RaggedTier.empty(rows, dense.keys, dense.values)
        return cls(empty, empty, dense, dense.fill, seen)

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> "Tiers":
        """Return tiers that also hold the next columns; see `DenseTier.append`."""
        dense = self.dense.append(keys, values, valid, self.seen)
        tokens = self.tokens + (keys.shape[2] if valid is None else dense.fill - self.dense.fill)
        return replace(self, dense=dense, tokens=tokens, seen=self.seen + keys.shape[2])

    def advanced(self, count: int) -> "Tiers":
        """Return the tiers after other code wrote `count` columns to the dense tier, each with a token per sequence."""
        dense = replace(self.dense, bound=self.dense.bound + count)
        return replace(self, dense=dense, tokens=self.tokens + count, seen=self.seen + count)

    def cropped(self, length: int) -> "Tiers":
        """Return the tiers without column `length` and later. These columns must all be in the dense tier."""
        dense = self.dense.cropped(length)
        tokens = self.tokens + (dense.fill - self.dense.fill)
        shown = None if self.shown is None else self.shown[:, :length].clone()
        return replace(self, dense=dense, tokens=tokens, seen=length, shown=shown)

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys held."""
        dense = self.dense.keys[:, :, : self.dense.bound]
        return self.condensed.keys.nbytes + self.sparse.keys.nbytes + dense.numel() * dense.element_size()

    @property
    def sources(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all tiers, in the order that addresses count them."""
        return [(tier.keys, tier.values) for tier in (self.condensed, self.sparse, self.dense)]

    def after_event(
        self,
        condensed: RaggedTier,
        sparse: RaggedTier,
        dense: DenseTier,
        temperatures: Tensor | None,
        fitted: tuple[int | None, ...],
    ) -> "Tiers":
        """Return the tiers after an event that used these temperatures; see the fields."""
        return Tiers(
            condensed,
            sparse,
            dense,
            tokens=self.tokens,
            seen=self.seen,
            compressed_at=self.seen,
            events=self.events + 1,
            temperatures=temperatures,
            fitted=fitted,
            shown=self.shown,
        )

    def select_sequences(self, indices: Tensor) -> "Tiers":
        """Return the tiers of the given batch rows, in that order."""
        _, num_kv_heads = self.shape
        rows, fitted = rows_of(indices, num_kv_heads), self.fitted
        if len(set(fitted)) > 1:  # otherwise the host need not read the indices
            fitted = tuple(fitted[index] for index in indices.tolist())
        else:
            fitted = fitted[:1] * indices.shape[0]
        return replace(
            self,
            condensed=self.condensed.select_rows(rows),
            sparse=self.sparse.select_rows(rows),
            dense=self.dense.select_sequences(indices),
            tokens=self.tokens[indices],
            temperatures=None if self.temperatures is None else self.temperatures[rows],
            fitted=fitted,
            shown=None if self.shown is None else self.shown[indices],
            hidden=None if self.hidden is None else self.hidden[indices],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and KV heads, (B, H)."""
        return self.dense.keys.shape[0], self.dense.keys.shape[1]

    def kept(self) -> list[list[Tensor]]:
        """Return the positions that attention reads, ascending, as `[batch][kv_head]` int64 tensors."""
        batch, num_kv_heads = self.shape
        rows = self.condensed.positions.long().split(self.condensed.lengths.tolist())
        newest = [self.dense.positions[b, :fill].long() for b, fill in enumerate(self.dense.fill.tolist())]
        return [[torch.cat([rows[b * num_kv_heads + h], newest[b]]) for h in range(num_kv_heads)] for b in range(batch)]

    def lengths(self, tier: str | None = None) -> Tensor:
        """Return the tokens per row, int64 `[B, H]`: all that attention reads, or one tier's if `tier` names one.

        `tier` is "condensed", "sparse" or "dense".
        """
        dense = self.dense.fill[:, None].expand(self.shape)
        if tier == "dense":
            return dense.clone()
        ragged = (self.sparse if tier == "sparse" else self.condensed).lengths.long().view(self.shape)
        return ragged + dense if tier is None else ragged

    def tensors(self) -> list[Tensor]:
        """Return all tensors held, for counting bytes."""
        optional = [each for each in (self.temperatures, self.shown, self.hidden) if each is not None]
        return [*self.condensed.tensors(), *self.sparse.tensors(), *self.dense.tensors(), self.tokens, *optional]

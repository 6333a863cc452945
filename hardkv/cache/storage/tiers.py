"""Everything that one layer stores, as one immutable value."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.ragged import RaggedTier

# What holds a token; attention reads the first and the last.
TIERS = ("condensed", "sparse", "dense")


def sequences_of(indices: Tensor, device: torch.device) -> Tensor:
    """Which sequences of a batch, int64, that `indices` name: int, or bool over the batch."""
    indices = torch.as_tensor(indices, device=device)
    return indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices.long()


def rows_of(sequences: Tensor, heads: int) -> Tensor:
    """The rows b * H + h of all heads of the given sequences, int64 `[sequences * H]`, in their order."""
    return (sequences[:, None] * heads + torch.arange(heads, device=sequences.device)).flatten()


@dataclass(frozen=True)
class Tiers:
    """Everything a layer stores, as one immutable value: a step or an event that fails leaves the old one whole."""

    condensed: RaggedTier
    sparse: RaggedTier
    dense: DenseTier
    tokens: Tensor  # int64 [B], tokens of each sequence so far: evicted ones counted, pads not
    seen: int = 0  # logical length: columns stored, pads and evicted tokens counted
    compressed_at: int | None = None  # logical length at the last event
    events: int = 0
    temperatures: Tensor | None = None  # [R], that events divide scores by; 1 where none is fitted yet
    # of each sequence, the event that first fitted its temperatures online; None: none did. Empty: of none
    fitted: tuple[int | None, ...] = ()
    # bool [B, columns], which of the first columns hold tokens or did, as masks told; later ones all do. Of one layer
    shown: Tensor | None = None
    hidden: Tensor | None = None  # bool [B], where a step's mask since the last event said otherwise; None: nowhere

    @classmethod
    def of(cls, dense: DenseTier, seen: int) -> "Tiers":
        """Only a dense tier."""
        rows = dense.keys.shape[0] * dense.keys.shape[1]
        empty = RaggedTier.empty(rows, dense.keys, dense.values)
        return cls(empty, empty, dense, dense.fill, seen)

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> "Tiers":
        """Hold also the next columns; see `DenseTier.append`."""
        dense = self.dense.append(keys, values, valid, self.seen)
        tokens = self.tokens + (keys.shape[2] if valid is None else dense.fill - self.dense.fill)
        return replace(self, dense=dense, tokens=tokens, seen=self.seen + keys.shape[2])

    def advanced(self, count: int) -> "Tiers":
        """After `count` columns that somebody else wrote to the dense tier, a token of every sequence each."""
        dense = replace(self.dense, bound=self.dense.bound + count)
        return replace(self, dense=dense, tokens=self.tokens + count, seen=self.seen + count)

    def cropped(self, length: int) -> "Tiers":
        """Without column `length` and later, which must all be in the dense tier."""
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
        """Keys and values of all tiers, in the order of addresses."""
        return [(tier.keys, tier.values) for tier in (self.condensed, self.sparse, self.dense)]

    def after_event(
        self,
        condensed: RaggedTier,
        sparse: RaggedTier,
        dense: DenseTier,
        temperatures: Tensor | None,
        fitted: tuple[int | None, ...],
    ) -> "Tiers":
        """What an event leaves that selected with these temperatures; see the fields."""
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
        """The tiers of the given batch rows, in that order."""
        _, num_kv_heads = self.shape
        rows, fitted = rows_of(indices, num_kv_heads), self.fitted
        if len(set(fitted)) > 1:  # or the host need not know which
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
        """Positions attention reads, ascending, `[batch][kv_head]` int64 tensors."""
        batch, num_kv_heads = self.shape
        rows = self.condensed.positions.long().split(self.condensed.lengths.tolist())
        newest = [self.dense.positions[b, :fill].long() for b, fill in enumerate(self.dense.fill.tolist())]
        return [[torch.cat([rows[b * num_kv_heads + h], newest[b]]) for h in range(num_kv_heads)] for b in range(batch)]

    def lengths(self, tier: str | None = None) -> Tensor:
        """Tokens per row, int64 `[B, H]`: what attention reads, or those of "condensed", "sparse" or "dense"."""
        dense = self.dense.fill[:, None].expand(self.shape)
        if tier == "dense":
            return dense.clone()
        ragged = (self.sparse if tier == "sparse" else self.condensed).lengths.long().view(self.shape)
        return ragged + dense if tier is None else ragged

    def tensors(self) -> list[Tensor]:
        """Everything held, for counting bytes."""
        optional = [each for each in (self.temperatures, self.shown, self.hidden) if each is not None]
        return [*self.condensed.tensors(), *self.sparse.tensors(), *self.dense.tensors(), self.tokens, *optional]

"""Everything that one layer stores, as one immutable value."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hardkv.cache.storage.codec import Centres, Codec
from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.ragged import Columns, RaggedTier
from hardkv.kernels.codes import Coding, gather_states
from hardkv.kernels.compaction import gather_tokens
from hardkv.kernels.rows import Rows

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
    codec: Codec | None = None  # quantises the ragged tiers; None: they hold states
    centres: Centres | None = None  # with a codec: what it subtracts

    @classmethod
    def of(cls, dense: DenseTier, seen: int, codec: Codec | None = None) -> "Tiers":
        """Return tiers with only a dense tier."""
        rows, states = dense.keys.shape[0] * dense.keys.shape[1], (dense.keys, dense.values)
        if codec is None:
            empty, centres = RaggedTier.empty(rows, *states), None
        else:
            empty, centres = codec.empty(rows, *states), codec.first_centres(*states)
        return cls(empty, empty, dense, dense.fill, seen, codec=codec, centres=centres)

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
    def dense_sinks(self) -> int:
        """How many first tokens of every sequence stay in the dense tier at events."""
        return 0 if self.codec is None else self.codec.sinks

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys held, decoded."""
        dense = self.dense.keys[:, :, : self.dense.bound]
        ragged = (self.condensed.rows.total + self.sparse.rows.total) * dense.shape[-1]
        return (ragged + dense.numel()) * dense.element_size()

    @property
    def sources(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all tiers as they are stored, in the order that addresses count them."""
        return [(tier.keys, tier.values) for tier in (self.condensed, self.sparse, self.dense)]

    def coding(self, columns: Columns) -> Coding | None:
        """Return how to read the codes in a ragged tier's columns; None if they are states."""
        if self.codec is None:
            return None
        assert self.centres is not None
        return Coding(self.codec.bits, columns.scales, *self.centres)

    def gather(self, kind: int, address: Tensor, rows: Rows, *, out: Tensor) -> None:
        """Write keys (kind 0) or values (kind 1) of tokens to `out [N, D]`, decoded.

        Args:
            address: int64 `[N]`, index of each token in `sources`. rows: of these N tokens.
        """
        stored = [source[kind] for source in self.sources]
        if self.codec is None or self.centres is None or self.codec.bits[kind] == 16:
            gather_tokens(stored, address, out=out)
        else:
            scales = [tier.columns.scales for tier in (self.condensed, self.sparse)]
            gather_states(stored, scales, self.centres[kind], kind, self.codec.bits[kind], address, rows, out=out)

    def next_centres(self) -> Centres | None:
        """Return the centres with which an event quantises; None without a codec."""
        if self.codec is None or self.centres is None:
            return None
        return self.codec.centres(self.centres, self.condensed, self.sparse, self.dense)

    def after_event(
        self,
        condensed: RaggedTier,
        sparse: RaggedTier,
        dense: DenseTier,
        temperatures: Tensor | None,
        fitted: tuple[int | None, ...],
        centres: Centres | None = None,
    ) -> "Tiers":
        """Return the tiers after an event that used these temperatures and centres; see the fields."""
        return Tiers(
            condensed,
            sparse,
            dense,
            tokens=self.tokens,
            codec=self.codec,
            centres=centres,
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
            centres=None if self.centres is None else self.centres.select_rows(rows),
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
        dense = [self.dense.positions[b, :fill].long() for b, fill in enumerate(self.dense.fill.tolist())]
        return [
            [torch.cat([rows[b * num_kv_heads + h], dense[b]]).sort().values for h in range(num_kv_heads)]
            for b in range(batch)
        ]

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
        optional += self.centres or ()
        return [*self.condensed.tensors(), *self.sparse.tensors(), *self.dense.tensors(), self.tokens, *optional]

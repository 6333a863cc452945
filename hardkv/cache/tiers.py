"""Storage of one cache layer: ragged tiers that change only at events, and the dense tier that grows every step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from hardkv.kernels.append import append
from hardkv.kernels.layout import layout
from hardkv.kernels.rows import Rows, cumulative, padded_index

# What holds a token; attention reads the first and the last.
TIERS = ("condensed", "sparse", "dense")


def sequences_of(indices: Tensor, device: torch.device) -> Tensor:
    """Which sequences of a batch, int64, that `indices` name: int, or bool over the batch."""
    indices = torch.as_tensor(indices, device=device)
    return indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices.long()


def rows_of(sequences: Tensor, heads: int) -> Tensor:
    """The rows b * H + h of all heads of the given sequences, int64 `[sequences * H]`, in their order."""
    return (sequences[:, None] * heads + torch.arange(heads, device=sequences.device)).flatten()


def storage_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each once: a view counts as all that it keeps alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@lru_cache(maxsize=16)
def _numbers(count: int, device: torch.device) -> Tensor:
    """0, 1, ..., int32, made once for a number of rows and a device."""
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class RaggedTier:
    """R rows of tokens, flat: a row is contiguous and ascends in position. Never written after it is made."""

    keys: Tensor  # [N, D]
    values: Tensor  # [N, Dv]
    positions: Tensor  # int32 [N]
    misses: Tensor  # uint8 [N], consecutive events that did not select the token
    rows: Rows

    @classmethod
    def empty(cls, rows: int, keys: Tensor, values: Tensor) -> "RaggedTier":
        """No tokens, with the head dims, dtype and device of `keys [..., D]` and `values [..., Dv]`."""
        return cls(
            keys.new_empty(0, keys.shape[-1]),
            values.new_empty(0, values.shape[-1]),
            torch.empty(0, dtype=torch.int32, device=keys.device),
            torch.empty(0, dtype=torch.uint8, device=keys.device),
            Rows(torch.zeros(rows + 1, dtype=torch.int32, device=keys.device), 0, 0),
        )

    @property
    def cu_seqlens(self) -> Tensor:
        """Where rows begin and end, int32 `[R + 1]`."""
        return self.rows.cu_seqlens

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, int32 `[R]`."""
        return self.cu_seqlens.diff()

    def select_rows(self, rows: Tensor) -> "RaggedTier":
        """A tier of the given rows (int64), in that order; a row may come several times or never."""
        lengths = self.lengths[rows].long()
        width = int(lengths.max()) if rows.numel() else 0
        index, valid = padded_index(self.cu_seqlens[:-1][rows], lengths, width)
        token = index[valid]
        chosen = Rows(cumulative(lengths), token.shape[0], width)
        return RaggedTier(self.keys[token], self.values[token], self.positions[token], self.misses[token], chosen)

    def tensors(self) -> list[Tensor]:
        """Everything held, for counting bytes; schedules once they have been made."""
        return [self.keys, self.values, self.positions, self.misses, *self.rows.tensors()]


@dataclass(frozen=True)
class DenseTier:
    """The window and what came since the last event, `[B, H, capacity, D]`, appended to in place.

    Every sequence has its own fill; slots behind it hold nothing. All heads of a sequence hold the same tokens here.
    Appending writes behind the fill and returns a tier with a larger one, so the old tier stays as it was.
    """

    keys: Tensor  # [B, H, C, D]
    values: Tensor  # [B, H, C, Dv]
    positions: Tensor  # int32 [B, C]
    fill: Tensor  # int64 [B]
    bound: int  # the host's upper bound on fill
    even: bool = True  # whether every sequence's fill is the bound, as far as the host knows
    total: int | None = None  # tokens of all sequences, where they are not even and the host knows

    @classmethod
    def allocate(
        cls, keys: Tensor, values: Tensor, capacity: int, fill: Tensor | None = None, bound: int = 0
    ) -> "DenseTier":
        """A tier shaped after `keys [B, H, _, D]` and `values [B, H, _, Dv]`: empty, or yet to be written to."""
        batch, num_kv_heads = keys.shape[:2]
        # Buffers that later calls write into must not be inference tensors, even if made in inference mode.
        with torch.inference_mode(False):
            return cls(
                torch.empty(batch, num_kv_heads, capacity, keys.shape[-1], dtype=keys.dtype, device=keys.device),
                torch.empty(batch, num_kv_heads, capacity, values.shape[-1], dtype=values.dtype, device=keys.device),
                torch.zeros(batch, capacity, dtype=torch.int32, device=keys.device),
                torch.zeros(batch, dtype=torch.int64, device=keys.device) if fill is None else fill,
                bound,
            )

    @classmethod
    def view(cls, keys: Tensor, values: Tensor) -> "DenseTier":
        """A full tier over a model's own tensors, uncopied: columns 0, 1, ..., no padding."""
        batch, _, length, _ = keys.shape
        positions = torch.arange(length, dtype=torch.int32, device=keys.device).expand(batch, -1)
        return cls(keys, values, positions, torch.full((batch,), length, device=keys.device), length)

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, with what they are views of."""
        return storage_nbytes([self.keys, self.values])

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None, start: int) -> "DenseTier":
        """Hold also the valid tokens of `keys [B, H, q, D]`, `values [B, H, q, Dv]`, columns `start, start + 1, ...`.

        The buffers are shared with this tier unless its capacity does not suffice.
        """
        q_len = keys.shape[2]
        tier = self if self.bound + q_len <= self.capacity else self.grown(self.bound + q_len)
        fill = append(tier.keys, tier.values, tier.positions, tier.fill, keys, values, start, valid)
        return replace(tier, fill=fill, bound=tier.bound + q_len, even=tier.even and valid is None, total=None)

    def counted(self, fill: Sequence[int]) -> "DenseTier":
        """The same tier with its fill known to the host."""
        return replace(self, even=all(each == self.bound for each in fill), total=sum(fill))

    def grown(self, capacity: int) -> "DenseTier":
        """A copy with room for `capacity` tokens."""
        tier = DenseTier.allocate(self.keys, self.values, capacity)
        tier.keys[:, :, : self.bound] = self.keys[:, :, : self.bound]
        tier.values[:, :, : self.bound] = self.values[:, :, : self.bound]
        tier.positions[:, : self.bound] = self.positions[:, : self.bound]
        return replace(tier, fill=self.fill, bound=self.bound, even=self.even)

    def cropped(self, length: int) -> "DenseTier":
        """This tier without the tokens of column `length` and later."""
        held = torch.arange(self.capacity, device=self.fill.device) < self.fill[:, None]
        fill = (held & (self.positions < length)).sum(1)
        least, most = torch.stack([fill.min(), fill.max()]).tolist()
        return replace(self, fill=fill, bound=most, even=least == most)

    def newest(self, count: int, capacity: int, least: int) -> "DenseTier":
        """A new tier with the newest `count` tokens of every sequence, which has `least` at least, at its front."""
        fill, bound = self.fill.clamp_max(count), min(self.bound, count)
        tier = DenseTier.allocate(self.keys, self.values, capacity, fill, bound)
        if self.even:
            for new, old in ((tier.keys, self.keys), (tier.values, self.values)):
                new[:, :, :bound] = old[:, :, self.bound - bound : self.bound]
            tier.positions[:, :bound] = self.positions[:, self.bound - bound : self.bound]
            return tier
        slot = (self.fill - fill)[:, None] + torch.arange(bound, device=fill.device)
        slot = slot.clamp_max(max(self.capacity - 1, 0))  # behind the fill of a short sequence: never counts
        sequence = torch.arange(slot.shape[0], device=slot.device)[:, None]
        tier.keys[:, :, :bound] = self.keys[sequence, :, slot].transpose(1, 2)
        tier.values[:, :, :bound] = self.values[sequence, :, slot].transpose(1, 2)
        tier.positions[:, :bound] = self.positions[sequence, slot]
        return replace(tier, even=least >= bound)

    def select_sequences(self, indices: Tensor) -> "DenseTier":
        """A tier of the given batch rows, in that order."""
        rows = replace(self, keys=self.keys[indices], values=self.values[indices], positions=self.positions[indices])
        return replace(rows, fill=self.fill[indices]).grown(self.capacity)

    def tensors(self) -> list[Tensor]:
        """Everything held, for counting bytes."""
        return [self.keys, self.values, self.positions, self.fill]


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

    def cropped(self, length: int) -> "Tiers":
        """Without column `length` and later, which must all be in the dense tier."""
        dense = self.dense.cropped(length)
        tokens = self.tokens + (dense.fill - self.dense.fill)
        shown = None if self.shown is None else self.shown[:, :length].clone()
        return replace(self, dense=dense, tokens=tokens, seen=length, shown=shown)

    def merged(self, window: int, sinks: int = 0, pinned: int = 0) -> tuple[tuple[Tensor, ...], Rows]:
        """Lay out every held token by row and position.

        Args:
            window, sinks: newest and first tokens of a row that are protected. pinned: so are columns below it.

        Returns:
            What `kernels.layout.layout` tells of every token, and the rows.
        """
        dense, device = self.dense, self.dense.fill.device
        _, num_kv_heads = self.shape
        # what is ragged comes first in every row, as all of it is older than the dense tier
        ragged = [tier for tier in (self.condensed, self.sparse) if tier.rows.total] or [self.condensed]
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
        )
        return tokens, rows

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys held."""
        dense = self.dense.keys[:, :, : self.dense.bound]
        return self.condensed.keys.nbytes + self.sparse.keys.nbytes + dense.numel() * dense.element_size()

    @property
    def sources(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all tiers, in the order of addresses."""
        return [(tier.keys, tier.values) for tier in (self.condensed, self.sparse, self.dense)]

    def condense(
        self,
        condensed: RaggedTier,
        sparse: RaggedTier,
        least: int,
        temperatures: Tensor | None,
        fitted: tuple[int | None, ...],
        *,
        window: int,
        interval: int,
    ) -> "Tiers":
        """After an event: new ragged tiers, and a dense one of the newest tokens.

        Args:
            least: the host's lower bound on the dense tier's fill. temperatures, fitted: what the event selected with.
            window, interval: sizes of the new dense tier.
        """
        dense = self.dense.newest(window, window + interval, least)
        return self.after_event(condensed, sparse, dense, temperatures, fitted)

    def after_event(
        self,
        condensed: RaggedTier,
        sparse: RaggedTier,
        dense: DenseTier,
        temperatures: Tensor | None,
        fitted: tuple[int | None, ...],
    ) -> "Tiers":
        """The tiers that an event, which selected with these temperatures, leaves."""
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

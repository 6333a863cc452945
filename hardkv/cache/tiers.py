"""Storage of one cache layer: ragged tiers that change only at events, and the dense tier that grows every step."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hardkv.kernels.compaction import gather_tokens
from hardkv.kernels.rows import Bucket, bucket_rows, count_per_row, cumulative, padded_index, row_ids


def storage_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each once: a view counts as all that it keeps alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@dataclass(frozen=True)
class RaggedTier:
    """R rows of tokens, flat: a row is contiguous and ascends in position. Never written after it is made."""

    keys: Tensor  # [N, D]
    values: Tensor  # [N, Dv]
    positions: Tensor  # int32 [N]
    misses: Tensor  # uint8 [N], consecutive events that did not select the token
    cu_seqlens: Tensor  # int32 [R + 1]

    @classmethod
    def empty(cls, rows: int, keys: Tensor, values: Tensor) -> "RaggedTier":
        """No tokens, with the head dims, dtype and device of `keys [..., D]` and `values [..., Dv]`."""
        return cls(
            keys.new_empty(0, keys.shape[-1]),
            values.new_empty(0, values.shape[-1]),
            torch.empty(0, dtype=torch.int32, device=keys.device),
            torch.empty(0, dtype=torch.uint8, device=keys.device),
            torch.zeros(rows + 1, dtype=torch.int32, device=keys.device),
        )

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, int32 `[R]`."""
        return self.cu_seqlens.diff()

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The schedule the PyTorch kernels work by, made once."""
        return bucket_rows(self.cu_seqlens)

    def select_rows(self, rows: Tensor) -> "RaggedTier":
        """A tier of the given rows (int64), in that order; a row may come several times or never."""
        lengths = self.lengths[rows].long()
        width = int(lengths.max()) if rows.numel() else 0
        index, valid = padded_index(self.cu_seqlens[:-1][rows], lengths, width)
        token = index[valid]
        return RaggedTier(
            self.keys[token], self.values[token], self.positions[token], self.misses[token], cumulative(lengths)
        )

    def tensors(self) -> list[Tensor]:
        """Everything held, for counting bytes; the schedule once it has been made."""
        made = self.__dict__.get("buckets", ())
        schedule = [t for bucket in made for t in (bucket.rows, bucket.starts, bucket.lengths)]
        return [self.keys, self.values, self.positions, self.misses, self.cu_seqlens, *schedule]


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

    @classmethod
    def allocate(cls, keys: Tensor, values: Tensor, capacity: int) -> "DenseTier":
        """An empty tier shaped after `keys [B, H, _, D]` and `values [B, H, _, Dv]`."""
        batch, num_kv_heads = keys.shape[:2]
        # Buffers that later calls write into must not be inference tensors, even if made in inference mode.
        with torch.inference_mode(False):
            return cls(
                torch.empty(batch, num_kv_heads, capacity, keys.shape[-1], dtype=keys.dtype, device=keys.device),
                torch.empty(batch, num_kv_heads, capacity, values.shape[-1], dtype=values.dtype, device=keys.device),
                torch.zeros(batch, capacity, dtype=torch.int32, device=keys.device),
                torch.zeros(batch, dtype=torch.int64, device=keys.device),
                bound=0,
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

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None, start: int) -> "DenseTier":
        """Hold also the valid tokens of `keys [B, H, q, D]`, `values [B, H, q, Dv]`, columns `start, start + 1, ...`.

        The buffers are shared with this tier unless its capacity does not suffice.
        """
        batch, _, q_len, _ = keys.shape
        tier = self if self.bound + q_len <= self.capacity else self.grown(self.bound + q_len)
        column = torch.arange(q_len, device=keys.device)
        slot = tier.fill[:, None] + column  # [B, q]
        sequence = torch.arange(batch, device=keys.device)[:, None]
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        order, fill = column.expand(batch, -1), tier.fill + q_len
        if valid is not None:
            # valid tokens first: what padding writes behind the new fill never counts, and is overwritten next time
            order, fill = (
                torch.argsort(valid.logical_not().to(torch.uint8), dim=1, stable=True),
                tier.fill + valid.sum(1),
            )
            keys, values = keys[sequence, order], values[sequence, order]
        tier.keys[sequence, :, slot] = keys
        tier.values[sequence, :, slot] = values
        tier.positions[sequence, slot] = (start + order).to(torch.int32)
        return replace(tier, fill=fill, bound=tier.bound + q_len)

    def grown(self, capacity: int) -> "DenseTier":
        """A copy with room for `capacity` tokens."""
        tier = DenseTier.allocate(self.keys, self.values, capacity)
        tier.keys[:, :, : self.bound] = self.keys[:, :, : self.bound]
        tier.values[:, :, : self.bound] = self.values[:, :, : self.bound]
        tier.positions[:, : self.bound] = self.positions[:, : self.bound]
        return replace(tier, fill=self.fill, bound=self.bound)

    def cropped(self, length: int) -> "DenseTier":
        """This tier without the tokens of column `length` and later."""
        held = torch.arange(self.capacity, device=self.fill.device) < self.fill[:, None]
        fill = (held & (self.positions < length)).sum(1)
        return replace(self, fill=fill, bound=int(fill.max()))

    def newest(self, count: int, capacity: int) -> "DenseTier":
        """A new tier with the newest `count` tokens of every sequence at its front."""
        tier = DenseTier.allocate(self.keys, self.values, capacity)
        fill, bound = self.fill.clamp_max(count), min(self.bound, count)
        slot = (self.fill - fill)[:, None] + torch.arange(bound, device=fill.device)
        slot = slot.clamp_max(max(self.capacity - 1, 0))  # behind the fill of a short sequence: never counts
        sequence = torch.arange(slot.shape[0], device=slot.device)[:, None]
        tier.keys[:, :, :bound] = self.keys[sequence, :, slot].transpose(1, 2)
        tier.values[:, :, :bound] = self.values[sequence, :, slot].transpose(1, 2)
        tier.positions[:, :bound] = self.positions[sequence, slot]
        return replace(tier, fill=fill, bound=bound)

    def select_sequences(self, indices: Tensor) -> "DenseTier":
        """A tier of the given batch rows, in that order."""
        rows = replace(self, keys=self.keys[indices], values=self.values[indices], positions=self.positions[indices])
        return replace(rows, fill=self.fill[indices]).grown(self.capacity)

    def tensors(self) -> list[Tensor]:
        """Everything held, for counting bytes."""
        return [self.keys, self.values, self.positions, self.fill]


@dataclass(frozen=True)
class Merged:
    """All tokens of all tiers, row by row in order of position, with the address each has in its tier."""

    positions: Tensor  # int32 [N]
    misses: Tensor  # uint8 [N]
    address: Tensor  # int64 [N], over condensed, sparse and dense slots one behind the other
    in_window: Tensor  # bool [N], the newest tokens of the dense tier, which stay there
    cu_seqlens: Tensor  # int32 [R + 1]


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
    temperatures: Tensor | None = None  # [R], fitted online

    @classmethod
    def of(cls, dense: DenseTier, seen: int) -> "Tiers":
        """Only a dense tier."""
        rows = dense.keys.shape[0] * dense.keys.shape[1]
        empty = RaggedTier.empty(rows, dense.keys, dense.values)
        return cls(empty, empty, dense, dense.fill, seen)

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> "Tiers":
        """Hold also the next columns; see `DenseTier.append`."""
        dense = self.dense.append(keys, values, valid, self.seen)
        tokens = self.tokens + (dense.fill - self.dense.fill)
        return replace(self, dense=dense, tokens=tokens, seen=self.seen + keys.shape[2])

    def cropped(self, length: int) -> "Tiers":
        """Without column `length` and later, which must all be in the dense tier."""
        dense = self.dense.cropped(length)
        return replace(self, dense=dense, tokens=self.tokens + (dense.fill - self.dense.fill), seen=length)

    def holds_any(self, columns: Tensor) -> bool:
        """Whether attention reads a token of the marked columns, bool `[B, seen]`."""
        _, num_kv_heads = self.shape
        tier, dense = self.condensed, self.dense
        sequence = row_ids(tier.cu_seqlens, tier.positions.shape[0]) // num_kv_heads
        held = torch.arange(dense.capacity, device=columns.device) < dense.fill[:, None]
        recent = columns.gather(1, dense.positions.long().masked_fill(~held, 0)) & held
        return bool(columns[sequence, tier.positions.long()].any() | recent.any())

    def merged(self, window: int) -> Merged:
        """Lay out every held token by row and position."""
        dense = self.dense
        batch, num_kv_heads = self.shape
        slot = torch.arange(dense.capacity, device=dense.fill.device)
        held = (slot < dense.fill[:, None])[:, None].expand(-1, num_kv_heads, -1).reshape(-1)
        newest = (slot >= (dense.fill - window)[:, None])[:, None].expand(-1, num_kv_heads, -1).reshape(-1)
        address = held.nonzero()[:, 0]
        positions = dense.positions[:, None].expand(-1, num_kv_heads, -1).reshape(-1)[address]
        row = address // dense.capacity
        ragged = [tier for tier in (self.condensed, self.sparse) if tier.keys.shape[0]]
        offset = sum(tier.keys.shape[0] for tier in ragged)
        in_window = newest[address]
        misses = torch.zeros_like(positions, dtype=torch.uint8)
        address = address + offset
        if ragged:
            older = torch.arange(offset, device=address.device)
            address = torch.cat([older, address])
            in_window = torch.cat([torch.zeros_like(older, dtype=torch.bool), in_window])
            positions = torch.cat([*(tier.positions for tier in ragged), positions])
            misses = torch.cat([*(tier.misses for tier in ragged), misses])
            row = torch.cat([*(row_ids(tier.cu_seqlens, tier.keys.shape[0]) for tier in ragged), row])
            order = torch.argsort((row << 32) + positions)
            address, in_window, positions = address[order], in_window[order], positions[order]
            misses = misses[order]
        lengths = torch.zeros(batch * num_kv_heads, dtype=torch.int64, device=address.device)
        lengths.scatter_add_(0, row, torch.ones_like(row))
        return Merged(positions, misses, address, in_window, cumulative(lengths))

    def gather(self, address: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[N, D]` and values `[N, Dv]` at the given addresses."""
        dense = self.dense
        return (
            gather_tokens([self.condensed.keys, self.sparse.keys, dense.keys.flatten(0, 2)], address),
            gather_tokens([self.condensed.values, self.sparse.values, dense.values.flatten(0, 2)], address),
        )

    def condense(
        self,
        merged: Merged,
        keep: Tensor,
        *,
        window: int,
        interval: int,
        patience: int,
        temperatures: Tensor | None = None,
    ) -> "Tiers":
        """New, exactly sized tiers after an event.

        Args:
            merged: from `merged(window)`. keep: bool `[N]`, the selected tokens; the window's must be among them.
            temperatures: `[R]`, what the event selected with, to be kept.
            window, interval: sizes of the new dense tier. patience: misses a token survives in the sparse tier.
        """
        misses = torch.where(keep, 0, merged.misses + 1).to(torch.uint8)

        def tier(chosen: Tensor) -> RaggedTier:
            keys, values = self.gather(merged.address[chosen])
            cu_seqlens = cumulative(count_per_row(chosen, merged.cu_seqlens))
            return RaggedTier(keys, values, merged.positions[chosen], misses[chosen], cu_seqlens)

        return Tiers(
            condensed=tier(keep & ~merged.in_window),
            sparse=tier(~keep & (misses <= patience)),
            dense=self.dense.newest(window, window + interval),
            tokens=self.tokens,
            seen=self.seen,
            compressed_at=self.seen,
            events=self.events + 1,
            temperatures=temperatures,
        )

    def select_sequences(self, indices: Tensor) -> "Tiers":
        """The tiers of the given batch rows, in that order."""
        _, num_kv_heads = self.shape
        rows = (indices[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=indices.device)).flatten()
        return replace(
            self,
            condensed=self.condensed.select_rows(rows),
            sparse=self.sparse.select_rows(rows),
            dense=self.dense.select_sequences(indices),
            tokens=self.tokens[indices],
            temperatures=None if self.temperatures is None else self.temperatures[rows],
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
        fitted = [] if self.temperatures is None else [self.temperatures]
        return [*self.condensed.tensors(), *self.sparse.tensors(), *self.dense.tensors(), self.tokens, *fitted]

"""Room for a layer's tokens at fixed addresses, for CUDA graphs."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hardkv.cache.storage.codec import Centres
from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.queries import QueryRing
from hardkv.cache.storage.ragged import Columns, RaggedTier
from hardkv.cache.storage.tiers import Tiers
from hardkv.kernels.codes import compact_codes
from hardkv.kernels.compaction import compact
from hardkv.kernels.rows import Rows

# When a pool runs out of room, it grows to this many times what it needs.
GROWTH = 1.25


class Pool:
    """Room at fixed addresses for one layer's condensed tier, dense tier and query ring.

    Args:
        tiers, ring: give the shapes, dtypes and device.
        room: tokens of the condensed tier, of all rows together. dense_room: tokens of the dense tier per row.
    """

    def __init__(self, tiers: Tiers, ring: QueryRing, room: int, dense_room: int):
        self.dense = DenseTier.allocate(tiers.dense.keys, tiers.dense.values, dense_room)
        rows = tiers.shape[0] * tiers.shape[1]
        with torch.inference_mode(False):
            self.cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32, device=tiers.dense.fill.device)
            self.centres = tiers.centres and Centres(*map(torch.empty_like, tiers.centres))
        self.ring = QueryRing(ring.buffer, ring.capacity)
        self.schedules: dict[Any, Any] = {}
        self._grow(tiers.condensed, room)

    def _grow(self, like: RaggedTier, room: int) -> None:
        with torch.inference_mode(False):
            self.tokens = like.columns.map(
                lambda column: torch.empty(room, *column.shape[1:], dtype=column.dtype, device=column.device)
            )

    @property
    def room(self) -> int:
        """Tokens of the condensed tier that fit."""
        return self.tokens.keys.shape[0]

    def fits(self, tiers: Tiers) -> bool:
        """Return whether the tiers match the pool's shapes. The length of the condensed tier does not matter."""
        mine, dense = self.dense, tiers.dense
        return (
            mine.keys.shape[:2] == dense.keys.shape[:2]
            and mine.keys.shape[3] == dense.keys.shape[3]
            and mine.values.shape[3] == dense.values.shape[3]
            and mine.keys.dtype == dense.keys.dtype
            and mine.keys.device == dense.keys.device
            and dense.bound <= mine.capacity
        )

    def hold(self, tiers: Tiers) -> Tiers:
        """Return the same tiers, copied to the pool's addresses.

        The pool moves to new addresses if the condensed tier outgrows its room. Tiers of other shapes are returned
        unchanged.
        """
        if not self.fits(tiers):
            return tiers
        condensed, dense, bound = tiers.condensed, tiers.dense, tiers.dense.bound
        total = condensed.rows.total
        if total > self.room:
            self._grow(condensed, int(total * GROWTH))
        held = self.tokens.map(lambda buffer: buffer[:total])
        for buffer, new in zip(held, condensed.columns, strict=True):
            _move(new, buffer)
        for buffer, new in ((self.dense.keys, dense.keys), (self.dense.values, dense.values)):
            _move(new[:, :, :bound], buffer[:, :, :bound])
        _move(dense.positions[:, :bound], self.dense.positions[:, :bound])
        _move(dense.fill, self.dense.fill)
        _move(condensed.cu_seqlens, self.cu_seqlens)
        for buffer, new in zip(self.centres or (), tiers.centres or (), strict=True):
            _move(new, buffer)
        return replace(
            tiers,
            centres=self.centres,
            condensed=self._condensed(held, condensed.rows.longest, bound),
            dense=replace(self.dense, bound=bound, even=dense.even),
        )

    def compact(
        self, tiers: Tiers, address: Tensor, index: Tensor, positions: Tensor, misses: Tensor, longest: int, window: int
    ) -> tuple[RaggedTier, DenseTier] | None:
        """Make the tiers after an event in place and return them; return None if that is not possible.

        It is possible if all rows have one length and the event does not change it.

        Args:
            tiers: in this pool; the event leaves no sparse tier.
            address: int64 `[N]`, of all tokens. index: int64 `[n]`, the tokens that go to the condensed tier.
            positions: int32 `[N]`. misses: uint8 `[N]`. longest: length of the longest new row.
            window: newest tokens that stay in the dense tier, after its sinks.
        """
        condensed, dense, sinks = tiers.condensed, tiers.dense, tiers.dense_sinks
        rows, kept = condensed.rows, min(dense.bound, sinks + window)
        number = self.cu_seqlens.shape[0] - 1
        if not (
            rows.total == index.shape[0] == number * rows.longest  # all rows of one length
            and rows.longest == longest
            and not tiers.sparse.rows.total
            and condensed.keys.data_ptr() == self.tokens.keys[: rows.total].data_ptr()
            and dense.keys.data_ptr() == self.dense.keys.data_ptr()
            and dense.even
            and dense.bound >= 2 * kept - sinks  # source and target of the window do not overlap
            and (tiers.codec is None or rows.total)  # rows without codes may get other centres
        ):
            return None
        held = self.tokens.map(lambda buffer: buffer[: rows.total])
        states, chosen = (dense.keys, dense.values), (self.cu_seqlens, address, index, positions, misses)
        if tiers.codec is None or tiers.centres is None:
            compact(held[:4], states, *chosen)
        else:
            compact_codes(held, states, tiers.centres, tiers.codec.bits, *chosen)
        front, newest = slice(sinks, kept), slice(dense.bound - kept + sinks, dense.bound)
        for buffer in states:
            buffer[:, :, front].copy_(buffer[:, :, newest])
        self.dense.positions[:, front].copy_(self.dense.positions[:, newest])
        self.dense.fill.fill_(kept)
        return self._condensed(held, rows.longest, kept), replace(self.dense, bound=kept)

    def _condensed(self, held: Columns, longest: int, bound: int) -> RaggedTier:
        """Return a tier over the tokens in `held`, with the rows of `cu_seqlens`; rebuild existing schedules for it."""
        rows = Rows(self.cu_seqlens, held.keys.shape[0], longest, self.schedules, self.room)
        if self.schedules:
            from hardkv.kernels.attention.triton_schedule import recut_schedules

            recut_schedules(rows, bound)
        return RaggedTier(held, rows)

    def hold_ring(self, ring: QueryRing) -> QueryRing:
        """Return the same queries, copied to the pool's addresses."""
        _move(ring.buffer, self.ring.buffer)
        _move(ring.valid, self.ring.valid)
        self.ring.first, self.ring.valid_from = ring.first, ring.valid_from
        return self.ring

    def tensors(self) -> list[Tensor]:
        """Return all tensors held, for counting bytes."""
        schedules = [tensor for schedule in self.schedules.values() for tensor in schedule.tensors()]
        return [
            *self.tokens,
            *(self.centres or ()),
            self.cu_seqlens,
            *self.dense.tensors(),
            self.ring.buffer,
            self.ring.valid,
            *schedules,
        ]


def _move(source: Tensor, target: Tensor) -> None:
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)

"""What layers held at one moment: positions by tier, on the CPU. A `Trace` is a list of snapshots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hardkv.cache.storage.memory import storage_nbytes
from hardkv.cache.storage.tiers import Tiers, rows_of


@dataclass(frozen=True)
class Positions:
    """Positions of one tier, row after row, on the CPU."""

    flat: Tensor  # int32 [N]
    lengths: Tensor  # int64 [rows]

    @property
    def rows(self) -> list[Tensor]:
        """Positions of every row, ascending int64."""
        return list(self.flat.long().split(self.lengths.tolist()))

    def select(self, rows: Tensor) -> "Positions":
        """Return the positions of the given rows, in that order."""
        parts = self.flat.split(self.lengths.tolist())
        flat = [parts[row] for row in rows.tolist()]
        return Positions(torch.cat(flat) if flat else self.flat[:0], self.lengths[rows])

    def below(self, length: int) -> "Positions":
        """Return the positions without `length` and later ones."""
        row = torch.arange(self.lengths.shape[0], device="cpu").repeat_interleave(self.lengths)
        left = self.flat < length
        return Positions(self.flat[left], torch.bincount(row[left], minlength=self.lengths.shape[0]))


@dataclass(frozen=True)
class HeldByLayer:
    """Positions that one layer holds.

    Rows of the ragged tiers are (sequence, KV head). Rows of the dense tier are sequences, because heads share it.
    """

    heads: int
    tiers: dict[str, Positions]

    @classmethod
    def of(cls, tiers: Tiers) -> "HeldByLayer":
        """Return a copy of what `tiers` hold now, on the CPU."""

        def host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            # always a copy: a graph's pools are written again, and views would keep memory that an event frees
            return tensor.detach().to("cpu", dtype, copy=True)

        def positions(flat: Tensor, lengths: Tensor) -> Positions:
            return Positions(host(flat, torch.int32), host(lengths, torch.int64))

        dense = tiers.dense
        found = {
            "condensed": positions(tiers.condensed.positions, tiers.condensed.lengths),
            "sparse": positions(tiers.sparse.positions, tiers.sparse.lengths),
            "dense": positions(dense.positions[dense.held()], dense.fill),
        }
        return cls(tiers.shape[1], found)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.tiers["dense"].lengths.shape[0]

    def lengths(self, tier: str | None) -> Tensor:
        """Return the tokens per row, int64 `[B, H]`, of one tier; None for all that attention reads."""
        dense = self.tiers["dense"].lengths[:, None].expand(-1, self.heads)
        if tier == "dense":
            return dense
        ragged = self.tiers[tier or "condensed"].lengths.view(-1, self.heads)
        return ragged + dense if tier is None else ragged

    def kept(self, tier: str | None) -> list[list[Tensor]]:
        """Return the positions of one tier, ascending int64, `[batch][kv_head]`; None for all that attention reads."""
        newest = self.tiers["dense"].rows
        if tier == "dense":
            return [[each] * self.heads for each in newest]
        ragged = self.tiers[tier or "condensed"].rows
        grouped = [ragged[b * self.heads : (b + 1) * self.heads] for b in range(len(newest))]
        if tier is not None:
            return grouped
        return [
            [torch.cat([row, each]).sort().values for row in rows] for rows, each in zip(grouped, newest, strict=True)
        ]

    def select(self, indices: Tensor) -> "HeldByLayer":
        """Return what the layer holds for the given sequences, in that order."""
        rows = rows_of(indices, self.heads)
        found = {name: each.select(indices if name == "dense" else rows) for name, each in self.tiers.items()}
        return HeldByLayer(self.heads, found)

    def below(self, length: int) -> "HeldByLayer":
        """Return what the layer holds without column `length` and later."""
        return HeldByLayer(self.heads, {name: each.below(length) for name, each in self.tiers.items()})


class HoldingLayer(Protocol):
    """What a snapshot needs from a layer."""

    layer_idx: int
    tiers: Tiers | None

    @property
    def seen(self) -> int:
        """Columns so far."""
        ...

    @property
    def events(self) -> int:
        """Selection events so far."""
        ...

    def listen(self, listener: Any) -> None:
        """Call `listener.event` after every event from now on; None: stop."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return every tensor held."""
        ...

    def dense_nbytes(self) -> int:
        """Return the bytes that DynamicCache would hold."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """What all compressed layers held at one moment.

    Args:
        seen: columns so far; pads and evicted tokens count. events: selection events so far.
        nbytes: bytes that the compressed layers held, counted as in `HardKVCache.nbytes`. dense_nbytes: bytes that
            DynamicCache would hold for these layers.
        layers: one entry per compressed layer.
    """

    seen: int
    events: int
    nbytes: int
    dense_nbytes: int
    layers: list[HeldByLayer]

    @classmethod
    def of(cls, layers: Sequence[HoldingLayer], known: Mapping[int, HeldByLayer]) -> "Snapshot":
        """Take a snapshot of layers as they are now. If `known` has an entry for a layer's index, use that instead."""
        return cls(
            seen=max(layer.seen for layer in layers),
            events=max(layer.events for layer in layers),
            nbytes=storage_nbytes(tensor for layer in layers for tensor in layer.tensors()),
            dense_nbytes=sum(layer.dense_nbytes() for layer in layers),
            layers=[known.get(layer.layer_idx) or HeldByLayer.of(layer.tiers) for layer in layers],  # type: ignore[arg-type]
        )

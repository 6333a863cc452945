"""The result of an event: which tokens stay in which tier, and the new tiers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hardkv.cache.events.held import HeldTokens
from hardkv.cache.events.inputs import EventInputs
from hardkv.cache.storage.codec import Centres
from hardkv.cache.storage.ragged import Columns, RaggedTier
from hardkv.cache.storage.tiers import Tiers
from hardkv.kernels.compaction import gather_tiers
from hardkv.kernels.layout import assign
from hardkv.kernels.rows import Rows


class Sizes(NamedTuple):
    """What the host reads about one layer's selection before it builds the new tiers."""

    condensed: int  # tokens
    longest_condensed: int  # longest row
    sparse: int
    longest_sparse: int
    least_fill: int  # of the dense tier
    sound: int  # whether the selection can be trusted
    hidden: int  # sequences of which a step's mask hid past tokens; see `storage.hidden`


@dataclass(frozen=True)
class Selection:
    """The selection of an event of L layers, all on the device. The host reads the sizes of the new tiers later."""

    positions: Tensor  # int32 [N]
    misses: Tensor  # uint8 [N], updated by this event
    address: Tensor  # int64 [N]
    chosen: tuple[Tensor, Tensor]  # bool [N] each: selected tokens outside the window; tokens for the sparse tier
    cu_seqlens: Tensor  # int32 [2, L, R + 1], of both ragged tiers of every layer
    temperatures: Sequence[Tensor | None]  # [R] per layer, used by this event and kept for later ones
    fitted: Sequence[tuple[int | None, ...]]  # per layer, see `Tiers`
    sizes: Tensor  # int64 [L, 7], `Sizes` per layer

    @classmethod
    def of(
        cls,
        layers: Sequence[Tiers],
        held: HeldTokens,
        keep: Tensor,
        sound: Tensor,
        patience: int,
        temperatures: Sequence[Tensor | None],
        fitted: Sequence[tuple[int | None, ...]],
    ) -> "Selection":
        """Sort the tokens into tiers.

        Args:
            keep: bool `[N]`, the selected tokens, including all that stay in the dense tier.
            sound: bool scalar, whether the selection can be trusted.
            patience: how many misses a token survives in the sparse tier.
        """
        misses, condensed, sparse, lengths = assign(keep, held.stays, held.misses, held.rows, patience)
        lengths = lengths.view(2, len(layers), -1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(2, dtype=torch.int32), (1, 0))
        found = torch.stack([lengths.sum(2), lengths.amax(2)], -1).transpose(0, 1).flatten(1)  # [L, 4]
        fill = torch.stack([tiers.dense.fill for tiers in layers]).amin(1, keepdim=True)
        none = found.new_zeros(())
        hidden = torch.stack([none if tiers.hidden is None else tiers.hidden.sum() for tiers in layers])
        sizes = torch.cat([found, fill, sound.long().expand(len(layers), 1), hidden[:, None]], 1)
        chosen = condensed, sparse
        return cls(held.positions, misses, held.address, chosen, cu_seqlens, temperatures, fitted, sizes)

    def index(self, sizes: Sequence[Sizes]) -> list[tuple[Tensor, Tensor]]:
        """Return, per layer, the tokens that its new condensed and sparse tiers take. `sizes` are the host's copies."""
        totals = [[size.condensed for size in sizes], [size.sparse for size in sizes]]
        both = [
            torch.nonzero_static(mask, size=sum(each))[:, 0].split(each)
            for mask, each in zip(self.chosen, totals, strict=True)
        ]
        return list(zip(*both, strict=True))

    def tiers(self, layer: int, inputs: EventInputs, index: tuple[Tensor, Tensor], sizes: Sizes) -> Tiers:
        """Return the new tiers of one layer, exactly sized or in its pool.

        If this fails with a pool, the old tiers are lost.

        Args:
            layer: index among the layers. inputs: of its event. index: from `index`. sizes: of this layer.
        """
        old, settings, pool = inputs.tiers, inputs.settings, inputs.pool
        fits = self.temperatures[layer], self.fitted[layer]
        if pool is not None and not sizes.sparse:
            chosen = self.address, index[0], self.positions, self.misses
            in_place = pool.compact(old, *chosen, sizes.longest_condensed, settings.window)
            if in_place is not None:
                condensed, dense = in_place
                return old.after_event(condensed, old.sparse, dense, *fits, old.centres)
        centres = old.next_centres()
        condensed, sparse = (
            RaggedTier(
                self._gather(old, centres, index[kind]),
                # a copy, so that no layer keeps the memory of the others alive
                Rows(self.cu_seqlens[kind, layer].clone(), total, longest),
            )
            for kind, total, longest in (
                (0, sizes.condensed, sizes.longest_condensed),
                (1, sizes.sparse, sizes.longest_sparse),
            )
        )
        capacity = old.dense_sinks + settings.window + settings.interval
        dense = old.dense.ends(old.dense_sinks, settings.window, capacity, sizes.least_fill)
        tiers = old.after_event(condensed, sparse, dense, *fits, centres)
        return tiers if pool is None else pool.hold(tiers)

    def _gather(self, old: Tiers, centres: Centres | None, index: Tensor) -> Columns:
        """Return the columns of the tokens in `index`, int64 `[n]`, out of one layer's tiers."""
        chosen = self.address, index, self.positions, self.misses
        if old.codec is None:
            columns = gather_tiers(old.sources, *chosen)
            return Columns(*columns, old.condensed.columns.scales.new_empty(index.shape[0], 0))
        assert centres is not None
        return old.codec.gather((old.condensed, old.sparse), old.dense, centres, *chosen)

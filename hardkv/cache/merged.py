"""All tokens of some layers in one row order, and what an event decides about them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hardkv.cache.tiers import RaggedTier, Tiers
from hardkv.kernels.compaction import gather_tiers, gather_tokens
from hardkv.kernels.layout import assign
from hardkv.kernels.rows import Rows


@dataclass(frozen=True)
class Merged:
    """The held tokens of L layers of one shape: row (l * B + b) * H + h, in each by position."""

    positions: Tensor  # int32 [N]
    misses: Tensor  # uint8 [N]
    address: Tensor  # int64 [N], over the condensed, sparse and dense slots of the token's layer
    stays: Tensor  # bool [N], the newest tokens of the dense tier, which stay there
    newest: Tensor  # bool [N], the row's newest `window` tokens
    protected: Tensor  # bool [N], tokens kept whatever their score
    rows: Rows
    layers: list[Rows]  # of each layer

    @classmethod
    def of(cls, layers: Sequence[Tiers], window: int, sinks: int, pinned: int) -> "Merged":
        """Lay out the layers' tokens; see `Tiers.merged`."""
        found = [tiers.merged(window, sinks, pinned) for tiers in layers]
        tokens, rows = [tokens for tokens, _ in found], [rows for _, rows in found]
        columns = tokens[0] if len(layers) == 1 else [torch.cat(parts) for parts in zip(*tokens, strict=True)]
        positions, misses, address, stays, newest, protected = columns
        whole = rows[0] if len(layers) == 1 else concatenated(rows)
        return cls(positions, misses, address, stays, newest, protected, whole, rows)

    @property
    def totals(self) -> list[int]:
        """Tokens of each layer."""
        return [rows.total for rows in self.layers]

    def gather(self, layers: Sequence[Tiers], kind: int) -> Tensor:
        """Keys (0) or values (1) of all tokens, `[N, D]`."""
        sources = [[source[kind] for source in tiers.sources] for tiers in layers]
        out = sources[0][0].new_empty(self.rows.total, sources[0][0].shape[-1])
        for source, address, place in zip(
            sources, self.address.split(self.totals), out.split(self.totals), strict=True
        ):
            gather_tokens(source, address, out=place)
        return out


def concatenated(rows: Sequence[Rows]) -> Rows:
    """Rows one behind the other."""
    first, *others = rows
    bounds, total = [first.cu_seqlens], first.total
    for part in others:
        bounds.append(part.cu_seqlens[1:] + total)
        total += part.total
    return Rows(torch.cat(bounds), total, max(part.longest for part in rows))


@dataclass(frozen=True)
class Selection:
    """What an event of L layers decided, all on the device: the sizes of the new tiers are read later, all at once."""

    positions: Tensor  # int32 [N]
    misses: Tensor  # uint8 [N], counted on
    address: Tensor  # int64 [N]
    chosen: tuple[Tensor, Tensor]  # bool [N] each: selected tokens outside the window; deselected ones on probation
    cu_seqlens: Tensor  # int32 [2, L, R + 1], of both ragged tiers of every layer
    temperatures: Sequence[Tensor | None]  # [R] of each layer, what the event selected with, to be kept
    fitted: Sequence[tuple[int | None, ...]]  # of each layer, see `Tiers`
    # int64 [L, 7]: total and longest row of condensed and of sparse, least dense fill, whether sound, sequences that
    # had tokens hidden
    sizes: Tensor

    @classmethod
    def of(
        cls,
        layers: Sequence[Tiers],
        merged: Merged,
        keep: Tensor,
        sound: Tensor,
        patience: int,
        temperatures: Sequence[Tensor | None],
        fitted: Sequence[tuple[int | None, ...]],
    ) -> "Selection":
        """Sort the tokens into tiers.

        Args:
            keep: bool `[N]`, the selected tokens; those that stay in the dense tier must be among them.
            sound: bool scalar, whether the selection can be trusted.
            patience: misses a token survives in the sparse tier.
        """
        misses, condensed, sparse, lengths = assign(keep, merged.stays, merged.misses, merged.rows, patience)
        lengths = lengths.view(2, len(layers), -1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(2, dtype=torch.int32), (1, 0))
        found = torch.stack([lengths.sum(2), lengths.amax(2)], -1).transpose(0, 1).flatten(1)  # [L, 4]
        fill = torch.stack([tiers.dense.fill for tiers in layers]).amin(1, keepdim=True)
        none = found.new_zeros(())
        hidden = torch.stack([none if tiers.hidden is None else tiers.hidden.sum() for tiers in layers])
        sizes = torch.cat([found, fill, sound.long().expand(len(layers), 1), hidden[:, None]], 1)
        chosen = condensed, sparse
        return cls(merged.positions, misses, merged.address, chosen, cu_seqlens, temperatures, fitted, sizes)

    def index(self, sizes: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Of every layer, which tokens its new condensed and sparse tiers take; `sizes` is read on the host."""
        totals = [[size[2 * tier] for size in sizes] for tier in range(2)]
        both = [
            torch.nonzero_static(mask, size=sum(each))[:, 0].split(each)
            for mask, each in zip(self.chosen, totals, strict=True)
        ]
        return list(zip(*both, strict=True))

    def finish(
        self,
        layer: int,
        tiers: Tiers,
        index: tuple[Tensor, Tensor],
        sizes: Sequence[int],
        window: int,
        interval: int,
    ) -> Tiers:
        """New, exactly sized tiers of one of the layers.

        Args:
            tiers: the layer's old ones. index: from `index`. sizes: the layer's. window, interval: of the dense tier.
        """
        condensed, sparse = (
            RaggedTier(
                *gather_tiers(tiers.sources, self.address, index[kind], self.positions, self.misses),
                # a copy: nothing that stays keeps the other layers' alive
                Rows(self.cu_seqlens[kind, layer].clone(), sizes[2 * kind], sizes[2 * kind + 1]),
            )
            for kind in range(2)
        )
        fits = self.temperatures[layer], self.fitted[layer]
        return tiers.condense(condensed, sparse, sizes[4], *fits, window=window, interval=interval)

"""Drop stored tokens whose columns a later mask hides: nobody reads them again, so they leave every tier."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.queries import QueryRing
from hardkv.cache.storage.ragged import RaggedTier
from hardkv.cache.storage.tiers import Tiers

UNREAD = (
    "since the last event the attention mask of a step of one token hid or showed past tokens of {} sequences as no "
    "mask before, and was not followed: HardKVCache reads what masks say of past columns only with several new tokens, "
    "as looking costs the host a wait. reset() it, and change the mask of past columns in a forward of two tokens or "
    "more (crop(-1) before it makes them two), or use DynamicCache"
)


@dataclass(frozen=True)
class Past:
    """What the mask of new tokens says about the columns before them. Rows without a new token may say nothing."""

    some: Tensor  # bool [B, columns], whether any new token sees the column; False if the row says nothing
    every: Tensor  # bool [B, columns], whether every new token sees the column; True if the row says nothing
    told: Tensor | None = None  # bool [B], rows that say something; None means all

    def applied(self, tiers: Tiers, ring: QueryRing, noting: bool) -> tuple[Tiers, QueryRing]:
        """Return tiers and queries without the hidden columns, as if these had been padding.

        The given tiers and queries do not change. The host waits for the device once, and again only if it drops
        tokens.

        Args:
            tiers, ring: of one layer. noting: whether the layer keeps `Tiers.shown`.

        Raises:
            NotImplementedError: the new tokens of a row do not all see the same past tokens; or they see a column that
                holds no token (padding, or hidden by an earlier mask); or they do not see a sink of a quantised cache;
                or the mask of an earlier step of one token hid or showed past columns.
        """
        hidden = ~self.every
        nothing = hidden.new_zeros(())
        returned = nothing if tiers.shown is None else self.some[:, : tiers.shown.shape[1]] & ~tiers.shown
        unread = nothing if tiers.hidden is None else tiers.hidden
        flags = [_holds(tiers, hidden), _holds(tiers, hidden & self.some), returned.any(), unread.sum()]
        drops, differ, returns, waiting = torch.stack([flag.long() for flag in flags]).tolist()
        if waiting:
            raise NotImplementedError(UNREAD.format(waiting))
        if returns:
            row, column = returned.nonzero()[0].tolist()
            raise NotImplementedError(
                f"the attention mask shows column {column} of sequence {row}, which was padding or hidden before: "
                "HardKVCache stores no padding and drops what a mask hides. Leave such columns hidden, or use "
                "DynamicCache"
            )
        if differ:
            raise NotImplementedError(
                "the attention mask hides past tokens from some of the new tokens only; HardKVCache lets every new "
                "token of a sequence see all that are kept"
            )
        tokens, shown = self.every.sum(1), tiers.shown
        if self.told is not None:
            tokens = torch.where(self.told, tokens, tiers.tokens)
        if noting:
            shown = self.every.clone()
            if tiers.shown is not None:
                shown[:, : tiers.shown.shape[1]] &= tiers.shown
        if drops:
            _check_first(tiers, hidden)
            condensed, sparse = (tier.without(_of_ragged(tier, hidden)) for tier in (tiers.condensed, tiers.sparse))
            dense = tiers.dense.without(_of_dense(tiers.dense, hidden))
            tiers = replace(tiers, condensed=condensed, sparse=sparse, dense=dense)
            ring = ring.without(hidden)
        return replace(tiers, tokens=tokens, shown=shown), ring


def seen_through(tiers: Tiers, mask: Tensor) -> Tiers:
    """Return the tiers after a step of one token with `mask`, bool `[B, seen]`.

    They note which sequences' masks changed; the host does not wait.
    """
    past, known = mask[:, :-1], tiers.shown
    width = 0 if known is None else known.shape[1]
    changed = None if known is None else (past[:, :width] != known).any(1)
    if width < past.shape[1]:  # columns that no mask has hidden so far
        hides = ~past[:, width:].all(1)
        changed = hides if changed is None else changed | hides
    if tiers.hidden is not None:
        changed = tiers.hidden if changed is None else changed | tiers.hidden
    return replace(tiers, hidden=changed, shown=mask.clone())  # a copy: the caller may change the mask in place


def noted(tiers: Tiers, valid: Tensor | None) -> Tiers:
    """Return tiers that note new columns. `valid`, bool `[B, q]`, says which of them hold tokens; None means all."""
    if valid is None:
        return tiers
    batch, before = valid.shape[0], tiers.seen - valid.shape[1]
    shown = valid.new_ones(batch, before) if tiers.shown is None else tiers.shown
    shown = F.pad(shown, (0, before - shown.shape[1]), value=True)
    return replace(tiers, shown=torch.cat([shown, valid], 1))


def _of_ragged(tier: RaggedTier, columns: Tensor) -> Tensor:
    """Return the entry of `columns [B, seen]` for every token, bool `[N]`."""
    heads = (tier.cu_seqlens.shape[0] - 1) // columns.shape[0]
    return columns[tier.rows.ids // heads, tier.positions.long()]


def _of_dense(tier: DenseTier, columns: Tensor) -> Tensor:
    """Return the entry of `columns [B, seen]` for every slot that holds a token, bool `[B, C]`."""
    held = tier.held()
    return columns.gather(1, tier.positions.long().masked_fill(~held, 0)) & held


def _check_first(tiers: Tiers, hidden: Tensor) -> None:
    """Raise NotImplementedError if the marked columns, bool `[B, seen]`, take first tokens from the dense tier.

    Ragged tokens would then lie between these and the rest of the dense tier.
    """
    if tiers.dense_sinks and bool(_of_dense(tiers.dense, hidden)[:, : tiers.dense_sinks].any()):
        raise NotImplementedError(
            f"the attention mask hides one of the first {tiers.dense_sinks} tokens, which a cache with bits="
            f"{tiers.codec.bits} keeps as they are: pass sinks=0 or bits=16, or use DynamicCache"  # type: ignore[union-attr]
        )


def _holds(tiers: Tiers, columns: Tensor) -> Tensor:
    """Return whether any tier holds a token of the marked columns, bool `[B, seen]`; a bool scalar."""
    ragged = [_of_ragged(tier, columns).any() for tier in (tiers.condensed, tiers.sparse)]
    return torch.stack([*ragged, _of_dense(tiers.dense, columns).any()]).any()

"""Compare every forward of a model with an evicting cache with the oracle, whatever calls the model.

`Follower` records what the cache holds when each layer attends. It applies the calls that move, repeat and drop
rows and columns to its own copy of the past. After every forward it repeats the whole past densely, with that mask.
Where the cache quantises, it also records what the codes stand for, and checks that this never changes.
"""

from typing import Any

import torch
from torch import Tensor

from hardkv.cache.argument import CACHE
from tests.cache.conftest import ORACLE, Visibility, make_model


class Decoded:
    """What the codes of one layer stand for, as its cache shows it.

    `since` counts the columns of the past when a token was first quantised, int64 `[B, H, T]`, 0: never; `states` are
    keys and values `[B, H, T, D]`.
    """

    def __init__(self, since: Tensor, states: list[Tensor]):
        self.since, self.states = since, states

    @classmethod
    def empty(cls, *states: Tensor) -> "Decoded":
        """Nothing yet, for keys and values `[B, H, _, D]`."""
        none = [each.new_zeros(*each.shape[:2], 0, each.shape[3]) for each in states]
        return cls(torch.zeros(none[0].shape[:3], dtype=torch.long), none)

    def map(self, change: Any) -> "Decoded":
        """Change tensors whose first three dimensions are `[B, H, T]`."""
        return Decoded(change(self.since), [change(each) for each in self.states])

    def grown(self, columns: int) -> "Decoded":
        """Make room for a past of so many columns."""
        pad = columns - self.since.shape[2]
        return Decoded(
            torch.nn.functional.pad(self.since, (0, pad)),
            [torch.nn.functional.pad(each, (0, 0, 0, pad)) for each in self.states],
        )

    def cropped(self, columns: int) -> "Decoded":
        """Drop later columns. A crop may go back behind an event, into its window; what comes next reads codes."""
        kept = self.map(lambda each: each[:, :, :columns])
        return Decoded(kept.since.clamp_max(columns), kept.states)

    def note(self, cache: Any, layer_idx: int, columns: int) -> "Decoded":
        """Add what became codes before a forward that begins behind so many columns. Compare the older ones."""
        tiers, seen, grown = cache.layers[layer_idx].tiers, cache.observe(layer_idx), self.grown(columns)
        heads, coded = grown.since.shape[1], torch.zeros_like(grown.since, dtype=torch.bool)
        for tier in (tiers.condensed, tiers.sparse):
            coded[tier.rows.ids // heads, tier.rows.ids % heads, tier.positions.long()] = True
        place = seen.row // heads, seen.row % heads, seen.positions.long()
        read = (seen.keys, seen.values)
        now = [torch.zeros_like(each).index_put(place, new) for each, new in zip(grown.states, read, strict=True)]
        old = coded & (grown.since > 0)
        for each, new in zip(grown.states, now, strict=True):
            assert torch.equal(each[old], new[old])
        fresh = coded & ~old
        states = [torch.where(fresh[..., None], *each) for each in zip(now, grown.states, strict=True)]
        return Decoded(grown.since.masked_fill(fresh, columns), states)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Visibility.decoded`."""
        queries = torch.arange(self.since.shape[2])[:, None]
        since = self.since[:, :, None]
        return (since > 0) & (queries >= since), *self.states


class Follower:
    """Compare each forward of `model` that uses `cache` with the oracle.

    Args:
        model: from `make_model(name, ...)`. cache: an empty cache, some of whose methods are replaced on the object.
        name, arguments: as for `make_model`, to build the oracle with the same weights.

    `forwards` counts the comparisons, `evicted` those in which some head did not see all of its past.
    """

    def __init__(self, model: Any, cache: Any, name: str, atol: float = 2e-5, **arguments: Any):
        self.cache, self.atol = cache, atol
        self.oracle = make_model(name, ORACLE, **arguments)
        self.embed = self.oracle.get_input_embeddings()
        self.kept: dict[int, Any] = {}
        self.forwards = self.evicted = 0
        self._forget()
        for method in ("update", "reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset"):
            setattr(cache, method, self._around(method, getattr(cache, method)))
        self.hook = model.register_forward_hook(self._compare, with_kwargs=True)

    def _forget(self) -> None:
        self.embeds: Tensor | None = None  # [B, T, E], the whole past
        self.positions = torch.zeros(0, 0, dtype=torch.long)  # [B, T]
        self.layers: dict[int, Tensor] = {}  # as in Visibility
        self.decoded: dict[int, Decoded] = {}

    def _around(self, method: str, original: Any) -> Any:
        follow = getattr(self, "_" + method)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            follow(*args, **kwargs)
            return result

        return call

    # ------------------------------------------------------------------ what happens to the past

    def _update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        """Record a layer right before it attends: held events have run, and the new tokens are not stored yet."""
        if hasattr(self.cache.layers[layer_idx], "tiers"):
            nothing = [[torch.zeros(0, dtype=torch.long)] * keys.shape[1]] * keys.shape[0]
            self.kept[layer_idx] = self.cache.kept(layer_idx) or nothing
            if self.cache.settings.bits != 16:
                start, decoded = self.cache.layers[layer_idx].seen, self.decoded.get(layer_idx)
                decoded = decoded or Decoded.empty(keys, values)
                self.decoded[layer_idx] = decoded.note(self.cache, layer_idx, start) if start else decoded

    def _batch_select_indices(self, indices: Tensor) -> None:
        if self.embeds is not None:
            self.embeds, self.positions = self.embeds[indices], self.positions[indices]
            self.layers = {idx: seen[indices] for idx, seen in self.layers.items()}
            self.decoded = {idx: each.map(lambda x: x[indices]) for idx, each in self.decoded.items()}

    _reorder_cache = _batch_select_indices

    def _batch_repeat_interleave(self, repeats: int) -> None:
        if self.embeds is not None:
            self._batch_select_indices(torch.arange(len(self.embeds)).repeat_interleave(repeats))

    def _crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.embeds is not None:
            left = slice(0, max(0, self.embeds.shape[1] + tokens_to_remove))
            self.embeds, self.positions = self.embeds[:, left], self.positions[:, left]
            self.layers = {idx: seen[:, :, left, left] for idx, seen in self.layers.items()}
            self.decoded = {idx: each.cropped(left.stop) for idx, each in self.decoded.items()}

    def _reset(self) -> None:
        self._forget()

    # ------------------------------------------------------------------ a forward

    def _unhidden(self, exists: Tensor) -> dict[int, Any]:
        """Return what the cache held when the layers began, without columns that this forward's mask hides."""
        return {
            idx: [[head[row[head]] for head in heads] for row, heads in zip(exists, kept, strict=True)]
            for idx, kept in self.kept.items()
        }

    def _compare(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if kwargs.get(CACHE) is not self.cache:
            return
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = self.embed(args[0] if args else kwargs["input_ids"])
        batch, new = embeds.shape[:2]
        start = 0 if self.embeds is None else self.embeds.shape[1]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(start, start + new)[None]
        self.embeds = embeds if self.embeds is None else torch.cat([self.embeds, embeds], 1)
        past = self.positions if start else self.positions.new_zeros(batch, 0)
        self.positions = torch.cat([past, positions.expand(batch, -1)], 1)
        mask = kwargs.get("attention_mask")
        visibility = Visibility(torch.ones(batch, start + new) if mask is None else mask)
        visibility.layers = {
            idx: torch.nn.functional.pad(seen, (0, new, 0, new)) for idx, seen in self.layers.items() if start
        }
        visibility.add(start, start + new, self._unhidden(visibility.exists))
        self.layers = visibility.layers
        visibility.decoded = {idx: each.grown(start + new).read() for idx, each in self.decoded.items()}
        with torch.no_grad():
            expected = self.oracle(
                inputs_embeds=self.embeds, position_ids=self.positions, use_cache=False, oracle=visibility
            ).logits
        exists = visibility.exists[:, start:][:, -out.logits.shape[1] :]
        expected = expected[:, start:][:, -out.logits.shape[1] :]
        assert out.logits.dtype == expected.dtype
        torch.testing.assert_close(out.logits[exists], expected[exists], atol=self.atol, rtol=0)
        self.forwards += 1
        newest = visibility.exists.sum(1)[:, None] * visibility.exists[:, -1:]
        self.evicted += any(bool((seen[:, :, -1].sum(-1) < newest).any()) for seen in self.layers.values())

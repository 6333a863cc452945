"""A selection event: score every held token, apply the budget, condense. Pure: new tiers out, nothing changed.

The first half leaves everything on the device; the second knows the sizes of the new tiers, which the host reads for as
many layers at once as have an event. Layers that are alike go through the first half together, as further sequences of
a batch: what an event costs is launching kernels, unless the batch is large.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hardkv.cache.hiding import UNREAD
from hardkv.cache.merged import Merged, Selection
from hardkv.cache.queries import QueryRing, newest_of
from hardkv.cache.tiers import Tiers, rows_of
from hardkv.config import HardKVConfig
from hardkv.kernels.rows import count_per_row, padded_index
from hardkv.selectors.budgets import Budget
from hardkv.selectors.observation import Observation
from hardkv.selectors.temperatures import fit_temperatures

# Keys that layers in one event may copy for scoring: these bytes, or this share of the keys of all layers.
TOGETHER_BYTES = 64 << 20
TOGETHER_SHARE = 1 / 6


@dataclass(frozen=True)
class Event:
    """What an event of one layer needs to know.

    Args:
        settings: scorer, window, sinks, interval, patience. budget: this layer's.
        pinned: columns of the prompt that are kept whatever their score, 0 for none.
        scale, softcap: of the layer's attention.
        temperatures: `[H]`, of this layer's heads, calibrated before; None without.
        latent: width of the latents where the keys are latents and rotated keys, joined, and the values the latents.
    """

    settings: HardKVConfig
    budget: Budget
    pinned: int
    scale: float
    softcap: float | None
    temperatures: Tensor | None = None
    latent: int | None = None

    def kind(self, tiers: Tiers, ring: QueryRing) -> tuple[Any, ...]:
        """What layers must have in common to be scored together."""
        keys, values = tiers.dense.keys, tiers.dense.values
        shape = *keys.shape[:2], keys.shape[-1], values.shape[-1], ring.buffer.shape[1]
        queries = tiers.seen, min(ring.available(tiers.seen), self.settings.window), ring.capacity
        fitted = self.budget.calibration_p if any(self.due(tiers)) else None
        given = self.temperatures is None, tiers.temperatures is None
        attention = self.scale, self.softcap, self.latent
        return keys.device, keys.dtype, shape, queries, attention, self.pinned, fitted, given

    def due(self, tiers: Tiers) -> list[bool]:
        """Of every sequence, whether its temperatures are fitted now if it has candidates; each counts for itself."""
        refit, batch = self.settings.refit, tiers.shape[0]
        if self.settings.calibration != "online":
            return [False] * batch
        return [
            first is None or bool(refit and (tiers.events - first) % refit == 0)
            for first in tiers.fitted or (None,) * batch
        ]


def groups(events: Sequence[Event], tiers: Sequence[Tiers], rings: Sequence[QueryRing]) -> Iterator[list[int]]:
    """Which layers, by index, go through `select` together: neighbours that are alike, within the bounds on memory."""
    sizes = [each.key_bytes for each in tiers]
    most = max(TOGETHER_BYTES, sum(sizes) * TOGETHER_SHARE)
    group: list[int] = []
    for i, event in enumerate(events):
        if group and not (
            getattr(event.settings.scorer, "across_layers", False)
            and event.kind(tiers[i], rings[i]) == events[group[0]].kind(tiers[group[0]], rings[group[0]])
            and sum(sizes[j] for j in [*group, i]) <= most
        ):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def select(events: Sequence[Event], layers: Sequence[Tiers], rings: Sequence[QueryRing]) -> Selection:
    """What stays in layers that are alike (`groups`); the host waits for the device only where temperatures are fitted.

    With calibration "online" that is while a sequence has had no candidates yet, and when it is fitted again.
    """
    settings, scorer = events[0].settings, events[0].settings.scorer
    merged = Merged.of(layers, settings.window, settings.sinks, events[0].pinned)
    temperatures, fitted = [each.temperatures for each in layers], [each.fitted for each in layers]
    if not merged.rows.total:  # a chunk of pads only: there is nothing to score, nor to fit
        keep, sound = merged.stays, torch.ones((), dtype=torch.bool, device=merged.stays.device)
        return Selection.of(layers, merged, keep, sound, settings.patience, temperatures, fitted)
    observation = _observe(events[0], layers, rings, merged)
    z = scorer.score(observation)  # type: ignore[union-attr]
    _check_shape(z, observation, scorer)
    if settings.calibration == "online":
        temperatures, fitted = _fit(events, layers, z, observation)
    else:
        temperatures = [
            old if old is not None or event.temperatures is None else event.temperatures.to(z).repeat(len(tiers.tokens))
            for event, old, tiers in zip(events, temperatures, layers, strict=True)
        ]
    keep = _keep(events, z, observation, merged, temperatures)
    return Selection.of(layers, merged, keep, torch.isfinite(z).all(), settings.patience, temperatures, fitted)


def check(event: Event, sizes: Sequence[int]) -> None:
    """Raise for what the device noticed, by a layer's `Selection.sizes`.

    Raises:
        ValueError: scores that are not finite.
        NotImplementedError: steps of one token whose masks said of past columns what no mask had said before.
    """
    *_, sound, hidden = sizes
    if hidden:
        raise NotImplementedError(UNREAD.format(hidden))
    if not sound:
        raise ValueError(
            f"scorer {event.settings.scorer!r} returned NaN or infinite scores; return log-scores, such as "
            "torch.log(s + 1e-38) for s >= 0"
        )


def condense(event: Event, tiers: Tiers, ring: QueryRing) -> Tiers:
    """The tiers of one layer after its event; `tiers` and `ring` are only read, so that a failure loses nothing.

    Raises:
        ValueError: the scorer did not keep to its contract.
    """
    selection = select([event], [tiers], [ring])
    sizes = selection.sizes.tolist()
    check(event, sizes[0])
    index = selection.index(sizes)[0]
    return selection.finish(0, tiers, index, sizes[0], event.settings.window, event.settings.interval)


def observe(event: Event, tiers: Tiers, ring: QueryRing) -> Observation:
    """What an event of one layer shows its scorer; nothing is changed."""
    merged = Merged.of([tiers], event.settings.window, event.settings.sinks, event.pinned)
    return _observe(event, [tiers], [ring], merged)


def _keep(
    events: Sequence[Event],
    z: Tensor,
    observation: Observation,
    merged: Merged,
    temperatures: Sequence[Tensor | None],
) -> Tensor:
    """The kept set, bool `[N]`: by one budget where all layers' can be one."""
    if len(events) == 1:
        return events[0].budget.select(z, observation, temperatures[0])
    budget = events[0].budget.together([event.budget for event in events])
    if budget is not None:
        given = [each for each in temperatures if each is not None]
        return budget.select(z, observation, torch.cat(given) if len(given) == len(events) else None)
    parts = z.split(merged.totals)
    observations = observation.split(merged.layers)
    return torch.cat(
        [event.budget.select(*each) for event, *each in zip(events, parts, observations, temperatures, strict=True)]
    )


def _fit(
    events: Sequence[Event], layers: Sequence[Tiers], z: Tensor, observation: Observation
) -> tuple[list[Tensor | None], list[tuple[int | None, ...]]]:
    """Temperatures of every layer, and `Tiers.fitted`.

    Of the sequences that are due and have candidates, whatever others have: those at which this event's scores spread
    like its attention.
    """
    settings, heads = events[0].settings, observation.num_kv_heads
    due = [each for event, tiers in zip(events, layers, strict=True) for each in event.due(tiers)]
    known, fitted = [tiers.temperatures for tiers in layers], [tiers.fitted for tiers in layers]
    if not any(due) or observation.max_length <= settings.window + settings.sinks:  # all is protected
        return known, fitted
    candidates = count_per_row(~observation.protected, observation.cu_seqlens).view(-1, heads).any(1).tolist()
    chosen = [i for i, each in enumerate(due) if each and candidates[i]]
    if not chosen:
        return known, fitted
    rows = rows_of(torch.tensor(chosen, device=z.device), heads)
    index, valid = padded_index(observation.cu_seqlens[:-1][rows], observation.lengths[rows], observation.max_length)

    def sample(flat: Tensor, fill: float) -> Tensor:  # [rows, 1, longest row]
        return torch.where(valid, flat[index], fill)[:, None]

    new = fit_temperatures(
        sample(z, -torch.inf),
        sample(observation.attention, 0.0),
        events[0].budget.calibration_p,
        mask=sample(~observation.protected, False),
        solver="bisect",  # exact for one sample
    ).temperatures
    batch = layers[0].shape[0]
    ones = new.new_ones(batch * heads)
    temperatures = torch.cat([ones if old is None else old for old in known])
    temperatures[rows] = new
    times = [
        tiers.events if layer * batch + i in chosen and first is None else first
        for layer, tiers in enumerate(layers)
        for i, first in enumerate(tiers.fitted or (None,) * batch)
    ]
    parts = temperatures.chunk(len(layers))
    # copies: no layer's keep the others' alive
    return [part.clone() for part in parts], [
        tuple(times[layer * batch : (layer + 1) * batch]) for layer in range(len(layers))
    ]


def _observe(event: Event, layers: Sequence[Tiers], rings: Sequence[QueryRing], merged: Merged) -> Observation:
    seen = layers[0].seen
    count = min(event.settings.window, rings[0].available(seen))
    queries, valid = newest_of(rings, count, seen)
    keys = merged.gather(layers, 0)
    load_values: Callable[[], Tensor] = partial(merged.gather, layers, 1)
    if event.latent is not None:
        load_values = partial(Tensor.narrow, keys, 1, 0, event.latent)
    return Observation(
        keys=keys,
        load_values=load_values,
        positions=merged.positions,
        cu_seqlens=merged.rows.cu_seqlens,
        longest=merged.rows.longest,
        queries=queries,
        query_positions=torch.arange(seen - count, seen, device=queries.device),
        query_valid=valid,
        seen=layers[0].tokens if len(layers) == 1 else torch.cat([tiers.tokens for tiers in layers]),
        protected=merged.protected,
        newest=merged.newest,
        scale=event.scale,
        window=event.settings.window,
        softcap=event.softcap,
    )


def _check_shape(z: Any, observation: Observation, scorer: Any) -> None:
    """Raise ValueError unless a scorer returned one number a token."""
    tokens = observation.keys.shape[0]
    if not isinstance(z, Tensor) or z.shape != (tokens,) or not z.is_floating_point():
        got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"scorer {scorer!r} returned {got}; expected one floating-point score per token, [{tokens}]")

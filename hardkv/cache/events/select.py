"""A selection event: score every held token, apply the budget, choose the tokens that stay. It changes nothing.

Everything runs on the device; afterwards the host reads the sizes of the new tiers, for all layers of an event at once
(`events.run`). Layers that are alike are processed together, as more sequences of a batch, because kernel launches are
most of an event's cost unless the batch is large.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hardkv.cache.events.held import HeldTokens
from hardkv.cache.events.inputs import EventInputs
from hardkv.cache.events.selection import Selection
from hardkv.cache.storage.queries import newest_of
from hardkv.cache.storage.tiers import rows_of
from hardkv.kernels.rows import count_per_row, padded_index
from hardkv.selectors.observation import Observation
from hardkv.selectors.temperatures import fit_temperatures

# Layers scored together may copy at most these bytes of keys, or this share of all layers' keys if that is more.
TOGETHER_BYTES = 64 << 20
TOGETHER_SHARE = 1 / 6


def groups(inputs: Sequence[EventInputs]) -> Iterator[list[int]]:
    """Yield lists of layer indices for one `select` call: neighbours that are alike and within the memory bound."""
    sizes = [each.tiers.key_bytes for each in inputs]
    most = max(TOGETHER_BYTES, sum(sizes) * TOGETHER_SHARE)
    group: list[int] = []
    for i, each in enumerate(inputs):
        if group and not (
            getattr(each.settings.scorer, "across_layers", False)
            and each.kind == inputs[group[0]].kind
            and sum(sizes[j] for j in [*group, i]) <= most
        ):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def select(inputs: Sequence[EventInputs]) -> Selection:
    """Choose the tokens that stay in layers that are alike (see `groups`).

    The host waits for the device only if temperatures are fitted: with calibration "online", until every sequence has
    been fitted once, and at each refit.

    Raises:
        ValueError: the scorer did not return one score per token.
    """
    settings, scorer, layers = inputs[0].settings, inputs[0].settings.scorer, [each.tiers for each in inputs]
    held = HeldTokens.of(layers, settings.window, settings.sinks, inputs[0].pinned)
    temperatures, fitted = [each.temperatures for each in layers], [each.fitted for each in layers]
    if not held.rows.total:  # the chunk held only pads: there is nothing to score or fit
        keep, sound = held.stays, torch.ones((), dtype=torch.bool, device=held.stays.device)
        return Selection.of(layers, held, keep, sound, settings.patience, temperatures, fitted)
    observation = _observe(inputs, held)
    z = scorer.score(observation)  # type: ignore[union-attr]
    _check_shape(z, observation, scorer)
    if settings.calibration == "online":
        temperatures, fitted = _fit(inputs, z, observation)
    else:
        temperatures = [_given(each, z) for each in inputs]
    keep = _keep(inputs, z, observation, held, temperatures)
    return Selection.of(layers, held, keep, torch.isfinite(z).all(), settings.patience, temperatures, fitted)


def observe(inputs: EventInputs) -> Observation:
    """Return the observation that an event of one layer passes to its scorer."""
    settings = inputs.settings
    return _observe([inputs], HeldTokens.of([inputs.tiers], settings.window, settings.sinks, inputs.pinned))


def _given(inputs: EventInputs, z: Tensor) -> Tensor | None:
    """Return the temperatures of one layer's rows, `[R]`: the current ones, else the calibrated ones, else None."""
    if inputs.tiers.temperatures is not None or inputs.temperatures is None:
        return inputs.tiers.temperatures
    return inputs.temperatures.to(z).repeat(inputs.tiers.shape[0])


def _keep(
    inputs: Sequence[EventInputs],
    z: Tensor,
    observation: Observation,
    held: HeldTokens,
    temperatures: Sequence[Tensor | None],
) -> Tensor:
    """Return the kept set, bool `[N]`. One budget selects for all layers if their budgets can be joined."""
    if len(inputs) == 1:
        return inputs[0].budget.select(z, observation, temperatures[0])
    budget = inputs[0].budget.joint([each.budget for each in inputs])
    if budget is not None:
        given = [each for each in temperatures if each is not None]
        return budget.select(z, observation, torch.cat(given) if len(given) == len(inputs) else None)
    parts = z.split(held.totals)
    observations = observation.split(held.layers)
    return torch.cat(
        [each.budget.select(*given) for each, *given in zip(inputs, parts, observations, temperatures, strict=True)]
    )


def _fit(
    inputs: Sequence[EventInputs], z: Tensor, observation: Observation
) -> tuple[list[Tensor | None], list[tuple[int | None, ...]]]:
    """Return the temperatures of every layer, and `Tiers.fitted` of every layer.

    A sequence is fitted if it is due and has candidates, independently of the others. Fitted temperatures make the
    scores of this event spread like its attention.
    """
    settings, heads, layers = inputs[0].settings, observation.num_kv_heads, [each.tiers for each in inputs]
    due = [sequence for each in inputs for sequence in each.due]
    known, fitted = [tiers.temperatures for tiers in layers], [tiers.fitted for tiers in layers]
    if not any(due) or observation.max_length <= settings.window + settings.sinks:  # all tokens are protected
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
        inputs[0].budget.calibration_p,
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
    # copies, so that no layer keeps the memory of the others alive
    return [part.clone() for part in parts], [
        tuple(times[layer * batch : (layer + 1) * batch]) for layer in range(len(layers))
    ]


def _observe(inputs: Sequence[EventInputs], held: HeldTokens) -> Observation:
    first, layers = inputs[0], [each.tiers for each in inputs]
    seen, window = layers[0].seen, first.settings.window
    count = min(window, first.ring.available(seen))
    queries, valid = newest_of([each.ring for each in inputs], count, seen)
    keys = held.gather(layers, 0)
    load_values: Callable[[], Tensor] = partial(held.gather, layers, 1)
    if first.latent is not None:
        load_values = partial(Tensor.narrow, keys, 1, 0, first.latent)
    return Observation(
        keys=keys,
        load_values=load_values,
        positions=held.positions,
        cu_seqlens=held.rows.cu_seqlens,
        longest=held.rows.longest,
        queries=queries,
        query_positions=torch.arange(seen - count, seen, device=queries.device),
        query_valid=valid,
        tokens=layers[0].tokens if len(layers) == 1 else torch.cat([tiers.tokens for tiers in layers]),
        protected=held.protected,
        window_mask=held.window_mask,
        scale=first.scale,
        window=window,
        softcap=first.softcap,
    )


def _check_shape(z: Any, observation: Observation, scorer: Any) -> None:
    """Raise ValueError unless the scorer returned one floating-point number per token."""
    tokens = observation.keys.shape[0]
    if not isinstance(z, Tensor) or z.shape != (tokens,) or not z.is_floating_point():
        got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"scorer {scorer!r} returned {got}; expected one floating-point score per token, [{tokens}]")

"""A selection event: score every held token, apply the budget, condense. Pure: new tiers out, nothing changed.

The first half leaves everything on the device; the second knows the sizes of the new tiers, which the host reads for as
many layers at once as have an event.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardkv.cache.queries import QueryRing
from hardkv.cache.tiers import Merged, Selection, Tiers
from hardkv.config import HardKVConfig
from hardkv.selectors.budgets import Budget
from hardkv.selectors.calibration import fit_temperatures
from hardkv.selectors.observation import Observation


@dataclass(frozen=True)
class Event:
    """What an event of one layer needs to know.

    Args:
        settings: scorer, window, sinks, interval, patience. budget: this layer's.
        pinned: columns of the prompt that are kept whatever their score, 0 for none.
        scale, softcap: of the layer's attention.
        temperatures: `[H]`, of this layer's heads, calibrated before; None without.
    """

    settings: HardKVConfig
    budget: Budget
    pinned: int
    scale: float
    softcap: float | None
    temperatures: Tensor | None = None

    def condense(self, tiers: Tiers, ring: QueryRing) -> Tiers:
        """The tiers after the event; `tiers` and `ring` are only read, so that a failure loses nothing.

        Raises:
            ValueError: the scorer did not keep to its contract.
        """
        selection = self.select(tiers, ring)
        sizes = selection.sizes.tolist()
        self.check(sizes)
        return self.finish(tiers, selection, sizes)

    def select(self, tiers: Tiers, ring: QueryRing) -> Selection:
        """What stays; the host does not wait for the device."""
        settings, scorer = self.settings, self.settings.scorer
        merged = tiers.merged(settings.window, settings.sinks, self.pinned)
        observation = self._observe(tiers, ring, merged)
        z = scorer.score(observation)  # type: ignore[union-attr]
        _check_shape(z, observation, scorer)
        temperatures = tiers.temperatures
        if settings.calibration == "online":
            if temperatures is None or (settings.refit and tiers.events % settings.refit == 0):
                fitted = self._fit(z, observation)
                temperatures = temperatures if fitted is None else fitted
        elif temperatures is None and self.temperatures is not None:
            temperatures = self.temperatures.to(z).repeat(observation.batch_size)
        keep = self.budget.select(z, observation, temperatures)
        return Selection.of(tiers, merged, keep, torch.isfinite(z).all(), settings.patience, temperatures)

    def check(self, sizes: list[int]) -> None:
        """Raise ValueError if the scores behind a selection's `sizes` were not finite."""
        if not sizes[-1]:
            raise ValueError(
                f"scorer {self.settings.scorer!r} returned NaN or infinite scores; return log-scores, such as "
                "torch.log(s + 1e-38) for s >= 0"
            )

    def finish(self, tiers: Tiers, selection: Selection, sizes: list[int]) -> Tiers:
        """The tiers after the event; `sizes` is the selection's, read on the host."""
        return tiers.condense(selection, sizes, window=self.settings.window, interval=self.settings.interval)

    def _fit(self, z: Tensor, observation: Observation) -> Tensor | None:
        """Temperatures `[R]` at which this event's scores spread like its attention; None while all is protected."""
        if observation.max_length <= self.settings.window + self.settings.sinks:
            return None

        def sample(flat: Tensor, fill: float) -> Tensor:  # [R, 1, longest row]
            return observation.to_padded(flat, fill).flatten(0, 1)[:, None]

        return fit_temperatures(
            sample(z, -torch.inf),
            sample(observation.attention, 0.0),
            self.budget.calibration_p,
            mask=sample(~observation.protected, False),
            solver="bisect",  # exact for one sample
        ).temperatures

    def _observe(self, tiers: Tiers, ring: QueryRing, merged: Merged) -> Observation:
        keys, values = tiers.gather(merged.address)
        queries, columns, valid = ring.newest(self.settings.window, tiers.seen)
        return Observation(
            keys=keys,
            values=values,
            positions=merged.positions,
            cu_seqlens=merged.rows.cu_seqlens,
            longest=merged.rows.longest,
            queries=queries,
            query_positions=columns,
            query_valid=valid,
            seen=tiers.tokens,
            protected=merged.protected,
            scale=self.scale,
            window=self.settings.window,
            softcap=self.softcap,
        )


def _check_shape(z: Any, observation: Observation, scorer: Any) -> None:
    """Raise ValueError unless a scorer returned one number a token."""
    tokens = observation.keys.shape[0]
    if not isinstance(z, Tensor) or z.shape != (tokens,) or not z.is_floating_point():
        got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"scorer {scorer!r} returned {got}; expected one floating-point score per token, [{tokens}]")

"""The inputs of a selection event of one layer."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hardkv.cache.storage.pool import Pool
from hardkv.cache.storage.queries import QueryRing
from hardkv.cache.storage.tiers import Tiers
from hardkv.config import HardKVConfig
from hardkv.selectors.budgets import Budget


@dataclass(frozen=True)
class EventInputs:
    """The inputs of an event of one layer. The event only reads them, except for `pool`.

    Args:
        settings: scorer, window, sinks, interval, patience. budget: the layer's.
        tiers, ring: the tokens that the layer holds, and the queries that score them.
        pinned: columns of the prompt that are kept whatever their score; 0 for none.
        scale, softcap: of the layer's attention.
        temperatures: `[H]`, per head of this layer, from a calibration; None without one.
        latent: width of the latents, if the layer stores latents: then a key is a latent joined with a rotated key, and
            a value is the latent. None for other layers.
        pool: where to put the new tiers; None: in new memory.
    """

    settings: HardKVConfig
    budget: Budget
    tiers: Tiers = field(repr=False)
    ring: QueryRing = field(repr=False)
    pinned: int
    scale: float
    softcap: float | None
    temperatures: Tensor | None = None
    latent: int | None = None
    pool: Pool | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be equal in layers for them to be scored together."""
        tiers, ring = self.tiers, self.ring
        keys, values = tiers.dense.keys, tiers.dense.values
        shape = *keys.shape[:2], keys.shape[-1], values.shape[-1], ring.buffer.shape[1]
        queries = tiers.seen, min(ring.available(tiers.seen), self.settings.window), ring.capacity
        fitted = self.budget.calibration_p if any(self.due) else None
        given = self.temperatures is None, tiers.temperatures is None
        attention = self.scale, self.softcap, self.latent
        return keys.device, keys.dtype, shape, queries, attention, self.pinned, fitted, given

    @property
    def due(self) -> list[bool]:
        """Per sequence, whether its temperatures are fitted at this event, provided that it has candidates."""
        refit, tiers = self.settings.refit, self.tiers
        batch = tiers.shape[0]
        if self.settings.calibration != "online":
            return [False] * batch
        return [
            first is None or bool(refit and (tiers.events - first) % refit == 0)
            for first in tiers.fitted or (None,) * batch
        ]

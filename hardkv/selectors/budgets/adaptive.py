"""Adaptive: Top-p with an exact total."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hardkv.kernels.selection import share_of_best
from hardkv.selectors.budgets.bounds import candidate_bounds, check_bounds
from hardkv.selectors.budgets.budget import FixedTotal, register_budget
from hardkv.selectors.checks import settle
from hardkv.selectors.ranking import Ranking


@register_budget("adaptive")
@dataclass(frozen=True)
class Adaptive(FixedTotal):
    """Top-p at the p, one per layer and sequence, for which the heads' total is exact: fixed bytes, free shares.

    Each candidate has the mass that its head would lose with it and all worse ones (`Ranking.mass_lost`). The layer
    keeps the candidates with the largest such masses; a head's kept set stays a prefix of its order.

    Args:
        n: mean tokens kept per head, protected ones included.
        floor: fewest tokens per head, protected ones included; at most n.
        cap: most tokens per head, protected ones included. None: no bound.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    floor: int = 0
    cap: int | None = None
    uses_temperature = True

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, **check_bounds(self.floor, self.cap))
        if self.floor > self.n:
            raise ValueError(f"floor={self.floor} must be <= n={self.n}")
        if self.cap is not None and self.cap < self.n:
            raise ValueError(f"cap={self.cap} must be >= n={self.n}, the mean")

    def with_n(self, n: int) -> "Adaptive":
        """Return the same budget for another mean; floor and cap are moved where they exclude it."""
        return replace(self, n=n, floor=min(self.floor, n), cap=None if self.cap is None else max(self.cap, n))

    def counts(self, ranking: Ranking) -> Tensor:
        low, high = candidate_bounds(self.floor, self.cap, ranking)
        order = torch.arange(ranking.z.shape[1], device=ranking.z.device)
        lost = ranking.mass_lost.masked_fill(order >= high[:, None], -torch.inf)
        lost = lost.masked_fill(order < low[:, None], torch.inf)
        total = ranking.per_head(self.room(ranking)).sum(1)
        positions = ranking.observation.positions[ranking.token]
        return share_of_best(ranking.per_head(lost), ranking.per_head(positions), total).flatten()

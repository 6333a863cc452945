"""The budget contract: scores in, kept sets out, all rows of a layer at once.

Every public count (n, floor, cap) includes the protected tokens F of a row and holds right after an event.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hardkv.selectors.budgets.curves import RiskCurves
from hardkv.selectors.checks import check_count, settle
from hardkv.selectors.observation import Observation
from hardkv.selectors.ranking import Ranking
from hardkv.selectors.registry import add_to_registry

BUDGETS: "dict[str, type[Budget]]" = {}


def register_budget(name: str):
    """Class decorator: give a budget, a frozen dataclass, a name for JSON.

    Raises:
        ValueError: the name is a built-in's.
    """
    return partial(add_to_registry, BUDGETS, name)


class Budget(ABC):
    """Turns log-scores into kept sets. Subclasses are frozen dataclasses of hyperparameters that implement `counts`."""

    #: Whether calibrated temperatures change what the budget keeps.
    uses_temperature = False
    #: Whether it needs measured risk curves.
    uses_risk = False
    #: The mass at which temperatures are fitted for this budget.
    calibration_p = 0.9
    #: How many KV heads of a layer it knows one by one; None: it treats whatever heads come.
    known_heads: int | None = None

    @abstractmethod
    def counts(self, ranking: Ranking) -> Tensor:
        """How many of its best candidates every row keeps, int64 `[R]`; more than it has means all."""

    def for_layers(
        self, num_layers: int | None, num_protected: int, curves: RiskCurves | None = None
    ) -> "Sequence[Budget]":
        """The budgets of the layers that a cache compresses, in order.

        Args:
            num_layers: how many; None: not known, which asks for one budget that serves any layer.
            num_protected: the usual |F| (window + sinks).
            curves: measured risk curves of these layers; None without.

        Raises:
            ValueError: the budget needs what is not given.
        """
        return [self] * (1 if num_layers is None else num_layers)

    def joint(self, budgets: "Sequence[Budget]") -> "Budget | None":
        """One budget for several layers, whose sequences follow one another as if they were one batch.

        Args:
            budgets: those of the layers, this one first.

        Returns:
            A budget, or None, the default: every layer selects for itself.
        """
        return None

    def for_heads(self, first: int, last: int) -> "Budget":
        """The budget of a process that computes only heads `first` to `last - 1` (tensor parallelism)."""
        return self

    @property
    def limit(self) -> int | None:
        """The tokens a row of mean length may keep, F included; None without a bound."""
        return None

    @property
    def smallest(self) -> tuple[str, int] | None:
        """The count, with its name, that must exceed the protected tokens; None without one."""
        return None

    def fixed_total(self, heads: int, length: int, protected: int) -> int | None:
        """The most tokens that all heads of a layer together keep of a sequence, F included; None: it depends.

        Args:
            heads: KV heads of the layer.
            length: tokens that the sequence may have had by then.
            protected: the most tokens that are protected in a head.
        """
        return None

    def tensors(self, device: torch.device) -> list[Tensor]:
        """What the budget itself holds on a cache's device, for counting bytes; layers may share it."""
        return []

    def select(self, z: Tensor, observation: Observation, temperature: Tensor | None = None) -> Tensor:
        """The kept set.

        Args:
            z: log-scores `[N]` from a scorer, higher = keep.
            observation: the tokens they belong to.
            temperature: `[R]`, what Top-p budgets divide z by; 1 when None.

        Returns:
            bool `[N]`: protected tokens always, and of every row a prefix of its candidates ordered by z (ties: the
            newer token first).
        """
        ranking = Ranking.of(z, observation, temperature)
        return ranking.keep(self.counts(ranking))


@dataclass(frozen=True)
class FixedTotal(Budget):
    """What budgets with a mean of n tokens a head share."""

    n: int

    def __post_init__(self) -> None:
        settle(self, n=check_count("n", self.n, 1))

    def joint(self, budgets: Sequence[Budget]) -> Budget | None:
        return self if all(each == self for each in budgets) else None

    @property
    def limit(self) -> int:
        return self.n

    @property
    def smallest(self) -> tuple[str, int]:
        return "n", self.n

    def fixed_total(self, heads: int, length: int, protected: int) -> int:
        return heads * min(max(self.n, protected), length)

    def with_n(self, n: int) -> "FixedTotal":
        """The same budget for another mean."""
        return replace(self, n=n)

    def room(self, ranking: Ranking) -> Tensor:
        """n - |F|, at least 0, int64 `[R]`."""
        return (self.n - ranking.num_protected).clamp_min(0)

"""The budget contract: a budget turns the scores of all rows of a layer into kept sets.

Every public count (n, floor, cap) includes the protected tokens F of a row, and holds right after an event.
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
    """Class decorator that registers a budget, a frozen dataclass, under a name for JSON.

    Raises:
        ValueError: a built-in has this name.
    """
    return partial(add_to_registry, BUDGETS, name)


class Budget(ABC):
    """Turns log-scores into kept sets. Subclasses are frozen dataclasses of hyperparameters that implement `counts`."""

    #: Whether calibrated temperatures change what the budget keeps.
    uses_temperature = False
    #: Whether the budget needs measured risk curves.
    uses_risk = False
    #: The attention mass for which this budget's temperatures are fitted.
    calibration_p = 0.9
    #: How many KV heads of a layer the budget knows one by one; None: it works for any number of heads.
    known_heads: int | None = None

    @abstractmethod
    def counts(self, ranking: Ranking) -> Tensor:
        """Return how many of its best candidates each row keeps, int64 `[R]`; a row with fewer keeps all."""

    def for_layers(
        self, num_layers: int | None, num_protected: int, curves: RiskCurves | None = None
    ) -> "Sequence[Budget]":
        """Return one budget per compressed layer of a cache, in order.

        Args:
            num_layers: number of compressed layers; None: not known, which asks for one budget that serves any layer.
            num_protected: the usual |F|, window + sinks.
            curves: measured risk curves of these layers; None without.

        Raises:
            ValueError: the budget needs an argument that is None.
        """
        return [self] * (1 if num_layers is None else num_layers)

    def joint(self, budgets: "Sequence[Budget]") -> "Budget | None":
        """Return one budget for several layers, whose sequences follow one another as if they were one batch.

        Args:
            budgets: the budgets of the layers, this one first.

        Returns:
            A budget; or None, the default: each layer selects with its own budget.
        """
        return None

    def for_heads(self, first: int, last: int) -> "Budget":
        """Return the budget of a process that computes only heads `first` to `last - 1` (tensor parallelism)."""
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens that a row keeps on average, F included; None without a bound."""
        return None

    @property
    def smallest(self) -> tuple[str, int] | None:
        """Name and value of the count that must exceed the number of protected tokens; None without one."""
        return None

    def fixed_total(self, heads: int, length: int, protected: int) -> int | None:
        """Return the most tokens of a sequence that all heads of a layer keep in total, F included; None: not fixed.

        Args:
            heads: number of KV heads of the layer.
            length: the most tokens that the sequence may have by then.
            protected: the most protected tokens per head.
        """
        return None

    def tensors(self, device: torch.device) -> list[Tensor]:
        """The tensors that the budget holds on a cache's device, for counting bytes; layers may share them."""
        return []

    def select(self, z: Tensor, observation: Observation, temperature: Tensor | None = None) -> Tensor:
        """Return the kept set.

        Args:
            z: log-scores `[N]` from a scorer; higher scores are kept.
            observation: the tokens that z belongs to.
            temperature: `[R]`, by which Top-p budgets divide z; None: 1.

        Returns:
            bool `[N]`: the protected tokens, and a prefix of each row's candidates in descending order of z (ties: the
            newer token first).
        """
        ranking = Ranking.of(z, observation, temperature)
        return ranking.keep(self.counts(ranking))


@dataclass(frozen=True)
class FixedTotal(Budget):
    """Base class of budgets with a mean of n tokens per head."""

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
        """Return the same budget for another mean."""
        return replace(self, n=n)

    def room(self, ranking: Ranking) -> Tensor:
        """n - |F| per row, at least 0, int64 `[R]`."""
        return (self.n - ranking.num_protected).clamp_min(0)

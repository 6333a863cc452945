"""TopK: every head keeps the same number of tokens."""

from dataclasses import dataclass

from torch import Tensor

from hardkv.selectors.budgets.budget import FixedTotal, register_budget
from hardkv.selectors.ranking import Ranking


@register_budget("topk")
@dataclass(frozen=True)
class TopK(FixedTotal):
    """Every head keeps its n - |F| best tokens.

    Args:
        n: tokens kept per head, protected ones included.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    def counts(self, ranking: Ranking) -> Tensor:
        return self.room(ranking)

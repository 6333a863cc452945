"""TopP: each head keeps a share of the attention mass."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hardkv.selectors.budgets.bounds import candidate_bounds, check_bounds
from hardkv.selectors.budgets.budget import Budget, register_budget
from hardkv.selectors.checks import check_fraction, settle
from hardkv.selectors.ranking import Ranking


@register_budget("topp")
@dataclass(frozen=True)
class TopP(Budget):
    """HARD-KV's Top-p (https://arxiv.org/abs/2606.28831): each head keeps its best tokens, as few as hold mass p.

    Scores are read as probabilities, P = softmax(z / T) over the candidates. Protected tokens count toward p with the
    attention that they receive, A(F), so the kept candidates must hold the share (p - A(F)) / (1 - A(F)) of P.

    Args:
        p: mass to keep, in (0, 1]; p = 1 keeps all tokens and ignores floor and cap.
        floor: fewest tokens per head, protected ones included (a head with fewer keeps all).
        cap: most tokens per head, protected ones included; it bounds the memory. None: no bound.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    p: float
    floor: int = 0
    cap: int | None = 4096
    uses_temperature = True

    def __post_init__(self) -> None:
        settle(self, p=check_fraction("p", self.p, low_open=True), **check_bounds(self.floor, self.cap))

    @property
    def calibration_p(self) -> float:  # type: ignore[override]
        """The mass for which temperatures are fitted: p."""
        return self.p

    def joint(self, budgets: Sequence[Budget]) -> Budget | None:
        return self if all(each == self for each in budgets) else None

    @property
    def limit(self) -> int | None:
        return None if self.p == 1 else self.cap

    @property
    def smallest(self) -> tuple[str, int] | None:
        return None if self.p == 1 or self.cap is None else ("cap", self.cap)

    def counts(self, ranking: Ranking) -> Tensor:
        if self.p == 1:
            return ranking.num_candidates
        low, high = candidate_bounds(self.floor, self.cap, ranking)
        return (ranking.mass_lost > 1 - self.p).sum(1).clamp(low, high)

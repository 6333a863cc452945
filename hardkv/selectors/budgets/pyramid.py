"""Pyramid: lower layers keep more tokens."""

from dataclasses import dataclass

from torch import Tensor

from hardkv.selectors.budgets.budget import Budget, FixedTotal, register_budget
from hardkv.selectors.budgets.curves import RiskCurves
from hardkv.selectors.budgets.topk import TopK
from hardkv.selectors.checks import check_count, settle
from hardkv.selectors.ranking import Ranking


@register_budget("pyramid")
@dataclass(frozen=True)
class Pyramid(Budget):
    """PyramidKV (https://arxiv.org/abs/2406.02069): counts fall linearly from the first layer to the last.

    With base = n - |F|, the last layer gets base // beta and the first 2 * base - base // beta; the mean is base.

    Args:
        n: mean tokens kept per head over all layers, protected ones included; or a budget (TopK, AdaKV, Adaptive)
            whose n is spread over the layers.
        beta: steepness, at least 1; 1 gives every layer the same.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    n: "int | FixedTotal"
    beta: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.n, FixedTotal):
            settle(self, n=check_count("n", self.n, 1))
        elif self.n.uses_risk:
            raise ValueError(f"{self.n} already gives every layer its own share; it cannot be wrapped in Pyramid")
        settle(self, beta=check_count("beta", self.beta, 1))

    @property
    def inner(self) -> FixedTotal:
        """The budget applied within a layer."""
        return self.n if isinstance(self.n, FixedTotal) else TopK(self.n)

    @property
    def uses_temperature(self) -> bool:  # type: ignore[override]
        """Whether the budget within a layer uses temperatures."""
        return self.inner.uses_temperature

    @property
    def limit(self) -> int:
        return self.inner.n

    @property
    def smallest(self) -> tuple[str, int]:
        return "n", self.inner.n

    def for_layers(
        self, num_layers: int | None, num_protected: int, curves: RiskCurves | None = None
    ) -> list[FixedTotal]:
        if num_layers is None:
            raise ValueError(f"{self} needs to know the model: pass config=model.config")
        base = self.inner.n - num_protected
        low = base // self.beta
        drop = 2 * (base - low)  # from the first layer to the last
        fall = [round(layer * drop / (num_layers - 1)) for layer in range(num_layers // 2)]
        # mirrored, so that each pair of layers, and so the whole, has the exact sum
        rooms = [low + drop - each for each in fall] + [base] * (num_layers % 2) + [low + each for each in fall[::-1]]
        return [self.inner.with_n(num_protected + room) for room in rooms]

    def counts(self, ranking: Ranking) -> Tensor:
        raise TypeError("Pyramid gives every layer its own budget: call for_layers(num_layers, |F|) first")

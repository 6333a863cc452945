"""Risk: tokens go to the heads where eviction was measured to cost most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hardkv.selectors.budgets.bits import CHOICES, choose, losses
from hardkv.selectors.budgets.budget import Budget, FixedTotal, register_budget
from hardkv.selectors.budgets.curves import RiskCurves
from hardkv.selectors.budgets.water_filling import ROOM_SPARE, Plan
from hardkv.selectors.checks import check_count, check_fraction, settle
from hardkv.selectors.ranking import Ranking


@register_budget("risk")
@dataclass(frozen=True)
class Risk(FixedTotal):
    """Counts per head from the measured cost of eviction, the same at every event.

    A calibration measured each head's loss rho(n) when the head keeps n tokens. The counts minimise the sum of rho over
    the model at a mean of n tokens per head: tokens go where the lower convex hulls of the curves fall most
    (water-filling), which is exact on the hulls. No head gets more tokens than the sequence has, and the others get the
    rest; so counts stay the same once the sequence is longer than the largest. For sequences longer than the
    calibration's texts, a power law continues the curves (`RiskCurves.continued`).

    LU-KV (https://arxiv.org/abs/2602.08585) shares a budget on convex hulls too. It measures another loss, and gives
    each head a share of the prompt, once.

    Args:
        n: mean tokens kept per head, protected ones included.
        scope: "model": the heads of all layers share one total; "layer": each layer has its own total.
        floor: fewest tokens per head: a count (int), protected ones included, or a share (float) of n - |F| in
            addition to the protected tokens.
        cap: most tokens per head, protected ones included. None: no bound.

    Raises:
        ValueError, TypeError: a value out of range or of the wrong type.
    """

    scope: str = "model"
    floor: "int | float" = 0.1
    cap: int | None = None
    uses_risk = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in ("model", "layer"):
            raise ValueError(f"scope={self.scope!r} must be 'model' or 'layer'")
        if hasattr(self.floor, "__index__"):
            settle(self, floor=check_count("floor", self.floor, 0, self.n))
        else:  # any type of float: a share, not a count
            settle(self, floor=float(check_fraction("floor", self.floor, low_open=False)))
        if self.cap is not None:
            settle(self, cap=check_count("cap", self.cap, self.n))

    def for_layers(
        self, num_layers: int | None, num_protected: int, curves: RiskCurves | None = None
    ) -> "list[LayerRisk]":
        """As `Budget.for_layers`; the budgets of all layers share one plan.

        Raises:
            ValueError: there are no curves, or they have another number of layers.
        """
        if curves is None:
            raise ValueError(f"{self} needs measured risk curves: pass calibration=hardkv.calibrate(model)")
        layers = curves.loss.shape[0]
        if num_layers != layers:
            raise ValueError(f"{self} has the curves of {layers} layers, not of {num_layers}: calibrate this model")
        return self._budgets(self._plans(curves), curves)

    def for_bits(
        self, num_protected: int, curves: RiskCurves, distortion: Tensor, nbytes: Sequence[int]
    ) -> "tuple[list[LayerRisk], list[tuple[int, int]]]":
        """Choose the bits of every layer. Return the layers' budgets in bytes, and their bits of keys and values.

        The budget is the bytes of n tokens per head at 16 bits, without the protected ones, which stay at 16.

        Args:
            num_protected: the usual |F|, window + sinks.
            distortion: `[L, H, 2, 4]`, the loss by fewer bits; see `hardkv.Calibration`.
            nbytes: of a token and head, by each of `bits.CHOICES`.
        """
        loss, cost = losses(distortion), torch.tensor(nbytes, device=distortion.device)
        plans, chosen = [], []
        for plan, own in zip(self._plans(curves), [loss] if self.scope == "model" else loss.split(1), strict=True):
            found = choose(self, plan, own, cost, num_protected)
            chosen += [CHOICES[each] for each in found.tolist()]
            rows = cost[found].repeat_interleave(plan.rows // len(found))
            plans.append(plan.priced(rows, int(cost[CHOICES.index((16, 16))]), num_protected))
        return self._budgets(plans, curves), chosen

    def _plans(self, curves: RiskCurves) -> list[Plan]:
        """Return one plan per total: for all layers, or for each."""
        continued, layers = curves.continued(), curves.loss.shape[0]
        if self.scope == "model":
            return [Plan.of(curves, continued, slice(None))]
        return [Plan.of(curves, continued, slice(layer, layer + 1)) for layer in range(layers)]

    def _budgets(self, plans: Sequence[Plan], curves: RiskCurves) -> "list[LayerRisk]":
        """Return one budget per layer."""
        layers, heads, _ = curves.loss.shape
        if self.scope == "layer":
            return [LayerRisk(self, (0,), heads, plan) for plan in plans]
        return [LayerRisk(self, (layer * heads,), heads, plans[0]) for layer in range(layers)]

    def allocation(self, curves: RiskCurves, length: int, num_protected: int) -> Tensor:
        """Return the counts `[L, H]` for a sequence of `length` tokens, the `num_protected` per head included."""
        at = curves.counts.new_tensor([length]), curves.counts.new_tensor([num_protected])
        return torch.cat([budget.totals(*at) for budget in self.for_layers(len(curves.loss), num_protected, curves)])

    def counts(self, ranking: Ranking) -> Tensor:
        raise TypeError(
            "Risk needs measured curves: call for_layers(num_layers, |F|, curves), or HardKVCache(calibration=...)"
        )


@dataclass(frozen=True)
class LayerRisk(Budget):
    """`Risk` for one layer or for several, or for some of their heads; it holds the curves of all heads."""

    risk: Risk
    firsts: tuple[int, ...]  # the plan's row of each layer's first head, or of the first in this process
    heads: int
    plan: Plan = field(repr=False)

    def __repr__(self) -> str:
        return repr(self.risk)

    @property
    def known_heads(self) -> int:  # type: ignore[override]
        return self.heads

    def for_heads(self, first: int, last: int) -> "LayerRisk":
        return replace(self, firsts=tuple(row + first for row in self.firsts), heads=last - first)

    @property
    def limit(self) -> int:
        return self.plan.mean(self.risk.n)

    def joint(self, budgets: Sequence[Budget]) -> Budget | None:
        same = [each for each in budgets if isinstance(each, LayerRisk) and each.plan is self.plan]
        if len(same) < len(budgets) or any(each.heads != self.heads for each in same):
            return None
        return replace(self, firsts=tuple(row for each in same for row in each.firsts))

    def fixed_total(self, heads: int, length: int, protected: int) -> int:
        """As `Budget.fixed_total`: the most at any length up to `length`, as a layer's share depends on it."""
        counts = self.plan.at_lengths(self.risk, length, protected)
        each = torch.stack([counts[:, first : first + self.heads] for first in self.firsts])
        return math.ceil(int(each.sum(-1).max()) * ROOM_SPARE)

    def tensors(self, device: torch.device) -> list[Tensor]:
        return self.plan.on(device).tensors()

    def totals(self, tokens: Tensor, protected: Tensor) -> Tensor:
        """Return counts per head, int64 `[L * B, H]`, for sequences of `tokens [B]` with `protected [B]` per head."""
        counts = self.plan.on(tokens.device).totals(self.risk, tokens, protected)
        each = [counts[:, first : first + self.heads] for first in self.firsts]
        return each[0] if len(each) == 1 else torch.cat(each)

    def counts(self, ranking: Ranking) -> Tensor:
        protected = ranking.per_head(ranking.num_protected)  # the same in every head and layer
        batch = protected.shape[0] // len(self.firsts)
        return (self.totals(ranking.observation.context[:batch], protected[:batch, 0]) - protected).flatten()

"""Budgets to compare with: static head budgets in the style of other papers, and parts and mixtures of our own."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hardkv.kernels.selection import share_of_best
from hardkv.selectors import Budget, Risk, RiskCurves
from hardkv.selectors.budgets.water_filling import Plan
from hardkv.selectors.ranking import Ranking

# Minimum number of tokens per head beyond sinks and window.
STREAMING = 16
# Attention beyond this many tokens counts as important to a head.
LOCAL = 64


def importance(curves: RiskCurves) -> Tensor:
    """Return each head's loss when it keeps only its best 64 tokens, float64 `[L, H]`: how much it looks back."""
    at = int((curves.counts <= LOCAL).sum()) - 1
    return curves.loss[..., at].double()


@dataclass(frozen=True)
class _PerHead(Budget):
    """Compute counts per head by a subclass's rule, and clip them to the tokens of a sequence."""

    n: int
    curves: RiskCurves = field(repr=False)
    layer: int = -1
    made: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)  # for all layers

    def for_layers(self, num_layers: int | None, num_protected: int, curves: RiskCurves | None = None) -> list[Budget]:
        assert num_layers is not None
        return [replace(self, layer=layer) for layer in range(num_layers)]

    def totals(self, length: int, num_protected: int) -> Tensor:
        """Return the public counts of all heads, `[L, H]`."""
        raise NotImplementedError

    def counts(self, ranking: Ranking) -> Tensor:
        protected = ranking.per_head(ranking.num_protected)
        rows = []
        for length, f in zip(ranking.observation.context.tolist(), protected[:, 0].tolist(), strict=True):
            if (length, f) not in self.made:
                self.made[length, f] = self.totals(length, f)
            rows.append(self.made[length, f][self.layer])
        return (torch.stack(rows).to(protected.device) - protected).clamp_min(0).flatten()


@dataclass(frozen=True)
class HeadKV(_PerHead):
    """Share a budget like HeadKV (https://arxiv.org/abs/2410.19258): an even base, the rest proportional to importance.

    Importance is `importance(curves)` here, not a retrieval test. Tokens that a sequence is too short for go
    to the other heads; totals are exact except for rounding down.
    """

    def totals(self, length: int, num_protected: int) -> Tensor:
        share = importance(self.curves)
        base = min(num_protected + STREAMING, self.n)
        total = (self.n - base) * share.numel()
        room = max(length - base, 0)
        low, high = 0.0, float(room) / float(share[share > 0].min()) if bool((share > 0).any()) else 0.0
        for _ in range(120):  # find the factor at which the clipped counts sum to the total
            middle = (low + high) / 2
            fits = (share * middle).clamp_max(room).sum() <= total
            low, high = (middle, high) if fits else (low, middle)
        return base + (share * low).clamp_max(room).floor().long()


@dataclass(frozen=True)
class DuoAttention(_PerHead):
    """Share a budget like DuoAttention (https://arxiv.org/abs/2410.10819): some heads keep all, the rest stream.

    The most important heads (by `importance(curves)`, not by trained gates) keep everything; the others keep sinks,
    window and 16 tokens. The number of full heads is such that the mean over a text of the curves' length, counted from
    a quarter of it on, is n.
    """

    def totals(self, length: int, num_protected: int) -> Tensor:
        share = importance(self.curves)
        base = min(num_protected + STREAMING, self.n)
        mean_length = self.curves.length * (1 + 1 / 4) / 2
        full = min(round((self.n - base) * share.numel() / (mean_length - base)), share.numel())
        counts = torch.full((share.numel(),), base, dtype=torch.int64)
        counts[share.flatten().topk(full).indices] = length
        return counts.view(share.shape)


@dataclass(frozen=True)
class LUKV(_PerHead):
    """Share a budget like LU-KV (https://arxiv.org/abs/2602.08585): by greedy gains on the convex hulls of the curves.

    The counts are found for a context of the curves' length. At other lengths each head keeps the same share of its
    tokens, the protected ones aside. No head keeps less than a hundredth of the context. LU-KV averages the shares that
    it finds for every text; our curves are averages over texts already.
    """

    def totals(self, length: int, num_protected: int) -> Tensor:
        measured, shape = self.curves.length, self.curves.loss.shape[:2]
        scale = max(length - num_protected, 1) / (measured - num_protected)
        mean = num_protected + (min(self.n, length) - num_protected) / scale
        least = min(max(num_protected, measured // 100), int(mean))
        plan = Plan.of(self.curves, self.curves.continued(), slice(None))
        bounds = torch.tensor([[measured], [least], [measured]])
        found = plan.counts(round(mean * shape.numel()), *bounds)[0]  # water-filling is greedy on the hulls
        sums = (num_protected + scale * (found.double() - num_protected)).cumsum(0).round()
        return torch.nn.functional.pad(sums, (1, 0)).diff().long().view(shape)


@dataclass(frozen=True)
class LayerShares(_PerHead):
    """Give every layer its share under Risk, split evenly between its heads."""

    def totals(self, length: int, num_protected: int) -> Tensor:
        counts = Risk(self.n).allocation(self.curves, length, num_protected)
        layer = counts.sum(1, keepdim=True)
        heads = counts.shape[1]
        return layer // heads + (torch.arange(heads) < layer % heads)


@dataclass(frozen=True)
class Mixed(_PerHead):
    """Use Risk's counts for a part of the budget, and Adaptive Top-p for the rest, over the tokens that Risk leaves."""

    dynamic: float = 0.0
    uses_temperature = True

    def totals(self, length: int, num_protected: int) -> Tensor:
        return Risk(self.n).allocation(self.curves, length, num_protected)

    def counts(self, ranking: Ranking) -> Tensor:
        risk = super().counts(ranking)
        static = (risk * (1 - self.dynamic)).long()
        total = ranking.per_head(risk).sum(1)
        order = torch.arange(ranking.z.shape[1], device=ranking.z.device)
        lost = ranking.mass_lost.masked_fill(order < static[:, None], torch.inf)
        lost = lost.masked_fill(ranking.z == -torch.inf, -torch.inf)
        positions = ranking.observation.positions[ranking.token]
        return share_of_best(ranking.per_head(lost), ranking.per_head(positions), total).flatten()

"""Budgets to compare with: static head budgets in the style of other papers, and parts and mixtures of our own."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hardkv.kernels.selection import share_of_best
from hardkv.selectors import Budget, Risk, RiskCurves
from hardkv.selectors.ranking import Ranking

# Tokens beyond sinks and window that a head keeps at least.
STREAMING = 16
# Tokens beyond which attention counts as important to a head.
LOCAL = 64


def importance(curves: RiskCurves) -> Tensor:
    """What each head loses when it keeps only its best 64 tokens, float64 `[L, H]`: how much it looks back."""
    at = int((curves.counts <= LOCAL).sum()) - 1
    return curves.loss[..., at].double()


@dataclass(frozen=True)
class _PerHead(Budget):
    """Counts of every head from a rule of one's own, clipped to what a sequence has."""

    n: int
    curves: RiskCurves = field(repr=False)
    layer: int = -1

    def for_layers(self, num_layers: int | None, num_protected: int, curves: RiskCurves | None = None) -> list[Budget]:
        assert num_layers is not None
        return [replace(self, layer=layer) for layer in range(num_layers)]

    def totals(self, length: int, num_protected: int) -> Tensor:
        """Public counts of all heads, `[L, H]`."""
        raise NotImplementedError

    def counts(self, ranking: Ranking) -> Tensor:
        protected = ranking.per_head(ranking.num_protected)
        rows = [
            self.totals(int(length), int(f))[self.layer]
            for length, f in zip(ranking.observation.context, protected[:, 0], strict=True)
        ]
        return (torch.stack(rows).to(protected.device) - protected).clamp_min(0).flatten()


@dataclass(frozen=True)
class HeadKV(_PerHead):
    """In the style of HeadKV (https://arxiv.org/abs/2410.19258): an even base, the rest in proportion to importance.

    Importance is measured here as `importance(curves)`, not by a retrieval test. What a sequence is too short for goes
    to the other heads; totals are exact but for what rounding down leaves.
    """

    def totals(self, length: int, num_protected: int) -> Tensor:
        share = importance(self.curves)
        base = min(num_protected + STREAMING, self.n)
        total = (self.n - base) * share.numel()
        room = max(length - base, 0)
        low, high = 0.0, float(room) / float(share[share > 0].min()) if bool((share > 0).any()) else 0.0
        for _ in range(120):  # the factor at which the clipped counts sum to the total
            middle = (low + high) / 2
            fits = (share * middle).clamp_max(room).sum() <= total
            low, high = (middle, high) if fits else (low, middle)
        return base + (share * low).clamp_max(room).floor().long()


@dataclass(frozen=True)
class DuoAttention(_PerHead):
    """In the style of DuoAttention (https://arxiv.org/abs/2410.10819): some heads keep all, the rest stream.

    As many of the most important heads (by `importance(curves)`, not by trained gates) keep everything as make the mean
    over a text of the curves' length, counted from a quarter of it on, n; the others keep sinks, window and 16 tokens.
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
class LayerShares(_PerHead):
    """Risk's share of every layer, evenly within it."""

    def totals(self, length: int, num_protected: int) -> Tensor:
        counts = Risk(self.n).allocation(self.curves, length, num_protected)
        layer = counts.sum(1, keepdim=True)
        heads = counts.shape[1]
        return layer // heads + (torch.arange(heads) < layer % heads)


@dataclass(frozen=True)
class Mixed(_PerHead):
    """Risk's counts for a part of the budget, and Adaptive Top-p for the rest, over what Risk leaves in the layer."""

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

"""AdaKV: a head's share of a layer's budget is its share of the layer's best tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hardkv.kernels.selection import share_of_best
from hardkv.selectors.budgets.budget import FixedTotal, register_budget
from hardkv.selectors.checks import check_fraction, settle
from hardkv.selectors.ranking import Ranking


@register_budget("adakv")
@dataclass(frozen=True)
class AdaKV(FixedTotal):
    """AdaKV (https://arxiv.org/abs/2407.11550): each layer's budget follows its best tokens.

    Let base = n - |F|, and c_h the number of head h's tokens among the best H * base tokens of the layer. Head h gets
    c_h * (1 - alpha) + alpha * base, rounded by largest remainder so that totals are exact. Tokens that a head cannot
    use, for want of candidates, go to the other heads. Each sequence of a batch is treated separately.

    Args:
        n: mean tokens kept per head, protected ones included.
        alpha: the share of the budget that is split evenly, in [0, 1].

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, alpha=check_fraction("alpha", self.alpha, low_open=False))

    def counts(self, ranking: Ranking) -> Tensor:
        base = ranking.per_head(self.room(ranking))  # [B, H]
        total = base.sum(1)
        positions = ranking.observation.positions[ranking.token]
        best = share_of_best(ranking.per_head(ranking.z), ranking.per_head(positions), total)
        # float32 where there is no float64 (MPS); rounded so that equal remainders are equal on every backend
        dtype = torch.float32 if base.device.type == "mps" else torch.float64
        target = best.to(dtype) * (1 - self.alpha) + self.alpha * base.to(dtype)
        room = ranking.per_head(ranking.num_candidates)
        return round_to_total(target, room, total, ranking.z.shape[1]).flatten()


def round_to_total(target: Tensor, room: Tensor, total: Tensor, most: int) -> Tensor:
    """Round `target [B, H]` by largest remainder to integers of at most `room [B, H]`; they sum to `total [B]`.

    Each unit goes to the head that has room and lacks most of its target; of equal heads, to the first. If `room` sums
    to less than `total`, the integers are `room`. `most` is a bound on `room`.
    """
    unit = torch.arange(most, device=target.device)
    lack = (target[..., None] - unit).mul_(1 << 16).round_()
    lack = lack.masked_fill(unit >= room[..., None], -torch.inf)
    return share_of_best(lack, torch.zeros_like(lack, dtype=torch.int32), total)

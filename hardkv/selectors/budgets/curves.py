"""Risk curves: the measured loss of each head by eviction, and the model that continues them."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Curves are continued up to this count, four counts per doubling; no context window is longer.
FAR = 1 << 24

# Losses are averaged over contexts between this share of a length and the whole length.
CONTEXT_FROM = 1 / 4


@dataclass(frozen=True)
class RiskCurves:
    """Measured losses by eviction: `loss[l, h, k]` is that of head h of layer l when it keeps `counts[k]` tokens.

    Args:
        counts: int64 `[K]`, ascending, protected tokens included; the last is the measured length, at which nothing
            is lost.
        loss: float `[L, H, K]`, falls along K to 0; all heads have the same unit.
    """

    counts: Tensor
    loss: Tensor

    def __post_init__(self) -> None:
        counts, loss = self.counts, self.loss
        if counts.dim() != 1 or counts.shape[0] < 2 or loss.dim() != 3 or loss.shape[2] != counts.shape[0]:
            raise ValueError(
                f"counts {tuple(counts.shape)} and loss {tuple(loss.shape)} must be [K] and [L, H, K], K at least 2"
            )
        if int(counts[0]) < 0 or bool((counts.diff() <= 0).any()):
            raise ValueError("counts must ascend from 0 or more")
        if not bool(loss.isfinite().all()):
            raise ValueError("loss holds NaN or infinite entries")

    @property
    def length(self) -> int:
        """The largest context length that was measured."""
        return int(self.counts[-1])

    @cached_property
    def gains(self) -> Tensor:
        """Loss avoided per token between neighbouring counts, float64 `[L, H, K - 1]`, falling along each curve.

        These are the slopes of the curve's lower convex hull, by the min-max formula of isotonic regression.
        """
        width = self.counts.diff().double()
        drop = -self.loss.double().diff()
        total = torch.nn.functional.pad(drop.cumsum(-1), (1, 0))
        edge = torch.nn.functional.pad(width.cumsum(-1), (1, 0))
        # mean[a, b]: slope of the chord from count a to count b + 1
        span = edge[None, 1:] - edge[:-1, None]
        mean = (total[..., None, 1:] - total[..., :-1, None]) / span.masked_fill(span <= 0, torch.inf)
        forward = span > 0
        best = mean.masked_fill(~forward, -torch.inf).flip(-1).cummax(-1).values.flip(-1)  # over all b >= k
        rows = torch.arange(width.shape[0], device=width.device)
        reached = rows[:, None] <= rows  # a <= k
        return best.masked_fill(~reached, torch.inf).amin(-2).clamp_min(0.0)

    def continued(self) -> "tuple[Tensor, Tensor]":
        """Return counts `[K']` up to `FAR`, and the gains `[L, H, K' - 1]` of a context longer than all of them.

        A curve averages contexts, and only a share of them, `reach`, had more than c tokens. The gains divided by this
        share are those of a longer context. From half of the measured length on few contexts are left, and a power law
        replaces the gains. It is fitted between an eighth and three quarters of the length (least squares in log-log,
        weighted by tokens; steps without gain are left out). Its exponent lies in [0.5, 4], so that no tail stays flat
        or breaks off, and its gains never exceed those before it.
        """
        length = self.length
        far = [math.ceil(length * 2 ** (step / 4)) for step in range(1, 4 * FAR.bit_length())]
        counts = torch.cat([self.counts, self.counts.new_tensor(sorted({n for n in far if length < n < FAR} | {FAR}))])
        middle = middles(counts)
        known = self.counts.shape[0] - 1
        x, gains = middle[:known], self.gains / reach(middle[:known], middle.new_tensor(length)).clamp_min(1e-3)
        fitted = self.counts.diff() * ((x >= length / 8) & (x <= length * 3 / 4)) * (gains > 0)  # [L, H, K - 1]
        total = fitted.sum(-1, keepdim=True)
        log_x, log_y = x.log(), gains.clamp_min(torch.finfo(torch.float64).tiny).log()
        x_mean = (fitted * log_x).sum(-1, keepdim=True) / total.clamp_min(1)
        y_mean = (fitted * log_y).sum(-1, keepdim=True) / total.clamp_min(1)
        spread = (fitted * (log_x - x_mean).square()).sum(-1, keepdim=True).clamp_min(1e-12)
        slope = (fitted * (log_x - x_mean) * (log_y - y_mean)).sum(-1, keepdim=True) / spread
        law = (y_mean + slope.clamp(-4.0, -0.5) * (middle.log() - x_mean)).exp() * (total > 0)
        near = torch.nn.functional.pad(gains, (0, middle.shape[0] - known))
        tail = torch.where(middle <= length / 2, near, law)
        return counts, tail.cummin(-1).values


def middles(counts: Tensor) -> Tensor:
    """Return the geometric means of neighbouring counts, float64."""
    return (counts[1:].double() * counts[:-1].clamp_min(1)).sqrt()


def reach(count: Tensor, context: Tensor) -> Tensor:
    """Return the share of the contexts, from a quarter of `context` up to it, with more than `count` tokens."""
    context = context.to(count)  # a number times integers would have the default dtype
    return ((context - count) / ((1 - CONTEXT_FROM) * context)).clamp(0.0, 1.0)

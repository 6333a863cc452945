"""Risk budgets: every head of the model gets the tokens whose eviction was measured to cost most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from hardkv.selectors.budgets import Budget, FixedTotal, register_budget
from hardkv.selectors.checks import check_count, check_fraction, settle
from hardkv.selectors.ranking import Ranking

# Curves are continued up to this count, in quarters of a doubling; context windows end before.
FAR = 1 << 24
# Losses are averaged over the contexts from this share of a length to all of it.
CONTEXT_FROM = 1 / 4
# A layer's share of the total is looked at for lengths that are this factor apart, and closer just above n, where it
# moves fastest; in between it is taken to be larger by no more than the second.
ROOM_STEP, ROOM_SPARE = 1.02, 1.02


@dataclass(frozen=True)
class RiskCurves:
    """What heads lose by eviction, measured: `loss[l, h, k]` when head h of layer l keeps `counts[k]` tokens.

    Args:
        counts: int64 `[K]`, ascending, protected tokens included; the last is the measured length, where nothing is
            lost.
        loss: float `[L, H, K]`, falling along K to 0, in one unit for all heads.
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
        """The context length up to which the curves were measured."""
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
        """The tail model: counts `[K']` up to `FAR`, and gains `[L, H, K' - 1]` of a context that is longer than they.

        Of the contexts that a curve averages, only a share, `reach`, had more than c tokens; its gains over that share
        are those of a longer context. From half of the measured length on, where few contexts reach, a power law takes
        their place, fitted between an eighth and three quarters of the length (least squares in log-log, weighted by
        tokens; steps without gain are left out). Its exponent lies in [0.5, 4], so that no tail stays flat or breaks
        off, and it stays below the gains before it.
        """
        length = self.length
        far = [math.ceil(length * 2 ** (step / 4)) for step in range(1, 4 * FAR.bit_length())]
        counts = torch.cat([self.counts, self.counts.new_tensor(sorted({n for n in far if length < n < FAR} | {FAR}))])
        middle = _middle(counts)
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


def _middle(counts: Tensor) -> Tensor:
    """Geometric means of neighbours, float64."""
    return (counts[1:].double() * counts[:-1].clamp_min(1)).sqrt()


def reach(count: Tensor, context: Tensor) -> Tensor:
    """Which share of the contexts from a quarter of `context` to all of it have more than `count` tokens."""
    return ((context - count) / ((1 - CONTEXT_FROM) * context)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class _Plan:
    """The pieces of all rows' curves, for water-filling; S = rows * (K' - 1), piece-major, so that ties spread."""

    rows: int
    length: int  # up to which the curves were measured
    start: Tensor  # int64 [S], count at which a piece begins
    stop: Tensor  # int64 [S]
    middle: Tensor  # float64 [S]
    gains: Tensor  # float64 [S], as measured, for contexts up to `length`
    tail: Tensor  # float64 [S], of longer ones, before `reach`
    copies: "dict[torch.device, _Plan]" = field(default_factory=dict, repr=False, compare=False)
    rooms: "dict[tuple[Risk, int, int], Tensor]" = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, curves: RiskCurves, continued: tuple[Tensor, Tensor], layers: slice) -> "_Plan":
        """A plan for some layers; `continued` is `curves.continued()`, worked out once for all plans."""
        counts, tail = continued
        gains = torch.nn.functional.pad(curves.gains, (0, tail.shape[2] - curves.gains.shape[2]))
        rows = tail[layers].flatten(0, 1).shape[0]
        start, middle = counts[:-1].clone(), _middle(counts)
        start[0] = 0  # what a row may hold less than the first measured count belongs to its first piece

        def by_piece(per_row: Tensor) -> Tensor:
            return per_row[layers].flatten(0, 1).T.flatten()

        start, stop, middle = (t.repeat_interleave(rows) for t in (start, counts[1:], middle))
        return cls(rows, curves.length, start, stop, middle, by_piece(gains), by_piece(tail))

    def on(self, device: torch.device) -> "_Plan":
        """The plan on a device, moved once for all layers."""
        if self.start.device == device:
            return self
        if device not in self.copies:
            real = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            start, stop = self.start.to(device), self.stop.to(device)
            middle, gains, tail = (t.to(device, real) for t in (self.middle, self.gains, self.tail))
            self.copies[device] = _Plan(self.rows, self.length, start, stop, middle, gains, tail)
        return self.copies[device]

    def tensors(self) -> list[Tensor]:
        return [self.start, self.stop, self.middle, self.gains, self.tail]

    def totals(self, risk: "Risk", tokens: Tensor, protected: Tensor) -> Tensor:
        """Counts of all rows, int64 `[B, rows]`, for sequences of `tokens [B]` with `protected [B]` a row."""
        n, floor, cap = risk.n, risk.floor, risk.cap
        if isinstance(floor, float):
            low = protected + (floor * (n - protected).clamp_min(0)).long()
        else:
            low = protected.clamp_min(floor)
        high = tokens if cap is None else tokens.minimum(protected.clamp_min(cap))
        return self.counts(n * self.rows, tokens, low, high)

    def at_lengths(self, risk: "Risk", length: int, protected: int) -> Tensor:
        """`totals` at lengths up to `length`, `[lengths, rows]`; kept, as every layer asks for the same."""
        asked = risk, length, protected
        found = self.rooms.get(asked)
        if found is None:
            lengths, step = [length, min(risk.n, length)], 1.0  # up to n tokens all are kept
            while risk.n + step < length:
                lengths.append(round(risk.n + step))
                step += min(step / 2, (risk.n + step) * (ROOM_STEP - 1))
            tokens = self.start.new_tensor(sorted(set(lengths)))
            found = torch.cat([self.totals(risk, each, each.clamp_max(protected)) for each in tokens.split(32)])
            self.rooms.clear()
            self.rooms[asked] = found
        return found

    def counts(self, total: int, context: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Water-filling: tokens of every row, int64 `[B, rows]`, at least `low [B]`, at most `high [B]`.

        They sum to `total`, or to what the bounds allow. `context [B]`: tokens of the sequences so far.
        """
        low = low.minimum(high)
        longer = self.tail * reach(self.middle, context[:, None])
        gains = torch.where(context[:, None] > self.length, longer, self.gains)  # [B, S]
        order = gains.argsort(dim=1, descending=True, stable=True)
        width = (self.stop.minimum(high[:, None]) - self.start.maximum(low[:, None])).clamp_min(0).gather(1, order)
        before = width.cumsum(1) - width
        taken = ((total - self.rows * low)[:, None] - before).clamp_min(0).minimum(width)
        counts = low[:, None].expand(-1, self.rows).contiguous()
        return counts.scatter_add_(1, order % self.rows, taken)


@register_budget("risk")
@dataclass(frozen=True)
class Risk(FixedTotal):
    """Counts fitted to what eviction really costs each head, the same at every event (hardkv's own).

    A calibration measured, for every head, the loss rho(n) when n tokens are kept. The heads' counts minimise the sum
    of rho over the model at a mean of n tokens a head: tokens go where the lower convex hulls of the curves fall most
    (water-filling), which is exact on the hulls. No head gets more than a sequence has; what that frees goes to the
    others, so counts settle once the sequence is longer than the largest. For sequences longer than the calibration's
    texts the curves are continued by a power law (`RiskCurves.continued`).

    Args:
        n: mean tokens kept per head, protected ones included.
        scope: "model": heads of all layers share one total; "layer": every layer has its own.
        floor: fewest tokens of a head: a count (int), protected ones included, or a share (float) of n - |F| beyond
            the protected tokens.
        cap: most tokens of a head, protected ones included. None: no bound.

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
        else:  # of some float's type, which tells a share from a count
            settle(self, floor=float(check_fraction("floor", self.floor, low_open=False)))
        if self.cap is not None:
            settle(self, cap=check_count("cap", self.cap, self.n))

    def for_layers(self, curves: RiskCurves) -> "list[LayerRisk]":
        """The budgets of all layers, which share one plan."""
        layers, heads, _ = curves.loss.shape
        continued = curves.continued()
        if self.scope == "layer":
            plans = [_Plan.of(curves, continued, slice(layer, layer + 1)) for layer in range(layers)]
            return [LayerRisk(self, (0,), heads, plan) for plan in plans]
        plan = _Plan.of(curves, continued, slice(None))
        return [LayerRisk(self, (layer * heads,), heads, plan) for layer in range(layers)]

    def allocation(self, curves: RiskCurves, length: int, num_protected: int) -> Tensor:
        """The counts `[L, H]` of a sequence of `length` tokens, protected ones (`num_protected` a head) included."""
        at = curves.counts.new_tensor([length]), curves.counts.new_tensor([num_protected])
        return torch.cat([budget.totals(*at) for budget in self.for_layers(curves)])

    def counts(self, ranking: Ranking) -> Tensor:
        raise TypeError("Risk needs measured curves: call for_layers(curves) first, or HardKVCache(calibration=...)")


@dataclass(frozen=True)
class LayerRisk(Budget):
    """`Risk` of one layer or of several together, or of some of its heads, with the curves of all."""

    risk: Risk
    firsts: tuple[int, ...]  # rows of the plan where the layers' heads, or those of this process, begin
    heads: int
    plan: _Plan = field(repr=False)

    def __repr__(self) -> str:
        return repr(self.risk)

    @property
    def known_heads(self) -> int:  # type: ignore[override]
        return self.heads

    def for_heads(self, first: int, last: int) -> "LayerRisk":
        return replace(self, firsts=tuple(row + first for row in self.firsts), heads=last - first)

    @property
    def limit(self) -> int:
        return self.risk.limit

    def together(self, budgets: Sequence[Budget]) -> Budget | None:
        same = [each for each in budgets if isinstance(each, LayerRisk) and each.plan is self.plan]
        if len(same) < len(budgets) or any(each.heads != self.heads for each in same):
            return None
        return replace(self, firsts=tuple(row for each in same for row in each.firsts))

    def fixed_total(self, heads: int, length: int, protected: int) -> int:
        """As `Budget.fixed_total`: the most at any length up to this one, since a layer's share moves with it."""
        counts = self.plan.at_lengths(self.risk, length, protected)
        each = torch.stack([counts[:, first : first + self.heads] for first in self.firsts])
        return math.ceil(int(each.sum(-1).max()) * ROOM_SPARE)

    def tensors(self, device: torch.device) -> list[Tensor]:
        return self.plan.on(device).tensors()

    def totals(self, tokens: Tensor, protected: Tensor) -> Tensor:
        """Counts of heads, int64 `[L * B, H]`, for sequences of `tokens [B]` with `protected [B]` a head."""
        counts = self.plan.on(tokens.device).totals(self.risk, tokens, protected)
        each = [counts[:, first : first + self.heads] for first in self.firsts]
        return each[0] if len(each) == 1 else torch.cat(each)

    def counts(self, ranking: Ranking) -> Tensor:
        protected = ranking.per_head(ranking.num_protected)  # the same in every head and layer
        batch = protected.shape[0] // len(self.firsts)
        return (self.totals(ranking.observation.context[:batch], protected[:batch, 0]) - protected).flatten()

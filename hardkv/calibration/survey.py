"""The cache that a calibration runs: it evicts nothing and records the loss that keeping fewer tokens would cause."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hardkv.cache.cache import HardKVCache
from hardkv.cache.hybrid import HybridLayer
from hardkv.cache.layer import HardKVLayer
from hardkv.cache.routing.tokens import NewTokens
from hardkv.config import HardKVConfig
from hardkv.kernels.scoring import window_attention
from hardkv.selectors.budgets import Budget
from hardkv.selectors.budgets.curves import CONTEXT_FROM
from hardkv.selectors.observation import Observation
from hardkv.selectors.ranking import Ranking
from hardkv.selectors.temperatures import fit_temperatures, kept_counts

GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 spread evenly


@dataclass(frozen=True)
class Step:
    """One layer between two events: the new queries, and the order in which earlier tokens would have been evicted."""

    layer_idx: int
    observation: Observation  # all tokens, the step's own included; nothing is evicted, so rows are equal
    queries: Tensor  # [B, Hq, q, D], after RoPE
    positions: Tensor  # int64 [q], their columns
    sinks: Tensor | None  # [Hq], learned attention sinks
    order: Tensor  # int64 [R, C], the last event's candidates, as places in the row; a head that kept c has the first c
    edges: Tensor  # int64 [K], the counts c, at most C


def squared_attention(step: Step) -> Tensor:
    """Return the squared attention that a step's queries pay to the candidates between two counts.

    The result is float64 `[R, K - 1]`, the mean over queries and the query heads of a group.
    """
    observation = step.observation
    received = window_attention(
        step.queries,
        step.positions,
        torch.ones(step.queries.shape[0], step.queries.shape[2], dtype=torch.bool, device=step.queries.device),
        observation.keys,
        observation.positions,
        observation.rows,
        num_kv_heads=observation.num_kv_heads,
        scale=observation.scale,
        softcap=observation.softcap,
        reduce="mean_square",
        sinks=step.sinks,
    )
    ordered = received.view(step.order.shape[0], -1).gather(1, step.order).double()
    return torch.nn.functional.pad(ordered.cumsum(1), (1, 0))[:, step.edges].diff(dim=1)


@dataclass
class Record:
    """The losses and samples of one layer, collected over all texts."""

    edges: list[int]
    lost: Tensor | None = None  # float64 [H, K - 1], the loss between two counts, summed over steps
    steps: int = 0
    distorted: Tensor | None = None  # float64 [H, 2, bits], the loss by quantising keys or values, summed over steps
    distorted_steps: int = 0
    samples: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # z, A, candidates: each [H, n]
    sums: list[Tensor] = field(default_factory=list)  # float64 [H, D] and [H, Dv], keys and values summed over tokens
    tokens: int = 0  # of all texts, summed in `sums`

    def add(self, observation: Observation, first: int) -> None:
        """Sum the keys and values of the tokens from the `first` of every row on. All rows are of one length."""
        shape = (observation.batch_size, observation.num_kv_heads, int(observation.lengths[0]), -1)
        found = [states.view(shape)[:, :, first:] for states in (observation.keys, observation.values)]
        sums = [states.sum((0, 2), dtype=torch.float64) for states in found]
        self.sums = [old + new for old, new in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.tokens += found[0].shape[0] * found[0].shape[2]

    def means(self) -> list[Tensor]:
        """Return the mean keys and values of the heads, float32 `[H, D]` and `[H, Dv]`."""
        return [(states / max(self.tokens, 1)).float().cpu() for states in self.sums]

    def curve(self) -> Tensor:
        """Return the mean loss at each count, float32 `[H, K]`."""
        assert self.lost is not None
        tail = (self.lost / self.steps).flip(-1).cumsum(-1).flip(-1)
        return torch.nn.functional.pad(tail, (0, 1)).float().cpu()

    def distortion(self) -> Tensor | None:
        """Return the mean loss by quantising keys or values, float32 `[H, 2, bits]`; None if it was not measured."""
        return None if self.distorted is None else (self.distorted / self.distorted_steps).float().cpu()


def fit(records: Sequence[Record], p: float, solver: str) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the temperatures of all layers at once.

    Returns:
        Temperatures and residuals, float32 `[L, H]`, and median kept counts, int64 `[3, L, H]`: of the raw attention,
        and of scores before and after the fit.
    """
    device = records[0].samples[0][0].device  # layers may be on several
    width = max(z.shape[1] for record in records for z, _, _ in record.samples)

    def stack(part: int, fill: Any) -> Tensor:
        layers = [[sample[part].to(device) for sample in record.samples] for record in records]
        padded = [[torch.nn.functional.pad(r, (0, width - r.shape[1]), value=fill) for r in rows] for rows in layers]
        return torch.cat([torch.stack(rows, 1) for rows in padded])

    z, reference, mask = stack(0, -torch.inf), stack(1, 0.0), stack(2, False)
    found = fit_temperatures(z, reference, p, mask=mask, solver=solver)
    before = kept_counts(z, None, reference, p, mask=mask)
    after = kept_counts(z, found.temperatures, reference, p, mask=mask)
    kept = torch.stack([counts.median(1).values for counts in (found.counts, before, after)])
    shape = len(records), -1
    temperatures, residuals = (each.float().cpu().view(shape) for each in (found.temperatures, found.residuals))
    return temperatures, residuals, kept.cpu().view(3, *shape)


def curve_edges(most: int) -> list[int]:
    """Return the counts of candidates at which curves are measured: 4 apart at first, then a sixteenth."""
    edges = [0]
    while edges[-1] < most:
        edges.append(min(most, edges[-1] + max(4, edges[-1] // 16)))
    return edges


class _Survey(Budget):
    """A budget that keeps everything, and records the loss that keeping fewer tokens would cause."""

    def __init__(
        self,
        record: Record,
        layer_idx: int,
        every: int,
        measure: "Callable[[Step], Tensor]",
        distort: "Callable[[Step], Tensor] | None",
    ):
        self.record = record
        self.layer_idx = layer_idx
        self.every = every  # number of events from one sample for the temperatures to the next
        self.measure = measure
        self.distort = distort
        self.events = self.measured = 0  # in all texts
        self.begin(0)

    def begin(self, length: int) -> None:
        """Prepare for a text of `length` tokens."""
        self.context_from = length * CONTEXT_FROM
        self.queries: list[tuple[Tensor, Tensor, Tensor | None]] = []  # queries, positions, attention sinks
        self.order: Tensor | None = None  # int64 [R, C], candidates, grouped by the least count that keeps them
        self.pending: tuple[Tensor, Tensor, Tensor] | None = None  # what `restack` needs for the next order

    def counts(self, ranking: Ranking) -> Tensor:
        observation = ranking.observation
        rows, length = observation.num_rows, int(observation.lengths[0])  # rows are equal: nothing was evicted
        if self.order is not None and length - self.queries[0][0].shape[2] >= self.context_from:
            self.record.steps += observation.batch_size
            for query, positions, sinks in self.queries:
                self._measure(observation, query, positions, sinks)
        self.queries.clear()

        place = ranking.token - torch.arange(rows, device=ranking.token.device)[:, None] * length
        rank = torch.empty_like(place).scatter_(1, place, torch.arange(length, device=place.device).expand_as(place))
        candidates = (~observation.protected.view(rows, length)[0]).nonzero()[:, 0].expand(rows, -1)
        old = candidates.new_empty(rows, 0) if self.order is None else self.order
        self.pending = old, candidates[:, old.shape[1] :], rank

        if candidates.shape[1] and self.events % self.every == 0:
            self._sample(ranking)
        self.events += 1
        return ranking.num_candidates

    def _measure(self, observation: Observation, query: Tensor, positions: Tensor, sinks: Tensor | None) -> None:
        assert self.order is not None
        edges = torch.tensor(self.record.edges, device=query.device).clamp_max(self.order.shape[1])
        step = Step(self.layer_idx, observation, query, positions, sinks, self.order, edges)
        record, batch = self.record, observation.batch_size
        lost = self.measure(step).unflatten(0, (batch, -1)).sum(0)
        record.lost = lost if record.lost is None else record.lost + lost
        dims = observation.keys.shape[-1], observation.values.shape[-1]
        chosen = self.measured * GOLDEN % 1 < 1 / self.every  # a share of the steps, at all lengths
        self.measured += 1
        if self.distort is not None and chosen and self.order.shape[1] and not any(dim % 8 for dim in dims):
            distorted = self.distort(step).unflatten(0, (batch, -1)).sum(0)
            record.distorted = distorted if record.distorted is None else record.distorted + distorted
            record.distorted_steps += batch

    def _sample(self, ranking: Ranking) -> None:
        observation = ranking.observation
        shape = (observation.batch_size, observation.num_kv_heads, -1)
        flat = ranking.z.new_empty(observation.keys.shape[0]).scatter_(0, ranking.token.flatten(), ranking.z.flatten())
        parts = (flat, observation.attention, ~observation.protected)
        self.record.samples.extend(zip(*(part.view(shape).unbind() for part in parts), strict=True))


def restack(order: Tensor, new: Tensor, rank: Tensor, edges: Sequence[int]) -> Tensor:
    """Compute, for all counts in `edges` at once, what heads with these counts hold after the next event.

    For each c in `edges`, a head that keeps c candidates holds the first c of `order`. At the event new candidates
    come, and the head keeps the c best of all these. The kept sets of two counts are nested before, so they are nested
    after: the larger count keeps the smaller one's set and the best of what the smaller one drops.

    Args:
        order: int64 `[R, C]`, candidates, in groups between edges.
        new: int64 `[R, m]`, candidates that came since the last event.
        rank: int64 `[R, n]`, the rank of each token, 0 for the best.
        edges: counts, ascending from 0.

    Returns:
        The next order, int64 `[R, C + m]`.
    """
    pool, parts = new, []
    for low, high in zip(edges, [*edges[1:], order.shape[1] + new.shape[1]], strict=True):
        pool = torch.cat([pool, order[:, low:high]], 1)
        pool = pool.gather(1, rank.gather(1, pool).argsort(1))
        parts.append(pool[:, : high - low])
        pool = pool[:, high - low :]
        if not pool.shape[1]:
            break
    return torch.cat(parts, 1)


class _SurveyLayer(HardKVLayer):
    """A layer that hands the queries of each forward to its `_Survey`."""

    def decode(self, new: NewTokens, query: Tensor, *args: Any, sinks: Tensor | None, **kwargs: Any) -> Tensor:
        positions = torch.arange(new.start, new.stop, device=query.device)
        assert isinstance(self.budget, _Survey)
        self.budget.queries.append((query, positions, sinks))
        return super().decode(new, query, *args, sinks=sinks, **kwargs)


class _HybridSurveyLayer(HybridLayer, _SurveyLayer):  # type: ignore[misc]
    """The same, with the states of a linear attention beside keys and values."""


class SurveyCache(HardKVCache):
    """A cache that evicts nothing and fills one `Record` per layer."""

    def __init__(
        self,
        config: Any,
        records: list[Record],
        edges: list[int],
        every: int,
        measure: "Callable[[Step], Tensor]",
        distort: "Callable[[Step], Tensor] | None",
        settings: HardKVConfig,
    ):
        def make_layer(settings: HardKVConfig, budget: Budget, layer_idx: int, states: int) -> HardKVLayer:
            survey = _Survey(Record(edges), layer_idx, every, measure, distort)
            if states:
                return _HybridSurveyLayer(settings, survey, layer_idx, states)
            return _SurveyLayer(settings, survey, layer_idx)

        self._make_layer = make_layer
        chosen = {name: getattr(settings, name) for name in ("scorer", "budget", "window", "sinks", "interval")}
        super().__init__(config, **chosen)
        records.extend(layer.budget.record for layer in self._compressed)  # type: ignore[attr-defined]

    def restack(self) -> None:
        """Make, after a forward, the next order of all layers that had an event, at once, as each takes many steps."""
        surveys = [layer.budget for layer in self._compressed if isinstance(layer.budget, _Survey)]
        waiting = [(survey, survey.pending) for survey in surveys if survey.pending is not None]
        if not waiting:
            return
        old, new, rank = (torch.cat(parts) for parts in zip(*(pending for _, pending in waiting), strict=True))
        orders = restack(old, new, rank, surveys[0].record.edges).split([rank.shape[0] for _, (_, _, rank) in waiting])
        for (survey, _), order in zip(waiting, orders, strict=True):
            survey.order, survey.pending = order, None

    def add_states(self) -> None:
        """Add the keys and values of a text, which are all held, to the records of all layers."""
        for layer in self._compressed:
            layer.budget.record.add(layer.observe(), self.settings.sinks)  # type: ignore[attr-defined]

    @property
    def compressed_layers(self) -> list[int]:
        return [layer.layer_idx for layer in self._compressed]

    def begin(self, length: int) -> None:
        """Forget the last text and prepare for one of `length` tokens."""
        self.reset()
        for layer in self._compressed:
            layer.budget.begin(length)  # type: ignore[attr-defined]

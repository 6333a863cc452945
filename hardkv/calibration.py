"""calibrate(): one pass of a model over some text -> temperatures and risk curves of every KV head."""

import gc
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hardkv.cache.cache import HardKVCache
from hardkv.cache.handles import NewTokens
from hardkv.cache.layer import HardKVLayer
from hardkv.calibration_file import FORMAT, Calibration, config_hash, describe_scorer, geometry, model_name
from hardkv.config import HardKVConfig
from hardkv.kernels.scoring import window_attention
from hardkv.selectors.budgets import Budget
from hardkv.selectors.calibration import SOLVERS, fit_temperatures, kept_counts
from hardkv.selectors.checks import check_count, check_fraction, check_name
from hardkv.selectors.observation import Observation
from hardkv.selectors.ranking import Ranking
from hardkv.selectors.risk import CONTEXT_FROM
from hardkv.selectors.scorer import Scorer, get_scorer

__all__ = ["Calibration", "auto", "cache_folder", "calibrate", "default_texts"]

# Tokens of each text that are used.
LENGTH = 2048
# Events of all texts together that temperatures are fitted to.
SAMPLES = 16


@torch.no_grad()
def calibrate(
    model: Any,
    texts: "Sequence[str] | Sequence[Tensor] | None" = None,
    *,
    tokenizer: Any = None,
    scorer: "str | dict[str, Any] | Scorer" = HardKVConfig.scorer,
    p: float = 0.9,
    interval: int = HardKVConfig.interval,
    window: int = HardKVConfig.window,
    sinks: int = HardKVConfig.sinks,
    length: int | None = None,
    solver: str = "adam",
    measure: "Callable[[Step], Tensor] | None" = None,
    progress: bool = True,
) -> Calibration:
    """Measure what budgets need to know about a model: one dense pass over a few thousand tokens.

    The texts run through the model in steps of `interval` tokens, as in decoding, and nothing is evicted. At each
    event the scorer ranks the tokens of every head, which tells for every count n at once what a head that keeps n
    tokens would still hold (such kept sets are nested, as in the stack simulation of paging, Mattson et al. 1970). The
    squared attention that the next `interval` queries pay to the tokens it would have lost is the loss of the risk
    curves, averaged over queries, the group's query heads, and contexts from a quarter of each text's length on.
    Temperatures are fitted to at most 16 of the events by `hardkv.selectors.fit_temperatures`.

    Args:
        model (`PreTrainedModel`): a causal language model, on any device. Left as it is.
        texts (`list[str]` or `list[Tensor]`, *optional*): texts, or token ids, int64 `[n]` or `[B, n]` without padding.
            By default six texts that come with hardkv: prose, code and mathematics.
        tokenizer (*optional*): for texts; by default that of the model's checkpoint.
        scorer, window, sinks, interval: as in `HardKVConfig`; a calibration serves caches with the same scorer and
            window.
        p (`float`): the attention mass that temperatures are fitted for.
        length (`int`, *optional*): tokens used of each text, by default 2,048 or as many as the model has positions.
            Token ids are used whole.
        solver (`str`): of `fit_temperatures`.
        measure (*optional*): another measure of loss: a function of a `Step`; `squared_attention` by default.
        progress (`bool`): show a bar.

    Raises:
        ValueError: a text too short for two events, or longer than the model allows; no layer with full attention; no
            tokenizer where one is needed; a setting out of range.

    Example:

    ```python
    >>> calibration = calibrate(model, tokenizer=tokenizer, scorer="snapkv")
    >>> calibration.save("smollm2-snapkv.safetensors")
    >>> cache = HardKVCache(config=model.config, scorer="snapkv", budget=512, calibration=calibration)
    ```
    """
    checked = HardKVConfig(scorer, 1 << 30, window, sinks, interval)
    check_fraction("p", p, low_open=True)
    check_name("solver", solver, SOLVERS)
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length is None:
        length = LENGTH if room is None else min(LENGTH, room)
    check_count("length", length, 1)
    batches = _token_batches(model, texts, tokenizer, length)
    batches = [ids[:, : ids.shape[1] - ids.shape[1] % interval].to(model.device) for ids in batches]
    least = max(2 * interval, interval + window + sinks)
    for ids in batches:
        if ids.shape[1] <= least:
            raise ValueError(
                f"a text of {ids.shape[1]} tokens is too short to calibrate on: it must have more than {least} "
                f"(window {window}, sinks {sinks}, interval {interval}); join short texts, or lower the interval"
            )
    longest = max(ids.shape[1] for ids in batches)
    if room is not None and longest > room:
        raise ValueError(f"a text has {longest} tokens and the model takes at most {room}: pass length={room} or less")

    edges = _edges(longest - interval - window - sinks)  # what the last queries have before them
    total_events = sum(ids.shape[0] * (ids.shape[1] // interval) for ids in batches)
    records: list[_Record] = []
    cache = _SurveyCache(
        model.config, records, edges, -(-total_events // SAMPLES), measure or squared_attention, checked
    )
    if not records:
        raise ValueError(f"no layer of {type(model).__name__} uses full attention: there is nothing to calibrate")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    arguments: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1
    try:
        with tqdm(total=sum(ids.numel() for ids in batches), unit="token", disable=not progress) as bar:
            bar.set_description("calibrating")
            for ids in batches:
                cache.begin(ids.shape[1])
                for chunk in ids.split(interval, 1):
                    model(input_ids=chunk, past_key_values=cache, **arguments)
                    cache.restack()
                    bar.update(chunk.numel())
            cache.reset()
            bar.set_description("fitting temperatures")
            fits = [record.fit(p, solver) for record in records]
    finally:
        for module, training in modes.items():
            module.training = training
    counts = torch.tensor(edges) + window + sinks
    digest = hashlib.sha256()
    for ids in batches:
        digest.update(ids.cpu().numpy().tobytes())
    return Calibration(
        temperatures=torch.stack([temperatures for temperatures, _, _ in fits]),
        residuals=torch.stack([residuals for _, residuals, _ in fits]),
        kept=torch.stack([kept for _, _, kept in fits], 1),
        counts=counts,
        risk=torch.stack([record.curve() for record in records]),
        provenance={
            "name": model_name(model.config),
            "geometry": geometry(model.config),
            "config_hash": config_hash(model.config),
            "layers": cache.compressed_layers,
            "scorer": describe_scorer(get_scorer(scorer)),
            "window": window,
            "sinks": sinks,
            "interval": interval,
            "p": p,
            "texts_hash": digest.hexdigest()[:16],
            "tokens": sum(ids.numel() for ids in batches),
            "length": longest,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    )


# ---------------------------------------------------------------------- collecting


@dataclass(frozen=True)
class Step:
    """One layer between two events: what the new queries look for, and what would be gone by then."""

    layer_idx: int
    observation: Observation  # all tokens, those of the step's queries too; nothing is evicted, so rows are equal
    queries: Tensor  # [B, Hq, q, D], after RoPE
    positions: Tensor  # int64 [q], their columns
    sinks: Tensor | None  # [Hq], learned attention sinks
    order: Tensor  # int64 [R, C], the last event's candidates, as places in the row; who kept c has the first c
    edges: Tensor  # int64 [K], the counts c, at most C


def squared_attention(step: Step) -> Tensor:
    """The squared attention that a step's queries pay to the candidates between two counts, float64 `[R, K - 1]`.

    Mean over queries and the query heads of a group.
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
class _Record:
    """What all texts together say about one layer."""

    edges: list[int]
    lost: Tensor | None = None  # float64 [H, K - 1], the loss between two counts, summed over steps
    steps: int = 0
    samples: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # z, A, candidates: each [H, n]

    def curve(self) -> Tensor:
        """Mean loss at every count, float32 `[H, K]`."""
        assert self.lost is not None
        tail = (self.lost / self.steps).flip(-1).cumsum(-1).flip(-1)
        return torch.nn.functional.pad(tail, (0, 1)).float().cpu()

    def fit(self, p: float, solver: str) -> tuple[Tensor, Tensor, Tensor]:
        """Temperatures and residuals `[H]`, and median kept counts `[3, H]`."""
        width = max(z.shape[1] for z, _, _ in self.samples)

        def stack(part: int, fill: Any) -> Tensor:
            rows = [sample[part] for sample in self.samples]
            return torch.stack([torch.nn.functional.pad(r, (0, width - r.shape[1]), value=fill) for r in rows], 1)

        z, reference, mask = stack(0, -torch.inf), stack(1, 0.0), stack(2, False)
        fit = fit_temperatures(z, reference, p, mask=mask, solver=solver)
        before = kept_counts(z, None, reference, p, mask=mask)
        after = kept_counts(z, fit.temperatures, reference, p, mask=mask)
        kept = torch.stack([counts.median(1).values for counts in (fit.counts, before, after)])
        return fit.temperatures.float().cpu(), fit.residuals.float().cpu(), kept.cpu()


def _edges(most: int) -> list[int]:
    """Counts of candidates at which curves are measured: 4 apart at first, then a sixteenth."""
    edges = [0]
    while edges[-1] < most:
        edges.append(min(most, edges[-1] + max(4, edges[-1] // 16)))
    return edges


class _Survey(Budget):
    """Keeps everything, and records what keeping less would have cost."""

    def __init__(self, record: _Record, layer_idx: int, every: int, measure: "Callable[[Step], Tensor]"):
        self.record = record
        self.layer_idx = layer_idx
        self.every = every  # events between two samples for the temperatures
        self.measure = measure
        self.events = 0  # of all texts
        self.begin(0)

    def begin(self, length: int) -> None:
        """Get ready for a text of `length` tokens."""
        self.context_from = length * CONTEXT_FROM
        self.queries: list[tuple[Tensor, Tensor, Tensor | None]] = []  # queries, positions, attention sinks
        self.order: Tensor | None = None  # int64 [R, C], candidates, grouped by the least count that still holds them
        self.pending: tuple[Tensor, Tensor, Tensor] | None = None  # what `_restack` needs to make the next order

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
        lost = self.measure(step).unflatten(0, (observation.batch_size, -1)).sum(0)
        self.record.lost = lost if self.record.lost is None else self.record.lost + lost

    def _sample(self, ranking: Ranking) -> None:
        observation = ranking.observation
        shape = (observation.batch_size, observation.num_kv_heads, -1)
        flat = ranking.z.new_empty(observation.keys.shape[0]).scatter_(0, ranking.token.flatten(), ranking.z.flatten())
        parts = (flat, observation.attention, ~observation.protected)
        self.record.samples.extend(zip(*(part.view(shape).unbind() for part in parts), strict=True))


def _restack(order: Tensor, new: Tensor, rank: Tensor, edges: Sequence[int]) -> Tensor:
    """What heads that keep `edges[0], edges[1], ...` candidates hold after the next event, all at once.

    A head that keeps c candidates holds the first c of `order` (for every c in `edges`) and meets the new ones; the c
    best of these remain. The kept sets of two counts are nested before, so they are nested after: what the larger
    count keeps beyond the smaller one is the best of what the smaller one leaves.

    Args:
        order: int64 `[R, C]`, candidates in groups between edges. new: int64 `[R, m]`.
        rank: int64 `[R, n]`, 0 for the best. edges: ascending from 0.

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
    """Hands the queries of each forward to its `_Survey`."""

    def decode(self, new: NewTokens, query: Tensor, *args: Any, sinks: Tensor | None, **kwargs: Any) -> Tensor:
        positions = torch.arange(new.start, new.stop, device=query.device)
        assert isinstance(self.budget, _Survey)
        self.budget.queries.append((query, positions, sinks))
        return super().decode(new, query, *args, sinks=sinks, **kwargs)


class _SurveyCache(HardKVCache):
    """A cache that evicts nothing and fills one `_Record` a layer."""

    def __init__(
        self,
        config: Any,
        records: list[_Record],
        edges: list[int],
        every: int,
        measure: "Callable[[Step], Tensor]",
        settings: HardKVConfig,
    ):
        self._survey = lambda idx: _Survey(_Record(edges), idx, every, measure)
        chosen = {name: getattr(settings, name) for name in ("scorer", "budget", "window", "sinks", "interval")}
        super().__init__(config, **chosen)
        records.extend(layer.budget.record for layer in self._compressed)  # type: ignore[attr-defined]

    def _new_layer(self, idx: int, budget: Budget) -> HardKVLayer:
        return _SurveyLayer(self.settings, self._survey(idx), idx)

    def restack(self) -> None:
        """After a forward: the next order of every layer that had an event, all at once, as each takes many steps."""
        surveys = [layer.budget for layer in self._compressed if isinstance(layer.budget, _Survey)]
        waiting = [(survey, survey.pending) for survey in surveys if survey.pending is not None]
        if not waiting:
            return
        old, new, rank = (torch.cat(parts) for parts in zip(*(pending for _, pending in waiting), strict=True))
        orders = _restack(old, new, rank, surveys[0].record.edges).split([rank.shape[0] for _, (_, _, rank) in waiting])
        for (survey, _), order in zip(waiting, orders, strict=True):
            survey.order, survey.pending = order, None

    @property
    def compressed_layers(self) -> list[int]:
        return [layer.layer_idx for layer in self._compressed]

    def begin(self, length: int) -> None:
        """Forget the last text and get ready for one of `length` tokens."""
        self.reset()
        for layer in self._compressed:
            layer.budget.begin(length)  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- texts


def default_texts() -> dict[str, str]:
    """The texts that come with hardkv, by name."""
    folder = resources.files("hardkv") / "data" / "calibration"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name)
    return {
        file.name.removesuffix(".txt"): file.read_text(encoding="utf-8") for file in files if "LICENSE" not in file.name
    }


def _token_batches(model: Any, texts: Any, tokenizer: Any, length: int) -> list[Tensor]:
    """Token ids `[B, n]` of each text."""
    if isinstance(texts, str | Tensor):
        raise TypeError("texts must be a list: wrap a single text, [text]")
    texts = list(default_texts().values()) if texts is None else list(texts)
    if not texts:
        raise ValueError("texts is empty: pass at least one, or None for those that come with hardkv")
    batches = []
    for text in texts:
        if isinstance(text, Tensor):
            if text.dim() not in (1, 2) or text.is_floating_point():
                raise ValueError(f"token ids {text.dtype} {tuple(text.shape)} must be integers, [n] or [B, n]")
            batches.append(text.view(-1, text.shape[-1]).long())
            continue
        if tokenizer is None:
            tokenizer = _load_tokenizer(model)
        ids = tokenizer(text, truncation=True, max_length=length).input_ids
        batches.append(torch.tensor([ids]))
    return batches


def _load_tokenizer(model: Any) -> Any:
    name = model_name(model.config)
    try:
        if not name:
            raise OSError("it was not loaded from a checkpoint")
        ggufs = [file.name for file in Path(name).glob("*.gguf")]
        return transformers.AutoTokenizer.from_pretrained(name, **({"gguf_file": ggufs[0]} if len(ggufs) == 1 else {}))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model has no tokenizer to be found ({error}): pass tokenizer=, or token ids instead of texts"
        ) from error


# ---------------------------------------------------------------------- once per model


def cache_folder() -> Path:
    """Where `calibration="auto"` keeps files: $HARDKV_CACHE, or hardkv in the user's cache folder."""
    if folder := os.environ.get("HARDKV_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hardkv"


def auto(config: Any, settings: HardKVConfig) -> Calibration:
    """The calibration of a loaded model for these settings: from the user's cache folder, or made now and kept there.

    A file belongs to a checkpoint (its folder or hub id, and for a folder the time its weights were written), a scorer
    and a window; it holds the default texts' result. Delete it to calibrate again.

    Args:
        config: `model.config` of a model in memory. settings: scorer, window, sinks and interval.

    Raises:
        ValueError: the model has no checkpoint, cannot be found in memory, or has no tokenizer.
    """
    name = model_name(config)
    advice = "pass calibration=hardkv.calibrate(model, tokenizer=...) instead of 'auto'"
    if not name:
        raise ValueError(f"calibration='auto' keeps one file a checkpoint, and this model has none: {advice}")
    scorer = get_scorer(settings.scorer)
    described = describe_scorer(scorer)
    identity = [FORMAT, geometry(config), name, _written(name), described]
    identity += [settings.window, settings.sinks, settings.interval]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    label = described.get("name", "scorer")
    path = cache_folder() / f"{Path(name).name}-{label}-{digest}.safetensors"
    if path.is_file():
        return Calibration.load(path)
    model = _find_model(config)
    if model is None:
        raise ValueError(f"calibration='auto' found no model with this config in memory: {advice}")
    try:
        tokenizer = _load_tokenizer(model)
    except ValueError as error:
        raise ValueError(f"calibration='auto': {error}; {advice}") from error
    calibration = calibrate(
        model,
        tokenizer=tokenizer,
        scorer=scorer,
        window=settings.window,
        sinks=settings.sinks,
        interval=settings.interval,
    )
    calibration.save(path)
    return calibration


def _written(name: str) -> int:
    """When the newest file of a checkpoint's folder was written, 0 for one that is no folder."""
    folder = Path(name)
    if not folder.is_dir():
        return 0
    return max((file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()), default=0)


def _find_model(config: Any) -> Any:
    """The loaded model that owns `config`: a cache is given only that. Of several parts of one model, the whole."""
    # isinstance() would ask every object in memory for its __class__, and some answer with a warning
    models = (owner for owner in gc.get_objects() if issubclass(type(owner), PreTrainedModel))
    owners = [model for model in models if model.config is config]
    return max(owners, key=lambda owner: owner.num_parameters(), default=None)

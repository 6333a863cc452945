"""Measure a whole event at a model's shape, relative to the decode steps between two events."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from statistics import median
from typing import Any

import torch

from eval.speed.checks import TOLERANCE, reference_kernels, relative_error
from eval.speed.inputs import Setting, make_tiers
from eval.speed.timing import CudaTimer, describe
from hardkv import HardKVConfig
from hardkv.cache.layer import HardKVLayer
from hardkv.cache.schedule import run_events
from hardkv.cache.storage.queries import QueryRing
from hardkv.cache.storage.tiers import Tiers
from hardkv.kernels import attention
from hardkv.selectors import Risk, RiskCurves, TopK


@dataclass(frozen=True)
class Model:
    """Describe the model and batch to measure: by default Qwen3-8B and a batch of 32."""

    layers: int = 36
    batch: int = 32
    kept: int = 2048
    sinks: int = 4
    seen: int = 16384  # columns so far
    weights: float = 16.4e9  # bytes, read once per step


QWEN = Model()
# Scorer, budget, and whether the keys of a head are similar, which determines how long R-KV searches.
EVENTS = (
    ("attention", "topk", False),
    ("snapkv", "topk", False),
    ("rkv", "topk", False),
    ("attention", "risk", False),
    ("snapkv", "risk", False),
    ("rkv", "risk", False),
    ("rkv", "topk", True),
)
# Measured again with a batch of one, where launches dominate an event.
SMALL_EVENTS = (("snapkv", "topk", False), ("rkv", "topk", False))


def synthetic_curves(model: Model, heads: int) -> RiskCurves:
    """Return losses w / n whose optimal counts, n ~ sqrt(w), spread log-uniformly over a factor of 40."""
    random = torch.Generator().manual_seed(0)
    weight = 40.0 ** (2 * torch.rand(model.layers, heads, 1, generator=random))
    edges = {round(model.seen ** (step / 48)) for step in range(12, 49)}
    counts = torch.tensor(sorted(edges))
    return RiskCurves(counts, weight * (1 / counts - 1 / counts[-1]))


def make_layers(model: Model, setting: Setting, budget: str, alike: bool, count: int) -> list[HardKVLayer]:
    """Make the first `count` layers of a cache one interval after an event, with full dense tiers."""
    if budget == "topk":
        budgets = [TopK(model.kept)] * model.layers
        counts = torch.full((model.layers, setting.heads), model.kept)
    else:
        curves = synthetic_curves(model, setting.heads)
        budgets = Risk(model.kept).for_layers(model.layers, setting.window + model.sinks, curves)
        counts = Risk(model.kept).allocation(curves, model.seen, setting.window + model.sinks)
    layers = []
    for place in range(count):
        lengths = (counts[place] - setting.window).clamp_min(1).repeat(model.batch)
        tiers = make_tiers(setting, lengths, setting.capacity, model.seen, place, alike)
        layer = HardKVLayer(settings_for(model, setting, "attention"), budgets[place], place)
        layer.lazy_initialization(tiers.dense.keys, tiers.dense.values)
        draw, query_heads = setting.normal(place + 1000), setting.heads * setting.group
        queries = draw(model.batch, query_heads, setting.window, setting.dim)
        ring = QueryRing(queries, setting.window)
        ring.append(queries, None, model.seen - setting.window)
        layer.restore(replace(tiers, compressed_at=model.seen - setting.interval, events=1), ring, setting.dim**-0.5)
        layers.append(layer)
    return layers


def settings_for(model: Model, setting: Setting, scorer: str) -> HardKVConfig:
    """Return the settings of the layers; each layer has its own budget."""
    return HardKVConfig(
        scorer=scorer, budget=model.kept, window=setting.window, sinks=model.sinks, interval=setting.interval
    )


def fitting_layers(model: Model, setting: Setting, free: int) -> int:
    """Return how many layers fit in `free` bytes with old and new tiers and the temporaries of one event."""
    layer = model.batch * setting.heads * (model.kept + setting.interval) * setting.token_bytes
    return max(1, min(model.layers, int(free * 0.9 / layer - 8) * 2 // 5))


def restored(layers: Sequence[HardKVLayer], tiers: Sequence[Tiers]) -> Callable[[], None]:
    """Restore the old tiers, which an event only reads, and drop the new ones; return the call that runs the event."""
    for layer, old in zip(layers, tiers, strict=True):
        assert layer.ring is not None
        layer.restore(old, layer.ring, layer.scale)
    return partial(run_events, layers)


def event_error(layer: HardKVLayer, old: Tiers) -> float:
    """Return an event's error against the PyTorch references: the share of tokens only one keeps, or their error."""
    found = []
    for context in (nullcontext(), reference_kernels()):
        with context:
            restored([layer], [old])()
        assert layer.tiers is not None
        found.append(layer.tiers.condensed)
    ours, theirs = ((tier.rows.ids << 32) + tier.positions for tier in found)
    mine, yours = torch.isin(ours, theirs), torch.isin(theirs, ours)
    one_only = float((~mine).sum() + (~yours).sum()) / (ours.shape[0] + theirs.shape[0])
    pairs = [(getattr(found[0], name)[mine], getattr(found[1], name)[yours]) for name in ("keys", "values")]
    return max(one_only, relative_error(pairs))


def decode_us(layers: Sequence[HardKVLayer], timer: CudaTimer, setting: Setting) -> float:
    """Time the attention of a decode step per layer, in the middle of an interval."""
    calls = []
    for place, layer in enumerate(layers):
        assert layer.tiers is not None
        condensed, dense, fill = layer.tiers.condensed, layer.tiers.dense, setting.half_full
        query = setting.normal(place + 2000)(dense.keys.shape[0], setting.heads * setting.group, 1, setting.dim)
        calls.append(
            partial(
                attention.attend_tiers, query, condensed.keys, condensed.values, condensed.rows,
                dense.keys, dense.values, dense.positions, torch.full_like(dense.fill, fill),
                bound=fill, start=layer.tiers.seen, scale=layer.scale,
            )
        )  # fmt: skip
    for call in calls:
        call()
    return timer.graph(calls, timer.eager(calls))


def measure_event(
    scorer: str,
    layers: Sequence[HardKVLayer],
    old: Sequence[Tiers],
    attention_us: float,
    timer: CudaTimer,
    setting: Setting,
    model: Model,
    bandwidth: float,
) -> dict[str, Any]:
    """Measure one scorer's event on layers whose tiers before the event are `old`."""
    for layer in layers:
        layer.settings = settings_for(model, setting, scorer)
    off = event_error(layers[0], old[0])
    if not off <= TOLERANCE:
        raise ArithmeticError(f"wrong: differs from the reference by {off:.2g}")
    for _ in range(2):
        restored(layers, old)()
    event_us = median(timer.wall(restored(layers, old)) for _ in range(9)) * model.layers / len(layers)
    waits = timer.waits(restored(layers, old))
    restored(layers, old)  # drop the new tiers
    step = model.layers * attention_us + model.weights / bandwidth * 1e6
    return {
        "layers": len(layers),
        "relative_error": off,
        "eager_us": event_us,
        "attention_us": model.layers * attention_us,
        "step_us": step,
        "share": event_us / (setting.interval * step),
        "waits": waits,
    }


def measure_events(
    timer: CudaTimer, setting: Setting, model: Model, bandwidth: float, events: Sequence[tuple[str, str, bool]] = EVENTS
) -> Iterator[dict]:
    """Return records of events: `eager_us` by the host's clock, and `share` of the minimum time of an interval's steps.

    A step's minimum is the time to read the weights once at the copy bandwidth, plus all layers' measured attention. If
    memory does not suffice for all layers, fewer are measured and the times are scaled.
    """
    for (budget, alike), group in groupby(events, key=itemgetter(1, 2)):
        prepared = None
        for scorer, _, _ in group:
            record: dict[str, Any] = {
                "operation": "event",
                "backend": "hardkv",
                "scorer": scorer,
                "budget": budget,
                "alike": alike,
                "shape": asdict(model) | {"rows": model.batch * setting.heads, "mean": model.kept, "lengths": budget},
            }
            try:
                if prepared is None:
                    count = fitting_layers(model, setting, timer.free_bytes())
                    layers = make_layers(model, setting, budget, alike, count)
                    prepared = layers, [layer.tiers for layer in layers], decode_us(layers, timer, setting)
                    del layers
                record |= measure_event(scorer, *prepared, timer, setting, model, bandwidth)
            except Exception as error:  # as above
                record["error"] = describe(error)
            yield record
        del prepared
        timer.release()

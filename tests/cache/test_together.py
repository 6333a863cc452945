"""Test that layers in a joint event keep exactly the tokens that each would keep alone."""

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from hardkv import HardKVCache, HardKVConfig
from hardkv.cache import schedule
from hardkv.cache.argument import CACHE
from hardkv.cache.events import run as events
from hardkv.cache.events import select as event
from hardkv.cache.layer import HardKVLayer
from hardkv.cache.storage.queries import QueryRing
from hardkv.selectors import RKV, AdaKV, Adaptive, Attention, Pyramid, Risk, RiskCurves, SnapKV, TopK, TopP

SIZES = {"window": 4, "sinks": 1, "interval": 6}
STEPS = [40, *[1] * 19]


@dataclass(frozen=True)
class ByValue:
    """A scorer that reads the values, which are gathered only on request."""

    across_layers = True

    def score(self, observation):
        return observation.attention.clamp_min(1e-30).log() + observation.values.float().norm(dim=-1).log()


@dataclass(frozen=True)
class Alone(ByValue):
    across_layers = False


@pytest.fixture
def groups(monkeypatch):
    """Record the sizes of the groups that go through `select` together."""
    sizes = []
    select = event.select

    def spy(inputs):
        sizes.append(len(inputs))
        return select(inputs)

    monkeypatch.setattr(events, "select", spy)
    return sizes


def apart(monkeypatch):
    """Run each layer in a separate event, without waiting for others."""
    monkeypatch.setattr("hardkv.cache.schedule.WAITING_BYTES", 0)
    monkeypatch.setattr(event, "TOGETHER_BYTES", 0)
    monkeypatch.setattr(event, "TOGETHER_SHARE", 0)


def run(model, inputs, run_feed, prepare=None, **options):
    cache = HardKVCache(config=model.config, **SIZES, **options)
    if prepare is not None:
        prepare(cache)
    return cache, [logits for *_, logits in run_feed(model, cache, **inputs, chunks=STEPS)]


def assert_same(cache, other):
    for idx in range(len(cache.layers)):
        assert [[h.tolist() for h in heads] for heads in cache.kept(idx)] == [
            [h.tolist() for h in heads] for heads in other.kept(idx)
        ]
        ours, theirs = cache.layers[idx].tiers, other.layers[idx].tiers
        for one, two in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert one.shape == two.shape
        for tier in ("condensed", "sparse"):
            mine, yours = getattr(ours, tier), getattr(theirs, tier)
            for name in ("keys", "values", "positions", "misses", "cu_seqlens"):
                assert torch.equal(getattr(mine, name), getattr(yours, name))
        if ours.temperatures is not None:
            torch.testing.assert_close(ours.temperatures, theirs.temperatures)


def share_by_risk(cache):
    """A risk budget from curves that differ from head to head."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(3)
        counts = torch.tensor([2, 4, 8, 16, 32, 64])
        weight = 40 ** torch.rand(3, 2, 1, generator=generator)
        budgets = Risk(20).for_layers(3, 0, RiskCurves(counts, weight * (1 / counts - 1 / 64)))
    for layer, budget in zip(cache.layers, budgets, strict=True):
        layer.budget = budget


def give_temperatures(cache):
    """Set calibrated temperatures, different for every head."""
    for idx, layer in enumerate(cache.layers):
        layer.temperatures = torch.tensor([0.5 + idx, 3.0 / (1 + idx)])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize(
    ("scorer", "budget", "more"),
    [
        pytest.param(Attention(), TopK(20), {}, id="attention-topk"),
        pytest.param(SnapKV(), AdaKV(20), {}, id="snapkv-adakv"),
        pytest.param(RKV(), Adaptive(20), {}, id="rkv-adaptive"),
        pytest.param(SnapKV(), TopP(0.7, floor=8, cap=24), {}, id="snapkv-topp"),
        pytest.param(SnapKV(), Pyramid(20, beta=2), {}, id="pyramid"),
        pytest.param(Attention(), Pyramid(Adaptive(20), beta=2), {}, id="pyramid-adaptive"),
        pytest.param(ByValue(), TopK(20), {}, id="by value"),
        pytest.param(Alone(), AdaKV(20), {}, id="alone"),
        pytest.param(SnapKV(), TopK(20), {"prepare": share_by_risk}, id="risk"),
        pytest.param(SnapKV(), Adaptive(20), {"prepare": give_temperatures}, id="temperatures"),
        pytest.param(SnapKV(), Adaptive(20), {"calibration": "online", "refit": 2}, id="refitted"),
        pytest.param(SnapKV(), TopP(0.7, floor=8, cap=24), {"calibration": "online"}, id="online"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*temperatures stopped")
def test_together_as_alone(
    batch, patience, scorer, budget, more, groups, monkeypatch, tiny_model, tiny_prompts, run_feed
):
    model, inputs = tiny_model("llama"), tiny_prompts(batch, 40, new=19)
    options = {"scorer": scorer, "budget": budget, "patience": patience, **more}
    cache, logits = run(model, inputs, run_feed, **options)
    assert set(groups) == {1 if isinstance(scorer, Alone) else 3}
    apart(monkeypatch)
    groups.clear()
    alone, expected = run(model, inputs, run_feed, **options)
    assert set(groups) == {1}
    assert_same(cache, alone)
    for one, two in zip(logits, expected, strict=True):
        assert torch.equal(one, two)


def other_scale(model, cache):
    model.model.layers[1].self_attn.scaling *= 4


def other_softcap(model, cache):
    model.model.layers[1].self_attn.attn_logit_softcapping = 0.2


def calibrated_alone(model, cache):
    cache.layers[1].temperatures = torch.tensor([0.05, 3.0])


@pytest.mark.parametrize("differ", [other_scale, other_softcap, calibrated_alone])
def test_layers_that_differ_are_scored_apart(differ, groups, monkeypatch, run_feed, tiny_prompts):
    """All three layers in the prompt's event and in two later ones; the middle one is not like the others."""

    def run_differing():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
        types = ["full_attention"] * 3
        config = Gemma2Config(**sizes, **heads, vocab_size=98, attn_logit_softcapping=5.0, layer_types=types)
        config._attn_implementation = "eager"  # which knows soft caps
        model = Gemma2ForCausalLM(config).double().eval()
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= 40  # make attention sharp enough that tokens differ in weight
        cache = HardKVCache(config=config, scorer="snapkv", budget=Adaptive(20), **SIZES)
        differ(model, cache)
        inputs = tiny_prompts(3, 40, new=19)["input_ids"]
        for _ in run_feed(model, cache, inputs, torch.ones_like(inputs), STEPS):
            pass
        return cache

    cache = run_differing()
    apart(monkeypatch)
    assert_same(cache, run_differing())
    assert set(groups) == {1}


class Waits(TorchDispatchMode):
    """Count the numbers that the host reads from tensors one by one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
def test_the_host_waits_as_often_for_eight_layers_as_for_one(padded, tiny_model, tiny_prompts):
    """With the mask that generate() brings, whether or not it hides anything."""
    counts = []
    for layers in (1, 8):
        model = tiny_model("llama", num_hidden_layers=layers)
        inputs = tiny_prompts(3, 40)
        if not padded:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        cache = HardKVCache(config=model.config, budget=20, **SIZES)
        with torch.no_grad():
            for step in range(SIZES["interval"] + 1):
                with Waits() as waits:
                    model(**inputs, **{CACHE: cache})
                ones = torch.ones_like(inputs["input_ids"][:, :1])
                inputs = {"input_ids": ones, "attention_mask": torch.cat([inputs["attention_mask"], ones], 1)}
                if step in (0, SIZES["interval"]):  # with events
                    counts.append(waits.count)
        assert cache.stats().events == 2
        assert all(layer.tiers.dense.even for layer in cache.layers)
    assert counts[:2] == counts[2:]


# ---------------------------------------------------------------- who goes with whom


def grouped(sizes, kinds=None, across=None):
    """The groups of layers with keys of `sizes` bytes, kinds, and scorers that take several layers or not."""
    kinds, across = kinds or [0] * len(sizes), across or [True] * len(sizes)
    layers = [
        SimpleNamespace(
            kind=kind,
            tiers=SimpleNamespace(key_bytes=size),
            settings=SimpleNamespace(scorer=SimpleNamespace(across_layers=each)),
        )
        for size, kind, each in zip(sizes, kinds, across, strict=True)
    ]
    return list(event.groups(layers))


def test_groups_of_neighbours_that_are_alike_and_within_the_bound(monkeypatch):
    monkeypatch.setattr(event, "TOGETHER_SHARE", 0.5)
    monkeypatch.setattr(event, "TOGETHER_BYTES", 0)
    assert grouped([]) == []
    assert grouped([10] * 4) == [[0, 1], [2, 3]]  # half of 40 bytes
    assert grouped([10, 10, 10, 14]) == [[0, 1], [2], [3]]  # half of 44: 10 + 14 are too many
    monkeypatch.setattr(event, "TOGETHER_BYTES", 30)
    assert grouped([10] * 4) == [[0, 1, 2], [3]]
    assert grouped([40, 1, 1]) == [[0], [1, 2]]  # more than the bound by itself
    monkeypatch.setattr(event, "TOGETHER_BYTES", 1000)
    assert grouped([10] * 5, kinds="aabba") == [[0, 1], [2, 3], [4]]
    assert grouped([10] * 4, across=[False] * 4) == [[0], [1], [2], [3]]


def test_what_makes_layers_of_another_kind(tiny_model, tiny_prompts):
    """Every difference that a common observation cannot express."""
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, budget=Adaptive(12), calibration="online", **SIZES)
    model(**tiny_prompts(2), **{CACHE: cache})
    one, other = (layer.event_inputs() for layer in cache.layers[:2])
    assert one.kind == other.kind
    tiers, ring, dense = one.tiers, one.ring, one.tiers.dense

    def of_dense(**changes):
        return {"tiers": replace(tiers, dense=replace(dense, **changes))}

    more_heads = QueryRing(torch.zeros(2, 8, 1, 8), ring.capacity)
    more_heads.append(torch.zeros(2, 8, tiers.seen, 8), None, 0)
    fewer = QueryRing(torch.zeros(2, 4, 1, 8), ring.capacity)
    fewer.append(torch.zeros(2, 4, 2, 8), None, tiers.seen - 2)
    assert more_heads.available(tiers.seen) == ring.available(tiers.seen)
    for changes in (
        {"scale": 0.7},
        {"softcap": 5.0},
        {"latent": 4},
        {"pinned": 3},
        {"temperatures": torch.ones(2)},
        {"tiers": replace(tiers, temperatures=None)},
        {"ring": ring.resized(ring.capacity + 1, tiers.seen)},
        {"ring": more_heads},
        {"ring": fewer},
        of_dense(keys=dense.keys.double()),
        of_dense(keys=dense.keys[..., :4]),
        of_dense(keys=dense.keys[:, :1]),
        of_dense(values=dense.values[..., :4]),
    ):
        assert replace(one, **changes).kind != one.kind, changes
    one, other = (replace(each, tiers=replace(tiers, temperatures=None, fitted=None)) for each in (one, other))
    assert one.due == [True, True]
    assert one.kind == other.kind
    assert replace(one, budget=TopP(0.5)).kind != one.kind  # a fit of other temperatures


# ---------------------------------------------------------------- when


class Layer:
    """A layer with `nbytes` of a prompt, for a schedule."""

    def __init__(self, nbytes=40, across=True):
        self.tiers = SimpleNamespace(dense=SimpleNamespace(nbytes=nbytes))
        self.settings = SimpleNamespace(scorer=SimpleNamespace(across_layers=across))
        self.ready = False

    def event_inputs(self):
        return self

    def install(self, tiers):
        self.tiers, self.ready = tiers, False


@pytest.fixture
def ran(monkeypatch):
    """The layers of every start of events, whose new tiers are their names, and room for 100 bytes to wait."""
    starts = []

    class Events:
        def __init__(self, inputs):
            self.inputs = inputs
            starts.append(inputs)

        def finish(self, wanted):
            return ((i, "new") for i in range(len(self.inputs)) if wanted(i))

    monkeypatch.setattr(schedule, "Events", Events)
    monkeypatch.setattr(schedule, "WAITING_BYTES", 100)
    return starts


def test_layers_of_a_prompt_wait_until_they_hold_enough(ran):
    layers = [Layer() for _ in range(6)]
    plan = schedule.EventSchedule(layers)
    for _ in range(2):  # prompts
        ran.clear()
        for i, layer in enumerate(layers):
            plan.finish()
            assert [each.ready for each in layers[:i]] == [False] * (i - i % 2) + [True] * (i % 2)
            layer.tiers, layer.ready = Layer().tiers, True
            plan.prefilled(layer, 40)  # of the next layer too: 120 bytes after two layers
        assert ran == [layers[:2], layers[2:4], layers[4:]]
        assert not any(layer.ready for layer in layers)
        assert plan.under_way is None


def test_layers_that_have_had_their_event_do_not_wait(ran):
    layers = [Layer() for _ in range(4)]
    plan = schedule.EventSchedule(layers)
    for layer in layers:
        plan.prefilled(layer, 40)
    assert ran == []
    assert plan.waiting_bytes == 0
    plan.waiting_bytes = 90  # of a prompt that failed
    layers[0].ready = True
    plan.prefilled(layers[0], 40)
    assert (plan.waiting_bytes, ran) == (40, [])


def test_who_may_wait(ran):
    plan = schedule.EventSchedule([])
    assert plan.may_wait(Layer(), 50)
    assert not plan.may_wait(Layer(), 51)  # two of them would be too many
    assert not plan.may_wait(Layer(across=False), 1)
    silent = Layer()
    silent.settings.scorer = object()  # says nothing of several layers
    assert not plan.may_wait(silent, 1)


def test_events_of_steps_run_after_the_last_layer(ran):
    layers = [Layer() for _ in range(3)]
    plan = schedule.EventSchedule(layers)
    layers[0].ready = layers[2].ready = True
    for layer in layers[:2]:
        plan.decoded(layer)
    assert ran == []
    plan.decoded(layers[2])
    assert ran == [[layers[0], layers[2]]]
    assert [layer.tiers == "new" for layer in layers] == [True, False, True]
    plan.decoded(layers[2])
    assert len(ran) == 1


def test_a_layer_that_changed_meanwhile_keeps_its_tiers(ran):
    layers = [Layer(), Layer()]
    events = schedule.LayersEvents(layers)
    layers[0].tiers = "changed"
    events.finish()
    assert [layer.tiers for layer in layers] == ["changed", "new"]
    plan = schedule.EventSchedule(layers)
    plan.under_way = events
    assert copy.copy(plan).under_way is None


# ---------------------------------------------------------------- how much


@pytest.mark.parametrize(
    ("budget", "arguments", "outside", "fixed"),
    [
        (TopK(20), (3, 100, 0), 3 * (20 - 8), True),
        (TopK(20), (3, 100, 50), 3 * (60 - 8), True),  # window, sinks and 50 pinned columns
        (TopK(20), (3, 15, 0), 3 * (15 - 8), True),
        (TopK(20), (3, 5, 0), 0, True),
        (TopP(0.9, cap=30), (3, 100, 0), 3 * (30 - 8), False),
        (TopP(0.9, cap=30), (3, 100, 50), 3 * (60 - 8), False),
        (TopP(0.9, cap=30), (3, 25, 50), 3 * (25 - 8), False),
        (TopP(0.9, cap=None), (3, 100, 0), 3 * (100 - 8), False),
        (TopP(0.9, cap=None), (3, 5, 0), 0, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [16, 4])
def test_most_tokens_outside_the_dense_tier(budget, arguments, outside, fixed, bits):
    """With codes the sinks stay in the dense tier as well."""
    settings = HardKVConfig(budget=budget, window=8, sinks=2, bits=bits)
    found = HardKVLayer(settings, budget, 0).most_condensed(*arguments)
    assert found == (outside if bits == 16 else max(outside - 3 * 2, 0), fixed)

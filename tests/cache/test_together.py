"""Test that layers in a joint event keep exactly the tokens that each would keep alone."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.cache.events import run as events
from hardkv.cache.events import select as event
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

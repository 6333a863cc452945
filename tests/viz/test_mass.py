"""Cumulative mass: the curves are the scores' and the attention's, and cuts are where `TopP` cuts."""

import pytest
import torch

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.selectors import TopP
from hardkv.viz import plot_mass
from tests.cache.conftest import make_model, make_prompts

SETTINGS = {"budget": 400, "window": 4, "interval": 5, "sinks": 1, "scorer": "snapkv"}


@pytest.fixture(scope="module")
def cache():
    model = make_model("qwen3")
    cache = HardKVCache(config=model.config, **SETTINGS)
    with torch.no_grad():
        model(**make_prompts(2, length=150), **{CACHE: cache})
    return cache


def lines(axis):
    """Names, with what they keep, and curves."""
    curves = [line for line in axis.lines if ": keeps" in line.get_label()]
    names = [line.get_label().split(": keeps ") for line in curves]
    assert len(curves) == 3
    return {name: (int(kept.split()[0]), torch.as_tensor(line.get_ydata())) for (name, kept), line in
            zip(names, curves, strict=True)}  # fmt: skip


@pytest.mark.parametrize("p", [0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize(("layer_idx", "head", "sequence"), [(0, 0, 1), (2, 1, 0)])
def test_cuts_are_those_of_top_p(cache, p, layer_idx, head, sequence):
    drawn = lines(plot_mass(cache, layer_idx, head, sequence, p=p, temperature=0.5).axes[0])
    observation = cache.observe(layer_idx)
    row = observation.row == 2 * sequence + head
    protected = int(observation.protected[row].sum())
    z = cache.settings.scorer.score(observation)
    candidates = row & ~observation.protected
    for name, scores, temperature in (
        ("raw attention", torch.log(observation.attention), 1.0),
        ("scores, T = 1", z, 1.0),
        ("scores, T = 0.5", z, 0.5),
    ):
        kept, mass = drawn[name]
        temperatures = torch.full((observation.num_rows,), temperature)
        expected = TopP(p, cap=None).select(scores.double(), observation, temperatures)
        assert kept == int(expected[row].sum()) - protected
        probability = (scores[candidates].double() / temperature).softmax(0)
        torch.testing.assert_close(mass, probability.sort(descending=True).values.cumsum(0), atol=1e-6, rtol=0)


def test_the_fitted_temperature_keeps_what_raw_attention_keeps(cache):
    drawn = lines(plot_mass(cache, 1, p=0.8).axes[0])
    (raw, _), (uncalibrated, _), (calibrated, _) = drawn.values()
    assert 0 < raw < uncalibrated
    assert raw - 2 <= calibrated <= raw  # plateaus of the pooled scores may cost a token


def test_a_calibrated_cache_brings_its_own_temperature():
    model = make_model("qwen3")
    cache = HardKVCache(config=model.config, **(SETTINGS | {"budget": TopP(0.7)}), calibration="online")
    with torch.no_grad():
        model(**make_prompts(2, length=150), **{CACHE: cache})
    temperature = cache.stats().temperatures[2][1][0]
    assert f"scores, T = {temperature:.2g}" in lines(plot_mass(cache, 2, 0, 1).axes[0])


def test_what_cannot_be_drawn_is_refused(cache):
    for head, sequence in ((2, 0), (0, 2), (-1, 0)):
        with pytest.raises(IndexError, match="2 KV heads, and the cache 2 sequences"):
            plot_mass(cache, 0, head, sequence)
    with pytest.raises(ValueError, match="p=0 must lie in"):
        plot_mass(cache, 0, p=0)
    with pytest.raises(ValueError, match="layer_idx=9"):
        plot_mass(cache, 9)
    model = make_model("qwen3")
    short = HardKVCache(config=model.config, **SETTINGS)
    with torch.no_grad():
        model(**make_prompts(1, length=4), **{CACHE: short})
    with pytest.raises(ValueError, match="protected tokens only"):
        plot_mass(short, 0)

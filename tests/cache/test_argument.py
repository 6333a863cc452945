"""Test the name of the argument that passes a cache in transformers, which changed in 5.24."""

import warnings

import pytest
import torch

import hardkv
from hardkv import HardKVCache, calibrate
from hardkv.cache.argument import CACHE, NAMES, argument_of, take
from tests.cache.conftest import make_model, make_prompts

NEW = 12


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "sdpa")


@pytest.fixture(autouse=True)
def _no_deprecations():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


def test_the_name_is_that_of_a_model(model):
    assert argument_of(model) == CACHE


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_the_cache_under_both_names(model, name):
    inputs, cache = make_prompts(2), HardKVCache(config=model.config, budget=8, window=4, interval=4, sinks=1)
    out = hardkv.generate(model, **inputs, **{name: cache}, max_new_tokens=NEW, do_sample=False)
    assert cache.get_seq_length() == out.shape[1] - 1
    assert cache.stats().events > 0


def test_two_caches_are_one_too_many(model):
    caches = {name: HardKVCache(config=model.config) for name in NAMES}
    with pytest.raises(TypeError, match="cache and past_key_values are two names of one argument"):
        hardkv.generate(model, **make_prompts(1), **caches, max_new_tokens=NEW)
    assert all(cache.get_seq_length() == 0 for cache in caches.values())


def test_no_cache_under_a_name_is_none():
    kwargs = {"cache": None, "past_key_values": None, "other": 1}
    assert take(kwargs) is None
    assert kwargs == {"other": 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_with_either_name_is_calibrated(model, name, monkeypatch):
    """Models with code from the Hub use the old name or the new one."""
    forward = model.forward

    def old(input_ids, past_key_values, **kwargs):
        return forward(input_ids, **{CACHE: past_key_values}, **kwargs)

    def new(input_ids, cache, **kwargs):
        return forward(input_ids, **{CACHE: cache}, **kwargs)

    monkeypatch.setattr(model, "forward", {"cache": new, "past_key_values": old}[name])
    assert argument_of(model) == name
    tokens = torch.arange(2 * 48).view(2, 48) % 90
    found = calibrate(model, list(tokens), interval=8, window=4, sinks=1, progress=False)
    assert len(found.temperatures) > 0

"""Test that quantised caches go through all that other caches go through.

Every forward equals masked dense attention on what the codes stand for, and that never changes (`Follower`).
"""

import pytest
import torch

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.selectors import AdaKV, Adaptive
from tests.cache.following import Follower
from tests.cache.test_modes import (
    EVICT,
    MODES,
    beam_search,
    chunked_prefill,
    draft_by_the_same_weights,
    early_stop,
    extended,
    greedy,
    look_up,
    repetitive,
    step,
    three_turns,
)
from tests.cache.test_turns import converse

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def followed(model, name, bits, **settings):
    """Return an evicting cache with bits, and its `Follower`."""
    cache = HardKVCache(config=model.config, bits=bits, **(EVICT | settings))
    return cache, Follower(model, cache, name)


PLAIN = "qwen3", 4, {"scorer": "snapkv", "patience": 1}
SLIDING = "gemma3", (8, 3), {"budget": AdaKV(9)}


@pytest.mark.parametrize(
    ("mode", "name", "bits", "settings"),
    [
        *((mode, *PLAIN) for mode in MODES),
        *((mode, *SLIDING) for mode in (beam_search, chunked_prefill, early_stop, three_turns)),
    ],
)
def test_mode(mode, name, bits, settings, tiny_model, tiny_prompts):
    """Greedy search, sampling, beams, prompts in chunks, rows that ended, several turns, forwards by hand."""
    model = tiny_model(name)
    cache, follower = followed(model, name, bits, **settings)
    torch.manual_seed(0)
    mode(model, tiny_prompts(3), cache)
    assert follower.evicted >= 5
    assert all(each.since.any() for each in follower.decoded.values())


@pytest.mark.parametrize(
    ("assistant", "name", "bits"),
    [(look_up, "gemma3", 4), (draft_by_the_same_weights, "qwen3", (4, 8)), ("other weights", "qwen3", 2)],
)
def test_assisted_decoding(assistant, name, bits, tiny_model):
    """What is taken back was not quantised yet."""
    model = tiny_model(name)
    cache, follower = followed(model, name, bits)
    if assistant == "other weights":
        tokens = greedy(model, repetitive(), cache, max_new_tokens=16, assistant_model=tiny_model(name, seed=7))
    else:
        tokens = assistant(model, name, cache)
    greedy(model, extended(repetitive(), tokens, [3, 4]), cache, max_new_tokens=8)
    assert follower.evicted >= 8


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"bits": 4, "offload": True}),
        ("llama", {"bits": (4, 2), "budget": Adaptive(10), "calibration": "online", "refit": 1, "patience": 2}),
        ("gemma3", {"bits": 3, "pin_prompt": True, "budget": 24}),
    ],
    ids=str,
)
def test_conversations(name, settings, tiny_model):
    """Later turns' masks hide columns of rows that ended; prompts are padded, further ones too."""
    model = tiny_model(name)
    _, follower = followed(model, name, **settings)
    converse(model, follower.cache)
    assert follower.forwards == 1 + 3 * 7
    assert follower.evicted > 6


def test_crop_after_events(tiny_model, tiny_prompts):
    model = tiny_model("qwen3")
    cache, follower = followed(model, "qwen3", 3, scorer="snapkv")
    model(**tiny_prompts(1), **{CACHE: cache})
    for index, remove in enumerate([0, 2, 1, 3, 0, 4, 1]):
        for token in range(4):
            step(model, cache, [20 + 5 * index + token])
        cache.crop(-remove)
    assert follower.evicted == 28

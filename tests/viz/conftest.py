"""One small recorded generation for all pictures of what a cache holds."""

import pytest
import torch

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from tests.cache.conftest import make_model, make_prompts


def recorded(**settings):
    """A cache with patience, and the trace of its generation: 2 sequences, the first left-padded."""
    model = make_model("gemma3")  # compresses layers 1 and 3
    sizes = {"budget": 12, "window": 4, "interval": 5, "sinks": 1, "patience": 2}
    cache = HardKVCache(config=model.config, scorer="snapkv", **sizes, **settings)
    with cache.record() as trace, torch.no_grad():
        model.generate(**make_prompts(2), **{CACHE: cache}, max_new_tokens=22, do_sample=False)
    return cache, trace


@pytest.fixture(scope="session")
def run():
    """`recorded()`, once for all."""
    return recorded()

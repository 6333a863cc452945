"""Test that generations and steps leave nothing behind: no object, no context variable.

The garbage collector is off, so that a cycle shows as an object left behind. What `generate()` itself leaves with a
DynamicCache (three objects a generation with transformers 5.17, none with 5.24) does not count.
"""

import contextvars
import gc

import pytest
from transformers import DynamicCache

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.decoding.generate import graphed
from tests.cache.conftest import make_model, make_prompts
from tests.models.tiny import tiny_model

SETTINGS = {"budget": 8, "window": 4, "interval": 4, "sinks": 1}
GENERATIONS = 25
OPTIONS = {
    "eager": {},
    "graphed": {"custom_generate": graphed},
    "compiled": {"custom_generate": graphed, "compile": True},
}


WAYS = ["eager", "graphed", pytest.param("compiled", marks=pytest.mark.slow)]


def generations(model, count, new, cache=None, kind=HardKVCache, **options):
    """Generate `count` times, each with a cache of its own unless one is reset."""
    for _ in range(count):
        if cache is not None:
            cache.reset()
        own = kind(config=model.config, **(SETTINGS if kind is HardKVCache else {})) if cache is None else cache
        model.generate(**make_prompts(2), **{CACHE: own}, max_new_tokens=new, **options)


def left_behind(run, first=None):
    """Count objects and context variables that a call leaves behind, after a first call that fills one-time state.

    Args:
        first: a shorter first call.
    """
    (first or run)()
    gc.collect()
    gc.disable()
    try:
        objects, variables = len(gc.get_objects()), len(contextvars.copy_context())
        run()
        return len(gc.get_objects()) - objects, len(contextvars.copy_context()) - variables
    finally:
        gc.enable()


def by_generate(model, count, new):
    """Count the objects that transformers leaves behind without our cache."""
    return left_behind(lambda: generations(model, count, new, kind=DynamicCache, do_sample=False))[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reused", [False, True], ids=["new", "reset"])
def test_generations_leave_nothing_behind(way, reused):
    model = make_model("qwen3", num_hidden_layers=2)
    cache = HardKVCache(config=model.config, **SETTINGS) if reused else None
    options = OPTIONS[way] | {"do_sample": False}
    objects, variables = left_behind(lambda: generations(model, GENERATIONS, 6, cache, **options))
    assert objects - by_generate(model, GENERATIONS, 6) < GENERATIONS  # not one of each generation
    assert variables == 0


@pytest.mark.slow
def test_a_thousand_generations_leave_nothing_behind():
    """Eager and graphed in turn, each with a cache of its own."""
    model, new = make_model("qwen3", num_hidden_layers=1), 2

    def in_turn(pairs):
        for _ in range(pairs):
            generations(model, 1, new, **OPTIONS["eager"], do_sample=False)
            generations(model, 1, new, **OPTIONS["graphed"], do_sample=False)

    objects, variables = left_behind(lambda: in_turn(500), first=lambda: in_turn(5))
    assert objects - 10 * by_generate(model, 100, new) < 100
    assert variables == 0


@pytest.mark.parametrize("way", WAYS)
def test_steps_leave_nothing_behind(way):
    model, new = make_model("qwen3", num_hidden_layers=2), 80
    options = OPTIONS[way] | {"do_sample": True, "top_k": 5, "repetition_penalty": 1.1}
    objects, variables = left_behind(lambda: generations(model, 1, new, **options))
    assert objects - by_generate(model, 1, new) < new
    assert variables == 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "falcon_h1", "deepseek_v3")]
)
def test_layers_of_other_kinds_leave_nothing_behind(name):
    """Test sliding windows, linear attention and latents."""
    model, options = tiny_model(name), OPTIONS["graphed"] | {"do_sample": False}
    objects, variables = left_behind(lambda: generations(model, GENERATIONS, 6, **options))
    assert objects - by_generate(model, GENERATIONS, 6) < GENERATIONS
    assert variables == 0

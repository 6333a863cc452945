"""Inject failures at every torch operation and at every line of the cache's code.

After a failure the cache continues exactly like one that never failed, before or after the failed action, or refuses
to be used until it is reset. CI injects 2 failures, evenly spread, into every scenario; HARDKV_FAULTS=100000
injects every possible one.
"""

import copy
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.cache_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import hardkv.cache
from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.selectors import AdaKV
from tests.models.tiny import tiny_model as make_model

SAMPLES = int(os.environ.get("HARDKV_FAULTS", "2"))
EVICT: dict[str, Any] = {"budget": AdaKV(8), "window": 3, "sinks": 1, "interval": 3, "patience": 1}
CODE = (os.path.dirname(hardkv.cache.__file__), transformers.cache_utils.__file__)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class OutOfMemory(TorchDispatchMode):
    """Let `count` torch operations pass and fail at the next."""

    error = torch.OutOfMemoryError

    def __init__(self, count: int):
        super().__init__()
        self.left = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise self.error("out of memory")
        return func(*args, **(kwargs or {}))


class Interrupt:
    """Let `count` lines of the cache's code pass, in hardkv and transformers, and interrupt before the next."""

    error = KeyboardInterrupt

    def __init__(self, count: int):
        self.left = count

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def call(self, frame, event, arg):
        return self.line if frame.f_code.co_filename.startswith(CODE) else None

    def line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                raise self.error
        return self.line


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "one layer": ("llama", {"num_hidden_layers": 1}),
    "two layers": ("llama", {"num_hidden_layers": 2}),
    "sliding last": ("gemma3", {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}),
    "sliding first": ("gemma3", {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
    "convolutions": (
        "lfm2",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3]},
    ),
}


def feed(model, cache, tokens: list[int]) -> Tensor:
    """Logits `[B, q, V]` of one forward over the same tokens in every row, row numbers added."""
    rows = 2
    for layer in cache.layers:
        if hasattr(layer, "tiers"):
            rows = layer.batch_size if layer.tiers is not None else rows
        elif getattr(layer, "keys", None) is not None:
            rows = len(layer.keys)
    ids = torch.tensor(tokens) + torch.arange(rows)[:, None]
    return model(input_ids=ids, **{CACHE: cache}).logits


Action = Callable[[Any, HardKVCache], Any]


def prompt(model, cache):
    return feed(model, cache, list(range(20, 31)))


def token(model, cache):
    return feed(model, cache, [7])


def chunk(model, cache):
    return feed(model, cache, [7, 8, 9, 10])


def crop(model, cache):
    cache.crop(-2)


def reorder(model, cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def repeat(model, cache):
    cache.batch_repeat_interleave(2)


def select(model, cache):
    cache.batch_select_indices(torch.tensor([1]))


def reset(model, cache):
    cache.reset()


def record(model, cache):
    cache.activate_past_recording()


# name -> (what happened before, what is interrupted, what follows)
SCENARIOS: dict[str, tuple[list[Action], Action, list[Action]]] = {
    "prompt": ([], prompt, [token] * 4),
    "token without an event": ([prompt, token], token, [token] * 4),
    "token with an event": ([prompt, token, token], token, [token] * 4),
    "chunk with an event": ([prompt, token, token], chunk, [token] * 4),
    "recorded prompt": ([record], prompt, [crop, token, token]),
    "recorded draft": ([record, prompt, crop], chunk, [crop, token, token]),
    "crop with an event": ([record, prompt, chunk], crop, [chunk, crop, token, token]),
    "token after a held event": ([record, prompt, crop, chunk], token, [token] * 4),
    "reorder": ([prompt, token, token], reorder, [token] * 3),
    "repeat": ([prompt, token, token], repeat, [token] * 3),
    "select": ([prompt, token, token], select, [token] * 3),
    "reset": ([prompt, token, token], reset, [prompt, token, token]),
}


def held(cache: HardKVCache) -> list[Any]:
    """Return everything that a cache reports about its contents."""
    layers = [idx for idx, layer in enumerate(cache.layers) if hasattr(layer, "tiers")]
    kept = [[[head.tolist() for head in heads] for heads in cache.kept(idx)] for idx in layers]
    return [kept, cache.get_seq_length(), cache.lengths("sparse").tolist(), cache.stats().events]


def go_on(model, cache, actions: list[Action]) -> list[Any]:
    """Logits of each action that has any, what the cache holds after it, and the logits of a last token."""
    trail = []
    for action in actions:
        logits = action(model, cache)
        trail.append([None if logits is None else logits.tolist(), held(cache)])
    return [trail, feed(model, cache, [40]).tolist()]


def refuses(model, cache) -> bool:
    """Return whether the cache reports itself unusable; if so, check that it does so again and that reset() helps."""

    def forward(past):
        model(input_ids=torch.full((2, 1), 7), **{CACHE: past})

    try:
        forward(copy.deepcopy(cache))
    except ValueError as error:  # the batch was repeated or reduced
        if "another batch" not in str(error):
            raise
        return False
    except RuntimeError as error:
        if "reset()" not in str(error):
            raise
    else:
        return False
    for call in (forward, reorder, lambda past: past.crop(-1)):
        with pytest.raises(RuntimeError, match=r"reset\(\)"):
            call(model, cache) if call is reorder else call(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = HardKVCache(config=model.config, **EVICT)
    assert go_on(model, cache, [prompt, token]) == go_on(model, fresh, [prompt, token])
    return True


@pytest.fixture(scope="module")
def models(tiny_model):
    return {
        name: make_model(kind, **overrides) if kind == "lfm2" else tiny_model(kind, "sdpa", **overrides)
        for name, (kind, overrides) in MODELS.items()
    }


def transformers_can(model, actions: list[Action]) -> bool:
    """Return whether DynamicCache survives the actions."""
    cache = DynamicCache(config=model.config)
    try:
        for action in [*actions, token]:
            action(model, cache)
    except RuntimeError as error:
        if "must match the size" not in str(error):
            raise
        return False
    return True


CASES = [(name, scenario) for name in MODELS for scenario in SCENARIOS]
# transformers has neither for its linear-attention layers
CASES = [case for case in CASES if case not in (("convolutions", "repeat"), ("convolutions", "select"))]


@pytest.mark.parametrize("fault", [OutOfMemory, Interrupt])
@pytest.mark.parametrize(("name", "scenario"), CASES)
def test_a_fault(name, scenario, fault, models):
    model = models[name]
    history, action, future = SCENARIOS[scenario]
    if not transformers_can(model, [*history, action, *future]):
        pytest.skip("this version of transformers cannot crop its sliding-window layers so")
    start = HardKVCache(config=model.config, **EVICT)
    for earlier in history:
        earlier(model, start)
    before = go_on(model, copy.deepcopy(start), [action, *future])  # and what is made only once is there
    whole = copy.deepcopy(start)
    counter = fault(1 << 40)
    with counter:
        action(model, whole)
    total = (1 << 40) - counter.left
    after = go_on(model, copy.deepcopy(whole), future)
    assert [*before[0][1:], before[1]] == [*after[0], after[1]]
    outcomes = {"before": 0, "after": 0, "refused": 0}
    for count in range(0, total, max(1, total // SAMPLES)):
        cache = copy.deepcopy(start)
        with pytest.raises(fault.error), fault(count):
            action(model, cache)
        if refuses(model, cache):
            outcomes["refused"] += 1
            continue
        twin = copy.deepcopy(cache)
        moved = cache.get_seq_length() != start.get_seq_length()
        if not moved and go_on(model, cache, [action, *future]) == before:
            outcomes["before"] += 1
        else:
            assert go_on(model, twin, future) == after, f"failure {count} of {total}"
            outcomes["after"] += 1
    assert sum(outcomes.values()) >= min(total, SAMPLES) or (scenario, fault) == ("reset", OutOfMemory)  # no operation


# ---------------------------------------------------------------------------------------------- found by the above


def assert_refuses(model, cache):
    """Check that the cache refuses every use, and works again after a reset."""
    for call in (token, crop, reorder, repeat, select):
        with pytest.raises(RuntimeError, match=r"stopped .*reset\(\)"):
            call(model, cache)
    cache.reset()
    fresh = HardKVCache(config=model.config, **EVICT)
    assert go_on(model, cache, [prompt, token]) == go_on(model, fresh, [prompt, token])


def filled(model) -> HardKVCache:
    cache = HardKVCache(config=model.config, **EVICT)
    prompt(model, cache)
    token(model, cache)
    return cache


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("name", ["sliding first", "sliding last"])
def test_a_sliding_layer_that_dies_while_it_stores(name, models, monkeypatch):
    """The layer counts a token before storing it, so in the last layer all lengths agree."""
    model = models[name]
    cache = filled(model)

    def update(layer, keys, values, *args, **kwargs):
        layer.cumulative_length += keys.shape[-2]
        out_of_memory()

    with monkeypatch.context() as patch:
        patch.setattr(transformers.cache_utils.DynamicSlidingWindowLayer, "update", update)
        with pytest.raises(torch.OutOfMemoryError):
            token(model, cache)
    assert_refuses(model, cache)


@pytest.mark.parametrize("start", ["prompt", "token"])
@pytest.mark.parametrize("path", ["layers.0", "layers.1.self_attn", "layers.1", "layers.2.operator_norm"])
def test_a_forward_that_dies_between_linear_layers(path, start):
    """Their states have no length to tell how far it came; here no attention layer follows the last of them."""
    if start == "prompt" and path != "layers.0" and not hasattr(transformers.cache_utils, "DummyLayer"):
        pytest.skip("transformers 5.17 has linear layers that no model uses, so one that was not reached says nothing")
    model = make_model("lfm2")  # a convolution, attention, a convolution
    cache = HardKVCache(config=model.config, **EVICT) if start == "prompt" else filled(model)
    hook = model.get_submodule(f"model.{path}").register_forward_hook(out_of_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            (prompt if start == "prompt" else token)(model, cache)
    finally:
        hook.remove()
    for call in (token, reorder):
        with pytest.raises(RuntimeError, match=r"stopped .*reset\(\)"):
            call(model, cache)
    cache.reset()
    fresh = HardKVCache(config=model.config, **EVICT)
    assert go_on(model, cache, [prompt, token]) == go_on(model, fresh, [prompt, token])


@pytest.mark.parametrize("action", [reorder, repeat, select, reset, crop])
def test_an_operation_that_dies_between_layers(action, models, monkeypatch):
    model = models["two layers"]
    cache = filled(model)
    method = {reorder: "batch_select_indices", select: "batch_select_indices", repeat: "batch_repeat_interleave"}
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[1], method.get(action, action.__name__), out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            action(model, cache)
    assert_refuses(model, cache)


@pytest.mark.parametrize("indices", [[2], [-3], [0, 1, 5], [True], [True, False, True]], ids=str)
def test_rows_that_the_batch_lacks(indices, models):
    """Refused before anything changes."""
    model = models["two layers"]
    cache = filled(model)
    before, twin = held(cache), copy.deepcopy(cache)
    with pytest.raises(IndexError, match="do not fit the 2 sequences"):
        cache.batch_select_indices(torch.tensor(indices))
    if indices[0] is not True:
        with pytest.raises(IndexError, match="do not fit the 2 sequences"):
            cache.reorder_cache(torch.tensor(indices))
    assert held(cache) == before
    assert go_on(model, cache, [token]) == go_on(model, twin, [token])


def test_a_chunk_that_fails_leaves_the_window_that_the_next_event_reads(models, monkeypatch):
    """The step tried again is another one, of a single token: the old queries must not have been overwritten."""
    model = models["one layer"]
    cache = filled(model)
    token(model, cache)
    twin = copy.deepcopy(cache)
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[0], "_store", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            chunk(model, cache)
    assert cache.get_seq_length() == 13
    observed = [past.layers[0].ring.newest(3, 13)[0] for past in (cache, twin)]
    assert torch.equal(*observed)
    assert observed[0].shape[2] == 3
    assert go_on(model, cache, [token] * 4) == go_on(model, twin, [token] * 4)


def test_no_false_alarm_in_a_hybrid_with_layers_that_hold_nothing():
    """Mamba, attention and layers without a cache: whole forwards, and reordering between them, are not refused."""
    model = make_model("nemotron_h", layers_block_type=["mamba", "mlp", "attention", "mlp", "mamba"])
    cache = HardKVCache(config=model.config, **(EVICT | {"budget": 1000}))
    dense = DynamicCache(config=model.config)
    for action in (prompt, token, reorder, token, token, token):
        actual, expected = action(model, cache), action(model, dense)
        if action is not reorder:
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    assert cache.stats().events == 2

"""Test caches that generate() gets but the model does not use, or that get held tokens again: this is never silent."""

import inspect
import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.utils import GenerationMixin

from hardkv import HardKVCache, graphed
from hardkv.cache.argument import CACHE
from hardkv.cache.routing.registry import install
from hardkv.cache.routing.under_way import WAITING, innermost, prefilling
from tests.models.tiny import tiny_model as any_tiny_model

EVICT = {"budget": 12, "window": 4, "sinks": 1, "interval": 3}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def nothing_waits():
    yield
    assert not WAITING
    assert innermost() is None
    assert not prefilling()


@contextmanager
def prepared_by(model, change):
    """Make a generate() whose inputs `change(inputs, cache's name)` changes at every forward."""
    original = model.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        inputs = original(*args, **kwargs)
        change(inputs, "cache" if "cache" in inputs else "past_key_values")
        return inputs

    model.prepare_inputs_for_generation = prepare
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


def prefix_tuned(model):
    """Do as PEFT's prefix tuning: replace an empty cache by its own cache, which holds the prefix."""

    def change(inputs, name):
        if not inputs[name].get_seq_length():
            prefix = DynamicCache(config=model.config)
            keys = torch.zeros(inputs["input_ids"].shape[0], 2, 4, 8)
            for layer in range(3):
                prefix.update(keys, keys, layer)
            inputs[name] = prefix

    return prepared_by(model, change)


def dropping(model):
    return prepared_by(model, lambda inputs, name: inputs.pop(name))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("lost", [prefix_tuned, dropping])
def test_a_cache_that_never_comes_to_the_model_is_noticed(lost, attn, tiny_model, tiny_prompts):
    model = tiny_model("llama", attn=attn)
    cache = HardKVCache(config=model.config, **EVICT)
    with lost(model), pytest.raises(NotImplementedError, match="LlamaForCausalLM runs without it.*DynamicCache"):
        model.generate(**tiny_prompts(2), **{CACHE: cache}, **GREEDY)
    assert cache.get_seq_length() == 0
    expected = model.generate(**tiny_prompts(2), **{CACHE: HardKVCache(config=model.config, **EVICT)}, **GREEDY)
    assert torch.equal(model.generate(**tiny_prompts(2), **{CACHE: cache}, **GREEDY), expected)
    assert not WAITING


@pytest.mark.parametrize("lost", [prefix_tuned, dropping])
def test_graphed_notices_it_too(lost, tiny_model, tiny_prompts):
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, **EVICT)
    with lost(model), pytest.raises(NotImplementedError, match="LlamaForCausalLM runs without it"):
        model.generate(**tiny_prompts(2), **{CACHE: cache}, custom_generate=graphed, **GREEDY)


def test_graphed_looks_itself(monkeypatch, tiny_model, tiny_prompts):
    """Test attention that bypasses transformers' functions."""
    monkeypatch.setattr("hardkv.cache.handover.check_given", lambda module: None)
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, **EVICT)
    with dropping(model), pytest.raises(NotImplementedError, match="LlamaForCausalLM runs without it"):
        model.generate(**tiny_prompts(2), **{CACHE: cache}, custom_generate=graphed, **GREEDY)


def test_a_cache_that_holds_a_turn_is_missed_as_well(tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama"), tiny_prompts(1)
    cache = HardKVCache(config=model.config, **EVICT)
    out = model.generate(**inputs, **{CACHE: cache}, **GREEDY)
    held = cache.get_seq_length()
    with dropping(model), pytest.raises(NotImplementedError, match="runs without it"):
        model.generate(out, **{CACHE: cache}, **GREEDY)
    assert cache.get_seq_length() == held


# --------------------------------------------------------------------------------------------- nothing is wrong here


def test_a_call_that_failed_before_its_forward_leaves_nothing_behind(tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama"), tiny_prompts(2)
    cache = HardKVCache(config=model.config, **EVICT)

    def fail(inputs, name):
        raise RuntimeError("before the forward")

    expected = model.generate(**inputs, **GREEDY)
    with prepared_by(model, fail), pytest.raises(RuntimeError, match="before the forward"):
        model.generate(**inputs, **{CACHE: cache}, **GREEDY)
    assert not WAITING
    model(**inputs)  # the same model, by nobody's generate()
    with prepared_by(model, fail), pytest.raises(RuntimeError, match="before the forward"):
        model.generate(**inputs, **{CACHE: cache}, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_the_same_model_without_the_cache_while_it_waits(tiny_model, tiny_prompts):
    """Of another generation: within the call, as an assistant of the same weights; and in another thread."""
    model, inputs = tiny_model("llama"), tiny_prompts(2)
    expected = model.generate(**inputs, **GREEDY)
    found = []

    def generate_densely(given, name):
        if given[name] is not cache or found:
            return
        found.append(model.generate(**inputs, **GREEDY))
        thread = threading.Thread(target=lambda: found.append(model.generate(**inputs, **GREEDY)))
        thread.start()
        thread.join()
        assert WAITING

    cache = HardKVCache(config=model.config, **EVICT)
    with prepared_by(model, generate_densely):
        model.generate(**inputs, **{CACHE: cache}, **GREEDY)
    assert len(found) == 2
    assert all(torch.equal(each, expected) for each in found)
    assert cache.get_seq_length() == 18
    assert not WAITING


def test_generate_is_wrapped_once_and_has_its_signature():
    """transformers, PEFT and others read the signature."""
    names = ("generate", "_prefill", "_prepare_cache_for_generation")
    before = [getattr(GenerationMixin, name) for name in names]
    install()
    assert [getattr(GenerationMixin, name) for name in names] == before
    assert "streamer" in inspect.signature(GenerationMixin.generate).parameters
    assert "generation_config" in inspect.signature(GenerationMixin._prefill).parameters


def test_lengths_may_be_asked_as_often_as_one_likes(tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama"), tiny_prompts(2)
    cache = HardKVCache(config=model.config, **EVICT)
    assert [cache.get_seq_length() for _ in range(3)] == [0, 0, 0]
    assert [int(cache.get_mask_sizes(5, 0)[0]) for _ in range(3)] == [5, 5, 5]
    model(**inputs)
    model(**inputs, **{CACHE: cache})
    assert cache.get_seq_length() == 13


# ------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_gradient_checkpointing_drops_no_cache_in_silence(name, attn, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name, attn=attn), tiny_prompts(2)
    model.gradient_checkpointing_enable()
    cache = HardKVCache(config=model.config, **EVICT)
    expected = model(**inputs, **{CACHE: HardKVCache(config=model.config, **EVICT)}).logits
    model.train()
    with pytest.raises(NotImplementedError, match=r"checkpointing drops caches.*model.eval\(\)"):
        model(**inputs, **{CACHE: cache}, use_cache=True)
    model.eval()
    assert torch.equal(model(**inputs, **{CACHE: cache}).logits, expected)
    assert cache.get_seq_length() == 13


def test_training_with_gradient_checkpointing_and_no_cache(tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama"), tiny_prompts(2)
    HardKVCache(config=model.config)
    model.gradient_checkpointing_enable()
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.lm_head.weight.grad is not None


# --------------------------------------------------------------------------------------------- past tokens fed again


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"custom_generate": graphed}], ids=["greedy", "beams", "graphed"]
)
@pytest.mark.parametrize("source", ["argument", "generation_config"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_use_cache_false_is_refused_by_generate(attn, source, how, tiny_model, tiny_prompts):
    """generate() would feed all tokens at every step again, on top of those held (DynamicCache takes that)."""
    model, inputs = tiny_model("llama", attn=attn), tiny_prompts(1)
    cache = HardKVCache(config=model.config, **EVICT)
    arguments = GREEDY | how | ({"use_cache": False} if source == "argument" else {})
    if source == "generation_config":
        model.generation_config.use_cache = False
    with pytest.raises(ValueError, match=r"use_cache=False.*feeds all tokens again.*pass use_cache=True"):
        model.generate(inputs["input_ids"], **{CACHE: cache}, **arguments)  # without a mask, which would show it
    assert cache.get_seq_length() == 0
    model.generate(inputs["input_ids"], **{CACHE: cache}, **(arguments | {"use_cache": True}))
    assert cache.get_seq_length() == 18
    model.generate(inputs["input_ids"], max_new_tokens=3, use_cache=False)  # nobody's cache


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("source", ["argument", "config"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_use_cache_false_with_all_tokens_again_is_refused_by_forward(name, source, attn, tiny_model, tiny_prompts):
    model, ids = tiny_model(name, attn=attn), tiny_prompts(1)["input_ids"]
    arguments = {"use_cache": False} if source == "argument" else {}
    model.config.use_cache = source == "argument"
    model(ids, **{CACHE: HardKVCache(config=model.config)}, use_cache=True)  # which shows that its layers are told
    cache = HardKVCache(config=model.config, **EVICT)
    model(ids, **{CACHE: cache}, **arguments)  # as DynamicCache: one forward uses what it is given
    with pytest.raises(ValueError, match="14 tokens come after the 13.*seem to be fed again.*use_cache=True"):
        model(torch.cat([ids, ids[:, :1]], 1), **{CACHE: cache}, **arguments)
    assert cache.get_seq_length() == 13
    model(ids[:, :5], **{CACHE: cache}, **arguments)  # what is new goes in
    model(ids, **{CACHE: cache}, use_cache=True)
    assert cache.get_seq_length() == 31


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo3"])
def test_layers_that_are_not_told_of_use_cache_take_any_chunk(model_type, tiny_prompts):
    """Gemma 3's layers do not get `use_cache`, OLMo 3's always get False."""
    model, ids = any_tiny_model(model_type), tiny_prompts(1)["input_ids"]
    cache = HardKVCache(config=model.config, **EVICT)
    for _ in range(2):
        model(ids[:, :5], **{CACHE: cache}, use_cache=True)
        model(ids[:, 5:], **{CACHE: cache}, use_cache=True)
        cache.reset()

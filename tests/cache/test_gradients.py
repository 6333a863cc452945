"""Test gradients: the first forward has correct ones, later forwards raise, and the cache holds no graph."""

import pytest
import torch
from transformers import DynamicCache

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from tests.models.tiny import tiny_model as make_model

EVICT = {"budget": 8, "window": 4, "sinks": 1, "interval": 3}
MODELS = [("llama", "sdpa"), ("qwen3", "eager"), ("gpt2", "sdpa"), ("gemma3", "sdpa")]


def loss_of(model, inputs, cache):
    return model(**inputs, labels=inputs["input_ids"], **{CACHE: cache}, use_cache=True).loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def stored(cache):
    return [tensor for layer in cache.layers if hasattr(layer, "tiers") for tensor in layer.tensors()]


@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_the_first_forward_has_the_gradients_of_dynamic_cache(name, attn, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name, attn), tiny_prompts(3)
    expected = gradients(model, loss_of(model, inputs, DynamicCache(config=model.config)))
    cache = HardKVCache(config=model.config, scorer="snapkv", **EVICT)
    actual = gradients(model, loss_of(model, inputs, cache))
    assert actual.keys() == expected.keys()
    assert any("k_proj" in key or "c_attn" in key for key in actual)
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=0, atol=1e-5)
    assert cache.stats().events == 1


@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_later_forwards_run_and_refuse_backward(name, attn, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name, attn), tiny_prompts(1)
    plain, cache = (HardKVCache(config=model.config, **EVICT) for _ in range(2))
    model(**inputs, **{CACHE: cache})
    with torch.no_grad():
        model(**inputs, **{CACHE: plain})
    for size in (1, 1, 1, 3, 1):  # through events
        ids = torch.full((1, size), 9)
        logits = model(ids, **{CACHE: cache}).logits
        with torch.no_grad():
            assert torch.equal(logits, model(ids, **{CACHE: plain}).logits)
        assert stored(cache)
        assert not any(tensor.requires_grad for tensor in stored(cache))
        with pytest.raises(RuntimeError, match="keeps no graph of past keys.*use_cache=False"):
            logits.sum().backward()


def test_nothing_to_refuse_without_a_graph(tiny_model, tiny_prompts):
    """Test frozen models, the usual case for generation."""
    model = tiny_model("llama").requires_grad_(False)
    cache = HardKVCache(config=model.config, **EVICT)
    model(**tiny_prompts(1), **{CACHE: cache})
    logits = model(torch.tensor([[9]]), **{CACHE: cache}).logits
    assert not logits.requires_grad
    head = torch.nn.Linear(98, 1)  # trained on what a frozen model says
    head(logits).sum().backward()
    assert head.weight.grad is not None


def test_a_gradient_to_the_models_sinks_alone_is_refused(tiny_prompts):
    model = make_model("gpt_oss", attn="eager").requires_grad_(False)
    model.model.layers[1].self_attn.sinks.requires_grad_(True)
    cache = HardKVCache(config=model.config, **EVICT)
    model(**tiny_prompts(1), **{CACHE: cache})
    logits = model(torch.tensor([[9]]), **{CACHE: cache}).logits
    assert not any(tensor.requires_grad for tensor in stored(cache))
    with pytest.raises(RuntimeError, match="keeps no graph"):
        logits.sum().backward()

"""Test that bad input raises a clear error before any change, and that no failure leaves a cache half updated."""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hardkv import HardKVCache, HardKVConfig, UnroutedKVError
from hardkv.cache.argument import CACHE
from hardkv.cache.incoming import check_rows, check_shape, what_else
from hardkv.selectors import (
    RKV,
    SCORERS,
    AdaKV,
    Adaptive,
    Attention,
    Pyramid,
    Risk,
    SnapKV,
    TopK,
    TopP,
    register_scorer,
)
from tests.models.tiny import tiny_config
from tests.models.tiny import tiny_model as make_model

EVICT: dict[str, Any] = {"budget": 8, "window": 4, "sinks": 1, "interval": 3}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def step(model, cache, token: int = 5, batch: int = 1, mask: Tensor | None = None) -> Tensor:
    """Return logits `[B, V]` after one more token in every row."""
    ids = torch.full((batch, 1), token)
    return model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits[:, -1]


def step_or_refusal(model, cache, token: int = 5) -> Tensor | None:
    """Return the logits of `step`, or None when the cache reports itself unusable."""
    try:
        return step(model, cache, token)
    except RuntimeError as error:
        if "reset()" not in str(error):
            raise
        return None


def held(cache: HardKVCache) -> list[Any]:
    """Return everything that a cache reports about its contents."""
    layers = [idx for idx, layer in enumerate(cache.layers) if hasattr(layer, "tiers")]
    kept = [[[head.tolist() for head in heads] for heads in cache.kept(idx)] for idx in layers]
    lengths = [layer.get_seq_length() for layer in cache.layers]
    return [kept, lengths, cache.lengths("sparse").tolist(), cache.nbytes(), cache.stats().events]


# ---------------------------------------------------------------------------------------------- arguments


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # names
    "scorer name": (
        {"scorer": "snapvk"},
        ValueError,
        r"scorer='snapvk'.*Did you mean 'snapkv'.*attention, rkv, snapkv",
    ),
    "scorer case": ({"scorer": "RKV"}, ValueError, r"scorer='RKV'.*Did you mean 'rkv'"),
    "scorer far off": ({"scorer": "xyzzy"}, ValueError, r"scorer='xyzzy'.*Available: .*attention.*rkv.*snapkv"),
    "scorer dict": ({"scorer": {"name": "rkv", "lamb": 0.1}}, ValueError, r"scorer 'rkv'.*lamb"),
    "scorer dict without name": ({"scorer": {"lam": 0.1}}, ValueError, r"scorer=None is not known"),
    "budget dict": ({"budget": {"name": "topkk", "n": 64}}, ValueError, r"budget='topkk'.*Did you mean 'topk'.*adakv"),
    "budget dict parameter": ({"budget": {"name": "topk", "k": 64}}, ValueError, r"budget 'topk'.*'k'"),
    "attention name": ({"attention": "torhc"}, ValueError, r"attention='torhc'.*'auto'.*torch"),
    "attention suggestion": ({"attention": "torhc"}, ValueError, r"[Dd]id you mean 'torch'"),
    # ranges
    "budget = window + sinks": ({"budget": 36}, ValueError, r"n=36.*window \+ sinks = 32 \+ 4 = 36.*raise the budget"),
    "budget below": ({"budget": 4, "window": 4, "sinks": 1}, ValueError, r"n=4.*4 \+ 1 = 5"),
    "TopK": ({"budget": TopK(36)}, ValueError, r"n=36.*window \+ sinks"),
    "AdaKV": ({"budget": AdaKV(30)}, ValueError, r"n=30.*window \+ sinks"),
    "Adaptive": ({"budget": Adaptive(36)}, ValueError, r"n=36.*window \+ sinks"),
    "Pyramid": ({"budget": Pyramid(36)}, ValueError, r"n=36.*window \+ sinks"),
    "Pyramid of AdaKV": ({"budget": Pyramid(AdaKV(36))}, ValueError, r"n=36.*window \+ sinks"),
    "TopP cap": ({"budget": TopP(0.9, cap=36)}, ValueError, r"cap=36.*window \+ sinks"),
    "budget 0": ({"budget": 0}, ValueError, r"n=0 must be >= 1"),
    "budget negative": ({"budget": -5}, ValueError, r"n=-5 must be >= 1"),
    "window 0": ({"window": 0}, ValueError, r"window=0 must be >= 1"),
    "window negative": ({"window": -1}, ValueError, r"window=-1 must be >= 1"),
    "sinks negative": ({"sinks": -1}, ValueError, r"sinks=-1 must be >= 0"),
    "interval 0": ({"interval": 0}, ValueError, r"interval=0 must be >= 1"),
    "interval negative": ({"interval": -128}, ValueError, r"interval=-128 must be >= 1"),
    "patience negative": ({"patience": -1}, ValueError, r"patience=-1 must be >= 0"),
    "patience too large": ({"patience": 255}, ValueError, r"patience=255 must be >= 0 and <= 254"),
    # types
    "window float": ({"window": 32.0}, TypeError, r"window=32.0 must be an integer, not float"),
    "window bool": ({"window": True}, TypeError, r"window=True must be an integer, not bool"),
    "sinks bool": ({"sinks": False}, TypeError, r"sinks=False must be an integer, not bool"),
    "interval string": ({"interval": "128"}, TypeError, r"interval='128' must be an integer, not str"),
    "interval None": ({"interval": None}, TypeError, r"interval=None must be an integer"),
    "patience bool": ({"patience": True}, TypeError, r"patience=True must be an integer, not bool"),
    "pin_prompt int": ({"pin_prompt": 1}, TypeError, r"pin_prompt=1 must be True or False"),
    "budget bool": ({"budget": True}, TypeError, r"budget=True must be an integer.*TopK\(n\)"),
    "budget float": ({"budget": 0.5}, TypeError, r"budget=0.5 must be an integer.*TopP\(p\)"),
    "budget string": ({"budget": "1024"}, TypeError, r"budget='1024' must be an integer.*TopK\(n\)"),
    "budget None": ({"budget": None}, TypeError, r"budget=None must be an integer"),
    "budget class": ({"budget": TopK}, TypeError, r"must be an integer.*budget object"),
    "scorer class": ({"scorer": Attention}, TypeError, r"scorer=.*pass an instance, not a class"),
    "scorer without score": ({"scorer": object()}, TypeError, r"scorer=.*score\(observation\)"),
    "scorer None": ({"scorer": None}, TypeError, r"scorer=None must be a name"),
    "attention type": ({"attention": 3}, ValueError, r"attention=3.*'auto'"),
    # combinations
    "calibration": ({"budget": TopK(64), "calibration": "online"}, ValueError, r"calibration='online'.*TopK\(n=64\)"),
}


@pytest.mark.parametrize(("arguments", "error", "match"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        HardKVCache(**arguments)
    with pytest.raises(error, match=match):
        HardKVConfig(**arguments)


BAD_OBJECTS = {
    "p 0": (lambda: TopP(0), ValueError, r"p=0 must lie in \(0, 1\]"),
    "p above 1": (lambda: TopP(1.01), ValueError, r"p=1.01 must lie in \(0, 1\]"),
    "p negative": (lambda: TopP(-0.5), ValueError, r"p=-0.5 must lie in"),
    "p NaN": (lambda: TopP(float("nan")), ValueError, r"p=nan must lie in"),
    "p bool": (lambda: TopP(True), TypeError, r"p=True must be a number, not bool"),
    "p string": (lambda: TopP("0.9"), TypeError, r"p='0.9' must be a number"),
    "floor negative": (lambda: TopP(0.9, floor=-1), ValueError, r"floor=-1 must be >= 0"),
    "cap below floor": (lambda: TopP(0.9, floor=64, cap=32), ValueError, r"cap=32 must be >= floor=64"),
    "cap 0": (lambda: TopP(0.9, cap=0), ValueError, r"cap=0 must be >= 1"),
    "n bool": (lambda: TopK(True), TypeError, r"n=True must be an integer"),
    "n float": (lambda: AdaKV(64.0), TypeError, r"n=64.0 must be an integer"),
    "alpha": (lambda: AdaKV(64, alpha=1.5), ValueError, r"alpha=1.5 must lie in \[0, 1\]"),
    "alpha bool": (lambda: AdaKV(64, alpha=True), TypeError, r"alpha=True must be a number"),
    "beta 0": (lambda: Pyramid(64, beta=0), ValueError, r"beta=0 must be >= 1"),
    "n bool of numpy": (lambda: TopK(np.bool_(True)), TypeError, r"n=.*True.* must be an integer"),
    "n bool of torch": (lambda: TopK(torch.tensor(True)), TypeError, r"n=tensor\(True\) must be an integer"),
    "n several": (lambda: TopK(torch.tensor([64, 64])), TypeError, r"n=tensor.* must be an integer"),
    "n float of numpy": (lambda: TopK(np.float64(64)), TypeError, r"n=.*64.* must be an integer"),
    "p bool of numpy": (lambda: TopP(np.bool_(True)), TypeError, r"p=.*True.* must be a number"),
    "p NaN of numpy": (lambda: TopP(np.float32("nan")), ValueError, r"p=nan must lie in"),
    "floor bool": (lambda: Risk(64, floor=True), TypeError, r"floor=True must be an integer"),
    "floor string": (lambda: Risk(64, floor="0.1"), TypeError, r"floor='0.1' must be a number"),
    "kernel float": (lambda: RKV(kernel_size=7.0), TypeError, r"kernel_size=7.0 must be an integer"),
    "kernel bool": (lambda: RKV(kernel_size=True), TypeError, r"kernel_size=True must be an integer"),
    "beta float": (lambda: Pyramid(64, beta=2.5), TypeError, r"beta=2.5 must be an integer"),
    "Pyramid of TopP": (lambda: Pyramid(TopP(0.9)), TypeError, r"n=TopP.*must be an integer"),
    "Adaptive floor": (lambda: Adaptive(64, floor=65), ValueError, r"floor=65 must be <= n=64"),
    "Adaptive cap": (lambda: Adaptive(64, cap=63), ValueError, r"cap=63 must be >= n=64"),
    "kernel even": (lambda: SnapKV(kernel_size=4), ValueError, r"kernel_size=4 must be an odd integer"),
    "pooling": (lambda: SnapKV(pooling="median"), ValueError, r"pooling='median' must be 'max', 'avg' or 'none'"),
    "group_reduce": (lambda: SnapKV(group_reduce="sum"), ValueError, r"group_reduce='sum' must be"),
    "lam": (lambda: RKV(lam=2), ValueError, r"lam=2 must lie in \[0, 1\]"),
}


@pytest.mark.parametrize(("build", "error", "match"), BAD_OBJECTS.values(), ids=BAD_OBJECTS.keys())
def test_bad_scorers_and_budgets(build, error, match):
    with pytest.raises(error, match=match):
        build()


@pytest.mark.parametrize("config", ["llama", {"hidden_size": 32}, 3])
def test_a_config_that_is_none(config):
    with pytest.raises(TypeError, match=r"config=.*HardKVCache\(config=model.config\)"):
        HardKVCache(config=config)


def test_a_model_instead_of_its_config(tiny_model):
    model = tiny_model("gemma3")
    layers = [[type(layer) for layer in HardKVCache(config=given).layers] for given in (model, model.config)]
    assert layers[0] == layers[1]


def test_neither_a_model_nor_a_config():
    with pytest.raises(TypeError, match=r"config=Linear must be a model's config: HardKVCache\(config=model.config\)"):
        HardKVCache(config=torch.nn.Linear(2, 2))


def test_arguments_are_keyword_only(tiny_model):
    with pytest.raises(TypeError, match="positional"):
        HardKVCache(tiny_model("llama", "sdpa").config, "rkv")
    with pytest.raises(TypeError, match="bugdet"):
        HardKVCache(bugdet=64)


def test_pyramid_needs_the_number_of_layers():
    with pytest.raises(ValueError, match=r"Pyramid.*config=model.config"):
        HardKVCache(budget=Pyramid(64))


def test_bad_arguments_leave_the_model_alone(tiny_model):
    model = tiny_model("llama", "eager")
    with pytest.raises(ValueError, match="window"):
        HardKVCache(config=model.config, window=0)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("tier", ["Dense", "all", 0])
def test_an_unknown_tier(tier):
    with pytest.raises(ValueError, match=r"tier=.*condensed.*sparse.*dense"):
        HardKVCache().lengths(tier)


# ---------------------------------------------------------------------------------------------- reuse


@pytest.fixture(params=["llama", "gemma3"])
def filled(request, tiny_model, tiny_prompts):
    """A model and its cache after a prompt and two tokens; gemma3 starts with a sliding-window layer, not with ours."""
    model = tiny_model(request.param, "sdpa")
    cache = HardKVCache(config=model.config, **EVICT)
    model(**tiny_prompts(1), **{CACHE: cache})
    for token in (20, 21):
        step(model, cache, token)
    return request.param, model, cache


@pytest.mark.parametrize(
    ("indices", "fits"),
    [
        ([0, 2, -1, -3], True),
        ([3], False),
        ([-4], False),
        ([0, -4], False),
        ([True, False, True], True),
        ([True, False], False),
        ([True, False, True, True], False),
        ([], True),
    ],
    ids=str,
)
def test_rows_of_three_sequences(indices, fits):
    check_rows(torch.tensor(indices), 0)  # nothing is held yet
    if fits:
        return check_rows(torch.tensor(indices), 3)
    with pytest.raises(IndexError, match=r"do not fit the 3 sequences"):
        check_rows(torch.tensor(indices), 3)


@pytest.mark.parametrize(
    ("held", "got", "times"),
    [
        ((2, 4, 8), (6, 4, 8), 3),
        ((2, 4, 8), (5, 4, 8), None),
        ((6, 4, 8), (2, 4, 8), None),
        ((0, 4, 8), (2, 4, 8), None),
        ((2, 4, 8), (2, 4, 8), None),  # another dtype
        ((2, 4, 8), (2, 2, 8), None),
        ((2, 4, 8), (6, 2, 8), None),
    ],
)
def test_beams_are_advised_where_they_explain_the_shape(held, got, times):
    advice = what_else(held, got)
    assert advice.startswith("this cache belongs to another batch or model")
    assert ("batch_repeat_interleave" in advice) == (times is not None)
    assert times is None or advice.endswith(f"batch_repeat_interleave({times})")


def test_another_shape_of_a_layer_of_transformers():
    layer = DynamicLayer()
    check_shape(layer, 0, torch.zeros(2, 4, 3, 8))  # it holds nothing yet
    layer.update(torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8))
    check_shape(layer, 0, torch.zeros(2, 4, 1, 8))
    for shape in ((3, 4, 1, 8), (2, 2, 1, 8), (2, 4, 1, 16)):
        with pytest.raises(ValueError, match=r"layer 0 holds.*\(2, 4, 8\) and gets"):
            check_shape(layer, 0, torch.zeros(shape))
    layer = DynamicLayer()
    layer.update(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))  # keys without heads are the layer's own matter
    check_shape(layer, 0, torch.zeros(2, 1, 8))


def test_another_batch_size(filled):
    _, model, cache = filled
    before, twin = held(cache), copy.deepcopy(cache)
    with pytest.raises(ValueError, match=r"batch.*another batch or model.*reset\(\)"):
        step(model, cache, batch=2)
    assert held(cache) == before
    assert torch.equal(step(model, cache), step(model, twin))


def test_another_model_of_the_same_shape(filled, tiny_model):
    name, model, cache = filled
    other = tiny_model(name, "sdpa", seed=1)
    before, twin = held(cache), copy.deepcopy(cache)
    with pytest.raises(ValueError, match=r"filled by another model.*reset\(\)"):
        step(other, cache)
    if name == "llama":
        assert held(cache) == before
    # a sliding layer before ours cannot know who calls, so this cache may be lost; but not silently
    logits = step_or_refusal(model, cache)
    assert logits is None or torch.equal(logits, step(model, twin))
    cache.reset()
    assert step(other, cache).isfinite().all()


def test_a_mask_of_the_wrong_width(filled):
    _, model, cache = filled
    before, twin = held(cache), copy.deepcopy(cache)
    with pytest.raises((ValueError, RuntimeError)):
        step(model, cache, mask=torch.ones(1, 9, dtype=torch.long))
    logits = step_or_refusal(model, cache)
    if logits is not None:
        assert held(cache)[1] == [length + 1 for length in before[1]]
        assert torch.equal(logits, step(model, twin))


def test_another_model_of_another_shape(filled, tiny_model):
    _, _, cache = filled
    other = tiny_model("qwen3", "sdpa", num_key_value_heads=4)
    before = held(cache)
    with pytest.raises((ValueError, RuntimeError), match=r"KV heads|another model"):
        step(other, cache)
    assert held(cache) == before


def test_another_dtype(tiny_model, tiny_prompts):
    cache = HardKVCache(**EVICT)
    tiny_model("llama", "sdpa")(**tiny_prompts(1), **{CACHE: cache})
    before = held(cache)
    with pytest.raises(ValueError, match=r"float32 and gets .*float64"):
        step(tiny_model("llama", "sdpa", dtype=torch.float64), cache)
    assert held(cache) == before


def test_a_config_with_fewer_layers_than_the_model(tiny_model, tiny_prompts):
    cache = HardKVCache(config=tiny_model("llama", "sdpa", num_hidden_layers=2).config)
    with pytest.raises(RuntimeError, match=r"layer 2 asks for a cache of 2 layers.*HardKVCache\(config=model.config\)"):
        tiny_model("llama", "sdpa")(**tiny_prompts(1), **{CACHE: cache})


def test_a_handle_of_an_earlier_forward(tiny_model, tiny_prompts):
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config, **EVICT)
    model(**tiny_prompts(1), **{CACHE: cache})
    module, attend = model.model.layers[0].self_attn, ALL_ATTENTION_FUNCTIONS["sdpa"]
    new = torch.randn(1, 2, 1, 8)
    query = torch.randn(1, 4, 1, 8)
    key, value = cache.layers[0].update(new, new)
    attend(module, query, key, value, None)
    later = cache.layers[0].update(new, new)
    attend(module, query, *later, None)
    with pytest.raises(UnroutedKVError, match="cannot be reused later"):
        attend(module, query, key, value, None)
    with pytest.raises(UnroutedKVError, match="the values do not"):
        attend(module, query, cache.layers[0].update(new, new)[0], new, None)
    with pytest.raises(UnroutedKVError, match="the values do not"):
        attend(module, query, cache.layers[0].update(new, new)[0], cache.layers[1].update(new, new)[1], None)


# ---------------------------------------------------------------------------------------------- models


def encoder_decoder(model_type: str, attn: str = "sdpa") -> PreTrainedModel:
    return make_model(
        model_type,
        attn=attn,
        kind=AutoModelForSeq2SeqLM,
        is_decoder=False,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )


def decode(model, inputs, cache, **options) -> Any:
    return model.generate(
        **inputs,
        **{CACHE: cache},
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **({"max_new_tokens": 12} | options),
    )


def test_an_encoder_decoder_model_with_a_bare_cache(tiny_prompts):
    model = encoder_decoder("bart")
    with pytest.raises(RuntimeError, match=r"EncoderDecoderCache\(HardKVCache\(...\), DynamicCache\(\)\)"):
        decode(model, tiny_prompts(3), HardKVCache(config=model.config))
    model = encoder_decoder("t5")
    with pytest.raises(NotImplementedError, match="position_bias|EncoderDecoderCache"):
        decode(model, tiny_prompts(3), HardKVCache(config=model.config))


def test_position_bias_is_refused(tiny_prompts):
    model = encoder_decoder("t5")
    cache = HardKVCache(config=model.config)
    with pytest.raises(NotImplementedError, match=r"'position_bias' \(T5Attention\): use DynamicCache"):
        decode(model, tiny_prompts(3), EncoderDecoderCache(cache, DynamicCache()))
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_an_encoder_decoder_model_with_its_cache(options, attn, tiny_prompts):
    model = encoder_decoder("bart", attn)
    expected = decode(model, tiny_prompts(3), EncoderDecoderCache(DynamicCache(), DynamicCache()), **options)
    for config in (model.config, None):  # without a config, as it is already switched
        cache = HardKVCache(config=config, **(EVICT | {"budget": 100}))
        actual = decode(model, tiny_prompts(3), EncoderDecoderCache(cache, DynamicCache()), **options)
        assert torch.equal(actual.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=2e-5)
        assert cache.stats().events > 1
    cache = HardKVCache(config=model.config, **EVICT)
    decode(model, tiny_prompts(3), EncoderDecoderCache(cache, DynamicCache()), **options)
    assert int(cache.lengths().max()) < EVICT["budget"] + EVICT["interval"]


def test_latent_attention_needs_the_config(tiny_prompts):
    model = make_model("deepseek_v3")
    cache = HardKVCache()
    with pytest.raises(UnroutedKVError, match=r"'linear'.*HardKVCache\(config=model.config\)"):
        model(**tiny_prompts(3), **{CACHE: cache})
    assert cache.get_seq_length() == 0


def scaled(keys, values, weight):
    return F.linear(keys, weight) * 2, F.linear(values, weight)


def with_bias(keys, values, weight):
    return F.linear(keys, weight, torch.zeros(16)), F.linear(values, weight)


def projected(keys, values, weight):
    return F.linear(keys, weight), F.linear(values, weight)


@pytest.mark.parametrize(
    ("expand", "match"),
    [
        (scaled, "changes keys and values between cache and attention"),
        (with_bias, "changes keys and values between cache and attention"),
        (projected, "LlamaAttention changes keys and values.*has no expand_kv"),
        (lambda keys, values, weight: (keys, values), "has a kv_lora_rank.*without expanding it: use DynamicCache"),
    ],
    ids=["scaled", "bias", "no expand_kv", "not expanded"],
)
def test_latents_that_a_model_expands_in_its_own_way(expand, match, tiny_model):
    """What is not transformers' `expand_kv` cannot be absorbed by queries, and must not pass for it."""
    cache, new = HardKVCache(config=tiny_config("deepseek_v3")), torch.randn(1, 1, 3, 8)
    module = tiny_model("llama", "sdpa").model.layers[0].self_attn
    keys, values = cache.update(new, new, 0)
    with pytest.raises(UnroutedKVError, match=match):
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, torch.randn(1, 4, 3, 8), *expand(keys, values, torch.ones(16, 8)), None)
    assert cache.get_seq_length() == 0


def test_latents_that_a_model_lays_out_in_its_own_way(monkeypatch, tiny_prompts):
    """Rotated first: queries of the same layout would be taken apart at the wrong place."""
    model = make_model("deepseek_v3")

    def expand_kv(module, latent, rotated):
        keys, values = expand(module, latent, rotated)
        other = keys.new_empty(*keys.shape)
        plain, rotated = torch.split(keys, [module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
        other[..., : module.qk_rope_head_dim].copy_(rotated)
        other[..., module.qk_rope_head_dim :].copy_(plain)
        return other, values

    attention = type(model.model.layers[0].self_attn)
    expand = attention.expand_kv
    monkeypatch.setattr(attention, "expand_kv", expand_kv)
    with pytest.raises(UnroutedKVError, match="lays keys and values out in another way.*use DynamicCache"):
        model(**tiny_prompts(3), **{CACHE: HardKVCache(config=model.config)})


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices"])
def test_attention_arguments_that_are_refused(name, tiny_model):
    model, cache, states = tiny_model("llama", "sdpa"), HardKVCache(), torch.randn(1, 2, 3, 8)
    key, value = cache.update(states, states, 0)
    with pytest.raises(NotImplementedError, match=rf"'{name}' \(LlamaAttention\): use DynamicCache"):
        ALL_ATTENTION_FUNCTIONS["sdpa"](
            model.model.layers[0].self_attn, torch.randn(1, 4, 3, 8), key, value, None, **{name: torch.zeros(1)}
        )
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("how", ["module", "argument"])
def test_bidirectional_attention_is_refused(how, tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama", "sdpa"), tiny_prompts(1)
    cache = HardKVCache(config=model.config)
    options = {}
    if how == "module":
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    else:
        options["is_causal"] = False
    with pytest.raises(NotImplementedError, match="needs causal self-attention, and LlamaAttention is not"):
        model(**inputs, **{CACHE: cache}, **options)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_sliding_window_without_a_config(name, tiny_model, tiny_prompts):
    model, cache = tiny_model(name, "sdpa", sliding_window=6), HardKVCache(**EVICT)
    with pytest.raises(ValueError, match=r"sliding window of 6 tokens.*HardKVCache\(config=model.config\)"):
        model(**tiny_prompts(1), **{CACHE: cache})
    assert cache.get_seq_length() == 0


def test_a_sliding_window_that_the_config_does_not_mark(tiny_model, tiny_prompts):
    """The config of the other model marks the layers as full ones."""
    model = tiny_model("mistral", "sdpa", sliding_window=6)
    cache = HardKVCache(config=tiny_model("mistral", "sdpa").config)
    with pytest.raises(NotImplementedError, match="sliding window of 6 tokens.*use DynamicCache"):
        model(**tiny_prompts(1), **{CACHE: cache})
    assert cache.get_seq_length() == 0


def test_a_model_of_sliding_layers_only_warns_once(tiny_model, tiny_prompts, recwarn):
    model = tiny_model("mistral", "sdpa", sliding_window=6)
    cache = HardKVCache(config=model.config)
    caught = [str(warning.message) for warning in recwarn if "HardKVCache" in str(warning.message)]
    assert len(caught) == 1
    assert "no layer of MistralConfig uses full attention" in caught[0]
    recwarn.clear()
    expected = decode(model, tiny_prompts(3), DynamicCache(config=model.config))
    actual = decode(model, tiny_prompts(3), cache)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))
    assert not [warning for warning in recwarn if "HardKVCache" in str(warning.message)]
    stats = cache.stats()
    assert stats.warnings == caught
    assert caught[0] in repr(stats)
    assert (stats.layers, stats.compressed_layers, stats.seq_length) == (3, 0, 24)
    assert stats.batch_size == 3
    assert stats.nbytes == stats.dense_nbytes > 0


def test_the_warning_points_at_the_caller(tiny_model):
    config = tiny_model("mistral", "sdpa", sliding_window=6).config
    with pytest.warns(UserWarning, match="compresses nothing") as caught:
        HardKVCache(config=config)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("filled", [True, False], ids=["later", "first"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda values: values[:1],
        lambda values: values[:, :1],
        lambda values: values[:, :, 1:],
        lambda values: values.half(),
        lambda values: values[..., 0],
    ],
    ids=["batch", "heads", "tokens", "dtype", "rank"],
)
def test_values_that_do_not_fit_their_keys(wrong, filled, tiny_model, tiny_prompts):
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config, **EVICT)
    if filled:
        model(**tiny_prompts(3), **{CACHE: cache})
    before, states = held(cache) if filled else cache.nbytes(), torch.randn(3, 2, 4, 8)
    with pytest.raises(ValueError, match=r"layer 0 gets keys \(3, 2, 4, 8\) in torch.float32 and values .* the same"):
        cache.update(states, wrong(states), 0)
    assert (held(cache) if filled else cache.nbytes()) == before
    handles = cache.update(states, torch.randn(3, 2, 4, 8), 0)
    assert [handle.shape for handle in handles] == [(3, 2, cache.get_seq_length() + 4, 8)] * 2


@pytest.mark.parametrize("pin_prompt", [True, False])
def test_a_pinned_prompt_larger_than_the_budget(pin_prompt, tiny_model, tiny_prompts):
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config, pin_prompt=pin_prompt, **(EVICT | {"budget": 16}))
    if not pin_prompt:
        assert model(**tiny_prompts(1), **{CACHE: cache}).logits.isfinite().all()
        return
    with pytest.raises(ValueError, match=r"pin_prompt=True: the prompt has 13 tokens.*16 tokens.*raise the budget"):
        model(**tiny_prompts(1), **{CACHE: cache})
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


def test_a_pinned_prompt_that_just_fits(tiny_model, tiny_prompts):
    """The longest row counts, without its padding."""
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config, pin_prompt=True, **(EVICT | {"budget": 17}))
    decode(model, tiny_prompts(1), cache)
    inputs = {name: value[[0, 2]] for name, value in tiny_prompts(3).items()}  # 9 and 5 tokens
    cache = HardKVCache(config=model.config, pin_prompt=True, **(EVICT | {"budget": 13}))
    decode(model, inputs, cache)
    assert cache.stats().events > 1
    assert int(cache.lengths().max()) < 13 + EVICT["interval"]


def test_a_pinned_prompt_that_outgrows_the_budget_by_a_last_chunk_of_one_token(tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama", "sdpa"), tiny_prompts(1)
    cache = HardKVCache(config=model.config, pin_prompt=True, **(EVICT | {"budget": 16}))
    with pytest.raises(ValueError, match=r"pin_prompt=True: the prompt has 13 tokens"):
        model.generate(**inputs, **{CACHE: cache}, prefill_chunk_size=6, max_new_tokens=2)
    assert cache.get_seq_length() == 12


def test_a_pinned_prompt_that_outgrows_the_budget_in_chunks(tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama", "sdpa"), tiny_prompts(1)
    cache = HardKVCache(config=model.config, pin_prompt=True, **(EVICT | {"budget": 16}))
    model(input_ids=inputs["input_ids"][:, :10], **{CACHE: cache})
    before = held(cache)
    with pytest.raises(ValueError, match=r"pin_prompt=True: the prompt has 13 tokens"):
        model(input_ids=inputs["input_ids"][:, 10:], **{CACHE: cache})
    assert held(cache) == before


# ---------------------------------------------------------------------------------------------- failures midway


def fail_after(model: torch.nn.Module, path: str, error: BaseException):
    """Raise once a submodule has run; returns the hook."""

    def hook(*_):
        raise error

    return model.get_submodule(path).register_forward_hook(hook)


@pytest.mark.parametrize("when", ["first forward", "later"])
@pytest.mark.parametrize(
    "path",
    [
        "model.layers.0",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1",
        "model.layers.2.self_attn.q_proj",
    ],
)
@pytest.mark.parametrize("name", ["llama", "llama without config", "gemma3"])
def test_a_forward_that_dies_between_layers(name, path, when, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name.split()[0], "sdpa"), tiny_prompts(1)
    cache = HardKVCache(config=None if "without" in name else model.config, **EVICT)
    if when == "later":
        model(**inputs, **{CACHE: cache})
    hook = fail_after(model, path, MemoryError("out of memory"))
    with pytest.raises(MemoryError, match="out of memory"):
        step(model, cache) if when == "later" else model(**inputs, **{CACHE: cache})
    hook.remove()
    for _ in range(2):  # and stays so
        with pytest.raises(RuntimeError, match=r"earlier forward pass stopped between layers.*reset\(\)"):
            step(model, cache)
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        cache.crop(-1)
    cache.reset()
    fresh = HardKVCache(config=model.config, **EVICT)
    assert torch.equal(model(**inputs, **{CACHE: cache}).logits, model(**inputs, **{CACHE: fresh}).logits)
    for token in range(5):
        assert torch.equal(step(model, cache, token), step(model, fresh, token))
    assert held(cache) == held(fresh)


def test_a_forward_that_dies_after_all_layers_is_whole(tiny_model, tiny_prompts):
    """Every layer has stored the token, so the cache continues after it."""
    model, inputs = tiny_model("llama", "sdpa"), tiny_prompts(1)
    cache, fresh = (HardKVCache(config=model.config, **EVICT) for _ in range(2))
    for past in (cache, fresh):
        model(**inputs, **{CACHE: past})
    hook = fail_after(model, "lm_head", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        step(model, cache, 20)
    hook.remove()
    step(model, fresh, 20)
    assert cache.get_seq_length() == 14
    assert torch.equal(step(model, cache, 21), step(model, fresh, 21))
    assert held(cache) == held(fresh)


@dataclass
class Failing:
    """The attention scorer, except that its call number `fail_at` raises."""

    fail_at: int
    error: BaseException = field(default_factory=lambda: MemoryError("out of memory"))
    calls: int = 0

    def __deepcopy__(self, memo):
        return self

    def score(self, observation):
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise self.error
        return Attention().score(observation)


@pytest.mark.parametrize("error", [MemoryError("out of memory"), KeyboardInterrupt()], ids=["memory", "interrupt"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("event", [0, 1, 2])
@pytest.mark.parametrize("patience", [0, 1])
def test_an_event_that_raises(patience, event, layer, error, tiny_model, tiny_prompts):
    """Afterwards the cache either reports itself unusable, or continues exactly like a cache without the failure."""
    model, inputs = tiny_model("llama", "sdpa"), tiny_prompts(1)
    cache = HardKVCache(config=model.config, scorer=Failing(3 * event + layer, error), patience=patience, **EVICT)
    fresh = HardKVCache(config=model.config, scorer="attention", patience=patience, **EVICT)
    if event == 0:
        with pytest.raises(type(error)):
            model(**inputs, **{CACHE: cache})
    else:
        for past in (cache, fresh):
            model(**inputs, **{CACHE: past})
            for token in range(3 * event - 1):
                step(model, past, token)
        with pytest.raises(type(error)):
            step(model, cache, 20)
    lengths = {other.get_seq_length() for other in cache.layers}
    if len(lengths) > 1:
        before = held(cache)
        with pytest.raises(RuntimeError, match=r"earlier forward pass stopped between layers.*reset\(\)"):
            step(model, cache)
        assert held(cache) == before
        cache.reset()
        fresh.reset()
        assert cache.nbytes() == 0
    elif lengths != {fresh.get_seq_length()}:  # every layer stored the forward that died in the last one
        step(model, fresh, 20)
    if cache.get_seq_length() == 0:
        for past in (cache, fresh):
            model(**inputs, **{CACHE: past})
    for token in range(60, 68):
        torch.testing.assert_close(step(model, cache, token), step(model, fresh, token), rtol=0, atol=1e-6)
    assert held(cache)[:3] == held(fresh)[:3]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_held_event_that_raises_in_crop(layer, tiny_model, tiny_prompts):
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config, scorer=Failing(3 + layer), **EVICT)
    fresh = HardKVCache(config=model.config, scorer="attention", **EVICT)
    for past in (cache, fresh):
        model(**tiny_prompts(1), **{CACHE: past})
        past.activate_past_recording()
        model(input_ids=torch.full((1, 5), 9), **{CACHE: past})
    with pytest.raises(MemoryError):
        cache.crop(-1)
    fresh.crop(-1)
    lengths = {other.get_seq_length() for other in cache.layers}
    if len(lengths) > 1:
        with pytest.raises(RuntimeError, match=r"reset\(\)"):
            step(model, cache)
        return
    if lengths == {18}:
        cache.crop(-1)
    assert torch.equal(step(model, cache), step(model, fresh))
    assert held(cache)[:3] == held(fresh)[:3]


def test_storing_that_raises_is_not_done_twice(monkeypatch, tiny_model, tiny_prompts):
    """A failure after the dense tier was written, in the very first layer: the token must not be there twice."""
    from hardkv.cache.storage.queries import QueryRing

    model = tiny_model("llama", "sdpa")
    cache, fresh = (HardKVCache(config=model.config, **EVICT) for _ in range(2))
    for past in (cache, fresh):
        model(**tiny_prompts(1), **{CACHE: past})
    with monkeypatch.context() as patch:
        patch.setattr(QueryRing, "append", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
        with pytest.raises(MemoryError):
            step(model, cache, 20)
    logits = step_or_refusal(model, cache, 20)
    if logits is not None:
        assert torch.equal(logits, step(model, fresh, 20))
        assert held(cache)[:3] == held(fresh)[:3]


# ---------------------------------------------------------------------------------------------- scorers of the user


def nan_scores(observation):
    return Attention().score(observation) * torch.nan


def infinite_scores(observation):
    return torch.full_like(Attention().score(observation), -torch.inf)


BAD_SCORES = {
    "nan": (nan_scores, r"returned NaN or infinite scores; return log-scores"),
    "infinite": (infinite_scores, r"returned NaN or infinite scores"),
    "too short": (lambda o: Attention().score(o)[:-1], r"returned torch.float32 \(\d+,\).*one .*score per token"),
    "two dimensions": (lambda o: Attention().score(o)[None], r"returned torch.float32 \(1, \d+\)"),
    "padded": (lambda o: o.to_padded(Attention().score(o)), r"returned torch.float32 \(1, 2, \d+\)"),
    "integers": (lambda o: o.positions, r"returned torch.int32"),
    "numpy": (lambda o: Attention().score(o).cpu().numpy(), r"returned ndarray"),
    "nothing": (lambda o: None, r"returned NoneType"),
}


@pytest.fixture(params=["object", "registered"])
def scorer_of(request):
    """Make a scorer from a function, given as an object or by a registered name."""
    before = dict(SCORERS)

    def make(function):
        @dataclass(frozen=True)
        class Mine:
            def score(self, observation):
                return function(observation)

        if request.param == "object":
            return Mine()
        register_scorer("mine")(Mine)
        return "mine"

    yield make
    SCORERS.clear()
    SCORERS.update(before)


@pytest.mark.parametrize(("function", "match"), BAD_SCORES.values(), ids=BAD_SCORES.keys())
def test_a_scorer_that_returns_nonsense(function, match, scorer_of, tiny_model, tiny_prompts):
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config, scorer=scorer_of(function), **EVICT)
    with pytest.raises(ValueError, match=rf"scorer .*Mine.*{match}"):
        model(**tiny_prompts(1), **{CACHE: cache})
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


def test_a_scorer_that_works(scorer_of, tiny_model, tiny_prompts):
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config, scorer=scorer_of(lambda o: -o.keys.norm(dim=-1)), **EVICT)
    decode(model, tiny_prompts(3), cache)
    assert cache.stats().events > 1
    assert int(cache.lengths().max()) < EVICT["budget"] + EVICT["interval"]

"""Layers of more than one kind: states beside keys and values, latents, keys of pictures, heads that differ."""

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache

from hardkv import HardKVCache, calibrate
from hardkv.cache.argument import CACHE
from hardkv.cache.hybrid import HybridLayer
from tests.models.probe import EVICT, HOLD_ALL, NEW, PROMPT, Recording, assert_near, oracle_run, run
from tests.models.tiny import random_ids, tiny_model

HYBRIDS = ["falcon_h1", "zamba2", "zaya"]  # all layers; some; with two states
LATENT = ["deepseek_v2", "deepseek_v3", "kimi_linear"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def beams(model, cache):
    """Scores and tokens of beam search, which reorders the cache."""
    ids = random_ids(2, PROMPT)
    return model.generate(
        input_ids=ids, **{CACHE: cache}, max_new_tokens=NEW, num_beams=3, do_sample=False
    )  # [2, PROMPT + NEW]


@pytest.mark.parametrize("model_type", [*HYBRIDS, *LATENT])
def test_beams_equal_dynamic_cache(model_type):
    model = tiny_model(model_type)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert torch.equal(beams(model, cache), beams(model, DynamicCache(config=model.config)))
    assert cache.stats().events > 1


@pytest.mark.parametrize("model_type", [*HYBRIDS, *LATENT])
def test_after_reset_nothing_is_left(model_type):
    model = tiny_model(model_type)
    cache = HardKVCache(config=model.config, **EVICT)
    first = run(model, cache)
    run(model, copy.deepcopy(cache).reset() or HardKVCache(config=model.config))  # neither touches the other
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(model, cache), first)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_states_count_and_follow_the_batch(model_type):
    model = tiny_model(model_type)
    dense, cache = DynamicCache(config=model.config), HardKVCache(config=model.config, **EVICT)
    for past in (dense, cache):
        run(model, past)
    hybrids = [layer for layer in cache.layers if isinstance(layer, HybridLayer)]
    assert hybrids
    for layer in hybrids:
        states = layer.states()
        assert states
        assert layer.dense_nbytes() > sum(state.nbytes for state in states)
        assert {id(state) for state in states} <= {id(tensor) for tensor in layer.tensors()}
        before = [state.clone() for state in states]
        layer.batch_select_indices(torch.tensor([False, True]))
        assert all(torch.equal(new[0], old[1]) for new, old in zip(layer.states(), before, strict=True))
        layer.batch_repeat_interleave(2)
        assert {state.shape[0] for state in layer.states()} == {layer.batch_size} == {2}
        assert layer.is_croppable == (not any(layer.is_recurrent_states_initialized.values()))


def test_states_that_cannot_go_back_leave_the_cache_as_it_was():
    model = tiny_model("falcon_h1")
    cache = HardKVCache(config=model.config, **EVICT)
    run(model, cache)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths


@pytest.mark.parametrize("model_type", ["falcon_h1", "deepseek_v3", "gemma4_text"])
def test_calibration(model_type, tmp_path):
    """Survey layers carry states, rank latents, and know heads of more than one size."""
    model = tiny_model(model_type)
    texts = [random_ids(60, seed=seed) for seed in range(2)]
    calibration = calibrate(model, texts, window=4, sinks=1, interval=3, scorer="attention", progress=False)
    calibration.save(tmp_path / "calibration.safetensors")
    settings = EVICT | {"calibration": tmp_path / "calibration.safetensors"}
    cache = Recording(config=model.config, scorer="attention", **settings)
    assert "Risk" in cache.stats().budget
    attn = model.config._attn_implementation
    assert_near(run(model, cache), oracle_run(model, cache.held, attn), "calibrated")


@pytest.mark.parametrize("model_type", LATENT)
def test_latents_are_what_is_stored(model_type):
    """One row of latents and rotated keys a token, not every head's keys and values."""
    model = tiny_model(model_type)
    cache, dense = HardKVCache(config=model.config, **HOLD_ALL), DynamicCache(config=model.config)
    for past in (cache, dense):
        run(model, past)
    latent = [layer for layer in cache.layers if getattr(layer, "latent", False)]
    assert latent
    for layer in latent:
        assert layer.num_kv_heads == 1
        for tier in (layer.tiers.condensed, layer.tiers.dense):
            assert tier.keys.shape[-1] == model.config.kv_lora_rank + model.config.qk_rope_head_dim
            assert tier.values.shape[-1] == 0
    assert cache.dense_nbytes() == sum(
        tensor.nbytes
        for layer in dense.layers
        for tensor in (
            [layer.keys, layer.values]
            if getattr(layer, "keys", None) is not None
            else [*layer.conv_states.values(), *layer.recurrent_states.values()]
        )
        if tensor is not None
    )


@pytest.mark.parametrize("scorer", ["attention", "snapkv", "rkv"])
def test_latents_in_double_precision(scorer):
    """At this tolerance one forgotten or doubled token shows, however little it weighs."""
    model = tiny_model("minicpm3").double()
    cache = Recording(config=model.config, scorer=scorer, patience=1, **EVICT)
    actual = run(model, cache)
    expected = oracle_run(model, cache.held, "sdpa")
    # its norms and rotations are float32 whatever the dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunks", [[5, 4, 3], [1, 9, 2]], ids=str)
@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_linear", "falcon_h1"])
def test_the_prompt_in_chunks(model_type, chunks):
    model = tiny_model(model_type)
    ids = random_ids(2, sum(chunks))
    logits = []
    for cache in (DynamicCache(config=model.config), HardKVCache(config=model.config, **HOLD_ALL)):
        parts = [model(input_ids=part, **{CACHE: cache}).logits for part in ids.split(chunks, 1)]
        logits.append(torch.cat(parts, 1))
    assert_near(logits[1], logits[0], "chunks")


def test_a_model_that_asks_for_masks_in_every_layer_is_refused_for_what_it_does():
    """Inkling's layers make their own masks, in the middle of a forward pass, which is not a broken one."""
    model = tiny_model("inkling_text")
    with pytest.raises(NotImplementedError, match=r"'position_bias' \(InklingAttention\): use DynamicCache"):
        run(model, HardKVCache(config=model.config))


@pytest.mark.parametrize("model_type", ["deepseek_v32", "qwen4_exp_text"])
def test_layers_that_grow_all_the_same_are_named(model_type):
    with pytest.warns(UserWarning, match=r"\d of 3 layers of .*DynamicIndexedLayer.*compresses nothing here") as caught:
        cache = HardKVCache(config=tiny_model(model_type).config)
    assert caught[0].filename == __file__
    assert "DynamicIndexedLayer" in repr(cache.stats())


def test_no_warning_where_everything_is_compressed():
    config = tiny_model("falcon_h1").config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HardKVCache(config=config).stats().compressed_layers == config.num_hidden_layers


def test_a_padded_chunk_whose_keys_are_read_twice():
    """The second reader comes when the chunk is stored, and its mask covers what was there before."""
    model, logits = tiny_model("gemma3n_text"), []
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, [0, 1, 12]] = 0
    for kind, settings in ((DynamicCache, {}), (HardKVCache, {"budget": 1000})):
        cache = kind(config=model.config, **settings)
        model(ids[:, :11], attention_mask=mask[:, :11], **{CACHE: cache})
        logits.append(model(ids[:, 11:], attention_mask=mask, **{CACHE: cache}).logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)

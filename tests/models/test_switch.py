"""Models that rotate all keys otherwise beyond `original_max_position_embeddings`, and drop their cache for it."""

import inspect
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from hardkv import HardKVCache, generate, graphed
from hardkv.cache.argument import CACHE
from tests.cache.replays import replaying
from tests.models.compatibility import SWITCHING
from tests.models.probe import EVICT, HOLD_ALL, Forced, assert_near
from tests.models.tiny import TYPES, random_ids, tiny_config, tiny_model

LIMIT, NEW = 16, 12
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "short_mscale": 1.0,
    "long_mscale": 1.5,
    "original_max_position_embeddings": LIMIT,
}
DROPS = re.compile(r"\b(cache|past_key_values)(\"\]|'\])? = None")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def switching_model(model_type, anew=True):
    """Of that limit; `anew`: whether it rotates otherwise beyond it."""
    if model_type == "phimoe" and not anew:
        pytest.skip("has no limit then")
    rope = {"rope_parameters": ROPE} if anew else {}
    return tiny_model(model_type, original_max_position_embeddings=LIMIT, **rope)


def run(model, tokens, prompt, cache, **arguments):
    """Logits `[NEW, 1, V]` of generate() with the given tokens."""
    out = model.generate(
        tokens[:, :prompt],
        **{CACHE: cache},
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=[Forced(tokens[:, prompt:])],
        **arguments,
    )
    return torch.stack(out.logits)


def computed_anew(model, tokens, prompt):
    """The same, every token's from a forward of all that came before, without any cache."""
    lengths = range(prompt, prompt + NEW)
    return torch.stack([model(tokens[:, :length], use_cache=False).logits[:, -1] for length in lengths])


def test_which_models_drop_their_cache():
    """All that do are known here, as their sources have it."""
    found = []
    for name in TYPES:
        try:
            model_class = AutoModelForCausalLM._model_mapping[type(tiny_config(name))]
        except Exception:  # cannot be built, which is another test's matter
            continue
        prepare = getattr(model_class, "prepare_inputs_for_generation", None)
        if prepare is not None and DROPS.search(inspect.getsource(prepare)):
            found.append(name)
    assert found == SWITCHING


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("model_type", SWITCHING)
def test_a_prompt_beyond_the_limit(model_type, anew):
    model, tokens = switching_model(model_type, anew), random_ids(1, LIMIT + 5 + NEW)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    expected = computed_anew(model, tokens, LIMIT + 5)
    assert_near(run(model, tokens, LIMIT + 5, cache), expected, "beyond the limit")
    assert cache.get_seq_length() == LIMIT + 5 + NEW - 1
    assert cache.stats().events > 2
    cache = HardKVCache(config=model.config, **EVICT)
    evicted = run(model, tokens, LIMIT + 5, cache)
    assert int(cache.lengths().max()) <= EVICT["budget"] + EVICT["interval"]
    assert (evicted - expected).abs().max() > 1e-3


@pytest.mark.parametrize("prompt", [LIMIT - 5, LIMIT])
@pytest.mark.parametrize("model_type", SWITCHING)
def test_a_generation_that_gets_to_the_limit(model_type, prompt):
    model, tokens = switching_model(model_type), random_ids(1, LIMIT + NEW)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    with (
        pytest.warns(UserWarning, match=f"from {prompt} to {prompt + NEW} tokens, and beyond {LIMIT}.*hardkv.generate"),
        pytest.raises(NotImplementedError, match=f"beyond {LIMIT} tokens.*the {LIMIT} tokens.*reset.*hardkv.generate"),
    ):
        run(model, tokens, prompt, cache)
    assert cache.get_seq_length() == LIMIT
    assert "beyond 16" in str(cache.stats().warnings)
    cache.reset()  # as it says
    tokens = random_ids(1, LIMIT + 1 + NEW)
    assert_near(run(model, tokens, LIMIT + 1, cache), computed_anew(model, tokens, LIMIT + 1), "after reset")


@pytest.mark.parametrize("prompt", [LIMIT - 5, LIMIT])
@pytest.mark.parametrize("model_type", ["phi3", "phi4_multimodal"])
def test_a_generation_beyond_the_limit_that_need_not_switch(model_type, prompt):
    model, tokens = switching_model(model_type, anew=False), random_ids(1, prompt + NEW)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert_near(run(model, tokens, prompt, cache), computed_anew(model, tokens, prompt), "across the limit")


@pytest.mark.parametrize("prompt", [LIMIT - 5, LIMIT - 1, LIMIT, LIMIT + 1])
@pytest.mark.parametrize("model_type", SWITCHING)
def test_graphed_computes_the_text_again(model_type, prompt):
    """Right on both sides of the limit, or refused: PhiMoE, and with transformers 5.17 all."""
    model, tokens = switching_model(model_type), random_ids(1, prompt + NEW)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    if model_type == "phimoe" or needs_new_tensors(model):
        with replaying(), pytest.raises(NotImplementedError, match="keeps states in its modules|no graph holds"):
            run(model, tokens, prompt, cache, custom_generate=graphed)
        return
    with replaying() as replays:
        logits = run(model, tokens, prompt, cache, custom_generate=graphed)
    assert len(replays) > NEW // 3
    assert_near(logits, computed_anew(model, tokens, prompt), "across the limit")
    assert cache.get_seq_length() == prompt + NEW - 1


def needs_new_tensors(model):
    """Whether the model's rotations beyond the limit lie elsewhere at every forward."""
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    places = []
    for _ in range(2):
        model(random_ids(1, LIMIT + 1), use_cache=False)
        places.append(id(rotary.long_inv_freq))
    return places[0] != places[1]


def test_graphed_evicts_after_the_switch_as_a_cache_that_got_the_text_at_once():
    model, tokens = switching_model("phi3"), random_ids(1, LIMIT - 5 + NEW)
    if needs_new_tensors(model):
        pytest.skip("graphed is refused")
    cache, other = (HardKVCache(config=model.config, scorer="snapkv", **EVICT) for _ in range(2))
    logits = run(model, tokens, LIMIT - 5, cache, custom_generate=graphed)
    steps = [model(tokens[:, : LIMIT + 1], **{CACHE: other}).logits[:, -1]]
    steps += [model(tokens[:, [at]], **{CACHE: other}).logits[:, -1] for at in range(LIMIT + 1, LIMIT - 6 + NEW)]
    assert_near(logits[-len(steps) :], torch.stack(steps), "evicted after the switch")
    for layer in range(3):
        for kept, expected in zip(cache.kept(layer)[0], other.kept(layer)[0], strict=True):
            assert torch.equal(kept, expected)


def test_a_turn_that_gets_to_the_limit():
    """generate() feeds new tokens only: what the cache holds would be dropped with it."""
    model, tokens = switching_model("phi3"), random_ids(1, LIMIT + 4)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    model(tokens[:, : LIMIT - 6], **{CACHE: cache})
    for how in ({}, {"custom_generate": graphed}):
        with pytest.raises(NotImplementedError, match=f"the {LIMIT - 6} tokens that this HardKVCache holds.*reset"):
            model.generate(tokens, **{CACHE: cache}, max_new_tokens=3, do_sample=False, **how)
    cache.reset()
    assert model.generate(tokens, **{CACHE: cache}, max_new_tokens=3, do_sample=False).shape == (1, LIMIT + 7)


def test_embeddings_cannot_be_computed_again():
    model = switching_model("phi3")
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    embeds = model.get_input_embeddings()(random_ids(1, LIMIT - 2))
    with pytest.raises(NotImplementedError, match=f"the {LIMIT} tokens that this HardKVCache holds"):
        generate(model, inputs_embeds=embeds, **{CACHE: cache}, max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == LIMIT


def test_a_padded_batch_gets_beyond_the_limit():
    model, tokens = switching_model("phi3"), random_ids(2, LIMIT + 6)
    if needs_new_tensors(model):
        pytest.skip("graphed is refused")
    mask = torch.ones(2, LIMIT - 2, dtype=torch.long)
    tokens[0, :4], mask[0, :4] = 0, 0
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    out = generate(
        model, tokens[:, : LIMIT - 2], attention_mask=mask, **{CACHE: cache}, max_new_tokens=8, do_sample=False
    )
    last = torch.cat([mask, mask.new_ones(2, 7)], 1)
    expected = model(out[:, :-1], attention_mask=last, position_ids=(last.cumsum(1) - 1).clamp(0), use_cache=False)
    assert torch.equal(expected.logits[:, LIMIT:].argmax(-1), out[:, LIMIT + 1 :])  # those computed beyond the limit

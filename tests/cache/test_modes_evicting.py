"""Test generate() and the cache protocol with an evicting cache: every forward equals masked dense attention."""

import pytest
import torch
import transformers
from transformers import DynamicCache, pipeline

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.selectors import AdaKV, Adaptive
from tests.cache.following import Follower
from tests.cache.test_modes import (
    EVICT,
    MODELS,
    MODES,
    draft_by_the_same_weights,
    extended,
    greedy,
    look_up,
    repetitive,
    step,
    word_tokenizer,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def followed(model, name: str, **settings) -> tuple[HardKVCache, Follower]:
    """Return an evicting cache and its `Follower`."""
    cache = HardKVCache(config=model.config, **(EVICT | settings))
    return cache, Follower(model, cache, name)


# ---------------------------------------------------------------------------------------------- generate()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_mode(mode, name, attn, tiny_model, tiny_prompts):
    model = tiny_model(name, attn)
    cache, follower = followed(model, name, scorer="snapkv", patience=1)
    torch.manual_seed(0)
    mode(model, tiny_prompts(3), cache)
    assert follower.evicted >= 5


@pytest.mark.parametrize("budget", [AdaKV(9), Adaptive(9)], ids=str)
@pytest.mark.parametrize("mode", [mode for mode in MODES if "beam" in mode.__name__ or "turns" in mode.__name__])
def test_heads_of_unequal_lengths_move_with_their_rows(mode, budget, tiny_model, tiny_prompts):
    model = tiny_model("llama")
    cache, follower = followed(model, "llama", budget=budget)
    torch.manual_seed(0)
    mode(model, tiny_prompts(3), cache)
    lengths = cache.lengths()
    assert (lengths.amin(-1) < lengths.amax(-1)).any()
    assert follower.evicted >= 5


@pytest.mark.parametrize("assistant", [look_up, draft_by_the_same_weights, "other weights"])
@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_assisted_decoding(assistant, name, attn, tiny_model):
    """Drafts are verified against the tokens held, and what is taken back leaves nothing behind."""
    model = tiny_model(name, attn)
    cache, follower = followed(model, name)
    if assistant == "other weights":
        greedy(model, repetitive(), cache, max_new_tokens=16, assistant_model=tiny_model(name, attn, seed=7))
    else:
        assistant(model, name, cache)
    assert follower.evicted >= 3


@pytest.mark.parametrize("assistant", [look_up, draft_by_the_same_weights])
def test_plain_turns_after_assisted_ones(assistant, tiny_model):
    """Recording stays on: events run one forward late, and each forward attends what is held then."""
    model = tiny_model("qwen3")
    cache, follower = followed(model, "qwen3")
    tokens = assistant(model, "qwen3", cache)
    forwards = follower.forwards
    greedy(model, extended(repetitive(), tokens, [3, 4]), cache, max_new_tokens=8)
    assert follower.forwards == forwards + 8


def test_drafts_on_a_filled_cache(tiny_model):
    model = tiny_model("qwen3")
    cache, follower = followed(model, "qwen3")
    tokens = greedy(model, repetitive(), cache, max_new_tokens=8)
    forwards = follower.forwards
    options = {"max_new_tokens": 8, "prompt_lookup_num_tokens": 3}
    if transformers.__version__.startswith("5.17."):  # feeds all tokens again, to DynamicCache too
        with pytest.raises(ValueError, match="past ones included"):
            greedy(model, extended(repetitive(), tokens, [5]), cache, **options)
    else:
        greedy(model, extended(repetitive(), tokens, [5]), cache, **options)
        assert follower.forwards >= forwards + 3


def test_rows_that_end_early(tiny_model, tiny_prompts):
    """generate() feeds pads, as tokens, to rows that have ended; those that go on are as if alone."""
    model, inputs = tiny_model("llama"), tiny_prompts(3)
    ends = list(range(0, 98, 7))
    cache, follower = followed(model, "llama")
    tokens = greedy(model, inputs, cache, max_new_tokens=16, eos_token_id=ends)
    new = tokens[:, 13:]
    ended = [next((i for i, token in enumerate(row) if token in ends), 16) for row in new.tolist()]
    assert min(ended) + 3 < max(ended)  # an event and more between the first and the last
    assert follower.forwards == new.shape[1]
    last = max(range(3), key=ended.__getitem__)
    alone = {name: value[last : last + 1] for name, value in inputs.items()}
    expected = greedy(model, alone, HardKVCache(config=model.config, **EVICT), max_new_tokens=16, eos_token_id=ends)
    assert torch.equal(tokens[last, : expected.shape[1]], expected[0])


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 7}, {"num_beams": 2}], ids=["at once", "chunks", "beams"]
)
def test_left_padded_rows_of_very_different_lengths(options, tiny_model, tiny_prompts):
    """1, 3 and 60 tokens: fewer than sinks, than the window, than the budget, and far more."""
    model, inputs = tiny_model("qwen3"), tiny_prompts(3, length=60)
    inputs["attention_mask"][:] = 1
    inputs["attention_mask"][0, :59] = inputs["attention_mask"][2, :57] = 0
    cache, follower = followed(model, "qwen3", scorer="rkv")
    greedy(model, inputs, cache, max_new_tokens=14, **options)
    assert follower.evicted >= 13


def test_scores_and_the_returned_cache(tiny_model, tiny_prompts, run_feed):
    """generate() hands the cache back, in the state that feeding it the same tokens by hand gives."""
    model, inputs = tiny_model("llama"), tiny_prompts(3)
    cache, _ = followed(model, "llama")
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = greedy(model, inputs, cache, temperature=0.5, do_sample=True, top_k=0, **options)
    assert out[CACHE] is cache
    for scores, logits in zip(out.scores, out.logits, strict=True):
        torch.testing.assert_close(scores, logits / 0.5)
    turn = extended(inputs, out.sequences, [9, 10])
    twin, fed = HardKVCache(config=model.config, **EVICT), out.sequences[:, :-1]  # the last token was not read
    for _ in run_feed(model, twin, fed, turn["attention_mask"][:, : fed.shape[1]], [13] + [1] * (fed.shape[1] - 13)):
        pass
    expected = greedy(model, turn, twin, max_new_tokens=6)
    assert torch.equal(greedy(model, turn, out[CACHE], max_new_tokens=6), expected)


def test_a_pipeline_with_a_batch(tiny_model):
    model = tiny_model("llama")
    generator = pipeline("text-generation", model=model, tokenizer=word_tokenizer(padding_side="left"), device="cpu")
    prompts = [" ".join(f"w{index}" for index in range(start, stop)) for start, stop in [(5, 25), (30, 37), (40, 52)]]
    options = {"max_new_tokens": 12, "do_sample": False, "batch_size": 3}
    expected = generator(prompts, **{CACHE: DynamicCache(config=model.config)}, **options)
    ample = HardKVCache(config=model.config, **(EVICT | {"budget": 1000}))
    assert generator(prompts, **{CACHE: ample}, **options) == expected
    cache, follower = followed(model, "llama")
    generator(prompts, **{CACHE: cache}, **options)
    assert cache.stats().batch_size == 3
    assert follower.evicted >= 11


# ---------------------------------------------------------------------------------------------- options that clash


def test_use_cache_false_is_refused_with_the_way_out(tiny_model, tiny_prompts):
    """generate() would feed all tokens at every step again, on top of those held (DynamicCache takes that)."""
    model, inputs = tiny_model("llama"), tiny_prompts(3)
    with pytest.raises(ValueError, match="use_cache=False.*pass use_cache=True"):
        greedy(model, inputs, HardKVCache(config=model.config), use_cache=False)
    cache, follower = followed(model, "llama")
    model(**inputs, **{CACHE: cache}, use_cache=False)
    assert cache.get_seq_length() == 13  # as DynamicCache: one forward uses what it is given
    assert follower.forwards == 1


@pytest.mark.parametrize("implementation", ["static", "dynamic", "offloaded", "quantized"])
def test_cache_implementation_beside_the_cache_is_refused(implementation, tiny_model, tiny_prompts):
    """By transformers, before anything ran."""
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config)
    with pytest.raises(ValueError, match=f"Passing both `cache_implementation`.*and `{CACHE}`"):
        greedy(model, tiny_prompts(1), cache, cache_implementation=implementation)
    assert cache.get_seq_length() == 0


def test_max_cache_len_is_for_static_caches(tiny_model, tiny_prompts):
    model = tiny_model("llama")
    plain, given = (HardKVCache(config=model.config, **EVICT) for _ in range(2))
    expected = greedy(model, tiny_prompts(3), plain)
    assert torch.equal(greedy(model, tiny_prompts(3), given, max_cache_len=3), expected)


# ---------------------------------------------------------------------------------------------- the protocol


@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_contrastive_steps(name, patience, tiny_model, tiny_prompts):
    """Candidates of every row run as rows of their own, one of each is kept: through several events."""
    model, inputs = tiny_model(name), tiny_prompts(3)
    cache, follower = followed(model, name, budget=AdaKV(9), patience=patience)
    mask, candidates = inputs["attention_mask"], 3
    logits = model(**inputs, **{CACHE: cache}).logits[:, -1]
    for index in range(8):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        cache.batch_repeat_interleave(candidates)
        tokens = logits.topk(candidates).indices.flatten().tolist()
        logits = step(model, cache, tokens, mask.repeat_interleave(candidates, 0))
        chosen = torch.arange(3) * candidates + torch.tensor([index % 3, 0, (index + 1) % 3])
        cache.batch_select_indices(chosen)
        logits = logits[chosen]
    assert cache.stats().events == 3
    assert follower.evicted == 8


@pytest.mark.parametrize("indices", [torch.tensor([2, 0, 0]), torch.tensor([False, True, True])], ids=["order", "mask"])
def test_rows_selected_between_events(indices, tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama"), tiny_prompts(3)
    cache, follower = followed(model, "llama", budget=AdaKV(9), patience=2, scorer="snapkv")
    mask = inputs["attention_mask"]
    model(**inputs, **{CACHE: cache})
    for index in range(10):
        if index in (2, 5):
            cache.batch_select_indices(indices if index == 2 else torch.arange(len(mask)).flip(0))
            mask = mask[indices] if index == 2 else mask.flip(0)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        step(model, cache, [20 + index + row for row in range(len(mask))], mask)
    assert follower.evicted >= 9


def test_crop_after_events(tiny_model, tiny_prompts):
    """Tokens taken back are gone, those before them are what was held; the next event scores with the right queries."""
    model = tiny_model("qwen3")
    cache, follower = followed(model, "qwen3", scorer="snapkv")
    model(**tiny_prompts(1), **{CACHE: cache})
    for index, remove in enumerate([0, 2, 1, 3, 0, 4, 1]):
        for token in range(4):
            step(model, cache, [20 + 5 * index + token])
        cache.crop(-remove)
    assert cache.get_seq_length() == 13 + 28 - 11
    assert follower.evicted == 28


def test_reset_between_conversations(tiny_model, tiny_prompts):
    model = tiny_model("llama")
    cache, follower = followed(model, "llama")
    for batch in (1, 3, 2):
        greedy(model, tiny_prompts(batch), cache, max_new_tokens=5)
        cache.reset()
    assert follower.evicted >= 12

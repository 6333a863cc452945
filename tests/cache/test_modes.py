"""Test generate() with a cache: results equal DynamicCache's while nothing is evicted."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, pipeline
from transformers.generation.streamers import BaseStreamer

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE

HOLD_ALL = {"budget": 1000, "window": 4, "sinks": 1, "interval": 3}  # an event every 3 tokens, and nothing is lost
EVICT = {"budget": 8, "window": 4, "sinks": 1, "interval": 3}
pytestmark = pytest.mark.usefixtures("poisoned_memory")
MODELS = [("qwen3", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa")]  # the last with sliding-window layers


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def extended(inputs: dict[str, Tensor], ids: Tensor, new: list[int], only_new: bool = False) -> dict[str, Tensor]:
    """The next turn: all tokens so far (or none of them but the last) and `new` ones, the same in every row."""
    turn = torch.tensor(new).expand(ids.shape[0], -1)
    mask = inputs["attention_mask"]
    grown = mask.new_ones(ids.shape[0], ids.shape[1] + len(new) - mask.shape[1])
    past = ids[:, -1:] if only_new else ids
    return {"input_ids": torch.cat([past, turn], 1), "attention_mask": torch.cat([mask, grown], 1)}


def held(cache: HardKVCache) -> list[Any]:
    """Return everything that a cache reports about its contents."""
    layers = [idx for idx, layer in enumerate(cache.layers) if hasattr(layer, "tiers")]
    kept = [[[head.tolist() for head in heads] for heads in cache.kept(idx)] for idx in layers]
    lengths = [layer.get_seq_length() for layer in cache.layers]
    return [kept, lengths, cache.lengths("sparse").tolist(), cache.nbytes(), cache.stats().events]


def check_invariants(cache: HardKVCache, attention_mask: Tensor | None = None) -> None:
    """Kept positions ascend, are real tokens, hold sinks and window, and stay within budget and interval.

    Args:
        attention_mask: `[B, columns of the prompt]`; later columns are tokens.
    """
    settings, length = cache.settings, cache.get_seq_length()
    for idx, layer in enumerate(cache.layers):
        if not hasattr(layer, "tiers"):
            continue
        for row, heads in enumerate(cache.kept(idx)):
            real = torch.ones(length, dtype=torch.bool)
            if attention_mask is not None:
                columns = min(length, attention_mask.shape[1])
                real[:columns] = attention_mask[row, :columns].bool()
            tokens = real.nonzero()[:, 0]
            must = torch.cat([tokens[: settings.sinks], tokens[-settings.window :]])
            for kept in heads:
                assert (kept.diff() > 0).all()
                assert torch.isin(kept, tokens).all()
                assert torch.isin(must, kept).all()
                assert len(kept) < settings.budget.n + settings.interval


def step(model, cache, token: int | list[int], attention_mask: Tensor | None = None) -> Tensor:
    """Return logits `[B, V]` after one more token in every row."""
    tokens = torch.tensor([token] if isinstance(token, int) else token)
    return model(input_ids=tokens[:, None], attention_mask=attention_mask, **{CACHE: cache}).logits[:, -1]


# ---------------------------------------------------------------------------------------------- generate()


def greedy(model, inputs, cache, **options) -> Tensor:
    defaults = {"max_new_tokens": 10, "do_sample": False}
    return model.generate(**inputs, **{CACHE: cache}, **(defaults | options))


def sampling(model, inputs, cache):
    return greedy(model, inputs, cache, do_sample=True, num_return_sequences=2)


def beam_search(model, inputs, cache):
    return greedy(model, inputs, cache, num_beams=4)


def beam_sample(model, inputs, cache):
    return greedy(model, inputs, cache, num_beams=3, do_sample=True)


def several_beams_returned(model, inputs, cache):
    return greedy(model, inputs, cache, num_beams=3, num_return_sequences=3, length_penalty=0.5)


def chunked_prefill(model, inputs, cache):
    return greedy(model, inputs, cache, prefill_chunk_size=4)


def chunked_prefill_in_one(model, inputs, cache):
    return greedy(model, inputs, cache, prefill_chunk_size=100)


def early_stop(model, inputs, cache):
    """Rows end at different steps; generate() feeds pads to those that ended, with a mask of 1."""
    return greedy(model, inputs, cache, max_new_tokens=14, eos_token_id=list(range(0, 98, 7)))


def two_turns(model, inputs, cache):
    """The second call gets all tokens again; generate() skips those in the cache."""
    first = greedy(model, inputs, cache, max_new_tokens=4)
    return greedy(model, extended(inputs, first, [9, 10, 11]), cache, max_new_tokens=5)


def three_turns(model, inputs, cache):
    """The third call gets only the new tokens and the whole mask."""
    first = greedy(model, inputs, cache, max_new_tokens=4)
    second = greedy(model, extended(inputs, first, [9, 10, 11]), cache, max_new_tokens=4)
    return greedy(model, extended(inputs, second, [12, 13], only_new=True), cache, max_new_tokens=5)


def inputs_embeds(model, inputs, cache):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    return greedy(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, cache)


def forward_by_forward(model, inputs, cache):
    """No generate(): tokens are given, one chunk of several among them."""
    outputs, mask = [model(**inputs, **{CACHE: cache}).logits[:, -1]], inputs["attention_mask"]
    for step, count in enumerate([1, 1, 3, 1, 5, 1, 1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
        ids = torch.full((len(mask), count), 10 + step)
        outputs.append(model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits[:, -1])
    return torch.stack(outputs).argmax(-1)


MODES = [
    greedy,
    sampling,
    beam_search,
    beam_sample,
    several_beams_returned,
    chunked_prefill,
    chunked_prefill_in_one,
    early_stop,
    two_turns,
    three_turns,
    inputs_embeds,
    forward_by_forward,
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_mode(mode, name, attn, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name, attn), tiny_prompts(3)
    torch.manual_seed(0)
    expected = mode(model, inputs, DynamicCache(config=model.config))
    torch.manual_seed(0)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert torch.equal(mode(model, inputs, cache), expected)
    assert cache.stats().events > 1
    torch.manual_seed(0)
    cache = HardKVCache(config=model.config, **EVICT)
    mode(model, inputs, cache)
    assert cache.stats().events > 1
    repeats = cache.stats().batch_size // 3
    check_invariants(cache, inputs["attention_mask"].repeat_interleave(repeats, 0))


@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_reset_and_reuse(name, attn, tiny_model, tiny_prompts):
    """Reset and reuse a cache with fewer rows before than after."""
    model, inputs = tiny_model(name, attn), tiny_prompts(3)
    fresh, cache = (HardKVCache(config=model.config, **EVICT) for _ in range(2))
    greedy(model, {name: value[:2] for name, value in inputs.items()}, cache, max_new_tokens=5)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == 0
    assert torch.equal(greedy(model, inputs, cache), greedy(model, inputs, fresh))
    assert held(cache) == held(fresh)


def repetitive() -> dict[str, Tensor]:
    """A prompt whose n-grams come again, for drafts by look-up."""
    ids = torch.tensor([[5, 6, 7, 8, 9] * 5])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def look_up(model, name, cache):
    return greedy(model, repetitive(), cache, max_new_tokens=16, prompt_lookup_num_tokens=4)


def draft_by_the_same_weights(model, name, cache):
    return greedy(model, repetitive(), cache, max_new_tokens=16, assistant_model=copy.deepcopy(model))


@pytest.mark.parametrize("assistant", [look_up, draft_by_the_same_weights, "other weights"])
@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_assisted_decoding(assistant, name, attn, tiny_model):
    model = tiny_model(name, attn)
    if assistant == "other weights":
        other = tiny_model(name, attn, seed=7)

        def assistant(model, name, cache):
            return greedy(model, repetitive(), cache, max_new_tokens=16, assistant_model=other)

    expected = greedy(model, repetitive(), DynamicCache(config=model.config), max_new_tokens=16)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert torch.equal(assistant(model, name, cache), expected)
    assert cache.stats().events > 1
    cache = HardKVCache(config=model.config, **EVICT)
    assert assistant(model, name, cache).shape == expected.shape
    assert cache.stats().events > 1
    check_invariants(cache)


@pytest.mark.parametrize("assistant", [look_up, draft_by_the_same_weights])
def test_an_assisted_cache_keeps_evicting_in_plain_use(assistant, tiny_model):
    """Nothing ever switches recording off, so later calls without drafts run with it on."""
    model = tiny_model("qwen3", "sdpa")
    cache = HardKVCache(config=model.config, **EVICT)
    tokens = assistant(model, "qwen3", cache)
    events = cache.stats().events
    greedy(model, extended(repetitive(), tokens, [3, 4]), cache, max_new_tokens=12)
    assert cache.stats().events >= events + 4
    # an event that is due waits for the next forward
    assert int(cache.lengths().max()) <= EVICT["budget"] + EVICT["interval"]


def test_a_streamer_sees_every_token(tiny_model, tiny_prompts):
    class Collect(BaseStreamer):
        def __init__(self):
            self.chunks: list[Tensor] = []
            self.ended = False

        def put(self, value):
            self.chunks.append(value.reshape(-1))

        def end(self):
            self.ended = True

    model, streamer = tiny_model("qwen3", "sdpa"), Collect()
    tokens = greedy(model, tiny_prompts(1), HardKVCache(config=model.config, **EVICT), streamer=streamer)
    assert torch.equal(torch.cat(streamer.chunks), tokens[0])
    assert streamer.ended


def word_tokenizer(**options: Any) -> Any:
    """A tokenizer whose words are w2 to w97."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{index}": index for index in range(2, 98)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", **options)


def test_text_generation_pipeline(tiny_model):
    model, tokenizer = tiny_model("llama", "sdpa"), word_tokenizer()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompt = " ".join(f"w{index}" for index in range(5, 25))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = generator(prompt, **{CACHE: DynamicCache(config=model.config)}, **options)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert generator(prompt, **{CACHE: cache}, **options) == expected
    assert cache.get_seq_length() == 27
    cache = HardKVCache(config=model.config, **EVICT)
    assert generator(prompt, **{CACHE: cache}, **options)[0]["generated_text"].startswith(prompt)
    check_invariants(cache)


# ---------------------------------------------------------------------------------------------- pinned prompts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 6},
        {"prefill_chunk_size": 1},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "chunks", "a chunk of one token", "chunks of one token", "beams", "drafts"],
)
def test_a_pinned_prompt_stays_for_the_whole_generation(options, tiny_model, tiny_prompts):
    batch = 1 if "prompt_lookup_num_tokens" in options else 3
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(batch)
    cache = HardKVCache(config=model.config, pin_prompt=True, **(EVICT | {"budget": 24}))
    greedy(model, inputs, cache, max_new_tokens=40, **options)
    assert cache.get_seq_length() == 13 + 39
    prompt = inputs["attention_mask"].repeat_interleave(options.get("num_beams", 1), 0)
    for idx in range(3):
        for row, heads in enumerate(cache.kept(idx)):
            for kept in heads:
                assert torch.isin(prompt[row].nonzero()[:, 0], kept).all()
                assert len(kept) < 24 + EVICT["interval"]


def test_a_prompt_of_one_token_is_pinned(tiny_model):
    model = tiny_model("qwen3", "sdpa")
    cache = HardKVCache(config=model.config, pin_prompt=True, budget=8, window=4, sinks=0, interval=3)
    greedy(model, {"input_ids": torch.tensor([[7]])}, cache, max_new_tokens=30)
    assert all(head[0] == 0 for idx in range(3) for head in cache.kept(idx)[0])
    assert all(len(head) < 8 + 3 for idx in range(3) for head in cache.kept(idx)[0])

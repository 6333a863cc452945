"""What generate() and the cache protocol do with a cache: the same as DynamicCache while nothing is evicted."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, pipeline
from transformers.generation.streamers import BaseStreamer

from hardkv import HardKVCache

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
    """Everything a cache says about what it holds."""
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


# ---------------------------------------------------------------------------------------------- generate()


def greedy(model, inputs, cache, **options) -> Tensor:
    defaults = {"max_new_tokens": 10, "do_sample": False}
    return model.generate(**inputs, past_key_values=cache, **(defaults | options))


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
    outputs, mask = [model(**inputs, past_key_values=cache).logits[:, -1]], inputs["attention_mask"]
    for step, count in enumerate([1, 1, 3, 1, 5, 1, 1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
        ids = torch.full((len(mask), count), 10 + step)
        outputs.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
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
    """With fewer rows before than after."""
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


def test_text_generation_pipeline(tiny_model):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{index}": index for index in range(2, 98)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    model = tiny_model("llama", "sdpa")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompt = " ".join(f"w{index}" for index in range(5, 25))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = generator(prompt, past_key_values=DynamicCache(config=model.config), **options)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert generator(prompt, past_key_values=cache, **options) == expected
    assert cache.get_seq_length() == 27
    cache = HardKVCache(config=model.config, **EVICT)
    assert generator(prompt, past_key_values=cache, **options)[0]["generated_text"].startswith(prompt)
    check_invariants(cache)


# ---------------------------------------------------------------------------------------------- batch rows


def step(model, cache, token: int | list[int], attention_mask: Tensor | None = None) -> Tensor:
    """Logits `[B, V]` after one more token in every row."""
    tokens = torch.tensor([token] if isinstance(token, int) else token)
    return model(input_ids=tokens[:, None], attention_mask=attention_mask, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("indices", [torch.tensor([0, 3, 5]), torch.tensor([5, 0, 0, 2]), [1, 4]])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_repeating_and_selecting_rows(name, indices, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name, "sdpa"), tiny_prompts(3)
    rows = torch.as_tensor(indices)
    mask = inputs["attention_mask"].repeat_interleave(2, 0)[rows]
    caches = [HardKVCache(config=model.config, **HOLD_ALL), DynamicCache(config=model.config)]
    for cache in caches:
        model(**inputs, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(indices)
    for token in range(4):  # past the next event
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        tokens = [token + 5 + row for row in range(len(rows))]
        actual, expected = (step(model, cache, tokens, mask) for cache in caches)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("patience", [0, 2])
def test_selected_rows_hold_what_they_held(patience, tiny_model, tiny_prompts):
    """After evictions, with ragged rows: each row goes on as it would have alone."""
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(3)
    cache = HardKVCache(config=model.config, patience=patience, **EVICT)
    tokens = greedy(model, inputs, cache, max_new_tokens=6)
    twin = copy.deepcopy(cache)
    kept = cache.kept(0)
    cache.batch_select_indices(torch.tensor([2, 0]))
    selected = cache.kept(0)
    for row, source in enumerate([2, 0]):
        for head in range(2):
            assert torch.equal(selected[row][head], kept[source][head])
    assert cache.nbytes() < twin.nbytes()
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, tokens.shape[1] - 13, dtype=torch.long)], 1)
    for _ in range(5):
        actual = step(model, cache, [5, 6], mask[[2, 0]])
        expected = step(model, twin, [6, 7, 5], mask)[[2, 0]]
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)


@pytest.mark.parametrize("chunk", [None, 5], ids=["at once", "in chunks"])
def test_rows_shorter_than_the_window(chunk, tiny_model, tiny_prompts):
    """What the dense tier has not written yet for a short row must not reach its attention, NaN least of all."""
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(3, length=20)
    inputs["attention_mask"][0, :17] = 0  # 3, 20 and 8 tokens
    settings = {"budget": 1000, "window": 10, "sinks": 1, "interval": 4}
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    expected = greedy(model, inputs, DynamicCache(config=model.config), **options)
    assert torch.equal(greedy(model, inputs, HardKVCache(config=model.config, **settings), **options), expected)


def test_selecting_rows_by_a_boolean(tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "sdpa")
    cache = HardKVCache(config=model.config, **EVICT)
    model(**tiny_prompts(3), past_key_values=cache)
    kept = cache.kept(0)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert [len(heads) for heads in cache.kept(0)] == [2, 2]
    assert torch.equal(cache.kept(0)[1][0], kept[2][0])


def test_rows_of_an_empty_cache(tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "sdpa")
    cache = HardKVCache(config=model.config, **EVICT)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reorder_cache(torch.tensor([0]))
    cache.crop(0)
    assert model(**tiny_prompts(3), past_key_values=cache).logits.shape[0] == 3


# ---------------------------------------------------------------------------------------------- crop


def filled(model, inputs, tokens: int = 0, **settings: Any) -> HardKVCache:
    """A cache after a prompt and `tokens` further ones."""
    cache = HardKVCache(config=model.config, **(EVICT | settings))
    model(**inputs, past_key_values=cache)
    for index in range(tokens):
        step(model, cache, [20 + index])
    return cache


def test_crop_equals_dynamic_cache(tiny_model, tiny_prompts):
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(1)
    cache, dense = filled(model, inputs, 2, **HOLD_ALL), DynamicCache(config=model.config)
    model(**inputs, past_key_values=dense)
    for index in range(2):
        step(model, dense, [20 + index])
    for remove in (2, 0, 3):  # back over the prompt's last tokens
        cache.crop(-remove)
        dense.crop(-remove)
        assert cache.get_seq_length() == dense.get_seq_length()
    for index in range(6):
        actual, expected = step(model, cache, [40 + index]), step(model, dense, [40 + index])
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_crop_of_left_padded_rows(tiny_model, tiny_prompts):
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(3)
    cache, dense = HardKVCache(config=model.config, **HOLD_ALL), DynamicCache(config=model.config)
    for past in (cache, dense):
        model(**inputs, past_key_values=past)
        past.crop(-3)
    mask = inputs["attention_mask"][:, :10]
    for index in range(5):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        actual, expected = (step(model, past, [5, 6, 7 + index], mask) for past in (cache, dense))
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_crop_by_zero_changes_nothing(tiny_model, tiny_prompts):
    cache = filled(tiny_model("qwen3", "sdpa"), tiny_prompts(1), 2)
    before = held(cache)
    cache.crop(0)
    assert held(cache) == before


@pytest.mark.parametrize("remove", [1, 5, 100])
def test_crop_by_a_positive_number_is_refused(remove, tiny_model, tiny_prompts):
    cache = filled(tiny_model("qwen3", "sdpa"), tiny_prompts(1), 2)
    before = held(cache)
    with pytest.raises(ValueError, match=rf"crop\({remove}\).*minus the number of tokens"):
        cache.crop(remove)
    assert held(cache) == before


def test_crop_into_condensed_tokens_is_refused_in_every_layer(tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "sdpa")
    cache = filled(model, tiny_prompts(1), 2)  # the event was at 13 and left columns 9 to 12 dense
    before = held(cache)
    with pytest.raises(ValueError, match=r"crop\(-7\).*8 tokens.*before 9"):
        cache.crop(-7)
    assert held(cache) == before
    kept = [cache.kept(idx)[0] for idx in range(3)]
    cache.crop(-6)
    assert [layer.get_seq_length() for layer in cache.layers] == [9, 9, 9]
    for idx in range(3):
        for head, cropped in zip(kept[idx], cache.kept(idx)[0], strict=True):
            assert torch.equal(cropped, head[head < 9])
    assert step(model, cache, [5]).isfinite().all()


@pytest.mark.parametrize("remove", [15, 16, 1000])
def test_crop_to_nothing_empties_the_cache(remove, tiny_model, tiny_prompts):
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(1)
    cache = filled(model, inputs, 2)
    cache.crop(-remove)
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    expected = filled(model, inputs, 4)
    model(**inputs, past_key_values=cache)
    for index in range(4):
        step(model, cache, [20 + index])
    assert held(cache) == held(expected)


def test_crop_of_a_hybrid_is_all_or_nothing(tiny_model, tiny_prompts):
    """transformers refuses to crop a full sliding window; the layers before it must not be cropped then."""
    model = tiny_model("gemma3", "sdpa", layer_types=["full_attention", "sliding_attention"] * 2)
    cache = filled(model, tiny_prompts(1))
    before = held(cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    assert held(cache) == before


# ---------------------------------------------------------------------------------------------- recording


def test_recording_holds_events_until_crop(tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "sdpa")
    cache = filled(model, tiny_prompts(1))
    cache.activate_past_recording()
    model(input_ids=torch.full((1, 5), 9), past_key_values=cache)  # more than an interval
    assert cache.stats().events == 1
    assert all(len(head) == 8 + 5 for head in cache.kept(0)[0])
    cache.crop(-1)
    assert cache.get_seq_length() == 17
    assert cache.stats().events == 2
    assert all(len(head) == 8 for head in cache.kept(0)[0])


def test_recording_with_everything_taken_back(tiny_model, tiny_prompts):
    """A draft of which nothing is accepted leaves the cache as it was, apart from capacity."""
    model = tiny_model("qwen3", "sdpa")
    cache = filled(model, tiny_prompts(1), 1)
    cache.activate_past_recording()
    before = held(cache)[:3]
    model(input_ids=torch.full((1, 6), 9), past_key_values=cache)
    cache.crop(-6)
    assert held(cache)[:3] == before
    assert cache.stats().events == 1


def test_recording_without_crop_runs_events_at_the_next_forward(tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "sdpa")
    cache = filled(model, tiny_prompts(1))
    cache.activate_past_recording()
    for index in range(9):
        step(model, cache, [20 + index])
        # an event was due at columns 16, 19 and 22, and ran when the column after it came
        assert cache.stats().events == 1 + index // 3
        assert int(cache.lengths().max()) <= EVICT["budget"] + EVICT["interval"]


@pytest.mark.parametrize("longest", [3, 6], ids=["up to the interval", "beyond the interval"])
@pytest.mark.parametrize("scorer", ["attention", "rkv"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_drafts_taken_back_leave_no_trace(name, scorer, longest, tiny_model, tiny_prompts):
    """Accepting one token of every draft gives the very tokens, and the very evictions, of decoding without drafts."""
    model, inputs = tiny_model(name, "sdpa"), tiny_prompts(1)
    plain = HardKVCache(config=model.config, scorer=scorer, **EVICT)
    drafted = HardKVCache(config=model.config, scorer=scorer, **EVICT)
    for cache in (plain, drafted):
        model(**inputs, past_key_values=cache)
    drafted.activate_past_recording()
    for index in range(12):
        expected = step(model, plain, [20 + index])
        rejected = index % (longest + 1)
        draft = torch.tensor([[20 + index, *range(60, 60 + rejected)]])
        actual = model(input_ids=draft, past_key_values=drafted).logits[:, 0]
        drafted.crop(-rejected)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
        assert held(drafted)[:3] == held(plain)[:3]
        assert drafted.stats().events == plain.stats().events
    assert plain.stats().events == 5


@pytest.mark.parametrize("rejected", [1, 3])
def test_a_draft_taken_back_from_the_first_forward_leaves_no_trace(rejected, tiny_model, tiny_prompts):
    """Assisted decoding runs the prompt and the first draft in one forward."""
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(1)
    plain = filled(model, inputs)
    drafted = HardKVCache(config=model.config, **EVICT)
    drafted.activate_past_recording()
    ids = torch.cat([inputs["input_ids"], torch.full((1, rejected), 60)], 1)
    model(input_ids=ids, past_key_values=drafted)
    assert drafted.stats().events == 0
    drafted.crop(-rejected)
    assert drafted.stats().events == 1
    assert held(drafted)[:3] == held(plain)[:3]


@pytest.mark.parametrize("chunks", [[1] * 12, [2, 3, 4, 1, 1, 1], [7, 9, 1], [40, 1, 1, 1]])
def test_at_most_one_event_a_forward(chunks, tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "sdpa")
    cache = filled(model, tiny_prompts(1))
    assert {layer.events for layer in cache.layers} == {1}
    since = 0
    for count in chunks:
        events = cache.stats().events
        model(input_ids=torch.full((1, count), 9), past_key_values=cache)
        since += count
        due = since >= EVICT["interval"]
        assert {layer.events for layer in cache.layers} == {events + due}
        since = 0 if due else since


# ---------------------------------------------------------------------------------------------- copies


def test_a_shared_prefix(tiny_model, tiny_prompts):
    """deepcopy after the prompt: continuations are those of separate runs, whatever runs in between."""
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(3)
    prefix = HardKVCache(config=model.config, **EVICT)
    model(**inputs, past_key_values=prefix)
    before, mask = held(prefix), inputs["attention_mask"]
    alone = [HardKVCache(config=model.config, **EVICT) for _ in range(2)]
    copies = [copy.deepcopy(prefix) for _ in range(2)]
    for cache in alone:
        model(**inputs, past_key_values=cache)
    for index in range(7):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        for which in range(2):
            tokens = [10 + index + 30 * which] * 3
            actual, expected = (step(model, caches[which], tokens, mask) for caches in (copies, alone))
            assert torch.equal(actual, expected)
    assert held(copies[0]) == held(alone[0])
    assert held(copies[1]) == held(alone[1])
    assert held(copies[0]) != held(copies[1])
    assert held(prefix) == before


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_saved_and_loaded(name, tiny_model, tiny_prompts):
    model = tiny_model(name, "sdpa")
    cache = HardKVCache(config=model.config, scorer="snapkv", patience=1, **EVICT)
    model(**tiny_prompts(1), past_key_values=cache)
    for index in range(4):
        step(model, cache, [20 + index])
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert held(loaded) == held(cache)
    assert loaded.settings == cache.settings
    assert loaded.stats() == cache.stats()
    for index in range(5):
        assert torch.equal(step(model, loaded, [40 + index]), step(model, cache, [40 + index]))
    assert held(loaded) == held(cache)


def test_an_empty_cache_is_copied_and_saved(tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "sdpa")
    cache = HardKVCache(config=model.config, **EVICT)
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(cache), torch.load(buffer, weights_only=False)):
        assert model(**tiny_prompts(3), past_key_values=twin).logits.isfinite().all()


# ---------------------------------------------------------------------------------------------- pinned prompts


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 5}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "chunks", "beams", "drafts"],
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

"""Test the cache protocol (batch rows, crop, recording, copies): it equals DynamicCache while nothing is evicted."""

import copy
import io
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache

from hardkv import HardKVCache, calibrate
from hardkv.cache.argument import CACHE
from hardkv.decoding.step import StepLayer
from tests.cache.test_modes import EVICT, HOLD_ALL, greedy, held, step
from tests.models.tiny import tiny_model as make_model

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------- batch rows


@pytest.mark.parametrize("indices", [torch.tensor([0, 3, 5]), torch.tensor([5, 0, 0, 2]), [1, 4]])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_repeating_and_selecting_rows(name, indices, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name, "sdpa"), tiny_prompts(3)
    rows = torch.as_tensor(indices)
    mask = inputs["attention_mask"].repeat_interleave(2, 0)[rows]
    caches = [HardKVCache(config=model.config, **HOLD_ALL), DynamicCache(config=model.config)]
    for cache in caches:
        model(**inputs, **{CACHE: cache})
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(indices)
    for token in range(4):  # past the next event
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        tokens = [token + 5 + row for row in range(len(rows))]
        actual, expected = (step(model, cache, tokens, mask) for cache in caches)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "falcon_h1", "bamba"])
def test_it_is_initialized_when_dynamic_cache_is(kind):
    """Some models read this, to distinguish the first forward from later ones."""
    model = make_model(kind)
    caches = [HardKVCache(config=model.config, **EVICT), DynamicCache(config=model.config)]
    assert [cache.is_initialized for cache in caches] == [False, False]
    for cache in caches:
        model(input_ids=torch.tensor([[5, 6, 7]]), **{CACHE: cache})
    assert caches[0].is_initialized == caches[1].is_initialized
    caches[0].reset()
    assert not caches[0].is_initialized
    assert Cache(layers=[StepLayer(0, 5, None, False)]).is_initialized  # of a static step


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_beams_go_on_from_a_cache_that_holds_each_sequence_as_often(name, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name, "sdpa"), tiny_prompts(2)
    caches = [HardKVCache(config=model.config, **HOLD_ALL), DynamicCache(config=model.config)]
    for cache in caches:
        model(inputs["input_ids"][:, :9], attention_mask=inputs["attention_mask"][:, :9], **{CACHE: cache})
    with pytest.raises(ValueError, match=r"cache\.batch_repeat_interleave\(3\)"):
        greedy(model, inputs, caches[0], num_beams=3)
    caches[0].reset()
    model(inputs["input_ids"][:, :9], attention_mask=inputs["attention_mask"][:, :9], **{CACHE: caches[0]})
    for cache in caches:
        cache.batch_repeat_interleave(3)
    ours, theirs = (greedy(model, inputs, cache, num_beams=3) for cache in caches)
    assert torch.equal(ours, theirs)


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
    model(**tiny_prompts(3), **{CACHE: cache})
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
    assert model(**tiny_prompts(3), **{CACHE: cache}).logits.shape[0] == 3


# ---------------------------------------------------------------------------------------------- crop


def filled(model, inputs, tokens: int = 0, **settings: Any) -> HardKVCache:
    """A cache after a prompt and `tokens` further ones."""
    cache = HardKVCache(config=model.config, **(EVICT | settings))
    model(**inputs, **{CACHE: cache})
    for index in range(tokens):
        step(model, cache, [20 + index])
    return cache


def test_crop_equals_dynamic_cache(tiny_model, tiny_prompts):
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(1)
    cache, dense = filled(model, inputs, 2, **HOLD_ALL), DynamicCache(config=model.config)
    model(**inputs, **{CACHE: dense})
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
        model(**inputs, **{CACHE: past})
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
    model(**inputs, **{CACHE: cache})
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
    model(input_ids=torch.full((1, 5), 9), **{CACHE: cache})  # more than an interval
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
    model(input_ids=torch.full((1, 6), 9), **{CACHE: cache})
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
        model(**inputs, **{CACHE: cache})
    drafted.activate_past_recording()
    for index in range(12):
        expected = step(model, plain, [20 + index])
        rejected = index % (longest + 1)
        draft = torch.tensor([[20 + index, *range(60, 60 + rejected)]])
        actual = model(input_ids=draft, **{CACHE: drafted}).logits[:, 0]
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
    model(input_ids=ids, **{CACHE: drafted})
    assert drafted.stats().events == 0
    drafted.crop(-rejected)
    assert drafted.stats().events == 1
    assert held(drafted)[:3] == held(plain)[:3]


def test_taking_everything_back_goes_on_recording(tiny_model, tiny_prompts):
    """Recording is how the cache is used, not something that it holds; only reset() ends it."""
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(1)
    cache, fresh = (HardKVCache(config=model.config, **EVICT) for _ in range(2))
    cache.activate_past_recording()
    model(input_ids=torch.full((1, 5), 9), **{CACHE: cache})
    cache.crop(-5)
    fresh.activate_past_recording()
    for past in (cache, fresh):
        model(**inputs, **{CACHE: past})
        assert past.stats().events == 0
        past.crop(-2)
    assert held(cache) == held(fresh)


@pytest.mark.parametrize("chunks", [[1] * 12, [2, 3, 4, 1, 1, 1], [7, 9, 1], [40, 1, 1, 1]])
def test_at_most_one_event_a_forward(chunks, tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "sdpa")
    cache = filled(model, tiny_prompts(1))
    assert {layer.events for layer in cache.layers} == {1}
    since = 0
    for count in chunks:
        events = cache.stats().events
        model(input_ids=torch.full((1, count), 9), **{CACHE: cache})
        since += count
        due = since >= EVICT["interval"]
        assert {layer.events for layer in cache.layers} == {events + due}
        since = 0 if due else since


# ---------------------------------------------------------------------------------------------- copies


def test_a_shared_prefix(tiny_model, tiny_prompts):
    """deepcopy after the prompt: continuations are those of separate runs, whatever runs in between."""
    model, inputs = tiny_model("qwen3", "sdpa"), tiny_prompts(3)
    prefix = HardKVCache(config=model.config, **EVICT)
    model(**inputs, **{CACHE: prefix})
    before, mask = held(prefix), inputs["attention_mask"]
    alone = [HardKVCache(config=model.config, **EVICT) for _ in range(2)]
    copies = [copy.deepcopy(prefix) for _ in range(2)]
    for cache in alone:
        model(**inputs, **{CACHE: cache})
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
    model(**tiny_prompts(1), **{CACHE: cache})
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
        assert model(**tiny_prompts(3), **{CACHE: twin}).logits.isfinite().all()


class Newest:
    """A user's scorer that wants the newest tokens."""

    def score(self, observation):
        return observation.positions.float()


def test_columns_taken_back_from_a_pinned_prompt_are_no_longer_pinned(tiny_model, tiny_prompts):
    """Tokens that come in their place are not the prompt's."""
    model = tiny_model("qwen3", "sdpa")
    cache = filled(model, tiny_prompts(1), 1, pin_prompt=True, budget=20, scorer=Newest())
    cache.crop(-4)  # the token, and three of the prompt's 13
    for index in range(30):
        step(model, cache, [20 + index])
    for head in cache.kept(0)[0]:
        assert head[:10].tolist() == list(range(10))
        assert head[10] > 13


@pytest.mark.parametrize("offload", [False, True])
def test_nothing_is_made_on_the_default_device(offload, tiny_model, tiny_prompts, run_generate):
    """Users set it to where their model is, or not: here to where tensors hold no numbers."""
    model, inputs = tiny_model("qwen3"), tiny_prompts(3)
    texts = [tiny_prompts(1, length=40)["input_ids"][0].cpu()]
    settings = {"window": 4, "sinks": 1, "interval": 3, "scorer": "attention"}
    results = []
    for device in (torch.get_default_device(), torch.device("meta")):
        with device:
            calibration = calibrate(model, texts, progress=False, **settings)
            cache = HardKVCache(config=model.config, budget=8, calibration=calibration, offload=offload, **settings)
            assert cache.lengths().tolist() == []
            _, logits = run_generate(model, cache, inputs, 8)
            cache.batch_repeat_interleave(2)
            cache.crop(-1)
            results.append((logits, cache.lengths(), calibration.risk, calibration.counts, calibration.curves.gains))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)

"""Test that drafts taken back restore the earlier window queries, and that only one draft can be taken back."""

import pytest
import torch

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE

WINDOW, PROMPT = 4, 20


@pytest.fixture
def draft(tiny_model, tiny_prompts):
    """A function that lets a cache of one layer read the next tokens, and the cache, which records and has a prompt."""
    model, ids = tiny_model("llama", num_hidden_layers=1), tiny_prompts(1, 100)["input_ids"]

    def make(interval):
        cache = HardKVCache(config=model.config, window=WINDOW, sinks=1, interval=interval, budget=8)

        def read(count):
            start = cache.get_seq_length()
            with torch.no_grad():
                model(ids[:, start : start + count], **{CACHE: cache})

        read(PROMPT)
        cache.layers[0].activate_past_recording()
        return cache, read

    return make


def test_rounds_without_an_event_do_not_add_up(draft):
    """Each round may take back only its own draft, however old the last event is."""
    cache, read = draft(interval=1000)
    for _ in range(20):
        read(5)
        cache.crop(-4)
    assert cache.get_seq_length() == PROMPT + 20
    assert cache.layers[0].ring.capacity == WINDOW + 1 + 5


def test_a_crop_behind_the_last_event_counts_from_there(draft):
    """The next draft begins there, and taking all of it back leaves a whole window of queries, the right ones."""
    cache, read = draft(interval=2)
    read(2)
    cache.crop(0)
    assert cache.stats().events == 2
    cache.crop(-3)
    read(6)
    cache.crop(-6)
    observed = cache.observe(0)
    assert observed.query_positions.tolist() == [PROMPT - 5, PROMPT - 4, PROMPT - 3, PROMPT - 2]
    whole, read = draft(interval=1000)
    whole.reset()
    read(PROMPT - 1)
    torch.testing.assert_close(observed.queries, whole.observe(0).queries)
    assert observed.query_valid.all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recording", [False, True])
def test_a_batch_goes_on_as_if_what_was_cropped_had_never_been(recording, padded, tiny_model, tiny_prompts):
    """The crop runs a held event, at which rows with pads hold unequal numbers of new tokens."""
    model, inputs = tiny_model("llama", num_hidden_layers=1), tiny_prompts(2, PROMPT, new=12)
    inputs["attention_mask"][0, [PROMPT + 1, PROMPT + 4]] = 0
    cache, twin = (HardKVCache(config=model.config, window=WINDOW, sinks=1, interval=3, budget=8) for _ in range(2))

    def read(cache, count):
        new = slice(cache.get_seq_length(), cache.get_seq_length() + count)
        mask = inputs["attention_mask"][:, : new.stop] if padded else None
        with torch.no_grad():
            logits = model(inputs["input_ids"][:, new], attention_mask=mask, **{CACHE: cache}).logits[:, -1]
        return logits[mask[:, -1].bool()] if padded else logits

    if recording:
        cache.layers[0].activate_past_recording()
    torch.testing.assert_close(read(cache, PROMPT), read(twin, PROMPT))
    taken = 3 if recording else 1  # which brings an event, or not
    read(cache, taken + 1)
    cache.crop(-1)
    read(twin, taken)
    for count in (1, 1, 1, 3):
        torch.testing.assert_close(read(cache, count), read(twin, count))

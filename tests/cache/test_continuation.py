"""A further generate() must continue the very tokens that its cache holds."""

import copy

import pytest
import torch

from hardkv import HardKVCache, graphed
from hardkv.cache.argument import CACHE
from tests.models.tiny import random_ids

SIZES = {"budget": 16, "window": 4, "sinks": 1, "interval": 6}
HOW = [pytest.param({}, id="plain"), pytest.param({"custom_generate": graphed}, id="graphed")]


def turn(model, cache, ids, mask=None, **how):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=5, do_sample=False, **how)


def begun(tiny_model, **how):
    """A model, a cache after one turn of two sequences, and what it returned."""
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, **SIZES)
    ids = random_ids(2, 20)
    return model, cache, turn(model, cache, ids, **how)


def more(out, count=4):
    return torch.cat([out, torch.full((2, count), 7)], 1)


@pytest.mark.parametrize("how", HOW)
def test_turns_that_continue(how, tiny_model):
    model, cache, out = begun(tiny_model, **how)
    for _ in range(3):
        out = turn(model, cache, more(out), **how)
    assert cache.get_seq_length() == out.shape[1] - 1


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("column", [0, 20, 23])
def test_other_tokens_are_refused_before_anything_changes(column, how, tiny_model):
    model, cache, out = begun(tiny_model, **how)
    twin, ids = copy.deepcopy(cache), more(out)
    ids[1, column] += 1
    message = f"column {column} of sequence 1, {int(ids[1, column])} instead of {int(out[1, column])}"
    with pytest.raises(ValueError, match=message):
        turn(model, cache, ids, **how)
    assert torch.equal(turn(model, cache, more(out), **how), turn(model, twin, more(out), **how))


def test_the_newest_token_is_not_held_yet(tiny_model):
    model, cache, out = begun(tiny_model)
    ids = more(out)
    ids[1, 24] += 1
    turn(model, cache, ids)


def test_tokens_that_the_mask_hides_may_differ(tiny_model):
    """Such as what pads a row that has ended."""
    model, cache, out = begun(tiny_model)
    ids, mask = more(out), torch.ones_like(more(out))
    mask[0, 22:24] = 0
    ids[0, 22:24] = 1
    turn(model, cache, ids, mask)


def test_new_tokens_alone(tiny_model):
    """With a mask over all columns, as transformers takes them."""
    model, cache, _ = begun(tiny_model)
    new, mask = torch.full((2, 30), 7), torch.ones(2, 24 + 30, dtype=torch.long)
    turn(model, cache, new, mask)


def test_what_changes_the_cache_forgets_the_tokens(tiny_model):
    model, cache, out = begun(tiny_model)
    cache.batch_select_indices(torch.tensor([1, 0]))
    turn(model, cache, more(out.flip(0)))
    cache.reset()
    turn(model, cache, torch.full((2, 30), 9))


def test_a_crop_makes_room_for_other_tokens(tiny_model):
    model, cache, out = begun(tiny_model)
    cache.crop(-2)
    ids = more(out[:, :-3])
    ids[:, -6:] = 11
    turn(model, cache, ids)


def test_beams(tiny_model):
    """Two sequences returned, and four rows held: what is remembered does no harm."""
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, **SIZES)
    ids = random_ids(2, 20)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, **options)
    assert out.sequences.shape[0] == 2
    assert cache.layers[0].batch_size == 4

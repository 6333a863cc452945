"""A further generate() must continue the very tokens that its cache holds."""

import copy

import pytest
import torch

from hardkv import HardKVCache, graphed
from hardkv.cache.argument import CACHE
from hardkv.cache.continuation import HeldIds
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


def test_only_ids_of_all_columns_held_are_remembered():
    """generate() returns them with the newest token, which is not held; other results say nothing."""
    out = torch.arange(12).view(2, 6)
    for columns in (5, 6):
        held = HeldIds.of(out, columns)
        assert torch.equal(held.ids, out[:, :columns])
        assert held.ids.data_ptr() != out.data_ptr()
    assert [HeldIds.of(other, 6) for other in (out[:, :5], torch.zeros(2, 8), out[0], None)] == [None] * 4


def test_ids_that_cannot_be_those_held_are_not_compared():
    held = HeldIds(torch.arange(12).view(2, 6))
    other = torch.full((2, 8), 99)
    held.check(None, None)
    held.check(other[:1], None)  # another batch
    held.check(other[:, :5], None)  # fewer columns
    held.check(other, torch.ones(2, 14))  # new ones only
    held.check(other, torch.zeros(2, 8))  # all hidden
    for ids in (other, other[:, :6]):
        mask = torch.zeros(ids.shape)
        mask[1, 3:] = 1
        with pytest.raises(ValueError, match="column 0 of sequence 0, 99 instead of 0"):
            held.check(ids, None)
        with pytest.raises(ValueError, match="column 3 of sequence 1, 99 instead of 9"):
            held.check(ids, mask)


@pytest.mark.parametrize("change", ["reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_every_change_of_rows_forgets_the_tokens(change):
    cache = HardKVCache()
    cache.generated(torch.zeros(2, 0))
    assert cache._ids is not None
    arguments = {"reset": (), "batch_repeat_interleave": (2,)}.get(change, (torch.tensor([0]),))
    getattr(cache, change)(*arguments)
    assert cache._ids is None


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

"""Test that rows selected from a batch, reordered or repeated keep all their state."""

import pytest
import torch

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.selectors import Adaptive

SIZES = {"window": 4, "sinks": 1, "interval": 6}
PROMPT = 30
PICKS = {
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
    "beams": lambda cache: cache.reorder_cache(torch.tensor([1, 1, 2])),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "masked": lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
}
ROWS = {
    "reordered": [2, 0, 1],
    "beams": [1, 1, 2],
    "selected": [2, 1],
    "masked": [1, 2],
    "repeated": [0, 0, 1, 1, 2, 2],
}


def forwards(model, cache, inputs, start, stop):
    """The columns from `start` to `stop`: the prompt at once, others one by one; the last logits `[B, V]`."""
    column, logits = start, None
    while column < stop:
        end = column + 1 if column else PROMPT
        ids, mask = inputs["input_ids"][:, column:end], inputs["attention_mask"][:, :end]
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, **{CACHE: cache}).logits[:, -1]
        column = end
    return logits


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.filterwarnings("ignore:.*temperatures stopped")
def test_temperatures_move_with_their_rows(pick, offload, tiny_model, tiny_prompts):
    """Fitted online at the first event; later ones, with other rows, select as if those had begun in that order."""
    model, inputs = tiny_model("llama", dtype=torch.float64), tiny_prompts(3, PROMPT, new=24)
    settings = SIZES | {"scorer": "snapkv", "budget": Adaptive(12), "calibration": "online", "offload": offload}
    cache, twin = (HardKVCache(config=model.config, **settings) for _ in range(2))
    moved = {name: value[ROWS[pick]] for name, value in inputs.items()}
    forwards(model, cache, inputs, 0, PROMPT + 2)
    before = cache.stats().temperatures
    PICKS[pick](cache)
    logits = forwards(model, cache, moved, PROMPT + 2, PROMPT + 24)
    expected = forwards(model, twin, moved, 0, PROMPT + 24)
    assert cache.stats().events == twin.stats().events == 5
    fitted = cache.stats().temperatures
    assert fitted == [[layer[row] for row in ROWS[pick]] for layer in before]
    assert len({tuple(row) for row in before[-1]}) == 3  # or it would not matter which row has whose
    torch.testing.assert_close(torch.tensor(fitted), torch.tensor(twin.stats().temperatures))
    for idx in range(3):
        for heads, same in zip(cache.kept(idx), twin.kept(idx), strict=True):
            assert [head.tolist() for head in heads] == [head.tolist() for head in same]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("pick", PICKS)
def test_a_row_that_had_a_token_hidden_is_known_wherever_it_goes(pick, tiny_model, tiny_prompts):
    """Row 1's mask hides a token that every head holds, for one step, and shows it again when rows have moved."""
    model, inputs = tiny_model("llama"), tiny_prompts(3, PROMPT, new=10)
    cache = HardKVCache(config=model.config, scorer="snapkv", budget=12, **SIZES)
    hiding = {name: value.clone() for name, value in inputs.items()}
    hiding["attention_mask"][1, PROMPT - 1] = 0
    forwards(model, cache, inputs, 0, PROMPT + 1)
    forwards(model, cache, hiding, PROMPT + 1, PROMPT + 2)
    PICKS[pick](cache)
    moved = {name: value[ROWS[pick]] for name, value in inputs.items()}
    with pytest.raises((NotImplementedError, ValueError), match="mask"):  # at the next event at the latest
        forwards(model, cache, moved, PROMPT + 2, PROMPT + 2 + SIZES["interval"])


def test_rows_without_the_one_that_had_a_token_hidden_go_on(tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama"), tiny_prompts(3, PROMPT, new=10)
    cache = HardKVCache(config=model.config, scorer="snapkv", budget=12, **SIZES)
    hiding = {name: value.clone() for name, value in inputs.items()}
    hiding["attention_mask"][1, PROMPT - 1] = 0
    forwards(model, cache, inputs, 0, PROMPT + 1)
    forwards(model, cache, hiding, PROMPT + 1, PROMPT + 2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    forwards(model, cache, {name: value[[2, 0]] for name, value in inputs.items()}, PROMPT + 2, PROMPT + 10)
    assert cache.stats().events == 2

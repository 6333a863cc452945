"""Test batches of conversations: masks that hide stored columns, such as the pads after a row's last token.

DynamicCache is the reference if everything is kept, the oracle of conftest.py if tokens were evicted.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from hardkv import HardKVCache, graphed
from hardkv.cache.argument import CACHE
from hardkv.selectors import AdaKV, Adaptive, TopP
from tests.cache.conftest import DEVICE, PAD, VOCABULARY, make_prompts
from tests.cache.following import Follower
from tests.models.tiny import tiny_model as tiny_architecture

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIZES = {"window": 4, "sinks": 2, "interval": 5}
KEEP_ALL = SIZES | {"budget": 500}
EVICT = SIZES | {"budget": AdaKV(10), "patience": 1}
TURNS = [7, 4, 9]  # columns of the users' turns behind the prompt


def ids_of(batch: int, columns: int, seed: int = 3) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, columns), generator=generator, device="cpu").to(DEVICE)


def forward(model, cache, ids: Tensor, mask: Tensor, **kwargs) -> Tensor:
    """Logits of new columns `ids [B, q]`; `mask [B, columns so far]`."""
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    arguments = {"attention_mask": mask, "position_ids": positions} | kwargs
    with torch.no_grad():
        return model(ids, **{CACHE: cache}, **arguments).logits


def converse(model, cache, batch: int = 3, between: int = 6):
    """Logits where somebody reads them, turn by turn; every turn but the first hides the last columns of some rows.

    Between the turns single tokens are fed, which belong to nobody in the rows whose answers have ended.
    """
    inputs = make_prompts(batch, 12)
    mask, read = inputs["attention_mask"], []
    logits = forward(model, cache, inputs["input_ids"], mask)
    read.append(logits[mask.bool()])
    for turn, columns in enumerate(TURNS):
        ended = torch.zeros(batch, between, dtype=torch.long)
        for row in range(batch):
            ended[row, (row + turn) % 4 + 2 :] = 1  # so the rows end in turns of their own
        ended[turn % batch] = 0
        for step in range(between):
            mask = F.pad(mask, (0, 1), value=1)
            logits = forward(model, cache, ids_of(batch, 1, step), mask)
            read.append(logits[ended[:, step] == 0, 0])
        mask = mask.clone()
        mask[:, -between:] = 1 - ended
        mask = torch.cat([mask, torch.ones(batch, columns, dtype=torch.long)], 1)
        mask[turn % batch, -columns : 1 - columns] = 0  # a shorter question, padded on the left
        logits = forward(model, cache, ids_of(batch, columns, 50 + turn), mask)
        read.append(logits[mask[:, -columns:].bool()])
    return torch.cat(read), mask


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("settings", [{}, {"offload": True}, {"interval": 1}, {"interval": 100}], ids=str)
def test_a_cache_that_keeps_all_is_dynamic_cache(settings, name, attn, tiny_model):
    exact = attn == "sdpa"  # transformers' eager softmax is float32, whose mask in float64 is infinite
    model = tiny_model(name, attn, dtype=torch.float64 if exact else torch.float32)
    expected, mask = converse(model, DynamicCache(config=model.config))
    cache = HardKVCache(config=model.config, **KEEP_ALL | settings)
    actual, _ = converse(model, cache)
    torch.testing.assert_close(actual, expected, atol=1e-10 if exact else 2e-5, rtol=0)
    layers = [idx for idx, layer in enumerate(cache.layers) if hasattr(layer, "tiers")]
    for idx in layers:
        for row, heads in enumerate(cache.kept(idx)):
            assert all(torch.equal(head, mask[row].nonzero()[:, 0]) for head in heads)
        assert torch.equal(cache.layers[idx].tiers.tokens, mask.sum(1))
    assert torch.equal(cache.lengths(), mask.sum(1)[:, None].expand(len(layers), -1, cache.lengths().shape[2]))


@pytest.mark.parametrize("model_type", ["minicpm3", "falcon_h1", "gemma3n_text"])
def test_latents_states_and_shared_keys(model_type):
    """A linear attention's states have read the pads as DynamicCache's have."""
    model = tiny_architecture(model_type)
    expected, _ = converse(model, DynamicCache(config=model.config))
    actual, _ = converse(model, HardKVCache(config=model.config, **KEEP_ALL))
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"offload": True},
        {"budget": Adaptive(10), "calibration": "online", "scorer": "rkv"},
        {"budget": TopP(0.6, floor=8, cap=24), "interval": 2},
        {"budget": 24, "pin_prompt": True},
        {"window": 9, "budget": 12},  # longer than a turn: what is hidden lies in the window, and in its queries
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_forward_equals_masked_dense_attention(name, settings, tiny_model):
    model = tiny_model(name)
    cache = HardKVCache(config=model.config, **EVICT | settings)
    follower = Follower(model, cache, name)
    converse(model, cache)
    assert follower.forwards == 1 + 3 * 7
    assert follower.evicted > 6


AFTER = [(18, 21), *((at, at + 1) for at in range(21, 42))]  # the forward that hides columns, and single tokens


def test_what_is_hidden_was_never_there(tiny_model):
    """Columns hidden before any event leave what padding in their place leaves: tiers, queries, events, numbers."""
    model, inputs = tiny_model("llama", dtype=torch.float64), make_prompts(3, 12)
    caches = [HardKVCache(config=model.config, **EVICT | {"interval": 9, "scorer": "rkv"}) for _ in range(2)]
    ids, mask = ids_of(3, 30), torch.cat([inputs["attention_mask"], torch.ones(3, 30, dtype=torch.long)], 1)
    hidden = mask.clone()
    hidden[0, 12:18] = 0
    hidden[1, 15:17] = 0
    steps = []
    for cache, early in zip(caches, (hidden, mask), strict=True):
        logits = []
        for start, stop, seen in [(0, 12, mask), (12, 18, early), *[(*each, hidden) for each in AFTER]]:
            new = torch.cat([inputs["input_ids"], ids], 1)[:, start:stop]
            columns = torch.arange(start, stop).expand(3, -1)
            logits.append(forward(model, cache, new, seen[:, :stop], position_ids=columns))
        steps.append(torch.cat(logits[2:], 1))
    # the second layer's keys of rows that saw the hidden tokens differ, so the first layer's tiers are compared
    ours, theirs = (cache.layers[0].tiers for cache in caches)
    assert str(caches[0].kept(0)) == str(caches[1].kept(0))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.sparse.positions, theirs.sparse.positions)
    assert caches[0].stats().events == caches[1].stats().events > 3
    torch.testing.assert_close(steps[1][0], steps[0][0], atol=1e-10, rtol=0)  # the row hid its newest columns


def causal(mask: Tensor, queries: int) -> Tensor:
    """bool `[B, 1, queries, columns]`: what a 2D mask `[B, columns]` allows the last columns."""
    columns = mask.shape[1]
    lower = torch.ones(columns, columns, dtype=torch.bool).tril()[-queries:]
    return (lower & mask.bool()[:, None])[:, None]


def padded_queries(mask: Tensor, seen: bool) -> Tensor:
    """A 4D mask whose padded queries see all of the past, or nothing."""
    queries = mask.shape[2]
    pads = ~mask[:, 0, :, -queries:].diagonal(dim1=1, dim2=2)
    filled = mask.masked_fill(pads[:, None, :, None], seen)
    if seen:
        filled[..., -queries:] = mask[..., -queries:]
    return filled


def additive(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", ["bool", "additive", "pads see all", "pads see nothing"])
@pytest.mark.parametrize("queries", [1, 4])
def test_4d_masks_hide_as_2d_masks_do(queries, form, tiny_model):
    model, inputs = tiny_model("llama"), make_prompts(3, 12)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 8 + queries, dtype=torch.long)], 1)
    hidden = mask.clone()
    hidden[0, 15:20] = 0
    hidden[1, 3] = 0
    if queries > 1:
        hidden[2, -2:] = 0  # padded on the right
    cache = HardKVCache(config=model.config, **EVICT | {"interval": 100})
    forward(model, cache, inputs["input_ids"], mask[:, :12])
    forward(model, cache, ids_of(3, 8), mask[:, :20])
    twin, new = copy.deepcopy(cache), ids_of(3, queries, 9)
    wide = causal(hidden, queries)
    wide = {"bool": wide, "additive": additive(wide)}.get(form, padded_queries(wide, form == "pads see all"))
    actual = forward(model, cache, new, hidden, attention_mask=wide)
    real = hidden[:, -queries:].bool()
    for each in (cache, twin):
        assert not each.lengths("condensed").equal(each.lengths("sparse"))
    if queries == 1:  # which a 2D mask tells too late
        assert all(not {15, 16, 17, 18, 19} & set(head.tolist()) for head in cache.kept(0)[0])
        expected = forward(model, twin, new, hidden, attention_mask=causal(hidden, 1))
    else:
        expected = forward(model, twin, new, hidden)
    torch.testing.assert_close(actual[real], expected[real], atol=2e-5, rtol=0)
    assert str([cache.kept(idx) for idx in range(3)]) == str([twin.kept(idx) for idx in range(3)])
    last = torch.cat([hidden, torch.ones(3, 3, dtype=torch.long)], 1)
    ours, theirs = (forward(model, each, ids_of(3, 3, 7), last) for each in (cache, twin))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_a_row_whose_tokens_are_all_hidden(tiny_model):
    model, inputs = tiny_model("llama"), make_prompts(3, 20)
    cache = HardKVCache(config=model.config, **EVICT)
    forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    mask = F.pad(inputs["attention_mask"], (0, 3), value=1)
    mask[1, :20] = 0
    actual = forward(model, cache, ids_of(3, 3), mask)
    alone = forward(model, DynamicCache(config=model.config), ids_of(3, 3)[1:2], torch.ones(1, 3, dtype=torch.long))
    torch.testing.assert_close(actual[1:2], alone, atol=2e-5, rtol=0)
    assert [head.tolist() for head in cache.kept(0)[1]] == [[20, 21, 22]] * 2
    for step in range(12):
        mask = F.pad(mask, (0, 1), value=1)
        forward(model, cache, ids_of(3, 1, step), mask)
    assert cache.stats().events == 4
    assert cache.kept(0)[1][0].min() >= 20


def hiding(model, cache, columns: int, first: int = 12):
    """A cache of a prompt and single tokens, and the mask of `columns` more that hides the last of its first row."""
    inputs = make_prompts(3, first)
    mask = inputs["attention_mask"]
    forward(model, cache, inputs["input_ids"], mask)
    for step in range(3):
        mask = F.pad(mask, (0, 1), value=1)
        forward(model, cache, ids_of(3, 1, step), mask)
    hides = mask.clone()
    hides[0, -2:] = 0
    return F.pad(mask, (0, columns), value=1), F.pad(hides, (0, columns), value=1)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_what_comes_back_is_refused_and_changes_nothing(dtype, tiny_model):
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, **EVICT)
    shows, hides = (mask.to(dtype) for mask in hiding(model, cache, 2))
    forward(model, cache, ids_of(3, 2), hides)
    kept, twin = str(cache.kept(1)), copy.deepcopy(cache)
    shows, hides = (F.pad(mask, (0, 3), value=True) for mask in (shows, hides))
    with pytest.raises(NotImplementedError, match="shows column 13 of sequence 0, which was padding or hidden before"):
        forward(model, cache, ids_of(3, 3), shows)
    assert (cache.get_seq_length(), str(cache.kept(1))) == (17, kept)
    torch.testing.assert_close(*(forward(model, each, ids_of(3, 3), hides) for each in (cache, twin)))
    pads = F.pad(hides, (0, 2), value=True)
    pads[0, 1] = True  # of the prompt
    with pytest.raises(NotImplementedError, match="shows column 1 of sequence 0"):
        forward(model, cache, ids_of(3, 2), pads)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_a_mask_that_is_changed_in_place(dtype, tiny_model):
    """The cache must store its own copy of masks."""
    model, inputs = tiny_model("llama", dtype=torch.float64), make_prompts(3, 12)
    results = []
    for cache in (DynamicCache(config=model.config), HardKVCache(config=model.config, **KEEP_ALL)):
        mask = F.pad(inputs["attention_mask"], (0, 8), value=1).to(dtype)
        forward(model, cache, inputs["input_ids"], mask[:, :12])
        mask[1, 3] = 0
        forward(model, cache, ids_of(3, 2), mask[:, :14])
        for step in range(14, 16):
            forward(model, cache, ids_of(3, 1), mask[:, : step + 1])
        mask[0, 14:16] = 0
        results.append(forward(model, cache, ids_of(3, 4), mask)[:, 1:])
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)


@pytest.mark.parametrize("what", ["hides", "shows", "both"])
def test_a_turn_of_one_token_is_noticed(what, tiny_model):
    """At the next event or longer forward; a step back makes two tokens of it, and then it is right."""
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, **EVICT | {"interval": 9})
    shows, hides = hiding(model, cache, 1)
    mask = {"hides": hides, "shows": shows, "both": hides}[what].clone()
    if what != "hides":
        mask[0, 1:3] = 1  # as many as it hides
    twin, spared = copy.deepcopy(cache), copy.deepcopy(cache)
    forward(model, cache, ids_of(3, 1), mask)
    assert "1 sequences" in cache.stats().warnings[0]
    longer = copy.deepcopy(cache)
    with pytest.raises(NotImplementedError, match=r"hid or showed past tokens of 1 sequences.*reset\(\) it"):
        forward(model, longer, ids_of(3, 2), F.pad(mask, (0, 2), value=1))
    while cache.get_seq_length() < 20:
        mask = F.pad(mask, (0, 1), value=1)
        forward(model, cache, ids_of(3, 1), mask)
    with pytest.raises(NotImplementedError, match="hid or showed past tokens of 1 sequences"):
        forward(model, cache, ids_of(3, 1), F.pad(mask, (0, 1), value=1))
    if what == "hides":
        twin.crop(-1)
        columns = ids_of(3, 1, 2), ids_of(3, 1, 5)  # the last one again, and the turn's
        mask = hides.clone()
        forward(model, twin, torch.cat(columns, 1), mask)
        assert not twin.stats().warnings
        assert all(not {13, 14} & set(head.tolist()) for head in twin.kept(0)[0])
    forward(model, spared, ids_of(3, 1), shows)
    assert not spared.stats().warnings


def answers(model, cache, turns: int = 3, batch: int = 3, new: int = 8, custom=None, **kwargs):
    """Tokens of all turns of a batched chat by `generate()`; rows end at a token of their own, others go on."""
    inputs = make_prompts(batch, 12)
    ids, mask, out = inputs["input_ids"], inputs["attention_mask"], []
    arguments = {"max_new_tokens": new, "do_sample": False, "pad_token_id": PAD} | kwargs
    if custom is not None:
        arguments["custom_generate"] = custom
    for turn in range(turns):
        end = ENDS[turn]
        ids = model.generate(ids, attention_mask=mask, **{CACHE: cache}, eos_token_id=end, **arguments)
        fresh = ids[:, mask.shape[1] :]
        out.append(fresh)
        ends = torch.isin(fresh, torch.tensor(end)).long()
        mask = torch.cat([mask, (ends.cumsum(1) == ends).long()], 1)  # up to the first that ends a row
        ids = torch.cat([ids, ids_of(batch, 4, 20 + turn)], 1)
        mask = F.pad(mask, (0, 4), value=1)
    return out, mask[:, :-4]


ENDS = [list(range(start, VOCABULARY, 9)) for start in (2, 3, 4)]  # so many that rows end early


@pytest.mark.parametrize("custom", [None, graphed], ids=["generate", "graphed"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_chat_is_what_dynamic_cache_makes_of_it(name, custom, tiny_model):
    model = tiny_model(name, dtype=torch.float64)
    expected, mask = answers(model, DynamicCache(config=model.config))
    assert (mask[:, 12:] == 0).any()
    cache = HardKVCache(config=model.config, **KEEP_ALL)
    actual, _ = answers(model, cache, custom=custom)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", [{}, {"budget": Adaptive(10), "calibration": "online", "refit": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_graphed_evicts_what_generate_does(name, settings, tiny_model):
    model = tiny_model(name, dtype=torch.float64)
    caches = [HardKVCache(config=model.config, **EVICT | settings) for _ in range(2)]
    (expected, _), (actual, _) = (
        answers(model, cache, custom=each) for cache, each in zip(caches, (None, graphed), strict=True)
    )
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    for idx, layer in enumerate(caches[0].layers):
        if hasattr(layer, "tiers"):
            assert str(caches[0].kept(idx)) == str(caches[1].kept(idx))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_chat_equals_masked_dense_attention(name, tiny_model):
    model = tiny_model(name)
    cache = HardKVCache(config=model.config, **EVICT)
    follower = Follower(model, cache, name)
    answers(model, cache, new=12)
    assert follower.evicted > 6


def test_a_trace_and_beams_go_on(tiny_model):
    """The recorder sees what is left; rows are picked with what the cache remembers of their masks."""
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, **EVICT)
    with cache.record() as trace:
        _, mask = hiding(model, cache, 3)
        forward(model, cache, ids_of(3, 3), mask)
    for idx in range(3):
        assert str(trace.kept(idx)) == str(cache.kept(idx))
        assert all(not {13, 14} & set(head.tolist()) for head in trace.kept(idx)[0])
    rows = torch.tensor([2, 0, 0])
    cache.reorder_cache(rows)
    mask = F.pad(mask[rows], (0, 2), value=1)
    forward(model, copy.deepcopy(cache), ids_of(3, 2), mask)
    mask[1, 13] = 1
    with pytest.raises(NotImplementedError, match="shows column 13 of sequence 1"):
        forward(model, cache, ids_of(3, 2), mask)

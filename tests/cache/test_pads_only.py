"""Test events before any sequence has a token: chunked, left-padded prompts whose first chunks hold only pads."""

import os
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from hardkv import HardKVCache, graphed
from hardkv.cache.argument import CACHE
from hardkv.selectors import SCORERS, AdaKV, Adaptive, Observation, Pyramid, Risk, TopK, TopP, get_scorer
from tests.cache.conftest import DEVICE
from tests.cache.test_neighbours import measured

SIZES = {"window": 4, "sinks": 2, "interval": 4}
ALL_BUDGETS = [TopK(12), AdaKV(12), Adaptive(12), TopP(0.6, floor=8, cap=16), Pyramid(12, beta=2), Risk(12)]
OPTIONS = [{}, {"patience": 2}, {"calibration": "online"}, {"calibration": "online", "refit": 1}, {"offload": True}]
CHUNKS = [16, 16, 8, *[1] * 12]


def padded(tiny_prompts, pads):
    """A batch of two of which the first `pads` columns are pads in both rows, and more in one."""
    inputs = tiny_prompts(2, 40, new=12)
    inputs["attention_mask"][:, :pads] = 0
    inputs["attention_mask"][0, : pads + 5] = 0
    return inputs


def cache_of(model, scorer, budget, options):
    if "calibration" in options and isinstance(budget, TopK | AdaKV | Pyramid):
        pytest.skip("ranks by scores alone")
    if isinstance(budget, Risk):
        if "calibration" in options:
            pytest.skip("needs measured curves")
        options = options | {"calibration": measured(model, scorer, SIZES["window"])}
    return HardKVCache(config=model.config, scorer=scorer, budget=budget, **SIZES, **options)


def same_without_the_pads(model, inputs, chunks, scorer, budget, options, run_feed):
    """Compare steps with those of a cache that gets the batch without its first chunk, which is pads only."""
    whole, without = (cache_of(model, scorer, budget, options) for _ in range(2))
    steps = run_feed(model, whole, **inputs, chunks=chunks)
    next(steps)
    assert not whole.lengths().any()
    rest = {name: each[:, 16:] for name, each in inputs.items()}
    visible = rest["attention_mask"].bool()
    for (start, stop, ours), (_, _, theirs) in zip(
        steps, run_feed(model, without, **rest, chunks=chunks[1:]), strict=True
    ):
        seen = visible[:, start - 16 : stop - 16]
        torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-4, atol=1e-5)
        assert torch.equal(whole.lengths(), without.lengths())
    assert (whole.lengths() < visible.sum(1)[None, :, None]).any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", ALL_BUDGETS, ids=str)
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_as_if_they_had_not_been(scorer, budget, options, tiny_model, tiny_prompts, run_feed):
    """After a chunk of pads, an evicting cache equals one that never saw the pads."""
    same_without_the_pads(tiny_model("llama"), padded(tiny_prompts, 16), CHUNKS, scorer, budget, options, run_feed)


@pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
@pytest.mark.parametrize(
    ("scorer", "budget", "options"),
    [
        ("attention", AdaKV(12), {"patience": 2}),
        ("snapkv", Risk(12), {}),
        ("rkv", Adaptive(12), {"calibration": "online"}),
    ],
    ids=str,
)
def test_as_if_they_had_not_been_by_triton(scorer, budget, options, tiny_model, tiny_prompts, run_feed):
    """As above, with fewer events, since the interpreter is slow."""
    model, inputs = tiny_model("llama", num_hidden_layers=1), padded(tiny_prompts, 16)
    inputs = {name: each[:, :37] for name, each in inputs.items()}
    same_without_the_pads(model, inputs, [16, 16, 4, 1], scorer, budget, options, run_feed)


@pytest.mark.parametrize("budget", [TopK(12), Risk(12)], ids=str)
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_a_batch_of_pads_only(scorer, budget, tiny_model, tiny_prompts, run_feed):
    model, inputs = tiny_model("llama"), padded(tiny_prompts, 52)
    cache = cache_of(model, scorer, budget, {})
    for _ in run_feed(model, cache, **inputs, chunks=CHUNKS):
        assert not cache.lengths().any()
    assert cache.stats().events > 2


@pytest.mark.parametrize("budget", [TopK, Risk])
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_generate_by_chunks(scorer, budget, tiny_model, tiny_prompts):
    """Without eviction as DynamicCache has it; evicting, `graphed` as without it."""
    model, inputs = tiny_model("llama"), padded(tiny_prompts, 20)

    def tokens(cache, **options):
        options |= {"prefill_chunk_size": 16, "max_new_tokens": 12, "do_sample": False}
        return model.generate(**inputs, **{CACHE: cache}, **options)

    def ours(n):
        return cache_of(model, scorer, budget(n), {})

    assert torch.equal(tokens(ours(100)), tokens(DynamicCache(config=model.config)))
    assert torch.equal(tokens(ours(12), custom_generate=graphed), tokens(ours(12)))


def test_scorers_are_not_asked(tiny_model, tiny_prompts, run_feed):
    """A user's scorer need not handle an empty set of tokens."""

    class Own:
        def score(self, observation):
            assert observation.keys.shape[0]
            return observation.attention.amax() - observation.attention

    model, inputs = tiny_model("llama"), padded(tiny_prompts, 16)
    cache = HardKVCache(config=model.config, scorer=Own(), budget=12, **SIZES)
    assert len(list(run_feed(model, cache, **inputs, chunks=CHUNKS))) == len(CHUNKS)


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_nothing_to_score_where_the_host_knows_a_bound_only(scorer):
    """The host's bound may exceed the longest row."""
    states, none = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, dtype=torch.bool)
    empty = replace(Observation.from_dense(states, states, states, mask=none), longest=16)
    assert get_scorer(scorer).score(empty).shape == (0,)

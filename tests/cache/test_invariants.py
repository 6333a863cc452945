"""Test invariants after any number of events: which tokens are held, where and for how long, and nothing else."""

import gc
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from hardkv import HardKVCache
from hardkv.selectors import AdaKV, Adaptive, Pyramid, TopK, TopP
from hardkv.selectors.budgets import FixedTotal

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCORERS = ["attention", "snapkv", "rkv"]
SIZES = {"window": 3, "sinks": 2, "interval": 4}


@dataclass
class Shuffle:
    """A user's scorer with new scores at every event, so that tokens are deselected, revived and dropped often."""

    generator: torch.Generator = field(default_factory=lambda: torch.Generator("cpu").manual_seed(5))

    def score(self, observation):
        drawn = torch.rand(observation.keys.shape[0], generator=self.generator, device="cpu")
        return drawn.to(observation.keys.device)


@dataclass
class Wanted:
    """A user's scorer that wants the positions listed for each event."""

    script: list
    event: int = 0

    def score(self, observation):
        wanted = torch.tensor(self.script[self.event])
        self.event += 1
        return torch.isin(observation.positions, wanted).float()


def ragged_rows(tier, of):
    """Split `of [N, ...]` of a ragged tier into one tensor per row."""
    return of.split(tier.cu_seqlens.diff().tolist())


def tier_positions(layer):
    """Return `{tier: [row][positions]}`, read from the storage and not through `kept()`."""
    tiers = layer.tiers
    dense = [tiers.dense.positions[b, :fill].tolist() for b, fill in enumerate(tiers.dense.fill.tolist())]
    return {
        "condensed": [row.tolist() for row in ragged_rows(tiers.condensed, tiers.condensed.positions)],
        "sparse": [row.tolist() for row in ragged_rows(tiers.sparse, tiers.sparse.positions)],
        "dense": [row for row in dense for _ in range(layer.num_kv_heads)],
    }


class Ledger:
    """Track token by token what one layer must hold by the definition of Cautious Update.

    The selection of an event is read from `kept()`; everything else follows from it: who is on probation, with how many
    misses, and who is gone.

    Args:
        attention_mask: `[B, T]` of the whole run.
        index: the layer.
        settings: of the cache.
    """

    def __init__(self, attention_mask, index, settings):
        self.exists = attention_mask.bool()
        self.index, self.settings = index, settings
        self.misses = None  # [row] {position: consecutive events that did not select it}
        self.last_event = None
        self.events = self.revived = self.dropped = 0

    def after(self, start, stop, cache):
        """Check the layer after the forward over columns `start` to `stop`."""
        layer, settings = cache.layers[self.index], self.settings
        kept = [row.tolist() for sequence in cache.kept(self.index) for row in sequence]
        heads = layer.num_kv_heads
        if self.misses is None:
            self.misses = [{} for _ in kept]
        for row, held in enumerate(self.misses):
            held.update(dict.fromkeys((start + self.exists[row // heads, start:stop].nonzero()[:, 0]).tolist(), 0))
        if self.last_event is None or stop - self.last_event >= settings.interval:
            self.last_event, self.events = stop, self.events + 1
            self._check_counts(kept, layer)
            for row, held in enumerate(self.misses):
                self._select(held, set(kept[row]), self.exists[row // heads, :stop].nonzero()[:, 0].tolist())
        assert layer.events == self.events
        assert cache.get_seq_length() == stop
        self._check_storage(kept, cache)

    def _select(self, held, selected, seen):
        """One event of one row; `seen` are the positions of all its tokens so far."""
        window, sinks = self.settings.window, self.settings.sinks
        assert selected <= held.keys()  # nothing comes back, no pad is stored
        assert selected >= set(seen[-window:]) | set(seen[:sinks])
        for position, missed in list(held.items()):
            if position in selected:
                self.revived += missed > 0
                held[position] = 0
            elif missed < self.settings.patience:
                held[position] += 1
            else:
                self.dropped += 1
                del held[position]

    def _check_counts(self, kept, layer):
        """The budget's public counts hold right after an event."""
        budget, heads = layer.budget, layer.num_kv_heads
        protected = self.settings.window + self.settings.sinks
        had = torch.tensor([len(held) for held in self.misses]).view(-1, heads)
        has = torch.tensor([len(row) for row in kept]).view(-1, heads)
        if isinstance(budget, TopK):
            assert torch.equal(has, had.clamp_max(budget.n))
        elif isinstance(budget, FixedTotal):
            room = (budget.n - had.clamp_max(protected)).sum(1)  # of all heads together
            candidates = (had - protected).clamp_min(0).sum(1)
            assert torch.equal(has.sum(1), had.clamp_max(protected).sum(1) + room.minimum(candidates))
        elif budget.p < 1:
            assert (has <= had.clamp_max(budget.cap)).all()
            assert (has >= had.clamp_max(budget.floor)).all()
        else:
            assert torch.equal(has, had)

    def _check_storage(self, kept, cache):
        layer = cache.layers[self.index]
        tiers = tier_positions(layer)
        for row, held in enumerate(self.misses):
            read = sorted(position for position, missed in held.items() if missed == 0)
            waiting = sorted(position for position, missed in held.items() if missed > 0)
            assert kept[row] == read  # ascending
            assert tiers["condensed"][row] + tiers["dense"][row] == read  # each once, the window in the dense tier
            assert tiers["sparse"][row] == waiting
        sparse = layer.tiers.sparse
        for tier in (layer.tiers.condensed, sparse):  # what kernels are compiled for
            assert (tier.cu_seqlens.dtype, tier.positions.dtype) == (torch.int32, torch.int32)
            assert tier.misses.dtype == torch.uint8
        for row, missed in enumerate(ragged_rows(sparse, sparse.misses)):
            assert missed.tolist() == [self.misses[row][position] for position in tiers["sparse"][row]]
        rank = [idx for idx, other in enumerate(cache.layers) if hasattr(other, "tiers")].index(self.index)
        for tier, rows in tiers.items():
            assert cache.lengths(tier)[rank].flatten().tolist() == [len(row) for row in rows]
        assert cache.lengths()[rank].flatten().tolist() == [len(row) for row in kept]


def assert_stored_tokens(layer, keys, values):
    """Every stored key and value is bit for bit the one that `keys, values [B, H, columns, D]` have at its position."""
    heads = layer.num_kv_heads
    for tier in (layer.tiers.condensed, layer.tiers.sparse):
        for ours, theirs in ((tier.keys, keys), (tier.values, values)):
            for row, stored in enumerate(ragged_rows(tier, ours)):
                positions = ragged_rows(tier, tier.positions)[row].long()
                assert torch.equal(stored, theirs[row // heads, row % heads, positions])
    dense = layer.tiers.dense
    for b, fill in enumerate(dense.fill.tolist()):
        positions = dense.positions[b, :fill].long()
        assert torch.equal(dense.keys[b, :, :fill], keys[b, :, positions])
        assert torch.equal(dense.values[b, :, :fill], values[b, :, positions])


def check_run(model, dense, cache, inputs, chunks, run_feed):
    """Feed both caches; after every forward check all ledgers, and layer 0's stored tokens against `dense`.

    Keys and values of layer 0 do not depend on what attention reads, so a DynamicCache has the true ones.
    """
    ledgers = [Ledger(inputs["attention_mask"], idx, cache.settings) for idx in range(len(cache.layers))]
    reference = DynamicCache(config=dense.config)
    runs = zip(
        run_feed(model, cache, **inputs, chunks=chunks),
        run_feed(dense, reference, **inputs, chunks=chunks),
        strict=True,
    )
    for (start, stop, _), _ in runs:
        for ledger in ledgers:
            ledger.after(start, stop, cache)
        assert_stored_tokens(cache.layers[0], reference.layers[0].keys, reference.layers[0].values)
    return ledgers


@pytest.mark.parametrize(
    "budget", [TopK(9), TopP(0.7, floor=7, cap=14), Adaptive(9), AdaKV(9), Pyramid(9, beta=2)], ids=str
)
@pytest.mark.parametrize(("scorer", "patience"), [(scorer, 2) for scorer in SCORERS] + [("shuffle", 0), ("shuffle", 2)])
def test_what_is_held_after_ten_events(scorer, budget, patience, tiny_model, tiny_prompts, run_feed):
    inputs, model = tiny_prompts(3, 18, new=40), tiny_model("qwen3")
    scorer = Shuffle() if scorer == "shuffle" else scorer
    cache = HardKVCache(config=model.config, scorer=scorer, budget=budget, patience=patience, **SIZES)
    ledgers = check_run(model, tiny_model("qwen3"), cache, inputs, [18] + [1, 1, 2] * 10, run_feed)
    assert [ledger.events for ledger in ledgers] == [11] * 3
    assert sum(ledger.dropped for ledger in ledgers) > 50
    assert bool(cache.stats().sparse) == bool(patience)
    if isinstance(scorer, Shuffle) and patience:
        assert sum(ledger.revived for ledger in ledgers) > 20


def test_misses_count_consecutive_events(tiny_model, tiny_prompts, run_feed):
    """patience=2: two misses are forgiven, a selection clears them, the third in a row is final."""
    model, inputs = tiny_model("llama", num_hidden_layers=1), tiny_prompts(1, 10, new=16)
    script = [[5, 6], [5], [6], [5, 6], [6], [6], [6, 7], [5, 6, 7]]  # event 0 follows the prompt
    cache = HardKVCache(config=model.config, scorer=Wanted(script), budget=6, window=2, sinks=1, interval=2, patience=2)
    held = []  # after each event: the misses of 5, 6 and 7, None when gone
    for _, stop, _ in run_feed(model, cache, **inputs, chunks=[10] + [2] * 7):
        tiers = cache.layers[0].tiers
        row = dict.fromkeys(cache.kept(0)[0][0].tolist(), 0)
        sparse = ragged_rows(tiers.sparse, tiers.sparse.positions)[0].tolist()
        row |= dict(zip(sparse, ragged_rows(tiers.sparse, tiers.sparse.misses)[0].tolist(), strict=True))
        held.append(tuple(row.get(position) for position in (5, 6, 7)))
        assert {0, stop - 2, stop - 1} <= row.keys()
    # 6 - 1 - 2 = 3 candidates: the wanted ones, then the newest of the others, which is 7 only at the prompt's event
    assert held == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 2),
        (0, 0, None),
        (1, 0, None),
        (2, 0, None),
        (None, 0, None),
        (None, 0, None),
    ]


@pytest.mark.parametrize("scorer", ["attention", "snapkv"])
@pytest.mark.parametrize("patience", [0, 1])
def test_selection_follows_the_definition(
    scorer, patience, tiny_model, tiny_prompts, run_feed, run_oracle, make_visibility
):
    """Which tokens layer 0 keeps, from its true queries and keys, event by event: the definitions, written out."""
    window, sinks, interval, n = 5, 2, 6, 12
    inputs = tiny_prompts(3, 20, new=30)
    inputs["attention_mask"][2, :18] = 0  # fewer tokens than the window has queries
    inputs["attention_mask"][1, [30, 37]] = 0  # a turn ended early: pads among the queries that an event observes
    exists = inputs["attention_mask"].bool()
    model = tiny_model("qwen3", dtype=torch.float64)
    cache = HardKVCache(
        config=model.config, scorer=scorer, budget=n, window=window, sinks=sinks, interval=interval, patience=patience
    )
    queries, keys = layer_0_queries_and_keys(tiny_model("qwen3", dtype=torch.float64), inputs)
    group = queries.shape[1] // keys.shape[1]
    held = [{} for _ in range(6)]  # [row] {position: misses}
    for start, stop, _ in run_feed(model, cache, **inputs, chunks=[20] + [1] * 30):
        for row, tokens in enumerate(held):
            tokens.update(dict.fromkeys((start + exists[row // 2, start:stop].nonzero()[:, 0]).tolist(), 0))
        if start and (stop - 20) % interval:
            continue
        for row, tokens in enumerate(held):
            b, h = divmod(row, 2)
            positions = sorted(tokens)
            observed = [column for column in range(stop - window, stop) if exists[b, column]]
            received = torch.zeros(len(positions), dtype=torch.float64)
            for column in observed:
                for head in range(h * group, (h + 1) * group):
                    logits = keys[b, h, positions] @ queries[b, head, column] * 8**-0.5
                    logits[torch.tensor(positions) > column] = -torch.inf
                    received += torch.softmax(logits, 0) / len(observed) / group
            score = dict(zip(positions, received.tolist(), strict=True))
            protected = set(positions[:sinks] + positions[-window:])
            if scorer == "snapkv":  # the largest of the seven around, window left out
                outside = positions[:-window]
                score = {
                    position: max(score[other] for other in outside[max(0, i - 3) : i + 4])
                    for i, position in enumerate(outside)
                }
            candidates = sorted(set(positions) - protected, key=lambda p: (score[p], p), reverse=True)
            selected = protected | set(candidates[: n - len(protected)])
            held[row] = {
                position: 0 if position in selected else missed + 1
                for position, missed in tokens.items()
                if position in selected or missed < patience
            }
            assert cache.kept(0)[b][h].tolist() == sorted(selected)


def layer_0_queries_and_keys(model, inputs):
    """Post-RoPE `[B, Hq, T, D]` and `[B, H, T, D]` of the first layer."""
    caught = {}
    original = AttentionInterface._global_mapping["sdpa"]

    def spy(module, query, key, value, *args, **kwargs):
        if module.layer_idx == 0:
            caught["q"], caught["k"] = query, key
        return original(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", AttentionMaskInterface._global_mapping["sdpa"])
    model.set_attn_implementation("spy")
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(**inputs, position_ids=position_ids, use_cache=False)
    return caught["q"], caught["k"]


BUDGETS = st.one_of(
    st.builds(lambda extra: lambda least: TopK(least + extra), st.integers(1, 12)),
    st.builds(lambda extra, alpha: lambda least: AdaKV(least + extra, alpha), st.integers(1, 12), st.floats(0, 1)),
    st.builds(
        lambda extra, low, high: (
            lambda least: Adaptive(
                least + extra, floor=min(low, least + extra), cap=None if high is None else least + extra + high
            )
        ),
        st.integers(1, 12),
        st.integers(0, 15),
        st.none() | st.integers(0, 10),
    ),
    st.builds(
        lambda p, low, high: lambda least: TopP(p, floor=min(low, least + high), cap=least + high),
        st.floats(0.01, 1),
        st.integers(0, 15),
        st.integers(1, 15),
    ),
    st.builds(lambda extra, beta: lambda least: Pyramid(least + extra, beta), st.integers(1, 12), st.integers(1, 20)),
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.integers(1, 30),
    pads=st.lists(st.integers(0, 29), min_size=1, max_size=3),
    chunks=st.lists(st.integers(1, 7), max_size=12),
    window=st.integers(1, 6),
    sinks=st.integers(0, 4),
    interval=st.integers(1, 8),
    patience=st.integers(0, 3),
    scorer=st.sampled_from([*SCORERS, "shuffle"]),
    budget=BUDGETS,
)
def test_any_run_keeps_the_invariants(
    prompt, pads, chunks, window, sinks, interval, patience, scorer, budget, tiny_model, tiny_prompts, run_feed,
    run_record, run_oracle,
):  # fmt: skip
    inputs = tiny_prompts(len(pads), prompt, new=sum(chunks))
    inputs["attention_mask"][:] = 1
    for row, count in enumerate(pads):
        inputs["attention_mask"][row, : min(count, prompt - 1)] = 0

    def make_cache():
        return HardKVCache(
            config=model.config,
            scorer=Shuffle() if scorer == "shuffle" else scorer,
            budget=budget(window + sinks),
            window=window,
            sinks=sinks,
            interval=interval,
            patience=patience,
        )

    model = tiny_model("llama", num_hidden_layers=2)
    dense = tiny_model("llama", num_hidden_layers=2)
    check_run(model, dense, make_cache(), inputs, [prompt, *chunks], run_feed)
    logits, visibility = run_record(model, make_cache(), **inputs, chunks=[prompt, *chunks])
    expected = run_oracle("llama", visibility, inputs["input_ids"], num_hidden_layers=2)
    exists = visibility.exists
    torch.testing.assert_close(logits[exists], expected[exists], atol=2e-5, rtol=0)


# ---------------------------------------------------------------------- runs do not influence each other


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.3}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_the_same_seed_gives_the_same_tokens(scorer, sampling, tiny_model, tiny_prompts, run_generate):
    runs = []
    for seed in (3, 3, 4):
        model = tiny_model("qwen3")
        cache = HardKVCache(config=model.config, scorer=scorer, budget=AdaKV(9), patience=1, **SIZES)
        torch.manual_seed(seed)
        runs.append((*run_generate(model, cache, tiny_prompts(3), 24, **sampling), cache))
    (tokens, logits, cache), (again, logits_again, cache_again), (other, _, _) = runs
    assert cache.stats().events >= 6
    assert torch.equal(tokens, again)
    assert torch.equal(logits, logits_again)
    assert torch.equal(tokens, other) == (not sampling)
    for idx in range(3):
        assert str(cache.kept(idx)) == str(cache_again.kept(idx))


def test_a_long_generation_leaves_no_state_behind(tiny_model, tiny_prompts, run_generate):
    settings = {"scorer": "rkv", "budget": AdaKV(9), "patience": 1, **SIZES}
    short = {"inputs": tiny_prompts(1, 7), "new": 9}

    fresh = tiny_model("llama")
    config_before = fresh.config.to_dict()
    attributes_before = {name: set(vars(module)) for name, module in fresh.named_modules()}
    expected = run_generate(fresh, HardKVCache(config=fresh.config, **settings), **short)

    used = tiny_model("llama")
    long_cache = HardKVCache(config=used.config, **settings)
    run_generate(used, long_cache, tiny_prompts(3, 30), 60)
    registry = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    results = [
        run_generate(used, HardKVCache(config=used.config, **settings), **short),  # while the long cache lives
        run_generate(used, long_cache.reset() or long_cache, **short),  # the same cache, emptied
    ]
    for tokens, logits in results:
        assert torch.equal(tokens, expected[0])
        assert torch.equal(logits, expected[1])
    assert used.config.to_dict() == config_before
    assert {name: set(vars(module)) for name, module in used.named_modules()} == attributes_before
    assert (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)) == registry


def storages(cache):
    return [StorageWeakRef(tensor.untyped_storage()) for layer in cache.layers for tensor in layer.tensors()]


def test_a_dropped_cache_frees_its_tensors_at_once(tiny_model, tiny_prompts, run_feed):
    """By reference counts alone: on a GPU, memory that waits for the garbage collector is memory that is missing."""
    model, inputs = tiny_model("llama"), tiny_prompts(3, 18, new=20)
    cache = HardKVCache(config=model.config, budget=AdaKV(9), patience=1, **SIZES)
    gc.collect()
    gc.disable()
    try:
        for _ in run_feed(model, cache, **inputs, chunks=[18] + [1] * 20):
            pass
        held = storages(cache)
        assert not any(storage.expired() for storage in held)
        del cache
        assert all(storage.expired() for storage in held)
    finally:
        gc.enable()


def test_generate_drops_every_reference_to_the_cache(tiny_model, tiny_prompts, run_generate):
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, budget=AdaKV(9), patience=1, **SIZES)
    run_generate(model, cache, tiny_prompts(3, 18), 20)
    held, alive = storages(cache), weakref.ref(cache)
    del cache
    gc.collect()
    assert alive() is None
    assert all(storage.expired() for storage in held)


def test_a_cache_does_not_keep_its_model_alive(tiny_model, tiny_prompts, run_generate):
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, budget=AdaKV(9), **SIZES)
    run_generate(model, cache, tiny_prompts(1), 8)
    weights = [StorageWeakRef(weight.untyped_storage()) for weight in model.parameters()]
    del model
    gc.collect()
    assert all(weight.expired() for weight in weights)
    assert cache.stats().events > 1

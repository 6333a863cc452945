"""Test recording: a trace equals `kept()` after every event, survives a file, and follows other changes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from hardkv import HardKVCache, Trace
from hardkv.cache.argument import CACHE
from hardkv.cache.record.snapshot import HeldByLayer, Positions, Snapshot
from hardkv.decoding.generate import graphed
from hardkv.selectors import Adaptive
from tests.cache.conftest import feed, generate_logits, make_model, make_prompts

EVICT = {"budget": 12, "window": 4, "interval": 5, "sinks": 1}
TIERS = (None, "condensed", "sparse", "dense")


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3")


def compressed(cache):
    return [idx for idx, layer in enumerate(cache.layers) if hasattr(layer, "tiers")]


def snapshot(cache):
    """Return the state of the cache in the form of a trace."""
    return {
        "kept": {idx: cache.kept(idx) for idx in compressed(cache)},
        "lengths": {tier: cache.lengths(tier) for tier in TIERS},
        "seen": cache.get_seq_length(),
        "events": cache.stats().events,
    }


def assert_shows(trace, place, expected):
    assert trace.layers == list(expected["kept"])
    for idx, kept in expected["kept"].items():
        assert same(trace.kept(idx, place), kept)
    for tier, lengths in expected["lengths"].items():
        assert torch.equal(trace.lengths(tier)[place], lengths)
    assert trace.seen[place] == expected["seen"]
    assert trace.events[place] == expected["events"]


def same(one, other):
    return all(
        torch.equal(positions.cpu(), other_positions.cpu())
        for rows, other_rows in zip(one, other, strict=True)
        for positions, other_positions in zip(rows, other_rows, strict=True)
    )


def same_traces(one, other):
    assert len(one) == len(other)
    assert one.layers == other.layers
    for place in range(len(one)):
        for idx in one.layers:
            for tier in TIERS:
                assert same(one.kept(idx, place, tier), other.kept(idx, place, tier))
    for name in ("seen", "events"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def recorded(model, cache, inputs, chunks):
    """Return the trace of some forwards, and the cache's state after every event and at the end."""
    expected, events = [], 0
    with cache.record() as trace:
        for _ in feed(model, cache, inputs["input_ids"], inputs["attention_mask"], chunks):
            if cache.stats().events > events:
                events = cache.stats().events
                expected.append(snapshot(cache))
    if not expected or expected[-1]["seen"] != cache.get_seq_length():
        expected.append(snapshot(cache))
    return trace, expected


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3", {}),
        ("qwen3", {"patience": 2, "budget": Adaptive(12)}),
        ("qwen3", {"offload": True, "patience": 1}),
        ("qwen3", {"interval": 1}),
        ("gemma3", {"patience": 1}),  # half of its layers slide
        ("qwen3", {"bits": 4, "patience": 1}),  # sinks stay in the dense tier
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])  # of 3, two are padded
def test_a_trace_shows_what_the_cache_kept_after_every_event(name, settings, batch, tmp_path):
    model = make_model(name)
    cache = HardKVCache(config=model.config, **(EVICT | settings))
    trace, expected = recorded(model, cache, make_prompts(batch, new=14), [13, 1, 3, *[1] * 10])
    assert len(trace) == len(expected) >= 4
    for place, each in enumerate(expected):
        assert_shows(trace, place, each)
    assert bool(trace.lengths("sparse").any()) == bool(settings.get("patience"))

    loaded = Trace.load(trace.save(tmp_path / "trace.npz"))
    same_traces(trace, loaded)
    assert loaded.settings == trace.settings
    assert torch.equal(loaded.nbytes, trace.nbytes)
    assert torch.equal(loaded.dense_nbytes, trace.dense_nbytes)
    assert repr(loaded) == repr(trace)


def test_tiers_and_holders_say_the_same_position_by_position(model):
    cache = HardKVCache(config=model.config, **EVICT, patience=2)
    trace, _ = recorded(model, cache, make_prompts(3, new=20), [13, *[1] * 20])
    assert trace.num_heads == 6
    count = torch.zeros(len(trace), trace.columns, dtype=torch.long, device="cpu")
    for layer_idx in trace.layers:
        states = trace.tiers(layer_idx, sequence=2)
        assert states.shape == (len(trace), 2, 33)
        for head, where in enumerate(states.unbind(1)):
            for place, row in enumerate(where):
                for code, tier in enumerate(("condensed", "sparse", "dense"), 1):
                    positions = (row == code).nonzero()[:, 0]
                    assert torch.equal(positions, trace.kept(layer_idx, place, tier)[2][head])
            count += (where == 1) | (where == 3)
    for place in range(len(trace)):
        seen = int(trace.seen[place])
        assert torch.equal(trace.holders(sequence=2, snapshot=place), count[place, :seen])


def test_bytes_are_those_of_the_cache(model):
    cache = HardKVCache(config=model.config, **EVICT)
    with cache.record() as trace:
        generate_logits(model, cache, make_prompts(2), 20)
    assert trace.nbytes[-1] == cache.nbytes()
    assert trace.dense_nbytes[-1] == cache.dense_nbytes()
    assert trace.dense_nbytes.tolist() == [int(seen) * cache.dense_nbytes() // 32 for seen in trace.seen]


def test_graphed_steps_leave_the_same_trace(model):
    traces = []
    for how in ({}, {"custom_generate": graphed}):
        cache = HardKVCache(config=model.config, **EVICT, patience=1)
        with cache.record() as trace:
            generate_logits(model, cache, make_prompts(3), 23, **how)
        traces.append(trace)
    same_traces(*traces)
    assert len(traces[0]) >= 5


def test_a_trace_begins_with_what_is_held_and_ends_at_once(model):
    inputs = make_prompts(1, new=12)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = HardKVCache(config=model.config, **EVICT)
    list(feed(model, cache, ids[:, :15], mask[:, :15], [13, 1, 1]))
    before = snapshot(cache)
    with cache.record() as trace:
        assert_shows(trace, 0, before)
        with pytest.raises(RuntimeError, match="recorded already"), cache.record():
            pass
    assert len(trace) == 1
    model(input_ids=ids[:, 15:], **{CACHE: cache})  # not recorded any more
    assert len(trace) == 1
    assert_shows(trace, 0, before)
    assert_shows(Trace.of(cache), -1, snapshot(cache))


def test_copies_are_not_recorded(model):
    cache = HardKVCache(config=model.config, **EVICT)
    inputs = make_prompts(1, new=12)
    with cache.record() as trace:
        model(input_ids=inputs["input_ids"][:, :13], **{CACHE: cache})
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            model(input_ids=inputs["input_ids"][:, 13:], **{CACHE: other})
            assert len(trace) == 1
            with other.record() as second:
                pass
            assert second.seen.tolist() == [25]


@pytest.mark.parametrize(
    ("change", "of"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([-1])), [2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "bool", "negative", "repeat"],
)
def test_every_snapshot_follows_the_batch(model, change, of):
    inputs = make_prompts(3, new=12)
    cache = HardKVCache(config=model.config, **EVICT, patience=1)
    with cache.record() as trace:
        list(feed(model, cache, inputs["input_ids"], inputs["attention_mask"], [13, *[1] * 12]))
        before = {(place, idx): trace.kept(idx, place) for place in range(len(trace)) for idx in trace.layers}
        change(cache)
        for (place, idx), kept in before.items():
            assert same(trace.kept(idx, place), [kept[row] for row in of])
        sparse = cache.lengths("sparse")
    assert torch.equal(trace.lengths("sparse")[-1], sparse)
    assert same(trace.kept(0), cache.kept(0))


def test_beams_end_with_their_own_history(model):
    cache = HardKVCache(config=model.config, **EVICT)
    with cache.record() as trace:
        model.generate(**make_prompts(1), **{CACHE: cache}, max_new_tokens=20, num_beams=3, do_sample=False)
    assert_shows(trace, -1, snapshot(cache))
    assert trace.lengths().shape[2] == 3


def test_cropped_columns_vanish_and_a_reset_begins_anew(model):
    inputs = make_prompts(1, new=6)
    cache = HardKVCache(config=model.config, **EVICT)
    with cache.record() as trace:
        list(feed(model, cache, inputs["input_ids"], inputs["attention_mask"], [13, *[1] * 6]))
        before = trace.kept(1, -1)[0][0]
        assert trace.seen.tolist() == [13, 18]
        cache.crop(-4)  # into the window of the last event
        assert torch.equal(trace.kept(1, -1)[0][0], before[before < 15])
        assert same(trace.kept(1, -1), cache.kept(1))
        for tier in TIERS:  # rows without tokens too
            assert torch.equal(trace.lengths(tier)[-1], cache.lengths(tier))
        cache.reset()
        assert len(trace) == 0
        model(**make_prompts(2, length=9), **{CACHE: cache})
    assert trace.seen.tolist() == [9]
    assert_shows(trace, 0, snapshot(cache))


def test_columns_are_the_most_seen_also_after_a_crop(model):
    inputs = make_prompts(1, new=6)
    cache = HardKVCache(config=model.config, **EVICT)
    with cache.record() as trace:
        list(feed(model, cache, inputs["input_ids"], inputs["attention_mask"], [13, *[1] * 6]))
        cache.crop(-4)
    assert trace.seen.tolist() == [13, 18, 15]
    assert trace.columns == trace.tiers(0).shape[2] == 18
    assert_shows(trace, -1, snapshot(cache))


def test_layers_with_different_numbers_of_heads(tmp_path):
    """The layers with fewer heads are padded with heads that hold nothing."""
    rows = torch.arange(6, dtype=torch.int32)

    def held(heads):
        dense, none = Positions(rows[:2] + 4, torch.tensor([2])), Positions(rows[:0], torch.zeros(heads).long())
        counts = torch.arange(heads)  # head h holds the columns below h besides the dense tier's two
        condensed = Positions(torch.cat([rows[:count] for count in counts]), counts)
        return HeldByLayer(heads, {"condensed": condensed, "sparse": none, "dense": dense})

    trace = Trace([0, 5], {}, [Snapshot(7, 1, 10, 20, [held(2), held(4)])])
    for each in (trace, Trace.load(trace.save(tmp_path / "trace.npz"))):
        assert each.lengths().tolist() == [[[[2, 3, 0, 0]], [[2, 3, 4, 5]]]]
        assert each.lengths("condensed").tolist() == [[[[0, 1, 0, 0]], [[0, 1, 2, 3]]]]
        assert [each.heads(0), each.heads(5), each.num_heads] == [2, 4, 6]
        assert each.holders().tolist() == [4, 2, 1, 0, 6, 6, 0]  # nobody holds the last column


def test_assisted_decoding(model):
    cache = HardKVCache(config=model.config, **EVICT)
    with cache.record() as trace:
        model.generate(
            **make_prompts(1), **{CACHE: cache}, max_new_tokens=24, prompt_lookup_num_tokens=3, do_sample=False
        )
    assert_shows(trace, -1, snapshot(cache))
    assert len(trace) >= 3
    assert all(int(trace.kept(0, place)[0][0].max()) < trace.seen[place] for place in range(len(trace)))


def test_a_forward_that_dies_between_layers_leaves_whole_snapshots(model, monkeypatch):
    inputs = make_prompts(1, new=12)
    cache = HardKVCache(config=model.config, **EVICT)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with cache.record() as trace:
        list(feed(model, cache, inputs["input_ids"], inputs["attention_mask"], [13, 1]))
        monkeypatch.setattr(model.model.layers[1], "forward", die)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=inputs["input_ids"][:, 14:15], **{CACHE: cache})
    assert trace.seen.tolist() == [13]
    assert len(Trace.of(cache)) == 0


def test_without_a_config_it_needs_a_first_forward(model):
    cache = HardKVCache(**EVICT)
    with pytest.raises(ValueError, match="config=model.config"), cache.record():
        pass
    inputs = make_prompts(1, new=12)
    model(input_ids=inputs["input_ids"][:, :13], **{CACHE: cache})
    with cache.record() as trace:
        model(input_ids=inputs["input_ids"][:, 13:], **{CACHE: cache})
    assert trace.seen.tolist() == [13, 25]


def test_what_does_not_exist_is_refused(model, tmp_path, monkeypatch):
    cache = HardKVCache(config=model.config, **EVICT)
    with cache.record() as trace:
        pass
    assert len(trace) == 0
    assert "no snapshots" in repr(trace)
    assert trace.lengths().numel() == 0
    empty = Trace.load(trace.save(tmp_path / "empty.npz"))
    assert len(empty) == 0
    with pytest.raises(IndexError, match="has 0"):
        trace.holders()
    model(**make_prompts(1), **{CACHE: cache})
    trace = Trace.of(cache)
    with pytest.raises(ValueError, match=r"layer_idx=7.*\[0, 1, 2\]"):
        trace.kept(7)
    with pytest.raises(ValueError, match="tier='cold'"):
        trace.lengths("cold")
    with pytest.raises(IndexError, match="snapshot=1"):
        trace.kept(0, 1)
    for content in (b"", b"text"):
        (tmp_path / "other.npz").write_bytes(content)
        with pytest.raises(ValueError, match="not a trace"):
            Trace.load(tmp_path / "other.npz")
    np.savez(tmp_path / "other.npz", meta=np.array("{}"))
    with pytest.raises(ValueError, match="not a trace"):
        Trace.load(tmp_path / "other.npz")
    monkeypatch.setattr("hardkv.cache.record.trace.FORMAT", 2)
    trace.save(tmp_path / "newer.npz")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format 2.*reads up to 1"):
        Trace.load(tmp_path / "newer.npz")
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none.npz")


def test_only_layers_that_the_cache_compresses_are_in_it():
    model = make_model("gemma3")
    cache = HardKVCache(config=model.config, **EVICT)
    with cache.record() as trace:
        generate_logits(model, cache, make_prompts(1), 8)
    assert trace.layers == [1, 3]
    dense = DynamicCache(config=model.config)
    generate_logits(model, dense, make_prompts(1), 8)
    assert trace.dense_nbytes[-1] == sum(dense.layers[idx].keys.nbytes * 2 for idx in (1, 3))

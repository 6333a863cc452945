"""Test what a cache reports about itself: kept, lengths, bytes, stats, repr, logical length."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hardkv import HardKVCache, Stats
from hardkv.cache.argument import CACHE
from hardkv.cache.record.contents import tensors_of
from hardkv.cache.record.stats import format_bytes
from hardkv.cache.storage.memory import storage_nbytes
from hardkv.selectors import RKV, AdaKV, SnapKV

EVICT: dict[str, Any] = {"budget": 8, "window": 4, "sinks": 1, "interval": 3}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def run(model, inputs, new: int = 6, **settings: Any) -> HardKVCache:
    """Return a cache after generating `new` tokens; it does not hold the last one."""
    cache = HardKVCache(config=model.config, **(EVICT | settings))
    model.generate(**inputs, **{CACHE: cache}, max_new_tokens=new, do_sample=False)
    return cache


@pytest.fixture
def cache(tiny_model, tiny_prompts):
    """Three layers, three left-padded rows of 13 columns, 5 more tokens, heads of unequal lengths."""
    return run(tiny_model("llama", "sdpa"), tiny_prompts(3), patience=1, budget=AdaKV(8))


def test_kept(cache, tiny_prompts):
    mask = torch.cat([tiny_prompts(3)["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    for idx in range(3):
        kept = cache.kept(idx)
        assert [len(heads) for heads in kept] == [2, 2, 2]
        for row, heads in enumerate(kept):
            for head in heads:
                assert head.dtype is torch.int64
                assert head.dim() == 1
                assert (head.diff() > 0).all()
                assert mask[row, head].all()
    for row, heads in enumerate(cache.kept(-1)):
        for head, expected in zip(heads, cache.kept(2)[row], strict=True):
            assert torch.equal(head, expected)


def test_kept_is_a_copy(cache):
    before = cache.kept(0)[0][0].clone()
    cache.kept(0)[0][0].fill_(-1)
    cache.lengths("condensed").fill_(-1)
    cache.lengths().fill_(-1)
    assert torch.equal(cache.kept(0)[0][0], before)
    assert (cache.lengths() > 0).all()


def test_lengths_agree_with_kept_and_with_each_other(cache):
    lengths = cache.lengths()
    assert lengths.shape == (3, 3, 2)
    assert lengths.dtype is torch.int64
    assert lengths.device.type == "cpu"
    assert lengths.tolist() == [[[len(head) for head in heads] for heads in cache.kept(idx)] for idx in range(3)]
    assert torch.equal(cache.lengths("condensed") + cache.lengths("dense"), lengths)
    assert (cache.lengths("sparse") > 0).any(), "patience=1 must leave tokens on probation"
    assert len(set(lengths.flatten().tolist())) > 1, "AdaKV must keep unequal lengths"


def test_bytes_are_those_of_the_storage(cache):
    """Count the bytes of everything reachable from a layer; asking for them adds none."""

    def tensors(thing, seen):
        if isinstance(thing, torch.Tensor):
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                tensors(value, seen)
        elif isinstance(thing, list | tuple):
            for value in thing:
                tensors(value, seen)
        elif type(thing).__module__.startswith("hardkv.") and id(thing) not in visited:
            visited.add(id(thing))
            tensors(vars(thing), seen)
        return seen

    found: dict[int, int] = {}
    visited: set[int] = set()
    for layer in cache.layers:
        tensors(layer, found)
    assert cache.nbytes() == sum(found.values())


def test_bytes_of_a_linear_layer_are_those_of_its_states():
    layer = LinearAttentionLayer()
    layer.update_conv_state(torch.zeros(2, 3, 4))
    layer.update_recurrent_state(torch.zeros(2, 5, 6))
    assert storage_nbytes(tensors_of(layer)) == 4 * (2 * 3 * 4 + 2 * 5 * 6)


def test_dense_bytes_are_those_of_dynamic_cache(tiny_model, tiny_prompts):
    for name in ("llama", "gemma3"):
        model = tiny_model(name, "sdpa")
        dense = DynamicCache(config=model.config)
        model.generate(**tiny_prompts(3), **{CACHE: dense}, max_new_tokens=6, do_sample=False)
        held = sum(tensor.untyped_storage().nbytes() for layer in dense.layers for tensor in (layer.keys, layer.values))
        assert run(model, tiny_prompts(3)).dense_nbytes() == held


def test_an_evicting_cache_holds_fewer_bytes(tiny_model, tiny_prompts):
    cache = run(tiny_model("llama", "sdpa"), tiny_prompts(1), new=60)
    assert cache.nbytes() < 0.5 * cache.dense_nbytes()
    assert cache.stats().ratio == pytest.approx(cache.nbytes() / cache.dense_nbytes())


def test_sequence_length_is_logical(cache, tiny_model, tiny_prompts):
    assert cache.get_seq_length() == 18
    assert [cache.get_seq_length(idx) for idx in range(3)] == [18, 18, 18]
    assert cache.get_seq_length(99) == 0  # as in transformers
    keys = torch.zeros(3, 2, 1, 8)
    assert cache.update(keys, keys, 0)[0].shape[2] == 19
    assert cache.get_seq_length() == 18, "a token counts when attention has stored it"
    assert cache.get_mask_sizes(4, 0) == (22, 0)


def test_what_generate_asks_a_cache(cache):
    assert not cache.is_compileable
    assert cache.is_croppable
    assert cache.is_sliding == [False] * 3
    assert cache.batch_size == 3
    assert len(cache) == 3
    empty = HardKVCache()
    assert not empty.is_compileable
    assert empty.get_seq_length() == 0
    assert len(empty) == 0


def test_a_fresh_cache(tiny_model):
    for cache in (HardKVCache(), HardKVCache(config=tiny_model("llama", "sdpa").config)):
        assert cache.get_seq_length() == 0
        assert cache.nbytes() == cache.dense_nbytes() == 0
        assert cache.lengths().shape == (0, 0, 0)
        stats = cache.stats()
        assert stats.ratio == 1.0
        assert stats.lengths == []
        assert (stats.seq_length, stats.batch_size, stats.events, stats.sparse) == (0, 0, 0, 0)
        assert "nothing yet" in repr(stats)
    assert cache.kept(0) == []
    with pytest.raises(ValueError, match=r"layer_idx=0 is not compressed"):
        HardKVCache().kept(0)


def test_reset_empties_the_numbers(cache):
    cache.reset()
    assert cache.nbytes() == cache.dense_nbytes() == cache.get_seq_length() == 0
    assert cache.stats().lengths == []
    assert cache.stats().events == 0


def test_stats(cache):
    stats = cache.stats()
    assert isinstance(stats, Stats)
    assert (stats.nbytes, stats.dense_nbytes) == (cache.nbytes(), cache.dense_nbytes())
    assert (stats.layers, stats.compressed_layers, stats.batch_size, stats.seq_length) == (3, 3, 3, 18)
    assert stats.lengths == cache.lengths().tolist()
    assert stats.sparse == int(cache.lengths("sparse").sum()) > 0
    assert stats.events == 2
    assert stats.scorer == repr(RKV())
    assert stats.budget == "AdaKV(n=8, alpha=0.2)"
    assert stats.attention in ("torch", "triton", "flash_attn")
    assert stats.warnings == []


def test_stats_warn_of_temperatures_at_a_limit(tiny_model, tiny_prompts):
    cache = run(tiny_model("llama", "sdpa"), tiny_prompts(1), budget=AdaKV(8))
    assert cache.stats().warnings == []
    for layer, fitted in zip(cache.layers, ([9950.0, 0.5], [1.005e-4, 1e4], [2.0, 1.0]), strict=True):
        layer.tiers = replace(layer.tiers, temperatures=torch.tensor(fitted))
    (warning,) = cache.stats().warnings
    assert warning.startswith("3 of 6 temperatures stopped at the limits [0.0001, 10000]")


def test_stats_are_a_snapshot(cache):
    stats = cache.stats()
    before = stats.to_dict()
    cache.reset()
    assert stats.to_dict() == before


def test_stats_go_to_json(cache):
    values = cache.stats().to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["ratio"] == pytest.approx(cache.nbytes() / cache.dense_nbytes())
    assert set(values) >= {"nbytes", "dense_nbytes", "ratio", "seq_length", "lengths", "events", "scorer", "budget"}


def test_stats_print(cache):
    text = str(cache.stats())
    lengths = cache.lengths()
    assert f"min {int(lengths.min())}" in text
    assert f"max {int(lengths.max())} of 18 seen" in text
    assert "3 of 3 compressed, 3 sequences" in text
    assert "2, " in next(line for line in text.splitlines() if "events" in line)
    assert "AdaKV(n=8, alpha=0.2)" in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5.0 TiB")],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


def test_repr_names_the_layers(cache, tiny_model):
    assert re.fullmatch(r"HardKVCache\(layers=\[(HardKVLayer\([^\[\]]*\)(, )?){3}\]\)", repr(cache))
    assert f"scorer={RKV()}" in repr(cache.layers[0])
    assert "budget=AdaKV(n=8, alpha=0.2)" in repr(cache.layers[0])
    assert "seen=18" in repr(cache.layers[0])
    assert "seen" not in repr(HardKVCache(config=tiny_model("llama", "sdpa").config).layers[0])


@pytest.mark.parametrize("settings", [{}, {"patience": 1}, {"offload": True}, {"pin_prompt": True, "budget": 30}])
def test_observe_shows_what_the_next_event_shows_its_scorer(settings, tiny_model, tiny_prompts):
    shown = []

    class Spy:
        def score(self, observation):
            shown.append(observation)
            return torch.log(observation.attention + 1e-38)

    cache = run(tiny_model("llama", "sdpa"), tiny_prompts(3), new=6, scorer=Spy(), **settings)
    for idx, layer in enumerate(cache.layers):
        ours = cache.observe(idx)
        layer.compress()
        for name in ("keys", "values", "positions", "cu_seqlens", "queries", "protected", "attention", "context"):
            assert torch.equal(getattr(ours, name), getattr(shown[-1], name)), name
    with pytest.raises(ValueError, match=r"layer_idx=3 is not compressed"):
        cache.observe(3)
    with pytest.raises(ValueError, match="layer 0 holds nothing yet"):
        HardKVCache(config=tiny_model("llama", "sdpa").config).observe(0)


# ---------------------------------------------------------------------------------------------- hybrids


@pytest.fixture
def hybrid(tiny_model, tiny_prompts):
    """Layers 0 and 2 have a sliding window of 6, layers 1 and 3 are ours."""
    return run(tiny_model("gemma3", "sdpa"), tiny_prompts(3), scorer=SnapKV(kernel_size=3))


@pytest.mark.parametrize("layer_idx", [0, 2, -2, -4, 4, 99, -5])
def test_kept_of_a_layer_that_is_not_compressed(layer_idx, hybrid):
    with pytest.raises(ValueError, match=rf"layer_idx={layer_idx} is not compressed.*compressed layers: \[1, 3\]"):
        hybrid.kept(layer_idx)


def test_a_hybrid_reports_what_it_compresses(hybrid):
    assert re.search(r"\[DynamicSlidingWindowLayer, HardKVLayer.*DynamicSlidingWindowLayer, HardKVLayer", repr(hybrid))
    assert hybrid.is_sliding == [True, False, True, False]
    assert hybrid.lengths().shape == (2, 3, 2)
    assert hybrid.lengths()[1].tolist() == [[len(head) for head in heads] for heads in hybrid.kept(3)]
    stats = hybrid.stats()
    assert (stats.layers, stats.compressed_layers, stats.batch_size, stats.seq_length) == (4, 2, 3, 18)
    assert "2 of 4 compressed" in repr(stats)
    assert stats.scorer == "SnapKV(kernel_size=3, pooling='max', group_reduce='mean')"
    sliding = [layer for layer in hybrid.layers if layer.is_sliding]
    held = sum(tensor.untyped_storage().nbytes() for layer in sliding for tensor in (layer.keys, layer.values))
    ours = sum(storage_nbytes(layer.tensors()) for layer in hybrid.layers if not layer.is_sliding)
    assert hybrid.nbytes() == held + ours


def test_layers_with_different_numbers_of_heads(tiny_model):
    """The shorter layers are padded with 0 in `lengths()`."""
    cache = HardKVCache(**EVICT)
    for idx, heads in enumerate((2, 4)):
        module = tiny_model("llama", "sdpa", num_key_value_heads=heads).model.layers[idx].self_attn
        query, states = torch.randn(1, 4, 13, 8), torch.randn(1, heads, 13, 8)
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *cache.update(states, states, idx), None)
    assert cache.lengths().tolist() == [[[8, 8, 0, 0]], [[8, 8, 8, 8]]]
    assert cache.stats().lengths == cache.lengths().tolist()

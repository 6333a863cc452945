"""Test that a cache reports the bytes it holds, and holds few."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache

from hardkv import HardKVCache
from hardkv.cache import schedule
from hardkv.cache.argument import CACHE
from hardkv.selectors import AdaKV, Adaptive, Pyramid, TopK, TopP

SIZES = {"window": 8, "sinks": 2, "interval": 12}
BUDGETS = [TopK(24), TopP(0.6, floor=12, cap=40), Adaptive(24), AdaKV(24), Pyramid(24, beta=2)]


def walk(root):
    """Return every tensor reachable from `root` through attributes and containers, each object once."""
    tensors, seen, stack = [], set(), [root]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, type | torch.nn.Module):
            stack.extend(vars(item).values())
    return tensors


def held_by(cache):
    """All tensors of a cache's layers; of transformers' own layers the keys and values, without its counters."""
    ours = [layer for layer in cache.layers if hasattr(layer, "tiers")]
    theirs = [layer for layer in cache.layers if not hasattr(layer, "tiers") and layer.is_initialized]
    return walk(ours) + [tensor for layer in theirs for tensor in (layer.keys, layer.values)]


def by_storage(tensors):
    """`{address: (bytes of the storage, tensors in it)}`."""
    groups = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        groups.setdefault(storage.data_ptr(), (storage.nbytes(), []))[1].append(tensor)
    groups.pop(0, None)  # empty tensors
    return groups


def bytes_of(tensors):
    return sum(nbytes for nbytes, _ in by_storage(tensors).values())


def live_bytes():
    """`{address: bytes}` of the storages behind all tensors that the interpreter knows of."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    return {address: nbytes for address, (nbytes, _) in by_storage(tensors).items()}


def fed(run_feed, model, cache, inputs, chunks):
    for _ in run_feed(model, cache, **inputs, chunks=chunks):
        pass
    return cache


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("gemma3", 3)])
def test_nbytes_is_what_the_object_graph_holds(name, batch, budget, patience, tiny_model, tiny_prompts, run_feed):
    """At every step: after the prompt, between events, right after one; nothing bigger hides behind a view."""
    model, inputs = tiny_model(name), tiny_prompts(batch, 40, new=30)
    cache = HardKVCache(config=model.config, scorer="snapkv", budget=budget, patience=patience, **SIZES)
    assert cache.nbytes() == 0
    for _ in run_feed(model, cache, **inputs, chunks=[40] + [1] * 20 + [10]):
        reported = cache.nbytes()
        assert reported == cache.stats().nbytes == bytes_of(held_by(cache))
        assert cache._schedule.under_way is None
        assert not walk(vars(cache) | {"layers": None, "_schedule": None})  # nothing beside the layers
        for layer in cache.layers:
            if not hasattr(layer, "tiers"):
                continue  # transformers' sliding-window layers
            for nbytes, views in by_storage(walk(layer)).values():
                assert sum(view.nbytes for view in views) >= nbytes


@pytest.mark.parametrize(("bits", "patience"), [(4, 0), ((16, 2), 2), (8, 1)], ids=str)
def test_nbytes_counts_codes_scales_and_centres(bits, patience, tiny_model, tiny_prompts, run_feed):
    model, inputs = tiny_model("gemma3"), tiny_prompts(3, 40, new=30)
    cache = HardKVCache(config=model.config, scorer="snapkv", budget=AdaKV(24), patience=patience, bits=bits, **SIZES)
    for _ in run_feed(model, cache, **inputs, chunks=[40] + [1] * 20 + [10]):
        assert cache.nbytes() == cache.stats().nbytes == bytes_of(held_by(cache))
        for layer in cache._compressed:
            for nbytes, views in by_storage(walk(layer)).values():
                assert sum(view.nbytes for view in views) >= nbytes


def test_nbytes_counts_the_temperatures(tiny_model, tiny_prompts, run_feed):
    model, inputs = tiny_model("llama"), tiny_prompts(3, 40, new=20)
    cache = HardKVCache(config=model.config, budget=Adaptive(24), calibration="online", **SIZES)
    fed(run_feed, model, cache, inputs, [40] + [1] * 20)
    assert cache.nbytes() == bytes_of(walk(cache))


def test_asking_for_nbytes_allocates_nothing(tiny_model, tiny_prompts, run_feed):
    model, inputs = tiny_model("llama"), tiny_prompts(3, 40, new=30)
    cache = HardKVCache(config=model.config, budget=AdaKV(24), patience=2, **SIZES)
    for _ in run_feed(model, cache, **inputs, chunks=[40] + [1] * 30):
        before = bytes_of(walk(cache))
        cache.nbytes(), cache.stats(), cache.lengths(), cache.kept(0)
        assert bytes_of(walk(cache)) == before


@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_is_held_outside_the_cache(batch, tiny_model, tiny_prompts, run_generate):
    """All tensors of the interpreter before and after: what a finished generation added is the cache and no more."""
    model, inputs = tiny_model("llama"), tiny_prompts(batch, 40)

    def run():
        cache = HardKVCache(config=model.config, scorer="rkv", budget=AdaKV(24), patience=1, **SIZES)
        run_generate(model, cache, inputs, 30)
        return cache

    run()  # what transformers and torch make once and keep
    before = live_bytes()
    cache = run()
    reported = cache.nbytes()
    added = {address: nbytes for address, nbytes in live_bytes().items() if address not in before}
    ids = bytes_of([cache._ids.ids])  # on the host, of the tokens that a further generate() must bring
    assert sum(added.values()) == reported + ids > ids


def test_a_cache_goes_with_its_last_reference(tiny_model, tiny_prompts, run_generate):
    """Memory must not wait for the garbage collector, which a device cannot call when memory is short."""
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, budget=24, **SIZES)
    run_generate(model, cache, tiny_prompts(1, 40), 14)
    storages = [StorageWeakRef(tensor.untyped_storage()) for layer in cache.layers for tensor in layer.tensors()]
    gc.collect()
    gc.disable()
    try:
        del cache
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize("budget", [AdaKV(48), Adaptive(48)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_less_than_half_of_dense_with_unequal_heads(batch, budget, patience, tiny_model, tiny_prompts, run_feed):
    """About 48 of 240 tokens a head; overhead, the query ring and the dense tier's room included."""
    model, inputs = tiny_model("llama"), tiny_prompts(batch, 160, new=80)
    cache = HardKVCache(config=model.config, budget=budget, patience=patience, **SIZES)
    fed(run_feed, model, cache, inputs, [160] + [1] * 80)
    lengths = cache.lengths()  # [layers, B, KV heads]
    assert (lengths[..., 0] != lengths[..., 1]).any(1).all()
    assert (lengths.sum(-1) <= 2 * (48 + SIZES["interval"])).all()
    assert 0 < cache.nbytes() < 0.5 * cache.dense_nbytes()
    assert cache.stats().ratio == cache.nbytes() / cache.dense_nbytes()


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_bytes_follow_the_tokens_held(budget, tiny_model, tiny_prompts, run_feed):
    """Ragged tiers are sized exactly: keys and values of what they hold, 5 bytes a token and a few a row beside it."""
    model, inputs = tiny_model("llama"), tiny_prompts(3, 160, new=40)
    cache = fed(
        run_feed, model, HardKVCache(config=model.config, budget=budget, patience=1, **SIZES), inputs, [160, 40]
    )
    token = 2 * 8 * 4  # key and value, head_dim 8, float32
    for rank, layer in enumerate(cache.layers):
        for name in ("condensed", "sparse"):
            tier, held = getattr(layer.tiers, name), int(cache.lengths(name)[rank].sum())
            assert bytes_of([tier.keys, tier.values]) == held * token
            assert bytes_of(walk(tier)) <= held * (token + 5) + 6 * 3 * 8 + 64
        dense = layer.tiers.dense
        assert dense.capacity == SIZES["window"] + SIZES["interval"]
        assert bytes_of([dense.keys, dense.values]) == 6 * dense.capacity * token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("qwen3", 3), ("gpt2", 3), ("gemma3", 3)])
def test_dense_nbytes_is_what_a_dynamic_cache_holds(name, batch, dtype, tiny_model, tiny_prompts, run_feed):
    model, inputs = tiny_model(name, dtype=dtype), tiny_prompts(batch, 20, new=25)
    dense, cache = DynamicCache(config=model.config), HardKVCache(config=model.config, budget=16, **SIZES)
    assert cache.dense_nbytes() == 0
    steps = zip(
        run_feed(model, dense, **inputs, chunks=[20, 5] + [1] * 20),
        run_feed(model, cache, **inputs, chunks=[20, 5] + [1] * 20),
        strict=True,
    )
    for _ in steps:
        held = bytes_of(held_by(dense))
        assert cache.dense_nbytes() == held == cache.stats().dense_nbytes


def test_an_event_frees_the_old_tiers(tiny_model, tiny_prompts, run_feed):
    model, inputs = tiny_model("llama"), tiny_prompts(3, 40, new=36)
    cache = HardKVCache(config=model.config, budget=AdaKV(24), patience=1, **SIZES)
    old, events = [], 0
    for _ in run_feed(model, cache, **inputs, chunks=[40] + [1] * 36):
        if cache.stats().events > events:
            events = cache.stats().events
            assert all(storage.expired() for storage in old)
            old = [
                StorageWeakRef(t.untyped_storage()) for layer in cache.layers for t in layer.tiers.tensors() if t.nbytes
            ]
            assert old
    assert events == 4


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("wait", [0, 1, 2, 3])
def test_prefill_holds_no_more_uncompressed_layers_than_may_wait(wait, padded, monkeypatch, tiny_model, tiny_prompts):
    """Full keys are gone when the next layer's come, but for layers that wait to be compressed with others."""
    batch = 3 if padded else 1
    model, inputs = tiny_model("llama", num_hidden_layers=4), tiny_prompts(batch, 60)
    monkeypatch.setattr(schedule, "WAITING_BYTES", int((wait + 0.5) * batch * 2 * 60 * 2 * 8 * 4))
    cache = HardKVCache(config=model.config, budget=24, **SIZES)
    made, alive, uncompressed = [], [], []

    def watch(module, args, output):
        alive.append(sum(not storage.expired() for storage in made))
        uncompressed.append(sum(layer.events == 0 for layer in cache.layers[: len(made)]))
        made.append(StorageWeakRef(output.untyped_storage()))

    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(watch)  # what the cache gets is a view of this
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    # before a layer's keys go to the cache; a layer alone has nothing to wait for
    assert uncompressed == ([0, *((idx % wait) + 1 for idx in range(3))] if wait > 1 else [0] * 4)
    assert alive == ([0] * 4 if padded else uncompressed)  # pads are left out of a copy
    assert cache.stats().events == 1
    assert cache.nbytes() < cache.dense_nbytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bytes_and_peak_against_the_allocator(tiny_model, tiny_prompts, run_generate):
    """Held bytes are the allocator's up to its rounding; the prompt costs one dense layer at a time and not all."""
    shape = {"num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    model = tiny_model("llama", dtype=torch.bfloat16, max_position_embeddings=16384, **shape).cuda()
    inputs = {name: tensor.cuda() for name, tensor in tiny_prompts(3, 8192).items()}

    def in_use():
        gc.collect()
        stats = torch.cuda.memory_stats()
        return stats["requested_bytes.all.current"], stats["allocated_bytes.all.current"]

    def measure(make_cache):
        """Bytes of a cache after a run: reported, asked for, given by the allocator, and the peak of the last."""
        before = in_use()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cache = make_cache()
        run_generate(model, cache, inputs, 40)
        peak = torch.cuda.max_memory_allocated() - before[1]
        reported = cache.nbytes() if isinstance(cache, HardKVCache) else bytes_of(held_by(cache))
        requested, given = (now - then for now, then in zip(in_use(), before, strict=True))
        return cache, reported, requested, given, peak

    def compressed():
        return HardKVCache(config=model.config, budget=AdaKV(512), window=32, sinks=4, interval=32)

    measure(compressed)  # workspaces that libraries allocate once
    cache, reported, requested, given, peak = measure(compressed)
    assert cache.stats().events == 2
    assert reported == requested
    assert requested <= given < 1.1 * requested  # the allocator rounds up
    dense_bytes, layers = cache.dense_nbytes(), len(cache.layers)
    assert given < 0.15 * dense_bytes
    del cache
    _, reported, requested, _, dense_peak = measure(lambda: DynamicCache(config=model.config))
    assert reported == requested == dense_bytes
    # beside what the model needs anyway: the layer at hand, its copy in row order, and scores over it
    assert peak - given < dense_peak - dense_bytes + 3 * dense_bytes / layers
    assert peak < 0.5 * dense_peak

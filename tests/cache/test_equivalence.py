"""Test that a cache without eviction equals DynamicCache, and that models without our cache do not change."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.cache.layer import HardKVLayer
from hardkv.selectors import AdaKV, Adaptive, Pyramid, TopK, TopP

# Larger than any run here: many events, and none may drop anything.
AMPLE = 1000
EVENTFUL = {"window": 4, "sinks": 2, "interval": 3}
NEW = 16


def assert_everything_kept(cache, attention_mask, new):
    columns = torch.cat([attention_mask, torch.ones(len(attention_mask), new, dtype=torch.long)], 1)
    assert cache.get_seq_length() == columns.shape[1]
    for idx, layer in enumerate(cache.layers):
        if not isinstance(layer, HardKVLayer):
            continue
        for row, heads in zip(columns, cache.kept(idx), strict=True):
            for positions in heads:
                assert positions.tolist() == row.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("budget", [AMPLE, TopP(1.0)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2"])
def test_without_eviction_every_logit_equals_dynamic_cache(
    name, attn, batch, budget, tiny_model, tiny_prompts, run_generate
):
    inputs = tiny_prompts(batch)
    dense = tiny_model(name, attn)
    tokens, logits = run_generate(dense, DynamicCache(config=dense.config), inputs, NEW)

    model = tiny_model(name, attn)
    cache = HardKVCache(config=model.config, budget=budget, **EVENTFUL)
    our_tokens, our_logits = run_generate(model, cache, inputs, NEW)

    assert cache.stats().events >= 5
    assert_everything_kept(cache, inputs["attention_mask"], NEW - 1)
    assert torch.equal(our_tokens, tokens)
    torch.testing.assert_close(our_logits, logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scorer", ["attention", "snapkv", "rkv"])
@pytest.mark.parametrize(
    "budget", [TopK(AMPLE), TopP(1.0, cap=10), Adaptive(AMPLE), AdaKV(AMPLE), Pyramid(AMPLE)], ids=str
)
def test_without_eviction_in_float64_and_chunks(scorer, budget, tiny_model, tiny_prompts, run_feed):
    """Ten digits, so that a wrong token of little weight shows too; chunks across, at and between events."""
    inputs, chunks = tiny_prompts(3, new=26), [13, 1, 2, 1, 7, 3, 1, 5, 1, 1, 4]
    exists = inputs["attention_mask"].bool()
    dense, model = tiny_model("qwen3", dtype=torch.float64), tiny_model("qwen3", dtype=torch.float64)
    cache = HardKVCache(config=model.config, scorer=scorer, budget=budget, patience=2, **EVENTFUL)
    runs = [
        torch.cat([logits for _, _, logits in run_feed(which, past, **inputs, chunks=chunks)], 1)[exists]
        for which, past in ((dense, DynamicCache(config=dense.config)), (model, cache))
    ]
    assert cache.stats().events >= 5
    assert cache.stats().sparse == 0
    assert runs[1].dtype == torch.float64
    torch.testing.assert_close(runs[1], runs[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_without_eviction_in_float64(name, batch, tiny_model, tiny_prompts, run_feed):
    inputs, chunks = tiny_prompts(batch, new=20), [13] + [1] * 20
    exists = inputs["attention_mask"].bool()
    dense, model = tiny_model(name, dtype=torch.float64), tiny_model(name, dtype=torch.float64)
    cache = HardKVCache(config=model.config, budget=AMPLE, **EVENTFUL)
    expected = run_feed(dense, DynamicCache(config=dense.config), **inputs, chunks=chunks)
    for (start, stop, logits), (_, _, ours) in zip(
        expected, run_feed(model, cache, **inputs, chunks=chunks), strict=True
    ):
        here = exists[:, start:stop]
        torch.testing.assert_close(ours[here], logits[here], atol=1e-10, rtol=0)
    assert cache.stats().events >= 5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_sliding_window_hybrid_keeps_its_sliding_layers(attn, batch, tiny_model, tiny_prompts, run_generate):
    inputs = tiny_prompts(batch)
    dense = tiny_model("gemma3", attn)
    tokens, logits = run_generate(dense, DynamicCache(config=dense.config), inputs, NEW)

    model = tiny_model("gemma3", attn)
    cache = HardKVCache(config=model.config, budget=AMPLE, **EVENTFUL)
    our_tokens, our_logits = run_generate(model, cache, inputs, NEW)

    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, HardKVLayer] * 2
    assert cache.layers[0].keys.shape[2] < model.config.sliding_window < cache.get_seq_length()
    assert_everything_kept(cache, inputs["attention_mask"], NEW - 1)
    assert torch.equal(our_tokens, tokens)
    torch.testing.assert_close(our_logits, logits, atol=2e-5, rtol=0)


# ---------------------------------------------------------------------- models that use other caches

PLAIN = [(name, attn) for name in ("llama", "qwen3", "gpt2", "gemma3") for attn in ("sdpa", "eager")]
PLAIN_CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
}
# Runs in a process that never imports hardkv.
WITHOUT_HARDKV = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import generate_logits, make_model, make_prompts
from transformers import DynamicCache, StaticCache

caches = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
}
results = {}
for spec in sys.argv[3:]:
    name, attn, kind = spec.split(",")
    model = make_model(name, attn)
    results[spec] = generate_logits(model, caches[kind](model.config), make_prompts(3), 8)
assert "hardkv" not in sys.modules
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def without_hardkv(tmp_path_factory):
    """`{"name,attn,cache kind": (tokens, logits)}` from a process without hardkv."""
    path = tmp_path_factory.mktemp("plain") / "results.pt"
    specs = [f"{name},{attn},{kind}" for name, attn in PLAIN for kind in PLAIN_CACHES]
    command = [sys.executable, "-c", WITHOUT_HARDKV, str(Path(__file__).parent), str(path), *specs]
    subprocess.run(command, check=True, timeout=240)
    return torch.load(path)


@pytest.mark.parametrize("kind", PLAIN_CACHES)
@pytest.mark.parametrize(("name", "attn"), PLAIN)
def test_other_caches_stay_bit_identical(name, attn, kind, without_hardkv, tiny_model, tiny_prompts, run_generate):
    model, inputs = tiny_model(name, attn), tiny_prompts(3)
    run_generate(model, HardKVCache(config=model.config, budget=9, **EVENTFUL), inputs, 12)
    tokens, logits = run_generate(model, PLAIN_CACHES[kind](model.config), inputs, 8)
    expected_tokens, expected_logits = without_hardkv[f"{name},{attn},{kind}"]
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected_logits)


@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_static_cache_compiles_in_one_graph_through_the_wrapped_registry(attn, tiny_model, tiny_prompts, run_generate):
    model, inputs = tiny_model("llama", attn), tiny_prompts(1)
    run_generate(model, HardKVCache(config=model.config, budget=9, **EVENTFUL), inputs, 8)

    def steps(forward):
        cache = StaticCache(config=model.config, max_cache_len=32)
        tokens, logits = inputs["input_ids"], []
        position = torch.arange(tokens.shape[1])[None]
        for _ in range(4):
            with torch.no_grad():
                logits.append(forward(tokens, position_ids=position, **{CACHE: cache}).logits[:, -1])
            tokens, position = logits[-1].argmax(-1, keepdim=True), position[:, -1:] + 1
        return torch.stack(logits)

    torch.compiler.reset()
    # fullgraph=True raises at the first graph break
    compiled = steps(torch.compile(model, backend="eager", fullgraph=True, dynamic=False))
    # not bit-identical: transformers itself builds a mask when tracing where it passes none otherwise
    torch.testing.assert_close(compiled, steps(model), atol=2e-6, rtol=0)

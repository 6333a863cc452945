"""Test half precision: results are finite over many events, and as close to the masked oracle as rounding allows.

The oracle runs in the same dtype, with attention in float32 like ours, so what differs is the rounding of intermediate
results: the order of sums and the model's own kernel for the prompt. Logits here are O(1) with a maximum near 4.
"""

import pytest
import torch
from transformers import DynamicCache

from hardkv import HardKVCache
from hardkv.selectors import AdaKV, Adaptive, Pyramid, TopK, TopP

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIZES = {"window": 4, "sinks": 2, "interval": 5}
BUDGETS = [TopK(12), TopP(0.6, floor=8, cap=24), Adaptive(12), AdaKV(12), Pyramid(12, beta=2)]
# bfloat16 has 8 bits of mantissa and float16 11: through three layers a few units in the last place of a logit near 4
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.012}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: type(budget).__name__)
@pytest.mark.parametrize("scorer", ["attention", "snapkv", "rkv"])
def test_half_precision_is_finite_and_equals_the_oracle(
    scorer, budget, dtype, tiny_model, tiny_prompts, run_record, run_oracle
):
    inputs, model = tiny_prompts(3, 24, new=26), tiny_model("qwen3", dtype=dtype)
    cache = HardKVCache(config=model.config, scorer=scorer, budget=budget, patience=1, **SIZES)
    logits, visibility = run_record(model, cache, **inputs, chunks=[24] + [1] * 26)
    exists = visibility.exists
    assert cache.stats().events == 6
    assert (cache.lengths() < exists.sum(1)[:, None]).all()
    assert logits.dtype == dtype
    assert torch.isfinite(logits[exists]).all()
    for layer in cache.layers:
        assert layer.tiers.condensed.keys.dtype == layer.tiers.dense.values.dtype == dtype
    expected = run_oracle("qwen3", visibility, inputs["input_ids"], dtype=dtype)
    torch.testing.assert_close(logits[exists], expected[exists], atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_tolerance_is_the_dtypes_own_noise(dtype, tiny_model, tiny_prompts, run_feed):
    """A plain DynamicCache is as far from its own float32 run as the tolerance says, within a small factor."""
    inputs = tiny_prompts(3, 24, new=26)
    runs = []
    for precision in (dtype, torch.float32):
        model = tiny_model("qwen3", dtype=dtype).to(precision)  # the same rounded weights
        cache = DynamicCache(config=model.config)
        runs.append(torch.cat([x.float() for _, _, x in run_feed(model, cache, **inputs, chunks=[24] + [1] * 26)], 1))
    noise = (runs[0] - runs[1])[inputs["attention_mask"].bool()].abs().max()
    assert TOLERANCE[dtype] / 4 < noise < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scorer", ["attention", "snapkv", "rkv"])
def test_large_keys_do_not_overflow(scorer, dtype, tiny_model, tiny_prompts, run_record):
    """Key norms and dot products far beyond float16's range, in attention, scores and cosines."""
    inputs, model = tiny_prompts(3, 24, new=26), tiny_model("llama", dtype=dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(1000.0)
    cache = HardKVCache(config=model.config, scorer=scorer, budget=Adaptive(12), patience=1, **SIZES)
    logits, visibility = run_record(model, cache, **inputs, chunks=[24] + [1] * 26)
    held = cache.layers[0].tiers.condensed.keys.float()
    assert held.square().sum(-1).max() > torch.finfo(torch.float16).max
    assert torch.isfinite(logits[visibility.exists]).all()
    assert (cache.lengths() < visibility.exists.sum(1)[:, None]).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_half_precision_without_eviction_equals_dynamic_cache(dtype, tiny_model, tiny_prompts, run_feed):
    inputs, chunks = tiny_prompts(3, 24, new=26), [24, 3, 7] + [1] * 16
    exists = inputs["attention_mask"].bool()
    model = tiny_model("llama", dtype=dtype)
    dense, cache = DynamicCache(config=model.config), HardKVCache(config=model.config, budget=1000, **SIZES)
    runs = [
        torch.cat([x for _, _, x in run_feed(model, past, **inputs, chunks=chunks)], 1)[exists]
        for past in (dense, cache)
    ]
    torch.testing.assert_close(runs[1], runs[0], atol=TOLERANCE[dtype], rtol=0)

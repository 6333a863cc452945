"""Test peak memory: a prompt and its events need hardly more than with DynamicCache, on the PyTorch path too."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from tests.cache.bare_model import BareModel

TOKENS = 1000
MODELS = {
    "heads": (4, 4, 32, torch.float32, 32),
    "grouped": (8, 2, 64, torch.bfloat16, 32),
    "one head, long window": (8, 1, 64, torch.bfloat16, 64),
}

pytestmark = pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="looks at the CPU's allocator")


def peak_bytes(call, path):
    """Return the peak of allocated bytes during a call, beyond those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in changes]
    return max(totals) - (totals[0] - changes[0]["args"]["Bytes"])


# What more than dense, as a multiple of what the prompt's keys and values take: a chunk attends over float32 copies.
@pytest.mark.parametrize(("chunk", "more"), [(TOKENS, 0.25), (250, 8)])
@pytest.mark.parametrize("name", MODELS)
def test_peak_of_a_prompt(name, chunk, more, tmp_path):
    heads, kv_heads, dim, dtype, window = MODELS[name]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=TOKENS,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(dtype)
    ids = torch.randint(5, 256, (1, TOKENS))

    @torch.inference_mode()
    def run(cache):
        for part in ids.split(chunk, 1):
            model(part, **{CACHE: cache}, logits_to_keep=1)

    run(DynamicCache(config=config))
    dense = peak_bytes(lambda: run(DynamicCache(config=config)), tmp_path / "trace.json")
    held = 2 * 2 * kv_heads * TOKENS * dim * dtype.itemsize
    for scorer in ("snapkv", "rkv"):
        made = HardKVCache(config=config, scorer=scorer, budget=TOKENS // 2, window=window)
        assert peak_bytes(lambda cache=made: run(cache), tmp_path / "trace.json") <= dense + more * held, scorer


def test_peak_of_an_event_of_codes(tmp_path):
    """A scorer's keys are decoded in parts, so an event takes little more than they and the new tiers."""
    model = BareModel(1, 4, 2, 64, 0.1)
    cache = HardKVCache(config=model.config, scorer="snapkv", budget=2000, window=32, interval=128, bits=4)
    for count in (2300, 100):
        queries, keys = torch.randn(1, 2, 8, count, 64).bfloat16(), torch.randn(1, 2, 4, count, 64).bfloat16()
        model.attend(cache, queries, keys, keys.clone(), None)
    held = 2 * 4 * 2100 * 64 * 2
    assert peak_bytes(cache.layers[0].compress, tmp_path / "trace.json") <= 5 * held

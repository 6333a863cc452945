"""Test that logits after evictions equal dense attention with a per-head -inf mask on tokens not in `cache.kept()`.

The oracle (conftest.py) is one dense forward without any cache: query t of a layer sees, per KV head, what `kept()`
said right before t's forward, and the tokens of that forward up to t itself.
"""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LogitsProcessor
from transformers.masking_utils import flash_attention_mask

from hardkv import HardKVCache
from hardkv.selectors import AdaKV, Adaptive, Pyramid, TopK, TopP

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCORERS = ["attention", "snapkv", "rkv"]
BUDGETS = [TopK(12), TopP(0.6, floor=8, cap=24), Adaptive(12, floor=8), AdaKV(12), Pyramid(12, beta=3)]
SIZES = {"window": 4, "sinks": 2, "interval": 5}
PROMPT, NEW = 24, 26
ONE_BY_ONE = [PROMPT] + [1] * NEW


def assert_equals_oracle(logits, name, visibility, run_oracle, atol=2e-5, **model_arguments):
    exists = visibility.exists
    input_ids = model_arguments.pop("input_ids")
    expected = run_oracle(name, visibility, input_ids, **model_arguments)
    torch.testing.assert_close(logits[exists], expected[exists], atol=atol, rtol=0)


def assert_evicted(cache, exists, events):
    """Every row of every compressed layer lost tokens, over several events: the comparison was about something."""
    assert cache.stats().events >= events
    assert (cache.lengths() < exists.sum(1)[:, None].cpu()).all()


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("qwen3", 3)])
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: type(budget).__name__)
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_step_equals_masked_dense_attention(
    scorer, budget, name, batch, patience, tiny_model, tiny_prompts, run_record, run_oracle
):
    inputs, model = tiny_prompts(batch, PROMPT, new=NEW), tiny_model(name)
    cache = HardKVCache(config=model.config, scorer=scorer, budget=budget, patience=patience, **SIZES)
    logits, visibility = run_record(model, cache, **inputs, chunks=ONE_BY_ONE)
    assert_evicted(cache, visibility.exists, events=6)
    if not isinstance(budget, TopK | Pyramid):
        seen = torch.stack(list(visibility.layers.values())).sum(-1)  # [layers, B, KV heads, queries]
        assert (seen.amin(2) < seen.amax(2)).any()  # heads of a layer differ
    assert_equals_oracle(logits, name, visibility, run_oracle, input_ids=inputs["input_ids"])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2", "gemma3"])
def test_every_model_equals_masked_dense_attention(name, batch, attn, tiny_model, tiny_prompts, run_record, run_oracle):
    """gemma3: its sliding-window layers are not compressed, and the oracle masks them by their window alone."""
    inputs, model = tiny_prompts(batch, PROMPT, new=NEW), tiny_model(name, attn)
    cache = HardKVCache(config=model.config, scorer="snapkv", budget=AdaKV(12), patience=1, **SIZES)
    logits, visibility = run_record(model, cache, **inputs, chunks=ONE_BY_ONE)
    assert list(visibility.layers) == ([1, 3] if name == "gemma3" else [0, 1, 2])
    assert_evicted(cache, visibility.exists, events=6)
    assert_equals_oracle(logits, name, visibility, run_oracle, input_ids=inputs["input_ids"])


@pytest.mark.parametrize("budget", [Adaptive(12), TopP(0.6, floor=8, cap=24)], ids=str)
def test_calibrated_online_equals_masked_dense_attention(budget, tiny_model, tiny_prompts, run_record, run_oracle):
    inputs, model = tiny_prompts(3, PROMPT, new=NEW), tiny_model("llama")
    cache = HardKVCache(config=model.config, scorer="snapkv", budget=budget, calibration="online", patience=1, **SIZES)
    logits, visibility = run_record(model, cache, **inputs, chunks=ONE_BY_ONE)
    assert_evicted(cache, visibility.exists, events=6)
    assert_equals_oracle(logits, "llama", visibility, run_oracle, input_ids=inputs["input_ids"])


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(("name", "batch"), [("llama", 3), ("qwen3", 1)])
def test_ten_digits_in_float64(scorer, name, batch, tiny_model, tiny_prompts, run_record, run_oracle):
    """At this tolerance one forgotten or doubled token shows, however little it weighs."""
    inputs, model = tiny_prompts(batch, PROMPT, new=NEW), tiny_model(name, dtype=torch.float64)
    cache = HardKVCache(config=model.config, scorer=scorer, budget=Adaptive(12), patience=2, **SIZES)
    logits, visibility = run_record(model, cache, **inputs, chunks=ONE_BY_ONE)
    assert_evicted(cache, visibility.exists, events=6)
    assert_equals_oracle(
        logits, name, visibility, run_oracle, atol=1e-10, input_ids=inputs["input_ids"], dtype=torch.float64
    )


@pytest.mark.parametrize(
    "chunks",
    [
        [24, 3, 7, 1, 5, 4, 1, 1, 4],  # below, at and above the interval of 5
        [24, 13, 13],  # longer than window and interval together
        [5, 6, 7, 6, 3, 7, 5, 6, 5],  # the prompt in chunks: the first holds nothing of the padded rows
        [1] * 50,
    ],
    ids=lambda chunks: "-".join(map(str, chunks[:6])),
)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(("batch", "patience"), [(1, 0), (3, 2)])
def test_later_chunks_of_several_tokens(
    batch, scorer, chunks, patience, tiny_model, tiny_prompts, run_record, run_oracle
):
    inputs, model = tiny_prompts(batch, PROMPT, new=NEW), tiny_model("qwen3")
    assert sum(chunks) == inputs["input_ids"].shape[1]
    cache = HardKVCache(config=model.config, scorer=scorer, budget=AdaKV(9), patience=patience, **SIZES)
    logits, visibility = run_record(model, cache, **inputs, chunks=chunks)
    assert_evicted(cache, visibility.exists, events=3)
    assert_equals_oracle(logits, "qwen3", visibility, run_oracle, input_ids=inputs["input_ids"])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("patience", [0, 1])
def test_padding_inside_the_sequence(patience, attn, tiny_model, tiny_prompts, run_record, run_oracle):
    """Turns of different lengths: rows of a batch skip columns in the middle, whole chunks included."""
    inputs, model = tiny_prompts(3, PROMPT, new=NEW), tiny_model("llama", attn)
    mask = inputs["attention_mask"]
    mask[0, 26:29] = 0  # the end of a chunk
    mask[1, 31:36] = 0  # a whole chunk
    mask[2, 36:38] = 0  # the start of a chunk
    mask[1, 41] = 0  # a single token
    cache = HardKVCache(config=model.config, scorer="snapkv", budget=AdaKV(9), patience=patience, **SIZES)
    logits, visibility = run_record(model, cache, **inputs, chunks=[24, 5, 2, 5, 5, 1, 1, 1, 1, 1, 4])
    assert_evicted(cache, visibility.exists, events=5)
    assert_equals_oracle(logits, "llama", visibility, run_oracle, input_ids=inputs["input_ids"])


def attention_with_2d_mask(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Takes the padding `[B, columns]` or None and is causal by itself, as flash attention is."""
    start, total = key.shape[2] - query.shape[2], key.shape[2]
    seen = torch.ones(total, total, dtype=torch.bool).tril()[start:]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    return out.nan_to_num(0.0).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("batch", [1, 3])
def test_implementations_that_take_2d_masks(batch, tiny_model, tiny_prompts, run_record, run_oracle):
    """Without a 4D mask it is ours alone to be causal within a chunk."""
    AttentionInterface.register("test-2d-mask", attention_with_2d_mask)
    AttentionMaskInterface.register("test-2d-mask", flash_attention_mask)
    inputs, model = tiny_prompts(batch, PROMPT, new=NEW), tiny_model("llama", "test-2d-mask")
    if batch > 1:
        inputs["attention_mask"][1, 32:34] = 0
    cache = HardKVCache(config=model.config, budget=AdaKV(9), patience=1, **SIZES)
    logits, visibility = run_record(model, cache, **inputs, chunks=[24, 3, 7, 1, 5, 4, 1, 1, 4])
    assert_evicted(cache, visibility.exists, events=3)
    assert_equals_oracle(logits, "llama", visibility, run_oracle, input_ids=inputs["input_ids"])


@pytest.mark.parametrize("sizes", [(1, 0, 1), (1, 1, 2), (30, 4, 3), (4, 30, 5), (9, 0, 40)], ids=str)
def test_extreme_window_sinks_and_interval(sizes, tiny_model, tiny_prompts, run_record, run_oracle):
    """Events at every token, no sinks, a window or sinks longer than the prompt, no event after the prompt's."""
    window, sinks, interval = sizes
    inputs, model = tiny_prompts(3, 20, new=30), tiny_model("llama")
    cache = HardKVCache(
        config=model.config, budget=window + sinks + 2, window=window, sinks=sinks, interval=interval, patience=1
    )
    logits, visibility = run_record(model, cache, **inputs, chunks=[20] + [1] * 30)
    assert_equals_oracle(logits, "llama", visibility, run_oracle, input_ids=inputs["input_ids"])


class KeptRecorder(LogitsProcessor):
    """Record `kept()` after every forward of generate()."""

    def __init__(self, cache):
        self.cache, self.kept = cache, []

    def __call__(self, input_ids, scores):
        self.kept.append({idx: self.cache.kept(idx) for idx in range(len(self.cache.layers))})
        return scores


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_equals_masked_dense_attention(
    batch, scorer, tiny_model, tiny_prompts, run_generate, run_oracle, make_visibility
):
    """The whole of generate(): its masks, its positions, its own choice of tokens."""
    inputs, model = tiny_prompts(batch, PROMPT), tiny_model("qwen3")
    cache = HardKVCache(config=model.config, scorer=scorer, budget=Adaptive(12), **SIZES)
    recorder = KeptRecorder(cache)
    tokens, logits = run_generate(model, cache, inputs, NEW, logits_processor=[recorder])

    tokens = tokens[:, :-1]  # nobody read the last one
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch, NEW - 1, dtype=torch.long)], 1)
    visibility = make_visibility(mask)
    nothing = [[torch.zeros(0, dtype=torch.long)] * model.config.num_key_value_heads] * batch
    kept = [dict.fromkeys(range(model.config.num_hidden_layers), nothing), *recorder.kept]
    visibility.add(0, PROMPT, kept[0])
    for step in range(1, NEW):
        visibility.add(PROMPT + step - 1, PROMPT + step, kept[step])
    expected = run_oracle("qwen3", visibility, tokens)[:, PROMPT - 1 :].transpose(0, 1)
    assert_evicted(cache, visibility.exists, events=6)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_oracle_itself(batch, tiny_model, tiny_prompts, run_record, run_feed, run_oracle, make_visibility):
    """With everything visible it is the plain model, and hiding one token from one head changes later logits only."""
    inputs, model = tiny_prompts(batch, PROMPT, new=NEW), tiny_model("llama")
    exists = inputs["attention_mask"].bool()
    total = exists.shape[1]
    visibility = make_visibility(inputs["attention_mask"])
    heads = [[torch.zeros(0, dtype=torch.long)] * 2] * batch
    visibility.add(0, total, dict.fromkeys(range(3), heads))
    dense = next(run_feed(model, DynamicCache(config=model.config), **inputs, chunks=[total]))[2]
    plain = run_oracle("llama", visibility, inputs["input_ids"])
    torch.testing.assert_close(plain[exists], dense[exists], atol=2e-5, rtol=0)

    visibility.layers[1][-1, 1, 40:, 30] = False
    changed = (run_oracle("llama", visibility, inputs["input_ids"]) - plain).abs().amax(-1)
    assert (changed[-1, 40:] > 1e-4).any()
    changed[-1, 40:] = 0
    assert not changed.any()

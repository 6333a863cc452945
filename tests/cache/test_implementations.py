"""Test routing with all attention implementations and environments of a model."""

import sys
import threading
import types
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
)
from transformers.integrations import hub_kernels

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.selectors import AdaKV, Adaptive
from tests.cache.test_routing import (
    EVICT,
    HOLD_ALL,
    assert_parity,
    assert_same_logits,
    generate,
)
from tests.models.tiny import tiny_model as make_model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------- implementations


def sequence_attention(query, key, value, scale, causal, window):
    """One sequence, `[q, Hq, D]` and `[n, H, D]`, causal from the bottom right as flash-attention's kernels are."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    row = torch.arange(query.shape[0])[:, None] + key.shape[0] - query.shape[0]
    column = torch.arange(key.shape[0])
    allowed = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool)
    if causal:
        allowed &= column <= row
    if window is not None and window[0] >= 0:
        allowed &= column >= row - window[0]
    probability = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", probability, value)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, **kwargs
):
    return torch.stack(
        [sequence_attention(*qkv, softmax_scale, causal, window_size) for qkv in zip(q, k, v, strict=True)]
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    **kwargs,
):
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([sequence_attention(*row, softmax_scale, causal, window_size) for row in rows])


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Clear the globals in which transformers stores the flash-attention that it loaded last."""
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn"):
        monkeypatch.setattr(flash, name, None)
    for name in ("_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash, name, None, raising=False)


FLASH = ["flash_attention_2", "flash_attention_3", "flash_attention_4"]


@pytest.fixture
def fake_flash(monkeypatch, nothing_loaded):
    """Fake flash-attention on the CPU. Like the real one, the config's name selects it."""

    def lazy_imports(implementation, *args, **kwargs):
        assert implementation in FLASH, "transformers would look for this kernel on the hub"
        return flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input

    monkeypatch.setattr(flash, "_lazy_imports", lazy_imports)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "attn"), [("qwen3", FLASH[0]), ("gemma3", FLASH[0]), ("qwen3", FLASH[1]), ("gemma3", FLASH[2])]
)
def test_flash_attention(name, attn, batch, fake_flash, tiny_model, tiny_prompts):
    model = tiny_model(name, "sdpa")
    expected = generate(model, tiny_prompts(batch), DynamicCache(config=model.config))
    model.config._attn_implementation_internal = attn
    assert_parity(model, tiny_prompts(batch))
    assert model.config._attn_implementation == attn
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert_same_logits(generate(model, tiny_prompts(batch), cache), expected)


def test_flash_attention_with_the_prompt_in_chunks(fake_flash, tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "sdpa")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert_parity(model, tiny_prompts(3), prefill_chunk_size=4)


HUB = ["kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3@main"]


@pytest.fixture
def hub(monkeypatch, registries, nothing_loaded):
    """Fake kernels of the Hub: transformers' own code registers them under their names."""
    fake = types.SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=None
    )
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: fake)


@pytest.mark.parametrize("kernel", HUB)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_kernels_from_the_hub(name, kernel, hub, tiny_model, tiny_prompts):
    model = tiny_model(name, "sdpa")
    expected = generate(model, tiny_prompts(3), DynamicCache(config=model.config))
    model.set_attn_implementation(kernel)
    assert model.config._attn_implementation == kernel
    cache = assert_parity(model, tiny_prompts(3))
    assert cache.stats().events > 1
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert_same_logits(generate(model, tiny_prompts(3), cache), expected)


def test_a_kernel_that_is_loaded_again_within_a_forward(hub, tiny_model, tiny_prompts):
    """transformers loads and registers a kernel again when another model's came in between: in its first attention."""
    model, other = tiny_model("llama", "sdpa"), tiny_model("llama", "sdpa")
    model.set_attn_implementation(HUB[0])
    expected = generate(model, tiny_prompts(3), DynamicCache(config=model.config))
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    other.set_attn_implementation(HUB[1])
    generate(other, tiny_prompts(3), HardKVCache(config=other.config, **EVICT))
    assert_same_logits(generate(model, tiny_prompts(3), cache), expected)


@pytest.fixture
def uncompiled():
    """Run FlexAttention and its masks as plain PyTorch: compiling them is slow, and fails on some CPUs."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(uncompiled, tiny_model, tiny_prompts):
    model = tiny_model("qwen3", "flex_attention", num_hidden_layers=1)
    expected = generate(model, tiny_prompts(3), DynamicCache(config=model.config), max_new_tokens=4)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert_same_logits(generate(model, tiny_prompts(3), cache, max_new_tokens=4), expected)
    # a block mask cannot be read: chunks are refused, and nothing is stored
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    model(**tiny_prompts(3), **{CACHE: cache})
    attention_mask = torch.cat([tiny_prompts(3)["attention_mask"], torch.ones(3, 2, dtype=torch.long)], 1)
    with pytest.raises(NotImplementedError, match="BlockMask.*attn_implementation='sdpa'"):
        model(torch.full((3, 2), 5), attention_mask=attention_mask, **{CACHE: cache})
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_gpt2(attn, tiny_model, tiny_prompts):
    assert_parity(tiny_model("gpt2", attn), tiny_prompts(3))


def test_attention_weights_are_those_of_the_first_forward(tiny_model, tiny_prompts):
    """Later forwards attend ragged rows, for which there is no matrix of weights: none are given, rather than wrong."""
    model, inputs = tiny_model("llama", "eager"), tiny_prompts(3)
    dense = generate(model, inputs, DynamicCache(config=model.config), output_attentions=True)
    ours = generate(model, inputs, HardKVCache(config=model.config, **HOLD_ALL), output_attentions=True)
    assert_same_logits(ours, dense)
    assert len(ours.attentions[0]) == len(dense.attentions[0]) == 3
    for actual, expected in zip(ours.attentions[0], dense.attentions[0], strict=True):
        assert torch.equal(actual, expected)
    assert all(weights is None for step in ours.attentions[1:] for weights in step)


def test_softcap(tiny_prompts):
    assert_parity(make_model("gemma2", attn="eager", attn_logit_softcapping=2.0), tiny_prompts(3))


def test_attention_sinks(tiny_prompts):
    assert_parity(make_model("gpt_oss", attn="eager"), tiny_prompts(3))


def test_layers_that_share_keys_and_values(tiny_prompts):
    """The last two layers of Gemma 3n read what the last sliding and the last full layer stored."""
    model = make_model("gemma3n_text")
    config = model.config
    expected = generate(model, tiny_prompts(3), DynamicCache(config=config), max_new_tokens=20)
    cache = HardKVCache(config=config, **HOLD_ALL)
    assert_same_logits(generate(model, tiny_prompts(3), cache, max_new_tokens=20), expected)
    cache = HardKVCache(config=config, **EVICT)
    evicted = generate(model, tiny_prompts(3), cache, max_new_tokens=20)
    stats = cache.stats()
    assert stats.compressed_layers == 1
    assert stats.events >= 6
    assert stats.seq_length == 32
    # the event of the last forward still waits, so one interval more than usual may be held
    assert int(cache.lengths().max()) <= EVICT["budget"] + EVICT["interval"]
    assert all(logits.isfinite().all() for logits in evicted.logits)


# ---------------------------------------------------------------------------------------------- around the model


class InStep(LogitsProcessor):
    """Let every thread continue with its next token only when all threads have reached it."""

    def __init__(self, barrier: threading.Barrier):
        self.barrier = barrier

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.barrier.wait(timeout=60)
        return scores


def test_threads_on_one_model(tiny_model, tiny_prompts):
    """Generations of their own prompts, scorers and budgets, token by token in step, switching within each token."""
    model = tiny_model("qwen3", "sdpa")
    arguments: list[dict[str, Any] | None] = [
        EVICT,
        EVICT | dict(scorer="rkv", budget=AdaKV(8), patience=1),
        EVICT | dict(scorer="snapkv", budget=Adaptive(10), interval=2),
        HOLD_ALL,
        None,
    ]
    prompts = [tiny_prompts(3, 9 + 2 * index, seed=index) for index in range(len(arguments))]

    def run(index: int, **options: Any) -> tuple[Any, Any]:
        settings = arguments[index]
        config = model.config
        cache = DynamicCache(config=config) if settings is None else HardKVCache(config=config, **settings)
        out = generate(model, prompts[index], cache, max_new_tokens=20, **options)
        held = None if settings is None else [cache.kept(idx) for idx in range(3)]
        return out, (str(held), cache.stats().events if held else 0)

    alone = [run(index) for index in range(len(arguments))]
    assert min(events for _, (_, events) in alone[:4]) >= 7
    results: dict[int, Any] = {}
    barrier = threading.Barrier(len(arguments))

    def work(index: int) -> None:
        try:
            results[index] = run(index, logits_processor=[InStep(barrier)])
        except BaseException:
            barrier.abort()  # the others would wait in vain
            raise

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(arguments))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(results) == list(range(len(arguments)))
    for index, (expected, held) in enumerate(alone):
        assert_same_logits(results[index][0], expected)
        assert results[index][1] == held


def test_accelerate_moves_every_argument(tiny_model, tiny_prompts):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("qwen3", "sdpa")
    expected = generate(model, tiny_prompts(3), DynamicCache(config=model.config))
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert_same_logits(generate(model, tiny_prompts(3), HardKVCache(config=model.config, **HOLD_ALL)), expected)


def test_a_compiled_model(tiny_model, tiny_prompts):
    torch.compiler.reset()
    model, inputs = tiny_model("qwen3", "sdpa", num_hidden_layers=1), tiny_prompts(3)
    compiled = torch.compile(model, backend="eager")
    cache, twin = (HardKVCache(config=model.config, **(EVICT | {"interval": 1})) for _ in range(2))
    whole = torch.cat([inputs["attention_mask"], torch.ones(3, 2, dtype=torch.long)], 1)
    for ids in (inputs["input_ids"], torch.full((3, 1), 5), torch.full((3, 1), 6)):
        attention_mask = whole[:, : cache.get_seq_length() + ids.shape[1]]
        actual = compiled(input_ids=ids, attention_mask=attention_mask, **{CACHE: cache}).logits
        expected = model(input_ids=ids, attention_mask=attention_mask, **{CACHE: twin}).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    assert cache.stats().events == twin.stats().events == 3
    assert cache.lengths().equal(twin.lengths())
    torch.compiler.reset()


def breaks_and_graphs() -> tuple[int, int]:
    """Return the counts of torch.compile since its last reset."""
    counters = torch._dynamo.utils.counters
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 3])
def test_graph_breaks_of_a_compiled_model(layers, tiny_model, tiny_prompts):
    """Storing and attending are outside the graphs: few breaks a layer, and no new graph once decoding has settled."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = tiny_model("qwen3", "sdpa", num_hidden_layers=layers), tiny_prompts(3)
    compiled = torch.compile(model, backend="eager")
    cache, mask = HardKVCache(config=model.config, **EVICT), inputs["attention_mask"]
    compiled(**inputs, **{CACHE: cache})
    # three a forward: masks, update, attention; counted again in each frame around them, which layers share
    around = 5 if CACHE == "cache" else 0  # what takes an old name too has a frame more from transformers 5.24 on
    assert 0 < breaks_and_graphs()[0] <= 9 + around + layers
    counted = []
    for _ in range(6):  # through two events
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        compiled(input_ids=torch.full((3, 1), 5), attention_mask=mask, **{CACHE: cache})
        counted.append(breaks_and_graphs())
    assert cache.stats().events == 3
    assert counted[1:] == [counted[1]] * 5
    assert counted[1][0] <= 20 + around + 2 * layers
    torch.compiler.reset()

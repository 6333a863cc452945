"""What is planned against what caches then hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Gemma4TextConfig

import hardkv
from hardkv import Calibration, HardKVCache, graphed
from hardkv.cache.hybrid import HybridLayer
from hardkv.cache.model import Traits
from hardkv.cache.storage.memory import storage_nbytes
from hardkv.selectors import AdaKV, Adaptive, Pyramid, Risk, TopK, TopP
from tests.cache.conftest import generate_logits, make_model, make_prompts
from tests.models.tiny import tiny_model

SIZES = {"window": 8, "interval": 16, "sinks": 2}


def run(model, batch, length, new, static=True, **arguments):
    cache = HardKVCache(config=model.config, **(SIZES | arguments))
    inputs = make_prompts(batch, length=length)
    inputs["attention_mask"].fill_(1)
    generate_logits(model, cache, inputs, new, **({"custom_generate": graphed} if static else {}))
    return cache


@pytest.mark.parametrize("budget", [TopK(60), AdaKV(60), Adaptive(60), Pyramid(60)], ids=str)
@pytest.mark.parametrize(("batch", "bits"), [(1, 16), (3, 16), (3, 4), (1, (16, 2))])
def test_fixed_totals_are_held_exactly(budget, batch, bits):
    """To three in a hundred, as schedules differ between kernels."""
    model = make_model("qwen3")
    planned = hardkv.plan(model.config, budget, batch, 80, 80 + 40, torch.float32, bits=bits, **SIZES)
    assert planned.fixed
    held = run(model, batch, 80, 40, budget=budget, bits=bits)
    assert held.nbytes() == pytest.approx(planned.nbytes, rel=0.03)
    plain = run(model, batch, 80, 40, static=False, budget=budget, bits=bits)
    assert plain.nbytes() <= planned.nbytes
    assert planned.dense_nbytes == batch * model.config.num_hidden_layers * 2 * 120 * 2 * 8 * 4


def test_bits_by_layer():
    """What `Risk` keeps depends on the length by two in a hundred at most."""
    model = make_model("qwen3")
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    counts = torch.tensor([10, 20, 40, 80, 120])
    steep = torch.linspace(0.02, 0.1, layers * heads).view(layers, heads, 1)
    scale = torch.logspace(-3, 1, layers).view(-1, 1, 1, 1)
    ones = torch.ones(layers, heads)
    provenance = {
        "geometry": Traits.of(model.config).geometry, "layers": [*range(layers)], "scorer": {"name": "attention"},
        "window": SIZES["window"],
    }  # fmt: skip
    calibration = Calibration(
        ones, ones, counts, torch.exp(-steep * counts) * (1 - counts / 120), provenance=provenance,
        distortion=(scale * torch.tensor([0.01, 0.2, 1.0, 4.0])).expand(-1, heads, 2, -1),
    )  # fmt: skip
    settings = {"budget": Risk(30), "bits": "auto", "calibration": calibration, "scorer": "attention"}
    planned = hardkv.plan(model.config, batch=2, prompt_length=80, max_length=120, dtype=torch.float32,
                          **SIZES, **settings)  # fmt: skip
    assert planned.fixed
    cache = run(model, 2, 80, 40, **settings)
    assert len(set(map(tuple, cache.stats().layer_bits))) > 1
    budgets = storage_nbytes(cache.layers[0].budget.tensors(cache.layers[0].device))
    assert cache.nbytes() - budgets == pytest.approx(planned.nbytes, rel=0.04)
    assert run(model, 2, 80, 40, static=False, **settings).nbytes() - budgets <= planned.nbytes


@pytest.mark.parametrize(
    "arguments",
    [{"budget": TopP(0.9, cap=30)}, {"budget": TopP(0.9, cap=None)}, {"patience": 2}, {"patience": 1, "bits": 3}],
)
def test_others_are_bounded(arguments):
    model = make_model("llama")
    arguments = {"budget": 20} | arguments
    lengths = {"batch": 2, "prompt_length": 60, "max_length": 100}
    planned = hardkv.plan(model.config, **lengths, dtype=torch.float32, **SIZES, **arguments)
    assert not planned.fixed
    assert "at most" in str(planned)
    held = run(model, 2, 60, 40, static=False, **arguments).nbytes()
    assert held <= planned.nbytes


def test_what_is_on_probation_counts_from_the_first_miss():
    """patience=1: the prompt's own event frees nothing, and after it all of the prompt is still held."""
    model = make_model("llama")
    planned = hardkv.plan(model.config, 20, 2, 200, 201, torch.float32, patience=1, **SIZES)
    held = run(model, 2, 200, 1, static=False, budget=20, patience=1)
    assert held.lengths("sparse").eq(200 - 20).all()
    assert held.nbytes() <= planned.nbytes
    assert not planned.fixed


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(2, 40), st.integers(11, 80))
def test_never_more_than_planned(batch, length, new, n):
    model = make_model("llama", num_hidden_layers=1)
    planned = hardkv.plan(model.config, AdaKV(n), batch, length, length + new, torch.float32, **SIZES)
    assert run(model, batch, length, new, static=False, budget=AdaKV(n)).nbytes() <= planned.nbytes


@pytest.mark.parametrize(
    "more",
    [{"budget": 40}, {"budget": 40, "bits": 4}, {"budget": Adaptive(40), "calibration": "online"}],
    ids=str,
)
def test_pinned_prompts_and_sliding_layers(more):
    model = make_model("gemma3")
    more = {"pin_prompt": True} | more
    planned = hardkv.plan(model.config, **more, batch=2, prompt_length=30, max_length=70, dtype=torch.float32, **SIZES)
    held = run(model, 2, 30, 40, static=False, **more)
    sliding = [layer for layer in held.layers if not hasattr(layer, "tiers")]
    assert planned.sliding == storage_nbytes(each for layer in sliding for each in (layer.keys, layer.values))
    assert held.nbytes() <= planned.nbytes


def test_a_sliding_window_that_is_never_full():
    model = make_model("gemma3", sliding_window=64)
    planned = hardkv.plan(model.config, 40, 2, 30, 50, torch.float32, **SIZES)
    tokens = 2 * 2 * 50 * 2 * 8 * 4  # layers, sequences, columns, KV heads, head dim; float32
    assert planned.sliding == 2 * tokens  # keys and values
    assert planned.dense_nbytes == 4 * tokens  # as many layers see everything
    held = run(model, 2, 30, 20, static=False, budget=40)
    sliding = [layer for layer in held.layers if not hasattr(layer, "tiers")]
    bytes_held = storage_nbytes(each for layer in sliding for each in (layer.keys, layer.values))
    assert bytes_held * 50 == planned.sliding * 49  # nobody read the last token


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("gemma4_text", {}),
        ("gemma4_text", {"per_layer_config": {2: {"head_dim": 16, "num_key_value_heads": 1}}}),
        ("mimo_v2_flash", {"v_head_dim": 16, "layer_types": ["full_attention"] * 3}),
        ("gpt_bigcode", {}),
        ("falcon_h1", {}),
    ],
)
@pytest.mark.parametrize("budget", [30, TopP(0.9, cap=30)], ids=str)
def test_heads_of_every_shape(kind, overrides, budget):
    """Wider in some layers, wider values, one for all queries, beside a linear attention whose states are named."""
    model = tiny_model(kind, **overrides)
    planned = hardkv.plan(model.config, budget, 2, 60, 100, torch.float32, **SIZES)
    exact = planned.fixed and not planned.sliding  # steps hold windows of their own
    held = run(model, 2, 60, 40, budget=budget, static=exact)
    dense = DynamicCache(config=model.config)
    inputs = make_prompts(2, length=60)
    inputs["attention_mask"].fill_(1)
    generate_logits(model, dense, inputs, 41)
    assert planned.dense_nbytes == storage_nbytes(each for layer in dense.layers for each in (layer.keys, layer.values))
    states = [layer.states() for layer in held.layers if isinstance(layer, HybridLayer)]
    assert planned.uncounted == (("LinearAttentionLayer",) if states else ())
    counted = held.nbytes() - storage_nbytes(state for each in states for state in each)
    assert counted <= planned.nbytes * (1.03 if exact else 1)
    assert counted >= planned.nbytes * (0.97 if exact else 0.8)


def test_the_default_gemma4():
    """Of its 30 layers every sixth attends to all, with heads of 512 instead of 256."""
    planned = hardkv.plan(Gemma4TextConfig(), 1024, max_length=8192, dtype=torch.bfloat16)
    full, sliding = 5 * 4 * 512, 25 * 4 * 256  # layers, KV heads, width
    assert planned.sliding == 2 * 2 * sliding * Gemma4TextConfig().sliding_window
    assert planned.dense_nbytes == 2 * 2 * full * 8192 + planned.sliding
    assert planned.condensed == pytest.approx(2 * 2 * full * (1024 - 32), rel=0.01)
    assert hardkv.max_batch_size(Gemma4TextConfig(), 1024, max_length=8192, memory=3 * planned.nbytes) == 3


def test_batches_that_fit():
    config = make_model("qwen3").config
    arguments = {"budget": 60, "prompt_length": 80, "max_length": 200, "dtype": torch.float16} | SIZES
    for batch in (1, 2, 17):
        memory = hardkv.plan(config, batch=batch, **arguments).nbytes
        assert hardkv.max_batch_size(config, memory=memory, **arguments) == batch
        assert hardkv.max_batch_size(config, memory=memory - 1, **arguments) == batch - 1
    memory = hardkv.plan(config, batch=17, **arguments).nbytes
    assert repr(hardkv.max_batch_size(config, memory=np.int64(memory), **arguments)) == "17"
    assert repr(hardkv.max_batch_size(config, memory=float(memory), **arguments)) == "17"
    with pytest.raises(ValueError, match="batch=0 must be >= 1"):
        hardkv.plan(config, batch=0)
    with pytest.raises(ValueError, match="prompt_length=10 must be >= 0 and <= 9"):
        hardkv.plan(config, prompt_length=10, max_length=9)
    with pytest.raises(TypeError, match="max_length=9.5 must be an integer"):
        hardkv.plan(config, max_length=9.5)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="memory="):
            hardkv.max_batch_size(config)


@pytest.mark.parametrize("bits", [8, 4, (4, 2)], ids=str)
def test_batches_with_bits_that_fit(bits):
    """As many sequences as are said to fit do, and more than with 16 bits."""
    model = make_model("llama")
    lengths = {"prompt_length": 60, "max_length": 80, "dtype": torch.float32}
    memory = 3 * hardkv.plan(model.config, 40, **lengths, **SIZES).nbytes
    number = hardkv.max_batch_size(model.config, 40, **lengths, memory=memory, bits=bits, **SIZES)
    assert number > hardkv.max_batch_size(model.config, 40, **lengths, memory=memory, **SIZES) == 3
    assert run(model, number, 60, 20, budget=40, bits=bits).nbytes() == pytest.approx(memory, rel=0.3)
    assert run(model, number, 60, 20, static=False, budget=40, bits=bits).nbytes() <= memory


def test_a_model_is_taken_for_its_config():
    model = make_model("llama")
    assert hardkv.plan(model, 64, max_length=512) == hardkv.plan(model.config, 64, max_length=512)

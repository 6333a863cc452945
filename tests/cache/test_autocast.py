"""Test the caller's autocast: it applies to the model as with any cache, but not to our own arithmetic.

Under autocast keys and values have different dtypes, and attention reads both in a third. Two runs may differ by
rounding to bfloat16; arithmetic outside autocast must be equal bit by bit.
"""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hardkv import HardKVCache, calibrate, graphed
from hardkv.cache.argument import CACHE
from hardkv.kernels.rows import Rows
from hardkv.kernels.scoring import window_attention
from hardkv.kernels.similarity import mean_cosine
from hardkv.selectors import TopP, fit_temperatures
from hardkv.selectors.temperatures import kept_counts
from tests.cache.conftest import DEVICE
from tests.models.tiny import random_ids, random_normal

HOLD_ALL = dict(budget=1000, window=4, sinks=1, interval=3)  # an event every 3 tokens, and nothing is lost
EVICT = dict(budget=8, window=4, sinks=1, interval=3)
MODELS = [(name, attn) for name in ("llama", "qwen3", "gpt2", "gemma3") for attn in ("sdpa", "eager")]
# Logits are O(1) with a maximum near 4, where bfloat16 has steps of 1/64
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.012}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def half(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, dtype=dtype)


def logits_of(feed: Any, model: Any, cache: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a prompt of 13 columns, a chunk of 3 and ten single tokens, `[B, 26, V]`."""
    return torch.cat([logits for _, _, logits in feed(model, cache, **inputs, chunks=[13, 3, *[1] * 10])], 1)


def own_autocast(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model with autocast in its forward alone, as `accelerator.prepare` makes it: whatever the caller's is."""
    model.forward = half(dtype)(model.forward)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_nothing_lost_is_dynamic_cache(name, attn, dtype, tiny_model, tiny_prompts, run_feed):
    model, inputs = tiny_model(name, attn), tiny_prompts(3, new=13)
    cache, dense = HardKVCache(config=model.config, **HOLD_ALL), DynamicCache(config=model.config)
    with half(dtype):
        expected, actual = (logits_of(run_feed, model, past, inputs) for past in (dense, cache))
    exact = logits_of(run_feed, model, DynamicCache(config=model.config), inputs)
    exists = inputs["attention_mask"].bool()
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual[exists], expected[exists], rtol=0, atol=TOLERANCE[dtype])
    assert (actual - exact)[exists].abs().max() > 1e-4, "the model did not run under autocast"
    assert cache.stats().events > 3
    for layer in cache._compressed:
        tiers = layer.tiers
        held = {tensor.dtype for tensor in (tiers.condensed.keys, tiers.dense.keys, tiers.dense.values)}
        assert held | {layer.ring.buffer.dtype, layer.dtype} == {dtype}
        twin = dense.layers[layer.layer_idx]
        assert layer.dense_nbytes() == twin.keys.nbytes + twin.values.nbytes


@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_attention_gives_the_dtype_that_it_gives_without_us(name, attn, tiny_model, tiny_prompts, run_feed):
    """This holds at every layer and every forward; the model's own arithmetic continues with this dtype."""
    model, inputs, dtypes = tiny_model(name, attn), tiny_prompts(1, new=13), []
    for path, module in model.named_modules():
        if path.endswith(("o_proj", "attn.c_proj")):
            module.register_forward_pre_hook(lambda module, args: dtypes[-1].append(args[0].dtype))
    for past in (HardKVCache(config=model.config, **EVICT), DynamicCache(config=model.config)):
        dtypes.append([])
        with half():
            logits_of(run_feed, model, past, inputs)
    assert dtypes[0] == dtypes[1]
    assert set(dtypes[0]) == {torch.bfloat16}


SETTINGS = [
    dict(scorer="rkv"),
    dict(scorer="snapkv", budget=TopP(0.6, floor=6, cap=12), calibration="online"),
    dict(scorer="attention", offload=True),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["scorer"])
@pytest.mark.parametrize("static", [False, True], ids=["eager", "graphed"])
def test_events_and_attention_are_outside_it(static, settings, tiny_model, tiny_prompts):
    """A model whose forward brings its own autocast computes the same, to the last bit, within the caller's."""
    if static and settings.get("offload"):
        pytest.skip("graphed has no offload")
    model, inputs = own_autocast(tiny_model("qwen3")), tiny_prompts(3)
    results = []
    for around in (nullcontext(), half()):
        cache = HardKVCache(config=model.config, **(EVICT | settings))
        options = {"custom_generate": graphed} if static else {}
        with around:
            out = model.generate(
                **inputs,
                **{CACHE: cache},
                max_new_tokens=14,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
            cache.layers[0].compress()
        results.append((torch.stack(out.logits), [cache.kept(idx) for idx in range(3)], cache.stats().temperatures))
    assert torch.equal(results[0][0], results[1][0])
    assert str(results[0][1:]) == str(results[1][1:])


def test_a_scorer_of_ones_own_computes_in_what_it_is_given(tiny_model, tiny_prompts, run_feed):
    seen = []

    def scorer(observation):
        product = observation.queries.float().flatten(0, 2) @ observation.keys.float().mT
        seen.append((torch.is_autocast_enabled(product.device.type), product.dtype, observation.attention.dtype))
        return observation.attention.log().clamp_min(-80.0)

    class Spy:
        score = staticmethod(scorer)

    model = tiny_model("llama")
    with half():
        logits_of(
            run_feed, model, HardKVCache(config=model.config, **(EVICT | {"scorer": Spy()})), tiny_prompts(1, new=13)
        )
    assert set(seen) == {(False, torch.float32, torch.float32)}


def test_kernels_and_fits_are_outside_it():
    """Test the functions that custom scorers and calibrations call outside a cache."""
    queries, keys = random_normal(1, 4, 3, 8, seed=0), random_normal(20, 8, seed=1)
    positions = torch.arange(10, dtype=torch.int32).repeat(2)
    rows = Rows.of(torch.tensor([0, 10, 20], dtype=torch.int32))
    valid = torch.ones(1, 3, dtype=torch.bool)
    z, reference = random_normal(2, 3, 16, seed=2), random_normal(2, 3, 16, seed=3).softmax(-1)

    def compute() -> list[torch.Tensor]:
        received = window_attention(
            queries, torch.arange(7, 10), valid, keys, positions, rows, num_kv_heads=2, scale=0.4
        )
        temperatures, residuals = fit_temperatures(z, reference, 0.8)
        counts = kept_counts(z, temperatures, reference, 0.8)
        return [received, mean_cosine(keys, rows), temperatures, residuals, counts]

    expected = compute()
    with half():
        actual = compute()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_calibrate_is_outside_it(tiny_model):
    texts = [random_ids(60, seed=seed) for seed in range(2)]
    model = own_autocast(tiny_model("qwen3"))
    results = []
    for around in (nullcontext(), half()):
        with around:
            options = dict(window=4, sinks=1, interval=6, scorer="snapkv", progress=False)
            results.append(calibrate(model, texts, **options))
    for name in ("temperatures", "residuals", "risk", "kept"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
    assert results[0].temperatures.ne(1.0).any()


# gemma3: with static windows, whose layers keep two dtypes
@pytest.mark.parametrize(
    ("name", "compile"),
    [("llama", False), ("gpt2", False), ("gemma3", False), pytest.param("gemma3", True, marks=pytest.mark.slow)],
)
def test_graphed(name, compile, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name), tiny_prompts(3)
    caches, results = [HardKVCache(config=model.config, **EVICT) for _ in range(2)], []
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with half():
        for cache, how in zip(caches, ({}, {"custom_generate": graphed, "compile": compile}), strict=True):
            results.append(model.generate(**inputs, **{CACHE: cache}, **options, **how))
    first, second = (torch.stack(result.logits)[:4] for result in results)  # before a rounding may pick another token
    torch.testing.assert_close(second, first, rtol=0, atol=TOLERANCE[torch.bfloat16])
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert one.keys.dtype == other.keys.dtype
        assert one.values.dtype == other.values.dtype


def test_begun_outside_goes_on_inside(tiny_model, tiny_prompts, run_feed):
    """Held tokens do not change, new tokens are stored beside them, and attention has autocast's dtype."""
    model, inputs = tiny_model("gpt2"), tiny_prompts(3, new=13)
    results = []
    for past in (HardKVCache(config=model.config, **HOLD_ALL), DynamicCache(config=model.config)):
        logits = []
        for start, _, chunk in run_feed(model, switching := past, **inputs, chunks=[13, *[1] * 13]):
            logits.append(chunk)
            if start == 0:
                context = half()
                context.__enter__()
        context.__exit__(None, None, None)
        results.append(torch.cat(logits, 1))
        assert switching.layers[0].keys.dtype == torch.float32
    exists = inputs["attention_mask"].bool()
    torch.testing.assert_close(results[0][exists], results[1][exists], rtol=0, atol=TOLERANCE[torch.bfloat16])


def test_begun_inside_does_not_go_on_outside(tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama"), tiny_prompts(1)
    cache = HardKVCache(config=model.config, **EVICT)
    with half():
        model(**inputs, **{CACHE: cache})
    twin = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=r"bfloat16.*gets.*float32.*begun under torch.autocast.*reset\(\)"):
        model(torch.full((1, 1), 5), **{CACHE: cache})
    assert cache.get_seq_length() == 13
    with half():  # and nothing was lost
        token = torch.full((1, 1), 5)
        assert torch.equal(*(model(token, **{CACHE: past}).logits for past in (cache, twin)))


def test_float64_is_spared(tiny_model, tiny_prompts, run_feed):
    """Autocast itself does not change float64 either."""
    model, inputs = tiny_model("llama", dtype=torch.float64), tiny_prompts(1, new=13)
    results = []
    for around in (nullcontext(), half()):
        with around:
            results.append(logits_of(run_feed, model, HardKVCache(config=model.config, **EVICT), inputs))
    assert results[0].dtype == torch.float64
    assert torch.equal(*results)


def test_gradients_of_the_first_forward(tiny_model, tiny_prompts):
    model, inputs, gradients = tiny_model("llama"), tiny_prompts(3), []
    for past in (HardKVCache(config=model.config, **EVICT), DynamicCache(config=model.config)):
        model.zero_grad()
        with torch.enable_grad(), half():
            model(**inputs, **{CACHE: past}, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_accelerate_prepares_a_model(tiny_model, tiny_prompts):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    accelerator = accelerate.Accelerator(cpu=DEVICE == "cpu", mixed_precision="bf16")
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    options = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    pasts = HardKVCache(config=model.config, **HOLD_ALL), DynamicCache(config=model.config)
    first, second = (
        torch.stack(prepared.generate(**tiny_prompts(3), **{CACHE: past}, **options).logits)[:4] for past in pasts
    )
    torch.testing.assert_close(first, second, rtol=0, atol=TOLERANCE[torch.bfloat16])


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["auto", "torch", "flash_attn"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_on_a_gpu(name, dtype, attention, tiny_model, tiny_prompts, run_feed):
    if attention == "flash_attn":
        pytest.importorskip("flash_attn")
    with torch.device("cuda"):
        model = tiny_model(name).cuda()
        inputs = {key: value.cuda() for key, value in tiny_prompts(3, new=13).items()}
        pasts = HardKVCache(config=model.config, attention=attention, **HOLD_ALL), DynamicCache(config=model.config)
        with half(dtype):
            actual, expected = (logits_of(run_feed, model, past, inputs) for past in pasts)
    exists = inputs["attention_mask"].bool()
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual[exists], expected[exists], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_graphs_on_a_gpu(compile, tiny_model, tiny_prompts):
    """Autocast keeps casts of weights until its block ends: a graph must not read them in the next one.

    One cache goes through two blocks of autocast and none, in turn; each answer is that of a new cache's eager steps.
    """
    with torch.device("cuda"):
        model, cache = tiny_model("qwen3").cuda(), None
        options = dict(max_new_tokens=16, do_sample=False, return_dict_in_generate=True, output_logits=True)
        cache = HardKVCache(config=model.config, **EVICT)
        for seed, around in enumerate((half(), nullcontext(), half(), half(torch.float16))):
            inputs = {key: value.cuda() for key, value in tiny_prompts(3, seed=seed).items()}
            cache.reset()
            with around:
                actual = model.generate(**inputs, **{CACHE: cache}, custom_generate=graphed, compile=compile, **options)
                twin = HardKVCache(config=model.config, **EVICT)
                expected = model.generate(**inputs, **{CACHE: twin}, **options)
            trash = [torch.full((1 << 20,), torch.nan) for _ in range(8)]  # what the block has freed is written to
            del trash
            logits = (torch.stack(each.logits)[:4] for each in (actual, expected))
            torch.testing.assert_close(*logits, rtol=0, atol=TOLERANCE[torch.bfloat16])
        assert cache.stats().captures >= 3

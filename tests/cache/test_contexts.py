"""Test that settings of the caller's process or block do not change our arithmetic: results are equal bit by bit.

For autocast, which changes what the model itself computes, see test_autocast.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from hardkv import HardKVCache, calibrate, graphed
from hardkv.cache.argument import CACHE
from hardkv.selectors import AdaKV, Risk, RiskCurves, TopP, fit_temperatures
from hardkv.selectors.budgets.curves import reach
from tests.models.tiny import random_ids, random_normal

EVICT = dict(budget=8, window=4, sinks=1, interval=3)
SETTINGS = {
    "rkv": dict(scorer="rkv"),
    "online": dict(scorer="snapkv", budget=TopP(0.6, floor=6, cap=12), calibration="online", refit=2, patience=1),
    "adakv, offloaded": dict(scorer="attention", budget=AdaKV(9), offload=True),
}


@contextmanager
def setting(get: Callable[[], Any], set_: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


class Nothing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def default_dtype(dtype: torch.dtype) -> Callable[[], Any]:
    return partial(setting, torch.get_default_dtype, torch.set_default_dtype, dtype)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "default dtype float64": default_dtype(torch.float64),
    "default dtype bfloat16": default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "a torch function mode": Nothing,
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic algorithms": partial(
        setting, torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "saved tensors on the CPU": torch.autograd.graph.save_on_cpu,
    "float32 products of medium precision": partial(
        setting, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
}

every_context = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
# Of the slower tests.
FEW = [name for name in CONTEXTS if "default" in name or name in ("inference mode", "deterministic algorithms")]


def run(model: Any, cache: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Logits of generate()."""
    defaults = dict(max_new_tokens=14, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return torch.stack(model.generate(**inputs, **{CACHE: cache}, **(defaults | options)).logits)


def told(cache: HardKVCache) -> str:
    """Return what every head holds, and its temperature."""
    return str([[cache.kept(layer.layer_idx) for layer in cache._compressed], cache.stats().temperatures])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@every_context
def test_a_generation(context, settings, tiny_model, tiny_prompts):
    model, inputs, results = tiny_model("qwen3"), tiny_prompts(3), []
    for around in (nullcontext, context):
        cache = HardKVCache(config=model.config, **(EVICT | settings))
        with around():
            logits = run(model, cache, inputs)
            cache.crop(-1)
            cache.batch_select_indices(torch.tensor([2, 0], device=logits.device))
        results.append((logits, told(cache)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("context", map(CONTEXTS.get, FEW), ids=FEW)
def test_static_steps(context, tiny_model, tiny_prompts):
    """With layers that slide, which become static windows."""
    model, inputs, results = tiny_model("gemma3"), tiny_prompts(3), []
    for around in (nullcontext, context):
        cache = HardKVCache(config=model.config, **EVICT)
        with around():
            logits = run(model, cache, inputs, custom_generate=graphed)
        results.append((logits, told(cache)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("context", map(CONTEXTS.get, FEW), ids=FEW)
def test_calibration_and_its_budget(context, tiny_model):
    """Fits, curves, and counts by them, of sequences within the curves' length and beyond."""
    texts = [random_ids(60, seed=seed) for seed in range(2)]
    model, results = tiny_model("qwen3", num_hidden_layers=2), []
    for around in (nullcontext, context):
        with around():
            options = dict(window=4, sinks=1, interval=6, scorer="snapkv", progress=False)
            measured = calibrate(model, texts, **options)
            idle = RiskCurves(measured.counts, measured.risk * torch.tensor([0.0, 1.0], device="cpu")[:, None])
            counts = [  # one head of `idle` gets its floor, of 0.29 * 100 and 0.29 * 2005 tokens
                Risk(n, floor=0.29).allocation(curves, length, 5)
                for n, length in ((20, 50), (105, 400), (2010, 9000))
                for curves in (measured.curves, idle)
            ]
            shares = reach(torch.arange(1, 600, 7, dtype=torch.float64, device="cpu"), torch.tensor(777, device="cpu"))
        results.append([measured.temperatures, measured.residuals, measured.risk, measured.kept, *counts, shares])
    assert results[0][0].ne(1.0).any()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("solver", ["adam", "bisect"])
@every_context
def test_fits(context, solver):
    """Among them ties, whose mass at the ends of the temperatures' range is a quotient of counts."""
    z = random_normal(6, 2, 300, seed=0)
    z[:3] = z[:3].round()
    reference = random_normal(6, 2, 300, seed=1).mul(2).softmax(-1)
    expected = fit_temperatures(z, reference, 0.9, solver=solver)
    with context():
        actual = fit_temperatures(z, reference, 0.9, solver=solver)
    for one, other in zip(vars(actual).values(), vars(expected).values(), strict=True):
        assert torch.equal(one, other)


def test_keys_without_numbers(tiny_model):
    """Refused by name, and nothing is held."""
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids = mode.from_tensor(torch.full((1, 12), 5))
        with pytest.raises(NotImplementedError, match="FakeTensorMode, which have no numbers"):
            model(ids, **{CACHE: cache})
    with pytest.raises(NotImplementedError, match="on the meta device"):
        cache.update(*torch.empty(2, 1, 2, 12, 8, device="meta"), 0)
    assert cache.get_seq_length() == 0
    assert model(torch.full((1, 12), 5), **{CACHE: cache}).logits.isfinite().all()

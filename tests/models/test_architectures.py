"""Every type that transformers lists as a causal language model: supported, or refused for a reason; never wrong.

What is compared, and against what, stands in probe.py; the committed results in docs/compatibility.json.
"""

import functools

import pytest
import torch
from transformers import DynamicCache

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.cache.model import Traits
from hardkv.decoding import fixed
from tests.models import compatibility
from tests.models.probe import (
    NEW,
    NO_CACHE,
    NOT_BUILT,
    PROMPT,
    REFUSED,
    SUPPORTED,
    YES,
    Defect,
    autocast_rounding,
    probe,
    probe_bits,
    probe_graphed,
    rounding,
)
from tests.models.tiny import TYPES, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about tiny configs
# Of every kind one; tests of the others are slow.
KINDS = ["llama", "deepseek_v3", "gemma2", "llama4", "mistral", "qwen2_moe", "qwen3_next", "recurrent_gemma", "whisper"]
OF_EVERY_KIND = [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in TYPES]
SUPPORTED_TYPES = [
    name for name, verdict in (compatibility.committed() or {}).items() if verdict["status"] == SUPPORTED
]
# Whose own code stores float32 beside bfloat16, with any cache.
NO_AUTOCAST = ["dbrx", "xmod"]
# 0.9 quantiles, of logits of a few units: a rounding may move a token to other experts, and change it altogether
HALF = {torch.bfloat16: 0.05, torch.float16: 0.006}


@functools.cache
def verdict_of(model_type: str):
    return probe(model_type)


@pytest.fixture
def installed(model_type):
    """Skip a model that needs a package that is not installed (timm)."""
    try:
        tiny_model(model_type)
    except ImportError as error:
        if "timm" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("model_type", OF_EVERY_KIND)
def test_architecture(model_type):
    verdict, committed = verdict_of(model_type), compatibility.committed()
    if committed is not None and not verdict.reason.startswith("ImportError"):
        expected = committed[model_type]
        assert verdict.status == expected["status"], verdict.reason
        assert (verdict.compressed, verdict.layers) == (expected["compressed"], expected["layers"])


@pytest.mark.parametrize("model_type", OF_EVERY_KIND)
def test_architecture_on_eager_attention(model_type):
    if verdict_of(model_type).status == SUPPORTED:
        assert probe(model_type, "eager").status == SUPPORTED
    else:  # must not become wrong either
        assert probe(model_type, "eager").status in (verdict_of(model_type).status, NOT_BUILT)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("model_type", OF_EVERY_KIND)
def test_architecture_in_half_precision(model_type, dtype):
    if verdict_of(model_type).status == SUPPORTED:
        assert rounding(model_type, dtype).abs().quantile(0.9) < HALF[dtype]
    else:
        assert verdict_of(model_type).reason


@pytest.mark.parametrize("model_type", [each for each in OF_EVERY_KIND if each.values[0] in SUPPORTED_TYPES])
def test_architecture_with_bits(model_type, installed):
    """Attention over codes, with keys and values of unequal bits; only latents are refused."""
    model = tiny_model(model_type)
    if Traits.of(model.config).latent:
        assert "has latent attention (MLA)" in probe_bits(model, 4)
        return
    assert probe_bits(model, (8, 3)) == YES
    if compatibility.committed()[model_type]["graphed"] == YES:
        assert probe_graphed(model, bits=4) == YES


@pytest.mark.parametrize(
    "model_type",
    [each for each in OF_EVERY_KIND if each.values[0] in SUPPORTED_TYPES and each.values[0] not in NO_AUTOCAST],
)
def test_architecture_under_autocast(model_type, installed):
    assert autocast_rounding(model_type).abs().quantile(0.9) < HALF[torch.bfloat16]


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in compatibility.graphable()],
)
def test_architecture_graphed(model_type, installed):
    """By static steps as by generate()'s own loop, or refused; as the committed table says."""
    assert probe_graphed(tiny_model(model_type)) == compatibility.committed()[model_type]["graphed"]


def test_how_many_are_supported():
    committed = compatibility.committed()  # what test_architecture compares each with
    statuses = [verdict_of(each).status if committed is None else committed[each]["status"] for each in TYPES]
    assert statuses.count(SUPPORTED) >= 120
    assert statuses.count(NOT_BUILT) + statuses.count(NO_CACHE) < 25


def test_the_page_shows_the_results():
    results = compatibility.load()
    assert compatibility.PAGE.read_text() == compatibility.page(results), "run python -m tests.models.compatibility"
    assert all(verdict["reason"] for table in results.values() for verdict in table.values() if not verdict["layers"])


# ---------------------------------------------------------------------------------------------- the probe itself


def test_the_probe_notices_wrong_attention(monkeypatch):
    """One head that attends to a token which the cache says it does not hold, by one slot."""
    kept = HardKVCache.kept

    def off_by_one(self, layer_idx):
        return [[head + (head == 2) for head in heads] for heads in kept(self, layer_idx)]

    monkeypatch.setattr(HardKVCache, "kept", off_by_one)
    with pytest.raises(Defect, match="evicted: logits differ"):
        probe("llama")


def test_the_probe_notices_wrong_static_steps(monkeypatch):
    """A step whose queries are never observed keeps other tokens at the next event."""
    append_step = fixed.append_step

    def forgets(*args):
        append_step(*args[:6], torch.zeros_like(args[6]), *args[7:])

    monkeypatch.setattr(fixed, "append_step", forgets)
    with pytest.raises(Defect, match="graphed"):
        probe_graphed(tiny_model("llama"))


@pytest.mark.parametrize("step", [3, PROMPT])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_the_probe_notices_a_cache_that_is_dropped_later(monkeypatch, model_type, step):
    """By a model that puts another, filled one in its place in the middle of a generation: the logits stay right."""
    model = tiny_model(model_type)
    prepare, hold, steps = type(model).prepare_inputs_for_generation, [], []

    def replace(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        name = "cache" if "cache" in inputs else "past_key_values"
        if not isinstance(inputs[name], HardKVCache):
            return inputs
        steps.append(1)
        if len(steps) == 1:
            hold.append(DynamicCache(config=self.config))
        if len(steps) == step:
            ids = args[0] if args else kwargs["input_ids"]
            positions = (kwargs["attention_mask"].cumsum(1) - 1).clamp(0)
            given = {"attention_mask": kwargs["attention_mask"][:, :-1], "position_ids": positions[:, :-1]}
            self(ids[:, :-1], **given, **{CACHE: hold[0]})
            inputs[name] = hold[0]
        return inputs

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", replace)
    with pytest.raises(Defect, match=rf"gave the cache {PROMPT + step - 2} of {PROMPT + NEW - 1} columns"):
        probe(model_type)


def test_the_probe_notices_errors_that_are_not_ours(monkeypatch):
    monkeypatch.setattr(HardKVCache, "get_mask_sizes", lambda self, *_: self.nonsense)
    with pytest.raises(Defect, match="obscure AttributeError"):
        probe("llama")


def test_the_probe_notices_a_cache_that_does_nothing(monkeypatch):
    monkeypatch.setattr(HardKVCache, "_warn", lambda *_: None)
    with pytest.raises(Defect, match="does not say so"):
        probe("mistral")


@pytest.mark.slow
def test_refusals_name_the_way_out():
    reasons = [verdict_of(model_type).reason for model_type in TYPES if verdict_of(model_type).status == REFUSED]
    assert len(reasons) > 10
    for reason in reasons:
        assert reason.startswith(("UnroutedKVError", "NotImplementedError", "RuntimeError")), reason
        assert "DynamicCache" in reason


def test_tiny_models_are_the_same_every_time():
    first, second = (dict(tiny_model("qwen3_next").named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

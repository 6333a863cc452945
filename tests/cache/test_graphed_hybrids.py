"""Test static steps of other kinds of layers: sliding windows, linear attention, shared keys, latents.

Compare with generate()'s own loop, as in test_graphed.py. On a CPU steps are recorded and replayed like a CUDA graph;
with HARDKV_TEST_DEVICE=cuda they are a CUDA graph.
"""

from contextlib import nullcontext

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import CacheLayerMixin

import hardkv.decoding.generate as module
from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.cache.layer import HardKVLayer
from hardkv.decoding.generate import graphed
from hardkv.decoding.sliding import StaticWindow
from tests.cache.conftest import generate_logits, make_prompts
from tests.cache.replays import replaying
from tests.cache.test_graphed import EVICT, ON_GPU, EndAt, Interrupt
from tests.models.probe import as_lists, uncompressed
from tests.models.tiny import WINDOW, tiny_model

SLIDING = ["gemma2", "gemma3_text", "gpt_oss", "mistral", "gemma3n_text"]
LINEAR = ["qwen3_next", "falcon_h1", "lfm2", "jamba"]
LATENT = ["deepseek_v2", "deepseek_v3", "kimi_linear"]  # the last has linear attention too
EXACT = {"atol": 5e-6, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Silence the warning that a Mistral with only sliding layers has nothing to compress."""
    monkeypatch.setattr(HardKVCache, "_warn", lambda *_: None)


def capturable(name):
    """Skip cases that a real capture refuses and the imitation on a CPU cannot detect."""
    if ON_GPU and name == "gemma3n_text" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("its forward copies a number from the host to the GPU there")


def both(model):
    return [HardKVCache(config=model.config, **EVICT) for _ in range(2)]


def alike(one, other):
    """Check for the same kept tokens, and the same state of transformers' own layers."""
    assert one.get_seq_length() == other.get_seq_length()
    for idx, (layer, other_layer) in enumerate(zip(one.layers, other.layers, strict=True)):
        if isinstance(layer, HardKVLayer):
            assert as_lists(one.kept(idx)) == as_lists(other.kept(idx))
        if isinstance(layer, CacheLayerMixin):
            assert layer.get_seq_length() == other_layer.get_seq_length()
        for held, other_held in zip(uncompressed(layer), uncompressed(other_layer), strict=True):
            torch.testing.assert_close(other_held, held, **EXACT)


def same(model, inputs, new, **kwargs):
    """Run both loops; return the caches, and the number of replayed steps."""
    caches = both(model)
    tokens, logits = generate_logits(model, caches[0], inputs, new, **kwargs)
    with nullcontext([]) if ON_GPU else replaying() as replays:
        ours, our_logits = generate_logits(model, caches[1], inputs, new, custom_generate=graphed, **kwargs)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, **EXACT)
    alike(*caches)
    return caches, caches[1].stats().replays if ON_GPU else len(replays)


@pytest.mark.parametrize("length", [2, WINDOW, 20])
@pytest.mark.parametrize("name", SLIDING)
def test_windows(name, length):
    """Use prompts below, at and beyond the window, one padded by two thirds; the shortest grows through all lengths."""
    capturable(name)
    caches, replays = same(tiny_model(name), make_prompts(3, length=length), 2 * WINDOW)
    assert replays >= WINDOW
    layer = next(layer for layer in caches[1].layers if layer.is_sliding)
    assert layer.keys.shape[2] == WINDOW - 1


@pytest.mark.parametrize("name", [*LINEAR, *LATENT])
def test_states_and_latents(name):
    assert same(tiny_model(name), make_prompts(3), 12)[1] >= 6


@pytest.mark.parametrize("name", ["gemma2", "mistral", "gemma3n_text", "qwen3_next"])
def test_turns_with_pads_between(name):
    """A later turn has pads within the window; eager steps follow, then static steps again."""
    capturable(name)
    model = tiny_model(name)
    caches = both(model)
    tokens = [make_prompts(2)["input_ids"]] * 2
    mask = make_prompts(2)["attention_mask"]
    for turn, new in enumerate((3, 9, 5)):
        for i, extra in enumerate(({}, {"custom_generate": graphed})):
            with nullcontext([]) if ON_GPU else replaying() as replays:
                tokens[i] = model.generate(
                    tokens[i],
                    attention_mask=mask,
                    **{CACHE: caches[i]},
                    max_new_tokens=new,
                    do_sample=False,
                    **(extra if turn != 1 else {}),
                )
        assert ON_GPU or bool(replays) == (turn != 1)
        assert torch.equal(*tokens)
        alike(*caches)
        more = make_prompts(2, length=3, seed=turn)
        mask = torch.nn.functional.pad(mask, (0, new), value=1)
        mask = torch.cat([mask, more["attention_mask"]], 1)
        tokens = [torch.cat([each, more["input_ids"]], 1) for each in tokens]


def test_a_ring_serves_again_after_reset():
    model, inputs = tiny_model("gemma2"), make_prompts(2)
    cache = HardKVCache(config=model.config, **EVICT)
    first, _ = generate_logits(model, cache, inputs, 9, custom_generate=graphed)
    decoding, held = cache.steps.decoding, cache.nbytes()
    cache.reset()
    assert torch.equal(generate_logits(model, cache, inputs, 9, custom_generate=graphed)[0], first)
    assert cache.steps.decoding is decoding
    assert cache.nbytes() == held


@pytest.mark.parametrize("name", ["gemma2", "mistral", "qwen3_next"])
@pytest.mark.parametrize("more", [1, 4, 5])
def test_a_step_too_many(name, more, monkeypatch):
    """The host draws and steps before it knows that all have ended: only where a step can be taken back."""
    monkeypatch.setattr(module, "runs_ahead", lambda device: True)
    inputs = make_prompts(2)
    criteria = StoppingCriteriaList([EndAt(inputs["input_ids"].shape[1] + more)])
    same(tiny_model(name), inputs, 12, stopping_criteria=criteria)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_next"])
def test_an_interrupt_between_steps(name):
    model, inputs = tiny_model(name), make_prompts(2)
    cache, other = both(model)
    with pytest.raises(KeyboardInterrupt):
        generate_logits(
            model, cache, inputs, 12, custom_generate=graphed, logits_processor=LogitsProcessorList([Interrupt(5)])
        )
    generate_logits(model, other, inputs, 5)
    alike(other, cache)


@pytest.mark.skipif(ON_GPU, reason="a replay comes whole or not at all")
@pytest.mark.parametrize("name", ["gemma2", "qwen3_next"])
def test_a_step_that_fails(name):
    """A failed step leaves nothing; but linear attention cannot go back, so its cache is unusable until reset."""
    model, inputs = tiny_model(name), make_prompts(2)
    cache, other = both(model)
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError

    hook = model.model.layers[-1].mlp.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        generate_logits(model, cache, inputs, 12, custom_generate=graphed)
    hook.remove()
    if name == "gemma2":
        generate_logits(model, other, inputs, 3)
        alike(other, cache)
        return
    with pytest.raises(RuntimeError, match="midway"):
        model(inputs["input_ids"], **{CACHE: cache})
    cache.reset()
    tokens, _ = generate_logits(model, other, inputs, 12)
    assert torch.equal(generate_logits(model, cache, inputs, 12, custom_generate=graphed)[0], tokens)
    alike(other, cache)


def test_what_windows_hold_is_counted():
    model, inputs = tiny_model("gemma2"), make_prompts(2)
    caches, _ = same(model, inputs, 9)
    windows = caches[1].steps.decoding.windows.values()
    assert len(windows) == sum(layer.is_sliding for layer in caches[1].layers)
    ring = 2 * 2 * WINDOW * 8 * 4 * 2  # sequences, heads, slots, head_dim, float32, keys and values
    assert all(sum(t.nbytes for t in window.tensors()) >= ring for window in windows)
    held = caches[1].nbytes()
    caches[1].steps.decoding.windows.clear()
    assert held - caches[1].nbytes() >= ring * 2


@pytest.mark.skipif(ON_GPU, reason="of what stands in for a GPU")
def test_replays_notice_what_python_decides(monkeypatch):
    """The ring's slot is counted on the host, so a replay must notice it."""
    attend = StaticWindow.attend

    def by_the_host(self, query: Tensor, keys: Tensor, values: Tensor, column: Tensor, *args, **kwargs):
        return attend(self, query, keys, values, torch.tensor([self.layer.cumulative_length]), *args, **kwargs)

    monkeypatch.setattr(StaticWindow, "attend", by_the_host)
    with pytest.raises(AssertionError):
        same(tiny_model("gemma2"), make_prompts(2), 9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama4_text", "chunked attention"),
        ("deepseek_v32", "DynamicIndexedLayer"),
        ("moshi", "sliding window"),
        ("recurrent_gemma", "states in its modules"),
    ],
)
def test_models_that_cannot(name, reason):
    model = tiny_model(name)
    cache = HardKVCache(config=model.config, **EVICT)
    with pytest.raises(NotImplementedError, match=f"(?s){reason}.*leave"):
        generate_logits(model, cache, make_prompts(2), 4, custom_generate=graphed)


def test_a_cache_that_records_the_past():
    model = tiny_model("gemma2")
    cache = HardKVCache(config=model.config, **EVICT)
    cache.activate_past_recording()
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        generate_logits(model, cache, make_prompts(2), 4, custom_generate=graphed)


def test_masks_that_are_more_than_padding(monkeypatch):
    """A window must know which of its columns are pads."""
    model = tiny_model("gemma2")
    prepare, calls = model.prepare_inputs_for_generation, []

    def with_own_mask(*args, **kwargs):
        calls.append(args)
        inputs = prepare(*args, **kwargs)
        return inputs if len(calls) == 1 else inputs | {"attention_mask": torch.ones(2, 1, 1, 14)}

    monkeypatch.setattr(model, "prepare_inputs_for_generation", with_own_mask)
    cache = HardKVCache(config=model.config, **EVICT)
    with pytest.raises(NotImplementedError, match="two dimensions"):
        generate_logits(model, cache, make_prompts(2), 4, custom_generate=graphed)

"""Test the routing into transformers: registries, configs, handles and masks."""

import copy
import json
import operator
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
)
from transformers.integrations.eager_paged import eager_paged_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hardkv import HardKVCache, UnroutedKVError
from hardkv.cache.argument import CACHE
from hardkv.cache.routing.masks import HardKVMask, mask_of_new, padding_of
from tests.models.tiny import random_normal, randomize, tiny_arguments

VOCABULARY = 98
HOLD_ALL = dict(budget=1000, window=4, sinks=1, interval=3)  # an event every 3 tokens, and nothing is lost
EVICT = dict(budget=8, window=4, sinks=1, interval=3)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def generate(model: Any, inputs: dict[str, Tensor], cache: Any, **options: Any) -> Any:
    defaults = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return model.generate(**inputs, **{CACHE: cache}, **(defaults | options))


def assert_same_logits(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=2e-5)


def assert_parity(model: Any, inputs: dict[str, Tensor], **options: Any) -> HardKVCache:
    """Events without a loss give DynamicCache's logits; events with losses run. Returns the cache that lost tokens."""
    expected = generate(model, inputs, DynamicCache(config=model.config), **options)
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    assert_same_logits(generate(model, inputs, cache, **options), expected)
    assert cache.stats().events > 1
    cache = HardKVCache(config=model.config, **EVICT)
    generate(model, inputs, cache, **options)
    assert int(cache.lengths().max()) < EVICT["budget"] + EVICT["interval"]
    return cache


# ---------------------------------------------------------------------------------------------- registries


def test_every_entry_is_wrapped_in_place_and_paged_ones_are_not():
    HardKVCache()  # wraps what other tests registered
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is sdpa_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is sdpa_mask
    assert ALL_ATTENTION_FUNCTIONS["paged|eager"] is eager_paged_attention_forward
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        names = set(functions.valid_keys())
        assert {"sdpa", "flash_attention_2", "flex_attention"} <= names
        unwrapped = {name for name in names if not hasattr(functions[name], "_hardkv")}
        assert unwrapped == {name for name in names if name.startswith("paged|")}


@pytest.mark.parametrize("interface", [AttentionInterface, AttentionMaskInterface])
@pytest.mark.parametrize("mapping", [None, ["sdpa"]], ids=str)
def test_a_registry_that_transformers_keeps_differently(interface, mapping, monkeypatch):
    monkeypatch.setattr(interface, "_global_mapping", mapping)
    version = re.escape(transformers.__version__)
    with pytest.raises(ImportError, match=f"transformers {version} keeps its attention registry differently"):
        HardKVCache()


def test_constructing_a_hundred_caches_wraps_once(tiny_model):
    model = tiny_model("llama", "sdpa")
    HardKVCache(config=model.config)
    attention, masks = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    for _ in range(100):
        HardKVCache(config=model.config)
    assert dict(AttentionInterface._global_mapping) == attention
    assert dict(AttentionMaskInterface._global_mapping) == masks


def test_an_implementation_registered_later_is_wrapped_by_the_next_constructor(registries, tiny_model, tiny_prompts):
    calls = []

    def later(module, query, key, value, attention_mask, **kwargs):
        calls.append(type(key))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("later", later)
    AttentionMaskInterface.register("later", sdpa_mask)
    model = tiny_model("llama", "later")
    assert_parity(model, tiny_prompts(3))
    assert set(calls) == {Tensor}
    assert ALL_ATTENTION_FUNCTIONS["later"].__wrapped__ is later


def test_an_implementation_registered_after_the_cache_was_built_is_loud(registries, tiny_model, tiny_prompts):
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config)
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    with pytest.raises(UnroutedKVError, match=r"HardKVCache\(config=model.config\)"):
        model(**tiny_prompts(1), **{CACHE: cache})
    # the next constructor wraps it again
    assert_parity(model, tiny_prompts(1))


def test_a_mask_function_that_is_missing_never_loses_padding_silently(registries, tiny_model, tiny_prompts):
    """Without a mask entry transformers passes no mask at all; a padded batch must not run like that."""
    AttentionInterface.register("maskless", sdpa_attention_forward)
    model = tiny_model("llama", "maskless")
    expected = model(**tiny_prompts(3), **{CACHE: DynamicCache(config=model.config)}).logits
    actual = model(**tiny_prompts(3), **{CACHE: HardKVCache(config=model.config)}).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)  # as wrong as it is without us, not more


# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_the_config_is_untouched(attn, tiny_model, tiny_prompts):
    model = tiny_model("qwen3", attn)
    before, attributes = model.config.to_dict(), dict(vars(model.config))
    generate(model, tiny_prompts(1), HardKVCache(config=model.config))
    assert model.config.to_dict() == before
    assert dict(vars(model.config)) == attributes
    assert model.config._attn_implementation == attn


def image_model(attn: str) -> Gemma3ForConditionalGeneration:
    text = tiny_arguments(Gemma3TextConfig())
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=96,
        boi_token_index=94,
        eoi_token_index=95,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = randomize(Gemma3ForConditionalGeneration(config).eval())
    model.set_attn_implementation(attn)
    return model


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_images_are_seen_both_ways_and_the_configs_stay(attn):
    model = image_model(attn)
    ids = torch.tensor(
        [[0, 0, 1, 5, 6, 94, 96, 96, 96, 96, 95, 7, 8], [1, 9, 10, 11, 12, 94, 96, 96, 96, 96, 95, 17, 18]]
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "token_type_ids": (ids == 96).long(),
        "pixel_values": random_normal(2, 3, 28, 28),
    }
    assert_parity(model, inputs)
    for config in (model.config, model.config.vision_config, model.config.text_config):
        assert config._attn_implementation == attn


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_saving_a_model_leaves_no_trace(attn, tmp_path, tiny_model, tiny_prompts):
    model = tiny_model("llama", attn)
    model.save_pretrained(tmp_path / "before")
    generate(model, tiny_prompts(1), HardKVCache(config=model.config))
    model.save_pretrained(tmp_path / "after")
    for path in sorted((tmp_path / "before").glob("*.json")):
        assert json.loads(path.read_text()) == json.loads((tmp_path / "after" / path.name).read_text())
        assert "hardkv" not in path.read_text()
    reloaded = type(model).from_pretrained(tmp_path / "after")
    assert "hardkv" not in reloaded.config._attn_implementation


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_deepcopied_config(attn, tiny_model, tiny_prompts):
    model = tiny_model("llama", attn)
    expected = generate(model, tiny_prompts(3), DynamicCache(config=model.config))
    cache = HardKVCache(config=copy.deepcopy(model.config), **HOLD_ALL)
    assert_same_logits(generate(model, tiny_prompts(3), cache), expected)


def test_an_eager_model_and_a_cache_without_its_config(tiny_model, tiny_prompts):
    model = tiny_model("llama", "eager")
    expected = generate(model, tiny_prompts(3), DynamicCache())
    assert_same_logits(generate(model, tiny_prompts(3), HardKVCache(**HOLD_ALL)), expected)


def test_switching_the_implementation_after_the_cache_was_built(tiny_model, tiny_prompts):
    model = tiny_model("llama", "eager")
    expected = generate(model, tiny_prompts(1), DynamicCache(config=model.config))
    cache = HardKVCache(config=model.config, **HOLD_ALL)
    for attn in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(attn)
        assert_same_logits(generate(model, tiny_prompts(1), cache), expected)
        cache.reset()


@pytest.mark.parametrize("alive", [True, False], ids=["beside a cache", "after the cache"])
def test_generate_batch_of_an_eager_model(alive, tiny_model, tiny_prompts):
    """Continuous batching has no cache of ours, and finds the model as it was."""
    model, prompts = tiny_model("llama", "eager"), [[5, 6, 7, 8], [9, 10, 11]]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [
        model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist() for ids in prompts
    ]
    cache = HardKVCache(config=model.config, **EVICT)
    generate(model, tiny_prompts(1), cache)
    if not alive:
        del cache
    room = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)  # by default, all of the host's memory
    out = model.generate_batch(prompts, generation_config=config, continuous_batching_config=room)
    assert [each.generated_tokens for each in out.values()] == expected


# Reads a model that was pickled while a cache of ours was alive, where hardkv is not imported.
WITHOUT_HARDKV = """
import pickle, sys
import torch
with open(sys.argv[1], "rb") as file:
    model = pickle.load(file)
with torch.no_grad():
    print(model(torch.tensor([[5, 6, 7]])).logits.argmax(-1).tolist())
assert "hardkv" not in sys.modules
"""


def test_a_pickled_eager_model_needs_no_hardkv(tmp_path, tiny_model, tiny_prompts):
    model = tiny_model("llama", "eager")
    cache = HardKVCache(config=model.config, **EVICT)
    generate(model, tiny_prompts(1), cache)
    expected = model(torch.tensor([[5, 6, 7]])).logits.argmax(-1).tolist()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    command = [sys.executable, "-c", WITHOUT_HARDKV, str(tmp_path / "model.pkl")]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == str(expected)


# Goes on with a stored cache and a new eager model, for which no cache was ever built in this process.
GOES_ON = """
import sys
import torch
from hardkv.cache.argument import CACHE
from tests.cache.conftest import make_model
cache = torch.load(sys.argv[1], weights_only=False)
model = make_model("llama", "eager")
with torch.no_grad():
    print(model(torch.full((1, 1), 5), **{CACHE: cache}).logits.argmax(-1).tolist())
"""


def test_a_stored_cache_and_a_new_eager_model(tmp_path, tiny_model, tiny_prompts):
    model = tiny_model("llama", "eager")
    cache = HardKVCache(config=model.config, **EVICT)
    model(**tiny_prompts(1), **{CACHE: cache})
    torch.save(cache, tmp_path / "cache.pt")
    expected = model(torch.full((1, 1), 5), **{CACHE: cache}).logits.argmax(-1).tolist()
    command = [sys.executable, "-c", GOES_ON, str(tmp_path / "cache.pt")]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == str(expected)


@pytest.mark.parametrize("first", [0, 1])
def test_two_caches_of_one_eager_model(first, tiny_model, tiny_prompts):
    """Whichever goes first, the other goes on, and so does the model without a cache."""
    model = tiny_model("llama", "eager")
    expected = generate(model, tiny_prompts(1), DynamicCache(config=model.config))
    caches = [HardKVCache(config=model.config, **HOLD_ALL) for _ in range(2)]
    generate(model, tiny_prompts(1), caches.pop(first))
    assert_same_logits(generate(model, tiny_prompts(1), caches.pop()), expected)
    assert_same_logits(generate(model, tiny_prompts(1), DynamicCache(config=model.config)), expected)


def test_eager_attention_is_the_own_one_of_a_model_where_there_is_no_cache_of_ours():
    """Whatever a model brings as its default, under any name, and as transformers would return it."""

    def weird(module, query, key, value, attention_mask, *args, **kwargs):
        return "own", module, query, key, value, attention_mask, args, kwargs

    for attn in ("eager", None):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(attn, weird)
        assert attention("module", 1, 2, 3, None, 4, scaling=5) == (
            "own",
            "module",
            1,
            2,
            3,
            None,
            (4,),
            {"scaling": 5},
        )
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", weird) is ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", None) is None
    with pytest.raises(KeyError, match="nonsense"):
        ALL_ATTENTION_FUNCTIONS.get_interface("nonsense", weird)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_model_without_a_cache_of_ours_compiles_as_a_whole(attn, tiny_model):
    torch.compiler.reset()
    model, ids = tiny_model("qwen3", attn, num_hidden_layers=2), torch.tensor([[5, 6, 7]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    torch.compiler.reset()


def test_two_models_that_share_a_config_object(tiny_model, tiny_prompts):
    model, other = tiny_model("llama", "eager"), tiny_model("llama", "eager", seed=1)
    expected = generate(other, tiny_prompts(3), DynamicCache())
    twin = type(model)(model.config).eval()
    twin.load_state_dict(other.state_dict())
    assert twin.config is model.config
    assert_parity(model, tiny_prompts(3))
    assert torch.equal(
        torch.stack(generate(twin, tiny_prompts(3), DynamicCache()).logits), torch.stack(expected.logits)
    )


# ---------------------------------------------------------------------------------------------- handles and masks


@pytest.fixture
def handle():
    keys = torch.randn(1, 2, 5, 8, device="cpu")
    return HardKVCache().update(keys, keys, 0)[0]


@pytest.fixture
def mask(tiny_model, tiny_prompts):
    """Return the attention mask that a layer gets."""
    model, seen = tiny_model("llama", "sdpa"), []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**tiny_prompts(3), **{CACHE: HardKVCache(config=model.config)})
    return seen[0]


OTHER = torch.ones(1, 2, 5, 8)
USES = {
    "index": lambda x: x[..., 0],
    "assign": lambda x: operator.setitem(x, (..., 0), 1.0),
    "iterate": list,
    "len": len,
    "add": lambda x: x + 1,
    "subtract from": lambda x: 1 - x,
    "multiply": lambda x: x * OTHER,
    "multiplied": lambda x: OTHER * x,
    "divide": lambda x: x / 2,
    "negate": operator.neg,
    "invert": operator.invert,
    "power": lambda x: x**2,
    "matmul": lambda x: x @ x,
    "in place": lambda x: operator.iadd(x, 1),
    "compare": lambda x: x > 0,
    "and": lambda x: x & x,
    "transpose": lambda x: x.transpose(1, 2),
    "float": lambda x: x.float(),
    "view": lambda x: x.view(-1),
    "expand": lambda x: x.expand(2, -1, -1, -1),
    "data_ptr": lambda x: x.data_ptr(),
    "mT": lambda x: x.mT,
    "torch.cat": lambda x: torch.cat([x, x]),
    "torch.matmul": lambda x: torch.matmul(OTHER, x),
    "torch.where": lambda x: torch.where(x, 0.0, 1.0),
    "softmax": lambda x: F.softmax(x, -1),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(OTHER, x, x),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_any_use_of_a_handle_is_unrouted(use, handle):
    with pytest.raises(UnroutedKVError, match=r"of a HardKVCache.*HardKVCache\(config=model.config\)"):
        use(handle)


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_any_use_of_a_mask_is_unrouted(use, mask):
    with pytest.raises(UnroutedKVError, match=r"attention mask of a HardKVCache"):
        use(mask)


def test_what_a_handle_can_do(handle):
    assert handle.shape == (1, 2, 5, 8)
    assert (handle.ndim, handle.dim(), handle.size(-2), handle.size()) == (4, 4, 5, torch.Size([1, 2, 5, 8]))
    assert handle.dtype is torch.float32
    assert handle.device == torch.device("cpu")
    assert not handle.is_cuda
    assert not handle.requires_grad
    assert handle.to("cpu", non_blocking=True).shape == handle.shape
    assert handle.contiguous().shape == handle.shape
    assert "(1, 2, 5, 8)" in repr(handle)
    assert not isinstance(handle, Tensor)


def test_what_a_layer_shows_of_its_keys_and_values(tiny_model, tiny_prompts):
    """Models that look into the cache see how much there is, and cannot read it."""
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config, **EVICT)
    layer = cache.layers[0]
    assert layer.keys is None
    assert layer.values is None
    model(**tiny_prompts(3), **{CACHE: cache})
    for shown in (layer.keys, layer.values):
        assert shown.shape == (3, 2, 13, 8)
        assert shown.numel() == 3 * 2 * 13 * 8
        with pytest.raises(UnroutedKVError, match="of a HardKVCache"):
            torch.cat([shown, shown])
        with pytest.raises(UnroutedKVError, match="of a HardKVCache"):
            ALL_ATTENTION_FUNCTIONS["sdpa"](
                model.model.layers[0].self_attn, torch.randn(3, 4, 1, 8), shown, shown, None
            )
    cache.reset()
    assert layer.keys is None


def test_a_handle_shows_the_logical_length(tiny_model, tiny_prompts):
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config, **EVICT)
    model(**tiny_prompts(1), **{CACHE: cache})
    length = tiny_prompts(1)["input_ids"].shape[1]
    keys = torch.zeros(1, 2, 3, 8)
    assert cache.update(keys, keys, 0)[0].shape == (1, 2, length + 3, 8)


def test_what_a_mask_can_do(mask, tiny_prompts):
    assert mask.contiguous() is mask
    assert mask.to("cpu") is mask
    assert torch.equal(mask.padding, tiny_prompts(3)["attention_mask"].bool())
    assert mask.original.shape[-2:] == (13, 13)
    assert mask.to(torch.float16).padding.dtype is torch.bool
    moved = mask.to("meta")
    assert moved.padding.device.type == "meta"
    assert moved.original.device.type == "meta"


# ---------------------------------------------------------------------------------------------- masks of the user


def causal_4d(attention_mask: Tensor, start: int = 0) -> Tensor:
    """Bool `[B, 1, q, columns]`, causal and padded; `q` columns from `start` on are the queries."""
    columns = attention_mask.shape[1]
    causal = torch.ones(columns, columns, dtype=torch.bool).tril()[start:]
    return causal[None, None] & attention_mask[:, None, None].bool()


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.fixture
def prefilled(tiny_model, tiny_prompts):
    """A model and two caches, ours and transformers', that hold a left-padded prompt; and the prompt's mask."""
    model, inputs = tiny_model("llama", "sdpa"), tiny_prompts(3)
    cache, dense = HardKVCache(config=model.config, **HOLD_ALL), DynamicCache(config=model.config)
    for past in (cache, dense):
        model(**inputs, **{CACHE: past})
    return model, cache, dense, inputs["attention_mask"]


@pytest.mark.parametrize("form", [lambda mask: mask, additive], ids=["bool", "additive"])
def test_a_4d_mask_of_the_prompt(form, tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama", "sdpa"), tiny_prompts(3)
    attention_mask = inputs["attention_mask"]
    expected = model(**inputs, **{CACHE: DynamicCache(config=model.config)}).logits[:, -1]
    cache = HardKVCache(config=model.config, **EVICT)
    # a padded query must see something, or its softmax is NaN
    mask = causal_4d(attention_mask) | torch.eye(13, dtype=torch.bool)
    position_ids = attention_mask.cumsum(1).sub(1).clamp_min(0)
    actual = model(inputs["input_ids"], attention_mask=form(mask), position_ids=position_ids, **{CACHE: cache}).logits[
        :, -1
    ]
    expected = model(**inputs, position_ids=position_ids, **{CACHE: DynamicCache(config=model.config)}).logits[:, -1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    for row, heads in zip(attention_mask, cache.kept(0), strict=True):
        for kept in heads:
            assert row[kept].all(), "padding was stored"


@pytest.mark.parametrize("form", [lambda mask: mask, additive], ids=["bool", "additive"])
def test_new_tokens_that_see_each_other_both_ways(form, prefilled):
    """A picture in a later chunk: its tokens 1 to 3 see each other, whatever their order."""
    model, cache, dense, attention_mask = prefilled
    attention_mask = torch.cat([attention_mask, attention_mask.new_ones(3, 5)], 1)
    mask = causal_4d(attention_mask, start=13)
    mask[..., 1:4, 14:17] = True
    ids = torch.arange(15).view(3, 5) + 20
    actual = model(ids, attention_mask=form(mask), **{CACHE: cache}).logits
    expected = model(ids, attention_mask=form(mask), **{CACHE: dense}).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    causal = model(ids, attention_mask=causal_4d(attention_mask, 13), **{CACHE: dense_copy(dense, 5)}).logits
    assert (causal[:, 1] - expected[:, 1]).abs().max() > 1e-3, "the mask makes no difference here"


def dense_copy(cache: DynamicCache, remove: int) -> DynamicCache:
    """Return a copy of a DynamicCache without the newest tokens."""
    twin = copy.deepcopy(cache)
    twin.crop(-remove)
    return twin


def hide_from_first(mask: Tensor) -> None:
    mask[1, :, 0, 7:10] = False


def hide_from_last(mask: Tensor) -> None:
    mask[1, :, -1, 7:10] = False


def hide_in_one_head(mask: Tensor) -> None:
    mask[1, 2, 1, 15] = True


@pytest.mark.parametrize(
    ("hide", "q_len"),
    [(hide_from_first, 3), (hide_from_last, 3), (hide_in_one_head, 3)],
)
def test_a_later_4d_mask_that_cannot_be_followed_is_refused(hide, q_len, prefilled):
    model, cache, _, attention_mask = prefilled
    attention_mask = torch.cat([attention_mask, attention_mask.new_ones(3, q_len)], 1)
    mask = causal_4d(attention_mask, start=13).expand(-1, 4, -1, -1).clone()
    model(torch.full((3, q_len), 5), attention_mask=mask, **{CACHE: copy.deepcopy(cache)})  # fine before
    hide(mask)
    kept = [[head.tolist() for head in heads] for heads in cache.kept(0)]
    with pytest.raises(NotImplementedError, match="attention mask"):
        model(torch.full((3, q_len), 5), attention_mask=mask, **{CACHE: cache})
    assert cache.get_seq_length() == 13
    assert [[head.tolist() for head in heads] for heads in cache.kept(0)] == kept


def single_steps(model, cache, mask: Tensor, count: int) -> None:
    """Steps of one token; `mask` covers the past before the first of them."""
    for _ in range(count):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        model(torch.full((len(mask), 1), 5), attention_mask=mask, **{CACHE: cache})


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("offload", [False, True])
def test_a_2d_mask_that_hides_past_tokens_from_single_steps(late, offload, tiny_model, tiny_prompts):
    """Not followed, as the host does not look; what it reads at the next event tells."""
    model, inputs = tiny_model("llama"), tiny_prompts(3)
    cache = HardKVCache(config=model.config, offload=offload, **EVICT)
    model(**inputs, **{CACHE: cache})
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
    single_steps(model, cache, mask[:, :13], late)
    hiding = mask.clone()
    hiding[1, 12] = 0  # in the window, so that all heads hold it
    single_steps(model, cache, hiding[:, : 13 + late], 2 - late)
    spared, twin = copy.deepcopy(cache), copy.deepcopy(cache)
    with pytest.raises(NotImplementedError, match=r"hid or showed past tokens of 1 sequences.*reset\(\) it"):
        single_steps(model, cache, hiding[:, :15], 1)
    with pytest.raises(RuntimeError, match=r"reset\(\)"):  # and for good
        single_steps(model, cache, hiding[:, :16], 1)
    if late == 0:
        with pytest.raises(NotImplementedError, match="hid or showed past tokens"):  # too late to take it back
            single_steps(model, twin, mask[:, :15], 1)
        spared.batch_select_indices(torch.tensor([2, 0]))  # without the sequence that it was
        single_steps(model, spared, mask[[2, 0], :15], 1)
        assert spared.stats().events == 2
    cache.reset()
    model(**inputs, **{CACHE: cache})
    single_steps(model, cache, inputs["attention_mask"], 4)
    assert cache.stats().events == 2


@dataclass
class Columns:
    """New columns `start` to `stop` of some sequences."""

    start: int
    stop: int
    batch: int = 3


def random_4d(columns: Columns, heads: int, seed: int) -> Tensor:
    """Bool `[B, heads, q, columns]`: causal among random new tokens, the others see only the first column."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(columns.batch, heads, columns.stop - columns.start, columns.stop, generator=generator) < 0.6
    causal = torch.ones(columns.stop, columns.stop, dtype=torch.bool).tril()[columns.start :]
    real = torch.rand(columns.batch, columns.stop - columns.start, generator=generator) < 0.5
    own = torch.zeros_like(causal)
    own[range(len(own)), range(columns.start, columns.stop)] = True
    mask = (seen & causal & ~own) | (own & real[:, None, :, None])
    mask &= real[:, None, :, None]
    mask[..., 0] |= ~real[:, None, :] if columns.start else False
    return mask


@pytest.mark.parametrize("form", [lambda mask: mask, lambda mask: additive(mask) * 0.75], ids=["bool", "additive"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("columns", [Columns(0, 6), Columns(4, 8), Columns(5, 6)], ids=str)
def test_padding_is_what_the_last_new_token_does_not_see(columns, heads, form):
    for seed in range(8):
        mask = random_4d(columns, heads, seed)
        expected = torch.zeros(3, columns.stop, dtype=torch.bool)
        for b in range(3):
            for i in range(columns.stop - columns.start):
                if mask[b, :, i, columns.start + i].any():  # a token, as it sees itself
                    expected[b] = mask[b, :, i].any(0)
        assert torch.equal(padding_of(form(mask), 3, columns), expected)
        assert torch.equal(padding_of(form(mask)[:1], 3, columns), expected[:1].expand(3, -1))
    for wrong in (columns.stop - 1, columns.stop + 1):
        with pytest.raises(ValueError, match=rf"covers {wrong} columns.*seen {columns.stop}"):
            padding_of(torch.ones(3, 1, columns.stop - columns.start, wrong, dtype=torch.bool), 3, columns)
        with pytest.raises(ValueError, match=rf"covers {wrong} columns"):
            padding_of(torch.ones(3, wrong), 3, columns)


@pytest.mark.parametrize("heads", [1, 2])
def test_what_a_4d_mask_says_of_the_past(heads):
    """Of each sequence: what some and what all of its new tokens see; pads among them have no say."""
    columns, silent = Columns(4, 7), 0
    for seed in range(12):
        mask = random_4d(columns, 1, seed)
        among, past = mask_of_new(mask.expand(-1, heads, -1, -1), torch.ones(3, 7, dtype=torch.bool), columns)
        assert torch.equal(among, mask[:, 0, :, 4:])
        for b in range(3):
            told = [mask[b, 0, i, :4] for i in range(3) if mask[b, 0, i, 4 + i]]
            some, every = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
            for each in told:
                some, every = some | each, every & each
            assert torch.equal(past.some[b], some)
            assert torch.equal(past.every[b], every)
            assert bool(past.told[b]) == bool(told)
            silent += not told
    assert silent  # or it would not matter whether pads have a say


def test_what_a_2d_mask_says_of_the_past():
    """As much as it shows, if there are several new tokens; a step of one is not read."""
    padding = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    for mask in (padding, None):
        among, past = mask_of_new(mask, padding, Columns(3, 6))
        assert among is None
        assert torch.equal(past.some, padding[:, :3])
        assert torch.equal(past.every, padding[:, :3])
        assert past.told is None
    assert mask_of_new(padding, padding, Columns(5, 6)) == (None, None)
    assert mask_of_new(HardKVMask(padding, 0, lambda: pytest.fail("built")), padding, Columns(5, 6)) == (None, None)
    assert mask_of_new(None, None, Columns(3, 6)) == (None, None)
    # with a mask of ours, the causal one that transformers would have made counts too, below the padding
    full = torch.ones(6, 6, dtype=torch.bool).tril()[3:][None, None].expand(3, 1, 3, 6).clone()
    full[1, 0, :, 2] = False
    among, past = mask_of_new(HardKVMask(padding, 0, lambda: full), padding, Columns(3, 6))
    assert torch.equal(among, full[:, 0, :, 3:])
    assert torch.equal(past.some, padding[:, :3])
    assert torch.equal(past.every, padding[:, :3] & torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool())


@pytest.mark.parametrize("q_len", [1, 3])
def test_a_mask_that_adds_biases_is_refused(q_len, prefilled):
    """ALiBi and the like inside a mask: read as a plain mask it would be lost from later steps."""
    model, cache, _, attention_mask = prefilled
    attention_mask = torch.cat([attention_mask, attention_mask.new_ones(3, q_len)], 1)
    mask = additive(causal_4d(attention_mask, start=13))
    model(torch.full((3, q_len), 5), attention_mask=mask, **{CACHE: copy.deepcopy(cache)})  # fine before
    with pytest.raises(NotImplementedError, match="adds biases to attention.*use DynamicCache"):
        model(torch.full((3, q_len), 5), attention_mask=mask - 0.5, **{CACHE: cache})
    assert cache.get_seq_length() == 13
    fresh = HardKVCache(config=model.config)
    biased = additive(causal_4d(attention_mask) | torch.eye(13 + q_len, dtype=torch.bool)) - 0.5
    with pytest.raises(NotImplementedError, match="adds biases"):
        model(torch.full((3, 13 + q_len), 5), attention_mask=biased, **{CACHE: fresh})
    assert fresh.get_seq_length() == 0


@pytest.mark.parametrize("width", [1, 12, 13, 15])
def test_a_mask_of_the_wrong_width_later(width, prefilled):
    model, cache, _, _ = prefilled
    held = cache.lengths()
    with pytest.raises(ValueError, match=rf"attention_mask covers {width} columns.*over all 14 columns"):
        model(torch.full((3, 1), 5), attention_mask=torch.ones(3, width), **{CACHE: cache})
    assert cache.get_seq_length() == 13
    assert cache.lengths().equal(held)


@pytest.mark.parametrize("width", [12, 14])
def test_a_mask_of_the_wrong_width_first(width, tiny_model, tiny_prompts):
    model = tiny_model("llama", "sdpa")
    cache = HardKVCache(config=model.config)
    with pytest.raises(ValueError, match=rf"attention_mask covers {width} columns.*over all 13 columns"):
        model(tiny_prompts(1)["input_ids"], attention_mask=torch.ones(1, width), **{CACHE: cache})
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0

"""The plugin counts what it should, and the committed page is that of the JSON."""

import pytest
import torch
from transformers import DynamicCache

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from tests.models.tiny import random_ids, tiny_model
from tests.upstream import hardkv_in_place, page, run

# What a checkout has: a family's tests, which inherit those of generation.
SUITE = """
import unittest

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from hardkv.cache.argument import CACHE


class GenerationTesterMixin:
    def generated(self, **options):
        torch.manual_seed(0)
        sizes = {name: 2 for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")}
        sizes |= {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
        config = LlamaConfig(**sizes, pad_token_id=0, eos_token_id=None)
        model = AutoModelForCausalLM.from_config(config).eval()
        return model.generate(
            torch.ones(1, 6, dtype=torch.int64), max_new_tokens=6, return_dict_in_generate=True, **options
        )

    def test_equal(self):
        ours, dense = self.generated(output_logits=True), self.generated(output_logits=True, use_cache=False)
        torch.testing.assert_close(ours.logits[-1], dense.logits[-1])
        assert isinstance(ours[CACHE], DynamicCache)
        assert ours[CACHE].layers[1].keys.shape == (1, 2, 11, 4)

    def test_by_hand(self):
        cache, state = DynamicCache(), torch.arange(3.0).view(1, 1, 3, 1)
        cache.update(state, state, 0)
        cache.update(state[:, :, :1] + 7, state[:, :, :1], 0)
        assert cache.layers[0].keys.flatten().tolist() == [0, 1, 2, 7]

    def test_without_a_cache(self):
        assert self.generated(use_cache=False).sequences.shape == (1, 12)

    def test_refused(self):
        cache = DynamicCache()
        cache.update(torch.ones(1, 1, 9, 1), torch.ones(1, 1, 9, 1), 0)
        cache.crop(5)

    def test_that_fails_with_both(self):
        raise AssertionError("in /a/folder/of/this machine")


class LlamaTest(GenerationTesterMixin, unittest.TestCase):
    def test_of_something_else(self):
        raise AssertionError("never collected")
"""


@pytest.mark.slow
def test_the_plugin_tells_what_a_test_did(tmp_path):
    file = "tests/models/llama/test_modeling_llama.py"
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(SUITE)
    found = run.pytest_run(tmp_path, tmp_path / "home", "whole", [file])
    tests = {name.rpartition("::")[2]: record for name, record in found.items()}
    assert sorted(tests) == sorted(
        f"test_{name}" for name in ("equal", "by_hand", "without_a_cache", "refused", "that_fails_with_both")
    )
    assert [tests["test_equal"][key] for key in ("outcome", "caches", "attended", "evicted")] == ["passed", 1, 12, 0]
    assert [tests["test_by_hand"][key] for key in ("outcome", "caches", "attended")] == ["passed", 1, 2]
    assert [tests["test_without_a_cache"][key] for key in ("outcome", "caches")] == ["passed", 0]
    (refusal,) = tests["test_refused"]["errors"]
    assert refusal["refused"]
    assert refusal["type"] == "ValueError"
    (failure,) = tests["test_that_fails_with_both"]["errors"]
    assert not failure["refused"]
    assert failure["message"] == "in ... machine"


def test_states_gathered_from_the_tiers_are_those_of_a_dense_cache():
    model = tiny_model("llama")
    cache = HardKVCache(config=model.config, **hardkv_in_place.CACHES["whole"])
    dense, ids = DynamicCache(config=model.config), random_ids(2, 9)
    padding = torch.ones(2, 9, dtype=torch.int64)
    padding[1, :2] = 0
    with torch.no_grad():
        for each in (cache, dense):
            model(ids[:, :5], attention_mask=padding[:, :5], **{CACHE: each})
            for column in range(5, 9):
                step = ids[:, column : column + 1]
                model(step, attention_mask=padding[:, : column + 1], **{CACHE: each})
    assert cache.stats().events == 2
    for ours, theirs in zip(cache.layers, dense.layers, strict=True):
        for name in ("keys", "values"):
            expected = getattr(theirs, name) * padding[:, None, :, None]
            torch.testing.assert_close(hardkv_in_place.gathered(ours, name), expected, rtol=0, atol=1e-5)


def test_the_page_says_what_the_json_has():
    results = page.load()
    assert page.PAGE.read_text() == page.page(results), "run python -m tests.upstream.run --page"
    assert page.UNEXPLAINED not in page.PAGE.read_text()


def test_kinds_of_what_did_not_pass():
    export = {
        "type": "ValueError",
        "message": "Unsupported input type <class 'hardkv.cache...",
        "at": "",
        "refused": False,
    }
    refusal = {"type": "NotImplementedError", "message": "of a mask: use DynamicCache", "at": "", "refused": True}
    other = {"type": "AssertionError", "message": "1 != 2", "at": "test_utils.py: assert a == b", "refused": False}
    assert page.why("whole", "llama", "a", {"dynamic": "failed", "caches": 1, "errors": [refusal]}) == (page.ANYWAY, "")
    kind, reason = page.why("whole", "llama", "a", {"dynamic": "passed", "caches": 1, "errors": [refusal]})
    assert kind == page.REFUSED
    assert "of a mask" in reason
    assert page.why("whole", "llama", "a", {"dynamic": "passed", "caches": 1, "errors": [export]})[1].startswith(
        "`torch.export`"
    )
    assert page.why("whole", "llama", "a", {"dynamic": "passed", "caches": 1, "errors": [other]}) == (
        page.OTHER,
        page.UNEXPLAINED,
    )

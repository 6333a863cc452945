"""Compressed prompts: the continuation and its measure; kvpress itself where it is installed."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from eval import presses
from eval.presses import continued, make_ours, make_press, measured, missing_kvpress, ours
from hardkv import HardKVCache
from hardkv.selectors import Risk, TopK
from tests.cache import conftest as tiny
from tests.eval.test_budgets import make_calibration

PROMPT, LENGTH = 256, 512


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(presses, "PROMPT", PROMPT)
    monkeypatch.setattr(presses, "LENGTH", LENGTH)
    monkeypatch.setattr(presses, "PARTS", (4, 2))  # more than sinks and window


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("llama")


@pytest.fixture(scope="module")
def ids():
    return tiny.make_prompts(2, LENGTH)["input_ids"].clamp_min(2)


def dense(model, ids):
    return list(continued(model, ids, DynamicCache(config=model.config)))


def test_the_measure_against_whole_forwards(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, PROMPT:-1].double()
    reference = dense(model, ids)
    assert torch.cat(reference, 1)[:, :-1] == pytest.approx(logits.log_softmax(-1), abs=1e-4)
    other = [(part / 2).log_softmax(-1) for part in reference]
    found = measured(ids, reference, iter(other))
    nll = [F.cross_entropy(x.transpose(1, 2), ids[:, PROMPT + 1 :], reduction="none") for x in (logits / 2, logits)]
    assert found["excess"] == pytest.approx((nll[0] - nll[1]).mean(1).tolist(), abs=1e-4)
    assert min(found["kl"]) > 0.01
    assert measured(ids, reference, iter(reference)) == {"excess": [0, 0], "kl": [0, 0]}


@pytest.mark.parametrize("step", [128, 48, 1])
def test_steps_do_not_matter(model, ids, step):
    found = continued(model, ids, DynamicCache(config=model.config), step=step)
    for one, other in zip(dense(model, ids), found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("entry", [entry for entry in ours() if entry.part == 4], ids=lambda entry: entry.label)
def test_our_caches_compress_the_prompt_alone(entry, model, ids):
    calibration = make_calibration(model, entry.scorer)
    cache = make_ours(SimpleNamespace(model=model, calibration=lambda source: calibration), entry)()
    budget = cache.settings.budget
    assert type(budget) is {"TopK": TopK, "Risk": Risk}[entry.budget]
    if entry.bits == 16:
        assert budget.n == PROMPT // entry.part
    else:
        assert PROMPT // entry.part <= budget.n <= PROMPT
    list(continued(model, ids[:1, :400], cache))
    assert cache.lengths().double().mean() == budget.n + 400 - PROMPT


def test_without_kvpress_ours_run(monkeypatch, tmp_path, model, ids, capsys):
    worker = SimpleNamespace(model=model, tokenizer=None, calibration=lambda source: None)
    monkeypatch.setattr(presses, "Worker", lambda *_: worker)
    monkeypatch.setattr(presses, "read_texts", lambda *_: (["a", "b"], ids))
    monkeypatch.setattr(presses, "ours", lambda: [entry for entry in ours() if entry.label == "TopK, snapkv, 16 bits"])
    monkeypatch.setattr(presses, "missing_kvpress", lambda: "kvpress is left out")
    out = tmp_path / "presses.json"
    presses.run(out, [4], None)
    first = json.loads(out.read_text())["records"]
    presses.run(out, [4, 2], None)
    assert capsys.readouterr().out.splitlines()[-1] == "kvpress is left out"
    data = json.loads(out.read_text())
    assert data["records"][:1] == first
    assert first[0]["names"] == ["a", "b"]
    assert [(record["label"], record["part"]) for record in data["records"]] == [
        ("TopK, snapkv, 16 bits", part) for part in presses.PARTS
    ]
    roomy = measured(ids, dense(model, ids), continued(model, ids, HardKVCache(config=model.config, budget=TopK(1000))))
    assert roomy == {"excess": pytest.approx([0, 0], abs=1e-5), "kl": pytest.approx([0, 0], abs=1e-5)}
    assert min(data["records"][0]["kl"]) > 1e-3


@pytest.mark.parametrize(("name", "said"), [("cache", "transformers before 5.24"), ("past_key_values", "pip install")])
def test_what_kvpress_lacks_is_told(monkeypatch, name, said):
    monkeypatch.setattr(presses, "CACHE", name)
    monkeypatch.setattr(presses, "find_spec", lambda name: None)
    assert said in missing_kvpress()


@pytest.mark.parametrize("name", presses.PRESSES)
def test_presses_keep_their_part(name, ids, monkeypatch):
    if missing_kvpress() is not None:
        pytest.skip("no kvpress")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for each, function in list(ALL_ATTENTION_FUNCTIONS.items()):  # kvpress wraps them, and the end of the test unwraps
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, each, function)
    from kvpress import patch_attention_functions

    patch_attention_functions()  # importing it again would not
    model = tiny.make_model("llama")
    masks, step = name.startswith("AdaKV"), 1 if name.startswith("AdaKV") else 128
    reference = dense(model, ids)
    cache = DynamicCache(config=model.config)
    found = measured(ids, reference, continued(model, ids, cache, make_press(name, 4), step))
    assert min(found["kl"]) > 1e-3
    assert cache.layers[0].keys.shape[2] == (PROMPT if masks else PROMPT // 4) + LENGTH - PROMPT
    if masks:
        dropped = [len(layer.self_attn.masked_key_indices[0]) for layer in model.model.layers]
        assert dropped == [2 * 2 * PROMPT * 3 // 4] * 3  # rows, heads

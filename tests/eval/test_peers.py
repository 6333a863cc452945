"""transformers' QuantizedCache in the study: its settings, its bytes, and one text at a time."""

import inspect

import pytest
import torch
from transformers.cache_utils import QuantizedLayer

from eval import budgets
from eval.budgets import INTERVAL, Worker, make_cache
from eval.budgets_plan import Entry, plan
from eval.peers import PACKAGES, Quantized, missing_package
from eval.teacher_forced import Result, teacher_forced
from tests.cache import conftest as tiny

ENTRIES = plan(["peers"])


def test_a_missing_package_is_named(monkeypatch):
    for backend, (package, _) in PACKAGES.items():
        monkeypatch.setitem(PACKAGES, backend, (package, lambda: False))
        assert missing_package(backend).endswith(f"or pip install {package}")
        monkeypatch.setitem(PACKAGES, backend, (package, lambda: True))
        assert missing_package(backend) is None


def test_defaults_of_transformers_are_among_the_entries():
    """Groups along axis 0; the residual is as long as our interval, so both quantise after as many tokens."""
    parameters = inspect.signature(QuantizedLayer.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert (defaults["axis_key"], defaults["axis_value"], defaults["q_group_size"]) == (0, 0, 64)
    assert defaults["residual_length"] == INTERVAL
    default = [entry for entry in ENTRIES if entry.options["axes"] == [0, 0]]
    assert {entry.options["backend"] for entry in default} == set(PACKAGES)


def test_texts_run_apart():
    """hqq's groups along axis 0 span the texts of a batch."""
    assert all(entry.apart for entry in ENTRIES)
    assert not any(entry.apart for entry in plan(["main", "bits", "lukv"]))


def test_a_worker_splits_the_texts(monkeypatch, tmp_path):
    model, seen = tiny.make_model("llama"), []

    def one_pass(model, ids, caches, step):
        seen.append(len(ids))
        return {key: Result([3.0], [2.0], [0.5], [0.9], 10.0, 40.0) for key in caches}

    monkeypatch.setattr(budgets, "load", lambda name: (model, None))
    monkeypatch.setattr(budgets, "read_texts", lambda *_: (["a", "b"], torch.ones(2, 9, dtype=torch.int64)))
    monkeypatch.setattr(budgets, "teacher_forced", one_pass)
    (record,) = Worker(None, tmp_path).run(ENTRIES[:1])
    assert seen == [1, 1]
    assert (record["excess"], record["nbytes"], record["dense_nbytes"]) == ([1.0, 1.0], 20.0, 80.0)


def make_entry(backend, bits, axes):
    return Entry("peers", "", 256, options={"backend": backend, "bits": bits, "axes": axes})


@pytest.mark.parametrize(
    "entry", ENTRIES, ids=lambda e: f"{e.options['backend']}-{e.options['bits']}-{e.options['axes'][0]}"
)
def test_bytes_are_those_of_codes_scales_and_zeros(entry):
    """After a prompt of 256 tokens and heads of 64, in a model of 16 bits. Three bits are seven int32 per 64 codes."""
    options = entry.options
    if missing_package(options["backend"]) is not None:
        pytest.skip("not installed")
    model = tiny.make_model("llama", num_hidden_layers=1, head_dim=64, dtype=torch.bfloat16)
    cache = make_cache(model, entry, None)
    assert isinstance(cache, Quantized)
    with torch.no_grad():
        model(input_ids=tiny.make_prompts(1, 256)["input_ids"], **{tiny.CACHE: cache})
    numbers = 256 * 2 * 2 * 64  # tokens, heads, keys and values, coordinates
    width = 3.5 if options["bits"] == 3 else options["bits"]
    assert cache.nbytes() == numbers * width / 8 + numbers / 64 * 4
    held = cache.nbytes()
    with torch.no_grad():
        model(input_ids=tiny.make_prompts(1, 5)["input_ids"], **{tiny.CACHE: cache})
    assert cache.nbytes() == held + 5 * 2 * 2 * 64 * 2  # the residual has 16 bits


def test_quanto_unpacks_as_its_extension_does():
    quanto = pytest.importorskip("optimum.quanto.tensor.packed")
    Quantized(tiny.make_model("llama").config, "quanto", 4, (0, 0))
    for bits in (4, 2):
        codes = torch.randint(0, 2**bits, (32, 6), dtype=torch.uint8)
        assert torch.equal(quanto.PackedTensor.pack(codes, bits).unpack(), codes)


@pytest.mark.parametrize("backend", PACKAGES)
def test_more_bits_lose_less(backend):
    if missing_package(backend) is not None:
        pytest.skip("not installed")
    model, ids = tiny.make_model("llama", head_dim=64), tiny.make_prompts(1, 384)["input_ids"].clamp_min(2)
    makers = {bits: lambda bits=bits: make_cache(model, make_entry(backend, bits, [0, 0]), None) for bits in (4, 2)}
    found = teacher_forced(model, ids, makers, step=INTERVAL)
    assert 0 < found[4].kl[0] < found[2].kl[0] / 3
    assert found[4].nbytes > found[2].nbytes

"""The cost of selections at the prompt: what is compared with what."""

import json
from statistics import median

import pytest
import torch
from transformers import Qwen3Config

from eval.speed import prompts
from eval.speed.bench import Bench


@pytest.fixture
def bench():
    config = Qwen3Config(
        **{"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096},
    )
    return Bench("tiny", config, torch.device("cpu"), torch.float32)


def test_caches_take_turns_and_the_first_turn_does_not_count(bench, monkeypatch):
    calls, times = [], iter(range(1, 100))

    def first_token(method, scorer, length, batch, repeats, warm):
        assert (length, batch, repeats, warm) == (300, 1, 1, 0)
        calls.append((method, scorer))
        return {"method": method, "scorer": scorer, "seconds": float(next(times))}

    monkeypatch.setattr(bench, "first_token", first_token)
    records = prompts.measure(bench, 300, repeats=3)
    count = len(prompts.CACHES)
    assert calls == [*prompts.CACHES] * 4
    for place, record in enumerate(records):
        own = [turn * count + place + 1.0 for turn in (1, 2, 3)]
        assert record["all_seconds"] == own
        assert record["seconds"] == median(own)
        assert record["ratio"] == median(own) / (2 * count + 1)
    assert records[0]["ratio"] == 1


def test_every_scorer_is_in_its_cache(bench, monkeypatch):
    made = []
    build = bench.hardkv_cache
    monkeypatch.setattr(bench, "hardkv_cache", lambda *args: made.append(build(*args)) or made[-1])
    records = prompts.measure(bench, 2100, repeats=1)
    assert [type(cache.settings.scorer).__name__ for cache in made[:2]] == ["SnapKV", "RKV"]
    assert all(cache.stats().events == 1 for cache in made)
    assert all(int(cache.lengths().max()) == 2048 for cache in made)  # something was evicted
    assert [record["scorer"] for record in records] == ["", "snapkv", "rkv"]


@pytest.mark.slow
def test_a_second_run_replaces_its_own_records(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(prompts, "Bench", lambda *args: bench)
    bench.name = "two small layers"
    out = tmp_path / "prompts.json"
    for lengths in (["200", "300"], ["300"]):
        prompts.main(["--out", str(out), "--repeats", "1", "--lengths", *lengths])
    records = json.loads(out.read_text())["records"]
    assert sorted((record["context"], record["scorer"]) for record in records) == sorted(
        (length, scorer) for length in (200, 300) for _, scorer in prompts.CACHES
    )
    assert all("cpu" in record["machine"] for record in records)

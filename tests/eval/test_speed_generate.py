"""The end-to-end benchmark on a tiny model: what it measures, its caches, and the report."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from eval.speed.bench import SLOW_WARM, Bench
from eval.speed.cases import METHODS, Case
from eval.speed.generate import _key, run
from eval.speed.generate_report import NAMES, event_share, markdown, targets
from eval.speed.kernel_time import kind_of, summarise
from hardkv.cache.storage.memory import storage_nbytes

COMMITTED = Path(__file__).parents[2] / "eval/results/generate.json"


@pytest.fixture(scope="module")
def bench():
    config = Qwen3Config(
        **{"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096},
    )
    return Bench("tiny", config, torch.device("cpu"), torch.float32)


HERE = [name for name in METHODS if not any(word in name for word in ("compile", "kvpress", "bit"))]
QUICK = ("dynamic", "topk")


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HERE]
)
def test_decode(bench, method):
    record = bench.decode(method, Case(200, 2, 100), steps=130)
    assert record["steps"] == 130
    assert len(record["all_step_ms"]) == 3
    assert record["step_ms"] == sorted(record["all_step_ms"])[1]
    assert record["tokens_per_s"] == pytest.approx(2e3 / record["step_ms"])
    kind, _ = METHODS[method]
    if kind in ("topk", "risk"):
        assert record["events"] == 2  # one before the steps that are timed
        assert record["kv_bytes"] < 2 * 2 * 2 * 2 * (200 + 143) * 8 * 4
        if method == "topk":  # curves of Risk, which plan() leaves out, count for something in so small a cache
            assert record["kv_bytes"] == pytest.approx(record["plan_bytes"], rel=0.03)
    else:
        assert record["kv_bytes"] == 2 * 2 * 2 * 2 * (200 + SLOW_WARM + 131) * 8 * 4


@pytest.mark.parametrize("kind", ["dynamic", "topk", "risk"])
def test_largest_batch(bench, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10_000_000, 0))
    batch = bench.largest(kind, Case(200, 0, 100), 20)
    if kind == "dynamic":
        assert batch == 7_000_000 // (2 * 2 * 2 * 220 * 8 * 4)
        return
    held = [bench.filled(kind, Case(200, n, 100), 20).nbytes() for n in (batch, 2 * batch)]
    assert held[0] <= 7_000_000 < held[1]


def test_a_static_cache_leaves_nothing_behind(bench):
    bench.model._compiled_call = None
    bench._forget("static")
    assert not hasattr(bench.model, "_compiled_call")


@pytest.mark.parametrize("kind", ["topk", "risk"])
def test_a_filled_cache_holds_what_its_budget_keeps(bench, kind):
    cache = bench.filled(kind, Case(200, 3, 100), 10)
    lengths = cache.lengths()
    assert cache.get_seq_length() == 200
    assert lengths.float().mean() == 100
    assert (lengths.amin() < lengths.amax()) == (kind == "risk")
    assert storage_nbytes(cache.layers[0].tensors()) > 0


@pytest.mark.slow
def test_first_token_and_errors(bench, monkeypatch):
    records = list(run(bench, ["topk"], [Case(100, 3, 90)], [60]))
    assert [record["measure"] for record in records] == ["first token"] * 3 + ["decode"]
    assert all(record["seconds"] > 0 for record in records[:3])
    monkeypatch.setattr(bench, "filled", lambda *args: 1 / 0)
    (record,) = run(bench, ["topk"], [Case(100, 3, 90)], [])
    assert record["error"].startswith("ZeroDivisionError")
    assert record["context"] == 100


def test_the_committed_page_is_of_the_committed_figures():
    found = json.loads(COMMITTED.read_text())
    assert COMMITTED.with_suffix(".md").read_text() == markdown(found)
    assert len({_key(record) for record in found["records"]}) == len(found["records"])
    assert set(NAMES) == set(METHODS)


def test_targets():
    base = {"measure": "decode", "model": "qwen3-8b", "context": 2048, "batch": 32, "limit_ms": 6.0}
    ours = base | {"method": "topk-compile", "step_ms": 7.5, "median_ms": 7.2, "tokens_per_s": 4000.0}
    dense = base | {"method": "dynamic", "step_ms": 80.0, "median_ms": 80.0, "tokens_per_s": 390.0}
    assert event_share(ours) == pytest.approx(7.5 / 7.2 - 1)
    smaller = {"model": "qwen3-4b", "step_ms": 5.0, "tokens_per_s": 6400.0}
    records = [ours | smaller, dense | smaller, ours, dense, base | {"error": "x"}]
    found = {what: (value, met) for what, _, value, met in targets(records)}
    assert found["step over the least that memory allows, batch 32"] == (1.25, True)
    assert found["tokens/s over DynamicCache, batch 32, context 2,048"] == (pytest.approx(4000 / 390), True)
    assert len(found) == 3


def test_where_the_time_goes():
    """Kernels side by side count once in the busy time; gaps before, between and after count as idle."""
    kernels = [("nvjet_tst_192", 1.0, 3.0), ("_ragged_attention", 2.0, 5.0), ("void elementwise_kernel", 7.0, 8.0)]
    found = summarise(reversed(kernels), elapsed=10.0, steps=2)
    assert found["total"] == 5.0
    assert found["idle"] == pytest.approx((10.0 - 5.0) / 2)
    assert found["kinds"] == {"matrix products": 1.0, "attention": 1.5, "selection": 0.0, "other": 0.5}
    assert found["kernels"] == 2
    assert summarise([], elapsed=4.0)["idle"] == 4.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("_gather_tiers_kernel", "selection"),
        ("_compact_kernel", "selection"),
        ("_cut_kernel", "selection"),
        ("_append_step_kernel", "other"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind


def test_kvpress_without_its_packages_says_so(bench, tmp_path):
    """It is measured in a process of its own, whose error becomes the record's."""
    bench.kvpress_site = tmp_path
    (record,) = run(bench, ["kvpress"], [Case(100, 2, 90)], [])
    assert record["method"] == "kvpress"
    assert record["error"] == "RuntimeError: ModuleNotFoundError: No module named 'kvpress'"

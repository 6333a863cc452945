"""The kernels' benchmark: its inputs, what it counts, its records and its report. Times are faked, sizes tiny."""

import json
import os
import sys
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from eval.speed import events, kernels, kernels_report
from eval.speed.event_operations import Compaction, ScoringMean
from eval.speed.events import Model
from eval.speed.inputs import SEEN, SHAPES, Setting, Shape, make_tiers
from eval.speed.kernels import OPERATIONS
from eval.speed.kernels_report import Target, targets
from eval.speed.operations import KINDS, Append, Attention, Chunk
from hardkv.kernels.attention import attend, packages

CPU = torch.device("cpu")
SETTING = Setting(CPU, torch.float32, heads=2, group=2, dim=16, window=4, interval=12)
TINY = (Shape(4, 40), Shape(4, 60, "heavy"))
MODEL = Model(layers=3, batch=2, kept=40, sinks=2, seen=200, weights=1e6)


class FakeTimer:
    """Runs everything once, or nothing; the times are given."""

    def __init__(self, free=1 << 40, runs=True):
        self.free, self.runs, self.failing = free, runs, ""

    def eager(self, calls):
        self.each(calls)
        return 10.0

    def graph(self, calls, estimate):
        assert estimate == 10.0
        if self.failing:
            raise RuntimeError(self.failing)
        self.each(calls)
        return 5.0

    def wall(self, call):
        self.each([call])
        return 900.0

    def waits(self, call):
        self.each([call])
        return ["layer.py:1"]

    def each(self, calls):
        for call in calls if self.runs else ():
            call()

    def free_bytes(self):
        return self.free

    def release(self):
        pass


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two copies of inputs rather than 48, and no package."""
    monkeypatch.setattr(kernels, "MAX_COPIES", 2)
    monkeypatch.setattr(packages, "installed", lambda: ())


def run(path, operations=OPERATIONS, timer=None, setting=SETTING, **options):
    options = {"shapes": TINY, "model": MODEL, "copy_bytes": 64} | options
    return kernels.run(path, operations, timer or FakeTimer(), setting, **options)


def find(records, **wanted):
    return [record for record in records if all(record.get(name) == value for name, value in wanted.items())]


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("shape", [*SHAPES, *TINY], ids=str)
def test_lengths_are_distributed_as_said(shape):
    lengths = torch.cat([shape.draw(seed) for seed in range(20)])
    assert lengths.shape == (20 * shape.rows,)
    assert torch.equal(shape.draw(3), shape.draw(3))
    assert not torch.equal(shape.draw(3), shape.draw(4))
    if shape.lengths == "uniform":
        assert lengths.min() >= shape.mean // 4
        assert lengths.max() <= shape.mean * 7 // 4
        assert lengths.float().mean() == pytest.approx(shape.mean, rel=0.15 if shape.rows < 64 else 0.02)
    else:
        assert all(abs(int(shape.draw(seed).sum()) - shape.rows * shape.mean) <= shape.rows for seed in range(20))
        assert all(shape.draw(seed).max() <= 41 * shape.draw(seed).min() for seed in range(20))
        spread = lengths.log()  # log-uniform: the same part between any two bounds of the same ratio
        low, high = spread.min(), spread.max()
        parts = torch.histc(spread, 4, float(low), float(high)) / lengths.shape[0]
        if shape.rows > 64:
            assert float(high - low) > 3
            assert parts.tolist() == pytest.approx([0.25] * 4, abs=0.06)


def test_rows_are_whole_sequences():
    heads = Setting(CPU, torch.bfloat16).heads
    assert all(shape.rows % heads == 0 for shape in SHAPES)


def test_tiers_hold_what_is_asked_for():
    lengths = torch.tensor([5, 1, 17, 30])
    tiers = make_tiers(SETTING, lengths, fill=7, seen=100, seed=1)
    assert tiers.condensed.lengths.tolist() == lengths.tolist()
    assert tiers.lengths().tolist() == [[12, 8], [24, 37]]
    for row in tiers.kept()[0] + tiers.kept()[1]:
        assert (row.diff() > 0).all()
        assert row[0] == 0
        assert row[-7:].tolist() == list(range(93, 100))
    assert (tiers.seen, tiers.dense.bound, tiers.dense.capacity) == (100, 7, 16)


@pytest.mark.parametrize(("alike", "mean"), [(False, 0.0), (True, 0.6)])
def test_keys_resemble_each_other_if_asked_to(alike, mean):
    tiers = make_tiers(replace(SETTING, dim=64), torch.tensor([40, 40]), 7, 100, seed=0, alike=alike)
    own, _ = tiers.condensed.keys.split(40)
    both = F.normalize(torch.cat([own, tiers.dense.keys[0, 0, :7]]), dim=1)
    cosines = (both @ both.T)[~torch.eye(47, dtype=torch.bool)]
    assert float(cosines.mean()) == pytest.approx(mean, abs=0.1)


def test_ragged_windows_are_the_newest_columns():
    operation = ScoringMean(Shape(4, 30), 0, SETTING)
    for row, part in enumerate(map(slice, *zip(*pairwise(operation.rows.cu_seqlens.tolist()), strict=True))):
        positions = operation.positions[part]
        assert (positions.diff() > 0).all()
        assert positions[-4:].tolist() == list(range(SEEN - 4, SEEN))
        assert operation.in_window[part].sum() == 4, row


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(("kind", "queries", "fill"), [(Attention, 1, 10), (Chunk, 12, 16)])
def test_attention_moves_keys_values_queries_and_output(kind, queries, fill):
    operation = kind(TINY[0], 0, SETTING)
    lengths = (TINY[0].draw(0) - fill).clamp_min(1) + fill
    assert operation.tiers.lengths().flatten().tolist() == lengths.tolist()
    kv = int(lengths.sum()) * 2 * 16 * 4
    assert operation.query.shape == (2, 4, queries, 16)
    assert operation.nbytes == kv + 2 * (2 * 4 * queries * 16 * 4)
    # every query of the group meets every token, but not the new ones behind it
    pairs = sum(int(lengths.sum()) - 4 * (queries - 1 - query) for query in range(queries))
    assert operation.flops == pairs * 2 * (2 * 2 * 16)


def test_compaction_moves_what_it_keeps_twice():
    operation = Compaction(TINY[0], 0, SETTING)
    found = operation.run("triton")
    moved = sum(tensor.nbytes for tensor in found)
    assert operation.nbytes == 2 * moved + operation.index.shape[0] * 16
    condensed = operation.tiers.condensed.rows.total
    assert found[0].shape[0] == pytest.approx(0.85 * condensed + 4 * SETTING.capacity, rel=0.05)


def test_append_moves_a_token_twice():
    operation = Append(TINY[0], 0, SETTING)
    assert operation.nbytes == 2 * (operation.keys.nbytes + operation.values.nbytes) + 2 * 20
    assert operation.error(operation.run("triton")) == 0
    operation.dense.positions[1, 10] += 1
    assert operation.error(operation.dense.fill + 1) == float("inf")


@pytest.mark.parametrize(
    ("name", "per_token", "extra"),
    [
        ("scoring-mean", 16 * 4 + 8, 2 * 4 * 4 * 16 * 4),
        ("scoring-max-logits", 16 * 4 + 9, 2 * 4 * 4 * 16 * 4),
        ("similarity", 16 * 4 + 4, 0),
        ("pooling", 9, 0),
        ("sort-and-keep", 6, 0),
    ],
)
def test_bytes_a_token(name, per_token, extra):
    operation = next(kind for kind in KINDS if kind.name == name)(TINY[0], 0, SETTING)
    assert operation.nbytes == int(TINY[0].draw(0).sum()) * per_token + extra


# ---------------------------------------------------------------- records


def check_all(data, backends):
    """Every operation has a record of every shape and backend, right and timed."""
    for kind in KINDS:
        for shape in TINY[: kind.most_shapes]:
            for backend in kind.backends():
                (record,) = find(data["records"], operation=kind.name, backend=backend, shape=asdict(shape))
                if backend not in backends:
                    continue
                assert "error" not in record, record
                assert record["relative_error"] < 1e-5
                assert record["copies"] == kernels.MAX_COPIES
                us = 10.0 if backend == "torch" else 5.0
                assert record["eager_us"] == 10.0
                assert ("graph_us" in record) == (backend != "torch")
                assert record["fraction"] == pytest.approx(record["bytes"] / us * 1e6 / data["copy_bandwidth"])
    found = find(data["records"], operation="event")
    assert len(found) == len(events.EVENTS) + len(events.SMALL_EVENTS)
    for record in found:
        assert "error" not in record, record
        assert record["relative_error"] < 1e-5


def test_every_operation_has_a_record_of_every_shape_and_backend(tmp_path):
    data = run(tmp_path / "kernels.json")
    assert json.loads((tmp_path / "kernels.json").read_text()) == data
    assert data["copy_bandwidth"] == pytest.approx(2 * 64 / 10e-6)
    assert list(dict.fromkeys(record["operation"] for record in data["records"])) == list(OPERATIONS)
    check_all(data, ("torch", "primitives"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_triton_kernels_are_called_as_they_want_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_COPIES", 1)
    data = run(tmp_path / "kernels.json", timer=FakeTimer(runs=False), model=replace(MODEL, layers=1))
    check_all(data, ("triton", "torch", "primitives"))


def test_what_runs_in_place_of_triton_is_not_called_so(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "why_not_triton", lambda device, dtype: "no such thing")
    data = run(tmp_path / "kernels.json", ["compaction"])
    assert {record["error"] for record in find(data["records"], backend="triton")} == {"not run: no such thing"}


def fake_package(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, softcap):
    """A package's attention, one sequence after the other."""
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf)
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert b - a <= max_q
        assert d - c <= max_k
        allowed = torch.ones(b - a, d - c, dtype=torch.bool)
        allowed = allowed.tril(d - c - (b - a)) if causal else allowed
        if a < b:
            found = attend(
                q[a:b].transpose(0, 1)[None], k[None, c:d, 0], v[None, c:d, 0], allowed[None, None], scale=scale
            )
            out[a:b], lse[a:b] = found[0][0].transpose(0, 1).to(q), found[1][0].T
    return out, lse


def test_packages_attend_both_tiers_and_one(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda: ("torch_varlen",))
    fake = replace(packages.PACKAGES["torch_varlen"], attend=fake_package)
    monkeypatch.setitem(packages.PACKAGES, "torch_varlen", fake)
    setting = replace(SETTING, dtype=torch.float16)
    records = run(tmp_path / "kernels.json", ["attention", "attention-chunk"], setting=setting)["records"]
    for backend in ("torch_varlen", "torch_varlen, one tier", "torch"):
        for record in find(records, backend=backend):
            assert record.get("error") is None
            assert record["relative_error"] < 2e-3
    assert len(find(records, backend="torch_varlen, one tier")) == 3


class Wrong(Append):
    name = "append"

    def error(self, found):
        return float("nan")


class Broken(Append):
    name = "append"

    def __init__(self, shape, seed, setting):
        raise MemoryError("of the\nfirst kind")


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "KINDS", (Wrong,))
    for record in run(tmp_path / "kernels.json", ["append"])["records"]:
        assert "eager_us" not in record
        assert record["error"].startswith(("ArithmeticError: wrong: a relative error of nan", "not run"))


def test_missing_inputs_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "KINDS", (Broken,))
    records = run(tmp_path / "kernels.json", ["append"])["records"]
    assert [record["error"] for record in records] == ["no inputs: MemoryError: of the"] * 4
    assert {record["backend"] for record in records} == {"triton", "torch"}


def test_a_failing_graph_leaves_the_eager_time(tmp_path):
    timer = FakeTimer()
    timer.failing = "cannot capture"
    for record in run(tmp_path / "kernels.json", ["sort-and-keep"], timer)["records"]:
        assert record["error"] == "RuntimeError: cannot capture"
        assert record["eager_us"] == 10.0
        assert "graph_us" not in record


def test_the_reference_is_left_out_of_large_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(Compaction, "reference_tokens", 200)
    records = find(run(tmp_path / "kernels.json", ["compaction"])["records"], backend="torch")
    assert records[1]["error"] == "not run: the reference takes shapes of up to 200 tokens"
    assert "error" not in records[0]


def test_copies_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_COPIES", 48)
    monkeypatch.setattr(kernels, "ROTATED", 10 * Append(TINY[0], 0, SETTING).nbytes - 1)
    assert [record["copies"] for record in kernels.measure_shape(Append, TINY[0], FakeTimer(), SETTING)] == [10, 10]


def test_other_operations_stay_in_the_file_if_the_setup_is_the_same(tmp_path, monkeypatch):
    path = tmp_path / "new" / "kernels.json"
    run(path, ["append"])
    both = run(path, ["pooling"])["records"]
    assert list(dict.fromkeys(record["operation"] for record in both)) == ["pooling", "append"]
    assert len(run(path, ["pooling"])["records"]) == len(both)
    assert {record["operation"] for record in run(path, ["append"], quick=True)["records"]} == {"append"}
    monkeypatch.setattr(kernels, "machine", lambda setting: {"machine": "another", "versions": {}})
    assert {record["operation"] for record in run(path, ["pooling"], quick=True)["records"]} == {"pooling"}


def test_no_cuda_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels"])
    with pytest.raises(SystemExit) as error:
        kernels.main()
    assert error.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err


# ---------------------------------------------------------------- events


def test_layers_are_an_interval_after_an_event():
    for budget in ("topk", "risk"):
        layers = events.make_layers(MODEL, SETTING, budget, False, MODEL.layers)
        held = torch.stack([layer.tiers.lengths() for layer in layers])  # [L, B, H]
        assert held.float().mean() == MODEL.kept + SETTING.interval
        assert (held == held[:, :1]).all()
        assert (held.unique().numel() == 1) == (budget == "topk")
        assert all(layer.event_due and layer.ready for layer in layers)
        events.run_events(layers)
        again = torch.stack([layer.tiers.lengths() for layer in layers])
        assert torch.equal(again, held - SETTING.interval)  # static counts: what an event leaves is what it found


def test_counts_of_synthetic_curves_spread_over_a_factor_of_forty():
    model = Model()
    counts = events.Risk(model.kept, floor=0.0).allocation(events.synthetic_curves(model, 8), model.seen, 36).double()
    assert counts.shape == (36, 8)
    assert counts.mean() == model.kept
    assert 20 < counts.quantile(0.99) / counts.quantile(0.01) < 40


@pytest.mark.parametrize("free", [1 << 40, 0], ids=["all layers", "one layer"])
def test_event_records(free):
    bandwidth = 1e9
    records = list(events.measure_events(FakeTimer(free), SETTING, MODEL, bandwidth))
    measured = 3 if free else 1
    for record, (scorer, budget, alike) in zip(records, events.EVENTS, strict=True):
        assert "error" not in record, record
        assert (record["scorer"], record["budget"], record["alike"]) == (scorer, budget, alike)
        assert record["layers"] == measured
        assert record["eager_us"] == pytest.approx(900 * 3 / measured)
        assert record["attention_us"] == 3 * 5
        assert record["step_us"] == pytest.approx(15 + 1e6 / bandwidth * 1e6)
        assert record["share"] == pytest.approx(record["eager_us"] / (12 * record["step_us"]))
        assert record["waits"] == ["layer.py:1"]


def test_an_event_is_checked_against_the_reference():
    (layer,) = events.make_layers(MODEL, SETTING, "topk", False, 1)
    old = layer.tiers
    assert events.event_error(layer, old) == 0
    settings = [events.settings_for(MODEL, SETTING, name) for name in ("attention", "snapkv")]
    answers = iter(settings)
    original = layer.event_inputs

    def another(*args):
        layer.settings = next(answers)
        return original(*args)

    layer.event_inputs = another
    assert events.event_error(layer, old) > 0.01


def test_a_failing_event_is_said(monkeypatch):
    def fails(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(events, "event_error", fails)
    records = list(events.measure_events(FakeTimer(), SETTING, MODEL, 1e9, [("snapkv", "topk", False)]))
    assert records[0]["error"] == "RuntimeError: no"
    assert kernels_report.event_rows(records)[0][:2] == [f"snapkv, topk, batch {MODEL.batch}", "RuntimeError: no"]


# ---------------------------------------------------------------- report


def attention_record(shape, backend, nbytes, us, **more):
    record = {"operation": "attention", "backend": backend, "shape": asdict(shape), "bytes": nbytes, "flops": 10**9}
    times = {"eager_us": 2 * us, "graph_us": us, "fraction": nbytes / us * 1e6 / 4e12, "relative_error": 1e-3}
    return record | {"copies": 1} | times | more


def event_record(scorer, share, budget="topk", layers=36):
    shape = {"rows": 256, "mean": 2048, "lengths": budget, "layers": 36, "batch": 32}
    times = {"eager_us": 4e4, "attention_us": 2e3, "step_us": 6e3, "share": share, "relative_error": 0.0}
    more = {"layers": layers, "alike": scorer == "rkv", "waits": ["layer.py:9", "layer.py:9", "tiers.py:2"]}
    return {
        "operation": "event",
        "backend": "hardkv",
        "scorer": scorer,
        "budget": budget,
        "shape": shape,
        **times,
        **more,
    }


def hand_made():
    small, middle, large = Shape(64, 2048), Shape(256, 2048), Shape(128, 32768)
    records = [
        attention_record(small, "triton", 70 * 10**6, 30),  # fraction 0.583
        attention_record(small, "fa", 70 * 10**6, 40),
        attention_record(small, "fa, one tier", 70 * 10**6, 36),  # 1.2 times
        attention_record(small, "torch", 70 * 10**6, 9000),
        attention_record(middle, "triton", 260 * 10**6, 70),  # 0.929
        attention_record(middle, "fa", 260 * 10**6, 100),  # 1.43 times
        attention_record(large, "triton", 2 * 10**9, 510),  # 0.98
        {"operation": "attention", "backend": "fa", "shape": asdict(large), "bytes": 2 * 10**9, "error": "broke: a"},
        event_record("attention", 0.5),
        event_record("snapkv", 0.04),
        event_record("snapkv", 0.0625, "risk", layers=12),
        event_record("rkv", 0.0999),
    ]
    compact = attention_record(middle, "triton", 440 * 10**6, 150) | {"operation": "compaction"}  # 0.733
    tiny = attention_record(small, "triton", 110 * 10**6, 150) | {"operation": "compaction"}
    return {
        "machine": "NVIDIA H200", "versions": {"torch": "2.11.0", "fa": "flash-attn 4.0"}, "quick": False,
        "copy_bandwidth": 4e12, "records": [*records, tiny, compact],
    }  # fmt: skip


def test_targets_are_met_or_missed():
    verdicts = {target.what: (target.wanted, target.met) for target in targets(hand_made()["records"])}
    assert verdicts == {
        "decode 64x2048 uniform, 70 MB: of copy bandwidth": (0.6, False),
        "decode 64x2048 uniform, 70 MB: times as fast as the best package (fa, one tier)": (1.25, False),
        "decode 256x2048 uniform, 260 MB: of copy bandwidth": (0.85, True),
        "decode 256x2048 uniform, 260 MB: times as fast as the best package (fa)": (1.25, True),
        "decode 128x32768 uniform, 2,000 MB: of copy bandwidth": (0.95, True),
        "decode 128x32768 uniform, 2,000 MB: times as fast as the best package": (1.1, False),
        "compaction 256x2048 uniform, 440 MB: of copy bandwidth": (0.85, False),
        "event, snapkv, topk, batch 32: of an interval's decode steps": (0.05, True),
        "event, snapkv, risk, batch 32: of an interval's decode steps": (0.05, False),
        "event, rkv, topk, batch 32, keys alike: of an interval's decode steps": (0.1, True),
    }


def test_a_target_says_by_how_much_it_was_missed():
    assert str(Target("a", 0.95, 0.93)) == "| a | >= 0.95 | 0.930 | missed by 0.020 |"
    assert str(Target("a", 0.95, 0.93, bound="b")) == "| a | >= 0.95 | 0.930 | missed by 0.020: b |"
    assert str(Target("a", 0.95, 0.95, bound="b")) == "| a | >= 0.95 | 0.950 | met |"
    assert str(Target("a", 0.95, 0.95)) == "| a | >= 0.95 | 0.950 | met |"
    assert str(Target("a", 0.05, 0.064, at_most=True)) == "| a | <= 0.05 | 0.064 | missed by 0.014 |"
    assert str(Target("a", 0.05, 0.05, at_most=True)) == "| a | <= 0.05 | 0.050 | met |"
    assert str(Target("a", 0.05, None)) == "| a | >= 0.05 | | not measured |"


def test_report_writes_ratios_first_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(hand_made()))
    kernels_report.report(path)
    text = path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Times as fast as the best package",
        "## Times as fast as the PyTorch reference, eager",
        "## Targets: 5 of 10 met",
        "## Events",
        "## attention",
        "## compaction",
    ]
    assert "| attention | 64x2048 uniform | 70 | 1.33 (fa) | 1.20 (fa) | 1.33 (fa) | 1.20 (fa) |" in text
    assert "| attention | 300.0 (64x2048 uniform) |" in text
    assert "broke: a" in text
    assert "scaled from 12 of 36 layers" in text
    assert "3 (layer.py:9, tiers.py:2)" in text
    assert "flash-attn 4.0" in text
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_report_of_what_was_measured_here(tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path / "kernels.json", ["attention", "pooling", "event"])
    kernels_report.report(tmp_path / "kernels.json")
    assert "| torch |" in (tmp_path / "kernels.md").read_text()

"""The study of budgets: its plan, its caches, resuming, and the arithmetic of its report. Nothing is downloaded."""

import json
import os
import sys
from collections import Counter
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval import budgets, intervals, measures
from eval.baselines import LUKV, DuoAttention, HeadKV, LayerShares, Mixed
from eval.budgets import Worker, make_budget, make_cache, read_texts
from eval.budgets_plan import SECTIONS, Entry, Source, plan
from eval.budgets_report import Study, report
from eval.teacher_forced import teacher_forced
from hardkv import Calibration, HardKVCache, calibrate
from hardkv.cache.argument import CACHE
from hardkv.cache.model import Traits
from hardkv.calibration.file import describe_scorer
from hardkv.config import check_bits
from hardkv.selectors import AdaKV, Adaptive, Pyramid, Risk, TopK, TopP, get_scorer
from tests.cache import conftest as tiny

# ---------------------------------------------------------------- the plan


def test_no_two_entries_share_a_key():
    entries = plan(SECTIONS)
    assert {entry.section for entry in entries} == set(SECTIONS)
    assert [key for key, count in Counter(entry.key for entry in entries).items() if count > 1] == []


def test_keys_survive_json():
    """What `run` reads back of a record is the key that it looks for."""
    for entry in plan(SECTIONS):
        record = json.loads(json.dumps(asdict(entry) | {"excess": [0.1]}))
        fields = {name: record[name] for name in Entry.__dataclass_fields__}
        assert json.dumps(fields, sort_keys=True) == entry.key


def test_calibrations_have_their_own_files():
    sources = {entry.source for entry in plan(SECTIONS) if entry.source is not None}
    assert len({source.file for source in sources}) == len(sources) > 20
    assert all("/" not in source.file for source in sources)


def test_report_texts_are_kept_for_the_final_tables():
    for entry in plan(SECTIONS):
        assert entry.texts == ("report" if entry.section in ("main", "long", "bits", "lukv", "peers") else "choose")


# ---------------------------------------------------------------- caches of entries

EXPECTED = {
    "TopK": TopK,
    "AdaKV": AdaKV,
    "Pyramid": Pyramid,
    "Adaptive": Adaptive,
    "Adaptive, calibrated": Adaptive,
    "TopP": TopP,
    "TopP, calibrated": TopP,
    "HeadKV style": HeadKV,
    "DuoAttention style": DuoAttention,
    "LU-KV style": LUKV,
    "LU-KV style, Risk's measure": LUKV,
    "layers only": LayerShares,
    "all tokens": TopK,
    "all tokens, centred on their own": TopK,
}


def expected_type(entry):
    if entry.section == "dynamic":
        return Mixed
    if entry.section == "patience":
        return TopK if entry.label.startswith("TopK") else Risk
    return EXPECTED.get(entry.label, Risk)


def one_of_every_label():
    """Of our caches; test_peers.py tests the others."""
    entries = [entry for entry in plan(SECTIONS) if entry.section != "peers"]
    return list({(e.section, e.label, e.scorer, str(e.options)): e for e in entries}.values())


def make_calibration(model, scorer):
    counts = torch.tensor([36, 48, 64, 96, 128, 192, 256, 320])
    weight = torch.tensor([[1.0, 5.0], [3.0, 0.5], [8.0, 2.0]])[..., None]
    return Calibration(
        temperatures=torch.linspace(0.5, 2, 6).view(3, 2),
        residuals=torch.zeros(3, 2),
        counts=counts,
        risk=weight * (36 / counts - 36 / 320),
        key_means=torch.zeros(3, 2, 8),
        value_means=torch.zeros(3, 2, 8),
        distortion=(weight[..., None] * torch.tensor([0.001, 0.02, 0.1, 0.4])).expand(-1, -1, 2, -1),
        provenance={
            "geometry": Traits.of(model.config).geometry,
            "layers": [0, 1, 2],
            "scorer": describe_scorer(get_scorer(scorer)),
            "window": 32,
        },
    )


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("llama")


@pytest.mark.parametrize(
    "entry", one_of_every_label(), ids=lambda e: f"{e.section}-{e.scorer}-{e.label}-{e.options.get('scope', '')}"
)
def test_every_entry_makes_its_cache(entry, model):
    if not entry.label.startswith("TopP"):
        entry = replace(entry, n=90)  # less than the tiny model's text
    calibration = None if entry.source is None else make_calibration(model, entry.scorer)
    budget, cache = make_budget(entry, calibration), make_cache(model, entry, calibration)
    assert type(budget) is expected_type(entry)
    if isinstance(budget, TopP):
        assert (budget.p, budget.cap) == (entry.n / 1000, None)
    elif entry.label == "Risk at equal bytes":
        bits = entry.options["bits"]
        token = sum(bits if isinstance(bits, list) else [bits, bits]) + 4 + 5  # bytes, of keys and values of 8
        assert (budget.n - 36) * token <= (90 - 36) * (2 * 16 + 5) < (budget.n - 35) * token
    else:
        assert budget.n == 90
    for name in {"floor", "scope", "dynamic"} & set(entry.options):
        assert getattr(budget, name) == entry.options[name]
    settings = cache.settings
    assert (settings.interval, settings.patience) == (128, entry.options.get("patience", 0))
    assert settings.scorer == get_scorer(entry.scorer)
    tempered = "calibrated" in entry.label
    centred = "bits" in entry.options and entry.source is not None
    assert (settings.calibration is not None) == (tempered or centred or isinstance(budget, Risk))
    assert settings.bits == check_bits(entry.options.get("bits", 16))
    assert (cache.layers[1].temperatures is not None) == tempered

    ids = tiny.make_prompts(1, 384)["input_ids"]
    with torch.no_grad():
        for chunk in ids.split(128, 1):
            model(input_ids=chunk, **{CACHE: cache})
    held = cache.lengths().double()
    if isinstance(budget, TopP):
        assert 36 < held.mean() < 384
    elif isinstance(budget, DuoAttention):
        assert sorted(set(held.flatten().tolist())) == [52, 384]
    elif settings.patience:
        assert held.mean() >= 90
    elif isinstance(budget, HeadKV):
        assert 89 <= held.mean() <= 90
    elif isinstance(budget, LUKV):  # the curves end before the text: a token of one head more or less
        assert abs(held.sum() - 6 * 90) <= 1
    elif entry.options.get("bits") == "auto":
        assert held.mean() >= 90
    else:
        assert held.mean() == budget.n


def test_caches_at_equal_bytes_hold_the_same(model):
    """The tiny model has 32 bits, so its tokens of 16 bits are not compared."""
    held = []
    for entry in plan(["bits"]):
        if entry.label == "Risk at equal bytes" and entry.n == 64:
            cache = make_cache(model, entry, make_calibration(model, entry.scorer))
            with torch.no_grad():
                model(input_ids=tiny.make_prompts(1, 320)["input_ids"], **{CACHE: cache})
            held.append(cache.nbytes())
    assert len(held) == 7
    assert max(held) - min(held) <= 3 * 2 * (2 * 8 + 9)  # of every head, less than one token of 8 bits


# ---------------------------------------------------------------- the worker


class Tokenizer:
    """A token a letter."""

    def __call__(self, text, truncation, max_length):
        assert truncation
        return SimpleNamespace(input_ids=[2 + ord(letter) % 96 for letter in text[:max_length]])


@pytest.fixture
def worker(model, tmp_path, monkeypatch):
    monkeypatch.setattr(budgets, "load", lambda name: (model, Tokenizer()))
    monkeypatch.setattr(budgets, "TEXTS", tmp_path)
    rng = np.random.default_rng(0)
    for name in ("b", "a"):
        (tmp_path / "choose").mkdir(exist_ok=True)
        (tmp_path / "choose" / f"{name}.txt").write_text("".join(map(chr, rng.integers(32, 127, 500))))
    monkeypatch.setattr(
        budgets, "default_texts", lambda: {f"{kind}-{i}-x": f"{kind}{i}zab" * 100 for kind in "pq" for i in "12"}
    )
    return Worker(None, tmp_path / "calibrations")


def test_a_record_holds_what_was_measured(worker, model):
    entries = [Entry("prompt", "TopK", 60, length=320), Entry("shares", "TopK", 80, length=320)]
    records = worker.run(entries)
    names, ids = read_texts(Tokenizer(), "choose", 320)
    assert names == ["a", "b"]
    assert ids.shape == (2, 320)
    for entry, record in zip(entries, records, strict=True):
        found = teacher_forced(
            model,
            ids,
            {"": lambda n=entry.n: HardKVCache(config=model.config, scorer="attention", budget=TopK(n))},
            step=128,
        )[""]
        assert record["names"] == names
        for name in ("excess", "kl", "agreement", "dense_nll"):
            assert record[name] == pytest.approx(getattr(found, name), abs=1e-5)
        assert (record["nbytes"], record["dense_nbytes"]) == (found.nbytes, found.dense_nbytes)
        stored = json.loads(json.dumps(record))
        assert json.dumps({name: stored[name] for name in Entry.__dataclass_fields__}, sort_keys=True) == entry.key


def test_a_text_calibrates_on_its_own_beginning(worker, model):
    source = Source(texts="self", length=384)
    own = Entry("prompt", "its own first quarter", 60, length=450, source=source)
    (record,) = worker.run([own])
    _, ids = read_texts(Tokenizer(), "choose", 450)
    for row, excess in zip(ids.split(1), record["excess"], strict=True):
        made = calibrate(model, [row[:, :384]], scorer=own.scorer, progress=False)
        settings = {"scorer": own.scorer, "budget": Risk(60), "calibration": made}
        make = {"": lambda settings=settings: HardKVCache(config=model.config, **settings)}
        assert excess == pytest.approx(teacher_forced(model, row, make)[""].excess[0], abs=1e-5)
    assert not worker.folder.exists()
    both = teacher_forced(model, ids, {"": lambda: HardKVCache(config=model.config, budget=TopK(60))})[""]
    assert record["dense_nbytes"] == both.dense_nbytes


def letters(*names):
    return [torch.tensor([Tokenizer()(name * 100, True, 384).input_ids]) for name in names]


def test_calibrations_are_made_once_of_the_texts_named(worker, model, monkeypatch):
    texts = letters("p1zab", "q1zab", "p2zab")  # one of each kind first
    found = worker.calibration(Source(count=3, length=384))
    assert torch.equal(found.risk, calibrate(model, texts, scorer="attention", progress=False).risk)
    monkeypatch.setattr(budgets, "calibrate", None)
    assert torch.equal(worker.calibration(Source(count=3, length=384)).risk, found.risk)


def test_gradients_are_of_each_text(worker, model):
    found = worker.calibration(Source(texts="-2-", count=2, length=384, measure="gradient")).risk
    options = {"scorer": "attention", "progress": False}
    parts = [calibrate(model, [t], measure=measures.gradient(model, t), **options) for t in letters("p2zab", "q2zab")]
    assert torch.allclose(found, (parts[0].risk + parts[1].risk) / 2, rtol=1e-4)
    assert not torch.allclose(found, parts[0].risk, rtol=1e-2)


# ---------------------------------------------------------------- resuming


class Pool:
    """In place of ProcessPoolExecutor: notes what is submitted and answers at once."""

    def __init__(self, *args, **kwargs):
        self.sources, self.batches = [], []
        Pool.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, function, argument):
        future = Future()
        if function is budgets._calibrate:
            assert not self.batches
            self.sources.append(argument)
            future.set_result(argument.file)
        else:
            assert function is budgets._run
            self.batches.append(argument)
            future.set_result([asdict(entry) | {"excess": [0.1, 0.2], "nbytes": 3.0} for entry in argument])
        return future

    @property
    def keys(self):
        return {entry.key for batch in self.batches for entry in batch}


def run_with_pool(monkeypatch, out, sections, scorers=("attention", "snapkv", "rkv"), together=4, missing=()):
    monkeypatch.setattr(budgets, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(budgets, "missing_package", lambda backend: f"no {backend}" if backend in missing else None)
    budgets.run(out, list(sections), list(scorers), None, 1, together)
    return Pool.last


def keys(sections):
    return {entry.key for entry in plan(sections)}


def test_only_what_is_missing_runs(monkeypatch, tmp_path):
    out = tmp_path / "new" / "budgets.json"
    assert run_with_pool(monkeypatch, out, ["floor", "prompt"]).keys == keys(["floor", "prompt"])
    pool = run_with_pool(monkeypatch, out, ["floor", "prompt", "tokens"])
    assert pool.keys == keys(["tokens"])
    assert set(pool.sources) == {entry.source for entry in plan(["tokens"])}
    pool = run_with_pool(monkeypatch, out, ["floor", "prompt", "tokens"])
    assert (pool.batches, pool.sources) == ([], [])

    data = json.loads(out.read_text())
    assert "SmolLM2" in data["model"]
    assert len(data["records"]) == len(keys(["floor", "prompt", "tokens"]))
    lost = data["records"].pop(3)  # as after an interrupt
    out.write_text(json.dumps(data))
    (batch,) = run_with_pool(monkeypatch, out, ["floor", "prompt", "tokens"]).batches
    assert [entry.label for entry in batch] == [lost["label"]]
    assert lost in json.loads(out.read_text())["records"]
    assert list(out.parent.glob("*.partial")) == []


def test_entries_without_their_package_are_left_out(monkeypatch, tmp_path, capsys):
    pool = run_with_pool(monkeypatch, tmp_path / "budgets.json", ["peers"], missing=["hqq"])
    assert pool.keys == {entry.key for entry in plan(["peers"]) if entry.options["backend"] == "quanto"}
    assert pool.keys
    assert capsys.readouterr().out.splitlines()[0] == "no hqq"


def test_what_is_no_file_is_left_and_told_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(budgets, "run", lambda *arguments: pytest.fail("it ran"))
    os.mkfifo(tmp_path / "budgets.json")
    monkeypatch.setattr(sys, "argv", ["budgets", "run", "--out", str(tmp_path / "budgets.json")])
    with pytest.raises(SystemExit):
        budgets.main()
    assert "budgets.json' is a FIFO" in capsys.readouterr().err
    assert (tmp_path / "budgets.json").is_fifo()
    monkeypatch.setattr(budgets, "run", lambda out, *arguments: print(out))  # the default is checked too
    monkeypatch.setattr(sys, "argv", ["budgets", "run"])
    budgets.main()
    assert capsys.readouterr().out == f"{Path('eval/results/budgets.json')}\n"


def test_batches_share_texts_and_the_scorer_chooses(monkeypatch, tmp_path):
    pool = run_with_pool(monkeypatch, tmp_path / "all.json", SECTIONS, ["attention"], together=5)
    assert pool.keys == {entry.key for entry in plan(SECTIONS) if entry.scorer == "attention"}
    for batch in pool.batches:
        assert len(batch) <= 5
        assert len({entry.group for entry in batch}) == 1
        assert len({entry.section in ("prompt", "peers") for entry in batch}) == 1  # text by text
    assert pool.sources
    assert all(source.texts != "self" and source.scorer == "attention" for source in pool.sources)
    assert len(pool.sources) == len(set(pool.sources))


# ---------------------------------------------------------------- the report


def make_record(label, n, excess, nbytes, section="main", texts="report", **entry):
    made = asdict(Entry(section, label, n, texts, **entry))
    return made | {"excess": excess, "kl": excess, "nbytes": float(nbytes), "dense_nbytes": 1000.0}


GROUP = ("main", "report", 2048, "attention")
RECORDS = [
    make_record("TopK", 128, [0.4, 0.2, 0.6], 100),
    make_record("TopK", 256, [0.2, 0.1, 0.3], 200),
    make_record("Risk", 128, [0.2, 0.1, 0.3], 100, seed=0),
    make_record("Risk", 128, [0.4, 0.1, 0.1], 100, seed=1),
    make_record("Risk", 128, [0.3, 0.3, 0.3], 100, seed=0, options={"scope": "layer"}),
    make_record("TopP", 500, [0.8, 0.4, 0.4], 50),
    make_record("TopP", 700, [0.2, 0.2, 0.0], 200),
    make_record("Risk", 256, [0.1, 0.1, 0.1], 200, section="patience", options={"patience": 1}),
]


def test_ratio_is_of_means_over_seeds_and_texts():
    study = Study(RECORDS)
    mean, ratio, low, high = study.ratio(GROUP, "Risk", 128)
    assert study.excess(GROUP, "Risk", 128) == pytest.approx([0.3, 0.1, 0.2])
    assert (mean, ratio) == pytest.approx((0.2, 0.5))
    assert 1 / 3 <= low < 0.5 < high <= 3 / 4  # of the texts by themselves: 3/4, 1/2, 1/3
    assert study.ratio(GROUP, "Risk, per layer", 128)[:2] == pytest.approx((0.3, 0.75))
    assert study.ratio(GROUP, "TopK", 128) == pytest.approx((0.4, 1, 1, 1))
    assert study.ratio(GROUP, "Risk", 512) is None
    assert study.ratio(GROUP, "nothing", 128) is None


def test_the_interval_is_that_of_all_resamples():
    """Two texts, ratios 1/2 and 2: a quarter of all pairs of draws each for (a, a) and (b, b), half for mixed ones."""
    study = Study([make_record("TopK", 128, [1.0, 1.0], 9), make_record("Risk", 128, [0.5, 2.0], 9)])
    assert study.ratio(GROUP, "Risk", 128) == pytest.approx((1.25, 1.25, 0.5, 2.0))


def test_top_p_stands_at_topks_bytes():
    study = Study(RECORDS)
    # 100 bytes lie halfway between 50 and 200 in log
    assert study.excess(GROUP, "TopP", 128) == pytest.approx([0.5, 0.3, 0.2])
    assert study.ratio(GROUP, "TopP", 128)[:2] == pytest.approx((1 / 3, 5 / 6))
    assert study.excess(GROUP, "TopP", 256) == pytest.approx([0.2, 0.2, 0.0])
    outside = Study([*RECORDS, make_record("TopK", 64, [1.0, 1.0, 1.0], 49)])
    assert outside.excess(GROUP, "TopP", 64) is None


def test_the_baseline_may_come_from_another_section():
    study = Study(RECORDS)
    assert study.ratio(("patience", *GROUP[1:]), "Risk", 256)[:2] == pytest.approx((0.1, 0.5))
    other = Study([make_record("Risk", 256, [0.1], 1, texts="choose"), *RECORDS])
    assert other.ratio(("main", "choose", 2048, "attention"), "Risk", 256) is None


def write_records(path, records):
    path.write_text(json.dumps({"model": "tiny", "records": [record | {"machine": "abacus"} for record in records]}))


@pytest.fixture
def agg():
    pytest.importorskip("matplotlib").use("Agg")


@pytest.mark.usefixtures("agg")
def test_report_writes_tables_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(intervals, "RESAMPLES", 100)
    path = tmp_path / "budgets.json"
    write_records(path, [*RECORDS[:-1], RECORDS[-1] | {"texts": "choose"}])
    report(path)
    text = (tmp_path / "budgets.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "tiny, on abacus" in text
    risk = next(line for line in text.splitlines() if line.startswith("| Risk |"))
    assert risk.split("|")[2].startswith(" 0.2000 = 0.50 [")
    assert "| Risk | 256 | 0.200 | 0.1000 |" in text  # patience, at the bytes held
    assert (tmp_path / "budgets.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.usefixtures("agg")
@pytest.mark.parametrize(("section", "texts"), [("floor", "choose"), ("bits", "report"), ("lukv", "report")])
def test_report_of_a_section_without_pictures(tmp_path, section, texts):
    """`run --sections floor`, then `report`."""
    path = tmp_path / "budgets.json"
    write_records(path, [make_record("some", 128, [0.1, 0.2], 9, section=section, texts=texts)])
    report(path)
    text = (tmp_path / "budgets.md").read_text()
    assert "| some | 0.1500 |" in text
    assert ("| some | 128 | 16 | 0.064 | 0.1500 [" in text) == (section == "bits")
    assert not (tmp_path / "budgets.png").exists()


def test_the_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["budgets", "run", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        budgets.main()
    shown = capsys.readouterr().out
    assert all(section in shown for section in SECTIONS)

"""The report of the harness and the page of results: their arithmetic, on results made up for it."""

import json

import numpy as np
import pytest

from eval.budgets_report import Study
from eval.report import budget_table, main, markdown, more_bytes, report
from eval.results_page import PAGE, RESULTS, can_differ, harness_findings, page, read_reports, study_findings, verdict
from eval.store import Store
from eval.summary import _at_bytes, summarise

SETTINGS = {
    "model": "made/up",
    "task": "aime24",
    "seed": 0,
    "max_new_tokens": 100,
    "window": 4,
    "sinks": 2,
    "interval": 8,
    "least_dense": 0.0,
    "calibration": "on texts",
    "sampling": {"do_sample": True, "temperature": 0.6, "min_p": None},
    "machines": ["a machine"],
    "budgets": {"1/4": 50},
}
PROBLEMS = 40
# share of right answers, bytes
CONFIGURATIONS = {
    "full": (1.0, 800.0),
    "topk-snapkv-1_4": (0.5, 400.0),
    "topk-snapkv-20": (0.25, 100.0),
    "risk-snapkv-20": (0.75, 103.0),
    "adakv-snapkv-20": (0.25, 100.5),
    "topp-snapkv-p0.9": (0.375, 200.0),
    "adaptive-calibrated-snapkv-20": (0.0, 90.0),
}


def record(number, label, allocated=None):
    share, nbytes = CONFIGURATIONS[label]
    return {
        "id": str(number),
        "sample": 0,
        "correct": number < share * PROBLEMS,
        "new_tokens": 50 + number,
        "truncated": number % 10 == 0,
        "tokens_per_head": [[10.0, 20.0], [30.0, 40.0 + number % 2]],
        "tokens_per_second": 5.0 if number else 1e6,
        "held_mean": nbytes,
        "held_peak": nbytes + number,
        "allocated_mean": allocated,
        "allocated_peak": allocated and 2 * allocated,
        "rows": 4,
    }


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "out")
    made.open(SETTINGS)
    for label in CONFIGURATIONS:
        made.append(label, [record(number, label) for number in range(PROBLEMS)])
        made.merge(label)
    return made


@pytest.fixture
def rows(store):
    return {row["label"]: row for row in summarise(store)["configurations"]}


def test_figures_are_means_over_samples(rows):
    row = rows["topk-snapkv-1_4"]
    assert (row["method"], row["scorer"], row["budget"], row["tokens"]) == ("topk", "snapkv", "1/4", 50)
    assert row["accuracy"]["mean"] == 0.5
    assert row["accuracy"]["low"] < 0.5 < row["accuracy"]["high"]
    assert row["new_tokens"] == 50 + (PROBLEMS - 1) / 2
    assert row["truncated"] == 0.1
    assert row["bytes_peak"] == 400 + PROBLEMS - 1
    assert row["tokens_per_head"]["heads"] == [[10.0, 20.0], [30.0, 40.5]]
    assert row["tokens_per_head"]["mean"] == pytest.approx(25.125)
    assert (row["tokens_per_head"]["min"], row["tokens_per_head"]["max"]) == (10.0, 40.5)
    assert row["tokens_per_second"] == 5.0
    assert next(iter(rows)) == "full"


def test_differences_to_full_are_paired(rows):
    found = rows["topk-snapkv-20"]["versus_full"]
    assert found["mean"] == -0.75
    assert found["problems"] == PROBLEMS
    assert "versus_full" not in rows["full"]


def test_methods_are_compared_with_topk_at_their_own_bytes(rows):
    assert "versus_topk" not in rows["topk-snapkv-20"]
    # halfway between the budgets in the logarithm of bytes: .375
    assert rows["topp-snapkv-p0.9"]["versus_topk"]["mean"] == pytest.approx(0.0)
    assert "more_bytes" not in rows["topp-snapkv-p0.9"]
    assert rows["adakv-snapkv-20"]["versus_topk"]["mean"] == 0.0
    share = np.log(1.03) / np.log(4)
    assert rows["risk-snapkv-20"]["versus_topk"]["mean"] == pytest.approx(0.75 - (0.25 * (1 - share) + 0.5 * share))
    assert rows["risk-snapkv-20"]["more_bytes"] == pytest.approx(0.03)
    # fewer bytes than topk was ever run with: no comparison
    assert "versus_topk" not in rows["adaptive-calibrated-snapkv-20"]


def test_beyond_topks_budgets_the_nearest_counts_if_it_is_near():
    uniform = [{"label": "a", "bytes_mean": 100.0}, {"label": "b", "bytes_mean": 400.0}]
    accuracies = {"a": {"1": 0.0}, "b": {"1": 1.0}}
    assert _at_bytes(uniform, accuracies, 200.0) == (200.0, {"1": pytest.approx(0.5)})
    assert _at_bytes(uniform, accuracies, 412.0) == (400.0, {"1": 1.0})
    assert _at_bytes(uniform, accuracies, 440.0) == (440.0, {})
    assert _at_bytes([], {}, 440.0) == (440.0, {})


def test_the_table_says_who_used_more_bytes(rows):
    table = budget_table(list(rows.values()))
    assert table[0] == "| | 20 | 1/4 |"
    (risk,) = [line for line in table if line.startswith("| risk")]
    assert "75.0 [" in risk
    assert "**+3% bytes**" in risk
    (full,) = [line for line in table if line.startswith("| full")]
    assert full.count("100.0 [100.0, 100.0]") == 2
    assert not any("topp" in line for line in table)
    assert "bytes**" not in "".join(line for line in table if "adakv" in line)
    assert more_bytes({"more_bytes": 0.009}) == more_bytes(None) == ""


def test_the_allocators_bytes_are_told_and_not_compared(store):
    before = summarise(store)["configurations"]
    for label in CONFIGURATIONS:
        (store.folder / f"{label}.jsonl").unlink()
        store.append(label, [record(number, label, allocated=2000.0) for number in range(PROBLEMS)])
        store.merge(label)
    summary = summarise(store)
    assert {row["allocated_mean"] for row in before} == {None}
    assert summary["configurations"] == [row | {"allocated_mean": 2000.0} for row in before]
    assert markdown(summary, "x.png").count("2.0 KiB") == len(CONFIGURATIONS)


def test_the_command_writes_three_files(store, tmp_path, capsys):
    main([str(store.folder), "--to", str(tmp_path / "results" / "made-2.5")])
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"made-2.5.json", "made-2.5.md", "made-2.5.png"}
    text = (tmp_path / "results" / "made-2.5.md").read_text()
    assert text in capsys.readouterr().out
    assert "temperature 0.6" in text
    assert "min_p" not in text
    assert "- calibrated on the texts that come with hardkv\n" in text
    assert "(made-2.5.png)" in text
    with pytest.raises(SystemExit, match="no results of python"):
        main([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    Store(tmp_path / "empty").open(SETTINGS)
    with pytest.raises(SystemExit, match="holds no results yet"):
        main([str(tmp_path / "empty")])


def test_parts_belong_to_their_own_configuration(tmp_path):
    store = Store(tmp_path, rank=3)
    for label in ("topp-snapkv-p0.9", "topp-snapkv-p0.95", "topp-snapkv-p0"):
        store.append(label, [{"id": label, "sample": 0}])
    store.open(SETTINGS)
    for label in ("topp-snapkv-p0.9", "topp-snapkv-p0.95", "topp-snapkv-p0"):
        assert [record["id"] for record in store.records(label)] == [label]


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.1, 0.2, "helps"), (-0.2, -0.1, "does not"), (0.0, 0.1, "open"), (-0.1, 0.1, "open")]
)
def test_a_verdict_is_read_off_the_interval(low, high, said):
    assert verdict({"low": low, "high": high}) == said


def test_findings_of_the_harness(store, tmp_path):
    report(store.folder, tmp_path / "results" / "made-up")
    (tmp_path / "results" / "other.json").write_text('{"records": []}')
    reports = read_reports(tmp_path / "results")
    assert list(reports) == ["made-up"]
    found = list(harness_findings(reports))
    assert [kind for kind, text in found if text.startswith("`risk` (snapkv)")] == ["helps"]
    assert [kind for kind, text in found if text.startswith("`adakv`")] == ["open"]
    assert not [text for _, text in found if text.startswith("`adaptive")]
    (row,) = [row for row in reports["made-up"]["configurations"] if row["method"] == "risk"]
    row["versus_topk"]["problems"] = 19
    assert [kind for kind, text in harness_findings(reports) if text.startswith("`risk`")] == ["open"]
    row["versus_topk"]["more_bytes"] = 0.03  # a gain that more bytes may explain is none
    assert not [text for _, text in harness_findings(reports) if text.startswith("`risk`")]


@pytest.mark.parametrize(
    ("ours", "difference", "could"),
    [
        (0.5, 0.0, True),
        (0.0, -0.5, True),
        (0.99, 0.1, True),
        (0.02, 0.0, False),
        (0.03, 0.03, False),
        (1.0, 0.0, False),
    ],
)
def test_where_both_fail_or_both_succeed_nothing_is_told(ours, difference, could):
    assert can_differ({"accuracy": {"mean": ours}, "versus_topk": {"mean": difference}}) == could


def test_a_verdict_is_over_the_budgets_that_tell_something(store, tmp_path):
    report(store.folder, tmp_path / "results" / "made-up")
    reports = read_reports(tmp_path / "results")
    (row,) = [row for row in reports["made-up"]["configurations"] if row["method"] == "risk"]
    nothing = row | {
        "accuracy": {"mean": 0.0},
        "versus_topk": row["versus_topk"] | {"mean": 0.0, "low": 0.0, "high": 0.0},
    }
    reports["made-up"]["configurations"].append(nothing)
    assert [kind for kind, text in harness_findings(reports) if text.startswith("`risk`")] == ["helps"]
    nothing["accuracy"] = {"mean": 0.5}
    assert [kind for kind, text in harness_findings(reports) if text.startswith("`risk`")] == ["open"]


def test_what_the_full_cache_cannot_do_is_listed_as_not_tested(store, tmp_path):
    report(store.folder, tmp_path / "results" / "made-up")
    reports = read_reports(tmp_path / "results")
    assert "methods were not run" not in page(reports, Study([]), "none")
    reports["made-up"]["settings"]["least_dense"] = 1.1
    text = page(reports, Study([]), "none")
    assert "- [made-up](#made-up): The full cache solves 100%, below 110%" in text.partition("## Not tested")[2]


def study_record(label, n, excess):
    return {
        "section": "main",
        "label": label,
        "n": n,
        "texts": "report",
        "length": 2048,
        "scorer": "attention",
        "options": {},
        "excess": excess,
        "nbytes": 1.0,
    }


def test_findings_of_the_study_need_every_budget(tmp_path):
    losses = {"TopK": (1.0, 1.0), "Risk": (0.5, 0.4), "AdaKV": (1.5, 1.2), "Pyramid": (0.5, 1.5)}
    records = [
        study_record(label, n, [factor * text for text in (1.0, 1.1, 1.3)])
        for label, factors in losses.items()
        for n, factor in zip((128, 256), factors, strict=True)
    ]
    found = {text.split(" (")[0]: kind for kind, text in study_findings(Study(records))}
    assert found == {"Risk": "helps", "AdaKV": "does not", "Pyramid": "open"}


def test_the_committed_page_is_of_the_committed_results():
    data = json.loads((RESULTS / "budgets.json").read_text())
    assert PAGE.read_text() == page(read_reports(RESULTS), Study(data["records"]), data["model"])

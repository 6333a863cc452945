r"""Define the tasks of the harness: problems with gold answers, their prompts, and their grading."""

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.grading import boxed_exactly, contains_all, grade
from eval.needle import needles
from eval.problem import Problem
from eval.reasoner import problems as reasoner
from hardkv.rows import as_question, as_text, json_lines
from hardkv.selectors.checks import check_count

# Alternative field names in data sets; the first one present in a row counts.
PROBLEM_FIELDS = ("problem", "question", "problem_statement", "prompt")
ANSWER_FIELDS = ("answer", "golden_answer", "final_answer", "expected_answer")
ID_FIELDS = ("id", "unique_id", "uuid", "problem_idx", "ID")
REASON = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class Task:
    """Describe how to ask and grade a set of problems.

    Args:
        source: data set of the Hub, configuration (None: the default) and split; None for generated problems.
        instruction: text after every problem.
        grade: (text, gold) -> whether right. boxed: whether a truncated text counts only with a boxed answer.
        max_new_tokens: default for the longest answer.
        sampled: whether to sample by the model's generation config; otherwise greedy.
        least_dense: minimum accuracy of the full cache for comparing other caches.
    """

    source: tuple[str, str | None, str] | None = None
    instruction: str = REASON
    grade: Callable[[str, str], bool] = grade
    boxed: bool = True
    max_new_tokens: int = 32768
    sampled: bool = True
    least_dense: float = 0.0

    def correct(self, text: str, gold: str, truncated: bool) -> bool:
        """Return whether a generated text is right; numbers in the middle of truncated reasoning are no answer."""
        if truncated and self.boxed and r"\boxed" not in text:
            return False
        return self.grade(text, gold)


TASKS = {
    "aime24": Task(("HuggingFaceH4/aime_2024", None, "train")),
    "aime25": Task(("math-ai/aime25", None, "test")),
    "math500": Task(("HuggingFaceH4/MATH-500", None, "test")),
    "gsm8k": Task(("openai/gsm8k", "main", "test"), max_new_tokens=4096),
    "umath": Task(("toloka/u-math", None, "test")),
    "needle": Task(instruction="", grade=contains_all, boxed=False, max_new_tokens=48, sampled=False, least_dense=0.8),
    "reasoner": Task(instruction="", grade=boxed_exactly, max_new_tokens=4000, sampled=False, least_dense=0.8),
}


def load_problems(
    name: str,
    *,
    data: Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    tokenizer: Any = None,
    length: int = 1024,
    facts: int = 1,
    asked: int | None = None,
    difficulty: int | None = None,
) -> list[Problem]:
    """Load the problems of a task.

    Args:
        name: key of `TASKS`. data: JSON, JSONL or parquet file with problems, in place of the Hub's.
        seed: seed for shuffling data sets, so that the first `limit` are a random choice, and for generators.
        limit: number of problems, at least 1; None means all, or 100 generated ones.
        tokenizer, length, facts, asked: arguments for needles; asked=None asks for all facts.
        difficulty: difficulty of reasoner problems; None means the generator's default.

    Raises:
        ValueError: a row lacks problem or answer, there are no rows, or a value is out of range. OSError: no such data.
    """
    if limit is not None:
        limit = check_count("--limit", limit, 1)
    if name == "needle":
        return needles(limit or 100, length, facts, asked or facts, seed, tokenizer)
    if name == "reasoner":
        options = {} if difficulty is None else {"difficulty": difficulty}
        found = reasoner.problems(count=limit or 100, seed=seed, **options)
        return [Problem(str(problem.id), problem.problem, str(problem.answer)) for problem in found]
    source = TASKS[name].source
    assert source is not None
    rows = read_rows(data) if data is not None else _from_hub(*source)
    if name == "umath":
        rows = {place: row for place, row in rows.items() if not _has_image(row)}
    try:
        problems = normalise(rows)
    except ValueError as error:
        raise ValueError(f"{source[0] if data is None else f'--data {data}'}: {error}") from None
    random.Random(seed).shuffle(problems)
    return problems[:limit]


def normalise(rows: Mapping[str, dict[str, Any]]) -> list[Problem]:
    """Convert rows of a data set, with any known field names, to problems; ids become text, or numbers if missing.

    Args:
        rows: rows by their place in the file, for messages.

    Raises:
        ValueError: no rows, a row whose problem or answer is missing or is not text (numbers and one user message
            become text), or two rows with the same id.
    """
    problems = []
    for number, (place, row) in enumerate(rows.items()):
        text, answer = (
            _field(row, names, place, read) for names, read in ((PROBLEM_FIELDS, as_question), (ANSWER_FIELDS, as_text))
        )
        if not (text and answer):
            names = ANSWER_FIELDS if text else PROBLEM_FIELDS
            raise ValueError(f"{place} has none of the fields {', '.join(names)}: it has {', '.join(map(str, row))}")
        if "####" in answer:  # GSM8K: take the answer after the solution, without thousands separators
            answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.rpartition("####")[2])
        problems.append(Problem(_field(row, ID_FIELDS, place, as_text) or str(number), text.strip(), answer.strip()))
    if not problems:
        raise ValueError("the data set has no problems")
    doubled = len(problems) - len({problem.id for problem in problems})
    if doubled:
        raise ValueError(f"{doubled} problems share an id with another: results could not be told apart")
    return problems


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Read rows of a local file by place: parquet, JSON with a list or an object with one under "data", or JSON lines.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it has another content.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: there is no such file")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return _numbered(parquet.read_table(path).to_pylist())
    # do not use `datasets`, which needs one type per column, because ids may have several
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: it is no text in UTF-8 ({error})") from None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        try:
            rows = {f"line {number}": row for number, row in json_lines(text)}
        except ValueError as error:
            raise ValueError(f"--data {path}: neither JSON nor a JSON object a line: {error}") from None
    else:
        if isinstance(whole, dict):
            whole = whole["data"] if isinstance(whole.get("data"), list) else [whole]
        rows = _numbered(whole) if isinstance(whole, list) else {"it": whole}
    for place, row in rows.items():
        if not isinstance(row, dict):
            raise ValueError(f"--data {path}: {place} is no object with a problem and an answer, but {str(row)[:60]!r}")
    return rows


def _numbered(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"row {number}": row for number, row in enumerate(rows, 1)}


def _from_hub(name: str, configuration: str | None, split: str) -> dict[str, dict[str, Any]]:
    from datasets import load_dataset

    return _numbered(load_dataset(name, configuration, split=split))


def _has_image(row: dict[str, Any]) -> bool:
    return bool(row.get("has_image") or row.get("image"))


def _field(row: dict[str, Any], names: tuple[str, ...], place: str, read: Callable[[Any], str]) -> str:
    """Return the text of the first field that is present and not blank; empty if there is none."""
    for name in names:
        if row.get(name) is not None:
            try:
                text = read(row[name])
            except ValueError as error:
                raise ValueError(f"{place}: {name!r} {error}") from None
            return text if text.strip() else ""
    return ""

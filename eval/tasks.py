r"""The tasks of the harness: problems with gold answers, how they are asked, and how answers are graded."""

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.grading import boxed_exactly, contains_all, grade

# Fields by which data sets call the same thing; the first that a row has counts.
PROBLEM_FIELDS = ("problem", "question", "problem_statement", "prompt")
ANSWER_FIELDS = ("answer", "golden_answer", "final_answer", "expected_answer")
ID_FIELDS = ("id", "unique_id", "uuid", "problem_idx", "ID")
REASON = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class Problem:
    """One problem. `id` is unique in its task; `answer` the gold answer, as text."""

    id: str
    text: str
    answer: str


@dataclass(frozen=True)
class Task:
    """How a set of problems is asked and graded.

    Args:
        source: hub data set, configuration (None: the default) and split; None for generated problems.
        instruction: what follows every problem's text.
        grade: (text, gold) -> right or not. boxed: whether a truncated text counts only with a boxed answer.
        max_new_tokens: longest answer unless another is asked for.
        sampled: by the model's generation config; otherwise greedy.
        least_dense: accuracy of the full cache below which nothing can be learnt about other caches.
    """

    source: tuple[str, str | None, str] | None = None
    instruction: str = REASON
    grade: Callable[[str, str], bool] = grade
    boxed: bool = True
    max_new_tokens: int = 32768
    sampled: bool = True
    least_dense: float = 0.0

    def correct(self, text: str, gold: str, truncated: bool) -> bool:
        """Whether a generated text is right; numbers in the middle of a reasoning that was cut off are no answer."""
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
    """The problems of a task.

    Args:
        name: key of `TASKS`. data: JSON, JSONL or parquet file with the problems instead of the hub's.
        seed: data sets are shuffled by it, so that the first `limit` are no special ones; generators start from it.
        limit: problems; None is all, and 100 of those that are generated.
        tokenizer, length, facts, asked: of needles; asked=None is all of them.
        difficulty: of reasoner problems, None is the generator's own.

    Raises:
        ValueError: a row without problem or answer, no rows, or a value out of range. OSError: no such data.
    """
    if name == "needle":
        from eval.needle import needles

        return needles(limit or 100, length, facts, asked or facts, seed, tokenizer)
    if name == "reasoner":
        from eval.reasoner.problems import problems as reasoner_problems

        options = {} if difficulty is None else {"difficulty": difficulty}
        found = reasoner_problems(count=limit or 100, seed=seed, **options)
        return [Problem(str(problem.id), problem.problem, str(problem.answer)) for problem in found]
    source = TASKS[name].source
    assert source is not None
    rows = read_rows(data) if data is not None else _from_hub(*source)
    if name == "umath":
        rows = [row for row in rows if not _has_image(row)]
    problems = normalise(rows)
    random.Random(seed).shuffle(problems)
    return problems[:limit]


def normalise(rows: Iterable[dict[str, Any]]) -> list[Problem]:
    """Problems of a data set's rows, whatever it calls its fields; ids are made texts, and numbered if there are none.

    Raises:
        ValueError: no rows, a row without problem or answer, or two rows with one id.
    """
    problems = []
    for number, row in enumerate(rows):
        text, answer = _field(row, PROBLEM_FIELDS, number), _field(row, ANSWER_FIELDS, number)
        if "####" in answer:  # GSM8K: the solution, then the answer without its thousands' commas
            answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.rpartition("####")[2])
        name = next((str(row[key]) for key in ID_FIELDS if row.get(key) is not None), str(number))
        problems.append(Problem(name, text.strip(), answer.strip()))
    if not problems:
        raise ValueError("the data set has no problems")
    doubled = len(problems) - len({problem.id for problem in problems})
    if doubled:
        raise ValueError(f"{doubled} problems share an id with another: results could not be told apart")
    return problems


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a local file: parquet, or JSON with a list, an object with one under "data", or a row a line.

    Raises:
        FileNotFoundError, ValueError: no such file, or something else in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: there is no such file")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    # not by `datasets`, which wants a column to be of one type, and ids need not be
    text = path.read_text(encoding="utf-8")
    try:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"--data {path}: neither JSON nor a JSON object a line ({error})") from None
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f"--data {path}: expected a list of objects with a problem and an answer each")
    return rows


def _from_hub(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    return list(load_dataset(name, configuration, split=split))


def _has_image(row: dict[str, Any]) -> bool:
    return bool(row.get("has_image") or row.get("image"))


def _field(row: dict[str, Any], names: tuple[str, ...], number: int) -> str:
    found = next((str(row[name]) for name in names if row.get(name) is not None), "")
    if not found.strip():
        raise ValueError(f"row {number} has none of the fields {', '.join(names)}: it has {', '.join(row)}")
    return found

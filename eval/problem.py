"""Define the problems that tasks consist of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem. `id` is unique in its task; `answer` is the gold answer, as text."""

    id: str
    text: str
    answer: str

"""What every task consists of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem. `id` is unique in its task; `answer` the gold answer, as text."""

    id: str
    text: str
    answer: str

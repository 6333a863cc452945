"""What the writers of tables share: reading a JSON file of eval/results, and formatting a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.markdown import line, table

RESULTS = Path(__file__).parents[1] / "eval" / "results"


def read(name: str) -> Any:
    """Read a file of eval/results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table."""
    return "\n".join([*table(line(head), rows), ""])

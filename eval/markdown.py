"""Format tables of Markdown pages."""

from collections.abc import Iterable, Sequence


def line(cells: Iterable[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def table(head: str, rows: Iterable[Sequence[str]], rule: str = " --- ") -> list[str]:
    """Return the lines of a table.

    Args:
        head: the line of headings, as returned by `line`.
        rows: the cells of each following line.
        rule: one cell of the line between headings and rows.
    """
    return [head, f"|{rule}" * (head.count("|") - 1) + "|", *map(line, rows)]

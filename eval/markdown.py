"""Tables of Markdown pages."""

from collections.abc import Iterable, Sequence


def line(cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def table(head: str, rows: Iterable[Sequence[str]], rule: str = " --- ") -> list[str]:
    """The lines of a table.

    Args:
        head: the line of headings, as `line` writes it.
        rows: the cells of every line below.
        rule: a cell of the line between them.
    """
    return [head, f"|{rule}" * (head.count("|") - 1) + "|", *map(line, rows)]

"""Rows of a user's data: JSON lines, and what of a row is a text."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Every line's value with the line's number, from 1; empty lines are left out.

    Raises:
        ValueError: a line is no JSON, with its number.
    """
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 and the like may stand in strings
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON ({error.msg} at character {error.pos + 1})") from None


def as_text(value: Any) -> str:
    """A text as it is, a number as it is written.

    Raises:
        ValueError: anything else, which has no one form as a text; with what it is.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"is {value}: it must be a text or a finite number")
        return str(value)
    hint = ""
    if isinstance(value, list | dict) and value:
        hint = "; is the file a table by columns? Write it by rows, a JSON object with one problem on each line"
    raise ValueError(f"is {_shown(value)}: it must be a text or a number{hint}")


def as_question(value: Any) -> str:
    """`as_text`, and of a chat's messages, `[{"role": "user", "content": text}]`, the one user's text.

    Raises:
        ValueError: anything else, such as messages of other roles, which would have to be left out.
    """
    if not (isinstance(value, list) and value and all(_is_message(each) for each in value)):
        return as_text(value)
    roles = [message["role"] for message in value]
    if roles != ["user"]:
        raise ValueError(f"holds messages of {', '.join(map(str, roles))}: it must be a text, or one message of user")
    if not isinstance(value[0]["content"], str):
        raise ValueError(f"holds a message whose content is {_shown(value[0]['content'])}: it must be a text")
    return value[0]["content"]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def _shown(value: Any) -> str:
    """A value's type, and how it begins."""
    shown = repr(value)
    return f"of type {type(value).__name__}, {shown if len(shown) <= 60 else shown[:60] + '...'}"

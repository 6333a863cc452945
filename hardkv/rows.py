"""Rows of a user's data: JSON lines, and the text in a row."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Yield every line's number, from 1, and its value. Skip empty lines.

    Raises:
        ValueError: a line is not JSON; the message has its number.
    """
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold U+2028 and the like
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON ({error.msg} at character {error.pos + 1})") from None


def as_text(value: Any) -> str:
    """Return a text as it is, and a number as it is written.

    Raises:
        ValueError: the value is something else, which has no single form as text; the message says what it is.
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
    """Return `as_text` of a value; for the messages of a chat, `[{"role": "user", "content": text}]`, the user's text.

    Raises:
        ValueError: the value is something else, such as messages of other roles, which would be lost.
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
    """Return a value's type and how it begins."""
    shown = repr(value)
    return f"of type {type(value).__name__}, {shown if len(shown) <= 60 else shown[:60] + '...'}"

"""Checks of hyperparameters: errors name the argument, the value and what is allowed."""

import difflib
from collections.abc import Iterable
from typing import Any


def check_count(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value} must be >= {low}" + (f" and <= {high}" if high is not None else ""))


def check_fraction(name: str, value: Any, low_open: bool) -> None:
    """Raise unless `value` is a number in (0, 1] (or [0, 1])."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    if not (0 < value <= 1 if low_open else 0 <= value <= 1):
        raise ValueError(f"{name}={value} must lie in {'(' if low_open else '['}0, 1]")


def check_name(kind: str, name: Any, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest known name, unless `name` is known."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(str(name).lower(), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{kind}={name!r} is not known.{hint} Available: {', '.join(known)}")

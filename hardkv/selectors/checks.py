"""Checks of hyperparameters. An error names the argument, the value and the allowed values."""

import difflib
import numbers
import operator
from collections.abc import Iterable
from typing import Any


def check_count(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return any integer (numpy's, a tensor of one) as a plain int; raise unless it lies in [low, high]."""
    try:
        if _is_bool(value):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}") from None
    if count < low or (high is not None and count > high):
        raise ValueError(f"{name}={count} must be >= {low}" + (f" and <= {high}" if high is not None else ""))
    return count


def check_fraction(name: str, value: Any, low_open: bool) -> "int | float":
    """Return any real number as a plain int or float; raise unless it lies in (0, 1] (or [0, 1])."""
    if _is_bool(value) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    plain = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not (0 < plain <= 1 if low_open else 0 <= plain <= 1):
        raise ValueError(f"{name}={value} must lie in {'(' if low_open else '['}0, 1]")
    return plain


def settle(owner: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass, in its `__post_init__`, to checked values."""
    for name, value in values.items():
        object.__setattr__(owner, name, value)


def _is_bool(value: Any) -> bool:
    """Whether `value` is a truth value: Python's, numpy's or a tensor's."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def check_name(kind: str, name: Any, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest known name, unless `name` is known."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(str(name).lower(), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{kind}={name!r} is not known.{hint} Available: {', '.join(known)}")

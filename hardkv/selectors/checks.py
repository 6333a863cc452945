"""Checks of hyperparameters: errors name the argument, the value and what is allowed."""

import difflib
import numbers
import operator
from collections.abc import Iterable
from typing import Any


def check_count(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as a plain int, whatever integer it is (numpy's, a tensor of one); raise unless it is in [low, high]."""
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
    """`value` as a plain number, whatever real one it is; raise unless it is in (0, 1] (or [0, 1])."""
    if _is_bool(value) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    plain = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not (0 < plain <= 1 if low_open else 0 <= plain <= 1):
        raise ValueError(f"{name}={value} must lie in {'(' if low_open else '['}0, 1]")
    return plain


def settle(owner: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass to what the checks made of them; for its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(owner, name, value)


def _is_bool(value: Any) -> bool:
    """Whether it is a truth value, Python's, numpy's or a tensor's."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def check_name(kind: str, name: Any, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest known name, unless `name` is known."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(str(name).lower(), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{kind}={name!r} is not known.{hint} Available: {', '.join(known)}")

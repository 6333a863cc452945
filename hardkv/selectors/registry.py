"""Names of scorers and budgets, for settings and JSON."""

from typing import TypeVar

T = TypeVar("T", bound=type)


def add_to_registry(registry: dict[str, type], name: str, cls: T) -> T:
    """Enter `cls` under `name`; a notebook may enter its own class again, nobody replaces a built-in."""
    if name in registry and registry[name].__module__.startswith("hardkv."):
        raise ValueError(f"the name {name!r} is taken by {registry[name].__qualname__}: choose another")
    registry[name] = cls
    return cls

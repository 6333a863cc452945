"""Registers scorers and budgets by name, for settings and JSON."""

from typing import TypeVar

T = TypeVar("T", bound=type)


def add_to_registry(registry: dict[str, type], name: str, cls: T) -> T:
    """Register `cls` as `name`. A notebook may register its own class again; nobody may replace a built-in."""
    if name in registry and registry[name].__module__.startswith("hardkv."):
        raise ValueError(f"the name {name!r} is taken by {registry[name].__qualname__}: choose another")
    registry[name] = cls
    return cls
